"""Turns a model's outputs into scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Dict, List, Sequence

import numpy as np

from traceserve_runtime.softmax import softmax
from traceserve_runtime.texts.rows import Row

if TYPE_CHECKING:
    from traceserve_runtime.tasks.contract import ModelFacts


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Apply the sigmoid to each element."""
    with np.errstate(over="ignore"):  # exp of a large number is infinite, and its inverse rightly 0
        return np.asarray(1.0 / (1.0 + np.exp(-logits)))


def unchanged(logits: np.ndarray) -> np.ndarray:
    """Return the model's own output."""
    return logits


MOST_MOVED = 0.05  # a sigmoid of an unchanged answer

FUNCTIONS: Dict[str, Callable[[np.ndarray], np.ndarray]] = {"softmax": softmax, "sigmoid": sigmoid, "none": unchanged}


def function_to_apply(model: ModelFacts) -> str:
    """Return the function that the pipeline applies to this classifier's logits."""
    kind = model.config.get("problem_type")
    if kind == "regression":
        return "none"
    if kind == "multi_label_classification" or len(model.config["id2label"]) == 1:
        return "sigmoid"
    return "softmax"


def average(values: Sequence[np.ndarray], rows: Sequence[Row]) -> np.ndarray:
    """Average over windows, weighted by each window's text tokens."""
    if len(values) == 1:
        return values[0]
    weights = np.array([row.tokens for row in rows], dtype=np.float32)
    return np.average(np.stack(values), axis=0, weights=weights)


def window_shares(rows: Sequence[Row]) -> List[float]:
    """Return each window's weight in that average; together they are 1."""
    if len(rows) == 1:
        return [1.0]
    whole = sum(row.tokens for row in rows)
    return [row.tokens / whole for row in rows]
