"""Dynamic int8 by ONNX Runtime's MatMulNBits: weights and what they are multiplied with, each in blocks of their own scale.

Blocks lie along the input channels, so that each token is quantized by itself: no answer depends on what else is in its
batch. The products are right on every processor, and fast with VNNI. `lowering.int8` chooses the layers.
"""

from __future__ import annotations

import hashlib
from typing import Any, Dict, List, Mapping, Tuple

import numpy as np
import torch

from traceserve.building.writers.lowering.int8 import smoothing
from traceserve.errors import ExportError

# Input channels of one scale. Of 32, 64 and 128 the smaller ones change fewer answers, the larger ones are faster.
BLOCK = 64
_LARGEST = 127
_ZERO = 128  # of weights, which are stored without a sign
_SMALLEST = 1e-12
_BY_INT8 = 4  # MatMulNBits' accuracy_level that multiplies int8 by int8
_DOMAIN = "com.microsoft"


class SmoothedLinear(torch.nn.Module):
    """A linear layer in float32 that `quantize` finds again: large input channels are smaller, their weights larger."""

    def __init__(self, linear: Any, largest: torch.Tensor) -> None:
        """`largest`: of each input channel the largest absolute value that was seen, (in)."""
        super().__init__()
        weight = linear.weight.detach().float()
        factors = smoothing(weight, largest)
        self.weight = torch.nn.Parameter((weight * factors).t().contiguous(), requires_grad=False)
        self.smoothing = torch.nn.Parameter(1 / factors, requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same as the layer's own, to the last digits; a MatMul in ONNX, whatever the shape of its inputs."""
        outputs = torch.matmul(self.smoothed(inputs), self.weight)
        return outputs if self.bias is None else outputs + self.bias

    def smoothed(self, inputs: torch.Tensor) -> torch.Tensor:
        """What is multiplied with the weight, (..., in)."""
        return inputs * self.smoothing


class RoundedLinear(SmoothedLinear):
    """The same with the numbers that the quantized layer multiplies, to measure what that changes."""

    def __init__(self, linear: Any, largest: torch.Tensor) -> None:
        """`largest` as of SmoothedLinear."""
        super().__init__(linear, largest)
        self.weight = torch.nn.Parameter(_rounded(self.weight.t()).t(), requires_grad=False)

    def smoothed(self, inputs: torch.Tensor) -> torch.Tensor:
        """As of SmoothedLinear, in int8's steps."""
        return _rounded(super().smoothed(inputs))


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """The values (..., channels), each block of channels rounded to int8 by its own scale."""
    channels = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -channels % BLOCK))
    blocks = padded.reshape(*values.shape[:-1], -1, BLOCK)
    scales = (blocks.abs().amax(-1, keepdim=True) / _LARGEST).clamp(min=_SMALLEST)
    return ((blocks / scales).round() * scales).reshape(padded.shape)[..., :channels]


def quantized_layers(model: Any) -> List[SmoothedLinear]:
    """The layers of a model that are to be quantized."""
    return [module for module in model.modules() if isinstance(module, SmoothedLinear)]


def quantize(model: Any, source: Any) -> None:
    """Change an ONNX model: the layers of `source`, which it was exported from, to int8; nothing where there are none."""
    from onnx import helper, numpy_helper

    wanted = {_digest(layer.weight.detach().numpy()) for layer in quantized_layers(source)}
    if not wanted:
        return
    graph = model.graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) == 2}
    found = {name: array for name, array in arrays.items() if _digest(array) in wanted}
    if not _replace_products(graph, found):
        raise ExportError(f"of {type(source).__name__} no linear layer is a product of matrices in the ONNX graph")
    read = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in found and tensor.name not in read]:
        graph.initializer.remove(tensor)
    if _DOMAIN not in {known.domain for known in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))


def _replace_products(graph: Any, found: Mapping[str, np.ndarray]) -> bool:
    """Let products with these weights, by their names, be computed in int8; whether there is one."""
    from onnx import helper, numpy_helper

    made: Dict[str, List[str]] = {}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in found:
            continue
        name = node.input[1]
        if name not in made:
            tensors = zip(("quantized", "scales"), _blocks(found[name]))
            stored = [numpy_helper.from_array(array, f"{name}_{what}") for what, array in tensors]
            graph.initializer.extend(stored)
            made[name] = [tensor.name for tensor in stored]
        inputs, outputs, (least, most) = [node.input[0], *made[name]], list(node.output), found[name].shape
        facts = {"K": least, "N": most, "bits": 8, "block_size": BLOCK, "accuracy_level": _BY_INT8}
        node.CopyFrom(helper.make_node("MatMulNBits", inputs, outputs, node.name, domain=_DOMAIN, **facts))
    return bool(made)


def _blocks(weight: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """A weight (in, out) as blocks (out, in / BLOCK, BLOCK) without a sign, and their scales (out, in / BLOCK)."""
    columns = np.pad(weight.T, ((0, 0), (0, -len(weight) % BLOCK)))
    blocks = columns.reshape(len(columns), -1, BLOCK)
    scales = np.maximum(np.abs(blocks).max(-1) / np.float32(_LARGEST), np.float32(_SMALLEST))
    return (np.rint(blocks / scales[..., None]) + _ZERO).astype(np.uint8), scales


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()
