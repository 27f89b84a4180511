"""A traced graph moved to another device.

A trace holds the device that it was made on: as constants, wherever the model makes a tensor (positions, masks). Loading
it onto another device moves its weights and not these. They stand in the graphs of the module and of its submodules, in
the blocks of branches and loops, and in functions that were scripted; all of this is one graph once it is inlined.
"""

from __future__ import annotations

from typing import Any, Iterator, List

_SCALARS = ("int", "float", "bool", "number", "Scalar")


def rewrite(module: Any, device: str) -> None:
    """Let every graph of a module that was loaded onto `device` make its tensors there. Before its first run."""
    import torch

    for graph in graphs(module):
        torch._C._jit_pass_inline(graph)
        for node in list(nodes(graph)):
            _name_device(graph, node)
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
    for node in graph.findAllNodes("prim::Constant", True):
        kind = str(node.output().type())
        if "Device" in kind and kind != "Device" or (kind == "str" and _among_others(node)):
            found.append(f"a constant of type {kind} that names a device")
    return found


def entries(module: Any) -> List[Any]:
    """The modules that a runner calls: this one, or each of its parts."""
    return [module] if "forward" in module._c._method_names() else list(module.children())


def graphs(module: Any) -> List[Any]:
    """The graphs that a runner calls."""
    return [entry.graph for entry in entries(module)]


def nodes(block: Any) -> Iterator[Any]:
    """All nodes, of inner blocks too."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from nodes(inner)


def _name_device(graph: Any, node: Any) -> None:
    """Name a device where a tensor is made of no other one and of none by name, as scripted code does it.

    A scalar stays where it is: it goes with tensors of any device.
    """
    import torch

    schema = node.schema()
    if not node.kind().startswith("aten::") or " device" not in schema:
        return
    arguments = torch._C.parse_schema(schema).arguments
    values = list(node.inputs())
    of_another = any(str(argument.type) == "Tensor" for argument in arguments)
    scalar = node.kind() in ("aten::tensor", "aten::scalar_tensor") and str(values[0].type()) in _SCALARS
    for i, (argument, value) in enumerate(zip(arguments, values)):
        if argument.name == "device" and str(value.type()) == "NoneType" and not (of_another or scalar):
            constant = graph.create("prim::Constant")
            constant.s_("value", "cpu")
            constant.output().setType(torch._C.DeviceObjType.get())
            constant.insertBefore(node)
            node.replaceInput(i, constant.output())


def _makes_device(node: Any) -> bool:
    users = [use.user.kind() for use in node.output().uses()]
    return bool(users) and all(kind == "aten::device" for kind in users)


def _among_others(node: Any) -> bool:
    users = [use.user.kind() for use in node.output().uses()]
    return "aten::device" in users and not _makes_device(node)
