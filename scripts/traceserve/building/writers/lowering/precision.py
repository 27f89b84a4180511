"""Makes the model to trace for each dtype."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from functools import partial
from typing import (
    Callable,
    ContextManager,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Sequence,
    Tuple,
)

import torch
from traceserve_runtime import processor
from traceserve_runtime.runtimes.pretrained import autocast, is_linear, lower
from traceserve_runtime.runtimes.torchscript import packing
from traceserve_runtime.tasks.contract import TextOrPair

from traceserve.building.checkpoints.original import Original
from traceserve.building.config.dtypes import DTYPES
from traceserve.building.writers.lowering import int8, sensitivity
from traceserve.building.writers.lowering.sensitivity import Inputs, Layer
from traceserve.errors import ExportError

_MEASURED = 64  # texts at most, on which layers to leave are compared where calibration reads more
KEPT_SHARES = (0.2, 0.4)  # of the linear layers, left in float32 if half precision changes too many answers otherwise
_ROUNDING = 2.0**-11  # float16's own, relative; weights beyond its range lose more


class Precision(NamedTuple):
    """How a dtype is made: a function for the model to trace, the context of tracing, and a check that raises
    ExportError if this torch does not support it."""

    lower: Callable[[Original, Sequence[TextOrPair]], Iterable[Original]]
    tracing: Callable[[], ContextManager[object]]
    check: Callable[[], None] = lambda: None


def check_processor(dtype: str) -> None:
    """Raise ExportError for a dtype whose artifact could not be compared with the original on this machine."""
    if dtype in processor.ONLY_NATIVE and not processor.native(dtype):
        needed = ", ".join(sorted(processor.NATIVE[dtype]))
        raise ExportError(
            f"dtype {dtype} needs a processor with one of {needed}, to build as to serve; this one has none"
        )
    if dtype in PRECISIONS:  # or "auto"
        PRECISIONS[dtype].check()


def lowered(original: Original, dtype: str, texts: Sequence[TextOrPair], hardware: str) -> Iterable[Original]:
    """Yield the original as traced for `dtype` on this hardware (unchanged for float32); or several, to be tried in turn
    until one passes.

    `texts` are typical inputs, for measurements.
    """
    lower = ROUNDED[dtype] if hardware in DTYPES[dtype].of_weights else PRECISIONS[dtype].lower
    return lower(original, texts)


def changes(original: Original, dtype: str, hardware: str) -> bool:
    """Return whether a dtype that only weights have on this hardware changes any: a worker packs those that it does not
    change as it packs these. Other dtypes always do."""
    if hardware not in DTYPES[dtype].of_weights:
        return True
    return not all(packing.is_half(weight.data) for _, weight in _weights(original.model))


def tracing(dtype: str) -> ContextManager[object]:
    """Return the context for tracing a model for `dtype`."""
    return PRECISIONS[dtype].tracing()


def _itself(original: Original, texts: Sequence[TextOrPair]) -> Iterable[Original]:
    return [original]


def _to_float16(original: Original, texts: Sequence[TextOrPair]) -> Iterable[Original]:
    return [_lowered_copy(original, "float16")]


def _to_bfloat16(original: Original, texts: Sequence[TextOrPair]) -> Iterator[Original]:
    """Yield the original in bfloat16; then leave more and more linear layers, those that affect its output most."""
    for kept in _kept(original, texts, sensitivity.Bfloat16Linear):
        yield _lowered_copy(original, "bfloat16", kept)


def _round_to_float16(original: Original, texts: Sequence[TextOrPair]) -> Iterator[Original]:
    """Yield the original with its linear layers' weights rounded to float16's numbers, still stored in float32: a worker
    packs such weights in float16. Layers are left as above, and so are those beyond float16's range."""
    for kept in _kept(original, texts, _rounded):
        model = copy.deepcopy(original.model)
        refused = _round_weights(model, kept)
        yield replace(original, model=model, dtype="float16", kept=(*kept, *refused))


def _kept(original: Original, texts: Sequence[TextOrPair], change: Layer) -> Iterator[Tuple[str, ...]]:
    """Yield the names of the linear layers to leave: none, and then more and more, those whose `change` affects the
    original's output most."""
    yield ()
    model = original.model
    layers = {} if getattr(model, "can_generate", bool)() else sensitivity.linears(model)
    if not layers:
        return
    found = sensitivity.measure_layers(model, layers, inputs_of(original, texts), change)
    yield from filter(None, found.steps(KEPT_SHARES))


def _round_weights(model: torch.nn.Module, kept: Sequence[str]) -> List[str]:
    """Round the weights of a model's linear layers, but for those `kept`; return the names of those that float16 cannot
    have."""
    refused = []
    left = {id(model.get_submodule(name).weight) for name in kept}  # an embedding or another layer may share one
    for name, weight in _weights(model):
        if id(weight) not in left:
            rounded = weight.data.half().float()
            if (rounded - weight).norm() <= _ROUNDING * weight.norm():
                weight.data = rounded
            else:
                refused.append(name)
    return refused


def _weights(model: torch.nn.Module) -> Iterator[Tuple[str, torch.nn.Parameter]]:
    """Yield the weights of a model's linear layers, with the layers' names."""
    for name, module in model.named_modules():
        if is_linear(module):
            yield name, module.get_parameter("weight")


def _rounded(linear: torch.nn.Linear, largest: torch.Tensor) -> torch.nn.Module:
    changed = copy.deepcopy(linear)
    changed.weight.data = changed.weight.data.half().float()
    return changed


def _lowered_copy(original: Original, dtype: str, kept: Tuple[str, ...] = ()) -> Original:
    return replace(original, model=lower(copy.deepcopy(original.model), dtype, kept), dtype=dtype, kept=kept)


def to_int8(original: Original, texts: Sequence[TextOrPair], **layers: Layer) -> Iterator[Original]:
    """Yield the original with linear layers in int8, leaving more and more of them; `layers` as in `int8.quantized`."""
    for model, kept in int8.quantized(original.model, inputs_of(original, texts), **layers):
        yield replace(original, model=model, dtype="int8", kept=kept)


def inputs_of(original: Original, texts: Sequence[TextOrPair]) -> List[Inputs]:
    """Return the model's inputs for texts and pairs: equal lengths together, without padding."""
    alike: Dict[int, List[Inputs]] = {}
    for text in texts:
        parts = (text,) if isinstance(text, str) else text
        if "".join(parts).strip():
            read = original.tokenizer(*parts, truncation=True, max_length=original.max_length, return_tensors="pt")
            alike.setdefault(read["input_ids"].shape[1], []).append(read)
    return [
        {name: torch.cat([read[name] for read in group]) for name in original.inputs if name in group[0]}
        for group in alike.values()
    ]


def measured_inputs(original: Original, texts: Sequence[TextOrPair]) -> List[Inputs]:
    """Return the model's inputs for a spread of the texts, enough to compare layers on: built-in texts come first in them."""
    return inputs_of(original, texts[:: max(1, -(-len(texts) // _MEASURED))])


PRECISIONS: Dict[str, Precision] = {
    "float32": Precision(_itself, contextlib.nullcontext),
    "bfloat16": Precision(_to_bfloat16, partial(autocast, "bfloat16")),
    "float16": Precision(_to_float16, contextlib.nullcontext),
    "int8": Precision(to_int8, contextlib.nullcontext, int8.check_int8),
}
# Of the dtypes that only weights have on some hardware.
ROUNDED: Dict[str, Callable[[Original, Sequence[TextOrPair]], Iterable[Original]]] = {"float16": _round_to_float16}
