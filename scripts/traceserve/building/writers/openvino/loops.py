"""The graphs of a model that runs token by token, with its keys and values as variables; see `openvino_steps`."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from traceserve_runtime.runtimes.openvino_steps import ROWS
from traceserve_runtime.runtimes.positions import PAST, PRESENT

from traceserve.building.checkpoints.original import Original
from traceserve.building.writers.openvino.conversion import convert_traced
from traceserve.building.writers.tracing.graphs import TRACED_BATCH, TRACED_LENGTH
from traceserve.building.writers.tracing.loops import LoopGraph, traced_loop

Shape = Tuple[int, ...]


class LoopModels(NamedTuple):
    """OpenVINO's models of a step and, unless variables hold the whole state, of the start; and a step's inputs."""

    step: Any
    start: Optional[Any]
    inputs: Tuple[str, ...]


class _Rest(torch.nn.Module):
    """A module without its first outputs."""

    def __init__(self, module: torch.nn.Module, left_out: int) -> None:
        super().__init__()
        self.module = module
        self.left_out = left_out

    def forward(self, *tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """Return the others."""
        outputs: Tuple[torch.Tensor, ...] = self.module(*tensors)[self.left_out :]
        return outputs


def loop_models(openvino: Any, original: Original, outputs: Sequence[str]) -> LoopModels:
    """Trace and convert a loop's graphs; raises UnwritableError with the model's own reason."""
    start, step, states, grown = traced_loop(original, TRACED_BATCH, TRACED_LENGTH, len(outputs))
    past = [f"{PAST}{i}" for i in range(len(states))]
    present = [f"{PRESENT}{i}" for i in range(grown)]
    model = convert_traced(openvino, original, step.module, step.example, [*step.inputs, *past], [*outputs, *present])
    variables = [tuple(state.shape) for state in states[:grown]] if step.keeps_past else []
    if variables:
        _keep(openvino, model, variables, step)
    own = len(variables)
    if own == len(states):
        return LoopModels(model, None, step.inputs)
    first = convert_traced(openvino, original, _Rest(start.module, own), start.example, start.inputs, past[own:])
    return LoopModels(model, first, step.inputs)


def _keep(openvino: Any, model: Any, shapes: Sequence[Shape], step: LoopGraph) -> None:
    """Turn past and present keys and values of these shapes, (batch, heads, length, size), into variables.

    They are empty at first, and each step continues the rows that it is given. OpenVINO joins this pattern to attention
    that keeps them in place.
    """
    operators, passes = (importlib.import_module(f"{openvino.__name__}.{name}") for name in ("opset13", "passes"))
    inputs = {port.get_any_name(): port for port in model.inputs}
    rows = operators.parameter([-1], np.int32, name=ROWS)
    rows.output(0).get_tensor().set_names({ROWS})
    model.add_parameters([rows])
    first = operators.constant(0, np.int64)
    for i, shape in enumerate(shapes):
        past = inputs[f"{PAST}{i}"].get_node()
        past.set_partial_shape(openvino.PartialShape([-1, shape[1], -1, shape[3]]))
        readers = list(past.output(0).get_target_inputs())
        chosen = operators.gather(past, rows, first)
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful({f"{PAST}{i}": f"{PRESENT}{i}" for i in range(len(shapes))}))
    manager.run_passes(model)
    new = operators.shape_of(inputs[step.inputs[0]].get_node(), output_type="i64")
    batch = operators.gather(new, operators.constant([0], np.int64), first)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, size = (d.get_length() if d.is_static else 0 for d in node.get_output_partial_shape(0))
            sizes = [operators.constant([number], np.int64) for number in (heads, 0, size)]
            nothing = operators.constant(0, node.get_output_element_type(0))
            empty = operators.broadcast(nothing, operators.concat([batch, *sizes], 0))
            node.set_arguments([empty.output(0)])
    model.validate_nodes_and_infer_types()
