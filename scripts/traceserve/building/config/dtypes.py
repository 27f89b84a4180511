"""The dtypes of computation, the hardware for each, and the candidates of `auto`."""

from __future__ import annotations

import importlib.util
from typing import Dict, NamedTuple, Tuple, Type

from traceserve_runtime import processor
from traceserve_runtime.tasks.contract import Task

AUTO = "auto"


class Dtype(NamedTuple):
    """The hardware for a dtype."""

    hardware: Tuple[str, ...]
    of_weights: Tuple[str, ...] = ()  # hardware on which only weights have it, in save modes that read them so
    by_compiler: Tuple[str, ...] = ()  # hardware whose compiler converts a float32 model
    where_native: Tuple[str, ...] = ()  # hardware on which `auto` tries it, if the processor has it natively
    differentiable: bool = True  # whether a model that computes in it has gradients


DTYPES: Dict[str, Dtype] = {
    "float32": Dtype(("cpu", "gpu")),
    "bfloat16": Dtype(("cpu", "gpu", "neuron", "neuronx"), by_compiler=("neuron", "neuronx"), where_native=("cpu",)),
    "float16": Dtype(("gpu",), of_weights=("cpu",)),
    "int8": Dtype(("cpu",), differentiable=False),
}


def own_dtypes(hardware: str) -> Tuple[str, ...]:
    """Return the dtypes in which this hardware computes any model: its compiler converts to them."""
    return tuple(name for name, item in DTYPES.items() if hardware in item.by_compiler)


def multiplied(dtype: str, hardware: str) -> str:
    """Return the dtype in which this hardware multiplies: float32 where only weights have another."""
    return "float32" if hardware in DTYPES[dtype].of_weights else dtype


def fastest(task: Type[Task], hardware: str) -> Tuple[str, ...]:
    """Return which of float32 and bfloat16 are worth trying on this processor, in order.

    bfloat16 if the processor has it natively. Not int8: with enough layers left out to keep the answers,
    it was no faster than float32 (docs/measurements.md). Not for generated texts, some of which change.
    """
    if "bfloat16" in own_dtypes(hardware):
        return ("bfloat16",)
    lower = hardware in DTYPES["bfloat16"].where_native and processor.native("bfloat16") and not task.loop
    return ("bfloat16", "float32") if lower else ("float32",)


def fastest_in_torchscript(task: Type[Task], hardware: str) -> Tuple[str, ...]:
    """Return the same for TorchScript's graphs: weights in float16 where bfloat16 is not native and they are faster. Not for
    generated texts, as above: most of their checkpoints have such weights already."""
    tried = fastest(task, hardware)
    halves = not task.loop and hardware in DTYPES["float16"].of_weights and processor.halves_are_faster()
    return ("float16", *tried) if len(tried) == 1 and halves else tried


def fastest_in_openvino(task: Type[Task], hardware: str) -> Tuple[str, ...]:
    """Return the same for OpenVINO, whose int8 is twice as fast as float32: it is tried where bfloat16 is not native,
    int8 is, and NNCF is installed. Not for generated texts, as above, nor where the task has no `auto_int8`."""
    tried = fastest(task, hardware)
    trusted = not task.loop and task.auto_int8
    quantizes = trusted and processor.native("int8") and importlib.util.find_spec("nncf") is not None
    return ("int8", *tried) if len(tried) == 1 and quantizes else tried


def float32_alone(task: Type[Task], hardware: str) -> Tuple[str, ...]:
    """Return float32 alone, for cases where a lower dtype must be requested."""
    return ("float32",)
