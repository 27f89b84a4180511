"""The hardware that an archive can be built for, and what is fixed by it."""

from __future__ import annotations

from typing import Dict, NamedTuple, Optional, Sequence, Tuple

from traceserve_runtime.tasks import TASKS


class Hardware(NamedTuple):
    """What can run on one kind of hardware.

    `loops` are, of the tasks that are run in a loop, those that it can run; None: all of them. With `fixed_shapes` every
    graph is compiled for one shape; with `partial` a part of such a graph may stay on the CPU. `beside_cpu` is torch's name
    of another device that its archives run on as well as on a CPU.
    """

    fixed_shapes: bool = False
    loops: Optional[Tuple[str, ...]] = None
    partial: bool = False
    beside_cpu: Optional[str] = None


HARDWARE: Dict[str, Hardware] = {
    "cpu": Hardware(),
    "gpu": Hardware(beside_cpu="cuda"),
    "neuron": Hardware(fixed_shapes=True, loops=("encoder_decoder",), partial=True),
    "neuronx": Hardware(fixed_shapes=True, loops=("encoder_decoder",)),
}
FIXED_SHAPES = tuple(name for name, item in HARDWARE.items() if item.fixed_shapes)
PARTIAL = tuple(name for name, item in HARDWARE.items() if item.partial)


def refused(hardware: str, tasks: Sequence[str]) -> Optional[str]:
    """Why tasks that are run alike cannot run on this hardware; None where they can."""
    loops, loop = HARDWARE[hardware].loops, TASKS[tasks[0]].loop
    if loops is None or not loop or loop in loops:
        return None
    return f"has fixed shapes on {hardware}, where {', '.join(tasks)} cannot keep a past that grows"
