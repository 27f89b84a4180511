"""Detects a checkpoint's task: from its configuration, its other small files and, if these are silent, its weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Mapping, NamedTuple, Optional, Sequence, Tuple

from traceserve_runtime.tasks import TASKS

from traceserve.building.checkpoints import heads
from traceserve.building.checkpoints.head_weights import (
    by_weights,
    check_labels,
    checked_head,
    configuration_fault,
    weight_shapes,
)
from traceserve.building.checkpoints.json_files import read_json
from traceserve.building.checkpoints.model_card import front_matter
from traceserve.building.config import libraries
from traceserve.building.config.rules import check_together
from traceserve.building.config.setup_config import AUTO_TASK, SetupConfig
from traceserve.building.config.task_names import tagged_task
from traceserve.errors import AmbiguousTask, SourceError

# sentence-transformers' kinds of models (config_sentence_transformers.json, "model_type"), and their tasks.
_SENTENCE_TRANSFORMERS = {"SentenceTransformer": "feature_extraction", "CrossEncoder": "text_ranking"}
# Keys of a cross-encoder's activation in config.json: since sentence-transformers 4, and before.
_CROSS_ENCODER_KEYS = ("sentence_transformers", "sbert_ce_default_activation_function")
# The labels of natural language inference, in any order; zero_shot_classification needs such a head.
_INFERENCE = re.compile(r"^(not[_ -])?(entail|contradict|neutral)", re.IGNORECASE)
# Types of models that begin their weights' names, and no other type's.
_TYPES = frozenset(("bert", "roberta", "distilbert", "albert", "electra", "gpt2"))
# Secondary auto classes of an architecture with several: BART is trained to write, and happens to fill masks.
_STANDS_BACK = {heads.BOTH: heads.MASKED}


class Resolved(NamedTuple):
    """A configuration with a resolved task, and the evidence: empty if it was configured."""

    config: SetupConfig
    reason: str


class _Found(NamedTuple):
    """The possible tasks, and the evidence in words."""

    tasks: Tuple[str, ...]
    evidence: str


def resolve(config: SetupConfig, folder: Path) -> Resolved:
    """Return the configuration with "auto" replaced by the checkpoint's task; raises SourceError, ConfigError.

    A configured task is checked against the checkpoint's head, since another task's weights may have the same names.
    """
    _check_type(config, folder)
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


def _check_type(config: SetupConfig, folder: Path) -> None:
    """Raise SourceError for a config.json without model_type that transformers cannot read, with the value to add."""
    facts = None if config.gguf_file else read_json(folder / "config.json")
    if not isinstance(facts, dict) or facts.get("model_type") or not configuration_fault(config, folder):
        return
    own = facts.get("type")
    kind = (
        own
        if isinstance(own, str)
        else next(iter({name.split(".")[0] for name in weight_shapes(folder)} & _TYPES), None)
    )
    such = f'"model_type": "{kind}"' if kind else 'it, such as "model_type": "bert"'
    raise SourceError(
        f"{config.model_name}: its config.json has no model_type; add {such}, in a copy of the checkpoint"
    )


def _check_labels(config: SetupConfig, folder: Path) -> None:
    task = TASKS[config.task]
    facts = read_json(folder / "config.json") if task.labelled and not config.allow_untrained_head else None
    if isinstance(facts, dict):
        check_labels(config, folder, facts, task.auto_model)


def check_early(config: SetupConfig, folder: Path) -> None:
    """Raise `resolve`'s errors early, as far as possible without the weights."""
    if config.task != AUTO_TASK:
        _check(config, folder, with_weights=False)
        return
    if not (folder / "config.json").is_file():
        return  # errors are raised for the whole checkpoint
    found = _gguf(config) or _search(config, folder, with_weights=False)
    if found is not None:
        [task] = _one(config, found).tasks
        check_together(config.model_copy(update={"task": task}))


def _check(config: SetupConfig, folder: Path, with_weights: bool) -> None:
    """Raise SourceError if the checkpoint's head is not the configured task's."""
    task = TASKS[config.task]
    # Any model has features to extract, like the pipeline; and a trial may have a random head.
    if config.gguf_file or config.allow_untrained_head or task.auto_model == heads.BASE:
        return
    facts = read_json(folder / "config.json")
    if not isinstance(facts, dict):
        return  # the loader reports missing weights
    named = heads.named(facts)
    if with_weights:
        named = by_weights(config, folder, facts) if named is None else checked_head(named, config, folder, facts)
    elif named is None:
        return
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
    """Return a checkpoint's possible tasks; None if only its weights can tell and are not available."""
    found = _sentence_transformer(config, folder)
    if found is not None:
        return found
    facts = read_json(folder / "config.json")
    if not isinstance(facts, dict):
        raise SourceError(f"{config.model_name}: {folder / 'config.json'} should hold a JSON object")
    named = heads.named(facts)
    if with_weights:
        named = by_weights(config, folder, facts) if named is None else checked_head(named, config, folder, facts)
    elif named is None:
        return None
    if named is None:
        known = facts.get("architectures") and heads.is_base(facts)
        named = heads.Head((heads.BASE,) if known else tuple(heads.TABLES), heads.describe_architectures(facts))
    auto_models = set(named.auto_models) - {_STANDS_BACK.get(auto_model, "") for auto_model in named.auto_models}
    tasks = tuple(name for name, task in TASKS.items() if task.auto_model in auto_models)
    if not tasks:
        raise SourceError(
            f"{config.model_name} is for none of the tasks here: {named.evidence}; name another checkpoint, or set "
            '"task": "feature_extraction" for its token vectors'
        )
    found = _classifiers(_Found(tasks, f"from {named.evidence}"), facts)
    tagged = _tag(folder)
    if len(found.tasks) > 1 and tagged in found.tasks:
        return _Found((tagged,), f"{found.evidence}, and the model card's pipeline_tag")
    return found


def _sentence_transformer(config: SetupConfig, folder: Path) -> Optional[_Found]:
    """Return the task of a folder written by sentence-transformers; None for others."""
    facts = read_json(folder / "config_sentence_transformers.json")
    kind = facts.get("model_type") if isinstance(facts, dict) else None
    if kind is not None and kind not in _SENTENCE_TRANSFORMERS:
        raise SourceError(
            f"{config.model_name} is a {kind} of sentence-transformers (config_sentence_transformers.json), for which "
            f"there is no task here; name a {' or a '.join(_SENTENCE_TRANSFORMERS)}, or set the task yourself"
        )
    task = _SENTENCE_TRANSFORMERS.get(str(kind))
    if task is not None and TASKS[task].scores_pairs and _has_classes(folder):
        return None  # as of natural language inference
    if task is not None:
        return _Found((task,), f"from config_sentence_transformers.json: {kind}")
    modules = read_json(folder / "modules.json")
    if modules is None:
        return None
    return _Found(("feature_extraction",), "from modules.json: sentence-transformers")


def _has_classes(folder: Path) -> bool:
    """Return whether config.json names a classifier of sequences with several outputs."""
    facts = read_json(folder / "config.json")
    if not isinstance(facts, dict):
        return False
    named = heads.named(facts)
    return named is not None and heads.SEQUENCE in named.auto_models and len(heads.label_names(facts)) > 1


def _classifiers(found: _Found, facts: Mapping[str, object]) -> _Found:
    """Return the tasks that fit a classifier head's outputs and their names."""
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
    """Return the evidence if it leaves one task; raises SourceError with the candidates."""
    if len(found.tasks) > 1:
        raise AmbiguousTask(
            f"{config.model_name} can be for several tasks ({found.evidence}), and its files do not say which: set "
            f'"task": {_quoted(found.tasks)}',
            found.tasks,
        )
    return found


def _quoted(names: Sequence[str]) -> str:
    return " or ".join(f'"{name}"' for name in names)


def _tag(folder: Path) -> Optional[str]:
    """Return the task in the model card's front matter; None without one. It decides between tasks with the same head."""
    tag = front_matter(folder).get("pipeline_tag")
    return tagged_task(tag) if isinstance(tag, str) else None
