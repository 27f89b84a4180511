"""Which axes of a graph's values are as long as the batch and as its rows, seen by running it at two shapes."""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence, Tuple

import torch
from traceserve_runtime.runtimes.graph import Graph, Traced, Value
from traceserve_runtime.runtimes.torch_internals import type_named

from traceserve.building.writers.tracing import torch_internals

Example = Tuple[torch.Tensor, ...]

SHAPES = ((3, 11), (2, 7))  # (batch, length) of the examples: no other size of a model changes as these do


class Dims:
    """Which axes of a value are as long as the batch and as the rows; `others` depend on these in another way."""

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
    def places(self) -> Optional[int]:
        """The axis of the rows' places, where it is one."""
        return self.length[0] if len(self.length) == 1 and not self.others else None


def read(module: Traced, graph: Graph, examples: Sequence[Example]) -> Dict[str, Dims]:
    """Of every one of `tensors(graph)`, by name; one whose axes are not as many in each example is left out."""
    sizes = zip(*(sizes_of(module, graph, example) for example in examples))
    names = [value.debugName() for value in tensors(graph)]
    return {name: Dims(*each) for name, each in zip(names, sizes) if len(set(map(len, each))) == 1}


def sizes_of(module: Traced, graph: Graph, example: Example) -> List[torch.Size]:
    """The shapes of `tensors(graph)` as the graph runs; the module's own goes on unrun."""
    seen = graph.copy()
    together = seen.create("prim::ListConstruct", tensors(seen), 1)
    together.output().setType(type_named("Tensor[]"))
    seen.appendNode(together)
    while list(seen.outputs()):
        seen.eraseOutput(0)
    seen.registerOutput(together.output())
    return [tensor.shape for tensor in torch_internals.run(seen, module, example)]


def tensors(graph: Graph) -> List[Value]:
    """Every tensor that a graph reads or makes, those in branches and loops aside."""
    values = [*graph.inputs(), *(value for node in graph.nodes() for value in node.outputs())]
    return [value for value in values if str(value.type()) == "Tensor"]


UNKNOWN = Dims((), ())
UNKNOWN.others = True
