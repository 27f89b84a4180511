"""What a writer is, and what it tells of what it wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, NamedTuple, Tuple, Type

if TYPE_CHECKING:
    from pathlib import Path

    from traceserve_runtime.manifest import Shapes
    from traceserve_runtime.tasks.contract import Task

    from traceserve.loading import Original


class Written(NamedTuple):
    """What a writer made: the inputs of the graph that a loop runs, in order, none for a model that is run once; and the
    files beside the model's own."""

    step_inputs: Tuple[str, ...] = ()
    files: Tuple[str, ...] = ()


class Writer(NamedTuple):
    """How a save mode is written: `write(original, task, shapes, folder)`, into `model_file` and the files that it tells.

    The original is as `precision.lower` gives it.
    """

    write: Callable[[Original, Type[Task], Shapes, Path], Written]
    model_file: str
    hardware: Tuple[str, ...]
