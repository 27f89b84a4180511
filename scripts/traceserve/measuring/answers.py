"""Whether a server gives the same request the same answer."""

from __future__ import annotations

import json
import math
from typing import Dict

_RELATIVE, _ABSOLUTE = 1e-3, 1e-4  # a batch's shape changes the order of sums


class Consistency:
    """Compares each answer with the first one to the same body."""

    def __init__(self) -> None:
        self._first: Dict[bytes, bytes] = {}

    def __call__(self, body: bytes, answer: bytes) -> bool:
        """Return whether this answer is the first one to this body, or equal to it."""
        return same_answer(self._first.setdefault(body, answer), answer)


def same_answer(one: bytes, other: bytes) -> bool:
    """Return whether two answers are equal: byte for byte, or as JSON with numbers that differ by rounding only."""
    if one == other:
        return True
    try:
        return close(json.loads(one), json.loads(other))
    except ValueError:
        return False


def close(one: object, other: object) -> bool:
    """Return whether two JSON values are equal but for rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
    return bool(one == other)
