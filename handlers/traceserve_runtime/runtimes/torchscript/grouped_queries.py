"""Lets groups of queries attend to their common keys and values, in place of a copy of them for each query.

Models with fewer keys and values than queries (Llama, Qwen, Mistral, Gemma) repeat them before attention, and so does
their trace: in a step of 16 rows these copies take longer than anything but the products with weights. torch's
attention on a CPU reads a group's keys and values where they are, with results equal bit for bit.

It reads them once for each query, and works on one query at a time. In a step every query has one position: there a group
is as well one query with as many positions, which takes less time in float32, with results equal up to rounding.
"""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence

from traceserve_runtime.runtimes import torch_internals
from traceserve_runtime.runtimes.graph import (
    ATTENTION,
    Graph,
    Node,
    Traced,
    Value,
    insert_constant,
    insert_graph,
    insert_node,
    replace_value,
)
from traceserve_runtime.runtimes.torchscript import devices

_REPEATED_AXIS = 2  # of (batch, heads, times, length, size), which `expand` makes, and `reshape` merges with the heads
_END = 2**63 - 1  # of a slice without one
_MERGING = ("aten::reshape", "aten::view")
# How many of a group's queries become positions of one, less one: `others`, or none with more positions, or a mask for each head.
_OTHERS = """graph(%query : Tensor, %others : int):
  %one : int = prim::Constant[value=1]()
  %axis : int = prim::Constant[value=2]()
  %positions : int = aten::size(%query, %axis)
  %single : bool = aten::eq(%positions, %one)
  %times : int = aten::Int(%single)
  %result : int = aten::mul(%others, %times)
  return (%result)"""
_OTHERS_MASKED = """graph(%others : int, %mask : Tensor):
  %one : int = prim::Constant[value=1]()
  %four : int = prim::Constant[value=4]()
  %dimensions : int = aten::dim(%mask)
  %known : bool = aten::eq(%dimensions, %four)
  %heads : int = aten::size(%mask, %one)
  %common : bool = aten::eq(%heads, %one)
  %both : bool = aten::__and__(%known, %common)
  %times : int = aten::Int(%both)
  %result : int = aten::mul(%others, %times)
  return (%result)"""
_AS_POSITIONS = """graph(%query : Tensor, %others : int):
  %first : int = prim::Constant[value=0]()
  %one : int = prim::Constant[value=1]()
  %axis : int = prim::Constant[value=2]()
  %last : int = prim::Constant[value=3]()
  %times : int = aten::add(%others, %one)
  %batch : int = aten::size(%query, %first)
  %heads : int = aten::size(%query, %one)
  %positions : int = aten::size(%query, %axis)
  %size : int = aten::size(%query, %last)
  %fewer : int = aten::floordiv(%heads, %times)
  %more : int = aten::mul(%positions, %times)
  %sizes : int[] = prim::ListConstruct(%batch, %fewer, %more, %size)
  %result : Tensor = aten::reshape(%query, %sizes)
  return (%result)"""
_AS_HEADS = """graph(%attended : Tensor, %query : Tensor):
  %first : int = prim::Constant[value=0]()
  %one : int = prim::Constant[value=1]()
  %axis : int = prim::Constant[value=2]()
  %last : int = prim::Constant[value=3]()
  %batch : int = aten::size(%query, %first)
  %heads : int = aten::size(%query, %one)
  %positions : int = aten::size(%query, %axis)
  %size : int = aten::size(%attended, %last)
  %sizes : int[] = prim::ListConstruct(%batch, %heads, %positions, %size)
  %result : Tensor = aten::reshape(%attended, %sizes)
  return (%result)"""


class _Repeated(NamedTuple):
    """`copies` of keys or values, (batch, heads, length, size), of which each head is repeated several `times`, and their
    casts, the last one first."""

    own: Value
    times: int
    copies: Value
    casts: Sequence[Node]


def group(module: Traced) -> int:
    """Rewrite a module's graphs on the CPU, before its first run; returns the number of attentions with groups.

    0 if this torch's attention would make the copies itself, or cannot rewrite graphs.
    """
    if not torch_internals.attends_in_groups():
        return 0
    return sum(_group(graph) for graph in devices.graphs(module))


def _group(graph: Graph) -> int:
    torch_internals.inline(graph)
    torch_internals.merge_equal(graph)
    shared = sum(_share(graph, node) for node in graph.findAllNodes(ATTENTION, True))
    if shared:  # the copies are unread; `growing` counts what reads a cache
        torch_internals.remove_unread(graph)
    return shared


def _share(graph: Graph, node: Node) -> bool:
    """Replace an attention to repeated keys and values by one with groups of queries."""
    names = [argument.name for argument in devices.arguments(node.schema())]
    query, key, value, mask, *_ = inputs = list(node.inputs())
    keys, values = _repeated(key), _repeated(value)
    if "enable_gqa" not in names or keys is None or values is None or keys.times != values.times:
        return False
    inputs[1:3] = (_cast_alike(graph, each, node) for each in (keys, values))
    inputs[names.index("enable_gqa")] = insert_constant(graph, True, node)
    others = None
    if inputs[names.index("is_causal")].toIValue() is False and str(mask.type()) in ("NoneType", "Tensor"):
        others = _others(graph, query, mask, keys.times - 1, before=node)
        inputs[0] = insert_graph(graph, torch_internals.parse(_AS_POSITIONS), [query, others], node)
    attended = insert_node(graph, ATTENTION, inputs, node).output()
    if others is not None:
        attended = insert_graph(graph, torch_internals.parse(_AS_HEADS), [attended, query], node)
    replace_value(node, attended)
    for each in (keys, values):
        _measure_instead(each.copies, each.own)
    return True


def _others(graph: Graph, query: Value, mask: Value, most: int, before: Node) -> Value:
    """Return how many of a group's further queries, of `most`, a run takes as positions of its first one."""
    others = insert_graph(graph, torch_internals.parse(_OTHERS), [query, insert_constant(graph, most, before)], before)
    if str(mask.type()) == "NoneType":
        return others
    return insert_graph(graph, torch_internals.parse(_OTHERS_MASKED), [others, mask], before)


def _cast_alike(graph: Graph, repeated: _Repeated, before: Node) -> Value:
    """Return a repetition's own value with the casts of the repetition."""
    value = repeated.own
    for cast in reversed(repeated.casts):
        value = insert_node(graph, cast.kind(), [value, *list(cast.inputs())[1:]], before).output()
    return value


def _repeated(value: Value) -> Optional[_Repeated]:
    """Return of what a value is a repetition; None if it is none."""
    casts = []
    while value.node().kind() == "aten::to":
        casts.append(value.node())
        value = value.node().inputsAt(0)
    merged = value.node()
    if merged.kind() not in _MERGING or merged.inputsAt(0).node().kind() != "aten::expand":
        return None
    expanded = merged.inputsAt(0).node()
    sizes, expanded_sizes = _items(merged.inputsAt(1)), _items(expanded.inputsAt(1))
    if len(sizes) != 4 or len(expanded_sizes) != 5:
        return None
    times = expanded_sizes.pop(2)
    # Equal expressions are merged before, and have one name.
    if any(sizes[axis].debugName() != expanded_sizes[axis].debugName() for axis in (0, 2, 3)):
        return None
    own = _before_unsqueeze(expanded.inputsAt(0))
    count = times.toIValue()
    return _Repeated(own, count, value, casts) if own is not None and isinstance(count, int) and count > 1 else None


def _before_unsqueeze(value: Value) -> Optional[Value]:
    """Return the value that gets an axis of repetitions, seen through slices of everything."""
    added = False
    while True:
        node = value.node()
        if node.kind() == "aten::unsqueeze" and not added and node.inputsAt(1).toIValue() == _REPEATED_AXIS:
            added = True
        elif node.kind() != "aten::slice" or not _is_whole(node):
            return value if added else None
        value = node.inputsAt(0)


def _is_whole(node: Node) -> bool:
    """Return whether a slice has every position."""
    bounds = list(node.inputs())[2:]
    if any(bound.node().kind() != "prim::Constant" for bound in bounds):
        return False
    start, end, step = (bound.toIValue() for bound in bounds)
    return not start and end in (None, _END) and step == 1


def _items(sizes: Value) -> List[Value]:
    return list(sizes.node().inputs()) if sizes.node().kind() == "prim::ListConstruct" else []


def _measure_instead(copied: Value, own: Value) -> None:
    """Read the sizes that a repetition has in common with its original from this one."""
    for use in copied.uses():
        measured = use.user.kind() == "aten::size" and use.user.inputsSize() == 2
        if measured and use.user.inputsAt(1).toIValue() in (0, 2, 3, -1, -2, -4):
            use.user.replaceInput(0, own)
