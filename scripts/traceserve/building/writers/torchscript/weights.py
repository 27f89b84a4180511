"""Turns a traced model's file into a graph without weights, and each weight's position in that file."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from pathlib import Path
from typing import Dict, Optional, Tuple

import torch
from traceserve_runtime.runtimes import graph as graphs
from traceserve_runtime.runtimes.graph import Traced
from traceserve_runtime.runtimes.torchscript.weights import GRAPH_FILE, WEIGHTS_FILE, WeightPosition, write_positions

from traceserve.building.writers.tracing.graphs import write_module

# A zip's local file header ends with the lengths of the name and of the extra field, which follow it.
_HEADER_SIZE, _LENGTHS_AT = 30, 26


def write_graph(folder: Path, model_file: str, rewritten: Optional[Traced] = None) -> Tuple[str, ...]:
    """Write the model's graph, or its rewritten one, and the table of weights beside the model; returns their names."""
    module = graphs.load_module(folder / model_file) if rewritten is None else rewritten
    records = _records(folder / model_file)
    positions: Dict[str, WeightPosition] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        offset = records.get(_digest(tensor.data)) if tensor.numel() else 0  # a weight may have no values
        if offset is not None:
            positions[name] = WeightPosition(offset, str(tensor.dtype).replace("torch.", ""), tuple(tensor.shape))
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in positions:
            tensor.data = torch.empty(0, dtype=tensor.dtype)
    write_module(module, folder / GRAPH_FILE)
    write_positions(folder, positions)
    return (GRAPH_FILE, WEIGHTS_FILE)


def _records(path: Path) -> Dict[bytes, int]:
    """Return where the content of each stored tensor of a TorchScript file starts, by its digest."""
    found: Dict[bytes, int] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or "/data/" not in info.filename or not info.file_size:
                continue
            stream.seek(info.header_offset + _LENGTHS_AT)
            name_length, extra_length = struct.unpack("<HH", stream.read(4))
            offset = info.header_offset + _HEADER_SIZE + name_length + extra_length
            stream.seek(offset)
            found.setdefault(hashlib.sha256(stream.read(info.file_size)).digest(), offset)
    return found


def _digest(tensor: torch.Tensor) -> bytes:
    """Return a digest of a tensor's values in order. A view with other strides matches no record: it stays in the
    graph."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).digest()
