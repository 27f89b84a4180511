"""One file per save mode: how it is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Dict, NamedTuple, Tuple, Type

from traceserve.writers import torchscript

if TYPE_CHECKING:
    from pathlib import Path

    from traceserve_runtime.manifest import Shapes
    from traceserve_runtime.tasks.contract import Task

    from traceserve.loading import Original


class Writer(NamedTuple):
    """How a save mode is written: `write(original, task, shapes, folder)`, into `model_file`.

    It gives the inputs of the graph that a loop runs, in order; none for a model that is run once.
    """

    write: Callable[[Original, Type[Task], Shapes, Path], Tuple[str, ...]]
    model_file: str
    hardware: Tuple[str, ...]


WRITERS: Dict[str, Writer] = {
    "torchscript": Writer(torchscript.write, torchscript.MODEL_FILE, ("cpu",)),
}
