"""The graph of `unpadding` during rewriting: unpadded tokens, first positions only, and rounded-up texts."""

from __future__ import annotations

from typing import Callable, Dict, List, Optional

import torch
from traceserve_runtime.runtimes import torch_internals
from traceserve_runtime.runtimes.graph import (
    ATTENTION,
    Graph,
    Node,
    Value,
    insert_constant,
    insert_graph,
    insert_node,
    replace_value,
)
from traceserve_runtime.runtimes.torchscript.devices import nodes

from traceserve.building.writers.torchscript import end_to_end
from traceserve.building.writers.torchscript.axes import Dims
from traceserve.building.writers.torchscript.operators import PREPARED, RESHAPING, Operators

_LAYERS = ("aten::linear", "aten::addmm", "aten::matmul", "aten::conv1d")


class Rewriting:
    """A graph during rewriting.

    A value has up to three forms: the original, unpadded, and only the rows' first positions.
    """

    def __init__(self, graph: Graph, dims: Dict[str, Dims], mask: Value, filled: int) -> None:
        self.graph = graph
        self.dims = dims
        self.mask = mask
        self.step = filled
        self.operators = Operators(dims, mask)
        self.unpadded: Dict[str, Value] = {}  # by the original value's name
        self.firsts: Dict[str, Value] = {}
        self.filled: Dict[str, Value] = {}  # by the name of a value with a row per text: the same with more rows
        self.layout: end_to_end.Layout

    def run(self, reads_first: bool) -> bool:
        """Rewrite it; return whether that gains anything."""
        if any(self.operators.changes_rows(node) for node in nodes(self.graph)):
            return False
        start = next(iter(self.graph.nodes()))
        self.layout = end_to_end.Layout(
            *self._call(end_to_end.layout, [self.mask, self._constant(self.step, start)], start)
        )
        self._read_sizes_of_mask()
        before = list(self.graph.nodes())
        if reads_first:
            self.operators.find_wanted_first(before)
        for node in before:
            self._rewrite(node)
        torch_internals.remove_unread(self.graph)
        return self._gains()

    def _gains(self) -> bool:
        """Return whether most layers read unpadded tokens, or first positions: removing padding itself takes time."""
        layers = [node for kind in _LAYERS for node in self.graph.findAllNodes(kind, True)]
        known = [[self.dims.get(value.debugName()) for value in node.inputs()] for node in layers]
        unchanged = [node for node in known if any(dims is not None and not dims.fixed for dims in node)]
        return 2 * len(unchanged) < len(layers)

    def _rewrite(self, node: Node) -> None:
        of = self.operators
        if of.gives_wanted_first(node) and of.along(node):
            self.firsts[node.output().debugName()] = self._of_firsts(node)
        elif of.reads_first(node) and node.inputsAt(0).debugName() in of.wanted_first:
            node.replaceInput(0, self._first(node.inputsAt(0), node))
        elif of.can_unpad(node, self.unpadded):
            unpadded = self._clone(node, {i: self._unpad(node.inputsAt(i), node) for i in of.rows(node)})
            layout = self.layout
            [rows] = self._call(
                end_to_end.spread, [unpadded, layout.padded, layout.positions, layout.batch, layout.length], node
            )
            self.dims[rows.debugName()] = of.dims(node.output())
            self.unpadded[rows.debugName()] = unpadded
            replace_value(node, rows)
        elif of.is_of_texts(node):
            row = self._of_texts(node, {})
            self.dims[row.debugName()] = of.dims(node.output())
            replace_value(node, row)

    def _call(self, function: Callable[..., object], arguments: List[Value], before: Node) -> List[Value]:
        """Return a function's outputs, as part of the graph."""
        part: Graph = torch.jit.script(function).graph
        result = insert_graph(self.graph, part, arguments, before)
        made = result.node()
        return list(made.inputs()) if made.kind() == "prim::TupleConstruct" else [result]

    def _constant(self, value: object, before: Node) -> Value:
        return insert_constant(self.graph, value, before)

    def _clone(self, node: Node, replaced: Dict[int, Value]) -> Value:
        """Return the output of the same operator with other inputs, by index."""
        inputs = [replaced.get(i, value) for i, value in enumerate(node.inputs())]
        return insert_node(self.graph, node.kind(), inputs, node).output()

    def _read_sizes_of_mask(self) -> None:
        """Read sizes from the mask, or rows would be made only to be measured."""
        own = {self.layout.batch.debugName(), self.layout.length.debugName()}
        for node in self.graph.findAllNodes("aten::size", False):
            value, *axis = node.inputs()
            dims, number = self.operators.dims(value), axis[0].toIValue() if axis else None
            if number is None or node.output().debugName() in own or not -dims.count <= number < dims.count:
                continue
            number %= dims.count
            if number in dims.batch or number in dims.length:
                replace_value(node, self.layout.batch if number in dims.batch else self.layout.length)

    def _unpad(self, rows: Value, before: Node) -> Value:
        name = rows.debugName()
        if name not in self.unpadded:
            [self.unpadded[name]] = self._call(
                end_to_end.unpad_rows, [rows, self.layout.padded, self.layout.tokens], before
            )
        return self.unpadded[name]

    # Values of which only the rows' first positions are read

    def _first(self, value: Value, before: Node) -> Value:
        name = value.debugName()
        if name not in self.firsts:
            if name in self.unpadded:
                [self.firsts[name]] = self._call(
                    end_to_end.first_tokens, [self.unpadded[name], self.layout.firsts], before
                )
            else:
                self.firsts[name] = self._first_along(value, self.operators.dims(value).positions, before)
        return self.firsts[name]

    def _first_along(self, value: Value, axis: Optional[int], before: Node) -> Value:
        inputs = [value, *(self._constant(n, before) for n in (axis, 0, 1, 1))]
        return insert_node(self.graph, "aten::slice", inputs, before).output()

    def _of_firsts(self, node: Node) -> Value:
        """Return a node's output for only the first positions."""
        replaced = {i: self._first(node.inputsAt(i), node) for i in self.operators.along(node)}
        if node.kind() in RESHAPING:
            replaced[1] = self._sizes_of_firsts(node)
        if node.kind() == ATTENTION:
            mask = node.inputsAt(3)
            of_queries = self.operators.dims(mask).count - 2
            if of_queries in self.operators.dims(mask).length:
                replaced[3] = self._first_along(mask, of_queries, node)
        return self._of_texts(node, replaced) if node.kind() in PREPARED else self._clone(node, replaced)

    def _sizes_of_firsts(self, node: Node) -> Value:
        sizes = node.inputsAt(1)
        if sizes.node().kind() != "prim::ListConstruct":
            return sizes
        made = list(sizes.node().inputs())
        positions = self.operators.dims(node.output()).positions
        if positions is not None and made[positions].toIValue() != -1:
            made[positions] = self._constant(1, node)
        together = insert_node(self.graph, "prim::ListConstruct", made, node)
        together.output().setType(sizes.type())
        return together.output()

    # Values with one row per text

    def _of_texts(self, node: Node, replaced: Dict[int, Value]) -> Value:
        """Return its output, computed with a number of rows that oneDNN may know."""
        rows = replaced.get(0, node.inputsAt(0))
        if rows.debugName() not in self.filled:
            [full] = self._call(end_to_end.fill_rows, [rows], node)
            self.dims[full.debugName()] = self.operators.dims(rows)
            self.filled[rows.debugName()] = full
        made = self._clone(node, {**replaced, 0: self.filled[rows.debugName()]})
        [cut] = self._call(end_to_end.cut, [made, self.layout.batch], node)
        self.filled[cut.debugName()] = made
        return cut
