"""Graphs and, in one file beside them, their weights: each once, even if several graphs share it.

A protobuf message is limited to 2 GB, and ONNX Runtime maps a file of weights: workers share its pages, and loading is
three times as fast.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Dict, Iterator, Mapping, Tuple

if TYPE_CHECKING:
    import onnx

SMALLEST = 1024  # bytes of a tensor that leaves the graph; shape inference reads small ones
_ALIGNMENT = 64


def copy_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy."""
    import onnx

    other = onnx.ModelProto()
    other.CopyFrom(model)
    return other


def write_models(models: Mapping[str, onnx.ModelProto], folder: Path, weights_file: str) -> Tuple[str, ...]:
    """Write each ONNX model into the file of its name, without weights; returns all files' names. Modifies the
    models."""
    offsets: Dict[bytes, int] = {}
    with (folder / weights_file).open("wb") as stream:
        for file, model in models.items():
            for tensor in _tensors(model.graph):
                if len(tensor.raw_data) >= SMALLEST:
                    _move(tensor, stream, offsets, weights_file)
            for node in model.graph.node:
                node.ClearField("doc_string")  # source locations
            (folder / file).write_bytes(model.SerializeToString(deterministic=True))
    return (*models, weights_file)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every weight of a graph and its subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)


def _move(tensor: onnx.TensorProto, stream: BinaryIO, offsets: Dict[bytes, int], weights_file: str) -> None:
    from onnx import external_data_helper

    data = tensor.raw_data
    digest = hashlib.sha256(data).digest()
    if digest not in offsets:
        stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
        offsets[digest] = stream.tell()
        stream.write(data)
    external_data_helper.set_external_data(tensor, weights_file, offsets[digest], len(data))
    tensor.ClearField("raw_data")
