"""Finds the axes of a graph's values that have the batch's and the rows' length, by running it at two shapes."""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence, Tuple

import torch
from traceserve_runtime.runtimes.graph import Graph, Traced, Value
from traceserve_runtime.runtimes.torch_internals import type_named

from traceserve.building.writers.tracing import torch_internals

Example = Tuple[torch.Tensor, ...]

SHAPES = ((3, 11), (2, 7))  # (batch, length) of the examples: no other size in a model changes with these


class Dims:
    """The axes of a value that have the batch's and the rows' length; `others` depend on them in another way."""

    def __init__(self, *sizes: Sequence[int]) -> None:
        self.count = len(sizes[0])
        changing = [(axis, each) for axis, each in enumerate(zip(*sizes)) if len(set(each)) > 1]
        batches, lengths = zip(*SHAPES)
        self.batch = [axis for axis, each in changing if each == batches]
        self.length = [axis for axis, each in changing if each == lengths]
        self.others = len(changing) > len(self.batch) + len(self.length)

    @property
    def rows(self) -> bool:
        """Whether it is (batch, length, features)."""
        return self.count == 3 and self.batch == [0] and self.length == [1] and not self.others

    @property
    def fixed(self) -> bool:
        """Whether it is the same for every batch."""
        return not (self.batch or self.length or self.others)

    @property
    def positions(self) -> Optional[int]:
        """The axis of the rows' positions, if there is one."""
        return self.length[0] if len(self.length) == 1 and not self.others else None


def read_axes(module: Traced, graph: Graph, examples: Sequence[Example]) -> Dict[str, Dims]:
    """Return them for every value of `tensors(graph)`, by name, except values whose number of axes varies."""
    sizes = zip(*(sizes_of(module, graph, example) for example in examples))
    names = [value.debugName() for value in tensors(graph)]
    return {name: Dims(*each) for name, each in zip(names, sizes) if len(set(map(len, each))) == 1}


def sizes_of(module: Traced, graph: Graph, example: Example) -> List[torch.Size]:
    """Return the shapes of `tensors(graph)` as the graph runs; the module's own graph stays unrun."""
    seen = graph.copy()
    together = seen.create("prim::ListConstruct", tensors(seen), 1)
    together.output().setType(type_named("Tensor[]"))
    seen.appendNode(together)
    while list(seen.outputs()):
        seen.eraseOutput(0)
    seen.registerOutput(together.output())
    return [tensor.shape for tensor in torch_internals.run(seen, module, example)]


def tensors(graph: Graph) -> List[Value]:
    """Return every tensor that a graph reads or makes, except in branches and loops."""
    values = [*graph.inputs(), *(value for node in graph.nodes() for value in node.outputs())]
    return [value for value in values if str(value.type()) == "Tensor"]


UNKNOWN = Dims((), ())
UNKNOWN.others = True
