"""The largest of many numbers."""

from __future__ import annotations

import numpy as np


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` largest values, (values), largest first, and of equal ones the earliest."""
    negative = -values
    if count >= len(values):
        return np.argsort(negative, kind="stable")
    last = np.partition(negative, count - 1)[count - 1]
    better = np.flatnonzero(negative < last)
    chosen = np.concatenate((better, np.flatnonzero(negative == last)[: count - len(better)]))
    return np.asarray(chosen[np.argsort(negative[chosen], kind="stable")])
