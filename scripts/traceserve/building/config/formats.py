"""The valid combinations of save mode × hardware × dtype × task, from this folder's tables; and why others are
invalid."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Task
from traceserve_runtime.tasks.parameters import Parameter

from traceserve.building.config.dtypes import AUTO, DTYPES
from traceserve.building.config.hardware import HARDWARE, why_refused
from traceserve.building.config.libraries import LIBRARIES
from traceserve.building.config.save_modes import SAVE_MODES, Target

if TYPE_CHECKING:  # pydantic takes a fifth of a second
    from traceserve.building.config.setup_config import SetupConfig


class Format(NamedTuple):
    """The options of similar tasks with a save mode and hardware; `refused` says why other dtypes are invalid,
    or under "" why all are."""

    save_mode: str
    hardware: str
    tasks: Tuple[str, ...]
    dtypes: Tuple[str, ...]
    refused: Dict[str, str]


def refusal(save_mode: str, hardware: str, dtype: str, task: Type[Task]) -> Optional[str]:
    """Return why this cannot work, and what can; None if it can."""
    reason = impossible(save_mode, hardware, (task.name,))
    if reason is not None:
        others = [name for name in SAVE_MODES if impossible(name, hardware, (task.name,)) is None]
        return f"save_mode {save_mode} {reason}" + (f"; take {' or '.join(others)}" if others else "")
    legal = dtypes(save_mode, hardware, task)
    if dtype in legal:
        return None
    return f'dtype is "{dtype}": {_not_so(save_mode, hardware, dtype, (task.name,))}; take {", ".join(legal)}'


def others(config: SetupConfig) -> List[str]:
    """Return other save modes for the same hardware and dtype that may write a model which the configured one
    cannot."""
    task = TASKS[config.task]
    written = LIBRARIES[config.library].save_modes
    return [
        name
        for name in SAVE_MODES
        if name not in (config.save_mode, *SAVE_MODES[config.save_mode].fails_with)
        and (written is None or name in written)
        and refusal(name, config.hardware, config.dtype, task) is None
        and refused_key(name, config) is None
    ]


def advice(config: SetupConfig) -> str:
    """Return the end of a sentence that says why a model cannot be written in the configured save mode."""
    names = others(config)
    return f"; try save_mode {' or '.join(names)}" if names else ""


def impossible(save_mode: str, hardware: str, tasks: Sequence[str]) -> Optional[str]:
    """Return why a save mode cannot work in any dtype, for similar tasks; None if it can."""
    kind = SAVE_MODES[save_mode]
    if hardware not in kind.hardware:
        return f"runs on {', '.join(kind.hardware)}, not on {hardware}"
    if TASKS[tasks[0]].loop and not kind.loops:
        return f"is for models that are run once, not for {', '.join(tasks)}"
    return why_refused(hardware, tasks)


def _not_so(save_mode: str, hardware: str, dtype: str, tasks: Sequence[str]) -> str:
    """Return why this cannot work in this dtype, for similar tasks."""
    if not _has(save_mode, hardware, dtype):
        modes = [name for name in SAVE_MODES if _has(name, hardware, dtype)]
        if modes:
            return f"it is for save_mode {' or '.join(modes)} on {hardware}"
        return f"it runs on {', '.join((*DTYPES[dtype].of_weights, *DTYPES[dtype].hardware))}, not on {hardware}"
    if dtype not in SAVE_MODES[save_mode].dtypes:
        return f"save_mode {save_mode} has none"
    return f"it is for models that are run once, not for {', '.join(tasks)}"


def _has(save_mode: str, hardware: str, dtype: str) -> bool:
    """Return whether the hardware computes in this dtype, or the save mode has its weights in it there."""
    kind = DTYPES[dtype]
    return hardware in kind.hardware or hardware in kind.of_weights and SAVE_MODES[save_mode].reads_weights


def every_format() -> Iterator[Format]:
    """Yield all save modes on all hardware, in the order of their tables."""
    for save_mode, hardware in itertools.product(SAVE_MODES, HARDWARE):
        alike: Dict[Tuple[str, ...], List[str]] = {}
        for name, task in TASKS.items():
            alike.setdefault(tuple(dtypes(save_mode, hardware, task)), []).append(name)
        for legal, names in alike.items():
            yield Format(save_mode, hardware, tuple(names), legal, _refused(save_mode, hardware, names))


def _refused(save_mode: str, hardware: str, tasks: Sequence[str]) -> Dict[str, str]:
    reason = impossible(save_mode, hardware, tasks)
    if reason is not None:
        return {"": f"it {reason}"}
    legal = dtypes(save_mode, hardware, TASKS[tasks[0]])
    return {name: _not_so(save_mode, hardware, name, tasks) for name in DTYPES if name not in legal}


def dtypes(save_mode: str, hardware: str, task: Type[Task]) -> List[str]:
    """Return the legal dtypes for this task and hardware; empty if the combination is invalid."""
    kind = SAVE_MODES[save_mode]
    known = kind.loops if task.loop else kind.dtypes
    if impossible(save_mode, hardware, (task.name,)) is not None:
        return []
    fitting = [name for name in known if _has(save_mode, hardware, name)]
    return [AUTO, *fitting] if fitting else []


def candidates(save_mode: str, hardware: str, dtype: str, task: Type[Task]) -> Tuple[str, ...]:
    """Return the candidates for the configured dtype, in order: by a rule, so that equal machines build equal
    archives."""
    return SAVE_MODES[save_mode].auto(task, hardware) if dtype == AUTO else (dtype,)


def formats_document() -> Dict[str, object]:
    """Return everything as JSON."""
    return {
        "formats": [item._asdict() for item in every_format()],
        "options": [
            {"save_mode": save_mode, "hardware": hardware, "name": name, "legal": item.legal, "default": item.default}
            for save_mode, hardware in itertools.product(SAVE_MODES, HARDWARE)
            if hardware in SAVE_MODES[save_mode].hardware
            for name, item in options(save_mode, hardware).items()
        ],
    }


def options(save_mode: str, hardware: str) -> Dict[str, Parameter]:
    """Return a save mode's options for this hardware, by name."""
    own = SAVE_MODES[save_mode].options
    return {item.parameter.name: item.parameter for item in own if hardware in (item.hardware or (hardware,))}


def refused_option(save_mode: str, hardware: str, given: Mapping[object, object]) -> Optional[str]:
    """Return why one of these options is invalid, and what is valid; None if all are."""
    known = options(save_mode, hardware)
    for name, value in given.items():
        if name not in known:
            owners = [mode for mode, kind in SAVE_MODES.items() if any(name == o.parameter.name for o in kind.options)]
            belongs = f"; it belongs to {', '.join(owners)}" if owners else ""
            listed = ", ".join(known) or "none"
            return f"options: save_mode {save_mode} on {hardware} has no option {name}, but {listed}{belongs}"
        if not known[name].accepts(value):
            return f"options: {name} should be {known[name].legal}, not {as_written(value)}"
    return None


def as_written(value: object) -> str:
    """Return a configured value as JSON; as Python writes it if YAML has more than JSON there, such as a date as a key."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):
        return repr(value)


def refused_key(save_mode: str, config: SetupConfig) -> Optional[str]:
    """Return why a configured key is invalid with the save mode, and what is valid; None if all are."""
    return next((why for key, why in SAVE_MODES[save_mode].refuses.items() if getattr(config, key)), None)


def target(save_mode: str, hardware: str, given: Mapping[str, object]) -> Target:
    """Return the writer's target, including defaults."""
    own = options(save_mode, hardware)
    return Target(hardware, {name: given.get(name, parameter.default) for name, parameter in own.items()})
