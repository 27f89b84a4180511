"""peft adapters (LoRA and its kin): found, checked, and joined with the base's files.

`join` makes a folder that looks like a whole checkpoint without weights: the base's configuration with the adapter's
head, and the tokenizer of whichever has one. All readers of a checkpoint's small files read it there.
`adapter_weights` merges the weights when the model is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Collection, Dict, Iterator, Mapping, Optional

from traceserve.archives import staging
from traceserve.building.checkpoints import adapter_tokenizers, files, head_weights, heads, weight_files
from traceserve.building.checkpoints.checkpoint import TOKENIZER_FILES, Adapter, Checkpoint
from traceserve.building.checkpoints.json_files import read_json
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import ExportError, SourceError, some
from traceserve.machine import user_folders

FILE = "adapter_config.json"
PACKAGES = ("peft",)
# Kinds whose weights can be merged into the base's, each tested. Others, such as prompt tuning, cannot.
KINDS = (
    ("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "IA3", "OFT", "BOFT", "HRA", "FOURIERFT", "LN_TUNING")
)  # fmt: skip
_TASK_TYPES = {
    "SEQ_CLS": heads.SEQUENCE,
    "TOKEN_CLS": heads.TOKEN,
    "QUESTION_ANS": heads.QUESTION,
    "CAUSAL_LM": heads.CAUSAL,
    "SEQ_2_SEQ_LM": heads.BOTH,
    "FEATURE_EXTRACTION": heads.BASE,
}
# Keys of other peft versions that no class accepts.
_BESIDE = ("auto_mapping", "peft_version", "peft_type")
PREFIX = "base_model.model."  # before the base's own names in the adapter's file
_PROBES = (89, 97)  # numbers of labels that are no other size in a model
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_OF_SENTENCES = ("modules.json", "sentence_*_config.json", "config_sentence_transformers.json")


def is_one(folder: Path) -> bool:
    """Return whether a folder contains an adapter."""
    return (folder / FILE).is_file()


def check_adapter(folder: Path, name: str) -> Dict[str, Any]:
    """Return the adapter's configuration; raises SourceError, ExportError if it cannot be merged here."""
    facts = read_json(folder / FILE)
    if not isinstance(facts, dict) or not isinstance(facts.get("peft_type"), str):
        raise SourceError(f"{name}: {folder / FILE} should be a JSON object that names a peft_type")
    kind, base = facts["peft_type"], facts.get("base_model_name_or_path")
    if kind not in KINDS:
        raise SourceError(
            f"{name} is an adapter of the kind {kind}, which is not merged into its base, so that it cannot be exported as "
            f"one model; kinds that are merged: {', '.join(KINDS)}"
        )
    if not isinstance(base, str) or not base:
        raise SourceError(f"{name}: {FILE} names no base; write its hub id or folder as base_model_name_or_path")
    task_type = facts.get("task_type")
    if task_type is not None and task_type not in _TASK_TYPES:
        raise SourceError(f"{name}: {FILE} has the task_type {task_type}, but it should be {' or '.join(_TASK_TYPES)}")
    if not _installed():
        raise ExportError(
            f"{name} is a {kind} adapter of {base}, and to merge the two peft must be installed: pip install "
            "'traceserve[peft]', with Python 3.10 or newer"
        )
    _check_keys(facts, name)
    return facts


def _installed() -> bool:
    try:
        return importlib.util.find_spec("peft") is not None
    except ValueError:  # a module that was removed
        return False


def _check_keys(facts: Mapping[str, Any], name: str) -> None:
    """Raise SourceError for settings unknown to this peft, which would ignore them."""
    import peft

    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(facts["peft_type"])
    known = {*inspect.signature(kind).parameters, *_BESIDE} if kind is not None else set()
    unknown = sorted(key for key, value in facts.items() if key not in known and value)
    if kind is None or unknown:
        what = f"the keys {some(unknown)}" if kind is not None else f"the peft_type {facts['peft_type']}"
        raise SourceError(
            f"{name}: {FILE} has {what}, which peft {peft.__version__} does not know; it was written by peft "
            f"{facts.get('peft_version', 'of another version')}: pip install -U peft"
        )


def join(stored: Checkpoint, config: SetupConfig, locate: Callable[[SetupConfig, Path], Checkpoint]) -> Checkpoint:
    """Return a checkpoint of the adapter and its base, which `locate` finds; raises SourceError, ExportError."""
    folder, name = stored.folder, config.model_name
    files.check_pointers(folder, name)
    facts = check_adapter(folder, name)
    weights = [file for file in weight_files.ADAPTERS if (folder / file).is_file()]
    if not weights:
        raise SourceError(f"{name}: {folder} has no weights of the adapter ({' or '.join(weight_files.ADAPTERS)})")
    whole = [file.name for file in weight_files.files_of(folder) if file.name not in weight_files.ADAPTERS]
    if whole:
        raise SourceError(
            f"{name} holds an adapter ({weights[0]}) and a whole model ({some(whole)}), and cannot be both: remove {FILE} if "
            "the adapter has been merged into that model, or else the whole model"
        )
    if weights[0] == weight_files.ADAPTERS[1]:
        files.check_pickle(folder / weights[0], name)
    base_name = facts["base_model_name_or_path"]
    base = _base(facts, folder, config, locate)
    if not files.has_vocabulary(folder):
        chats = _TASK_TYPES.get(str(facts.get("task_type")), heads.CAUSAL) == heads.CAUSAL
        adapter_tokenizers.check_unread(stored, base, config, chats)
    made = _configuration(facts, base, folder, config)
    joined = _write(made.content, stored, base, config)
    unread = _unread(folder, joined)
    others = files.adapters_within(folder)
    beside = f"other adapters of the folder, which are not merged: {some(others)}" if others else None
    notes = (stored.note, f"merged into its base, {base_name}", made.note, unread, beside)
    root = stored.root or (folder if (folder / "modules.json").is_file() else None)
    return replace(
        stored,
        folder=joined,
        root=root,
        note="\n".join(note for note in notes if note),
        adapter=Adapter(stored, base, base_name),
    )


def _base(
    facts: Mapping[str, Any], folder: Path, config: SetupConfig, locate: Callable[[SetupConfig, Path], Checkpoint]
) -> Checkpoint:
    """Return the base, from a folder (absolute, or relative to the adapter's) or the hub."""
    name = facts["base_model_name_or_path"]
    revision = None if (folder / os.path.expanduser(name)).is_dir() else facts.get("revision")
    # The adapter decides the head and the task.
    own = {"model_name": name, "revision": revision, "task": "feature_extraction", "allow_untrained_head": True}
    try:
        return locate(config.model_copy(update=own), folder)
    except SourceError as error:
        raise SourceError(
            f"{config.model_name} is an adapter, and its base cannot be had: {error.message}; its name stands in {FILE} as "
            "base_model_name_or_path"
        ) from error


@dataclass(frozen=True)
class _Made:
    content: Dict[str, object]  # of config.json
    note: Optional[str]


def _configuration(facts: Mapping[str, object], base: Checkpoint, folder: Path, config: SetupConfig) -> _Made:
    """Return the base's configuration with the adapter's architecture, and as many labels as its head has outputs."""
    content = base.read_object(_CONFIG)
    if content is None:
        raise SourceError(f"the base of {config.model_name}: {base.folder / _CONFIG} should hold a JSON object")
    architecture = _architecture(facts, content)
    content = {**content, **({"architectures": [architecture]} if architecture else {})}
    named = heads.named(content)
    auto_model = next((kind for kind in (heads.SEQUENCE, heads.TOKEN) if named and kind in named.auto_models), None)
    count = _outputs(auto_model, base.folder, folder, config) if auto_model else None
    if count is None:
        return _Made(content, None)
    own = heads.label_names(content)
    if len(own) == count and content.get("id2label"):
        note = f"peft stores no names of labels: those of the base are taken ({some(own)})"
    else:
        names = [f"LABEL_{index}" for index in range(count)]
        content = {key: value for key, value in content.items() if key not in ("num_labels", "_num_labels")}
        content["id2label"] = {str(index): label for index, label in enumerate(names)}
        content["label2id"] = {label: index for index, label in enumerate(names)}
        note = f"peft stores no names of labels: the adapter's head has {count}, named LABEL_0 to {names[-1]}"
    return _Made(content, None if config.index_to_name else f"{note}; set others with index_to_name")


def _architecture(facts: Mapping[str, object], content: Mapping[str, object]) -> Optional[str]:
    """Return the class that the adapter was trained with; None if only the base's configuration knows."""
    from transformers.models.auto import modeling_auto

    auto_model = _TASK_TYPES.get(str(facts.get("task_type")))
    if auto_model is None:
        mapping = facts.get("auto_mapping")  # written if no task_type was given
        name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        return name if isinstance(name, str) else None
    table = getattr(modeling_auto, heads.TABLES.get(auto_model, "MODEL_MAPPING_NAMES"))
    found = table.get(content.get("model_type"))
    if found is None:  # remote code has its own classes
        places = content.get("auto_map")
        place = places.get(auto_model) if isinstance(places, dict) else None
        return str(place).rsplit(".", 1)[-1] if place else None
    return str(found if isinstance(found, str) else found[0])


def _outputs(auto_model: str, base: Path, folder: Path, config: SetupConfig) -> Optional[int]:
    """Return the number of the adapter's own head's outputs; None without one, or if its model cannot be made.

    A head's last weight is the one whose shape depends on the number of labels.
    """
    stored = head_weights.weight_shapes(folder)
    models = [head_weights.empty(auto_model, config, base, labels) for labels in _PROBES]
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in models if model is not None]
    if len(shapes) < len(models):
        return None
    one, other = shapes
    for name, shape in one.items():
        axis = next((i for i, (a, b) in enumerate(zip(shape, other.get(name, shape))) if a != b), None)
        own = stored.get(PREFIX + name, ())
        if axis is not None and len(own) == len(shape):
            return own[axis]
    return None


def _write(content: Mapping[str, object], stored: Checkpoint, base: Checkpoint, config: SetupConfig) -> Path:
    """Write the joined folder into the cache, named after the hash of its content."""
    tokenizer = stored if files.has_vocabulary(stored.folder) else base
    code = ("*.py",) if config.trust_remote_code else ()
    places = [*_matching(base.folder, (_GENERATION, *code)), *_matching(tokenizer.folder, TOKENIZER_FILES)]
    places += _matching(stored.folder, _OF_SENTENCES)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(text.encode("utf-8"))
    for path in places:
        digest.update(path.name.encode("utf-8") + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    target = user_folders.cache("adapters") / digest.hexdigest()[:24]
    if target.is_dir():
        return target
    with staging.staged(target) as stage:
        made = stage / target.name
        made.mkdir()
        for path in places:
            shutil.copyfile(path, made / path.name)
        (made / _CONFIG).write_text(text, encoding="utf-8")
    return target


def _matching(folder: Path, patterns: Collection[str]) -> Iterator[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    yield from sorted(found)


def _unread(folder: Path, joined: Path) -> Optional[str]:
    """Name the adapter's unread files: peft too takes the configuration from the base."""
    passed_over = [name for name in (_CONFIG, _GENERATION) if (folder / name).is_file()]
    tokenizer = [
        path.name
        for path in _matching(folder, TOKENIZER_FILES)
        if path.name not in adapter_tokenizers.FILES and not _same(path, joined / path.name)
    ]
    unread = sorted({*passed_over, *tokenizer, *files.unknown_files(folder)})
    return f"files of the adapter that are not read: {some(unread)}" if unread else None


def _same(path: Path, other: Path) -> bool:
    return other.is_file() and path.read_bytes() == other.read_bytes()
