"""Graphs: a module traced, several of them together over the same weights, and how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Tuple, Union

import torch
from traceserve_runtime.runtimes.graph import Traced

from traceserve.machine import space

MODEL_FILE = "traced_model.pt"
# Where any shape is allowed: neither 1, nor a size that the model itself has.
TRACED_BATCH = 3
TRACED_LENGTH = 11
_GRAPH_SIZE = 16 << 20  # of the code and constants of a traced model, at most; BERT's are 0.2 MB


def trace(module: torch.nn.Module, inputs: Tuple[torch.Tensor, ...]) -> torch.nn.Module:
    """The module traced with these inputs."""
    # The trace is compared with the original by the gate, at many shapes, and not by torch at the traced one.
    traced: torch.nn.Module = torch.jit.trace(module, inputs, check_trace=False)  # type: ignore[no-untyped-call]
    return traced


def together(graphs: Dict[str, torch.nn.Module]) -> torch.nn.Module:
    """One module with each graph as a submodule; weights that they share are written once."""
    made: torch.nn.Module = torch.jit.script(torch.nn.ModuleDict(graphs))
    return made


def save(graphs: Dict[str, torch.nn.Module], file: Path) -> None:
    """Write graphs by name into one file."""
    write_module(together(graphs), file)


def write_module(module: Union[torch.nn.Module, Traced], file: Path) -> None:
    """`torch.jit.save`, where there is room; raises NoSpace.

    On a full disk PyTorch's writer raises in C++, and once more as it is taken down, which aborts the whole process. A
    tensor that is used under several names is written once.
    """
    tensors = {
        (tensor.data_ptr(), tensor.numel() * tensor.element_size())
        for tensor in module.state_dict(keep_vars=True).values()
    }
    space.require_space(file.parent, sum(size for _, size in tensors) + _GRAPH_SIZE, f"{file.name}, the traced model,")
    torch.jit.save(module, str(file))
