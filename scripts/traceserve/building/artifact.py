"""Writes an artifact's files: the writer's model, the tokenizer, the serving configuration and the manifest."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Dict

from traceserve_runtime import __version__
from traceserve_runtime.manifest import Manifest, Shapes, Source, sha256
from traceserve_runtime.tasks import TASKS

from traceserve.archives.model_config import SERVING_FILE, Serving
from traceserve.archives.shapes_in_words import describe_shapes
from traceserve.building.checkpoints import adapters
from traceserve.building.checkpoints.original import Original
from traceserve.building.config import formats, libraries
from traceserve.building.config.save_modes import Target
from traceserve.building.config.setup_config import SetupConfig
from traceserve.building.progress import Progress
from traceserve.building.writers import WRITERS
from traceserve.errors import ExportError, UnwritableError
from traceserve.machine import space


def write_artifact(
    config: SetupConfig,
    source: Source,
    original: Original,
    shapes: Shapes,
    name: str,
    folder: Path,
    progress: Progress,
    rehearsal: bool = False,
) -> Manifest:
    """Write the artifact without its receipt; as a rehearsal, the same graphs for this machine's CPU."""
    progress(f"writing {config.save_mode} in {original.dtype} ({describe_shapes(shapes, original.max_length)})", 0, 0)
    target = target_of(config)._replace(rehearsal=rehearsal)
    task = TASKS[config.task]
    writer = WRITERS[config.save_mode]
    outputs = tuple(output.name for output in task.outputs)
    parameters = sum(tensor.numel() * tensor.element_size() for tensor in original.model.parameters())
    try:
        with space.Needed(folder, parameters, f"the model in {config.save_mode}"):
            written = writer.write(original, task, shapes, folder, target)
    except KeyError as error:
        if error.args[0] not in outputs:
            raise
        raise ExportError(
            f"{type(original.model).__name__} gives no {error.args[0]}, which {config.task} reads"
        ) from error
    except UnwritableError as error:
        raise UnwritableError(error.message + formats.advice(config)) from error
    original.write_tokenizer(folder)
    arrays = original.write_arrays(folder)
    (folder / SERVING_FILE).write_text(_serving(config), encoding="utf-8")
    facts = original.tokenizer_facts
    tokenizer = (facts.file, *([facts.pieces] if facts.pieces else ()))
    files = (writer.model_file, *written.files, *arrays, *tokenizer, SERVING_FILE)
    manifest = Manifest(
        name=name,
        task=config.task,
        save_mode=config.save_mode,
        hardware="cpu" if rehearsal else config.hardware,
        model_file=writer.model_file,
        inputs=original.inputs,
        outputs=outputs,
        step_inputs=written.step_inputs,
        dtype=original.dtype,
        max_length=original.max_length,
        shapes=shapes,
        long_inputs=config.long_inputs or ("window" if task.merges_windows else "reject"),
        max_rows=config.max_rows,
        labels=original.labels,
        tokenizer=facts,
        parameters=original.parameters,
        facts={**original.facts, **written.facts},
        source=source,
        versions={**_versions(config, source), **written.versions},
        files={file: sha256(folder / file) for file in sorted(files)},
        runtime=written.runtime,
        version=config.version,
    )
    manifest.write(folder)
    return manifest


def _serving(config: SetupConfig) -> str:
    """Return model-config.yaml, which TorchServe reads from the archive; `traceserve tune` adds its results."""
    serving = Serving(
        config.batch_size,
        config.max_batch_delay,
        config.response_timeout,
        client_timeout=config.client_timeout,
        continuous_batching=config.continuous_batching or None,
        pack_weights=config.pack_weights,
        explain_seconds=config.explain_seconds,
    )
    return serving.to_yaml()


def _versions(config: SetupConfig, source: Source) -> Dict[str, str]:
    import tokenizers
    import torch
    import transformers

    packages = libraries.packages(config.library, config.gguf_file)
    packages += adapters.PACKAGES if source.base is not None else ()
    return {
        "traceserve": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        **{package: metadata.version(package) for package in packages},
    }


def target_of(config: SetupConfig) -> Target:
    """Return the writer's target."""
    return formats.target(config.save_mode, config.hardware, config.options)
