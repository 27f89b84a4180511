"""How a worker runs its archive on this machine: what `handler` in the archive's model-config.yaml may say."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Optional

from traceserve_runtime.errors import InvalidManifest


class Settings(NamedTuple):
    """Each save mode takes what its library has."""

    threads: Optional[int] = None  # within one operator; None: as many as the library takes
    length_step: Optional[int] = None  # rows are padded to a multiple of it, where the model takes any length
    pack_weights: bool = True  # a copy of the weights of its own, as the processor reads them: torchscript/packing.py


def read(config: Mapping[str, Any]) -> Settings:
    """The settings in a model-config.yaml; raises InvalidManifest for what cannot be meant.

    Several workers share their weights, unless the file says otherwise.
    """
    given = config.get("handler") or {}
    for key, value in given.items() if isinstance(given, dict) else [("handler", given)]:
        if not valid(key, value):
            raise InvalidManifest(
                f"model-config.yaml: {key} is {value!r}; under handler may stand threads and length_step, 1 or more "
                "each, and pack_weights, true or false"
            )
    workers = config.get("maxWorkers")
    alone = not isinstance(workers, int) or workers <= 1
    return Settings(**{"pack_weights": alone, **given})


def valid(key: str, value: Any) -> bool:
    """Whether this is a setting, and a value that it may have."""
    if key == "pack_weights":
        return isinstance(value, bool)
    return key in Settings._fields and type(value) is int and value >= 1
