"""Refuses invalid combinations in a configuration before anything is downloaded."""

from __future__ import annotations

from traceserve_runtime.tasks import TASKS

from traceserve.building.config import choosing, formats, libraries
from traceserve.building.config.hardware import FIXED_SHAPES
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import ConfigError


def check_any_task(config: SetupConfig) -> None:
    """Refuse, before the task is known, combinations that are invalid for every task."""
    refused = []
    for name in TASKS:
        try:
            check_together(config.model_copy(update={"task": name}))
            return
        except ConfigError as error:
            refused.append(error.message)
    alike = len(set(refused)) == 1
    raise ConfigError(refused[0] if alike else f"{refused[0]} (and no other task would do)")


def check_together(config: SetupConfig) -> None:
    """Refuse invalid combinations; before anything is downloaded, if the task is configured."""
    config = choosing.settled(config)
    task = TASKS[config.task]
    refusals = (
        formats.refusal(config.save_mode, config.hardware, config.dtype, task),
        formats.refused_option(config.save_mode, config.hardware, config.options),
        formats.refused_key(config.save_mode, config),
    )
    for refusal in refusals:
        if refusal is not None:
            raise ConfigError(refusal)
    lengths = config.sequence_lengths
    if isinstance(lengths, list) and config.max_length not in (None, lengths[-1]):
        raise ConfigError(
            f"sequence_lengths ends at {lengths[-1]}, but max_length is {config.max_length}; they must agree"
        )
    libraries.check_library(config.library, task, config.save_mode, config.gguf_file)
    if task.loop and lengths != "auto" and config.hardware not in FIXED_SHAPES:
        raise ConfigError(f"sequence_lengths has no meaning for {config.task}, whose texts grow token by token")
    if config.long_inputs == "window" and not task.merges_windows:
        raise ConfigError(f"long_inputs is window, but {config.task} cannot merge windows; use truncate or reject")
    known = {parameter.name: parameter for parameter in task.parameters}
    for name, value in config.parameters.items():
        if name not in known:
            raise ConfigError(f"parameters: {config.task} has no parameter {name}, but {', '.join(known) or 'none'}")
        if not known[name].accepts(value):
            raise ConfigError(f"parameters: {name} should be {known[name].legal}, not {formats.as_written(value)}")
    if config.index_to_name is not None and not task.labelled:
        raise ConfigError(f"index_to_name has no meaning for the task {config.task}, which has no labels")
