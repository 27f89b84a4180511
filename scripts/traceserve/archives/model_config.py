"""model-config.yaml, an archive's serving configuration for TorchServe and the worker: batches, workers, threads,
limits."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional

import yaml
from traceserve_runtime.manifest import SERVING_FILE as SERVING_FILE
from traceserve_runtime.settings import Settings

from traceserve.errors import ArchiveError, shortened

# Keys of TorchServe, and of our handler (in `handler`), by field.
_KEYS = {
    "batch_size": "batchSize",
    "max_batch_delay": "maxBatchDelay",
    "response_timeout": "responseTimeout",
    "startup_timeout": "startupTimeout",
    "client_timeout": "clientTimeoutInMills",
    "continuous_batching": "continuousBatching",
}
_HANDLER_KEYS = {field: field for field in Settings._fields}
_LONGEST = 200  # characters of the parser's words
_HANDLER = "handler"
_WORKERS = ("minWorkers", "maxWorkers")  # TorchServe ignores one without the other
# TorchServe 0.12 tries for so many seconds, by default 300, to start a worker again, and then never more, while the server
# runs on. It multiplies them by 1000 in 32 bits, in which more than 24 days would be a negative time.
_RETRIES = {"maxRetryTimeoutInSec": (2**31 - 1) // 1000}


@dataclass(frozen=True)
class Serving:
    """The serving configuration of an archive; None leaves a value to the server (workers) or the worker (as in
    Settings)."""

    batch_size: int  # the most requests passed to the worker at once
    max_batch_delay: int  # in milliseconds
    response_timeout: int  # in seconds
    startup_timeout: int = 300  # in seconds
    client_timeout: Optional[int] = None  # in milliseconds; TorchServe silently drops older requests
    continuous_batching: Optional[bool] = None  # requests join and leave a running batch; with one worker only
    workers: Optional[int] = None  # processes
    threads: Optional[int] = None  # per worker, within one operator
    length_step: Optional[int] = None  # pad rows up to a multiple of it
    pack_weights: Optional[bool] = None  # each worker has its own copy, in the processor's layout
    explain_seconds: Optional[int] = None  # that an explanation may take

    def to_yaml(self) -> str:
        """Return the file's text. Both timeouts are always written: any YAML makes its own defaults win over
        config.properties. So is how long a worker is started again."""
        content: Dict[str, object] = {key: getattr(self, field) for field, key in _KEYS.items()}
        content = {key: value for key, value in content.items() if value is not None}
        if self.workers is not None:
            content.update(dict.fromkeys(_WORKERS, self.workers))
        content.update(_RETRIES)
        handler = {key: getattr(self, field) for field, key in _HANDLER_KEYS.items()}
        handler = {key: value for key, value in handler.items() if value is not None}
        if handler:
            content[_HANDLER] = handler
        text: str = yaml.safe_dump(content, sort_keys=False)
        return text

    @classmethod
    def from_yaml(cls, text: str) -> Serving:
        """Parse a file's text; raises ArchiveError for anything that `to_yaml` does not write."""
        try:
            if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):  # few could make a list endless
                raise ArchiveError(f"{SERVING_FILE}: aliases (*name) are not allowed; write their values")
            content = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-99-99
            told = shortened(" ".join(str(error).split()), _LONGEST)  # in one line
            raise ArchiveError(f"{SERVING_FILE} is not valid YAML: {told}") from None
        content = _mapping(content, "")
        handler = _mapping(content.pop(_HANDLER, {}), f"{_HANDLER}: ")
        for key in _RETRIES:  # older archives lack it
            _whole(content.pop(key, 1), key)
        workers = [content.pop(key, None) for key in _WORKERS]
        if workers[0] != workers[1]:
            raise ArchiveError(f"{SERVING_FILE}: minWorkers and maxWorkers should be given both, and be equal")
        values = {**_read(content, _KEYS, ""), **_read(handler, _HANDLER_KEYS, f"{_HANDLER}: ")}
        if workers[0] is not None:
            values["workers"] = _whole(workers[0], _WORKERS[0])
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in values:
                raise ArchiveError(f"{SERVING_FILE} lacks the key {_KEYS[field.name]}")
        return cls(**values)


def _read(content: Mapping[str, Any], keys: Mapping[str, str], where: str) -> Dict[str, Any]:
    """Return the values by field."""
    fields = {key: field for field, key in keys.items()}
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            hint = f"did you mean {near[0]}" if near else f"known are {', '.join(fields)}"
            raise ArchiveError(f"{SERVING_FILE}: {where}{key} is not known here; {hint}")
    read = {"pack_weights": _truth, "continuousBatching": _truth}
    return {fields[key]: read.get(key, _whole)(value, where + key) for key, value in content.items()}


def _whole(value: object, key: str) -> int:
    if type(value) is not int or value < 1:
        raise ArchiveError(f"{SERVING_FILE}: {key} should be a whole number of 1 or more, not {_quoted(value)}")
    return value


def _truth(value: object, key: str) -> bool:
    if not isinstance(value, bool):
        raise ArchiveError(f"{SERVING_FILE}: {key} should be true or false, not {_quoted(value)}")
    return value


def _quoted(value: object) -> str:
    """Quote the beginning of a value, which may be megabytes."""
    return shortened(reprlib.repr(value), _LONGEST)


def _mapping(content: object, where: str) -> Dict[str, object]:
    if not isinstance(content, dict):
        raise ArchiveError(f"{SERVING_FILE}: {where}should hold keys and values, not {type(content).__name__}")
    return dict(content)
