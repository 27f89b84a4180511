"""Builds a checkpoint in every save mode and dtype that work here, through the gate, and measures each.

Each build gets a temporary folder, and its figures come from a process of its own (`engine_figures`) with the same
threads and requests.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Iterator, NamedTuple, Optional, Sequence, Tuple

from traceserve_runtime import processor
from traceserve_runtime.engine import load_task
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Request

from traceserve.archives import staging
from traceserve.building.checkpoints import sources
from traceserve.building.config import choosing, formats
from traceserve.building.config.dtypes import DTYPES
from traceserve.building.config.libraries import LIBRARIES
from traceserve.building.config.parsing import LoadedConfig
from traceserve.building.config.save_modes import SAVE_MODES
from traceserve.building.config.setup_config import SetupConfig
from traceserve.building.export import Shared, export
from traceserve.building.gate.corpus import sentences
from traceserve.building.gate.findings import Findings
from traceserve.building.gate_options import GateOptions
from traceserve.building.progress import Progress
from traceserve.building.samples import OwnSamples
from traceserve.errors import ExportError, UnaskableError, last_line
from traceserve.machine import space
from traceserve.measuring import engine_figures
from traceserve.measuring.engine_figures import EngineFigures

_MOST, _MOST_WRITTEN = 256, 16  # requests per round, and of a task that writes text


class ComparedFormat(NamedTuple):
    """A save mode and dtype: its figures, or why it was refused or cannot be measured; `bytes` of the artifact, answers
    changed of `answers`, or what the gate counted instead, by its name."""

    save_mode: str
    dtype: str
    refused: str = ""
    bytes: int = 0
    changed: int = 0
    answers: int = 0
    figures: Optional[EngineFigures] = None
    counted: str = "answers"  # or "tokens" along the original's texts in a lower precision, or whole "texts"


def possible_formats(config: SetupConfig) -> Sequence[Tuple[str, str]]:
    """Return the save modes and dtypes that are legal for this configuration, whose task is known."""
    written = LIBRARIES[config.library].save_modes
    return [
        (save_mode, dtype)
        for save_mode in SAVE_MODES
        for dtype in DTYPES
        if formats.refusal(save_mode, config.hardware, dtype, TASKS[config.task]) is None
        and formats.refused_key(save_mode, config) is None
        and (written is None or save_mode in written)
    ]


def compared_formats(
    loaded: LoadedConfig, progress: Progress, samples_file: Optional[Path] = None
) -> Iterator[ComparedFormat]:
    """Yield each save mode and dtype, once it is built and measured; raises TraceserveError for an invalid checkpoint."""
    config = loaded.config
    gate = GateOptions(OwnSamples.read(samples_file) if samples_file else None)  # before anything is downloaded
    progress("fetching the checkpoint", 0, 0)
    checkpoint = sources.fetch_checkpoint(config, loaded.folder)
    shared = Shared(checkpoint)
    config = choosing.settled(config.model_copy(update={"task": checkpoint.task}))
    task = TASKS[config.task]
    own = gate.samples.requests(task) if gate.samples else []
    for save_mode, dtype in possible_formats(config):
        options = config.options if save_mode == config.save_mode else {}
        one = config.model_copy(update={"save_mode": save_mode, "dtype": dtype, "options": options})
        with staging.scratch() as scratch:
            folder = scratch / "compared"
            folder.mkdir()
            try:
                loaded_one = loaded._replace(config=one)
                made = export(loaded_one, folder.name, folder, progress, gate, shared, measure=False)
                progress(f"measuring {save_mode} in {dtype}", 0, 0)
                most = _MOST_WRITTEN if task.loop else _MOST
                figures = _measured(folder, own or load_task(folder, made.manifest).from_texts(sentences(most)))
            except UnaskableError:  # in every format
                raise
            except ExportError as error:
                yield ComparedFormat(save_mode, dtype, error.message)
                continue
            changed, counted = _changed(made.findings, bool(own), bool(task.loop))
            yield ComparedFormat(save_mode, dtype, "", space.size([folder]), *changed, figures, counted)


def _changed(found: Findings, own: bool, writes: bool) -> Tuple[Tuple[int, int], str]:
    """Return how many answers changed and of how many, the user's if there are some; or what the gate counts of texts."""
    if found.judged is not None:
        return (found.judged.changed, found.judged.tokens), "tokens"
    counts = (found.own_changed, found.own_answers) if own else (len(found.changed), found.answers)
    return counts, "texts" if writes else "answers"


def _measured(folder: Path, requests: Sequence[Request]) -> EngineFigures:
    """Return an artifact's figures, from a new process."""
    asked = requests[:: max(1, len(requests) // _MOST)][:_MOST]
    file = folder.parent / "requests.json"
    file.write_text(json.dumps([[dict(one.inputs), dict(one.parameters)] for one in asked]), encoding="utf-8")
    command = [sys.executable, "-m", engine_figures.__name__, str(folder), str(file), str(processor.cores())]
    # Not where the user is: Python imports from there first.
    result = subprocess.run(command, cwd=folder.parent, capture_output=True, encoding="utf-8", errors="replace")
    if result.returncode:
        raise ExportError(f"it cannot be measured: {last_line(result.stderr)}")
    return EngineFigures.from_json(json.loads(result.stdout.strip().splitlines()[-1]))
