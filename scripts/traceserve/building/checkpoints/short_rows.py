"""The shortest row that a model can read: some fail on a few tokens, and say so in terms of their own insides.

Funnel pools its rows to half their length in each block after the first, and transformers' code of it fails where too little
is left: below 5 tokens with three blocks, below 9 with four. An empty text has two, so such rows are padded.
"""

from __future__ import annotations

from typing import Any, Sequence

from traceserve.errors import ExportError, first_line

MOST = 64  # a model that fails at this length does not fail because its rows are short


def shortest(model: Any, tokenizer: Any, inputs: Sequence[str], max_length: int) -> int:
    """The least number of tokens from which on the model can be run; 1 where it can at any, or at none.

    Usually this is one run, of an empty text. Raises ExportError where `max_length` is below.
    """
    least = max(1, tokenizer.num_special_tokens_to_add())
    if _failure(model, tokenizer, inputs, least) is None:
        return 1
    failed = {length: _failure(model, tokenizer, inputs, length) for length in range(least, MOST + 1)}
    longest = max(length for length, failure in failed.items() if failure is not None)
    if longest == MOST:
        return 1
    if longest >= max_length:
        raise ExportError(
            f"transformers' own {type(model).__name__} cannot be run on {longest} tokens ({first_line(failed[longest])}), "
            f"and max_length is {max_length}; set it above {longest}"
        )
    return longest + 1


def _failure(model: Any, tokenizer: Any, inputs: Sequence[str], length: int) -> Any:
    """The model's own error for a row of so many tokens; None where it has none."""
    import torch

    encoded = tokenizer("a " * length, truncation=True, max_length=length)
    values = {"attention_mask": [1] * length, "token_type_ids": [0] * length, **encoded}
    try:
        with torch.no_grad():
            model(**{name: torch.tensor([values[name]]) for name in inputs})
    except (RuntimeError, ValueError, IndexError) as error:
        return error
    return None
