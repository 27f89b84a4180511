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
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set

import torch
from traceserve_runtime.runtimes.torchscript import packing
from traceserve_runtime.runtimes.torchscript.devices import nodes

from traceserve.building.writers.torchscript import axes, end_to_end
from traceserve.building.writers.torchscript.axes import Dims, Example

_OVER_FEATURES = ("aten::layer_norm", "aten::rms_norm")  # where these have one axis
_START = ("aten::linear", *_OVER_FEATURES)  # rows are packed for these, and stay packed from there
_BY_ELEMENT = (
    "abs add clamp contiguous detach div dropout erf exp feature_dropout gelu leaky_relu mul neg pow relu rsqrt rsub "
    "sigmoid silu softplus sqrt square sub tanh to"
)
_BY_TOKEN = (*_START, *(f"aten::{name}" for name in _BY_ELEMENT.split()))
_LAYERS = ("aten::linear", "aten::addmm", "aten::matmul", "aten::conv1d")
_PREPARED = ("aten::linear", "aten::gelu")  # what oneDNN prepares for each number of rows
_RESHAPING = ("aten::view", "aten::reshape")
_MOVING = ("aten::transpose", "aten::permute", "aten::slice")
_STEPS = (16, 8)  # with smaller ones there are more numbers of rows than are kept
_MOST_FILLED = 1.5e9  # a step, times the bytes of what each token is multiplied with
_ATTENTION = "aten::scaled_dot_product_attention"
_TOLERANCE = {"float32": 1e-4}  # of the largest value
_MISTAKEN = 0.1  # in other dtypes: how precise they are is the gate's to say


class Unpadded(NamedTuple):
    """A module whose graph was rewritten, and to a multiple of what number it fills up the tokens of a run."""

    module: Any
    filled: int


def unpadded(
    file: Path, inputs: Sequence[str], examples: Sequence[Example], dtype: str, reads_first: bool
) -> Optional[Unpadded]:
    """The module of `file`, which has one graph, rewritten; None where nothing is gained or it gives something else.

    `examples` are its inputs: two in `axes.SHAPES`, and others, all with padding. `reads_first`: whether a row's first place is
    never padding.
    """
    module: Any = torch.jit.load(str(file))  # type: ignore[no-untyped-call]
    graph = module.graph
    if "attention_mask" not in inputs:
        return None
    torch._C._jit_pass_inline(graph)
    torch._C._jit_pass_remove_mutation(graph)  # where nobody reads what was there before
    _open_tuples(graph)
    _drop_dropout(graph)
    torch._C._jit_pass_cse(graph)
    column = inputs.index("attention_mask")
    filled = _filled(module)
    with torch.no_grad():
        try:
            dims = axes.read(module, graph, examples[: len(axes.SHAPES)])
            if not _Rewriting(graph, dims, list(graph.inputs())[1 + column], filled).run(reads_first):
                return None
            traced: Any = torch.jit.load(str(file))  # type: ignore[no-untyped-call]
            limit = _TOLERANCE.get(dtype, _MISTAKEN)
            same = all(_same(module(*example), traced(*example), example[column], limit) for example in examples)
        except RuntimeError:
            return None
    return Unpadded(module, filled) if same else None


def _filled(module: Any) -> int:
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


def _open_tuples(graph: Any) -> None:
    """Read the values themselves where they are put together, as between a layer and its hooks."""
    for node in graph.findAllNodes("prim::TupleUnpack", False):
        made = node.inputsAt(0).node()
        if made.kind() == "prim::TupleConstruct":
            for output, value in zip(list(node.outputs()), list(made.inputs())):
                output.replaceAllUsesWith(value)
            node.destroy()


def _drop_dropout(graph: Any) -> None:
    """Take out what does nothing after training, each a call of its own."""
    for node in graph.findAllNodes("aten::dropout", False):
        if node.inputsAt(2).toIValue() is False:
            node.output().replaceAllUsesWith(node.inputsAt(0))
            node.destroy()


class _Rewriting:
    """A graph while it is rewritten.

    Of a value there are up to three forms: as it was, packed, and of the rows' first places alone.
    """

    def __init__(self, graph: Any, dims: Dict[str, Dims], mask: Any, filled: int) -> None:
        self.graph = graph
        self.dims = dims
        self.mask = mask
        self.step = filled
        self.packed: Dict[str, Any] = {}  # by the name of the value as it was
        self.firsts: Dict[str, Any] = {}
        self.wanted_first: Set[str] = set()  # values of which nobody reads more
        self.filled: Dict[str, Any] = {}  # by the name of one with a row for each text: the same with more rows
        self.layout: end_to_end.Layout

    def run(self, reads_first: bool) -> bool:
        """Rewrite it; whether something is gained."""
        if any(self._changes_rows(node) for node in nodes(self.graph)):
            return False
        start = next(iter(self.graph.nodes()))
        self.layout = end_to_end.Layout(
            *self._call(end_to_end.layout, [self.mask, self._constant(self.step, start)], start)
        )
        self._read_sizes_of_mask()
        before = list(self.graph.nodes())
        if reads_first:
            self._find_wanted_first(before)
        for node in before:
            self._rewrite(node)
        torch._C._jit_pass_dce(self.graph)
        return self._gains()

    def _gains(self) -> bool:
        """Whether most layers read packed tokens, or first places: packing itself takes time."""
        layers = [node for kind in _LAYERS for node in self.graph.findAllNodes(kind, True)]
        known = [[self.dims.get(value.debugName()) for value in node.inputs()] for node in layers]
        unchanged = [node for node in known if any(dims is not None and not dims.fixed for dims in node)]
        return 2 * len(unchanged) < len(layers)

    def _rewrite(self, node: Any) -> None:
        outputs = [output.debugName() for output in node.outputs()]
        if len(outputs) == 1 and outputs[0] in self.wanted_first and self._along(node):
            self.firsts[outputs[0]] = self._of_firsts(node)
        elif self._reads_first(node) and node.inputsAt(0).debugName() in self.wanted_first:
            node.replaceInput(0, self._first(node.inputsAt(0), node))
        elif self._packs(node):
            packed = self._clone(node, {i: self._pack(node.inputsAt(i), node) for i in self._rows(node)})
            layout = self.layout
            [rows] = self._call(
                end_to_end.spread, [packed, layout.padded, layout.places, layout.batch, layout.length], node
            )
            self.dims[rows.debugName()] = self._dims(node.output())
            self.packed[rows.debugName()] = packed
            node.output().replaceAllUsesWith(rows)
            node.destroy()
        elif self._is_of_texts(node):
            row = self._of_texts(node, {})
            self.dims[row.debugName()] = self._dims(node.output())
            node.output().replaceAllUsesWith(row)
            node.destroy()

    def _dims(self, value: Any) -> Dims:
        return self.dims.get(value.debugName(), axes.UNKNOWN)

    def _changes_rows(self, node: Any) -> bool:
        """Whether a node changes rows in place: who reads them before and who after is not looked for."""
        kind = node.kind()
        if not kind.startswith("aten::") or not kind.endswith("_") or kind.endswith("__"):
            return False
        changed = node.inputsAt(0).debugName(), packing.memory(node.inputsAt(0))
        dims = [self.dims.get(name, axes.UNKNOWN) for name in changed]
        return any(each.places is not None and each.count > 2 for each in dims)

    def _call(self, function: Any, arguments: List[Any], before: Any) -> List[Any]:
        """What a function gives, as a part of the graph."""
        with self.graph.insert_point_guard(before):
            [result] = self.graph.insertGraph(torch.jit.script(function).graph, arguments)
        made = result.node()
        return list(made.inputs()) if made.kind() == "prim::TupleConstruct" else [result]

    def _constant(self, value: Any, before: Any) -> Any:
        with self.graph.insert_point_guard(before):
            return self.graph.insertConstant(value)

    def _clone(self, node: Any, replaced: Dict[int, Any]) -> Any:
        """The output of the same operator of other inputs, by their numbers."""
        made = self.graph.create(node.kind(), [replaced.get(i, value) for i, value in enumerate(node.inputs())], 1)
        made.insertBefore(node)
        made.output().setType(torch._C.TensorType.get())
        return made.output()

    def _read_sizes_of_mask(self) -> None:
        """Or rows would be made only to be measured."""
        own = {self.layout.batch.debugName(), self.layout.length.debugName()}
        for node in self.graph.findAllNodes("aten::size", False):
            value, *axis = node.inputs()
            dims, number = self._dims(value), axis[0].toIValue() if axis else None
            if number is None or node.output().debugName() in own or not -dims.count <= number < dims.count:
                continue
            number %= dims.count
            if number in dims.batch or number in dims.length:
                node.output().replaceAllUsesWith(self.layout.batch if number in dims.batch else self.layout.length)
                node.destroy()

    # Packed tokens

    def _tensors(self, node: Any) -> List[int]:
        return [i for i, value in enumerate(node.inputs()) if str(value.type()) == "Tensor"]

    def _rows(self, node: Any) -> List[int]:
        return [i for i in self._tensors(node) if self._dims(node.inputsAt(i)).rows]

    def _by_token(self, node: Any) -> bool:
        """Whether a node takes each place of its rows by itself."""
        if node.kind() == "aten::mean":
            return _integers(node.inputsAt(1)) == [-1] and bool(node.inputsAt(2).toIValue())
        if node.kind() in _OVER_FEATURES:
            return len(_integers(node.inputsAt(1))) == 1
        return node.kind() in _BY_TOKEN

    def _packs(self, node: Any) -> bool:
        rows = self._rows(node)
        return (
            bool(rows)
            and self._by_token(node)
            and self._dims(node.output()).rows
            and all(i in rows or self._dims(node.inputsAt(i)).fixed for i in self._tensors(node))
            and (node.kind() in _START or any(node.inputsAt(i).debugName() in self.packed for i in rows))
            # What takes padding out of rows needs them with padding.
            and not any(self._is_mask(node.inputsAt(i)) for i in rows)
        )

    def _is_mask(self, value: Any) -> bool:
        """Whether it is the mask in another shape or dtype."""
        while value.debugName() != self.mask.debugName():
            tensors = self._tensors(value.node())
            if not tensors:
                return False
            value = value.node().inputsAt(tensors[0])
        return True

    def _pack(self, rows: Any, before: Any) -> Any:
        name = rows.debugName()
        if name not in self.packed:
            [self.packed[name]] = self._call(end_to_end.pack, [rows, self.layout.padded, self.layout.tokens], before)
        return self.packed[name]

    # What is read of the rows' first places alone

    def _find_wanted_first(self, before: Sequence[Any]) -> None:
        for node in reversed(before):
            for output in node.outputs():
                uses = output.uses()
                if uses and self._dims(output).places is not None and all(map(self._wants_first, uses)):
                    self.wanted_first.add(output.debugName())

    def _wants_first(self, use: Any) -> bool:
        """Whether a use of a value needs no more than its first place."""
        node = use.user
        if use.offset == 0 and self._reads_first(node):
            return True
        outputs = [output.debugName() for output in node.outputs()]
        return len(outputs) == 1 and outputs[0] in self.wanted_first and use.offset in self._along(node)

    def _reads_first(self, node: Any) -> bool:
        if node.kind() not in ("aten::select", "aten::slice"):
            return False
        places = self._dims(node.inputsAt(0)).places
        axis, *numbers = [value.toIValue() for value in list(node.inputs())[1:]]
        if places is None or axis is None or axis % self._dims(node.inputsAt(0)).count != places:
            return False
        return numbers == ([0] if node.kind() == "aten::select" else [0, 1, 1])

    def _along(self, node: Any) -> List[int]:
        """The inputs of which a node needs only the places that are wanted of its one output."""
        dims = self._dims(node.output())
        read = self._dims(node.inputsAt(0)) if node.inputsSize() else axes.UNKNOWN
        tensors = self._tensors(node)
        if self._by_token(node):
            alike = [i for i in tensors if self._dims(node.inputsAt(i)).places == dims.places]
            same_axes = all(self._dims(node.inputsAt(i)).count == dims.count for i in alike)
            return alike if same_axes and all(i in alike or self._dims(node.inputsAt(i)).fixed for i in tensors) else []
        if node.kind() in (*_RESHAPING, *_MOVING):
            return [0] if read.places is not None else []
        if node.kind() == _ATTENTION and dims.count == 4 and dims.places == 2:
            query, _, _, mask, _, causal, *_ = node.inputs()
            masked = self._dims(mask)
            readable = str(mask.type()) == "NoneType" or (masked.count > 1 and not masked.others)
            return [0] if self._dims(query).places == 2 and readable and causal.toIValue() is False else []
        return []

    def _first(self, value: Any, before: Any) -> Any:
        name = value.debugName()
        if name not in self.firsts:
            if name in self.packed:
                [self.firsts[name]] = self._call(
                    end_to_end.first_tokens, [self.packed[name], self.layout.firsts], before
                )
            else:
                self.firsts[name] = self._first_along(value, self._dims(value).places, before)
        return self.firsts[name]

    def _first_along(self, value: Any, axis: Optional[int], before: Any) -> Any:
        made = self.graph.create("aten::slice", [value, *(self._constant(n, before) for n in (axis, 0, 1, 1))], 1)
        made.insertBefore(before)
        made.output().setType(torch._C.TensorType.get())
        return made.output()

    def _of_firsts(self, node: Any) -> Any:
        """What a node gives, of the first places alone."""
        replaced = {i: self._first(node.inputsAt(i), node) for i in self._along(node)}
        if node.kind() in _RESHAPING:
            replaced[1] = self._sizes_of_firsts(node)
        if node.kind() == _ATTENTION:
            mask = node.inputsAt(3)
            of_queries = self._dims(mask).count - 2
            if of_queries in self._dims(mask).length:
                replaced[3] = self._first_along(mask, of_queries, node)
        return self._of_texts(node, replaced) if node.kind() in _PREPARED else self._clone(node, replaced)

    def _sizes_of_firsts(self, node: Any) -> Any:
        sizes = node.inputsAt(1)
        if sizes.node().kind() != "prim::ListConstruct":
            return sizes
        made = list(sizes.node().inputs())
        places = self._dims(node.output()).places
        if places is not None and made[places].toIValue() != -1:
            made[places] = self._constant(1, node)
        together = self.graph.create("prim::ListConstruct", made, 1)
        together.insertBefore(node)
        together.output().setType(sizes.type())
        return together.output()

    # What has a row for each text

    def _is_of_texts(self, node: Any) -> bool:
        """Whether a product, or what follows one, has one row for each text, not for each place."""
        if node.kind() not in _PREPARED:
            return False
        read = self._dims(node.inputsAt(0))
        others = [self._dims(node.inputsAt(i)).fixed for i in self._tensors(node) if i]
        return read.batch == [0] and read.places is None and not read.others and all(others)

    def _of_texts(self, node: Any, replaced: Dict[int, Any]) -> Any:
        """What it gives, made of so many rows that oneDNN may have met their number before."""
        rows = replaced.get(0, node.inputsAt(0))
        if rows.debugName() not in self.filled:
            [full] = self._call(end_to_end.fill, [rows], node)
            self.dims[full.debugName()] = self._dims(rows)
            self.filled[rows.debugName()] = full
        made = self._clone(node, {**replaced, 0: self.filled[rows.debugName()]})
        [cut] = self._call(end_to_end.cut, [made, self.layout.batch], node)
        self.filled[cut.debugName()] = made
        return cut


def _integers(value: Any) -> List[Optional[int]]:
    """A list that a graph holds; None for what is computed."""
    if value.node().kind() == "prim::ListConstruct":
        return [item.toIValue() for item in value.node().inputs()]
    return list(value.toIValue() or [])
