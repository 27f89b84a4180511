"""Reads a configuration file: setup_config.json, or the pytorch/serve example's model-config.yaml."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Hashable, List, Mapping, NamedTuple, Optional, Tuple

import yaml

from traceserve.errors import ConfigError, json_reason, unread_reason

_YAML = (".yaml", ".yml")
_HANDLER = "handler"  # the key of the example's handler settings
# TorchServe's keys that the configuration has too, with their names here.
_TAKEN = {
    "batchSize": "batch_size",
    "maxBatchDelay": "max_batch_delay",
    "responseTimeout": "response_timeout",
    "clientTimeoutInMills": "client_timeout",
    "continuousBatching": "continuous_batching",
}
_WORKERS = "`traceserve serve --workers` says how many there are"
_ONE_DEVICE = "a model runs on one device; more workers use more devices"
# Its keys that are not used, and why.
_LEFT = {
    "minWorkers": _WORKERS,
    "maxWorkers": _WORKERS,
    "startupTimeout": "the archive's own is 300 seconds",
    "maxRetryTimeoutInSec": "a worker is always started again",
    "deviceType": "`hardware` says what the archive runs on",
    "deviceIds": _ONE_DEVICE,
    "parallelType": _ONE_DEVICE,
    "parallelLevel": _ONE_DEVICE,
    "torchrun": _ONE_DEVICE,
    "pt2": "save_mode aot_inductor, and torch_compile in the `options` of save_mode pretrained, compile",
}
# Keys of the example's C++ handlers beside the others'.
_OF_HANDLERS = {"mapping": "index_to_name"}
_LEFT_OF_HANDLERS = {
    "model_so_path": "the archive's model is made from model_name",
    "tokenizer_path": "the archive's tokenizer is the checkpoint's",
}
LABELS_FILE = "index_to_name.json"
# The example's label folders, beside its configuration.
_LABEL_FOLDERS = {
    "sequence_classification": "Seq_classification_artifacts",
    "token_classification": "Token_classification_artifacts",
}


class Content(NamedTuple):
    """A file's content, and a note per key without meaning here."""

    keys: Any
    notes: Tuple[str, ...] = ()


def read_config_file(path: Path) -> Content:
    """Return the content of a configuration file; raises ConfigError if it is unreadable."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in _YAML:
            return _settings(yaml.load(text, _Loader))
        return Content(json.loads(text, object_pairs_hook=unique_keys))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name a configuration with --config FILE") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: {error}; save it as UTF-8") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name the configuration in it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {unread_reason(error)}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {json_reason(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None


def _settings(content: object) -> Content:
    """Return the keys under `handler`, with the supported TorchServe keys; without `handler`, those at the root."""
    if not isinstance(content, dict) or _HANDLER not in content:
        return Content(content)
    handler = content[_HANDLER]
    if not isinstance(handler, dict):
        raise ConfigError(f"{_HANDLER} should hold keys and values, as model_name: NAME")
    notes: List[str] = []
    frontend = {key: value for key, value in content.items() if key != _HANDLER}
    unknown = [str(key) for key in frontend if key not in _TAKEN and key not in _LEFT]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: not supported beside {_HANDLER}; supported are {', '.join(_TAKEN)}, and ignored "
            f"{', '.join(_LEFT)}"
        )
    keys = {**_renamed(handler, _OF_HANDLERS, _LEFT_OF_HANDLERS, notes)}
    for key, value in _renamed(frontend, _TAKEN, _LEFT, notes).items():
        if keys.setdefault(key, value) != value:
            raise ConfigError(f"{key} is {keys[key]} under {_HANDLER}, and {value} beside it; keep one")
    return Content(keys, tuple(notes))


def _renamed(
    content: Mapping[str, object], taken: Mapping[str, str], left: Mapping[str, str], notes: List[str]
) -> Dict[str, object]:
    notes.extend(f"{key} has no meaning here: {left[key]}" for key in content if key in left)
    return {taken.get(key, key): value for key, value in content.items() if key not in left}


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[Hashable, object]:
        unique_keys([(str(self.construct_object(key, deep=True)), None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def unique_keys(pairs: List[Tuple[str, object]]) -> Dict[str, object]:
    """Return an object of these keys and values; raises ConfigError for a key that is given twice."""
    found: Dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"the key {key} is given twice")
        found[key] = value
    return found


def labels_beside(task: str, folder: Path) -> Optional[str]:
    """Return the label file that the example would pack with a configuration in this folder; its location identifies
    it."""
    places = [Path(_LABEL_FOLDERS[task], LABELS_FILE)] if task in _LABEL_FOLDERS else []
    for place in (*places, Path(LABELS_FILE)):
        if (folder / place).is_file():
            return place.as_posix()
    return None
