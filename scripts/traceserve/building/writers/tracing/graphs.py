"""Graphs: tracing a module, combining several with common weights, and writing them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Dict, Tuple, Union

import torch
from traceserve_runtime.runtimes.graph import Traced

from traceserve.machine import space

MODEL_FILE = "traced_model.pt"
# If any shape is allowed: neither 1, nor a size that the model itself has.
TRACED_BATCH = 3
TRACED_LENGTH = 11
_GRAPH_SIZE = 16 << 20  # limit for a traced model's code and constants; BERT's are 0.2 MB


def trace(module: torch.nn.Module, inputs: Tuple[torch.Tensor, ...]) -> torch.nn.Module:
    """Trace the module with these inputs."""
    # The gate compares the trace with the original, at many shapes; torch would only check the traced one.
    traced: torch.nn.Module = torch.jit.trace(module, inputs, check_trace=False)
    return traced


def together(graphs: Dict[str, torch.nn.Module]) -> torch.nn.Module:
    """Return one module with each graph as a submodule; common weights are written once."""
    made: torch.nn.Module = torch.jit.script(torch.nn.ModuleDict(graphs))
    return made


def save(graphs: Dict[str, torch.nn.Module], file: Path) -> None:
    """Write graphs by name into one file."""
    write_module(together(graphs), file)


def write_module(module: Union[torch.nn.Module, Traced], file: Path) -> None:
    """Run `torch.jit.save` if there is room; raises NoSpace.

    On a full disk PyTorch's writer raises in C++, and again in its destructor, which aborts the whole process. A
    tensor with several names is written once.
    """
    tensors = {
        (tensor.data_ptr(), tensor.numel() * tensor.element_size())
        for tensor in module.state_dict(keep_vars=True).values()
    }
    space.require_space(file.parent, sum(size for _, size in tensors) + _GRAPH_SIZE, f"{file.name}, the traced model,")
    gc.collect()  # the pickler also counts references from garbage: without this, two builds may differ by bytes
    torch.jit.save(module, str(file))
