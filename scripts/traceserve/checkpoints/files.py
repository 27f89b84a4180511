"""A checkpoint's folder: each file of it is read, known to be harmless, or refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from traceserve_runtime.tasks import TASKS

from traceserve.checkpoints import generation

if TYPE_CHECKING:
    from traceserve.config import SetupConfig
    from traceserve.sources import Checkpoint


def check(checkpoint: Checkpoint, config: SetupConfig) -> None:
    """Raise SourceError for what would change answers and cannot be followed."""
    if TASKS[config.task].loop:
        settings = checkpoint.read_json(generation.FILE)
        if settings is not None:
            generation.check(settings)
        else:
            generation.check_legacy(checkpoint.read_json("config.json"))
