"""The versions and workers of a running TorchServe's archives, as it describes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Tuple

from traceserve.serving import log, management
from traceserve.serving.instances import Instance

_SECONDS_TO_ANSWER = 10.0


@dataclass(frozen=True)
class ArchiveState:
    """The version that answers where a request names none, and its workers; the other versions that are registered."""

    version: str
    ready: int  # workers that have loaded it
    wanted: int
    others: Tuple[str, ...]
    failure: Optional[str]  # why those that are missing could not load it, if the log says so


def archive_state(instance: Instance, name: str) -> ArchiveState:
    """Ask TorchServe for the state of one of its archives; raises ServerError."""
    running = management.default(instance, name, _SECONDS_TO_ANSWER)
    others = [
        version for version in management.registered(instance, name, _SECONDS_TO_ANSWER) if version != running.version
    ]
    failure = None
    if running.ready < running.workers:
        failure = log.load_failure(instance.log, log.end_of_last_load(instance.log, name), name)
    return ArchiveState(
        running.version, running.ready, running.workers, tuple(others), None if failure is None else failure.reason
    )
