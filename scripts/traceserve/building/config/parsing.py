"""Parses a configuration file: older names, keys without meaning, and readable errors."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple, Tuple

from pydantic import ValidationError
from traceserve_runtime.tasks import TASKS

from traceserve.building.config import config_files, label_files, task_names
from traceserve.building.config.formats import as_written
from traceserve.building.config.rules import check_any_task, check_together
from traceserve.building.config.setup_config import AUTO_TASK, OF_EXPLANATIONS, RENAMED, WITHOUT_MEANING, SetupConfig
from traceserve.errors import ConfigError

_PATHS = ("model_name", "gguf_file", "index_to_name")
_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes, of a usual file system


class LoadedConfig(NamedTuple):
    """A configuration, the folder that its paths are relative to, and notes for the user."""

    config: SetupConfig
    folder: Path
    notes: Tuple[str, ...]


def load_config(path: Path) -> LoadedConfig:
    """Read and check a configuration file; raises ConfigError, which names the key and its legal values."""
    content = config_files.read_config_file(path)
    folder = path.resolve().parent
    try:
        config, notes = parse_config(content.keys)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None
    notes = (*content.notes, *notes)
    beside = config_files.labels_beside(config.task, folder) if _is_the_examples(config, content.keys) else None
    if beside is not None:
        config = config.model_copy(update={"index_to_name": beside})
        notes += (f'{beside} names the labels, by its place; "index_to_name": null takes the checkpoint\'s own names',)
    check_labels_file(config, folder)
    return LoadedConfig(config, folder, notes)


def check_labels_file(config: SetupConfig, folder: Path) -> None:
    """Raise ConfigError if index_to_name is no file of labels, before anything is downloaded."""
    if config.index_to_name is not None:
        label_files.read_labels(config.index_to_name, folder)


def _is_the_examples(config: SetupConfig, content: Mapping[str, object]) -> bool:
    """Return whether a configuration is the pytorch/serve example's, whose label file has a fixed location instead of a
    key."""
    labelled = config.task in TASKS and TASKS[config.task].labelled
    return (
        labelled
        and "index_to_name" not in content
        and bool({*RENAMED, *WITHOUT_MEANING, *OF_EXPLANATIONS} & set(content))
    )


def parse_config(content: object) -> Tuple[SetupConfig, Tuple[str, ...]]:
    """Return the configuration in parsed JSON, and a note per key without meaning."""
    if not isinstance(content, dict):
        raise ConfigError("the configuration should be a JSON object")
    content = {key: value for key, value in content.items() if key != "$schema"}
    notes = tuple(f"{key} has no meaning here: {WITHOUT_MEANING[key]}" for key in content if key in WITHOUT_MEANING)
    known: Dict[str, object] = {}
    written = {RENAMED.get(key, key): key for key in content}
    for key, value in content.items():
        name = RENAMED.get(key, key)
        if name in known:
            old = next(old for old, new in RENAMED.items() if new == name)
            raise ConfigError(f"{old} and {name} are the same key; keep one")
        if name in SetupConfig.model_fields:
            known[name] = value
        elif key not in WITHOUT_MEANING:
            raise ConfigError(_unknown(key))
    try:
        config = SetupConfig.model_validate(known)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(item, written) for item in error.errors())) from None
    _check_path_lengths(config)
    if config.task == AUTO_TASK:
        check_any_task(config)
    else:
        check_together(config)
    return config, notes


def _check_path_lengths(config: SetupConfig) -> None:
    """Raise ConfigError for a path that no file system has."""
    for key in _PATHS:
        parts = (getattr(config, key) or "").encode("utf-8", "replace").split(b"/")
        longest = max(map(len, parts))
        if longest > _LONGEST_NAME or len(b"/".join(parts)) > _LONGEST_PATH:
            raise ConfigError(
                f"{key} cannot be a path: it has a name of {longest:,} bytes, and {len(parts):,} of them; a name has at most "
                f"{_LONGEST_NAME}, a path {_LONGEST_PATH:,}"
            )


def _unknown(key: object) -> str:
    key = str(key)
    known = [*SetupConfig.model_fields, *RENAMED, *WITHOUT_MEANING]
    near = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(key.lower(), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(SetupConfig.model_fields)}"
    return f"unknown key {key}; {hint}"


def _sentence(error: Mapping[str, Any], written: Mapping[str, str]) -> str:
    """Turn a pydantic error into a sentence: the key as written by the user, the given value, the legal values."""
    key = str(error["loc"][0]) if error["loc"] else ""
    key = written.get(key, key)
    if error["type"] == "missing":
        return f"{key} is missing: {SetupConfig.model_fields[key].description}"
    if error["type"] == "dict_type":
        message = 'Should be an object, as {"name": value}; leave the key out where there is nothing to set'
    else:
        message = error["msg"].replace("Value error, ", "")
    more = task_names.near_task(error["input"]) if RENAMED.get(key, key) == "task" else None
    message += f"; {more}" if more else ""
    return f"{key} is {as_written(error['input'])}: {message[0].lower() + message[1:]}"
