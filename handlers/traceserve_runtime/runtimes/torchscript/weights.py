"""A traced model's weights outside of its graph, mapped from the file that contains both.

`traced_model.pt` is a zip with stored (uncompressed) tensors, so each weight is a range of its bytes. Beside it are
`graph.pt`, the same module with empty weights, and `weights.json`, with each weight's position. A worker loads the
graph and maps the weights: all workers of a machine, and all graphs of a model, share the same pages of the page cache.
Plain `torch.jit.load` only needs `traced_model.pt`.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Dict, NamedTuple, Tuple

from traceserve_runtime.errors import InvalidManifest
from traceserve_runtime.runtimes.graph import Traced

if TYPE_CHECKING:
    import torch

GRAPH_FILE = "graph.pt"
WEIGHTS_FILE = "weights.json"


class WeightPosition(NamedTuple):
    """A weight's position: its first byte, dtype and shape."""

    offset: int
    dtype: str
    shape: Tuple[int, ...]


def read_positions(folder: Path, file: str = WEIGHTS_FILE) -> Dict[str, WeightPosition]:
    """Return the positions of `folder`'s weights by name; raises InvalidManifest."""
    try:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        return {
            name: WeightPosition(int(o), str(dtype), tuple(map(int, shape)))
            for name, (o, dtype, shape) in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidManifest(f"{file} cannot be read: {error}") from error


def write_positions(folder: Path, positions: Dict[str, WeightPosition], file: str = WEIGHTS_FILE) -> None:
    """Write `folder/weights.json`; equal positions give equal bytes."""
    text = json.dumps(positions, separators=(",", ":"), sort_keys=True) + "\n"
    (folder / file).write_text(text, encoding="utf-8")


def assign(
    module: Traced, file: Path, positions: Dict[str, WeightPosition], table_file: str = WEIGHTS_FILE
) -> mmap.mmap:
    """Give a loaded graph its weights, mapped from `file`; raises InvalidManifest for one without a position.

    `table_file` is where the positions were read from.
    The returned mapping is copy-on-write: nothing that a worker does reaches the file.
    """
    try:
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise InvalidManifest(f"{file.name} cannot be mapped: {error}") from error
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in positions:
            try:
                tensor.data = _tensor(mapped, positions[name])
            except (RuntimeError, ValueError, AttributeError, TypeError) as error:
                raise InvalidManifest(f"{table_file} does not fit {file.name} at {name}: {error}") from error
        elif not tensor.numel():
            raise InvalidManifest(f"{table_file} does not tell where {name} stands")
    return mapped


def give_back(mapped: mmap.mmap) -> None:
    """Return read pages to the system; later reads use the file again."""
    if hasattr(mapped, "madvise"):  # not on every system
        mapped.madvise(mmap.MADV_DONTNEED)


def _tensor(mapped: mmap.mmap, position: WeightPosition) -> torch.Tensor:
    import torch

    count, dtype = math.prod(position.shape), getattr(torch, position.dtype)
    if not count and not position.offset:  # as a weight without values is written; `torch.frombuffer` refuses it
        return torch.empty(position.shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=position.offset).view(position.shape)
