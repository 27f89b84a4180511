"""The ways to run one archive's model, each compared by the gate.

A reader chooses files and rewritings by the device, the processor and the worker's settings. Each reader lists all of
them in `variants`, so that none is served without comparison.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, NamedTuple

if TYPE_CHECKING:
    from traceserve_runtime.runner import Runner


class Variant(NamedTuple):
    """A file, how and on which device it runs, and its reader."""

    file: str
    how: str
    device: str
    read: Callable[[], Runner]
