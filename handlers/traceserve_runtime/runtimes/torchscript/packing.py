"""The weights of a traced graph's linear layers, in the order in which oneDNN reads them.

A matrix product on a CPU first brings its weights into that order, at every call; with few tokens this takes as long as
the product. Done once, when the model is read, it is done for all calls. In return a worker holds these weights for itself.

Layers that read the same rows, as query, key and value of an attention do, become one product: each has a price of its
own, which with few tokens is a good part of it. What they give are then slices of one tensor, whose rows do not lie next to
each other; `aten::view` may refuse those, so it becomes `aten::reshape`, which is the same otherwise. A GELU that alone reads
what a layer gives is computed within its product, before anything is rounded.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from traceserve_runtime import processor
from traceserve_runtime.runtimes import torch_internals
from traceserve_runtime.runtimes.graph import (
    Graph,
    Node,
    Traced,
    Value,
    ValueType,
    insert_constant,
    insert_node,
    replace,
)
from traceserve_runtime.runtimes.torchscript import devices

if TYPE_CHECKING:
    import torch

Key = Tuple[int, Tuple[int, ...], bool, int]
Packed = Dict[Tuple[Key, ...], Tuple["torch.Tensor", Optional["torch.Tensor"]]]  # weights; of several layers biases too

_ROWS = 32  # what oneDNN is told to expect; it takes any number
_BY_STRIDES = ("aten::as_strided", "aten::view_as", "aten::unflatten")  # need what they read to lie as it did
_VIEW = re.compile(  # what these give may lie in the memory of what they read
    "aten::(contiguous|detach|expand|flatten|narrow|permute|reshape|select|slice|squeeze|t|to|transpose|unsqueeze|view)"
)


class _Layer(NamedTuple):
    """A linear layer in a graph, and the module's own tensors that it reads."""

    node: Node
    weight: torch.Tensor  # (outputs, inputs), unless turned
    vector: Optional[torch.Tensor]  # the bias, (outputs)
    turned: bool

    @property
    def rows(self) -> Value:
        """The value that is multiplied; asked anew each time, for what gave it may have been replaced."""
        return list(self.node.inputs())[1 if self.turned else 0]

    @property
    def bias(self) -> Value:
        """The value that is added."""
        return list(self.node.inputs())[0 if self.turned else 2]

    @property
    def key(self) -> Key:
        """What tells it from others; equal bytes lie in one place."""
        vector = 0 if self.vector is None else self.vector.data_ptr()
        return self.weight.data_ptr(), tuple(self.weight.shape), self.turned, vector

    @property
    def matrix(self) -> torch.Tensor:
        """The weight, (outputs, inputs)."""
        weight = self.weight.detach()
        return weight.t() if self.turned else weight


def pack(module: Traced) -> int:
    """Rewrite the graphs of a module on the CPU, before its first run; gives how many layers read a packed weight.

    A torch that cannot do it (before 2.0, or without oneDNN) leaves the graphs as they are, and so does what is no x86:
    nobody has tried it there.
    """
    dtypes = _dtypes()
    packed: Packed = {}  # a weight that several graphs or layers read is packed once
    return sum(_pack_entry(entry, dtypes, packed) for entry in devices.entries(module)) if dtypes else 0


def possible() -> bool:
    """Whether `pack` does anything here."""
    return bool(_dtypes())


def _dtypes() -> List[torch.dtype]:
    """What oneDNN packs on this processor; it refuses bfloat16 where torch itself would emulate it."""
    return torch_internals.packable() if processor.is_x86() else []


def _pack_entry(entry: Traced, dtypes: Sequence[torch.dtype], packed: Packed) -> int:
    """Pack what one graph reads in these dtypes; gives the number of its layers."""
    import torch

    torch_internals.inline(entry.graph)
    torch_internals.merge_equal(entry.graph)  # else each layer reads rows that were cast for it alone
    groups = _groups(entry, [layer for layer in layers(entry) if layer.weight.dtype in dtypes])
    for number, group in enumerate(groups):
        key = tuple(layer.key for layer in group)
        if key not in packed:
            matrices = [layer.matrix for layer in group]
            weight = torch.cat(matrices) if len(group) > 1 else matrices[0].contiguous()
            biases = [layer.vector.detach() for layer in group if layer.vector is not None]
            bias = torch.cat(biases) if len(group) > 1 and biases else None
            packed[key] = torch_internals.reorder(weight, _ROWS), bias
        _replace(entry, group, f"packed_{number}", *packed[key])
    if any(len(group) > 1 for group in groups):
        _allow_slices(entry.graph)
    return sum(map(len, groups))


def layers(entry: Traced) -> Iterator[_Layer]:
    """The layers of a graph whose weights are the module's own."""
    for kind, read in _LAYERS.items():
        for node in list(entry.graph.findAllNodes(kind, True)):
            layer = read(entry, node)
            if layer is not None:
                yield layer


def _groups(entry: Traced, layers: Sequence[_Layer]) -> List[List[_Layer]]:
    """Layers that are to be one product, in the order of the graph; most are alone."""
    graph = entry.graph
    outside = {node.output().debugName() for kind in _LAYERS for node in graph.findAllNodes(kind, False)}
    strided = any(graph.findAllNodes(kind, True) for kind in _BY_STRIDES)
    written = _written(graph)
    groups: Dict[object, List[_Layer]] = {}
    for layer in layers:
        name = layer.node.output().debugName()
        known = layer.vector is not None or str(layer.bias.type()) == "NoneType"
        kind = layer.weight.dtype, layer.vector.dtype if layer.vector is not None else None
        together = known and name in outside and not strided and not {memory(layer.rows), name} & written
        groups.setdefault((layer.rows.debugName(), layer.turned, kind) if together else name, []).append(layer)
    return list(groups.values())


def _written(graph: Graph) -> Set[str]:
    """What is changed in place after it was made. Of such rows one layer may read the old values, and another the new; of
    such results a slice under another shape may be a copy, which keeps the change to itself."""
    nodes = [node for node in devices.nodes(graph) if node.kind().startswith("aten::") and node.kind().endswith("_")]
    return {memory(next(iter(node.inputs()))) for node in nodes}


def memory(value: Value) -> str:
    """The name of the value that first lay where this one lies."""
    while _VIEW.fullmatch(value.node().kind()):
        value = next(iter(value.node().inputs()))
    return value.debugName()


def _linear(entry: Traced, node: Node) -> Optional[_Layer]:
    _, weight, bias = node.inputs()
    found = _parameter(entry, weight)
    return None if found is None else _Layer(node, found, _parameter(entry, bias), turned=False)


def _addmm(entry: Traced, node: Node) -> Optional[_Layer]:
    """GPT-2 writes its linear layers this way, the weight turned; any other sum than with a vector is none."""
    bias, _, weight, *factors = node.inputs()
    found, added = _parameter(entry, weight), _parameter(entry, bias)
    plain = all(factor.node().kind() == "prim::Constant" and factor.toIValue() == 1 for factor in factors)
    if found is None or added is None or added.dim() != 1 or not plain:
        return None
    return _Layer(node, found, added, turned=True)


_LAYERS = {"aten::linear": _linear, "aten::addmm": _addmm}


def _parameter(entry: Traced, value: Value) -> Optional[torch.Tensor]:
    """The matrix or vector of the module that a value of its graph is; None for what is computed."""
    path: List[str] = []
    while value.node().kind() == "prim::GetAttr":
        path.insert(0, value.node().s("name"))
        [value] = value.node().inputs()
    if not path or value.node().kind() != "prim::Param":
        return None
    found: Any = entry
    for name in path:
        found = getattr(found, name)
    tensor: Optional[torch.Tensor] = found
    return tensor


def _replace(
    entry: Traced, group: Sequence[_Layer], name: str, weight: torch.Tensor, bias: Optional[torch.Tensor]
) -> None:
    """Put a product with a packed weight, from now on an attribute of the module, in the place of a group of layers."""
    graph, first = entry.graph, group[0]
    matrix = _attribute(entry, name, weight, first.node)
    added = first.bias if bias is None else _attribute(entry, f"{name}_bias", bias, first.node)
    gelu = _gelu(first) if len(group) == 1 else None
    applied = ("none", "") if gelu is None else ("gelu", gelu.inputsAt(1).toIValue())
    activation, algorithm = (insert_constant(graph, value, first.node) for value in applied)
    none_of_them = _typed(insert_node(graph, "prim::ListConstruct", [], first.node), _type("Scalar?[]"))
    inputs = [first.rows, matrix, added, activation, none_of_them, algorithm]
    product = insert_node(graph, torch_internals.PRODUCT, inputs, first.node).output()
    if len(group) > 1:
        _share(graph, group, product)
        return
    if gelu is not None:
        replace(gelu, first.node.output())
    replace(first.node, _typed(product.node(), first.node.output().type()))


def _attribute(entry: Traced, name: str, tensor: torch.Tensor, before: Node) -> Value:
    """A new tensor of the module, as a value of its graph."""
    torch_internals.register(entry, name, tensor)
    read = insert_node(entry.graph, "prim::GetAttr", [next(iter(entry.graph.inputs()))], before)
    read.s_("name", name)
    return read.output()


def _share(graph: Graph, group: Sequence[_Layer], product: Value) -> None:
    """Let what reads one of several layers read its part of their product."""
    before = group[0].node
    last, *widths = (insert_constant(graph, n, before) for n in (-1, *(len(layer.matrix) for layer in group)))
    sizes = _typed(insert_node(graph, "prim::ListConstruct", widths, before), _type("int[]"))
    split = _typed(insert_node(graph, "aten::split_with_sizes", [product, sizes, last], before), _type("Tensor[]"))
    parts = list(insert_node(graph, "prim::ListUnpack", [split], before, len(group)).outputs())
    for layer, part in zip(group, parts):
        layer.node.output().replaceAllUsesWith(part)
    for layer in group:
        layer.node.destroy()


def _type(name: str) -> ValueType:
    return torch_internals.type_named(name)


def _typed(node: Node, type: ValueType) -> Value:
    node.output().setType(type)
    return node.output()


def _gelu(layer: _Layer) -> Optional[Node]:
    """The activation, where it alone reads what the layer gives."""
    readers = [use.user for use in layer.node.output().uses()]
    return readers[0] if [node.kind() for node in readers] == ["aten::gelu"] else None


def _allow_slices(graph: Graph) -> None:
    """Let rows that do not lie next to each other be read under other shapes."""
    for node in list(graph.findAllNodes("aten::view", True)):
        if node.inputsAt(1).type().kind() != "ListType":  # another dtype of the same bytes
            continue
        made = insert_node(graph, "aten::reshape", list(node.inputs()), node)
        replace(node, _typed(made, node.output().type()))
