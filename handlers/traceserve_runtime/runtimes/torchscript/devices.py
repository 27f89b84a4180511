"""Moves a traced graph to another device.

A trace contains the device that it was made on, as constants wherever the model makes a tensor (positions, masks).
Loading it onto another device moves its weights but not these. They are in the graphs of the module and its submodules,
in the blocks of branches and loops, and in scripted functions; inlining makes one graph of all.
"""

from __future__ import annotations

import itertools
import re
from typing import Iterator, List, NamedTuple

from traceserve_runtime.errors import MissingPackage
from traceserve_runtime.runtimes import torch_internals
from traceserve_runtime.runtimes.graph import Block, Graph, Node, Traced, insert_constant

_SCALARS = ("int", "float", "bool", "number", "Scalar")
_METHOD, _FUNCTION = "prim::CallMethod", "prim::CallFunction"


class Argument(NamedTuple):
    """An operator's argument: the type, such as "Tensor" or "Device?", and the name."""

    type: str
    name: str


def rewrite(module: Traced, device: str) -> None:
    """Make every graph of a module loaded onto `device` create its tensors there. Before its first run.

    Raises MissingPackage if this torch cannot rewrite graphs.
    """
    missing = torch_internals.missing_members()
    if missing:
        raise _unmovable(f"its graphs have no {', '.join(missing)}")
    for graph in reached(module):
        for node in list(nodes(graph)):
            _name_device(graph, node)
        for node in constants(graph):
            node.s_("value", device)


def reached(module: Traced) -> List[Graph]:
    """Return the graphs that a runner calls, with all calls inlined.

    If torch cannot inline: each of them, and those of called methods. Raises MissingPackage if one
    calls a function, whose graph is then unreachable.
    """
    found: List[Graph] = []
    for entry in entries(module):
        found += [entry.graph] if torch_internals.inline(entry.graph) else _of_methods(entry)
    return found


def _of_methods(module: Traced) -> List[Graph]:
    """Return the graphs of a traced module and its submodules: one per call, named forward, forward1 and so on."""
    found = []
    for part in module.modules():
        for number in itertools.count():
            method = getattr(part, f"forward{number or ''}", None)
            if method is None:
                break
            found.append(method.graph)
    calls = [node for graph in found for node in graph.findAllNodes(_METHOD, True)]
    functions = [node for graph in found for node in graph.findAllNodes(_FUNCTION, True)]
    if functions or not all(re.fullmatch(r"forward\d*", node.s("name")) for node in calls):
        raise _unmovable("it cannot inline what the graph calls")
    return found


def _unmovable(why: str) -> MissingPackage:
    import torch

    return MissingPackage(
        f"torch {torch.__version__} cannot move this graph to a GPU: {why}; serve the archive on the CPU, or with the torch "
        "that it was made with"
    )


def constants(graph: Graph) -> Iterator[Node]:
    """Yield the nodes of an inlined graph that name a device: constants of this type, and texts converted to one."""
    for node in graph.findAllNodes("prim::Constant", True):
        kind = str(node.output().type())
        if kind == "Device" or (kind == "str" and _makes_device(node)):
            yield node


def left(graph: Graph) -> List[str]:
    """Return the parts of one of the `reached` graphs that depend on a device and are not among `constants`."""
    found = []
    for kind in ("aten::cpu", "aten::cuda", _FUNCTION, *([_METHOD] if torch_internals.inline(graph) else [])):
        found += [kind for _ in graph.findAllNodes(kind, True)]
    for node in graph.findAllNodes("aten::device", True):
        if next(iter(node.inputs())).node().kind() != "prim::Constant":
            found.append("aten::device of a text that is computed")
    for node in graph.findAllNodes("prim::Constant", True):
        kind = str(node.output().type())
        if "Device" in kind and kind != "Device" or (kind == "str" and _among_others(node)):
            found.append(f"a constant of type {kind} that names a device")
    return found


def entries(module: Traced) -> List[Traced]:
    """Return the modules that a runner calls: this one, or each of its parts."""
    return [module] if hasattr(module, "forward") else list(module.children())


def graphs(module: Traced) -> List[Graph]:
    """Return the graphs that a runner calls."""
    return [entry.graph for entry in entries(module)]


def nodes(block: Block) -> Iterator[Node]:
    """Yield all nodes, including those of inner blocks."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from nodes(inner)


def arguments(schema: str) -> List[Argument]:
    """Return an operator's arguments, from torch's printed schema: `aten::ones(int[] size, *, Device? device=None) ->
    Tensor`."""
    parts, depth = [""], 0
    for character in schema[schema.index("(") + 1 :]:
        depth += (character in "([") - (character in ")]")
        if depth < 0:
            break
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    declared = [part.split("=")[0].rpartition(" ") for part in map(str.strip, parts) if part not in ("", "*", "...")]
    return [Argument(re.sub(r"\(.*?\)", "", kind), name) for kind, _, name in declared]


def _name_device(graph: Graph, node: Node) -> None:
    """Name a device where a tensor is made from no other one and without a device, as in scripted code.

    Scalars are left alone: they combine with tensors of any device.
    """
    import torch

    schema = node.schema()
    if not node.kind().startswith("aten::") or " device" not in schema:
        return
    declared = arguments(schema)
    values = list(node.inputs())
    of_another = any(argument.type == "Tensor" for argument in declared)
    scalar = node.kind() in ("aten::tensor", "aten::scalar_tensor") and str(values[0].type()) in _SCALARS
    for i, (argument, value) in enumerate(zip(declared, values)):
        if argument.name == "device" and str(value.type()) == "NoneType" and not (of_another or scalar):
            node.replaceInput(i, insert_constant(graph, torch.device("cpu"), node))


def _makes_device(node: Node) -> bool:
    users = [use.user.kind() for use in node.output().uses()]
    return bool(users) and all(kind == "aten::device" for kind in users)


def _among_others(node: Node) -> bool:
    users = [use.user.kind() for use in node.output().uses()]
    return "aten::device" in users and not _makes_device(node)
