"""Measures what runs cost on this machine, one run at a time while nobody waits for an answer."""

from __future__ import annotations

import logging
import time
from typing import Callable, Generator, Iterator, List

from traceserve_runtime.batching import batches, costs
from traceserve_runtime.batching.costs import CostModel, Timing
from traceserve_runtime.batching.lanes import Lanes
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays, Runner

logger = logging.getLogger(__name__)

_SECONDS_TO_FIT = 0.4  # on all cores, and on one each; small models fit all shapes into it, large ones three
_RUNS_TO_FIT = 4  # per shape
_FIRST_ANSWERING = 0.1  # seconds of answering before the first run is measured
_ANSWERING = 30  # seconds of answering, per second of the last measured run, before the next: 3 % under load


class Measuring:
    """Runs to measure between answers, in a small share of the time that answers take.

    Before the first answer they would take a tenth of the time to it, and a thread of their own would have its own OpenMP
    threads, which keep the worker's waiting.
    """

    def __init__(self, runs: Iterator[float]) -> None:
        self._runs = runs  # measures one at each step, and yields its seconds
        self._answer_first = _FIRST_ANSWERING  # seconds of answering before the next

    def answered(self, seconds: float) -> None:
        """Count time in which the model answered."""
        self._answer_first -= seconds

    def go_on(self) -> None:
        """Measure the next run, if it is time for it."""
        if self._answer_first > 0:
            return
        try:
            self._answer_first = _ANSWERING * next(self._runs, 0.0)
        except Exception as error:  # of any reader; nobody waits for this
            logger.warning("the cost of this model's runs could not be measured, and is guessed: %s", error)


def time_runs(run: Callable[[Arrays], object], manifest: Manifest) -> Generator[float, None, List[Timing]]:
    """Time runs of a few shapes, smallest first, until the time is up; yields each run's seconds."""
    shapes, most = manifest.shapes, manifest.max_length
    wanted = [(1, 16), (4, 16), (1, 64), (16, 16), (4, 64), (1, most)]
    fitting = {(shapes.batch(b), shapes.length(min(n, most))) for b, n in wanted if shapes.holds(b)}
    timings: List[Timing] = []
    spent = 0.0
    for batch, length in sorted(fitting, key=lambda shape: shape[0] * shape[1]):
        inputs = batches.filled(manifest, batch, length)
        seconds = []
        for _ in range(1 + _RUNS_TO_FIT):  # the first run of a shape prepares others
            began = time.perf_counter()
            run(inputs)
            seconds.append(time.perf_counter() - began)
            yield seconds[-1]
        timings.append(Timing(batch, length, min(seconds[1:])))  # slower ones were disturbed
        spent += sum(seconds)
        if len(timings) >= 3 and spent > _SECONDS_TO_FIT:
            break
    return timings


def measure_lanes(
    runner: Runner, manifest: Manifest, lanes: Lanes, timings: List[Timing], cost: CostModel
) -> Generator[float, None, Lanes]:
    """Measure runs on one core while the others are as busy; yields each run's seconds, returns the lanes with its cost.

    `timings` and `cost` are those of all cores, in whose unit the lanes' cost is given.
    """

    def side_by_side(inputs: Arrays) -> None:
        for running in [thread.submit(runner, inputs) for thread in lanes.threads]:
            running.result()

    alone = yield from time_runs(side_by_side, manifest)
    own = costs.fit_costs(alone, cost.padding)
    if own is None or not timings:
        return lanes
    return Lanes(lanes.threads, own.scaled(costs.seconds_per_cost(alone, own) / costs.seconds_per_cost(timings, cost)))
