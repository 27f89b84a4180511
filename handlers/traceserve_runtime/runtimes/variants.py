"""The ways in which one archive's model may be run, which the gate compares one by one.

A reader chooses among files and rewritings by the device, the processor and the worker's settings. Each reader lists all of
them itself, in `variants`, so that none is served which was not compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, NamedTuple

if TYPE_CHECKING:
    from traceserve_runtime.runner import Runner


class Variant(NamedTuple):
    """A file, how it is run and on which device; and what reads it so."""

    file: str
    how: str
    device: str
    read: Callable[[], Runner]
