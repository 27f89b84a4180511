"""Types of the parts of a TorchScript graph that are read and rewritten here.

torch's are undocumented C++ classes, whose members are as unstable as its private names.
So these types list the needed members, and `torch_internals.rewrites` checks for each of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ContextManager, Dict, Iterator, List, Optional, Protocol, Sequence, Tuple

from traceserve_runtime.errors import InvalidManifest, reason

if TYPE_CHECKING:
    import torch


ATTENTION = "aten::scaled_dot_product_attention"
_IN_PLACE = re.compile(r"aten::(\w*[^_]_|__i\w+__)")


class ValueType(Protocol):
    """The type of a value; as text "Tensor", "int[]" or the like."""

    def kind(self) -> str: ...


class Use(Protocol):
    """One use of a value: by which node, and as which input."""

    user: Node
    offset: int


class Value(Protocol):
    """An output of a node, or an input of the graph."""

    def debugName(self) -> str: ...

    def type(self) -> ValueType: ...

    def setType(self, type: ValueType) -> object: ...

    def node(self) -> Node: ...

    def uses(self) -> List[Use]: ...

    def replaceAllUsesWith(self, value: Value) -> None: ...

    def toIValue(self) -> Any:
        """Return a constant's Python value; None for computed ones."""


class Block(Protocol):
    """Nodes in order, such as the body of a graph, a branch or a loop."""

    def nodes(self) -> Iterator[Node]: ...

    def inputs(self) -> Iterator[Value]: ...

    def outputs(self) -> Iterator[Value]: ...


class Node(Protocol):
    """One operator: its inputs and outputs, and a constant's value."""

    def kind(self) -> str: ...

    def schema(self) -> str: ...

    def inputs(self) -> Iterator[Value]: ...

    def inputsAt(self, index: int) -> Value: ...

    def inputsSize(self) -> int: ...

    def outputs(self) -> Iterator[Value]: ...

    def output(self) -> Value: ...

    def blocks(self) -> Sequence[Block]: ...

    def replaceInput(self, index: int, value: Value) -> object: ...

    def insertBefore(self, node: Node) -> object: ...

    def destroy(self) -> None: ...

    def s(self, name: str) -> str: ...

    def s_(self, name: str, value: str) -> object: ...

    def t(self, name: str) -> torch.Tensor: ...

    def t_(self, name: str, value: torch.Tensor) -> object: ...


class Graph(Block, Protocol):
    """A module's computation; `findAllNodes(kind, recurse)` searches branches and loops if it recurses."""

    def findAllNodes(self, kind: str, recurse: bool) -> List[Node]: ...

    def create(self, kind: str, inputs: List[Value], outputs: int) -> Node: ...

    def insertConstant(self, value: object) -> Value: ...

    def insertGraph(self, graph: Graph, values: List[Value]) -> List[Value]: ...

    def insert_point_guard(self, node: Node) -> ContextManager[object]: ...

    def appendNode(self, node: Node) -> object: ...

    def registerOutput(self, value: Value) -> object: ...

    def eraseOutput(self, index: int) -> object: ...

    def copy(self) -> Graph: ...


class Traced(Protocol):
    """A traced or scripted module, or one read from a file."""

    @property
    def graph(self) -> Graph: ...

    @property
    def inlined_graph(self) -> Graph: ...

    @property
    def original_name(self) -> str: ...

    def __call__(self, *tensors: torch.Tensor) -> Any: ...

    def eval(self) -> Traced: ...

    def children(self) -> Iterator[Traced]: ...

    def named_children(self) -> Iterator[Tuple[str, Traced]]: ...

    def modules(self) -> Iterator[Traced]: ...

    def state_dict(self, *, keep_vars: bool) -> Dict[str, torch.Tensor]: ...


def load_module(file: Path, device: Optional[str] = None) -> Traced:
    """Load a file's module, its weights on `device` or where they were; raises torch's errors."""
    import torch

    options = {} if device is None else {"map_location": device}
    module: Traced = torch.jit.load(str(file), **options)
    return module


def read_module(file: Path, device: str) -> Traced:
    """Load an archive's module on a device, to be run; raises InvalidManifest with the reason."""
    import torch

    try:
        return load_module(file, device).eval()
    except (RuntimeError, ValueError) as error:
        raise InvalidManifest(f"{file.name} cannot be loaded by torch {torch.__version__}: {reason(error)}") from error


def insert_constant(graph: Graph, value: object, before: Node) -> Value:
    """Make a number, a text, a list of them or a device before a node."""
    with graph.insert_point_guard(before):
        return graph.insertConstant(value)


def insert_graph(graph: Graph, part: Graph, values: Sequence[Value], before: Node) -> Value:
    """Compute another graph, which has one output, for these values before a node."""
    with graph.insert_point_guard(before):
        [result] = graph.insertGraph(part, list(values))
    return result


def insert_node(graph: Graph, kind: str, inputs: Sequence[Value], before: Node, outputs: int = 1) -> Node:
    """Insert an operator before a node; its outputs are tensors until given another type."""
    made = graph.create(kind, list(inputs), outputs)
    made.insertBefore(before)
    return made


def replace_value(node: Node, value: Value) -> None:
    """Replace a node's output by a value, and remove the node."""
    node.output().replaceAllUsesWith(value)
    node.destroy()


def works_in_place(node: Node) -> bool:
    """Return whether a node changes its first input, as its operator's name tells."""
    return _IN_PLACE.fullmatch(node.kind()) is not None


def open_tuples(graph: Graph) -> None:
    """Read values directly where tuples of them are made, as between a layer and its hooks; tuples that nobody reads are
    removed, since what is in one is not merged by `torch_internals.merge_equal`."""
    for node in graph.findAllNodes("prim::TupleUnpack", False):
        made = node.inputsAt(0).node()
        if made.kind() == "prim::TupleConstruct":
            for output, value in zip(list(node.outputs()), list(made.inputs())):
                output.replaceAllUsesWith(value)
            node.destroy()
            if not made.output().uses():
                made.destroy()
