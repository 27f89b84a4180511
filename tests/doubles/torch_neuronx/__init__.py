"""A contract double of torch-neuronx (AWS Inf2, Trn1); see neuron_double."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Union

from neuron_double import compiler

compiler.check_torch("torch_neuronx")

import torch  # noqa: E402
from neuron_double import cores, operator  # noqa: E402

__version__ = "1.13.1.0+double"
operator.register()


def trace(
    func: Any,
    example_inputs: Any,
    *_: Any,
    input_output_aliases: Optional[Dict[Any, int]] = None,
    compiler_workdir: Optional[str] = None,
    compiler_args: Optional[Union[str, List[str]]] = None,
    inline_weights_to_neff: bool = True,
    cpu_backend: bool = False,
) -> torch.jit.ScriptModule:
    """Compile `func` for the shapes and dtypes of `example_inputs`; without a chip with `cpu_backend`, for a
    --target."""
    if _:
        raise TypeError("options of torch_neuronx.trace are given by name")
    if not cpu_backend and not cores.count():
        raise RuntimeError(
            "Bad StatusOr access: INVALID_ARGUMENT: PJRT_Client_Create: Init: error condition !(num_devices > 0)"
        )
    if cpu_backend and not any("--target" in argument for argument in _listed(compiler_args)):
        raise RuntimeError("neuronx-cc: without a Neuron device --target is required")
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    traced = torch.jit.trace(func, inputs, check_trace=False)
    compiler.run(compiler_workdir, None)
    if compiler.outcome() == "fails":
        raise RuntimeError("neuronx-cc failed with 70")
    return operator.compile_graph(traced, inputs)


def _listed(compiler_args: Optional[Union[str, List[str]]]) -> List[str]:
    return compiler_args.split() if isinstance(compiler_args, str) else list(compiler_args or ())
