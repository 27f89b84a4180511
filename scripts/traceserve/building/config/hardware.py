"""The supported hardware, and its constraints."""

from __future__ import annotations

from typing import Dict, NamedTuple, Optional, Sequence, Tuple

from traceserve_runtime.tasks import TASKS

_PROCESSOR = "cpu"  # torch's name of it


class Hardware(NamedTuple):
    """The capabilities of one kind of hardware.

    `loops`: the looping tasks that it supports; None: all of them. With `fixed_shapes` every
    graph is compiled for one shape; with `partial` a part of it may stay on the CPU. `torch_device` is torch's own name of the
    device; None for chips with a runtime of theirs. `packages` are what torch needs for it.
    """

    fixed_shapes: bool = False
    loops: Optional[Tuple[str, ...]] = None
    partial: bool = False
    torch_device: Optional[str] = None
    packages: Tuple[str, ...] = ()

    @property
    def beside_cpu(self) -> Optional[str]:
        """torch's name of another device that runs its archives, besides a CPU."""
        return None if self.torch_device == _PROCESSOR else self.torch_device


HARDWARE: Dict[str, Hardware] = {
    "cpu": Hardware(torch_device=_PROCESSOR),
    "gpu": Hardware(torch_device="cuda"),
    "neuron": Hardware(fixed_shapes=True, loops=("encoder_decoder",), partial=True, packages=("torch-neuron",)),
    "neuronx": Hardware(fixed_shapes=True, loops=("encoder_decoder",), packages=("torch-neuronx",)),
}
FIXED_SHAPES = tuple(name for name, item in HARDWARE.items() if item.fixed_shapes)
PARTIAL = tuple(name for name, item in HARDWARE.items() if item.partial)


def why_refused(hardware: str, tasks: Sequence[str]) -> Optional[str]:
    """Return why similar tasks cannot run on this hardware; None if they can."""
    loops, loop = HARDWARE[hardware].loops, TASKS[tasks[0]].loop
    if loops is None or not loop or loop in loops:
        return None
    return f"has fixed shapes on {hardware}, where {', '.join(tasks)} cannot keep a growing cache"
