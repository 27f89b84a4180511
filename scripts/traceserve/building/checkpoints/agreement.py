"""Compares two models of one checkpoint, by their outputs for a row of tokens from the whole vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Relative to the largest output; equal computations differ by 1e-6 to 1e-5, different models by 1e-2 and more.
LARGEST_DIFFERENCE = 5e-4
_STEP = 7919  # a prime: the row repeats no token before each was in it, unless the vocabulary is a multiple of it


def token_row(length: int, vocabulary: int) -> torch.Tensor:
    """Return the ids of a row of tokens, of shape (1, length)."""
    import torch

    return torch.arange(length)[None] * _STEP % vocabulary


def relative_difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected output, or to 1 if all are smaller."""
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1.0))
