"""Models that run token by token: the two graphs to trace.

The graphs `start` and `step` are the calls of `runtimes.stepping`; `runtimes.calling` describes their inputs and
outputs.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, NamedTuple, Tuple

import torch
from traceserve_runtime.runtimes import stepping
from traceserve_runtime.runtimes.calling import read_past

from traceserve.building.checkpoints.original import Original
from traceserve.building.config.loops import LOOPS, Loop
from traceserve.building.writers.tracing.wrapping import Wrapped, example
from traceserve.errors import ExportError

_CHECKED = 3  # tokens
_WRITTEN = 2  # tokens, for which an example leaves room
_NEAR = 0.02  # of logits: bfloat16's rounding


class LoopGraph(NamedTuple):
    """A module to trace, an example of its inputs, their names if the runner passes them by name, whether a step
    reads only new tokens, and how many of the state's last tensors have a fixed size."""

    module: torch.nn.Module
    example: Tuple[torch.Tensor, ...]
    inputs: Tuple[str, ...]
    keeps_past: bool
    fixed: int = 0


class TracedLoop(NamedTuple):
    """A loop's graphs; the state that `start` gives and a step takes behind its inputs, and how many of the state's first
    tensors a step gives back, grown."""

    start: LoopGraph
    step: LoopGraph
    states: Tuple[torch.Tensor, ...]
    grown: int


def _decoder_graphs(
    original: Original, batch: int, length: int, with_fixed: bool = False
) -> Tuple[LoopGraph, LoopGraph]:
    ids, mask = _example(original, batch, length)
    calls = stepping.decoder(original.model, with_fixed)
    _check(original, calls, torch.arange(3, 7)[None], LOOPS["decoder"])
    whole = torch.cat([mask, torch.ones_like(mask)], dim=1)
    columns = {
        "input_ids": ids,
        "attention_mask": whole,
        "position_ids": (whole.cumsum(1) - 1).clamp(min=0)[:, length:],
    }
    past = read_past(original.model, ids, mask, with_fixed) if calls.keeps_past else None
    states = (ids,) if past is None else past.tensors
    step = calls.step
    start = LoopGraph(Wrapped(calls.start), (ids, mask), ("input_ids", "attention_mask"), calls.keeps_past)
    inputs = (*(columns[name] for name in step.inputs), *states)
    return start, LoopGraph(Wrapped(step), inputs, step.inputs, calls.keeps_past, calls.fixed)


def _encoder_decoder_graphs(
    original: Original, batch: int, length: int, with_fixed: bool = False
) -> Tuple[LoopGraph, LoopGraph]:
    ids, mask = _example(original, batch, length)
    calls = stepping.encoder_decoder(original.model)
    _check(original, calls, torch.tensor([[original.facts["start_id"]]]), LOOPS["encoder_decoder"])
    with torch.no_grad():
        states = calls.start(ids, mask)
    if calls.keeps_past:
        growing = len(states) // 2
        past = tuple(torch.randn(*t.shape[:2], 5, t.shape[3]).to(t.dtype) for t in states[:growing])
    else:
        growing, past = 1, (ids[:, :5],)
    decoder_ids = ids[:, : min(4, length)]
    step = calls.step
    return (
        LoopGraph(Wrapped(calls.start), (ids, mask), ("input_ids", "attention_mask"), calls.keeps_past),
        LoopGraph(Wrapped(step), (decoder_ids, mask, *past, *states[growing:]), step.inputs, calls.keeps_past),
    )


def _check(original: Original, calls: stepping.StepCalls, first: torch.Tensor, loop: Loop) -> None:
    """Raise ExportError for a model that must reread its whole text, but writes differently by itself.

    XLNet has a memory in which padding cannot be masked, XLM writes into a masked token.
    """
    if calls.keeps_past:
        return
    source = torch.arange(3, 7)[None]
    mask = torch.ones_like(source)
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": _CHECKED, "min_new_tokens": _CHECKED}
    model: Any = original.model  # its types lack `generate`, which a mixin adds
    try:
        found = model.generate(source, attention_mask=mask, **options, output_logits=True, return_dict_in_generate=True)
    except (TypeError, ValueError):  # transformers before 4.39 returns no logits; then only the gate judges
        return
    state = calls.start(source, mask)
    new = first
    for step, expected in enumerate(found.logits):
        whole = torch.ones(1, len(source[0]) + step, dtype=torch.int64) if loop.writes_behind else mask
        logits, *grown = calls.step(new, whole, *state)
        state = (*grown, *state[len(grown) :])
        new = found.sequences[:, len(found.sequences[0]) - len(found.logits) + step][:, None]
        if not torch.allclose(logits, expected.float(), rtol=_NEAR, atol=_NEAR):
            raise ExportError(
                f"{type(original.model).__name__} does not write from cached keys and values, and writes differently when it "
                "rereads its whole text, so no save_mode can write it"
            )


def _example(original: Original, batch: int, length: int) -> Tuple[torch.Tensor, torch.Tensor]:
    columns = dict(zip(original.inputs, example(original, batch, length)))
    return columns["input_ids"], columns["attention_mask"]


# From the original, a batch and a length to the graphs of start and step; and whether its save mode keeps states of a
# fixed size, as only decoders have them. Without, such a model rereads its whole text for each token.
LOOP_GRAPHS: Dict[str, Callable[..., Tuple[LoopGraph, LoopGraph]]] = {
    "decoder": _decoder_graphs,
    "encoder_decoder": _encoder_decoder_graphs,
}


def loop_graphs(original: Original, batch: int, length: int, with_fixed: bool = False) -> Tuple[LoopGraph, LoopGraph]:
    """Return the graphs of start and step, with examples of rows of this length, or shorter where the model reads less."""
    return LOOP_GRAPHS[original.loop](original, batch, min(length, original.max_length - _WRITTEN), with_fixed)


def traced_loop(original: Original, batch: int, length: int, outputs: int) -> TracedLoop:
    """Run both graphs once; `outputs` of a step are no state."""
    start, step = loop_graphs(original, batch, length)
    with torch.no_grad():
        states = start.module(*start.example)
        grown = len(step.module(*step.example)) - outputs
    return TracedLoop(start, step, states, grown)
