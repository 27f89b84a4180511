"""Looks up what transformers' types leave open: a token's id, a model's embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from traceserve.errors import ExportError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def id_of_token(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return a token's id; raises ExportError if the tokenizer has none for it, not even the unknown token's."""
    number = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(number, int):
        raise ExportError(
            f"the tokenizer of {tokenizer.name_or_path} names the token {token}, but has no number for it; add it to the "
            "tokenizer's vocabulary"
        )
    return number


def embedding_weights(model: PreTrainedModel) -> torch.Tensor:
    """Return the vectors of a model's tokens, (tokens, size); raises AttributeError or NotImplementedError for a model
    that has no such table."""
    import torch

    weight = model.get_input_embeddings().weight
    if not isinstance(weight, torch.Tensor):
        raise AttributeError("the model's embeddings are not one table")
    return weight
