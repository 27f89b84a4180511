"""Exports a module to an ONNX graph, with torch's tracing exporter.

It records the same as `torch.jit.trace`, and supports every task. The newer one (`dynamo=True`) was tried with torch 2.13:
torch.export does not accept the steps of generation, and takes ten times as long.
"""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, NamedTuple, Tuple, Type

import torch
from traceserve_runtime.runtimes.positions import PAST, PRESENT

from traceserve.building.checkpoints.original import Original
from traceserve.building.writers.tracing import torch_internals
from traceserve.building.writers.tracing.loops import traced_loop
from traceserve.building.writers.tracing.wrapping import example, once, tracing_of

if TYPE_CHECKING:
    import onnx
    from traceserve_runtime.tasks.contract import Task
    from transformers import PreTrainedModel

Axes = Dict[str, Dict[int, str]]


class OnnxGraph(NamedTuple):
    """A module to export: example inputs, the names of inputs and outputs, and their variable sizes."""

    module: torch.nn.Module
    example: Tuple[torch.Tensor, ...]
    inputs: Tuple[str, ...]
    outputs: Tuple[str, ...]
    axes: Axes
    name: str = ""
    file: str = ""


def of_shape(original: Original, task: Type[Task], batch: int, length: int) -> OnnxGraph:
    """Return the graph of a model that runs once."""
    outputs = tuple(output.name for output in task.outputs)
    axes: Axes = {name: {0: "batch", 1: "length"} for name in original.inputs}
    axes.update({output.name: {0: "batch", **({1: "length"} if output.per_token else {})} for output in task.outputs})
    module = once(original, outputs)
    return OnnxGraph(module, example(original, batch, length), original.inputs, outputs, axes)


def of_loop(
    original: Original, task: Type[Task], batch: int, length: int
) -> Tuple[OnnxGraph, OnnxGraph, Tuple[str, ...]]:
    """Return the graphs `start` and `step` of a looping model, see `tracing.loops`; and a step's inputs."""
    start, step, states, grown = traced_loop(original, batch, length, len(task.outputs))
    past = tuple(f"{PAST}{i}" for i in range(len(states)))
    present = tuple(f"{PRESENT}{i}" for i in range(len(states)))
    # Keys and values are (batch, heads, length, size); tokens, and an encoder's output, (batch, length, ...).
    of_state = [{0: "batch", 2 if t.ndim == 4 else 1: "past" if i < grown else "source"} for i, t in enumerate(states)]
    begin: Axes = {name: {0: "batch", 1: "length"} for name in start.inputs}
    begin.update(zip(present, of_state))
    # Each has its own length: of new tokens, of all tokens, or of the source.
    axes: Axes = {name: {0: "batch", 1: f"length_of_{name}"} for name in step.inputs}
    axes.update(zip(past, of_state))
    axes.update({output.name: {0: "batch"} for output in task.outputs})
    axes.update({name: {**sizes, max(sizes): "grown"} for name, sizes in zip(present[:grown], of_state)})
    outputs = (*(output.name for output in task.outputs), *present[:grown])
    return (
        OnnxGraph(start.module, start.example, start.inputs, present, begin),
        OnnxGraph(step.module, step.example, (*step.inputs, *past), outputs, axes),
        step.inputs,
    )


def export_graph(graph: OnnxGraph, original: Original, opset: int, scratch: Path, eager: bool) -> onnx.ModelProto:
    """Return the graph as an ONNX model in memory; `eager`: with attention in the form known to the tool for
    transformers."""
    from onnx import load

    known = inspect.signature(torch.onnx.export).parameters
    options: Dict[str, Any] = {"dynamo": False} if "dynamo" in known else {}  # since torch 2.1
    file = scratch / "exported.onnx"
    act = "torch.onnx.export cannot export"
    with tracing_of(original, act), _attention(original.model, eager), torch_internals.quiet_onnx_export():
        torch.onnx.export(
            graph.module.eval(),
            graph.example,
            str(file),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes=graph.axes,
            opset_version=opset,
            **options,
        )
    return load(str(file))


@contextlib.contextmanager
def _attention(model: PreTrainedModel, eager: bool) -> Iterator[None]:
    """Make the model compute attention in single steps, if it has a choice."""
    own = getattr(model.config, "_attn_implementation", None)
    if not eager or own is None or not hasattr(model, "set_attn_implementation"):  # before transformers 4.53
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)
