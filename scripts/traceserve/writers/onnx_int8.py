"""Dynamic int8 by ONNX Runtime: weights for each output channel, what they are multiplied with for each run as a whole."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path
from typing import Any, Iterator, List, Set

import torch

from traceserve.errors import ExportError
from traceserve.quantization import SmoothedLinear


def layers(model: Any) -> List[SmoothedLinear]:
    """The layers of a model that are to be quantized."""
    return [module for module in model.modules() if isinstance(module, SmoothedLinear)]


def quantize(model: Any, source: Any, reduced: bool, scratch: Path) -> Any:
    """The ONNX model with the layers of `source`, which it was exported from, in int8; itself where there are none."""
    if not layers(source):
        return model
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = _products(model, {digest for layer in layers(source) for digest in _digests(layer.weight)})
    if not nodes:
        raise ExportError(f"of {type(source).__name__} no linear layer is a product of matrices in the ONNX graph")
    file = scratch / "quantized.onnx"
    with _quiet():
        quantize_dynamic(
            model,
            str(file),
            per_channel=True,
            reduce_range=reduced,
            weight_type=QuantType.QInt8,
            # A Gemm becomes a MatMul of this name and an Add.
            nodes_to_quantize=[*nodes, *(f"{name}_MatMul" for name in nodes)],
            use_external_data_format=True,
        )
    return onnx.load(str(file))


def _products(model: Any, weights: Set[str]) -> List[str]:
    """The names of the nodes that multiply with one of these weights."""
    from onnx import numpy_helper

    found = {
        tensor.name
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2 and _digest(numpy_helper.to_array(tensor)) in weights
    }
    return [
        node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and found.intersection(node.input)
    ]


def _digests(weight: torch.Tensor) -> List[str]:
    """Of the weight as it is and as its transpose: the exporter stores either."""
    array = weight.detach().numpy()
    return [_digest(array), _digest(array.T)]


def _digest(array: Any) -> str:
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without its advice to optimize the graph first: that is done when the graph is read."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
