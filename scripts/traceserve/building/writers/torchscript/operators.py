"""How a graph's operators treat the positions of rows: which work on each separately, and which only read the first.

Rows are values of (batch, length, features); `axes` finds them.
"""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence, Set

from traceserve_runtime.runtimes.graph import ATTENTION, Node, Use, Value, works_in_place
from traceserve_runtime.runtimes.torchscript import packing

from traceserve.building.writers.torchscript import axes
from traceserve.building.writers.torchscript.axes import Dims

_OVER_FEATURES = ("aten::layer_norm", "aten::rms_norm")  # if these have one axis
FIRST_UNPADDED = ("aten::linear", *_OVER_FEATURES)  # rows are unpadded for these, and stay so from there
_BY_ELEMENT = (
    "abs add clamp contiguous detach div dropout erf exp feature_dropout gelu leaky_relu mul neg pow relu rsqrt rsub "
    "sigmoid silu softplus sqrt square sub tanh to"
)
_BY_TOKEN = (*FIRST_UNPADDED, *(f"aten::{name}" for name in _BY_ELEMENT.split()))
PREPARED = ("aten::linear", "aten::gelu")  # oneDNN prepares these per number of rows
RESHAPING = ("aten::view", "aten::reshape")
_MOVING = ("aten::transpose", "aten::permute", "aten::slice")


class Operators:
    """The operators of one graph, by the axes of their inputs and outputs."""

    def __init__(self, dims: Dict[str, Dims], mask: Value) -> None:
        self._known = dims
        self._mask = mask
        self.wanted_first: Set[str] = set()  # values of which only the first position is read

    def dims(self, value: Value) -> Dims:
        return self._known.get(value.debugName(), axes.UNKNOWN)

    def changes_rows(self, node: Node) -> bool:
        """Return whether a node modifies rows in place: reads before and after are not tracked."""
        if not works_in_place(node):
            return False
        changed = node.inputsAt(0).debugName(), packing.memory(node.inputsAt(0))
        dims = [self._known.get(name, axes.UNKNOWN) for name in changed]
        return any(each.positions is not None and each.count > 2 for each in dims)

    def rows(self, node: Node) -> List[int]:
        """Return which inputs of a node are rows."""
        return [i for i in tensor_inputs(node) if self.dims(node.inputsAt(i)).rows]

    def can_unpad(self, node: Node, unpadded: Dict[str, Value]) -> bool:
        """Return whether a node can read its rows unpadded, and they are already in `unpadded`, or should be for it."""
        rows = self.rows(node)
        return (
            bool(rows)
            and _by_token(node)
            and self.dims(node.output()).rows
            and all(i in rows or self.dims(node.inputsAt(i)).fixed for i in tensor_inputs(node))
            and (node.kind() in FIRST_UNPADDED or any(node.inputsAt(i).debugName() in unpadded for i in rows))
            # Nodes that remove padding from rows need it.
            and not any(self._is_mask(node.inputsAt(i)) for i in rows)
        )

    def _is_mask(self, value: Value) -> bool:
        """Return whether it is the mask in another shape or dtype."""
        while value.debugName() != self._mask.debugName():
            read = tensor_inputs(value.node())
            if not read:
                return False
            value = value.node().inputsAt(read[0])
        return True

    # Values of which only the rows' first positions are read

    def find_wanted_first(self, nodes: Sequence[Node]) -> None:
        """Fill `wanted_first`; `nodes` are all of the graph's, in order."""
        for node in reversed(nodes):
            for output in node.outputs():
                uses = output.uses()
                if uses and self.dims(output).positions is not None and all(map(self._wants_first, uses)):
                    self.wanted_first.add(output.debugName())

    def _wants_first(self, use: Use) -> bool:
        """Return whether a use of a value only needs its first position."""
        if use.offset == 0 and self.reads_first(use.user):
            return True
        return self.gives_wanted_first(use.user) and use.offset in self.along(use.user)

    def gives_wanted_first(self, node: Node) -> bool:
        """Return whether a node has one output of which only the first position is read."""
        outputs = [output.debugName() for output in node.outputs()]
        return len(outputs) == 1 and outputs[0] in self.wanted_first

    def reads_first(self, node: Node) -> bool:
        """Return whether a node takes the first position of its first input."""
        if node.kind() not in ("aten::select", "aten::slice"):
            return False
        positions = self.dims(node.inputsAt(0)).positions
        axis, *numbers = [value.toIValue() for value in list(node.inputs())[1:]]
        if positions is None or axis is None or axis % self.dims(node.inputsAt(0)).count != positions:
            return False
        return bool(numbers == ([0] if node.kind() == "aten::select" else [0, 1, 1]))

    def along(self, node: Node) -> List[int]:
        """Return the inputs of which a node only needs the wanted positions of its one output."""
        dims = self.dims(node.output())
        read = self.dims(node.inputsAt(0)) if node.inputsSize() else axes.UNKNOWN
        if _by_token(node):
            alike = [i for i in tensor_inputs(node) if self.dims(node.inputsAt(i)).positions == dims.positions]
            same_axes = all(self.dims(node.inputsAt(i)).count == dims.count for i in alike)
            others = [i for i in tensor_inputs(node) if i not in alike]
            return alike if same_axes and all(self.dims(node.inputsAt(i)).fixed for i in others) else []
        if node.kind() in (*RESHAPING, *_MOVING):
            return [0] if read.positions is not None else []
        if node.kind() == ATTENTION and dims.count == 4 and dims.positions == 2:
            query, _, _, mask, _, causal, *_ = node.inputs()
            masked = self.dims(mask)
            readable = str(mask.type()) == "NoneType" or (masked.count > 1 and not masked.others)
            return [0] if self.dims(query).positions == 2 and readable and causal.toIValue() is False else []
        return []

    # Values with one row per text

    def is_of_texts(self, node: Node) -> bool:
        """Return whether a product, or a following node, has one row per text, not per position."""
        if node.kind() not in PREPARED:
            return False
        read = self.dims(node.inputsAt(0))
        others = [self.dims(node.inputsAt(i)).fixed for i in tensor_inputs(node) if i]
        return read.batch == [0] and read.positions is None and not read.others and all(others)


def tensor_inputs(node: Node) -> List[int]:
    """Return which inputs of a node are tensors."""
    return [i for i, value in enumerate(node.inputs()) if str(value.type()) == "Tensor"]


def _by_token(node: Node) -> bool:
    """Return whether a node works on each position of its rows separately."""
    if node.kind() == "aten::mean":
        return _integers(node.inputsAt(1)) == [-1] and bool(node.inputsAt(2).toIValue())
    if node.kind() in _OVER_FEATURES:
        return len(_integers(node.inputsAt(1))) == 1
    return node.kind() in _BY_TOKEN


def _integers(value: Value) -> List[Optional[int]]:
    """Return a list in a graph; None for computed elements."""
    if value.node().kind() == "prim::ListConstruct":
        return [item.toIValue() for item in value.node().inputs()]
    return list(value.toIValue() or [])
