"""Exports setup_config.json to a verified artifact: fetch, load, write, verify."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

from traceserve_runtime.manifest import Manifest, Source
from traceserve_runtime.runtimes import torch_internals
from traceserve_runtime.runtimes.modes import differentiable
from traceserve_runtime.tasks import TASKS

from traceserve.building import artifact, explaining
from traceserve.building.attempt import AcceptedArtifact, Attempt
from traceserve.building.checkpoints import licenses, loading, sources
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.original import Original
from traceserve.building.checkpoints.seeding import seeded
from traceserve.building.checkpoints.unread_weights import UNREAD_WEIGHTS
from traceserve.building.config import choosing, formats
from traceserve.building.config.dtypes import AUTO
from traceserve.building.config.hardware import FIXED_SHAPES
from traceserve.building.config.parsing import LoadedConfig
from traceserve.building.config.setup_config import SetupConfig
from traceserve.building.exported import Candidate, Compared, Exported
from traceserve.building.gate.golden import with_golden_set
from traceserve.building.gate.reference import Reference
from traceserve.building.gate_options import GateOptions
from traceserve.building.products import PRODUCTS_KEY, count_products
from traceserve.building.progress import Progress
from traceserve.building.writers import WRITERS
from traceserve.building.writers.lowering import precision
from traceserve.errors import ExportError
from traceserve.machine import neuron_cores, space

# Of a process: a build seeds its random numbers, and replaces functions of torch while it traces.
_ONE_AT_A_TIME = threading.RLock()


@dataclass
class Shared:
    """What several exports of one configuration have in common, which differ in save mode and dtype: the checkpoint, its record,
    and the original with its outputs. The first of them adds what is missing."""

    checkpoint: Optional[Checkpoint] = None
    source: Optional[Source] = None
    reference: Optional[Reference] = None


def export(
    loaded: LoadedConfig,
    name: str,
    folder: Path,
    progress: Progress,
    gate: GateOptions = GateOptions(),
    shared: Optional[Shared] = None,
    measure: bool = True,
) -> Exported:
    """Write the artifact `name` into `folder`, an empty one; raises TraceserveError, DriftError from the gate.

    If the configuration leaves the dtype open, the first candidate that passes is taken, fastest first. If it leaves
    the shapes open, the widest that pass are taken. If none passes and the artifact may drift, those are taken that change
    the fewest answers; artifacts that cannot run are never exported. With `measure`, the speed of one that is to be faster than
    another save mode's is measured beside that. Another thread's export waits for this one's end.
    """
    with _ONE_AT_A_TIME, differentiable(), _settings_kept(), loading.quiet_transformers(), seeded(), _frozen_objects():
        return _export(loaded, name, folder, progress, gate, shared or Shared(), measure)


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    """Give the process's settings back that readers and libraries change: TorchScript's profiling, and Python's recursion."""
    limit, profiling = sys.getrecursionlimit(), torch_internals.set_profiling(True)
    torch_internals.set_profiling(profiling)
    try:
        yield
    finally:
        torch_internals.set_profiling(profiling)
        sys.setrecursionlimit(limit)


@contextlib.contextmanager
def _frozen_objects() -> Iterator[None]:
    """Let garbage collections look at new objects alone: each trace is saved after one, and libraries have a million."""
    mine = not gc.get_freeze_count()
    if mine:
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


def _export(
    loaded: LoadedConfig,
    name: str,
    folder: Path,
    progress: Progress,
    gate: GateOptions,
    shared: Shared,
    measure: bool,
) -> Exported:
    config, checkpoint = _fetched(loaded, progress, shared)
    own_samples = gate.samples.requests(TASKS[config.task]) if gate.samples else []
    reference = _reference(config, checkpoint, loaded.folder, progress, shared)
    original = reference.original
    explaining.check_embedding_name(config, original)
    attempt = Attempt(config, _source(config, checkpoint, shared), reference, name, own_samples, progress)
    chosen, tried, compared = _chosen(attempt, folder, gate.allow_drift, measure)
    because = choosing.choose(config).reason if loaded.config.save_mode == AUTO else ""
    receipt = {
        **chosen.manifest.receipt,
        "candidates": [candidate.receipt() for candidate in tried],
        "license": licenses.license_of(checkpoint),
        **_products(original, config.task),
        **({UNREAD_WEIGHTS: original.weights_note} if original.weights_note else {}),
        **({"save_mode_because": because} if because else {}),
    }
    progress("writing the golden set", 0, 0)
    kept = own_samples if gate.keep_samples else ()
    runs_here = config.hardware not in FIXED_SHAPES or bool(neuron_cores.count(config.hardware))
    manifest, p50 = with_golden_set(folder, replace(chosen.manifest, receipt=receipt), reference, kept, runs_here)
    manifest.write(folder)
    parameters = sum(parameter.numel() for parameter in original.model.parameters())
    note, found = _note(config, checkpoint, original, manifest), checkpoint.task_found
    return Exported(manifest, chosen.findings, parameters, note, found, tuple(tried), compared, p50, because)


def _source(config: SetupConfig, checkpoint: Checkpoint, shared: Shared) -> Source:
    """Return the checkpoint's record, with the SHA-256 of each file."""
    if shared.source is None:
        shared.source = checkpoint.source(config)
    return shared.source


def _reference(
    config: SetupConfig, checkpoint: Checkpoint, config_folder: Path, progress: Progress, shared: Shared
) -> Reference:
    """Return the original with its outputs, which the first export that shares it loads."""
    if shared.reference is None:
        progress("loading the original", 0, 0)
        shared.reference = Reference(loading.load_original(config, checkpoint, config_folder))
    return shared.reference


def _chosen(
    attempt: Attempt, folder: Path, allow_drift: bool, measure: bool
) -> Tuple[AcceptedArtifact, List[Candidate], Optional[Compared]]:
    """Put the artifact that passes into `folder`; return it, what became of each candidate, and, to `measure` it, its speed
    beside another save mode's."""
    with tempfile.TemporaryDirectory(prefix=".candidates.", dir=folder.parent) as scratch:
        chosen, tried = _first_that_passes(attempt, folder, Path(scratch), allow_drift)
        compared = attempt.compared(chosen, Path(scratch)) if measure else None
        if chosen.folder != folder:
            for file in chosen.folder.iterdir():
                os.replace(file, folder / file.name)
    return chosen, tried, compared


def _products(original: Original, task: str) -> Dict[str, object]:
    """Return the receipt's entry on the model's products of matrices, if they can be counted."""
    counted = count_products(original, task)
    return {} if counted is None else {PRODUCTS_KEY: counted}


def _note(config: SetupConfig, checkpoint: Checkpoint, original: Original, manifest: Manifest) -> Optional[str]:
    """Return all notes on the checkpoint, the original, the save mode and the gradients, a line each."""
    of_writer = WRITERS[config.save_mode].note(artifact.target_of(config))
    notes = (checkpoint.note, original.note, of_writer, explaining.note_on_gradients(config, manifest))
    return "\n".join(note for note in notes if note) or None


def _fetched(loaded: LoadedConfig, progress: Progress, shared: Shared) -> Tuple[SetupConfig, Checkpoint]:
    """Return the configuration with its task and save mode, which it may leave to the checkpoint, and that."""
    config = _settled(loaded.config)
    if shared.checkpoint is None:
        progress("fetching the checkpoint", 0, 0)
        shared.checkpoint = sources.fetch_checkpoint(config, loaded.folder)
    checkpoint = shared.checkpoint
    config = config.model_copy(update={"task": checkpoint.task})
    return (_settled(config) if config.save_mode == AUTO else config), checkpoint


def _first_that_passes(
    attempt: Attempt, folder: Path, scratch: Path, allow_drift: bool
) -> Tuple[AcceptedArtifact, List[Candidate]]:
    """Return the artifact of the first dtype that passes, in `folder` if there is one to try, and what became of each."""
    config, original = attempt.config, attempt.reference.original
    dtypes = formats.candidates(config.save_mode, config.hardware, config.dtype, TASKS[config.task])
    if len(dtypes) > 1:
        dtypes = tuple(dtype for dtype in dtypes if precision.changes(original, dtype, config.hardware))
    tried: List[Candidate] = []
    for dtype in dtypes:
        last = dtype == dtypes[-1]
        place = scratch / dtype if len(dtypes) > 1 else folder
        place.mkdir(exist_ok=True)
        try:
            chosen = replace(attempt, allow_drift=allow_drift and last).make(dtype, place)
        except ExportError as error:
            if last:
                raise
            tried.append(Candidate(dtype, getattr(error, "findings", None), error.message))
        else:
            tried.append(Candidate(dtype, chosen.findings, size=space.size([place])))
            break
    return chosen, tried


def _settled(config: SetupConfig) -> SetupConfig:
    """Return the configuration with the save mode that `auto` takes, if the task is known; raises ExportError if this
    machine cannot write it."""
    if config.task in TASKS:
        config = choosing.settled(config)
    if config.save_mode != AUTO:
        WRITERS[config.save_mode].check(config.dtype, artifact.target_of(config))
    return config
