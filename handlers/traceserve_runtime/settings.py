"""How a worker runs its archive on this machine: the key `handler` in the archive's model-config.yaml."""

from __future__ import annotations

from typing import Mapping, NamedTuple, Optional

from traceserve_runtime.errors import InvalidManifest


class Settings(NamedTuple):
    """Settings; each save mode uses those that its library supports."""

    threads: Optional[int] = None  # per operator; None: the library's default
    length_step: Optional[int] = None  # pad rows to a multiple of it, if the model accepts any length
    pack_weights: bool = True  # keep a copy of the weights in the processor's layout: torchscript/packing.py
    explain_seconds: int = 30  # that an explanation may take at most


def read(config: Mapping[str, object]) -> Settings:
    """Return the settings in a model-config.yaml; raises InvalidManifest for invalid ones.

    Several workers share their weights unless the file says otherwise.
    """
    given = config.get("handler") or {}
    if not isinstance(given, dict):
        given = {"handler": given}  # refused below
    for key, value in given.items():
        if not valid(key, value):
            raise InvalidManifest(
                f"model-config.yaml: {key} is {value!r}; under handler may stand threads and length_step, 1 or more "
                "each, pack_weights, true or false, and explain_seconds, 1 or more"
            )
    workers = config.get("maxWorkers")
    if config.get("continuousBatching") and isinstance(workers, int) and workers > 1:
        raise InvalidManifest(
            f"model-config.yaml: continuousBatching with {workers} workers, the second of which TorchServe lets hang; have one"
        )
    alone = not isinstance(workers, int) or workers <= 1
    settings = Settings(**{"pack_weights": alone, **given})
    patience = config.get("responseTimeout")  # after which TorchServe ends the worker, with all that it answers
    if isinstance(patience, int) and patience > 0:
        settings = settings._replace(explain_seconds=min(settings.explain_seconds, max(1, patience // 2)))
    return settings


def valid(key: str, value: object) -> bool:
    """Return whether this is a setting with a legal value."""
    if key == "pack_weights":
        return isinstance(value, bool)
    return key in Settings._fields and type(value) is int and value >= 1
