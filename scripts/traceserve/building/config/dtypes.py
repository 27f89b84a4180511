"""The dtypes that a model can compute in, the hardware that runs each, and what `auto` tries."""

from __future__ import annotations

from typing import Dict, NamedTuple, Tuple, Type

from traceserve_runtime import processor
from traceserve_runtime.tasks.contract import Task

AUTO = "auto"


class Dtype(NamedTuple):
    """The hardware that runs a dtype."""

    hardware: Tuple[str, ...]
    by_compiler: Tuple[str, ...] = ()  # of these the hardware whose compiler makes it of a model in float32
    where_native: Tuple[
        str, ...
    ] = ()  # the hardware on which `auto` tries it, if the processor multiplies it by itself


DTYPES: Dict[str, Dtype] = {
    "float32": Dtype(("cpu", "gpu")),
    "bfloat16": Dtype(("cpu", "gpu", "neuron", "neuronx"), by_compiler=("neuron", "neuronx"), where_native=("cpu",)),
    "float16": Dtype(("gpu",)),
    "int8": Dtype(("cpu",)),
}


def own_dtypes(hardware: str) -> Tuple[str, ...]:
    """The dtypes that this hardware computes in whatever it is given: its compiler makes them."""
    return tuple(name for name, item in DTYPES.items() if hardware in item.by_compiler)


def fastest(task: Type[Task], hardware: str) -> Tuple[str, ...]:
    """What of float32 and bfloat16 is worth trying on this processor, in order.

    bfloat16 where the processor multiplies it by itself. Not int8: once enough layers are left out for the answers to
    stay, it was no faster than float32 (docs/measurements.md). Nor for written texts, which change with the first token
    that was a near tie.
    """
    if "bfloat16" in own_dtypes(hardware):
        return ("bfloat16",)
    lower = hardware in DTYPES["bfloat16"].where_native and processor.native("bfloat16") and not task.loop
    return ("bfloat16", "float32") if lower else ("float32",)


def float32_alone(task: Type[Task], hardware: str) -> Tuple[str, ...]:
    """What is tried where a lower dtype is to be asked for."""
    return ("float32",)
