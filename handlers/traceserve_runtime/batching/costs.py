"""The cost of a run, learned from timed runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple, Optional, Sequence, Tuple, TypeVar

import numpy as np

from traceserve_runtime.runner import Padding

Number = TypeVar("Number", float, np.ndarray)


@dataclass(frozen=True)
class CostModel:
    """The cost of one run, in units of one token's linear layers: a + b * tokens + c * positions * length.

    A padded position counts as a fraction of a token.
    """

    run: float = 30.0
    token: float = 1.0
    attention: float = 0.002
    padding: Padding = Padding()

    def __call__(self, batch: Number, length: int, tokens: Optional[Number] = None) -> Number:
        """Return the cost of a batch of this length with this many `tokens`; by default without padding."""
        positions = batch * length
        share = self.padding.cost
        computed = positions if tokens is None else share * positions + (1 - share) * tokens
        return self.run + self.token * computed + self.attention * positions * length

    def scaled(self, factor: float) -> CostModel:
        """Multiply the cost."""
        return replace(self, run=self.run * factor, token=self.token * factor, attention=self.attention * factor)


class Timing(NamedTuple):
    """The duration of one run of a shape."""

    batch: int
    length: int
    seconds: float


# Beyond these a fit has followed noise, for example of another process.
_LEAST_RUN, _MOST_RUN, _MOST_ATTENTION = 5.0, 128.0, 0.05


def fit_costs(timings: Sequence[Timing], padding: Padding = Padding()) -> Optional[CostModel]:
    """Fit a cost model to unpadded runs of at least three shapes; None if none explains them.

    Least squares of the relative errors with no coefficient below 0: every choice of terms is solved, and the best one
    without a negative coefficient wins. If tokens cost nothing next to the run, the run's cost is the maximum.
    """
    timings = [timing for timing in timings if timing.seconds > 0]
    if len(timings) < 3:
        return None
    tokens = np.array([timing.batch * timing.length for timing in timings], dtype=float)
    lengths = np.array([timing.length for timing in timings], dtype=float)
    seconds = np.array([timing.seconds for timing in timings])
    terms = np.stack([tokens, np.ones_like(tokens), tokens * lengths], axis=1) / seconds[:, None]
    best: Optional[Tuple[float, np.ndarray]] = None
    for columns in (list(chosen) for count in (3, 2, 1) for chosen in combinations((0, 1, 2), count)):
        solution = np.zeros(3)
        solution[columns] = np.linalg.lstsq(terms[:, columns], np.ones(len(timings)), rcond=None)[0]
        error = float(np.square(terms @ solution - 1).sum())
        if (solution >= 0).all() and (best is None or error < best[0]):
            best = error, solution
    if best is None:
        return None
    token, run, attention = map(float, best[1])
    if not token:
        return CostModel(_MOST_RUN, padding=padding) if run else None
    return CostModel(
        min(max(run / token, _LEAST_RUN), _MOST_RUN), 1.0, min(attention / token, _MOST_ATTENTION), padding
    )


def seconds_per_cost(timings: Sequence[Timing], cost: CostModel) -> float:
    """Return the seconds per unit of `cost`, the median over these runs."""
    return float(np.median([timing.seconds / cost(timing.batch, timing.length) for timing in timings]))


_FADING = 0.7  # of the past at each run: a few runs outweigh those of a busier minute before
_GUESS = 10_000.0  # cost per second before anything was measured: a small encoder on two cores


class Pace:
    """The speed of the last runs, by which work is cut into pieces that take about as long as wanted."""

    def __init__(self) -> None:
        self._cost = 0.0
        self._seconds = 0.0

    def ran(self, cost: float, seconds: float) -> None:
        """Learn from a run."""
        self._cost = _FADING * self._cost + cost
        self._seconds = _FADING * self._seconds + seconds

    def cost_within(self, seconds: float) -> float:
        """Return the cost of runs that take about this long."""
        return seconds * (self._cost / self._seconds if self._seconds else _GUESS)
