"""One file per save mode: how it is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Dict, NamedTuple, Tuple

from traceserve.writers import torchscript

if TYPE_CHECKING:
    from pathlib import Path

    from traceserve_runtime.manifest import Shapes

    from traceserve.loading import Original


class Writer(NamedTuple):
    """How a save mode is written: `write(original, outputs, shapes, folder)`, into `model_file`."""

    write: Callable[[Original, Tuple[str, ...], Shapes, Path], None]
    model_file: str
    hardware: Tuple[str, ...]


WRITERS: Dict[str, Writer] = {
    "torchscript": Writer(torchscript.write, torchscript.MODEL_FILE, ("cpu",)),
}
