"""The save mode torchscript: `torch.jit.trace`, and a file that plain `torch.jit.load` reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Collection, Dict, Optional, Tuple, Type

import torch
from traceserve_runtime.manifest import sha256
from traceserve_runtime.runtimes.caches import FIXED_STATES
from traceserve_runtime.runtimes.torchscript.reader import FILLED, UNPADDED

from traceserve.building.checkpoints.original import Original
from traceserve.building.config.hardware import FIXED_SHAPES, HARDWARE
from traceserve.building.config.save_modes import Target
from traceserve.building.writers.contract import Written
from traceserve.building.writers.lowering import precision
from traceserve.building.writers.neuron import writer as neuron
from traceserve.building.writers.torchscript import axes, other_device, unpadding, weights
from traceserve.building.writers.torchscript.unpadding import Unpadded
from traceserve.building.writers.tracing import torch_internals
from traceserve.building.writers.tracing.graphs import (
    MODEL_FILE,
    TRACED_BATCH,
    TRACED_LENGTH,
    together,
    trace,
    write_module,
)
from traceserve.building.writers.tracing.loops import LoopGraph, loop_graphs
from traceserve.building.writers.tracing.recurrences import recurrences_of_any_length
from traceserve.building.writers.tracing.wrapping import example, once, tracing_of

if TYPE_CHECKING:
    from traceserve_runtime.manifest import Manifest, Shapes
    from traceserve_runtime.tasks.contract import Task


def check(dtype: str, target: Target) -> None:
    """Raise ExportError if this processor cannot run the result, as the gate does."""
    if target.hardware in FIXED_SHAPES:
        neuron.check(target)
    else:
        precision.check_processor(dtype)


def note(target: Target) -> str:
    """Return which rewriting this torch does not support, at the cost of speed; see Writer."""
    if target.hardware in FIXED_SHAPES or torch_internals.unpads():
        return ""
    return (
        f"torch {torch.__version__} cannot rewrite graphs as this version of traceserve does, so the graph was written as "
        "traced: it gives the same answers, but computes padding too"
    )


def write(original: Original, task: Type[Task], shapes: Shapes, folder: Path, target: Target) -> Written:
    """Trace the model and write `folder/traced_model.pt`, and beside it its graph alone; see Writer.

    One graph, or one per shape, or for a looping model the graphs `start` and `step`; all with the
    same weights. Or a chip's compiled graphs, see `neuron.writer`. Raises ExportError with the model's own reason if it
    cannot be traced.
    """
    # A compiler lowers the dtype itself.
    dtype = "float32" if target.hardware in FIXED_SHAPES else original.dtype
    with tracing_of(original), precision.tracing(dtype):
        if target.hardware in FIXED_SHAPES:
            return neuron.write(original, task, shapes, folder, target)
        with recurrences_of_any_length(original.model):
            saved, step = _loop(original) if task.loop else (_single(original, task, shapes), None)
        write_module(saved, folder / MODEL_FILE)
    unpadded = (
        None if task.loop or shapes.graph_per_shape or not shapes.padded else _unpadded(original, folder / MODEL_FILE)
    )
    runtime: Dict[str, object] = {UNPADDED: unpadded is not None}
    if step is not None and step.fixed:
        runtime[FIXED_STATES] = step.fixed
    rewritten = None
    if unpadded is not None:
        rewritten, runtime[FILLED] = unpadded
    if HARDWARE[target.hardware].beside_cpu:
        runtime["ran_on_meta"] = other_device.prove(folder / MODEL_FILE, _examples(original, task, shapes))
    return Written(step.inputs if step is not None else (), weights.write_graph(folder, MODEL_FILE, rewritten), runtime)


def _unpadded(original: Original, file: Path) -> Optional[Unpadded]:
    """Return the graph that a worker on a CPU runs instead of the traced one; None if there is none."""
    if original.max_length < max(length for _, length in axes.SHAPES) or original.shortest > 5:
        return None
    shapes = [*axes.SHAPES, (1, 5), (5, min(20, original.max_length))]
    examples = [example(original, batch, length) for batch, length in shapes]
    reads_first = original.tokenizer_facts.padding_side == "right"
    return unpadding.unpadded(file, original.inputs, examples, original.dtype, reads_first)


def plainer(manifest: Manifest, folder: Path, failing: Collection[str]) -> Optional[Manifest]:
    """Return the artifact with the traced graph instead of the rewritten one; None without one; see Writer."""
    if not manifest.runtime.get(UNPADDED) or MODEL_FILE in failing:
        return None
    written = weights.write_graph(folder, MODEL_FILE)
    files = {**manifest.files, **{file: sha256(folder / file) for file in written}}
    others = {key: value for key, value in manifest.runtime.items() if key != FILLED}
    made = replace(manifest, files=files, runtime={**others, UNPADDED: False})
    made.write(folder)
    return made


def _single(original: Original, task: Type[Task], shapes: Shapes) -> torch.nn.Module:
    module = once(original, [output.name for output in task.outputs])
    any_length = min(TRACED_LENGTH, original.max_length)
    if not shapes.graph_per_shape:
        return trace(module, example(original, TRACED_BATCH, max(shapes.lengths) if shapes.lengths else any_length))
    return together(
        {
            shapes.graph_name(batch, length): trace(module, example(original, batch, length))
            for batch in shapes.batches or (TRACED_BATCH,)
            for length in shapes.lengths or (any_length,)
        }
    )


def _loop(original: Original) -> Tuple[torch.nn.Module, LoopGraph]:
    start, step = loop_graphs(original, TRACED_BATCH, TRACED_LENGTH, True)
    return together({"start": trace(start.module, start.example), "step": trace(step.module, step.example)}), step


def _examples(original: Original, task: Type[Task], shapes: Shapes) -> Dict[str, Tuple[torch.Tensor, ...]]:
    """Return each graph's inputs, by name, or "" for the only one; with other shapes than in tracing."""
    if task.loop:
        with torch.no_grad(), precision.tracing(original.dtype):
            start, step = loop_graphs(original, 2, 8, True)
        return {"start": start.example, "step": step.example}
    if not shapes.graph_per_shape:
        return {"": example(original, 2, max(shapes.lengths) if shapes.lengths else min(8, original.max_length))}
    return {
        shapes.graph_name(batch, length): example(original, batch, length)
        for batch in shapes.batches or (TRACED_BATCH,)
        for length in shapes.lengths or (min(TRACED_LENGTH, original.max_length),)
    }
