"""A traced module as an OpenVINO model: any batch and length, with our names."""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Iterator, Sequence, Tuple

import torch

from traceserve.building.checkpoints.original import Original
from traceserve.building.writers.tracing.graphs import trace
from traceserve.building.writers.tracing.replacing import replaced_here
from traceserve.building.writers.tracing.wrapping import tracing_of
from traceserve.errors import UnwritableError


def convert_traced(
    openvino: Any,
    original: Original,
    module: torch.nn.Module,
    example: Tuple[torch.Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> Any:
    """Trace a module of the original's model, and convert the trace; raises UnwritableError with the reason."""
    kind = type(original.model).__name__
    with tracing_of(original), _nothing_concatenated(), _last_axis_squeezed():
        traced = trace(module.eval(), example)
    failures = openvino.frontend
    try:
        with _same_root_logger():
            model = openvino.convert_model(traced, example_input=example)
    except (RuntimeError, failures.OpConversionFailure, failures.OpValidationFailure, failures.GeneralFailure) as error:
        # A report, of which the first lines name OpenVINO's own files.
        last = str(error).strip().rsplit("\n", 1)[-1].lstrip("- ")
        raise UnwritableError(f"OpenVINO cannot convert {kind}: {last}") from error
    for ports, names in ((model.inputs, inputs), (model.outputs, outputs)):
        if len(ports) != len(names):
            raise UnwritableError(f"OpenVINO converted {kind} to a graph with {len(ports)} of {', '.join(names)}")
        for port, name in zip(ports, names):
            port.get_tensor().set_names({name})
    return model


@contextlib.contextmanager
def _nothing_concatenated() -> Iterator[None]:
    """Leave empty tensors of one dimension out of concatenations, as torch does: transformers' caches begin with one,
    and OpenVINO refuses it."""
    own = torch.cat

    def cat(tensors: Sequence[torch.Tensor], *more: Any, **named: Any) -> torch.Tensor:
        some = [tensor for tensor in tensors if tensor.ndim != 1 or tensor.numel()]
        return some[0] if len(some) == 1 else own(some or list(tensors), *more, **named)

    with replaced_here(torch, cat=cat):
        yield


@contextlib.contextmanager
def _last_axis_squeezed() -> Iterator[None]:
    """Give a matrix's `squeeze()` its last axis, as mBART means it for a column of tokens: without one the result has no known
    number of dimensions, which OpenVINO's CPU refuses."""
    own = torch.Tensor.squeeze

    def squeeze(tensor: torch.Tensor, *axes: Any, **named: Any) -> torch.Tensor:
        return own(tensor, -1) if tensor.ndim == 2 and not axes and not named else own(tensor, *axes, **named)

    with replaced_here(torch.Tensor, squeeze=squeeze):
        yield


@contextlib.contextmanager
def _same_root_logger() -> Iterator[None]:
    """Give the root logger back as it was: OpenVINO leaves it at ERROR, with a filter of its own, if it fails."""
    root = logging.getLogger()
    level, filters, handlers = root.level, list(root.filters), list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers
