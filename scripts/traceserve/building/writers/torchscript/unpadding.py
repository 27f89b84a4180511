"""Rewrites a traced graph to compute less: nothing for padding, and nothing unneeded in the last layer.

Texts that run together are padded to the longest. Most of a transformer works on each token separately and needs no
padding: there a batch's tokens are unpadded, as (1, tokens, features), and only attention sees rows, (batch, length,
features). And in the last layer a classifier may only read each row's first position; of the others it only needs the
keys and values that the first one attends to.

Running the graph at two shapes shows which values are rows. The rewritten graph's outputs are compared with the
original's; unknown operators are left unchanged.

oneDNN prepares a product for each number of rows, which takes half a millisecond, and caches few of them. So
a run's tokens are rounded up to a multiple, with copies that nobody reads, unless they would take longer than the
preparation: where the model is large, or oneDNN multiplies few of its weights. Values with a row per text are rounded up to
a multiple of 16 rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional, Sequence

import torch
from traceserve_runtime.runtimes import graph as graphs
from traceserve_runtime.runtimes.graph import Graph, Traced
from traceserve_runtime.runtimes.torch_internals import inline, merge_equal
from traceserve_runtime.runtimes.torchscript import packing

from traceserve.building.writers.torchscript import axes
from traceserve.building.writers.torchscript.axes import Example
from traceserve.building.writers.torchscript.rewriting import Rewriting
from traceserve.building.writers.tracing import torch_internals

_STEPS = (16, 8)  # smaller ones give more numbers of rows than are cached
_MOST_FILLED = 1.5e9  # a step, times the bytes multiplied per token
_TOLERANCE = {"float32": 1e-4}  # of the largest value
_MISTAKEN = 0.1  # in other dtypes: the gate judges their precision


class Unpadded(NamedTuple):
    """A module with a rewritten graph, and the multiple to which it rounds up a run's tokens."""

    module: Traced
    filled: int


def unpadded(
    file: Path, inputs: Sequence[str], examples: Sequence[Example], dtype: str, reads_first: bool
) -> Optional[Unpadded]:
    """Return the module of `file`, which has one graph, rewritten; None if that gains nothing or changes outputs.

    `examples` are its inputs: two in `axes.SHAPES`, and others, all with padding. `reads_first`: whether a row's first
    position is never padding.
    """
    if "attention_mask" not in inputs or not torch_internals.unpads():
        return None
    module = graphs.load_module(file)
    graph = module.graph
    inline(graph)
    torch_internals.remove_mutation(graph)
    graphs.open_tuples(graph)
    _drop_dropout(graph)
    merge_equal(graph)
    column = inputs.index("attention_mask")
    filled = _filled(module)
    with torch.no_grad():
        try:
            dims = axes.read_axes(module, graph, examples[: len(axes.SHAPES)])
            if not Rewriting(graph, dims, list(graph.inputs())[1 + column], filled).run(reads_first):
                return None
            traced = graphs.load_module(file)
            limit = _TOLERANCE.get(dtype, _MISTAKEN)
            same = all(_same(module(*example), traced(*example), example[column], limit) for example in examples)
        except RuntimeError:
            return None
    return Unpadded(module, filled) if same else None


def _filled(module: Traced) -> int:
    """Return the number of tokens that cost little compared with preparing a run.

    Measured on one core of an AVX-512 processor (tests/benchmarks/preparing.py): preparing a run takes 2 ms, and a token
    2.2 ms per gigabyte of weights, in bfloat16 and float32; rounding up adds half a step on average. FBGEMM, which
    multiplies weights of half precision, prepares nothing.
    """
    layers = list(packing.layers(module))
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    halves = sum(map(packing.in_half, layers)) if packing.packs_in_half() else 0
    most = _MOST_FILLED * (1 - halves / max(1, len(layers)))
    return next((step for step in _STEPS if step * size <= most), 1)


def _same(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], mask: torch.Tensor, tolerance: float) -> bool:
    """Return whether outputs are equal, per token or per row; outputs for padding do not matter."""
    for one, other in zip(got, expected):
        if one.shape != other.shape:
            return False
        if other.shape[:2] == mask.shape:
            one, other = one[mask.bool()], other[mask.bool()]
        if not float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max())):
            return False
    return True


def _drop_dropout(graph: Graph) -> None:
    """Remove dropout, which has no effect after training, but costs a call each."""
    for node in graph.findAllNodes("aten::dropout", False):
        if node.inputsAt(2).toIValue() is False:
            graphs.replace_value(node, node.inputsAt(0))
