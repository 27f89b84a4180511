"""How far the numbers of two answers to one request are apart; whether they mean the same is the task's `same`."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Mapping, Sequence

import numpy as np

_SCORE = "score"
_APART = float("inf")


def score_difference(answer: Any, expected: Any) -> float:
    """Return the largest difference of corresponding numbers, relative to the largest expected one if that is above 1.

    Rankings are compared by what they rank, so that an exchange of near ties counts as the difference of their scores.
    Whole numbers (offsets, ids) and texts are not compared here. Infinite where nothing corresponds, or for NaN.
    """
    largest = max((abs(number) for number in _numbers(expected)), default=1.0)
    return _difference(answer, expected) / max(1.0, largest)


def _difference(answer: Any, expected: Any) -> float:
    if isinstance(expected, Mapping):
        if not isinstance(answer, Mapping):
            return _APART
        if "labels" in expected and "scores" in expected:  # zero-shot's two lists are a ranking
            return _between(_paired(answer), _paired(expected))
        return max((_of_key(key, answer, expected) for key in expected), default=0.0)
    if isinstance(expected, (list, tuple)):
        return _of_lists(answer, expected)
    if isinstance(expected, float):
        apart = abs(answer - expected) if _is_number(answer) else _APART
        return apart if np.isfinite(apart) else _APART
    return 0.0


def _of_key(key: str, answer: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Return the difference of one value; a missing one is infinitely far if it has numbers."""
    if key in answer:
        return _difference(answer[key], expected[key])
    return _APART if _numbers(expected[key]) else 0.0


def _of_lists(answer: Any, expected: Sequence[Any]) -> float:
    if not isinstance(answer, (list, tuple)):
        return _APART
    if expected and all(isinstance(item, Mapping) and _SCORE in item for item in expected):
        return _between(_ranking(answer), _ranking(expected))
    if len(answer) != len(expected):
        return _APART
    if expected and all(map(_is_number, expected)) and all(map(_is_number, answer)):
        apart = float(np.abs(np.subtract(answer, expected, dtype=np.float64)).max())
        return apart if np.isfinite(apart) else _APART
    return max((_difference(one, other) for one, other in zip(answer, expected)), default=0.0)


def _between(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Return the largest difference of two rankings; what only one ranks is compared with the other's last."""
    if not one or not other:
        return 0.0 if one == other else _APART
    last = [min(one.values()), min(other.values())]
    values = [abs(one.get(key, last[0]) - other.get(key, last[1])) for key in {*one, *other}]
    return max(values) if all(np.isfinite(values)) else _APART


def _ranking(items: Sequence[Any]) -> Dict[str, float]:
    """Return the score of each thing, by all else that is said of it except numbers that are scores too."""
    found: Dict[str, float] = {}
    for item in items:
        if isinstance(item, Mapping) and _is_number(item.get(_SCORE)):
            key = json.dumps({name: value for name, value in item.items() if name != _SCORE}, sort_keys=True)
            while key in found:
                key += "'"
            found[key] = float(item[_SCORE])
    return found


def _paired(answer: Mapping[str, Any]) -> Dict[str, float]:
    labels, scores = answer.get("labels"), answer.get("scores")
    if not isinstance(labels, list) or not isinstance(scores, list) or not all(map(_is_number, scores)):
        return {}
    return {str(label): float(score) for label, score in zip(labels, scores)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(value: Any) -> List[float]:
    if isinstance(value, float):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in _numbers(item)]
    return []
