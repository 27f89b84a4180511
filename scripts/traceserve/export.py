"""setup_config.json to a verified artifact: fetch, load, write, verify."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

from traceserve_runtime import __version__
from traceserve_runtime.manifest import Manifest, Shapes, Source, sha256
from traceserve_runtime.tasks import TASKS

from traceserve import loading, samples, sources
from traceserve.config import Loaded, SetupConfig
from traceserve.errors import DriftError, ExportError
from traceserve.loading import Original
from traceserve.verification import Findings, Progress, verify
from traceserve.writers import WRITERS

SERVING_FILE = "model-config.yaml"


@dataclass(frozen=True)
class Exported:
    """What was made, for the table at the end."""

    manifest: Manifest
    findings: Findings
    parameters: int  # of the model
    note: Optional[str]  # of the checkpoint


def export(
    loaded: Loaded,
    name: str,
    folder: Path,
    progress: Progress,
    samples_file: Optional[Path] = None,
    allow_drift: bool = False,
) -> Exported:
    """Write the artifact called `name` into `folder`, an empty one; raises TraceserveError, DriftError from the gate.

    Where the configuration leaves the shapes open, the widest ones that the gate proves are taken. If it proves none,
    `allow_drift` takes those that change the fewest answers; what cannot be run at all is never exported.
    """
    with loading.quiet():
        return _export(loaded, name, folder, progress, samples_file, allow_drift)


def _export(
    loaded: Loaded, name: str, folder: Path, progress: Progress, samples_file: Optional[Path], allow_drift: bool
) -> Exported:
    config = loaded.config
    task = TASKS[config.task]
    own_samples = samples.read(samples_file, task) if samples_file else []
    progress("fetching the checkpoint", 0, 0)
    checkpoint = sources.fetch(config, loaded.folder)
    progress("loading the original", 0, 0)
    original = loading.load(config, checkpoint, loaded.folder)
    source = checkpoint.source(config)

    def write(shapes: Shapes) -> Manifest:
        return _write(config, source, original, shapes, name, folder, progress)

    def finish(manifest: Manifest, findings: Findings) -> Exported:
        receipt = {**findings.receipt(), "drift_allowed": not findings.passed}
        manifest = replace(manifest, receipt=receipt)
        manifest.write(folder)
        parameters = sum(parameter.numel() for parameter in original.model.parameters())
        return Exported(manifest, findings, parameters, checkpoint.note)

    refused: List[ExportError] = []
    drifted: List[Tuple[Findings, Shapes]] = []
    candidates = [Shapes()] if task.loop else candidate_shapes(config, original.max_length)
    for shapes in candidates:
        try:
            manifest = write(shapes)
        except ExportError as error:
            refused.append(error)  # a model that cannot be traced at one length may be at another
            continue
        findings = verify(folder, original, own_samples, progress)
        if findings.passed:
            return finish(manifest, findings)
        drifted.append((findings, shapes))
    runnable = [(findings, shapes) for findings, shapes in drifted if findings.failure is None]
    if allow_drift and runnable:
        findings, shapes = min(runnable, key=lambda item: (len(item[0].changed), item[0].largest_difference))
        return finish(write(shapes), findings)
    if drifted:
        findings, shapes = drifted[0]
        raise DriftError(_drift(shapes, original), findings)
    raise refused[0]


def _drift(shapes: Shapes, original: Original) -> str:
    return (
        f"the exported model does not answer as the original does (at {describe(shapes, original.max_length)}), so nothing "
        "was written; --allow-drift exports it all the same, and records it"
    )


def candidate_shapes(config: SetupConfig, max_length: int) -> Iterator[Shapes]:
    """What to try, widest first: one graph for every shape, then one for each of a few, then also for each batch."""
    lengths = config.sequence_lengths
    if lengths == "auto":
        yield Shapes()
        few = tuple(sorted({n for n in (16, 32, 64, 128, 256, 512) if n < max_length} | {max_length}))
    else:
        few = (max_length,) if lengths == "fixed" else tuple(lengths)
        yield Shapes(few)
    yield Shapes(few, graph_per_shape=True)
    yield Shapes(few, (1, 4, 16), graph_per_shape=True)


def describe(shapes: Shapes, max_length: int) -> str:
    """The allowed shapes in words."""
    if shapes.lengths is None:
        lengths = f"any length up to {max_length}"
    else:
        lengths = "length " + ", ".join(map(str, shapes.lengths))
    batches = "any batch" if shapes.batches is None else "batch " + ", ".join(map(str, shapes.batches))
    return f"{lengths}, {batches}" + (", a graph for each" if shapes.graph_per_shape else "")


def _write(
    config: SetupConfig,
    source: Source,
    original: Original,
    shapes: Shapes,
    name: str,
    folder: Path,
    progress: Progress,
) -> Manifest:
    """Everything of the artifact but the receipt."""
    progress(f"writing {config.save_mode} ({describe(shapes, original.max_length)})", 0, 0)
    task = TASKS[config.task]
    writer = WRITERS[config.save_mode]
    outputs = tuple(output.name for output in task.outputs)
    try:
        step_inputs = writer.write(original, task, shapes, folder)
    except KeyError as error:
        raise ExportError(
            f"{type(original.model).__name__} gives no {error.args[0]}, which {config.task} reads"
        ) from error
    original.write_tokenizer(folder)
    (folder / SERVING_FILE).write_text(_serving(config), encoding="utf-8")
    files = (writer.model_file, original.tokenizer_facts.file, SERVING_FILE)
    manifest = Manifest(
        name=name,
        task=config.task,
        save_mode=config.save_mode,
        hardware=config.hardware,
        model_file=writer.model_file,
        inputs=original.inputs,
        outputs=outputs,
        step_inputs=step_inputs,
        dtype="float32",
        max_length=original.max_length,
        shapes=shapes,
        long_inputs=config.long_inputs or ("window" if task.merges_windows else "reject"),
        max_rows=config.max_rows,
        labels=original.labels,
        tokenizer=original.tokenizer_facts,
        parameters=original.parameters,
        facts=original.facts,
        source=source,
        versions=_versions(),
        files={file: sha256(folder / file) for file in sorted(files)},
    )
    manifest.write(folder)
    return manifest


def _serving(config: SetupConfig) -> str:
    """model-config.yaml, which TorchServe reads from the archive.

    Both timeouts always: any YAML makes its own defaults win over config.properties. No worker counts: here they would
    win over what the server is started with.
    """
    settings: Dict[str, int] = {
        "batchSize": config.batch_size,
        "maxBatchDelay": config.max_batch_delay,
        "responseTimeout": config.response_timeout,
        "startupTimeout": 300,
    }
    return "".join(f"{key}: {value}\n" for key, value in settings.items())


def _versions() -> Dict[str, str]:
    import tokenizers
    import torch
    import transformers

    return {
        "traceserve": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
