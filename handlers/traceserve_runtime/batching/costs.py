"""What a run costs, and how that is learned from runs that were timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple, Optional, Sequence, Tuple, TypeVar

import numpy as np

from traceserve_runtime.runner import Padding

Number = TypeVar("Number", float, np.ndarray)


@dataclass(frozen=True)
class CostModel:
    """The cost of one run, in units of one token's linear layers: a + b * tokens + c * places * length.

    A place of padding counts as so much of a token.
    """

    run: float = 30.0
    token: float = 1.0
    attention: float = 0.002
    padding: Padding = Padding()

    def __call__(self, batch: Number, length: int, tokens: Optional[Number] = None) -> Number:
        """Of a batch of this length, that has so many `tokens`; if they are not given, no padding."""
        places = batch * length
        share = self.padding.cost
        computed = places if tokens is None else share * places + (1 - share) * tokens
        return self.run + self.token * computed + self.attention * places * length

    def scaled(self, factor: float) -> CostModel:
        """So many times the cost."""
        return replace(self, run=self.run * factor, token=self.token * factor, attention=self.attention * factor)


class Timing(NamedTuple):
    """How long one run of a shape took."""

    batch: int
    length: int
    seconds: float


# Beyond these a fit has followed noise: of another process on the machine while this one started, say.
_LEAST_RUN, _MOST_RUN, _MOST_ATTENTION = 5.0, 128.0, 0.05


def fit(timings: Sequence[Timing], padding: Padding = Padding()) -> Optional[CostModel]:
    """The cost model that explains runs of at least three shapes, without padding, best, or None where none does.

    Least squares of the relative errors with no coefficient below 0: every choice of terms is solved, and the best one
    without a negative coefficient taken. Where tokens cost nothing beside the run, a run is as dear as can be.
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
    """What a unit of `cost` took, the median over these runs."""
    return float(np.median([timing.seconds / cost(timing.batch, timing.length) for timing in timings]))
