"""Traces the explaining graphs: the calls of `runtimes.from_embeddings`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import torch
from traceserve_runtime.errors import reason
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes.calling import Single
from traceserve_runtime.runtimes.from_embeddings import FromEmbeddings, LookUp, NotDifferentiable, word_embeddings
from traceserve_runtime.runtimes.torchscript.gradients import GRADIENTS_FILE, POSITIONS_FILE
from traceserve_runtime.runtimes.torchscript.weights import WeightPosition, read_positions, write_positions

from traceserve.building.checkpoints.original import Original
from traceserve.building.writers.contract import NoGradients, check_differentiable
from traceserve.building.writers.lowering import precision
from traceserve.building.writers.tracing.graphs import TRACED_BATCH, TRACED_LENGTH, together, trace, write_module
from traceserve.building.writers.tracing.recurrences import recurrences_of_any_length
from traceserve.building.writers.tracing.wrapping import TRACING_ERRORS, Wrapped, as_traced, example
from traceserve.errors import NoSpace

_EMBED, _OUTPUTS = "embed", "outputs"


def write_gradients(original: Original, manifest: Manifest, folder: Path) -> Tuple[str, ...]:
    """Write `folder/gradients.pt` and the positions of its weights in the model's file; see Writer."""
    check_differentiable(manifest.dtype)
    if manifest.shapes.graph_per_shape:
        raise NoGradients("a model with one graph for each shape has none")
    model: Any = original.model
    try:
        embeddings = word_embeddings(model)
        with as_traced(model), precision.tracing(original.dtype):
            inputs = example(original, TRACED_BATCH, min(TRACED_LENGTH, original.max_length))
            ids = inputs[original.inputs.index("input_ids")]
            look_up = LookUp(embeddings)
            outputs = FromEmbeddings(Single(model, original.inputs, manifest.outputs), embeddings)
            with recurrences_of_any_length(model):
                module = together(
                    {
                        _EMBED: trace(Wrapped(look_up).eval(), (ids,)),
                        _OUTPUTS: trace(Wrapped(outputs).eval(), (look_up(ids), *inputs)),
                    }
                )
            _write_without_weights(module, folder)
    except NoSpace:
        raise
    except NotDifferentiable as error:
        raise NoGradients(str(error)) from error
    except (*TRACING_ERRORS, KeyError) as error:
        raise NoGradients(f"torch.jit.trace cannot trace it from its embeddings: {reason(error)}") from error
    return (GRADIENTS_FILE, POSITIONS_FILE)


def _write_without_weights(module: torch.nn.Module, folder: Path) -> None:
    """Write the graphs; each weight stays in the model's file, where the graph of the whole model has it by the same
    name."""
    known = read_positions(folder)
    by_model = {name.partition("model.")[2]: position for name, position in known.items()}
    tensors = module.state_dict(keep_vars=True)
    found: Dict[Tuple[int, Tuple[int, ...]], WeightPosition] = {}  # a tensor with several names has one position
    for name, tensor in tensors.items():
        position = by_model.get(name.partition("model.")[2])
        if position is not None and position.shape == tuple(tensor.shape) and position.dtype == _dtype(tensor):
            found[_identity(tensor)] = position
    positions = {name: found[_identity(tensor)] for name, tensor in tensors.items() if _identity(tensor) in found}
    with _emptied(module, positions):
        write_module(module, folder / GRADIENTS_FILE)
    write_positions(folder, positions, POSITIONS_FILE)


@contextlib.contextmanager
def _emptied(module: torch.nn.Module, names: Dict[str, WeightPosition]) -> Iterator[None]:
    """Take these tensors' content away for a while: the original has it too."""
    tensors = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name in names}
    content = {name: tensor.data for name, tensor in tensors.items()}
    try:
        for tensor in tensors.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype)
        yield
    finally:
        for name, tensor in tensors.items():
            tensor.data = content[name]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).replace("torch.", "")


def _identity(tensor: torch.Tensor) -> Tuple[int, Tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)
