"""The choice of `"save_mode": "auto"`: by a rule over the processor and the installed packages, so that equal machines
build equal archives."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, NamedTuple, Optional

from traceserve_runtime import processor
from traceserve_runtime.tasks import TASKS

from traceserve.building.config import formats
from traceserve.building.config.dtypes import AUTO
from traceserve.building.config.libraries import LIBRARIES

if TYPE_CHECKING:  # pydantic takes a fifth of a second
    from traceserve.building.config.setup_config import SetupConfig

USUAL = "torchscript"
# The fastest of all in int8, and no faster than the usual one in other dtypes (docs/measurements.md).
IN_INT8 = "openvino"
_PACKAGES = ("openvino", "nncf")  # with which it is built in int8


class Choice(NamedTuple):
    """A save mode, and why `auto` takes it."""

    save_mode: str
    reason: str


def choose(config: SetupConfig) -> Choice:
    """Return `auto`'s save mode for this configuration, whose task is known."""
    reason = _why_usual(config)
    if reason is not None:
        return Choice(USUAL, reason)
    installed = f"{' and '.join(_PACKAGES)} are installed"
    if TASKS[config.task].loop:
        return Choice(IN_INT8, f"{installed}, and only its loops have int8 weights")
    lacking = "" if config.dtype == "int8" else " and no bfloat16"
    return Choice(IN_INT8, f"{installed}, and this processor has {_names('int8')}{lacking}")


def settled(config: SetupConfig) -> SetupConfig:
    """Return the configuration, whose task is known, with its real save mode in place of `auto`."""
    return config.model_copy(update={"save_mode": choose(config).save_mode}) if config.save_mode == AUTO else config


def _why_usual(config: SetupConfig) -> Optional[str]:
    """Return why int8 in another save mode is not possible here or not worth it; None if it is taken."""
    reason = formats.impossible(IN_INT8, config.hardware, (config.task,))
    if reason is not None:
        return f"{IN_INT8} {reason}"
    written = LIBRARIES[config.library].save_modes
    if written is not None and IN_INT8 not in written:
        return f"{IN_INT8} is not for models of library {config.library}"
    if config.dtype not in (AUTO, "int8"):
        return f"{IN_INT8} is faster in int8, not in {config.dtype}"
    if config.dtype == AUTO and TASKS[config.task].loop:
        return f"{config.task} stays in float32, unless it is asked for another dtype"
    if config.dtype == AUTO and not TASKS[config.task].auto_int8:
        return f"{config.task} is not rounded to int8, unless it is asked for"
    if not processor.is_x86():
        return f"{IN_INT8}'s int8 was measured on x86 alone"
    if not processor.native("int8") and not TASKS[config.task].loop:
        return "this processor has neither VNNI nor AMX"
    if config.dtype == AUTO and "bfloat16" in formats.candidates(USUAL, config.hardware, AUTO, TASKS[config.task]):
        return f"this processor has {_names('bfloat16')}"
    missing = [name for name in _PACKAGES if not _installed(name)]
    if missing:
        return f"{' and '.join(missing)} not installed; pip install 'traceserve[{IN_INT8}]' for int8 on this processor"
    return None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _names(dtype: str) -> str:
    """Return the processor's features for a dtype."""
    return ", ".join(sorted(processor.NATIVE[dtype] & processor.features()))
