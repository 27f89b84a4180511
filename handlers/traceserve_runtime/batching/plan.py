"""Plans which rows run together."""

from __future__ import annotations

from bisect import bisect_left
from typing import List, Sequence

import numpy as np

from traceserve_runtime.batching.costs import CostModel
from traceserve_runtime.manifest import Shapes
from traceserve_runtime.runner import Padding

# More rows or tokens per run gain nothing on any measured processor, and memory grows with them.
MOST_ROWS = 64
MOST_BATCH_TOKENS = 16384


def plan_batches(
    lengths: Sequence[int], shapes: Shapes, cost: CostModel = CostModel(), most_tokens: int = MOST_BATCH_TOKENS
) -> List[List[int]]:
    """Return the cheapest division of rows, sorted by length, into contiguous micro-batches, as lists of indices into
    `lengths`.

    Without padding, each has rows of one length. Dynamic programming over the cost model: best(i) = min over j < i of
    best(j) + cost of the rows j..i-1.
    """
    if len(lengths) == 1:
        return [[0]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ordered = [lengths[i] for i in order]
    most_rows = min(len(order), MOST_ROWS if shapes.batches is None else max(shapes.batches))
    batches_of = np.array([shapes.batch(n) for n in range(1, most_rows + 1)], dtype=float)
    tokens_before = np.concatenate([[0.0], np.cumsum(ordered)])
    best = np.zeros(len(order) + 1)
    cut = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        length = shapes.length(ordered[end - 1])
        rows = max(1, min(end, most_rows, most_tokens // length))
        if not shapes.padded:
            rows = min(rows, end - bisect_left(ordered, ordered[end - 1], 0, end))  # those of this length
        # For 1, 2, ... rows up to `end`.
        tokens = tokens_before[end] - tokens_before[end - rows : end][::-1]
        costs = best[end - rows : end][::-1] + cost(batches_of[:rows], length, tokens)
        cheapest = int(costs.argmin())
        best[end] = costs[cheapest]
        cut[end] = end - cheapest - 1
    batches = []
    end = len(order)
    while end:
        batches.append(order[cut[end] : end])
        end = cut[end]
    return batches[::-1]


def common_length(lengths: Sequence[int], shapes: Shapes, most: int, padding: Padding = Padding()) -> int:
    """Return the length to which rows that run together are padded.

    If any length is allowed, it is rounded up to a multiple that suits the runner, within the maximum.
    """
    length = shapes.length(max(lengths))
    if shapes.lengths is None and shapes.padded:
        multiple = padding.multiple if len(lengths) > 1 else padding.alone
        length = max(length, min(length + -length % multiple, most))
    return length
