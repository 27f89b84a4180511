"""The weights of a traced graph's linear layers, in the order in which oneDNN reads them.

A matrix product on a CPU first brings its weights into that order, at every call; with few tokens this takes as long as
the product. Done once, when the model is read, it is done for all calls. In return a worker holds these weights for itself.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from traceserve_runtime.runtimes import devices

if TYPE_CHECKING:
    import torch

Packed = Dict[Tuple[int, Tuple[int, ...], bool], "torch.Tensor"]

_MACHINES = ("x86_64", "amd64")
_ROWS = 32  # what oneDNN is told to expect; it takes any number


class _Layer(NamedTuple):
    """A linear layer in a graph: the values that it reads, and its weight, of shape (outputs, inputs) unless turned."""

    rows: Any
    bias: Any
    weight: torch.Tensor
    turned: bool


def pack(module: Any) -> int:
    """Rewrite the graphs of a module on the CPU, before its first run; gives how many layers read a packed weight.

    A torch that cannot do it (before 2.0, or without oneDNN) leaves the graphs as they are, and so does what is no x86:
    nobody has tried it there.
    """
    dtypes = _dtypes()
    packed: Packed = {}  # a weight that several graphs or layers read is packed once
    return sum(_pack_entry(entry, dtypes, packed) for entry in devices.entries(module)) if dtypes else 0


def _dtypes() -> List[torch.dtype]:
    """What oneDNN packs on this processor; it refuses bfloat16 where torch itself would emulate it."""
    import torch

    operators = torch.ops.mkldnn
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or platform.machine().lower() not in _MACHINES or not hasattr(operators, "_reorder_linear_weight"):
        return []
    return [torch.float32, *([torch.bfloat16] if operators._is_mkldnn_bf16_supported() else [])]


def _pack_entry(entry: Any, dtypes: Sequence[torch.dtype], packed: Packed) -> int:
    """Pack what one graph reads in these dtypes; gives the number of its layers."""
    import torch

    torch._C._jit_pass_inline(entry.graph)
    count = 0
    for node in [node for kind in _LAYERS for node in entry.graph.findAllNodes(kind, True)]:
        layer = _LAYERS[node.kind()](entry, list(node.inputs()))
        if layer is None or layer.weight.dtype not in dtypes:
            continue
        key = (layer.weight.data_ptr(), tuple(layer.weight.shape), layer.turned)  # equal bytes lie in one place
        if key not in packed:
            weight = layer.weight.detach()
            weight = weight.t() if layer.turned else weight
            packed[key] = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        _replace(entry, node, layer, f"packed_{count}", packed[key])
        count += 1
    return count


def _linear(entry: Any, inputs: List[Any]) -> Optional[_Layer]:
    rows, weight, bias = inputs
    found = _parameter(entry, weight)
    return None if found is None else _Layer(rows, bias, found, turned=False)


def _addmm(entry: Any, inputs: List[Any]) -> Optional[_Layer]:
    """GPT-2 writes its linear layers this way, the weight turned; any other sum than with a vector is none."""
    bias, rows, weight, *factors = inputs
    found, added = _parameter(entry, weight), _parameter(entry, bias)
    plain = all(factor.node().kind() == "prim::Constant" and factor.toIValue() == 1 for factor in factors)
    if found is None or added is None or added.dim() != 1 or not plain:
        return None
    return _Layer(rows, bias, found, turned=True)


_LAYERS = {"aten::linear": _linear, "aten::addmm": _addmm}


def _parameter(entry: Any, value: Any) -> Optional[torch.Tensor]:
    """The matrix or vector of the module that a value of its graph is; None for what is computed."""
    path: List[str] = []
    while value.node().kind() == "prim::GetAttr":
        path.insert(0, value.node().s("name"))
        [value] = value.node().inputs()
    if not path or value.node().kind() != "prim::Param":
        return None
    found = entry
    for name in path:
        found = getattr(found, name)
    tensor: torch.Tensor = found
    return tensor


def _replace(entry: Any, node: Any, layer: _Layer, name: str, weight: torch.Tensor) -> None:
    """Put a product with a packed weight, from now on an attribute of the module, in the place of a layer."""
    import torch

    graph = entry.graph
    entry._c._register_attribute(name, torch._C.TensorType.get(), weight)

    def before(kind: str, inputs: List[Any], result: Any) -> Any:
        made = graph.create(kind, inputs, 1)
        made.insertBefore(node)
        made.output().setType(result)
        return made

    attribute = before("prim::GetAttr", [next(iter(graph.inputs()))], torch._C.TensorType.get())
    attribute.s_("name", name)
    numbers = torch._C.ListType(torch._C.OptionalType(torch._C.NumberType.get()))
    none_of_them = before("prim::ListConstruct", [], numbers)
    with graph.insert_point_guard(node):
        activation, algorithm = graph.insertConstant("none"), graph.insertConstant("")
    inputs = [layer.rows, attribute.output(), layer.bias, activation, none_of_them.output(), algorithm]
    product = before("mkldnn::_linear_pointwise", inputs, node.output().type())
    node.output().replaceAllUsesWith(product.output())
    node.destroy()
