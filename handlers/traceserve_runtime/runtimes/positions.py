"""A loop's state as arrays: its names in graphs without torch, and joining rows of different lengths."""

from __future__ import annotations

from typing import Sequence

import numpy as np

# Prefixes of the state in the inputs and outputs of a step's graph; a number follows.
PAST, PRESENT = "past_", "present_"


def joined_rows(arrays: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Return the rows of all arrays, each with its last `length` positions, or padded before them.

    Positions are the second dimension of an array with two, else the third.
    """
    axis = 1 if arrays[0].ndim == 2 else 2
    shape = list(arrays[0].shape)
    shape[0], shape[axis] = sum(len(array) for array in arrays), length
    whole = np.zeros(shape, dtype=arrays[0].dtype)
    start = 0
    for array in arrays:
        taken = min(length, array.shape[axis])
        rows = np.moveaxis(whole[start : start + len(array)], axis, 0)
        rows[length - taken :] = np.moveaxis(array, axis, 0)[array.shape[axis] - taken :]
        start += len(array)
    return whole
