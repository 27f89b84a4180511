"""Proves that a traced model runs on another device, on a machine without one.

The graphs are rewritten as by a worker with a GPU, for torch's device "meta", which has shapes but no values, and
run there: a tensor made on any other device cannot be combined with the others, and is reported.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
from traceserve_runtime.errors import MissingPackage
from traceserve_runtime.runtimes import graph as graphs
from traceserve_runtime.runtimes.graph import Traced
from traceserve_runtime.runtimes.torchscript import devices

from traceserve.errors import ExportError

META = "meta"
_REASON = re.compile(r"^((?:\w+Error: )+)(.+)$", re.MULTILINE)


def prove(file: Path, examples: Mapping[str, Sequence[torch.Tensor]]) -> bool:
    """Return whether every graph of a TorchScript file ran; False if one needs values, so that only its text was
    searched.

    `examples` are each graph's inputs, by name, or "" for a file with one. Raises ExportError naming what depends on
    a device.
    """
    module = graphs.load_module(file)
    try:
        devices.rewrite(module, META)
    except MissingPackage as error:
        raise ExportError(f'{error}; or take "hardware": "cpu"') from error
    found = sorted({what for graph in devices.reached(module) for what in devices.left(graph)})
    if found:
        raise ExportError(_refused(module, ", ".join(found)))
    _move(module)
    ran = [_run(getattr(module, name) if name else module, inputs) for name, inputs in examples.items()]
    return all(ran)


def _move(module: Traced) -> None:
    """Move the weights, and the graphs' tensors, but not their scalars, which are read as numbers."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, module), last, tensor.to(META))
    for graph in devices.reached(module):
        for node in graph.findAllNodes("prim::Constant", True):
            if str(node.output().type()) == "Tensor" and node.t("value").dim():
                node.t_("value", node.t("value").to(META))


def _run(graph: Traced, inputs: Sequence[torch.Tensor]) -> bool:
    jit: Any = torch.jit
    try:
        with torch.inference_mode(), jit.optimized_execution(False):  # optimizations compare constants by their values
            outputs = graph(*(tensor.to(META) for tensor in inputs))
    except RuntimeError as error:
        # Amid the interpreter's tracebacks: "RuntimeError: NotImplementedError: what is wrong".
        kinds, reason = ([("", str(error)), *_REASON.findall(str(error))])[-1]
        if isinstance(error, NotImplementedError) or "NotImplementedError" in kinds or "meta tensors" in reason:
            return False
        raise ExportError(_refused(graph, reason)) from error
    elsewhere = sorted({str(tensor.device) for tensor in outputs if tensor.device.type != META})
    if elsewhere:
        raise ExportError(_refused(graph, f"an output is made on {', '.join(elsewhere)}"))
    return True


def _refused(graph: Traced, reason: str) -> str:
    return f'the graph of {graph.original_name} cannot be moved to a GPU: {reason}; take "hardware": "cpu"'
