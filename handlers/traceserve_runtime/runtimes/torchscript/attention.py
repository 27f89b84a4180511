"""Computes a bfloat16 graph's attention in float32 where torch is faster at it.

On x86 without AMX torch multiplies an attention's small matrices faster in float32, including casts: full batches of
MiniLM take 0.91 of the whole model's time, a single text as long as before (`tests/benchmarks/packing.py --what
attention`).
"""

from __future__ import annotations

from typing import Dict

from traceserve_runtime import processor
from traceserve_runtime.runtimes import torch_internals
from traceserve_runtime.runtimes.graph import ATTENTION, Graph, Traced, Value, insert_graph, insert_node, replace_value
from traceserve_runtime.runtimes.torchscript import devices

_MASK, _MASK_TYPES = 3, ("NoneType", "Tensor")
_FLOAT32 = """graph(%tensor : Tensor):
  %dtype : int = prim::Constant[value=6]()
  %no : bool = prim::Constant[value=0]()
  %none : NoneType = prim::Constant()
  %float : Tensor = aten::to(%tensor, %dtype, %no, %no, %none)
  return (%float)"""
_LIKE = """graph(%tensor : Tensor, %other : Tensor):
  %like : Tensor = aten::type_as(%tensor, %other)
  return (%like)"""
# The term added to the scores. A boolean mask becomes its logarithm, 0 for visible positions and -inf elsewhere, as
# in torch itself.
_ADDED = """graph(%mask : Tensor):
  %dtype : int = prim::dtype(%mask)
  %bool : int = prim::Constant[value=11]()
  %true : bool = aten::eq(%dtype, %bool)
  %float : int = prim::Constant[value=6]()
  %no : bool = prim::Constant[value=0]()
  %none : NoneType = prim::Constant()
  %cast : Tensor = aten::to(%mask, %float, %no, %no, %none)
  %added : Tensor = prim::If(%true)
    block0():
      %logarithm : Tensor = aten::log(%cast)
      -> (%logarithm)
    block1():
      -> (%cast)
  return (%added)"""


def sooner_wide() -> bool:
    """Return whether attention is faster in float32 on this processor."""
    return processor.is_x86() and "amx_bf16" not in processor.features()


def widen(module: Traced) -> int:
    """Rewrite a module's graphs on the CPU, before its first run; returns the number of attentions now in float32.

    0 if this torch cannot rewrite graphs.
    """
    return sum(_widen(graph) for graph in devices.graphs(module)) if torch_internals.rewrites() else 0


def _widen(graph: Graph) -> int:
    torch_internals.inline(graph)
    found = [node for node in graph.findAllNodes(ATTENTION, True) if str(node.inputsAt(_MASK).type()) in _MASK_TYPES]
    if not found:
        return 0
    float32, like, to_be_added = map(torch_internals.parse, (_FLOAT32, _LIKE, _ADDED))
    outside = {node.output().debugName() for node in graph.findAllNodes(ATTENTION, False)}
    masks: Dict[str, Value] = {}  # as added to scores; most layers read the same one
    for node in found:
        query, key, value, mask, *others = node.inputs()
        added = masks.get(mask.debugName())
        if added is None:
            added = insert_graph(graph, to_be_added, [mask], node) if str(mask.type()) == "Tensor" else mask
            if node.output().debugName() in outside:  # a branch's values are unknown after it
                masks[mask.debugName()] = added
        wide = [insert_graph(graph, float32, [each], node) for each in (query, key, value)]
        attended = insert_node(graph, ATTENTION, [*wide, added, *others], node)
        replace_value(node, insert_graph(graph, like, [attended.output(), query], node))
    return len(found)
