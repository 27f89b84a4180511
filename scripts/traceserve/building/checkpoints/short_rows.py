"""Finds the shortest row that a model can read: some fail on few tokens, with internal errors.

Funnel halves its rows in each block after the first, and transformers' code fails if too little
remains: below 5 tokens with three blocks, below 9 with four. An empty text has two, so such rows are padded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Sequence

from traceserve.errors import ExportError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST = 64  # a model that fails at this length has another problem


def shortest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Sequence[str], max_length: int) -> int:
    """Return the fewest tokens from which on the model runs; 1 if it runs at any length, or at none.

    Usually this is one run, of an empty text. Raises ExportError if `max_length` is below, or the model accepts certain rows
    alone: a Longformer that answers questions needs three separators, and any text may have more, or a window fewer.
    """
    least = max(1, tokenizer.num_special_tokens_to_add())
    if _failure(model, tokenizer, inputs, least) is None:
        return 1
    failures = ((length, _failure(model, tokenizer, inputs, length)) for length in range(least, MOST + 1))
    failed = {length: failure for length, failure in failures if failure is not None}
    longest = max(failed)
    if isinstance(failed[longest], AssertionError):
        raise ExportError(
            f"transformers' own {type(model).__name__} does not read every text ({first_line(failed[longest])}); name a "
            "checkpoint of another type"
        )
    if longest == MOST:
        return 1
    if longest >= max_length:
        raise ExportError(
            f"transformers' own {type(model).__name__} cannot be run on {longest} tokens ({first_line(failed[longest])}), "
            f"and max_length is {max_length}; set it above {longest}"
        )
    return longest + 1


def _failure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Sequence[str], length: int
) -> Optional[Exception]:
    """Return the model's error for a row of this many tokens; None without one."""
    import torch

    encoded = tokenizer("a " * length, truncation=True, max_length=length)
    values = {"attention_mask": [1] * length, "token_type_ids": [0] * length, **encoded}
    try:
        with torch.no_grad():
            model(**{name: torch.tensor([values[name]]) for name in inputs})
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        return error
    return None
