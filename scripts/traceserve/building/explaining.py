"""Adds to an artifact what explanations need, if the model has gradients in its save mode and dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from traceserve_runtime.engine import NO_GRADIENTS
from traceserve_runtime.manifest import Manifest, sha256
from traceserve_runtime.tasks import TASKS

from traceserve.building.checkpoints.original import Original
from traceserve.building.config.setup_config import SetupConfig
from traceserve.building.gate import gradients
from traceserve.building.writers import WRITERS
from traceserve.building.writers.contract import NoGradients
from traceserve.errors import ExportError


def with_gradients(config: SetupConfig, manifest: Manifest, original: Original, folder: Path) -> Manifest:
    """Write the explaining graphs beside the model, and compare them with it; return the manifest with them, or with
    the reason why there are none."""
    if TASKS[manifest.task].explains is None:
        return manifest
    if config.captum_explanation is False:
        return _without(manifest, "it was built with captum_explanation false")
    try:
        written = WRITERS[manifest.save_mode].gradients(original, manifest, folder)
    except NoGradients as error:
        return _without(manifest, error.message)
    files = {**manifest.files, **{file: sha256(folder / file) for file in written}}
    made = replace(manifest, files=dict(sorted(files.items())), runtime={**manifest.runtime, NO_GRADIENTS: ""})
    made.write(folder)
    why = gradients.differs(folder)
    if why is None:
        return made
    for file in written:
        (folder / file).unlink()
    return _without(manifest, why)


def _without(manifest: Manifest, why: str) -> Manifest:
    return replace(manifest, runtime={**manifest.runtime, NO_GRADIENTS: why})


def note_on_gradients(config: SetupConfig, manifest: Manifest) -> Optional[str]:
    """Return what a configuration that asks for gradients should know where there are none."""
    if not config.captum_explanation:
        return None
    if TASKS[manifest.task].explains is None:
        return f"captum_explanation has no meaning here: answers of {manifest.task} are not explained"
    why = manifest.runtime.get(NO_GRADIENTS)
    return f"answers are explained by occlusion, without gradients: {why}" if why else None


def check_embedding_name(config: SetupConfig, original: Original) -> None:
    """Raise ExportError if `embedding_name` is not the model's word embeddings, or a part of it that holds them; without
    `captum_explanation` it is not read, as in the pytorch/serve example."""
    name = config.embedding_name
    if not name or not config.captum_explanation or TASKS[config.task].explains is None:
        return
    model: Any = original.model
    modules = dict(model.named_modules())
    own = model.get_input_embeddings()
    place = next((path for path, module in modules.items() if module is own), "none")
    if name not in modules or own not in set(modules[name].modules()):
        raise ExportError(
            f"embedding_name is {name}, but the word embeddings of {type(model).__name__} are {place}; leave embedding_name "
            f"out, or set it to {place}, or to {place.split('.')[0]} as in the pytorch/serve example"
        )
