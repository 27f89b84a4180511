"""Which save mode × hardware × dtype × task can work, read from the writers' rows; and why another cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Type

from traceserve_runtime.tasks.contract import Task
from traceserve_runtime.tasks.parameters import Parameter

from traceserve.precision import AUTO, PRECISIONS
from traceserve.writers import WRITERS, compiled
from traceserve.writers.contract import Target

if TYPE_CHECKING:
    from traceserve.loading import Original

HARDWARE: Tuple[str, ...] = tuple(dict.fromkeys(name for writer in WRITERS.values() for name in writer.hardware))

FIXED_SHAPES = compiled.HARDWARE  # where every length is one that was compiled


def refusal(save_mode: str, hardware: str, dtype: str, task: Type[Task]) -> Optional[str]:
    """Why this cannot work, and what can; None where it can."""
    writer = WRITERS[save_mode]
    if hardware not in writer.hardware:
        others = [name for name, other in WRITERS.items() if hardware in other.hardware]
        return f"save_mode {save_mode} runs on {', '.join(writer.hardware)}, not on {hardware}" + (
            f"; on {hardware} run {', '.join(others)}" if others else ""
        )
    if task.loop and not writer.loops:
        others = [name for name, other in WRITERS.items() if other.loops and hardware in other.hardware]
        return f"save_mode {save_mode} is for models that are run once, not for {task.name}; take {', '.join(others)}"
    reason = compiled.refused(hardware, task.name)
    if reason:
        return reason
    legal = dtypes(save_mode, hardware, task)
    if dtype in legal:
        return None
    if hardware not in PRECISIONS[dtype].hardware:
        reason = f"it runs on {', '.join(PRECISIONS[dtype].hardware)}, not on {hardware}"
    elif dtype not in writer.dtypes:
        reason = f"save_mode {save_mode} has none"
    else:
        reason = f"it is for models that are run once, not for {task.name}"
    return f'dtype is "{dtype}": {reason}; take {", ".join(legal)}'


def dtypes(save_mode: str, hardware: str, task: Type[Task]) -> List[str]:
    """What a configuration may say for this task on this hardware; nothing where they do not go together."""
    writer = WRITERS[save_mode]
    known = writer.loops if task.loop else writer.dtypes
    if hardware not in writer.hardware or compiled.refused(hardware, task.name):
        return []
    fitting = [name for name in known if hardware in PRECISIONS[name].hardware]
    return [AUTO, *fitting] if fitting else []


def candidates(save_mode: str, hardware: str, dtype: str, task: Type[Task]) -> Tuple[str, ...]:
    """What is tried for the configured dtype, in order: by a rule, so that equal machines build equal archives."""
    return WRITERS[save_mode].auto(task, hardware) if dtype == AUTO else (dtype,)


def lowered(save_mode: str, hardware: str, original: Original, dtype: str, texts: Sequence[str]) -> Iterable[Original]:
    """The models to be written in this dtype, in turn; as it is, where the hardware's own compiler makes the dtype."""
    if hardware in PRECISIONS[dtype].by_compiler:
        return [replace(original, dtype=dtype)]
    return WRITERS[save_mode].lowered(original, dtype, texts)


def options(save_mode: str, hardware: str) -> Dict[str, Parameter]:
    """The options of a writer for this hardware, by name."""
    own = WRITERS[save_mode].options
    return {item.parameter.name: item.parameter for item in own if hardware in (item.hardware or (hardware,))}


def refused_option(save_mode: str, hardware: str, given: Mapping[Any, Any]) -> Optional[str]:
    """Why one of these options cannot be, and what can; None where all can."""
    known = options(save_mode, hardware)
    for name, value in given.items():
        if name not in known:
            owners = [mode for mode, writer in WRITERS.items() if any(name == o.parameter.name for o in writer.options)]
            belongs = f"; it belongs to {', '.join(owners)}" if owners else ""
            listed = ", ".join(known) or "none"
            return f"options: save_mode {save_mode} on {hardware} has no option {name}, but {listed}{belongs}"
        if not known[name].accepts(value):
            return f"options: {name} should be {known[name].legal}, not {json.dumps(value)}"
    return None


def target(save_mode: str, hardware: str, given: Mapping[str, Any]) -> Target:
    """What is asked of the writer, defaults included."""
    own = options(save_mode, hardware)
    return Target(hardware, {name: given.get(name, parameter.default) for name, parameter in own.items()})
