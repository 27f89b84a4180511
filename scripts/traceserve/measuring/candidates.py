"""Candidate serving configurations, by the settings to vary, in order of importance, and their ranges."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable, List, Sequence

from traceserve.archives.model_config import Serving

# From a configuration to the ladders to climb: rung by rung, as long as that helps.
Setting = Callable[[Serving], List[List[Serving]]]

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCH_DELAYS = (1, 2, 5, 10, 20, 50)
LENGTH_STEPS = (1, 8, 16, 32, 64)


def settings_to_try(cores: int, connections: int, longest_step: int, batch_size: int) -> List[Setting]:
    """Return the settings of a machine with this many cores, for this many concurrent requests, this longest row and
    this batch size before."""
    sizes = [n for n in BATCH_SIZES if n < connections]
    sizes += [n for n in BATCH_SIZES if n >= connections][:1]  # a larger one is never filled
    steps = [n for n in LENGTH_STEPS if n <= longest_step]

    def sizing(serving: Serving) -> List[List[Serving]]:
        return _both_ways(serving.batch_size, sizes, lambda n: replace(serving, batch_size=n))

    def batch_delay(serving: Serving) -> List[List[Serving]]:
        return _both_ways(serving.max_batch_delay, BATCH_DELAYS, lambda n: replace(serving, max_batch_delay=n))

    def length_step(serving: Serving) -> List[List[Serving]]:
        return _both_ways(
            serving.length_step or 1, steps, lambda n: replace(serving, length_step=None if n == 1 else n)
        )

    def layouts(serving: Serving) -> List[List[Serving]]:
        return _splits(serving, cores)

    # Batches that never fill wait for their delay, whoever computes them.
    first = [sizing, layouts] if batch_size > connections else [layouts, sizing]
    return [*first, batch_delay, length_step, lambda serving: _neighbours(serving, cores)]


def _both_ways(now: int, values: Sequence[int], make: Callable[[int], Serving]) -> List[List[Serving]]:
    larger = [make(n) for n in values if n > now]
    smaller = [make(n) for n in reversed(values) if n < now]
    return [larger, smaller]


def _splits(serving: Serving, cores: int) -> List[List[Serving]]:
    """Return ways to split all cores: from one worker per core to one worker with all."""
    counts = sorted({n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n < cores} | {cores}, reverse=True)
    return [[replace(serving, workers=n, threads=cores // n)] for n in counts]


def _neighbours(serving: Serving, cores: int) -> List[List[Serving]]:
    """Return one worker or thread more or fewer: a core less for the frontend, or slightly more work than cores."""
    workers = serving.workers or 1
    threads = serving.threads or max(1, cores // workers)
    most = max(cores + 1, cores * 3 // 2)
    near = ((workers + 1, threads), (workers - 1, threads), (workers, threads + 1), (workers, threads - 1))
    return [[replace(serving, workers=w, threads=t)] for w, t in near if w >= 1 and 1 <= t <= cores and w * t <= most]
