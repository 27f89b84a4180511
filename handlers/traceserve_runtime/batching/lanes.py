"""Micro-batches on several cores: one after another on all of them, or side by side on one core each.

A run of few tokens does not keep several cores busy: they wait for one another at the end of every operator. Several
micro-batches side by side do, so a full batch is answered sooner that way, and a single text on all cores.
"""

from __future__ import annotations

from concurrent.futures import Executor, wait
from dataclasses import dataclass
from itertools import accumulate
from typing import Callable, List, Optional, Sequence, Tuple, TypeVar

from traceserve_runtime.batching.costs import CostModel
from traceserve_runtime.batching.plan import MOST_ROWS, MOST_TOKENS, plan
from traceserve_runtime.manifest import Shapes

Batches = List[List[int]]
Result = TypeVar("Result")

_MICRO_BATCHES_OF_A_LANE = (1, 2, 3)  # more have less padding and spread more evenly, but each is a run
_BISECTIONS = 10  # a thousandth of all costs


@dataclass(frozen=True)
class Lanes:
    """Threads that compute on one core each, and what a run costs there while all of them are busy."""

    threads: Sequence[Executor]
    cost: CostModel

    def run(self, act: Callable[[Batches], Result], batches: Sequence[Batches]) -> List[Result]:
        """`act` on each list of micro-batches, side by side; all have ended when this returns or raises."""
        running = [thread.submit(act, own) for thread, own in zip(self.threads, batches)]
        wait(running)
        return [each.result() for each in running]


def schedule(
    lengths: Sequence[int], shapes: Shapes, cost: CostModel, lanes: Optional[Lanes], most_tokens: int = MOST_TOKENS
) -> List[Batches]:
    """The micro-batches of each lane, or of one that has all cores where these are done sooner; see `plan`."""
    if lanes is None or len(lengths) < 2:
        return [plan(lengths, shapes, cost, most_tokens)]
    rows = _Rows(lengths, shapes, lanes.cost, most_tokens)
    cuts = (rows.cut(len(lanes.threads) * each) for each in _MICRO_BATCHES_OF_A_LANE)
    spread, soonest = min((_spread(batches, lengths, shapes, lanes) for batches in cuts), key=lambda each: each[1])
    if len(spread) > 1 and _least(lengths, shapes, cost) >= soonest:
        return spread
    together = plan(lengths, shapes, cost, most_tokens)
    return spread if len(spread) > 1 and soonest <= sum(_costs(together, lengths, shapes, cost)) else [together]


class _Rows:
    """Rows, longest first, to be cut into micro-batches."""

    def __init__(self, lengths: Sequence[int], shapes: Shapes, cost: CostModel, most_tokens: int) -> None:
        self._order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        self._lengths = [lengths[i] for i in self._order]
        self._shapes = shapes
        self._cost = cost
        self._most_tokens = most_tokens
        self._padded = [shapes.length(n) for n in self._lengths]
        of_places = {n: cost(1, n, 0) - cost.run for n in set(self._padded)}
        self._of_places = [of_places[n] for n in self._padded]  # the cost of a row's places
        self._of_token = cost(0, 0, 1) - cost.run
        self._alike = [1] * len(self._lengths)  # how many rows from each one on are as long as it
        for i in range(len(self._lengths) - 2, -1, -1):
            if self._lengths[i] == self._lengths[i + 1]:
                self._alike[i] += self._alike[i + 1]
        self._tokens_before = [0, *accumulate(self._lengths)]
        self._one_by_one = sum(_alone(lengths, shapes, cost))

    def cut(self, count: int) -> Batches:
        """About so many contiguous micro-batches, the dearest as cheap as can be.

        Bisection over its cost: the longest rows that it still allows are one micro-batch, then the next ones.
        """
        least, most = 0.0, self._one_by_one
        for _ in range(_BISECTIONS):
            middle = (least + most) / 2
            if len(self._batches_within(middle)) <= count:
                most = middle
            else:
                least = middle
        return self._batches_within(most)

    def _batches_within(self, limit: float) -> Batches:
        batches, start = [], 0
        while start < len(self._order):
            end = start + self._rows_within(limit, start)
            batches.append(self._order[start:end])
            start = end
        return batches

    def _rows_within(self, limit: float, start: int) -> int:
        """How many rows from `start` on run together for at most `limit`, and within the plan's own limits; at least one."""
        length = self._padded[start]
        if self._shapes.batches is not None:
            cost, most = self._cost, self._most_tokens
            return max((b for b in self._shapes.batches if cost(b, length) <= limit and b * length <= most), default=1)
        most_rows = min(MOST_ROWS, self._most_tokens // length, len(self._lengths) - start)
        if not self._shapes.padded:
            most_rows = min(most_rows, self._alike[start])
        of_places, of_token, before = self._of_places[start], self._of_token, self._tokens_before
        rows, left = 0, limit - self._cost.run
        while rows < most_rows:  # so many more, were they as long as the next one
            more = min(int(left / (of_places + of_token * self._lengths[start + rows])), most_rows - rows)
            if more < 1:
                break
            left -= more * of_places + of_token * (before[start + rows + more] - before[start + rows])
            rows += more
        return max(1, rows)


def _spread(batches: Batches, lengths: Sequence[int], shapes: Shapes, lanes: Lanes) -> Tuple[List[Batches], float]:
    """Longest first, each to the lane that is free first; and what the longest lane costs."""
    costs = _costs(batches, lengths, shapes, lanes.cost)
    spread: List[Batches] = [[] for _ in range(min(len(lanes.threads), len(batches)))]
    loads = [0.0] * len(spread)
    for i in sorted(range(len(batches)), key=costs.__getitem__, reverse=True):
        lane = loads.index(min(loads))
        spread[lane].append(batches[i])
        loads[lane] += costs[i]
    return spread, max(loads)


def _costs(batches: Batches, lengths: Sequence[int], shapes: Shapes, cost: CostModel) -> List[float]:
    costs = []
    for batch in batches:
        own = [lengths[i] for i in batch]
        costs.append(cost(shapes.batch(len(own)), shapes.length(max(own)), sum(own)))
    return costs


def _alone(lengths: Sequence[int], shapes: Shapes, cost: CostModel) -> List[float]:
    """What each row would cost by itself."""
    return [cost(1, shapes.length(length), length) for length in lengths]


def _least(lengths: Sequence[int], shapes: Shapes, cost: CostModel) -> float:
    """What all rows in one run would cost if none were padded to another's length."""
    return cost.run + sum(each - cost.run for each in _alone(lengths, shapes, cost))
