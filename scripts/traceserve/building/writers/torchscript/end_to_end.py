"""Tokens of a batch end to end, as (1, tokens, features), and back: what a rewritten graph calls.

Each function is scripted and becomes a part of a graph, which plain torch runs.
"""

from __future__ import annotations

from typing import NamedTuple, Tuple

import torch
from traceserve_runtime.runtimes.graph import Value


class Layout(NamedTuple):
    """Values of the graph: whether there is padding; the rows' number and length; of each token its place among all places;
    of each place its token, any one where there is padding; of each row its first place's token."""

    padded: Value
    batch: Value
    length: Value
    tokens: Value
    places: Value
    firsts: Value


def layout(mask: torch.Tensor, step: int) -> Tuple[bool, int, int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The values of `Layout`, in its order, for a mask of (batch, length); tokens are filled up to a multiple of `step`."""
    batch, length = mask.size(0), mask.size(1)
    flat = mask.reshape(-1)
    tokens = torch.nonzero(flat).reshape(-1)
    count = tokens.size(0)
    while step > 1 and 32 * step <= count:  # of many tokens more, but at most a sixteenth
        step *= 2
    more = (step - count % step) % step
    padded = count + more < flat.size(0)
    if padded:
        tokens = torch.cat([tokens, tokens.new_zeros([more])])
        places = (torch.cumsum(flat, 0) - 1).clamp_min(0)
    else:
        places = torch.arange(flat.size(0), device=mask.device)
    return padded, batch, length, tokens, places, places.view(batch, length).select(1, 0)


def pack(rows: torch.Tensor, padded: bool, tokens: torch.Tensor) -> torch.Tensor:
    """(batch, length, features) to (1, tokens, features)."""
    flat = rows.flatten(0, 1)
    if padded:
        flat = flat.index_select(0, tokens)
    return flat.unsqueeze(0)


def spread(packed: torch.Tensor, padded: bool, places: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """(1, tokens, features) to (batch, length, features)."""
    flat = packed.flatten(0, 1)
    if padded:
        flat = flat.index_select(0, places)
    return flat.view(batch, length, -1)


def first_tokens(packed: torch.Tensor, firsts: torch.Tensor) -> torch.Tensor:
    """(1, tokens, features) to (batch, 1, features), of each row's first place."""
    return packed.flatten(0, 1).index_select(0, firsts).unsqueeze(1)


def fill(rows: torch.Tensor) -> torch.Tensor:
    """Rows of a batch, the last one repeated until their number is a multiple of 16; one row stays one."""
    count = rows.size(0)
    more = (16 - count % 16) % 16
    if count > 1 and more > 0:
        rows = rows.index_select(0, torch.arange(count + more, device=rows.device).clamp_max(count - 1))
    return rows


def cut(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """What was filled, with as many rows as the batch has."""
    return rows.narrow(0, 0, batch)
