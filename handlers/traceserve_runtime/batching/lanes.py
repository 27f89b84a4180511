"""Runs micro-batches on several cores: one after another on all of them, or in parallel on one core each.

A run of few tokens does not keep several cores busy: they synchronize after every operator. Parallel
micro-batches do, so this answers a full batch sooner; a single text is faster on all cores.
"""

from __future__ import annotations

from concurrent.futures import Executor, wait
from dataclasses import dataclass
from itertools import accumulate
from typing import Callable, List, Optional, Sequence, Tuple, TypeVar

from traceserve_runtime.batching.costs import CostModel
from traceserve_runtime.batching.plan import MOST_BATCH_TOKENS, MOST_ROWS, plan_batches
from traceserve_runtime.manifest import Shapes

Batches = List[List[int]]
Result = TypeVar("Result")

_MOST_OF_A_LANE = 3  # micro-batches: more reduce padding and spread better, but each is a run
_PRECISION = 0.001  # of all costs


@dataclass(frozen=True)
class Lanes:
    """Threads that compute on one core each, and the cost of a run there while all are busy."""

    threads: Sequence[Executor]
    cost: CostModel

    def run(self, act: Callable[[Batches], Result], batches: Sequence[Batches]) -> List[Result]:
        """Run `act` on each list of micro-batches in parallel; all have ended when this returns or raises."""
        running = [thread.submit(act, own) for thread, own in zip(self.threads, batches)]
        wait(running)
        return [each.result() for each in running]


def schedule(
    lengths: Sequence[int],
    shapes: Shapes,
    cost: CostModel,
    lanes: Optional[Lanes],
    most_tokens: int = MOST_BATCH_TOKENS,
) -> List[Batches]:
    """Return the micro-batches of each lane, or of one with all cores if that finishes sooner; see `plan`."""
    if lanes is None or len(lengths) < 2:
        return [plan_batches(lengths, shapes, cost, most_tokens)]
    rows = _Rows(lengths, shapes, lanes.cost, most_tokens)
    spread, soonest = _spread(rows.cut(len(lanes.threads)), lengths, shapes, lanes)
    for each in range(2, _MOST_OF_A_LANE + 1):
        if soonest <= rows.least(each, len(lanes.threads)):
            break
        other, ends = _spread(rows.cut(len(lanes.threads) * each), lengths, shapes, lanes)
        if ends < soonest:
            spread, soonest = other, ends
    if len(spread) > 1 and least_cost(lengths, shapes, cost) >= soonest:
        return spread
    together = plan_batches(lengths, shapes, cost, most_tokens)
    return spread if len(spread) > 1 and soonest <= sum(_costs(together, lengths, shapes, cost)) else [together]


class _Rows:
    """Rows, longest first, to divide into micro-batches."""

    def __init__(self, lengths: Sequence[int], shapes: Shapes, cost: CostModel, most_tokens: int) -> None:
        self._order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        self._lengths = [lengths[i] for i in self._order]
        self._shapes = shapes
        self._cost = cost
        self._most_tokens = most_tokens
        self._padded = [shapes.length(n) for n in self._lengths]
        of_positions = {n: cost(1, n, 0) - cost.run for n in set(self._padded)}
        self._of_positions = [of_positions[n] for n in self._padded]  # the cost of a row's positions
        self._of_token = cost(0, 0, 1) - cost.run
        self._alike = [1] * len(self._lengths)  # how many rows from each one on have its length
        for i in range(len(self._lengths) - 2, -1, -1):
            if self._lengths[i] == self._lengths[i + 1]:
                self._alike[i] += self._alike[i + 1]
        self._tokens_before = [0, *accumulate(self._lengths)]
        # The cost of all rows, without the runs' own.
        self._positions = sum(self._of_positions) + self._of_token * self._tokens_before[-1]
        self._one_by_one = self._positions + cost.run * len(lengths)

    def least(self, each: int, lanes: int) -> float:
        """Return the cost below which no division is, with so many micro-batches in each lane."""
        return self._cost.run * each + self._positions / lanes

    def cut(self, count: int) -> Batches:
        """Divide into about this many contiguous micro-batches, minimizing the most expensive one.

        The longest rows within a limit form one micro-batch, then the next ones. The limit grows from the cost of equal
        shares, below which none can be, in steps that double; the last step is bisected.
        """
        step = _PRECISION * self._one_by_one
        failing = limit = self.least(1, count) * (1 + 1e-9)  # which rounding might exceed
        batches = self._batches_within(limit)
        while len(batches) > count and limit < self._one_by_one:
            failing, limit, step = limit, limit + step, 2 * step
            batches = self._batches_within(limit)
        while limit - failing > _PRECISION * self._one_by_one:
            middle = (failing + limit) / 2
            within = self._batches_within(middle)
            if len(within) <= count:
                limit, batches = middle, within
            else:
                failing = middle
        return batches

    def _batches_within(self, limit: float) -> Batches:
        batches, start = [], 0
        while start < len(self._order):
            end = start + self._rows_within(limit, start)
            batches.append(self._order[start:end])
            start = end
        return batches

    def _rows_within(self, limit: float, start: int) -> int:
        """Return how many rows from `start` on fit within `limit` and the plan's own limits; at least one."""
        length = self._padded[start]
        if self._shapes.batches is not None:
            cost, most = self._cost, self._most_tokens
            return max((b for b in self._shapes.batches if cost(b, length) <= limit and b * length <= most), default=1)
        most_rows = min(MOST_ROWS, self._most_tokens // length, len(self._lengths) - start)
        if not self._shapes.padded:
            most_rows = min(most_rows, self._alike[start])
        of_positions, of_token, before = self._of_positions[start], self._of_token, self._tokens_before
        rows, left = 0, limit - self._cost.run
        while rows < most_rows:  # this many more, if they had the next one's length
            more = min(int(left / (of_positions + of_token * self._lengths[start + rows])), most_rows - rows)
            if more < 1:
                break
            left -= more * of_positions + of_token * (before[start + rows + more] - before[start + rows])
            rows += more
        return max(1, rows)


def _spread(batches: Batches, lengths: Sequence[int], shapes: Shapes, lanes: Lanes) -> Tuple[List[Batches], float]:
    """Assign the longest first, each to the first free lane; return the longest lane's cost too."""
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


def row_cost(length: int, shapes: Shapes, cost: CostModel) -> float:
    """Return what a row adds to a run's cost, with no more padding than it needs by itself."""
    return cost(1, shapes.length(length), length) - cost.run


def least_cost(lengths: Sequence[int], shapes: Shapes, cost: CostModel) -> float:
    """Return the cost of all rows in one run, with no more padding than each needs by itself."""
    return cost.run + sum(row_cost(length, shapes, cost) for length in lengths)
