"""Runs rows on this machine's cores, and learns what runs cost there."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Callable, Iterator, List, Optional, Sequence

from traceserve_runtime.batching import costs, measuring
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.batching.costs import CostModel, Pace
from traceserve_runtime.batching.lanes import Batches, Lanes, least_cost, row_cost, schedule
from traceserve_runtime.batching.measuring import Measuring
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Runner

_OF_ONE_CORE = 0.9  # a token's cost there, relative to all cores' times their number: a guess until measured


class Scheduler:
    """Groups rows into micro-batches, and runs these one after another or in parallel.

    The `cost` of a run is a guess until measured. From then on the grouping of rows, and so the last digits of answers,
    depends on this machine. A model that `loops` runs its rows by itself, and only the `pace` of its runs is kept here.
    """

    def __init__(self, runner: Runner, manifest: Manifest, cost: CostModel, most_tokens: int, loops: bool) -> None:
        self.cost = replace(cost, padding=runner.padding)
        self.lanes: Optional[Lanes] = None  # if the runner can run micro-batches in parallel
        self.pace = Pace()
        self._runner = runner
        self._manifest = manifest
        self._most_tokens = most_tokens
        self._loops = loops
        self._measuring = Measuring(iter(()))

    def make_ready(self) -> None:
        """Prepare to answer clients after the first, slow runs."""
        if not self._loops:  # whose first parts of prompts are better too short than too long
            self.pace = Pace()
        self.open_lanes()
        self._measuring = Measuring(self._measure())

    def open_lanes(self) -> None:
        """Run micro-batches in parallel from now on, if the runner can; with guessed costs until measured."""
        if self.lanes is None and not self._loops:
            threads = self._runner.open_lanes()
            if threads:
                longer = _OF_ONE_CORE * len(threads)
                cost = replace(self.cost, token=longer * self.cost.token, attention=longer * self.cost.attention)
                self.lanes = Lanes(threads, cost)

    def measure(self) -> None:
        """Measure the cost of a run on all cores, and on one while the others are as busy."""
        for _ in self._measure():
            pass

    def _measure(self) -> Iterator[float]:
        """Run `measure`; yields the seconds of each run."""
        if self._loops:
            return
        timings = yield from measuring.time_runs(self._runner, self._manifest)
        self.cost = costs.fit_costs(timings, self.cost.padding) or self.cost
        self.open_lanes()
        if self.lanes is not None:
            self.lanes = yield from measuring.measure_lanes(
                self._runner, self._manifest, self.lanes, timings, self.cost
            )

    def idle(self) -> None:
        """Call this when nobody waits for an answer: it may measure one run."""
        self._measuring.go_on()

    def row_cost(self, length: int) -> float:
        """Return what a row of this length adds to a run's cost."""
        return row_cost(length, self._manifest.shapes, self.cost)

    def run(self, lengths: Sequence[int], act: Callable[[Batches], Stats]) -> List[Stats]:
        """Run `act` on the micro-batches of rows of these lengths: all at once, or each lane's own."""
        shapes = self._manifest.shapes
        planned = schedule(lengths, shapes, self.cost, self.lanes, self._most_tokens)
        began = time.perf_counter()
        if self.lanes is not None and len(planned) > 1:
            counted = self.lanes.run(act, planned)
        else:
            counted = [act(planned[0])]
        seconds = time.perf_counter() - began
        self.pace.ran(least_cost(lengths, shapes, self.cost), seconds)
        self._measuring.answered(seconds)
        return counted
