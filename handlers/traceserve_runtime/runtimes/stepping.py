"""The two calls of a model that runs token by token: with a cache if it has one, else rereading all tokens.

Most models cache keys and values of earlier tokens, which `calling` passes from step to step, and some states of a fixed
size (Qwen3.5, LFM2). Those that keep something else (RWKV), or nothing (OpenAI-GPT), get the whole text at every step:
the same answers, for more work.
The builder finds out by running the model, and records the result for the worker.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Callable, NamedTuple, Protocol, Tuple

from traceserve_runtime.runtimes.calling import (
    Begin,
    DecoderStep,
    Empty,
    EncoderDecoderStep,
    encoded,
    encoder_outputs,
    read_past,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    Tensors = Tuple[torch.Tensor, ...]

_NEAR = 0.02  # of the largest logit: bfloat16's rounding; a wrong cache differs more
# Exceptions of models called with an unknown kind of cache.
_UNKNOWN_PAST = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class Step(Protocol):
    """A call that reads new tokens and the state; `inputs` are the names of the tensors before the state's."""

    @property
    def inputs(self) -> Tuple[str, ...]: ...

    def __call__(self, *tensors: torch.Tensor) -> Tensors: ...


class StepCalls(NamedTuple):
    """`start` and `step`, see `calling`; whether a step reads only new tokens, with a cache; and how many of the state's
    last tensors have a fixed size, which each step replaces."""

    start: Callable[..., Tensors]
    step: Step
    keeps_past: bool
    fixed: int = 0


class NoTokens:
    """Maps the prompt, ids and mask (batch, length), to the tokens read before it: none, (batch, 0)."""

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Tensors:
        return (input_ids[:, :0],)


class DecoderAgain:
    """Like `calling.DecoderStep`; the state is all earlier tokens, int64 of shape (batch, past)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.inputs = ("input_ids", "attention_mask")
        self.masked = "attention_mask" in accepted
        self.placed = "position_ids" in accepted
        self.fixed = {"use_cache": False} if "use_cache" in accepted else {}

    def __call__(self, *tensors: torch.Tensor) -> Tensors:
        import torch

        new, mask, earlier = tensors
        ids = torch.cat([earlier, new], dim=1)
        columns = {"attention_mask": mask} if self.masked else {}
        if self.placed:
            columns["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        result = self.model(input_ids=ids, **columns, **self.fixed, return_dict=True)
        return (result.logits[:, -1].float(), ids)


class Read:
    """Maps the source, ids and mask (batch, length), to the decoder's written tokens, none, (batch, 0), and the
    encoder's output, (batch, length, size)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Tensors:
        return (input_ids[:, :0], encoded(self.model, input_ids, attention_mask))


class EncoderDecoderAgain:
    """Like `calling.EncoderDecoderStep`; the state is made by `Read`."""

    inputs = ("decoder_input_ids", "attention_mask")

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, *tensors: torch.Tensor) -> Tensors:
        import torch

        new, mask, earlier, hidden = tensors
        ids = torch.cat([earlier, new], dim=1)
        result = self.model(
            encoder_outputs=encoder_outputs(hidden),
            attention_mask=mask,
            decoder_input_ids=ids,
            use_cache=False,
            return_dict=True,
        )
        return (result.logits[:, -1].float(), ids)


def decoder(model: PreTrainedModel, with_fixed: bool = False) -> StepCalls:
    """Return a decoder's calls, determined by reading four tokens; `with_fixed`: also with states of a fixed size."""
    ids = _tokens(model)
    mask = ids.new_ones(ids.shape)
    again = StepCalls(NoTokens(), DecoderAgain(model), False)

    def over_a_past() -> StepCalls:
        past = read_past(model, ids[:, :2], mask[:, :2], with_fixed)
        return StepCalls(Empty(past), DecoderStep(model, past.layers), True, len(past.fixed)) if past else again

    def steps(calls: StepCalls) -> Tensors:
        logits = []
        state = calls.start(ids[:, :2], mask[:, :2])
        for new in (slice(0, 2), slice(2, 4)):  # a prompt, too, may be read in parts
            named = {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1}
            columns = [
                named[name][:, : new.stop] if name == "attention_mask" else named[name][:, new]
                for name in calls.step.inputs
            ]
            last, *grown = calls.step(*columns, *state)
            state = (*grown, *state[len(grown) :])
            logits.append(last)
        return tuple(logits)

    return _equal_or_else(over_a_past, again, steps)


def encoder_decoder(model: PreTrainedModel) -> StepCalls:
    """Return the calls of an encoder with a decoder, determined by reading four tokens and writing two."""
    ids = _tokens(model)
    mask = ids.new_ones(ids.shape)
    again = StepCalls(Read(model), EncoderDecoderAgain(model), False)

    def steps(calls: StepCalls) -> Tensors:
        logits = []
        state = calls.start(ids, mask)
        for new in (slice(0, 1), slice(1, 2)):
            last, *grown = calls.step(ids[:, new], mask, *state)
            state = (*grown, *state[len(grown) :])
            logits.append(last)
        return tuple(logits)

    return _equal_or_else(lambda: StepCalls(Begin(model), EncoderDecoderStep(model), True), again, steps)


def _equal_or_else(make: Callable[[], StepCalls], again: StepCalls, steps: Callable[[StepCalls], Tensors]) -> StepCalls:
    """Return the calls of `make` if they run and their steps agree with rereading everything."""
    import torch

    with torch.no_grad():
        try:
            calls = make()
            found = steps(calls)
        except _UNKNOWN_PAST:
            return again
        if not calls.keeps_past:
            return again
        expected = steps(again)
    near = all(bool((a - b).abs().max() <= _NEAR * max(1.0, float(b.abs().max()))) for a, b in zip(found, expected))
    return calls if near else again


def _tokens(model: PreTrainedModel) -> torch.Tensor:
    """Return four tokens for any model, (1, 4), which are unlikely to be padding."""
    import torch

    return torch.arange(3, 7, device=next(model.parameters()).device)[None]
