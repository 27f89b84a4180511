"""A contract double of torch-neuron (AWS Inf1); see neuron_double."""

from __future__ import annotations

import logging
import sys
from typing import Any, List, Optional, Union

from neuron_double import compiler

compiler.check_torch("torch_neuron")

import torch  # noqa: E402
from neuron_double import operator  # noqa: E402

__version__ = "1.13.1.0+double"
logger = logging.getLogger("Neuron")
operator.register()
torch.neuron = sys.modules[__name__]


def trace(
    model: Any,
    example_inputs: Any,
    *_: Any,
    compiler_args: Optional[Union[str, List[str]]] = None,
    compiler_workdir: Optional[str] = None,
    compiler_timeout: Optional[float] = None,
    dynamic_batch_size: bool = False,
    fallback: bool = True,
    separate_weights: bool = False,
    minimum_segment_size: int = 2,
    verbose: Union[str, int] = 0,
) -> torch.jit.ScriptModule:
    """Compile `model` for the shapes and dtypes of `example_inputs`; needs no chip."""
    if _:
        raise TypeError("options of torch_neuron.trace are given by name")
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    traced = torch.jit.trace(model, inputs, check_trace=False)
    compiler.run(compiler_workdir, compiler_timeout)
    operators = str(traced.inlined_graph).count("= aten::")
    if compiler.outcome() == "fails":
        raise RuntimeError(
            "No operations were successfully partitioned and compiled to neuron for this model - aborting trace!"
        )
    if compiler.outcome() == "places nothing":
        logger.warning("torch.neuron.trace was unable to place any operators on Neuron: the model runs on the CPU")
        return traced
    return operator.compile_graph(traced, inputs, round((1 - compiler.share()) * operators))
