"""A traced graph that computes less: nothing for padding, and of the last layer nothing that nobody reads.

Texts that run together are padded to the longest. Most of a transformer takes each token by itself and needs no padding:
there all tokens of a batch lie end to end, packed as (1, tokens, features), and attention alone sees rows, (batch, length,
features). And of the last layer a classifier may read each row's first place alone; of the others it needs no more than the
keys and values that the first one attends to.

Which values are rows is seen by running the graph at two shapes. What the rewritten graph gives is compared with what it
gave before; what is not understood stays as it is.

oneDNN prepares a product for each number of rows, which takes it half a millisecond, and keeps few of what it prepared. So
the tokens of a run are filled up to a multiple of a number, with copies that nobody reads, unless the model is so large
that they would take longer than the preparing; and what has a row for each text is filled up to a multiple of 16 rows.
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

_STEPS = (16, 8)  # with smaller ones there are more numbers of rows than are kept
_MOST_FILLED = 1.5e9  # a step, times the bytes of what each token is multiplied with
_TOLERANCE = {"float32": 1e-4}  # of the largest value
_MISTAKEN = 0.1  # in other dtypes: how precise they are is the gate's to say


class Unpadded(NamedTuple):
    """A module whose graph was rewritten, and to a multiple of what number it fills up the tokens of a run."""

    module: Traced
    filled: int


def unpadded(
    file: Path, inputs: Sequence[str], examples: Sequence[Example], dtype: str, reads_first: bool
) -> Optional[Unpadded]:
    """The module of `file`, which has one graph, rewritten; None where nothing is gained or it gives something else.

    `examples` are its inputs: two in `axes.SHAPES`, and others, all with padding. `reads_first`: whether a row's first place is
    never padding.
    """
    if "attention_mask" not in inputs or not torch_internals.unpads():
        return None
    module = graphs.load(file)
    graph = module.graph
    inline(graph)
    torch_internals.remove_mutation(graph)
    _open_tuples(graph)
    _drop_dropout(graph)
    merge_equal(graph)
    column = inputs.index("attention_mask")
    filled = _filled(module)
    with torch.no_grad():
        try:
            dims = axes.read(module, graph, examples[: len(axes.SHAPES)])
            if not Rewriting(graph, dims, list(graph.inputs())[1 + column], filled).run(reads_first):
                return None
            traced = graphs.load(file)
            limit = _TOLERANCE.get(dtype, _MISTAKEN)
            same = all(_same(module(*example), traced(*example), example[column], limit) for example in examples)
        except RuntimeError:
            return None
    return Unpadded(module, filled) if same else None


def _filled(module: Traced) -> int:
    """As many tokens as cost little beside preparing a run.

    Measured on one core of an AVX-512 processor (tests/benchmarks/preparing.py): a run is prepared in 2 ms, and a token takes
    2.2 ms for each gigabyte of weights, in bfloat16 and float32; half a step is filled up in the mean.
    """
    weights = [layer.weight for layer in packing.layers(module)]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return next((step for step in _STEPS if step * size <= _MOST_FILLED), 1)


def _same(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], mask: torch.Tensor, tolerance: float) -> bool:
    """Whether outputs are the same, of each token or of each row; what is given for padding is no matter."""
    for one, other in zip(got, expected):
        if one.shape != other.shape:
            return False
        if other.shape[:2] == mask.shape:
            one, other = one[mask.bool()], other[mask.bool()]
        if not float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max())):
            return False
    return True


def _open_tuples(graph: Graph) -> None:
    """Read the values themselves where they are put together, as between a layer and its hooks."""
    for node in graph.findAllNodes("prim::TupleUnpack", False):
        made = node.inputsAt(0).node()
        if made.kind() == "prim::TupleConstruct":
            for output, value in zip(list(node.outputs()), list(made.inputs())):
                output.replaceAllUsesWith(value)
            node.destroy()


def _drop_dropout(graph: Graph) -> None:
    """Take out what does nothing after training, each a call of its own."""
    for node in graph.findAllNodes("aten::dropout", False):
        if node.inputsAt(2).toIValue() is False:
            graphs.replace(node, node.inputsAt(0))
