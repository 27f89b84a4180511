"""Lets predictions go first: says when the next run of an explanation may begin, and how many rows it may have.

A run that has begun delays the predictions that come meanwhile. So beside predictions such runs are short, and take so
small a share of the time that the slowest hundredth of predictions does not change; without any they take all of it.
"""

from __future__ import annotations

import time

_SHARE = 0.008  # of the time, beside predictions: fewer of them than one in a hundred meet a run
_QUIET = 0.2  # seconds without a prediction, after which explanations take all the time
_SECONDS = 0.03  # of a run without predictions; a prediction that comes then waits for its end
_GUESS = 5e-5  # seconds per token and step before anything was measured
_FADING = 0.7  # of the past at each run
MOST_EXPLAINED_TOKENS = 1024  # in one run, for memory: its gradients need everything that the model computed


class Pacing:
    """One for each engine; times are those of `time.perf_counter`."""

    def __init__(self) -> None:
        self._predicted = -_QUIET
        self._next = 0.0
        self._seconds = self._tokens = 0.0
        self._granted = 0

    def predicted(self, now: float) -> None:
        """Count a run of predictions."""
        self._predicted = now

    def beside_predictions(self, now: float) -> bool:
        """Return whether predictions came a moment ago."""
        return now - self._predicted < _QUIET

    def wait(self, now: float) -> float:
        """Return how many seconds the next run must wait."""
        if not self.beside_predictions(now):
            return 0.0
        return max(0.0, min(self._next, self._predicted + _QUIET) - now)

    def rows(self, length: int, wanted: int, polite: bool = True) -> int:
        """Return how many of the wanted rows of this length the run that begins now may have; as many as memory holds, if
        nobody can come meanwhile."""
        each = self._seconds / self._tokens if self._tokens else _GUESS
        rows = max(1, min(wanted, MOST_EXPLAINED_TOKENS // length))
        if polite:
            beside = self.beside_predictions(time.perf_counter())
            rows = 1 if beside else max(1, min(rows, int(_SECONDS / (each * length))))
        self._granted = rows * length
        return rows

    def ran(self, began: float, ended: float) -> None:
        """Learn from a run."""
        if self._granted:
            self._seconds = _FADING * self._seconds + (ended - began)
            self._tokens = _FADING * self._tokens + self._granted
        self._granted = 0
        self._next = ended + (ended - began) / _SHARE
