"""Dynamic int8 with ONNX Runtime's MatMulNBits: weights and their inputs, in blocks with separate scales.

Blocks are along the input channels, so each token is quantized separately: answers do not depend on the rest of the
batch. The products are correct on every processor, and fast with VNNI. `lowering.int8` chooses the layers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Dict, List, Mapping, Tuple

import numpy as np
import torch

from traceserve.building.writers.lowering.int8 import smoothing
from traceserve.errors import ExportError

if TYPE_CHECKING:
    import onnx

# Input channels per scale. Of 32, 64 and 128 the smaller ones change fewer answers, the larger ones are faster.
BLOCK = 64
_LARGEST = 127
_ZERO = 128  # for weights, which are stored unsigned
_SMALLEST = 1e-12
_BY_INT8 = 4  # MatMulNBits' accuracy_level for int8 by int8
_DOMAIN = "com.microsoft"


class SmoothedLinear(torch.nn.Module):
    """A float32 linear layer that `quantize` recognizes: large input channels are scaled down, their weights up."""

    def __init__(self, linear: torch.nn.Linear, largest: torch.Tensor) -> None:
        """`largest`: each input channel's largest absolute value, (in)."""
        super().__init__()
        weight = linear.weight.detach().float()
        factors = smoothing(weight, largest)
        self.weight = torch.nn.Parameter((weight * factors).t().contiguous(), requires_grad=False)
        self.smoothing = torch.nn.Parameter(1 / factors, requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Equal the original layer up to rounding; a MatMul in ONNX, whatever its inputs' shape."""
        outputs = torch.matmul(self.smoothed(inputs), self.weight)
        return outputs if self.bias is None else outputs + self.bias

    def smoothed(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the weight's factor, (..., in)."""
        return inputs * self.smoothing


class RoundedLinear(SmoothedLinear):
    """The same with the quantized layer's numbers, to measure the change."""

    def __init__(self, linear: torch.nn.Linear, largest: torch.Tensor) -> None:
        """`largest` as in SmoothedLinear."""
        super().__init__(linear, largest)
        self.weight = torch.nn.Parameter(_rounded(self.weight.t()).t(), requires_grad=False)

    def smoothed(self, inputs: torch.Tensor) -> torch.Tensor:
        """As in SmoothedLinear, rounded to int8."""
        return _rounded(super().smoothed(inputs))


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """Round values (..., channels) to int8, each block of channels by its own scale."""
    channels = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -channels % BLOCK))
    blocks = padded.reshape(*values.shape[:-1], -1, BLOCK)
    scales = (blocks.abs().amax(-1, keepdim=True) / _LARGEST).clamp(min=_SMALLEST)
    return ((blocks / scales).round() * scales).reshape(padded.shape)[..., :channels]


def quantized_layers(model: torch.nn.Module) -> List[SmoothedLinear]:
    """The layers of a model that are to be quantized."""
    return [module for module in model.modules() if isinstance(module, SmoothedLinear)]


def quantize(model: onnx.ModelProto, source: torch.nn.Module) -> None:
    """Convert the layers of `source`, from which the ONNX model was exported, to int8 in it; nothing if there are
    none."""
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


def _replace_products(graph: onnx.GraphProto, found: Mapping[str, np.ndarray]) -> bool:
    """Convert products with these weights, by name, to int8; return whether there is one."""
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
    """Return a weight (in, out) as unsigned blocks (out, in / BLOCK, BLOCK), and their scales (out, in / BLOCK)."""
    columns = np.pad(weight.T, ((0, 0), (0, -len(weight) % BLOCK)))
    blocks = columns.reshape(len(columns), -1, BLOCK)
    scales = np.maximum(np.abs(blocks).max(-1) / np.float32(_LARGEST), np.float32(_SMALLEST))
    return (np.rint(blocks / scales[..., None]) + _ZERO).astype(np.uint8), scales


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()
