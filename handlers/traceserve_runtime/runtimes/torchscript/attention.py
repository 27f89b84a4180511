"""The attention of a graph in bfloat16, computed in float32 where torch does that sooner.

On x86 without AMX torch multiplies an attention's small matrices faster in float32, casts included: full batches of MiniLM take
0.91 of the time for all of the model, a single text as long as before (`tests/benchmarks/packing.py --what attention`).
"""

from __future__ import annotations

from typing import Any, Dict

from traceserve_runtime import processor
from traceserve_runtime.runtimes.torchscript import devices

_KIND = "aten::scaled_dot_product_attention"
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
# What is added to the scores. A mask of truths becomes its logarithm, 0 where there is something to see and -inf elsewhere, as
# torch itself makes it.
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
    """Whether attention is computed sooner in float32 on this processor."""
    return processor.is_x86() and "amx_bf16" not in processor.features()


def widen(module: Any) -> int:
    """Rewrite the graphs of a module on the CPU, before its first run; gives how many attentions are in float32 now."""
    return sum(_widen(graph) for graph in devices.graphs(module))


def _widen(graph: Any) -> int:
    import torch

    torch._C._jit_pass_inline(graph)
    found = [node for node in graph.findAllNodes(_KIND, True) if str(node.inputsAt(_MASK).type()) in _MASK_TYPES]
    if not found:
        return 0
    float32, like, to_be_added = map(torch._C.parse_ir, (_FLOAT32, _LIKE, _ADDED))

    def insert(part: Any, *values: Any) -> Any:
        """What another graph gives for these values, before `node`."""
        with graph.insert_point_guard(node):
            [result] = graph.insertGraph(part, list(values))
        return result

    outside = {node.output().debugName() for node in graph.findAllNodes(_KIND, False)}
    masks: Dict[str, Any] = {}  # as they are added to scores; most layers read the same one
    for node in found:
        query, key, value, mask, *others = node.inputs()
        added = masks.get(mask.debugName())
        if added is None:
            added = insert(to_be_added, mask) if str(mask.type()) == "Tensor" else mask
            if node.output().debugName() in outside:  # what is made in a branch is not known behind it
                masks[mask.debugName()] = added
        attended = graph.create(_KIND, [*(insert(float32, each) for each in (query, key, value)), added, *others], 1)
        attended.insertBefore(node)
        attended.output().setType(torch._C.TensorType.get())
        node.output().replaceAllUsesWith(insert(like, attended.output(), query))
        node.destroy()
    return len(found)
