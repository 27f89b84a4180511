"""The save mode pretrained: a transformers checkpoint, its configuration and its weights as safetensors."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, Tuple, Type

import torch
from traceserve_runtime.errors import reason
from traceserve_runtime.runtimes.caches import FIXED_STATES
from traceserve_runtime.runtimes.pretrained import IN_FLOAT32, KEEPS_PAST, OLDEST, OLDEST_NAMED
from traceserve_runtime.versions import release_of

from traceserve.building.checkpoints.original import Original
from traceserve.building.config.save_modes import Target
from traceserve.building.writers.contract import Written, check_differentiable
from traceserve.building.writers.lowering import precision
from traceserve.building.writers.tracing.loops import loop_graphs
from traceserve.building.writers.tracing.replacing import replaced
from traceserve.building.writers.tracing.wrapping import example, once
from traceserve.errors import ExportError, UnwritableError

if TYPE_CHECKING:
    from traceserve_runtime.manifest import Manifest, Shapes
    from traceserve_runtime.tasks.contract import Task
    from transformers import PreTrainedModel

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 8


def check(dtype: str, target: Target) -> None:
    """Raise ExportError if this machine cannot load the result like a worker, as the gate does."""
    import transformers

    precision.check_processor(dtype)
    if release_of(transformers.__version__) < OLDEST:
        raise ExportError(
            f"save_mode pretrained needs transformers {OLDEST_NAMED} or newer, this is {transformers.__version__}"
        )
    if target.options["torch_compile"] and not hasattr(torch, "compile"):
        raise ExportError(f"options: torch_compile needs torch 2, this is {torch.__version__}; leave it out")


def write(original: Original, task: Type[Task], shapes: Shapes, folder: Path, target: Target) -> Written:
    """Write `folder/model.safetensors` and `folder/config.json`; see Writer.

    Raises UnwritableError with the model's own reason if its task cannot run it.
    """
    try:
        with torch.no_grad(), precision.tracing(original.dtype):
            step_inputs, facts = _step_inputs(original, task, not target.options["torch_compile"])
    except ExportError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
        raise UnwritableError(f"{type(original.model).__name__} cannot be run: {reason(error)}") from error
    with tempfile.TemporaryDirectory(prefix=".saving.", dir=folder) as scratch, _own_configs(original.model):
        original.model.save_pretrained(scratch, max_shard_size=1 << 50)  # one file
        for name in (MODEL_FILE, CONFIG_FILE):
            os.replace(Path(scratch, name), folder / name)
    runtime = {"auto_model": task.auto_model, "loop": task.loop, IN_FLOAT32: list(original.kept), **facts}
    return Written(step_inputs, (CONFIG_FILE,), {**runtime, **target.options})


def gradients(original: Original, manifest: Manifest, folder: Path) -> Tuple[str, ...]:
    """Write nothing: the model itself has gradients, and the gate looks at them; see Writer."""
    check_differentiable(manifest.dtype)
    return ()


def _step_inputs(original: Original, task: Type[Task], with_fixed: bool) -> Tuple[Tuple[str, ...], Dict[str, object]]:
    """Return the inputs of a loop's step, and what its reader has to know: whether it reads only new tokens, and states of a
    fixed size, if `with_fixed`.

    The model is called once, so that a missing output is found here.
    """
    if task.loop:
        _, step = loop_graphs(original, EXAMPLE_BATCH, EXAMPLE_LENGTH, with_fixed)
        return step.inputs, {KEEPS_PAST: step.keeps_past, **({FIXED_STATES: step.fixed} if step.fixed else {})}
    module = once(original, [output.name for output in task.outputs])
    module(*example(original, EXAMPLE_BATCH, min(EXAMPLE_LENGTH, original.max_length)))
    return (), {}


@contextlib.contextmanager
def _own_configs(model: PreTrainedModel) -> Iterator[None]:
    """Save a model without side effects on it.

    transformers 4.57 removes generation parameters from a saved configuration, and every version refuses to save an
    invalid generation configuration; the worker reads none.
    """
    import transformers

    empty: Any = transformers.GenerationConfig
    others = {"config": copy.deepcopy(model.config)}
    if hasattr(model, "generation_config"):
        others["generation_config"] = empty()
    with replaced(model, **others):
        yield
