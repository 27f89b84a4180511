"""A traced graph moved to another device.

A trace holds the device that it was made on: as constants, wherever the model makes a tensor (positions, masks). Loading
it onto another device moves its weights and not these. They stand in the graphs of the module and of its submodules, in
the blocks of branches and loops, and in functions that were scripted; all of this is one graph once it is inlined.
"""

from __future__ import annotations

from typing import Any, Iterator, List


def rewrite(module: Any, device: str) -> None:
    """Let every graph of a module that was loaded onto `device` make its tensors there. Before its first run."""
    import torch

    for graph in graphs(module):
        torch._C._jit_pass_inline(graph)
        for node in constants(graph):
            node.s_("value", device)


def constants(graph: Any) -> Iterator[Any]:
    """The nodes of an inlined graph that name a device: constants of this type, and texts that are made into one."""
    for node in graph.findAllNodes("prim::Constant", True):
        kind = str(node.output().type())
        if kind == "Device" or (kind == "str" and _makes_device(node)):
            yield node


def left(graph: Any) -> List[str]:
    """What of an inlined graph depends on a device and is not among `constants`."""
    found = []
    for kind in ("aten::cpu", "aten::cuda", "prim::CallFunction", "prim::CallMethod"):
        found += [kind for _ in graph.findAllNodes(kind, True)]
    for node in graph.findAllNodes("aten::device", True):
        if next(iter(node.inputs())).node().kind() != "prim::Constant":
            found.append("aten::device of a text that is computed")
    found += [f"{node.kind()} without a device" for node in _nodes(graph) if _makes_on_default(node)]
    for node in graph.findAllNodes("prim::Constant", True):
        kind = str(node.output().type())
        if "Device" in kind and kind != "Device" or (kind == "str" and _among_others(node)):
            found.append(f"a constant of type {kind} that names a device")
    return found


def graphs(module: Any) -> List[Any]:
    """The graphs that a runner calls: the module's own, or one of each of its parts."""
    entries = [module] if "forward" in module._c._method_names() else list(module.children())
    return [entry.graph for entry in entries]


def _nodes(block: Any) -> Iterator[Any]:
    """All nodes, of inner blocks too."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _makes_on_default(node: Any) -> bool:
    """Whether this makes a tensor of no other one, and on torch's default device: as only scripted code does."""
    import torch

    schema = node.schema()
    if not node.kind().startswith("aten::") or " device" not in schema or schema == "(no schema)":
        return False
    arguments = torch._C.parse_schema(schema).arguments
    if any(str(argument.type) == "Tensor" for argument in arguments):
        return False
    given = [value for argument, value in zip(arguments, node.inputs()) if argument.name == "device"]
    return any(str(value.type()) == "NoneType" for value in given)


def _makes_device(node: Any) -> bool:
    users = [use.user.kind() for use in node.output().uses()]
    return bool(users) and all(kind == "aten::device" for kind in users)


def _among_others(node: Any) -> bool:
    users = [use.user.kind() for use in node.output().uses()]
    return "aten::device" in users and not _makes_device(node)
