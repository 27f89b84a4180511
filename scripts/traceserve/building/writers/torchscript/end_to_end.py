"""Converts a batch to unpadded tokens, (1, tokens, features), and back; called by a rewritten graph.

Each function is scripted and becomes part of a graph, which plain torch runs.
"""

from __future__ import annotations

from typing import NamedTuple, Tuple

import torch
from traceserve_runtime.runtimes.graph import Value


class Layout(NamedTuple):
    """Values of the graph: whether there is padding; the rows' number and length; each token's position among all
    positions; each position's token, any one for padding; the token of each row's first position."""

    padded: Value
    batch: Value
    length: Value
    tokens: Value
    positions: Value
    firsts: Value


def layout(mask: torch.Tensor, step: int) -> Tuple[bool, int, int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the values of `Layout`, in order, for a mask of (batch, length); tokens are rounded up to a multiple of
    `step`."""
    batch, length = mask.size(0), mask.size(1)
    flat = mask.reshape(-1)
    tokens = torch.nonzero(flat).reshape(-1)
    count = tokens.size(0)
    while step > 1 and 32 * step <= count:  # a larger step for many tokens, at most a sixteenth
        step *= 2
    more = (step - count % step) % step
    padded = count + more < flat.size(0)
    if padded:
        tokens = torch.cat([tokens, tokens.new_zeros([more])])
        positions = (torch.cumsum(flat, 0) - 1).clamp_min(0)
    else:
        positions = torch.arange(flat.size(0), device=mask.device)
    return padded, batch, length, tokens, positions, positions.view(batch, length).select(1, 0)


def unpad_rows(rows: torch.Tensor, padded: bool, tokens: torch.Tensor) -> torch.Tensor:
    """(batch, length, features) to (1, tokens, features)."""
    flat = rows.flatten(0, 1)
    if padded:
        flat = flat.index_select(0, tokens)
    return flat.unsqueeze(0)


def spread(unpadded: torch.Tensor, padded: bool, positions: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """(1, tokens, features) to (batch, length, features)."""
    flat = unpadded.flatten(0, 1)
    if padded:
        flat = flat.index_select(0, positions)
    return flat.view(batch, length, -1)


def first_tokens(unpadded: torch.Tensor, firsts: torch.Tensor) -> torch.Tensor:
    """(1, tokens, features) to (batch, 1, features), of each row's first position."""
    return unpadded.flatten(0, 1).index_select(0, firsts).unsqueeze(1)


def fill_rows(rows: torch.Tensor) -> torch.Tensor:
    """Repeat the last row of a batch until the number of rows is a multiple of 16; a single row stays single."""
    count = rows.size(0)
    more = (16 - count % 16) % 16
    if count > 1 and more > 0:
        rows = rows.index_select(0, torch.arange(count + more, device=rows.device).clamp_max(count - 1))
    return rows


def cut(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Remove the filled rows, keeping the batch's."""
    return rows.narrow(0, 0, batch)
