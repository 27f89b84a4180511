"""torch's private names that the builder uses besides the worker's (`traceserve_runtime.runtimes.torch_internals`),
each behind a function that says why, since when, and what happens without it.

They are known from torch 1.13 to 2.13, unless a function says otherwise. No other file of the builder uses private
names of torch; a test removes each of them, and builds and queries a model again.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Callable, Iterator, List, Mapping, Optional, Sequence

import torch
from traceserve_runtime.runtimes import torch_internals
from traceserve_runtime.runtimes.graph import Graph, Traced

from traceserve.building.writers.tracing.replacing import replaced

# Graphs without padding


def unpads() -> bool:
    """Return whether this torch has everything needed for rewriting a graph to compute nothing for padding.

    Otherwise the graph is written as traced: a worker gives the same answers with it, for more work.
    """
    passes = ("_jit_pass_remove_mutation", "_create_function_from_graph")
    return torch_internals.rewrites() and all(hasattr(torch._C, name) for name in passes)


def remove_mutation(graph: Graph) -> None:
    """Turn in-place changes into new values, where the old ones are not read. Needed by `unpads`."""
    untyped: Any = graph
    torch._C._jit_pass_remove_mutation(untyped)


def run(graph: Graph, module: Traced, inputs: Sequence[torch.Tensor]) -> List[torch.Tensor]:
    """Run a graph that belongs to no module with a module's weights, and return its outputs as a list. Needed by
    `unpads`.

    A module's own graph could not be rerun after rewriting.
    """
    made: Any = graph
    script: Any = module
    function: Any = torch._C._create_function_from_graph("seen", made)
    results: List[torch.Tensor] = function(script._c, *inputs)
    return results


# ONNX


@contextlib.contextmanager
def quiet_onnx_export() -> Iterator[None]:
    """Keep torch.onnx.export from writing its graph to standard output where it fails, as torch 2.13 does.

    Without the name the graph is written, a megabyte for a large model.
    """
    unheard = {"_jit_onnx_log": lambda *words: None} if hasattr(torch._C, "_jit_onnx_log") else {}
    with replaced(torch._C, **unheard):
        yield


# Products of int8


def multiplies_int8() -> bool:
    """Return whether this torch, and a worker's that reads the graph, multiplies int8 by int8 on a CPU: since 2.4.

    Without it dtype int8 is refused: the same product of larger numbers would be slower than float32, and pointless.
    """
    return hasattr(torch, "_int_mm")


def int8_product() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the product of two int8 matrices to int32, aten::_int_mm in a trace. Needed by `multiplies_int8`.

    It is not called here: a trace names its values after the variables of every function on the stack.
    """
    return torch._int_mm


# Machine code


def compiles_packages() -> bool:
    """Return whether this torch compiles an exported model to a package of machine code: documented since 2.6.

    Without it the save mode aot_inductor is refused, before anything is downloaded.
    """
    inductor: Optional[object] = getattr(torch, "_inductor", None)
    return hasattr(inductor, "aoti_compile_and_package")


def compile_package(program: Any, package: Path, settings: Mapping[str, Any]) -> None:
    """Compile `torch.export`'s program into a package, with AOTInductor's settings. Needed by `compiles_packages`."""
    torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=dict(settings))
