"""The computation wasted by padding, for a user's own texts: with one fixed length, a few, or any."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import Callable, List, Optional, Sequence

from traceserve_runtime.batching import plan
from traceserve_runtime.batching.costs import CostModel
from traceserve_runtime.manifest import Shapes

from traceserve.building.config.lengths import few_lengths


@dataclass(frozen=True)
class Waste:
    """The waste of one way of padding; shares from 0 to 1."""

    name: str
    tokens: float  # padding's share of the computed tokens
    cost: float  # padding's share of the cost
    total: float  # the whole cost, in units of the cost model


def wastes(
    lengths: Sequence[Sequence[int]],
    max_length: int,
    batch_size: int,
    length_step: Optional[int] = None,
    cost: CostModel = CostModel(),
    most_tokens: int = plan.MOST_BATCH_TOKENS,
) -> List[Waste]:
    """Return the waste of padding rows to `max_length`, to the nearest of a few lengths, or to their micro-batch's.

    `lengths` are each request's row lengths. The requests arrive in random order in batches of `batch_size`, which the
    engine's own plan divides into micro-batches: the same plan three times, with different allowed shapes.
    """
    few = few_lengths(max_length)
    step = length_step or 1
    ways = (
        (f"fixed ({max_length})", Shapes((max_length,))),
        (f"buckets ({', '.join(map(str, few))})", Shapes(few)),
        ("dynamic", Shapes()) if step == 1 else (f"dynamic (in steps of {step})", Shapes().stepped(step, max_length)),
    )
    shuffled = list(lengths)
    random.Random(0).shuffle(shuffled)  # a file sorted by length would look too good
    batches = [[n for rows in shuffled[i : i + batch_size] for n in rows] for i in range(0, len(shuffled), batch_size)]
    common = partial(plan.common_length, most=max_length, padding=cost.padding)
    return [_waste(name, shapes, batches, cost, most_tokens, common) for name, shapes in ways]


def _waste(
    name: str,
    shapes: Shapes,
    batches: Sequence[Sequence[int]],
    cost: CostModel,
    most_tokens: int,
    common_length: Callable[[Sequence[int], Shapes], int],
) -> Waste:
    run = cost(0.0, 0)  # a run's cost before its first token
    tokens = 0
    computed = needed = total = 0.0
    for lengths in batches:
        for micro_batch in plan.plan_batches(lengths, shapes, cost, most_tokens):
            own = [lengths[i] for i in micro_batch]
            length = common_length(own, shapes)
            tokens += sum(own)
            computed += sum(own) + cost.padding.cost * (len(own) * length - sum(own))
            needed += run + sum(cost(1.0, n) - run for n in own)
            total += cost(float(len(own)), length, float(sum(own)))
    return Waste(name, 1 - tokens / computed, 1 - needed / total, total)
