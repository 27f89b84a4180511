"""What padding wastes of the computation, by the lengths of a user's own texts: fixed lengths, a few, or any."""

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
    """What one way of padding computes for nothing; shares from 0 to 1."""

    name: str
    tokens: float  # of the computed tokens, those that are padding
    cost: float  # of the computation, what they cost
    total: float  # the computation itself, in units of the cost model


def wastes(
    lengths: Sequence[Sequence[int]],
    max_length: int,
    batch_size: int,
    length_step: Optional[int] = None,
    cost: CostModel = CostModel(),
    most_tokens: int = plan.MOST_TOKENS,
) -> List[Waste]:
    """What is wasted where rows are padded to `max_length`, to the nearest of a few lengths, or to their micro-batch's.

    `lengths` are those of each request's rows. The requests come, in any order, in batches of `batch_size`, which the
    engine's own plan cuts into micro-batches: three times the same plan, over other allowed shapes.
    """
    few = few_lengths(max_length)
    step = length_step or 1
    ways = (
        (f"fixed ({max_length})", Shapes((max_length,))),
        (f"buckets ({', '.join(map(str, few))})", Shapes(few)),
        ("dynamic", Shapes()) if step == 1 else (f"dynamic (in steps of {step})", Shapes().stepped(step, max_length)),
    )
    shuffled = list(lengths)
    random.Random(0).shuffle(shuffled)  # a file in the order of lengths would look too well
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
    run = cost(0.0, 0)  # what a run costs before its first token
    tokens = 0
    computed = needed = total = 0.0
    for lengths in batches:
        for micro_batch in plan.plan(lengths, shapes, cost, most_tokens):
            own = [lengths[i] for i in micro_batch]
            length = common_length(own, shapes)
            tokens += sum(own)
            computed += sum(own) + cost.padding.cost * (len(own) * length - sum(own))
            needed += run + sum(cost(1.0, n) - run for n in own)
            total += cost(float(len(own)), length, float(sum(own)))
    return Waste(name, 1 - tokens / computed, 1 - needed / total, total)
