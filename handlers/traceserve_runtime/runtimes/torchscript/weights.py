"""The weights of a traced model outside of its graph, mapped from the file that holds both.

`traced_model.pt` is a zip with stored (not compressed) tensors, so each weight is a stretch of bytes in it. Beside it lie
`graph.pt`, the same module with empty weights, and `weights.json`, which tells where each weight stands. A worker loads the
graph and maps the weights: all workers of a machine, and all graphs of a model, read the same pages of the page cache.
Plain `torch.jit.load` needs `traced_model.pt` alone.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Dict, NamedTuple, Tuple

from traceserve_runtime.errors import InvalidManifest
from traceserve_runtime.runtimes.graph import Traced

if TYPE_CHECKING:
    import torch

GRAPH_FILE = "graph.pt"
WEIGHTS_FILE = "weights.json"


class Place(NamedTuple):
    """Where a weight stands: its first byte, what it is and its shape."""

    offset: int
    dtype: str
    shape: Tuple[int, ...]


def read_places(folder: Path) -> Dict[str, Place]:
    """The places of `folder`'s weights by name; raises InvalidManifest."""
    try:
        content = json.loads((folder / WEIGHTS_FILE).read_text(encoding="utf-8"))
        return {name: Place(int(o), str(dtype), tuple(map(int, shape))) for name, (o, dtype, shape) in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidManifest(f"{WEIGHTS_FILE} cannot be read: {error}") from error


def write_places(folder: Path, places: Dict[str, Place]) -> None:
    """Write `folder/weights.json`; equal places give equal bytes."""
    text = json.dumps(places, separators=(",", ":"), sort_keys=True) + "\n"
    (folder / WEIGHTS_FILE).write_text(text, encoding="utf-8")


def assign(module: Traced, file: Path, places: Dict[str, Place]) -> mmap.mmap:
    """Give a loaded graph its weights, mapped from `file`; raises InvalidManifest for one that has no place.

    The mapping, which it returns, is copy-on-write: nothing that a worker does reaches the file.
    """
    try:
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise InvalidManifest(f"{file.name} cannot be mapped: {error}") from error
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in places:
            try:
                tensor.data = _tensor(mapped, places[name])
            except (RuntimeError, ValueError, AttributeError, TypeError) as error:
                raise InvalidManifest(f"{WEIGHTS_FILE} does not fit {file.name} at {name}: {error}") from error
        elif not tensor.numel():
            raise InvalidManifest(f"{WEIGHTS_FILE} does not tell where {name} stands")
    return mapped


def give_back(mapped: mmap.mmap) -> None:
    """Give the system the pages back that were read; what is read again comes from the file again."""
    if hasattr(mapped, "madvise"):  # not on every system
        mapped.madvise(mmap.MADV_DONTNEED)


def _tensor(mapped: mmap.mmap, place: Place) -> torch.Tensor:
    import torch

    count = 1
    for size in place.shape:
        count *= size
    flat = torch.frombuffer(mapped, dtype=getattr(torch, place.dtype), count=count, offset=place.offset)
    return flat.view(place.shape)
