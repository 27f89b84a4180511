"""The task of a checkpoint: read from its configuration, its other small files and, where these are silent, its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional, Sequence, Tuple

from traceserve_runtime.tasks import TASKS

from traceserve.building.checkpoints import heads
from traceserve.building.checkpoints.head_weights import by_weights, check_labels
from traceserve.building.config import libraries
from traceserve.building.config.rules import check_together
from traceserve.building.config.setup_config import AUTO_TASK, SetupConfig
from traceserve.errors import SourceError

# What sentence-transformers calls its kinds of models (config_sentence_transformers.json, "model_type"), and their tasks.
_SENTENCE_TRANSFORMERS = {"SentenceTransformer": "feature_extraction", "CrossEncoder": "text_ranking"}
# Where sentence-transformers keeps a cross-encoder's activation in config.json: since its version 4, and before.
_CROSS_ENCODER_KEYS = ("sentence_transformers", "sbert_ce_default_activation_function")
# The labels of natural language inference, in any order; by such a head zero_shot_classification can answer.
_INFERENCE = re.compile(r"^(not[_ -])?(entail|contradict|neutral)", re.IGNORECASE)
# What a model card's `pipeline_tag` may say, and the task; it decides between tasks that share a head.
_TAGS = {
    "text-classification": "sequence_classification",
    "zero-shot-classification": "zero_shot_classification",
    "text-ranking": "text_ranking",
    "feature-extraction": "feature_extraction",
    "sentence-similarity": "feature_extraction",
    "text-generation": "text_generation",
    "text2text-generation": "text2text_generation",
    "summarization": "text2text_generation",
    "translation": "text2text_generation",
    "fill-mask": "fill_mask",
}
# Of an architecture that several auto classes load, those that stand back: BART is trained to write, and fills masks by the way.
_STANDS_BACK = {heads.BOTH: heads.MASKED}


class Resolved(NamedTuple):
    """A configuration whose task is a task, and how it was found: empty where it was configured."""

    config: SetupConfig
    reason: str


class _Found(NamedTuple):
    """Tasks that the evidence leaves open, and the evidence in words."""

    tasks: Tuple[str, ...]
    evidence: str


def resolve(config: SetupConfig, folder: Path) -> Resolved:
    """The configuration with the checkpoint's task in place of "auto"; raises SourceError, ConfigError.

    A configured task is compared with the checkpoint's head, which may have another task's weights under the same names.
    """
    if config.task != AUTO_TASK:
        _check(config, folder, with_weights=True)
        _check_labels(config, folder)
        return Resolved(config, "")
    found = _gguf(config) or _search(config, folder, with_weights=True)
    assert found is not None  # with weights there is always an answer
    [task] = _one(config, found).tasks
    resolved = config.model_copy(update={"task": task})
    check_together(resolved)
    _check_labels(resolved, folder)
    return Resolved(resolved, found.evidence)


def _check_labels(config: SetupConfig, folder: Path) -> None:
    task = TASKS[config.task]
    facts = _read_json(folder / "config.json") if task.labelled and not config.allow_untrained_head else None
    if isinstance(facts, dict):
        check_labels(config, folder, facts, task.auto_model)


def check_early(config: SetupConfig, folder: Path) -> None:
    """Raise what `resolve` will raise, as far as it can be known without the weights, which are not there yet."""
    if config.task != AUTO_TASK:
        _check(config, folder, with_weights=False)
        return
    if not (folder / "config.json").is_file():
        return  # what is missing is said of the whole
    found = _gguf(config) or _search(config, folder, with_weights=False)
    if found is not None:
        [task] = _one(config, found).tasks
        check_together(config.model_copy(update={"task": task}))


def _check(config: SetupConfig, folder: Path, with_weights: bool) -> None:
    """Raise SourceError if the checkpoint's head is another task's than the configured one."""
    task = TASKS[config.task]
    # Any model has features to be extracted, as the pipeline does; and a trial may have a random head.
    if config.gguf_file or config.allow_untrained_head or task.auto_model == heads.BASE:
        return
    facts = _read_json(folder / "config.json")
    if not isinstance(facts, dict):
        return  # the loader says what is missing
    named = heads.named(facts)
    if named is None:
        if not with_weights:
            return
        named = by_weights(config, folder, facts)
    if named is None or task.auto_model in named.auto_models:
        return
    fitting = [name for name, kind in TASKS.items() if kind.auto_model in named.auto_models]
    advice = f'set "task": {_quoted(fitting)}, or name' if fitting else "no task here reads that head; name"
    raise SourceError(
        f"{config.model_name} holds no trained weights for the task {config.task}: {named.evidence}; "
        f"{advice} a checkpoint that was fine-tuned for {config.task}"
    )


def _gguf(config: SetupConfig) -> Optional[_Found]:
    if config.gguf_file is None:
        return None
    read = tuple(name for name, task in TASKS.items() if libraries.reading_gguf(task))
    return _Found(read, f"from gguf_file: {config.gguf_file}")


def _search(config: SetupConfig, folder: Path, with_weights: bool) -> Optional[_Found]:
    """The tasks that a checkpoint can be for; None where only its weights can tell and these are not asked."""
    found = _sentence_transformer(config, folder)
    if found is not None:
        return found
    facts = _read_json(folder / "config.json")
    if not isinstance(facts, dict):
        raise SourceError(f"{config.model_name}: {folder / 'config.json'} should hold a JSON object")
    named = heads.named(facts)
    if named is None:
        if not with_weights:
            return None
        named = by_weights(config, folder, facts)
    if named is None:
        known = facts.get("architectures") and heads.is_base(facts)
        named = heads.Head((heads.BASE,) if known else tuple(heads.TABLES), heads.described(facts))
    auto_models = set(named.auto_models) - {_STANDS_BACK.get(auto_model, "") for auto_model in named.auto_models}
    tasks = tuple(name for name, task in TASKS.items() if task.auto_model in auto_models)
    if not tasks:
        raise SourceError(
            f"{config.model_name} is for none of the tasks here: {named.evidence}; name another checkpoint, or set "
            '"task": "feature_extraction" for what its layers make of a text'
        )
    found = _classifiers(_Found(tasks, f"from {named.evidence}"), facts)
    tagged = _tag(folder)
    if len(found.tasks) > 1 and tagged in found.tasks:
        return _Found((tagged,), f"{found.evidence}, and the model card's pipeline_tag")
    return found


def _sentence_transformer(config: SetupConfig, folder: Path) -> Optional[_Found]:
    """The task of a folder that sentence-transformers wrote; None for others."""
    facts = _read_json(folder / "config_sentence_transformers.json")
    kind = facts.get("model_type") if isinstance(facts, dict) else None
    if kind is not None and kind not in _SENTENCE_TRANSFORMERS:
        raise SourceError(
            f"{config.model_name} is a {kind} of sentence-transformers (config_sentence_transformers.json), for which "
            f"there is no task here; name a {' or a '.join(_SENTENCE_TRANSFORMERS)}, or set the task yourself"
        )
    if kind is not None:
        return _Found((_SENTENCE_TRANSFORMERS[kind],), f"from config_sentence_transformers.json: {kind}")
    modules = _read_json(folder / "modules.json")
    if modules is None:
        return None
    return _Found(("feature_extraction",), "from modules.json: sentence-transformers")


def _classifiers(found: _Found, facts: Mapping[str, Any]) -> _Found:
    """Of the tasks that share a classifier's head, those that its outputs and their names are fit for."""
    shared = {name for name in found.tasks if TASKS[name].auto_model == heads.SEQUENCE}
    if not shared:
        return found
    labels = heads.label_names(facts)
    if len(labels) == 1:
        key = next((key for key in _CROSS_ENCODER_KEYS if facts.get(key)), None)
        left = ("text_ranking",) if key else ("sequence_classification", "text_ranking")
        evidence = f" with {key}" if key else " with one output"
    elif all(_INFERENCE.match(label) for label in labels):
        left, evidence = (
            ("sequence_classification", "zero_shot_classification"),
            f" with the labels {', '.join(labels)}",
        )
    else:
        left, evidence = ("sequence_classification",), ""
    others = tuple(name for name in found.tasks if name not in shared)
    return _Found((*left, *others), found.evidence + evidence)


def _one(config: SetupConfig, found: _Found) -> _Found:
    """What was found, if it is one task; raises SourceError with the candidates."""
    if len(found.tasks) > 1:
        raise SourceError(
            f"{config.model_name} can be for several tasks ({found.evidence}), and its files do not say for which: set "
            f'"task": {_quoted(found.tasks)}'
        )
    return found


def _quoted(names: Sequence[str]) -> str:
    return " or ".join(f'"{name}"' for name in names)


def _tag(folder: Path) -> Optional[str]:
    """The task that the model card's front matter names; None where it names none."""
    path = folder / "README.md"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    tag = re.search(r"^pipeline_tag:\s*[\"']?([\w-]+)", front.group(1), re.MULTILINE) if front else None
    return _TAGS.get(tag.group(1)) if tag else None


def _read_json(path: Path) -> Any:
    """A JSON file, or None where there is none; raises SourceError."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}") from None
