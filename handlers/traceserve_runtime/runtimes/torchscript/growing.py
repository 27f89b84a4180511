"""Rewrites a step's graph to write new keys and values behind the earlier ones, in place of a copy of all of them.

A traced step concatenates its cache with the new positions, which reads and writes the whole cache for every token:
with rows that are long, or many, this takes as long as the products with weights. The rewritten one wants room behind
its cache, which `states.InPlace` provides. Where attention casts the cache to half precision, it is kept so: a step casts
only its own positions, and reads half the memory. Where it is cast back, as `attention.widen` does, that is done in each
step, which takes less time than reading twice the memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterator, List, Optional, Sequence, Tuple

from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes import torch_internals
from traceserve_runtime.runtimes.caches import FIXED_STATES
from traceserve_runtime.runtimes.graph import (
    Graph,
    Node,
    Traced,
    Value,
    insert_constant,
    insert_graph,
    insert_node,
    open_tuples,
    replace_value,
)

if TYPE_CHECKING:
    import torch

# The dtype in which each tensor of a cache is kept; None for its own.
Kept = Tuple[Optional["torch.dtype"], ...]

AXIS = 2  # of positions, in (batch, heads, positions, size)
# Dtypes by their numbers in a graph.
_HALVES = {5: "float16", 15: "bfloat16"}
_FLOAT32 = 6
# `past` is a part of a tensor with room behind it.
_WRITTEN_BEHIND = """graph(%past : Tensor, %new : Tensor):
  %none : NoneType = prim::Constant()
  %no : bool = prim::Constant[value=0]()
  %first : int = prim::Constant[value=0]()
  %second : int = prim::Constant[value=1]()
  %axis : int = prim::Constant[value=2]()
  %last : int = prim::Constant[value=3]()
  %batch : int = aten::size(%past, %first)
  %heads : int = aten::size(%past, %second)
  %used : int = aten::size(%past, %axis)
  %size : int = aten::size(%past, %last)
  %more : int = aten::size(%new, %axis)
  %length : int = aten::add(%used, %more)
  %sizes : int[] = prim::ListConstruct(%batch, %heads, %length, %size)
  %strides : int[] = aten::stride(%past)
  %whole : Tensor = aten::as_strided(%past, %sizes, %strides, %none)
  %behind : Tensor = aten::narrow(%whole, %axis, %used, %more)
  %written : Tensor = aten::copy_(%behind, %new, %no)
  return (%whole)"""


def write_behind(module: Traced, manifest: Manifest) -> Optional[Kept]:
    """Rewrite a loop's step on the CPU, before its first run; returns how its cache is to be kept, with room.

    States of a fixed size stay as they are. None, and no change, for a model that runs once, if a grown tensor is anything
    else than its input with new positions behind, or this torch cannot rewrite graphs. Packing comes first: it leaves
    layers alone if a graph reads memory by its strides.
    """
    step: Optional[Traced] = getattr(module, "step", None)
    if step is None or not torch_internals.rewrites():
        return None
    graph = step.graph
    torch_internals.inline(graph)
    open_tuples(graph)
    results = _results(graph)[len(manifest.outputs) :]
    results = results[: len(results) - manifest.runtime.get(FIXED_STATES, 0)]
    past = list(graph.inputs())[1 + len(manifest.step_inputs) :][: len(results)]
    pairs = [(own, result, _added(own, result)) for own, result in zip(past, results)]
    distinct = len({result.debugName() for result in results}) == len(results)
    if not pairs or len(past) < len(results) or not distinct or any(new is None for _, _, new in pairs):
        return None
    written = torch_internals.parse(_WRITTEN_BEHIND)
    return tuple(_write(graph, written, own, result, new) for own, result, new in pairs if new is not None)


def _write(graph: Graph, written: Graph, past: Value, result: Value, new: Value) -> Optional[torch.dtype]:
    """Replace a concatenation of a cache's tensor and new positions; returns the dtype of the tensor if it changes."""
    import torch

    node, casts = result.node(), _halving(list(_casts(result)))
    dtype = getattr(torch, _HALVES[_dtype(casts[-1])]) if casts else None
    for cast in casts:  # their constants may be made after this node
        options = [insert_constant(graph, value.toIValue(), node) for value in list(cast.inputs())[1:]]
        new = insert_node(graph, cast.kind(), [new, *options], node).output()
    whole = insert_graph(graph, written, [past, new], node)
    for cast in reversed(casts):
        replace_value(cast, whole)
    replace_value(node, whole)
    return dtype


def _results(graph: Graph) -> List[Value]:
    """Return a graph's results: of the tuple that it returns, or each by itself."""
    returned = list(graph.outputs())
    if len(returned) == 1 and returned[0].node().kind() == "prim::TupleConstruct":
        return list(returned[0].node().inputs())
    return returned


def _added(past: Value, result: Value) -> Optional[Value]:
    """Return what a result has behind `past`; None if it is something else."""
    node = result.node()
    if node.kind() != "aten::cat" or node.inputsAt(1).toIValue() not in (AXIS, AXIS - 4):
        return None
    parts = list(node.inputsAt(0).node().inputs())
    return parts[1] if len(parts) == 2 and parts[0].debugName() == past.debugName() else None


def _dtype(cast: Node) -> int:
    number: int = cast.inputsAt(1).toIValue()
    return number


def _halving(casts: Sequence[Node]) -> Sequence[Node]:
    """Return the casts up to the first one to half precision; none if there is none."""
    return casts[: next((i for i, cast in enumerate(casts, 1) if _dtype(cast) in _HALVES), 0)]


def _casts(value: Value) -> Iterator[Node]:
    """Yield the casts, one after another, through which alone a value's content is read."""
    while True:
        users = [use.user for use in value.uses()]
        readers = [user for user in users if user.kind() not in ("aten::size", "prim::TupleConstruct")]
        if len(readers) != 1 or readers[0].kind() != "aten::to" or readers[0].inputsSize() != 5:
            return
        if _dtype(readers[0]) not in (_FLOAT32, *_HALVES):
            return
        yield readers[0]
        value = readers[0].output()
