"""Packs the weights of a traced graph's linear layers into oneDNN's layout, or FBGEMM's.

A matrix product on a CPU first converts its weights to that layout, at every call; with few tokens this takes as long
as the product. Here it is done once, when the model is loaded. In return a worker has its own copy of these weights.

Layers that read the same rows, such as an attention's query, key and value, are fused into one product: each has a
fixed cost, which matters with few tokens. Their outputs are then slices of one tensor, whose rows are not contiguous;
`aten::view` may refuse those, so it becomes `aten::reshape`, which is otherwise the same. A GELU that is the only
reader of a layer's output is fused into its product, before any rounding.

With few tokens a product takes as long as its weights take to be read from memory. Many checkpoints were trained and saved
in half precision: in float16 their weights are the same, and half as large. So they are packed in FBGEMM's layout for it,
while rows and sums stay in float32.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from traceserve_runtime import processor
from traceserve_runtime.runtimes import team, torch_internals
from traceserve_runtime.runtimes.graph import (
    Graph,
    Node,
    Traced,
    Value,
    ValueType,
    insert_constant,
    insert_node,
    open_tuples,
    replace_value,
    works_in_place,
)
from traceserve_runtime.runtimes.torchscript import devices

if TYPE_CHECKING:
    import torch

Key = Tuple[int, Tuple[int, ...], bool, int]


class _Packed(NamedTuple):
    """The packed weight of one or more layers, in float16 with its bias, or else with the bias of several."""

    weight: object
    bias: Optional[torch.Tensor]
    half: bool


_ROUNDING = 2.0**-24  # float32's own, relative
_CHECKED = 1024  # outputs at a time, so that checking large weights takes no memory, and others are soon left
_ROWS = 32  # oneDNN's expected number; any number works
_BY_STRIDES = ("aten::as_strided", "aten::view_as", "aten::unflatten")  # need their input's memory layout unchanged
_VIEW = re.compile(  # their outputs may share their input's memory
    "aten::(contiguous|detach|expand|flatten|narrow|permute|reshape|select|slice|squeeze|t|to|transpose|unsqueeze|view)"
)
_KEEPS_DIMENSIONS = re.compile(
    "aten::(add|addmm|contiguous|div|dropout|expand|gelu|layer_norm|linear|mul|relu|rms_norm|scaled_dot_product_attention|"
    "silu|slice|sub|tanh|to|transpose|type_as)_?"
)


class _Layer(NamedTuple):
    """A linear layer in a graph, and the module's own tensors that it reads."""

    node: Node
    weight: torch.Tensor  # (outputs, inputs), unless transposed
    vector: Optional[torch.Tensor]  # the bias, (outputs)
    turned: bool

    @property
    def rows(self) -> Value:
        """The multiplied value; looked up each time, since its source may have been replaced."""
        return list(self.node.inputs())[1 if self.turned else 0]

    @property
    def bias(self) -> Value:
        """The added value."""
        return list(self.node.inputs())[0 if self.turned else 2]

    @property
    def bias_known(self) -> bool:
        """Whether it adds the module's own vector, or nothing."""
        return self.vector is not None or str(self.bias.type()) == "NoneType"

    @property
    def key(self) -> Key:
        """The layer's identity; equal bytes share a memory address."""
        vector = 0 if self.vector is None else self.vector.data_ptr()
        return self.weight.data_ptr(), tuple(self.weight.shape), self.turned, vector

    @property
    def matrix(self) -> torch.Tensor:
        """The weight, (outputs, inputs)."""
        weight = self.weight.detach()
        return weight.t() if self.turned else weight


def pack(module: Traced) -> int:
    """Rewrite a module's graphs on the CPU, before its first run; returns the number of layers with packed weights.

    If torch does not support it (before 2.0, or without oneDNN), the graphs are unchanged, and so they are on other
    processors than x86, where it is untested.
    """
    dtypes = _dtypes()
    if not dtypes:
        return 0
    halves = torch_internals.packs_halves()
    packed: Dict[Tuple[Key, ...], _Packed] = {}  # a weight that several graphs or layers read is packed once
    return sum(_pack_entry(entry, dtypes, packed, halves) for entry in devices.entries(module))


def possible() -> bool:
    """Return whether `pack` does anything here."""
    return bool(_dtypes())


def packs_in_half() -> bool:
    """Return whether `pack` packs weights of half precision in float16 here."""
    return possible() and torch_internals.packs_halves()


def _dtypes() -> List[torch.dtype]:
    """Return the dtypes that oneDNN packs on this processor; it refuses bfloat16 where torch would emulate it."""
    return torch_internals.packable() if processor.is_x86() else []


def _pack_entry(
    entry: Traced, dtypes: Sequence[torch.dtype], packed: Dict[Tuple[Key, ...], _Packed], halves: bool
) -> int:
    """Pack one graph's weights of these dtypes; returns the number of layers."""
    torch_internals.inline(entry.graph)
    open_tuples(entry.graph)
    torch_internals.merge_equal(entry.graph)  # else each layer reads its own cast of the rows
    groups = _groups(entry, [layer for layer in layers(entry) if layer.weight.dtype in dtypes])
    keys = [tuple(layer.key for layer in group) for group in groups]
    new = {key: group for key, group in zip(keys, groups) if key not in packed}
    packed.update(zip(new, _packed_groups(list(new.values()), halves)))
    matrices = _matrices(entry.graph) if any(packed[key].half for key in keys) else set()
    of_vectors = [group[0].rows.debugName() not in matrices for group in groups]  # before their rows are replaced
    for number, (group, key, vectors) in enumerate(zip(groups, keys, of_vectors)):
        _replace(entry, group, f"packed_{number}", packed[key], vectors)
    if any(len(group) > 1 for group in groups):
        _allow_slices(entry.graph)
    return sum(map(len, groups))


def _packed_groups(groups: Sequence[Sequence[_Layer]], halves: bool) -> List[_Packed]:
    """Pack groups in parallel: FBGEMM packs a weight on one core."""
    with team.threads_kept() as threads, ThreadPoolExecutor(threads, "packing", team.take_one_core) as pool:
        return list(pool.map(partial(_pack_group, halves=halves), groups))


def _pack_group(group: Sequence[_Layer], halves: bool) -> _Packed:
    import torch

    weights = [layer.matrix for layer in group]
    vectors = [layer.vector.detach() for layer in group if layer.vector is not None]
    half = halves and all(map(in_half, group))
    weight = torch.cat(weights) if len(group) > 1 else weights[0].contiguous()
    bias = torch.cat(vectors) if vectors else None
    if half:
        return _Packed(torch_internals.pack_half(weight, bias), None, True)
    return _Packed(torch_internals.reorder(weight, _ROWS), bias if len(group) > 1 else None, False)


def in_half(layer: _Layer) -> bool:
    """Return whether a layer is packed in float16, where torch does that."""
    return layer.bias_known and is_half(layer.matrix)


def is_half(weight: torch.Tensor) -> bool:
    """Return whether a matrix is the same in float16, but for less than float32's own rounding: in bfloat16 numbers may be
    smaller than float16's smallest."""
    import torch

    return weight.dtype == torch.float32 and all(
        bool((part.half().float() - part).norm() <= _ROUNDING * part.norm()) for part in weight.split(_CHECKED)
    )


def layers(entry: Traced) -> Iterator[_Layer]:
    """Yield a graph's layers whose weights are the module's own."""
    for kind, read in _LAYERS.items():
        for node in list(entry.graph.findAllNodes(kind, True)):
            layer = read(entry, node)
            if layer is not None:
                yield layer


def _groups(entry: Traced, layers: Sequence[_Layer]) -> List[List[_Layer]]:
    """Group layers to be fused into one product, in the graph's order; most are single."""
    graph = entry.graph
    outside = {node.output().debugName() for kind in _LAYERS for node in graph.findAllNodes(kind, False)}
    strided = any(graph.findAllNodes(kind, True) for kind in _BY_STRIDES)
    written = _written(graph)
    groups: Dict[object, List[_Layer]] = {}
    for layer in layers:
        name = layer.node.output().debugName()
        kind = layer.weight.dtype, layer.vector.dtype if layer.vector is not None else None
        together = layer.bias_known and name in outside and not strided and not {memory(layer.rows), name} & written
        groups.setdefault((layer.rows.debugName(), layer.turned, kind) if together else name, []).append(layer)
    return list(groups.values())


def _written(graph: Graph) -> Set[str]:
    """Return values that are modified in place. One layer may read such rows before, another after the change; a
    reshaped slice of such results may be a copy, which does not share the change."""
    nodes = [node for node in devices.nodes(graph) if works_in_place(node)]
    return {memory(next(iter(node.inputs()))) for node in nodes}


def memory(value: Value) -> str:
    """Return the name of the value whose memory this one shares."""
    while _VIEW.fullmatch(value.node().kind()):
        value = next(iter(value.node().inputs()))
    return value.debugName()


def _linear(entry: Traced, node: Node) -> Optional[_Layer]:
    _, weight, bias = node.inputs()
    found = _parameter(entry, weight)
    return None if found is None else _Layer(node, found, _parameter(entry, bias), turned=False)


def _addmm(entry: Traced, node: Node) -> Optional[_Layer]:
    """Return GPT-2's kind of linear layer, with a transposed weight; only for a sum with a vector."""
    bias, _, weight, *factors = node.inputs()
    found, added = _parameter(entry, weight), _parameter(entry, bias)
    plain = all(factor.node().kind() == "prim::Constant" and factor.toIValue() == 1 for factor in factors)
    if found is None or added is None or added.dim() != 1 or not plain:
        return None
    return _Layer(node, found, added, turned=True)


_LAYERS = {"aten::linear": _linear, "aten::addmm": _addmm}


def _parameter(entry: Traced, value: Value) -> Optional[torch.Tensor]:
    """Return the module's matrix or vector that a value of its graph refers to; None for computed values."""
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


def _replace(entry: Traced, group: Sequence[_Layer], name: str, packed: _Packed, of_vectors: bool) -> None:
    """Replace a group of layers by a product with a packed weight, a new attribute of the module. One that may be
    `of_vectors`, which a product with float16 refuses, gets one dimension more there."""
    graph, first = entry.graph, group[0]
    gelu, tensor = None, _type("Tensor")
    if packed.half:
        matrix = _attribute(entry, name, packed.weight, _type(torch_internals.HALF), first.node)
        product = _half_product(graph, first, matrix, of_vectors)
    else:
        matrix = _attribute(entry, name, packed.weight, tensor, first.node)
        bias = first.bias if packed.bias is None else _attribute(entry, f"{name}_bias", packed.bias, tensor, first.node)
        gelu = _gelu(first) if len(group) == 1 else None
        applied = ("none", "") if gelu is None else ("gelu", gelu.inputsAt(1).toIValue())
        activation, algorithm = (insert_constant(graph, value, first.node) for value in applied)
        none_of_them = _typed(insert_node(graph, "prim::ListConstruct", [], first.node), _type("Scalar?[]"))
        inputs = [first.rows, matrix, bias, activation, none_of_them, algorithm]
        product = insert_node(graph, torch_internals.PRODUCT, inputs, first.node).output()
    if len(group) > 1:
        _share(graph, group, product)
        return
    if gelu is not None:
        replace_value(gelu, first.node.output())
    replace_value(first.node, _typed(product.node(), first.node.output().type()))


def _half_product(graph: Graph, layer: _Layer, matrix: Value, of_vectors: bool) -> Value:
    def insert(kind: str, *inputs: Value) -> Value:
        return insert_node(graph, kind, inputs, layer.node).output()

    if not of_vectors:
        return insert(torch_internals.HALF_PRODUCT, layer.rows, matrix)
    first = insert_constant(graph, 0, layer.node)
    rows = insert("aten::unsqueeze", layer.rows, first)
    return insert("aten::squeeze", insert(torch_internals.HALF_PRODUCT, rows, matrix), first)


def _matrices(graph: Graph) -> Set[str]:
    """Return values that certainly have two dimensions or more: what was embedded, and what keeps its dimensions."""
    found: Set[str] = set()
    for node in devices.nodes(graph):
        inputs = list(node.inputs())
        if node.kind() in ("aten::view", "aten::reshape"):
            sizes = inputs[1].node()
            has = sizes.kind() == "prim::ListConstruct" and len(list(sizes.inputs())) > 1
        elif _KEEPS_DIMENSIONS.fullmatch(node.kind()):
            has = any(value.debugName() in found for value in inputs)
        else:
            has = node.kind() in ("aten::embedding", "aten::unsqueeze")
        if has:
            found.update(value.debugName() for value in node.outputs())
    return found


def _attribute(entry: Traced, name: str, packed: object, type: ValueType, before: Node) -> Value:
    """Add a packed weight or a bias to the module, and return it as a value of its graph."""
    torch_internals.register(entry, name, packed, type)
    read = insert_node(entry.graph, "prim::GetAttr", [next(iter(entry.graph.inputs()))], before)
    read.s_("name", name)
    return _typed(read, type)


def _share(graph: Graph, group: Sequence[_Layer], product: Value) -> None:
    """Make readers of one of several layers read its part of their product."""
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
    """Return the activation if it is the only reader of the layer's output."""
    readers = [use.user for use in layer.node.output().uses()]
    return readers[0] if [node.kind() for node in readers] == ["aten::gelu"] else None


def _allow_slices(graph: Graph) -> None:
    """Allow non-contiguous rows to be reshaped."""
    for node in list(graph.findAllNodes("aten::view", True)):
        if node.inputsAt(1).type().kind() != "ListType":  # reinterprets the bytes as another dtype
            continue
        made = insert_node(graph, "aten::reshape", list(node.inputs()), node)
        replace_value(node, _typed(made, node.output().type()))
