"""Combines a text's token vectors into one vector: sentence-transformers' poolings and the layers after them."""

from __future__ import annotations

from typing import Callable, Dict, Mapping, Sequence, TypedDict

import numpy as np

from traceserve_runtime.errors import InvalidRequest
from traceserve_runtime.tasks.scores import sigmoid


def _weighted(hidden: np.ndarray, start: int) -> np.ndarray:
    weights = np.arange(1 + start, 1 + len(hidden), dtype=np.float32)[:, None]
    return np.asarray((hidden[start:] * weights).sum(axis=0) / weights.sum())


# From one row's last hidden state, (length, hidden), and its first pooled position, to one vector, (hidden).
POOLINGS: Dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "cls": lambda hidden, start: hidden[start],
    "max": lambda hidden, start: hidden[start:].max(axis=0),
    "mean": lambda hidden, start: hidden[start:].mean(axis=0),
    "mean_sqrt_len": lambda hidden, start: hidden[start:].sum(axis=0) / np.sqrt(np.float32(len(hidden) - start)),
    "weightedmean": _weighted,
    "lasttoken": lambda hidden, start: hidden[-1],
}
ACTIVATIONS: Dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "Sigmoid": sigmoid,
    "SiLU": lambda x: x * sigmoid(x),
}


def pool(hidden: np.ndarray, pooling: str, start: int) -> np.ndarray:
    """Return the vector of one row; several poolings, joined by +, are concatenated.

    Where nothing is left behind the prompt, it is as sentence-transformers' (6.2): the first token's vector, or zeros. Raises
    InvalidRequest for `max`, which has none.
    """
    names = pooling.split("+")
    if start < len(hidden):
        return np.concatenate([POOLINGS[name](hidden, start) for name in names])
    if "max" in names:
        raise InvalidRequest("the text has no token of its own behind the prompt", "text")
    return np.concatenate([hidden[0] if name == "cls" else np.zeros_like(hidden[0]) for name in names])


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Scale to length 1 over the last axis, like torch.nn.functional.normalize, with its epsilon."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))


class _Named(TypedDict):
    kind: str  # normalize, layer_norm, or dense
    name: str  # the prefix of its arrays; empty without any


class Layer(_Named, total=False):
    """A layer after the pooling. Only a dense one has the other keys."""

    activation: str  # of ACTIVATIONS
    residual: bool


def apply(vector: np.ndarray, layers: Sequence[Layer], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Apply the checkpoint's layers to a pooled vector; raises InvalidRequest if its size does not fit them."""
    for layer in layers:
        name = layer["name"]
        if layer["kind"] == "normalize":
            vector = normalized(vector)
            continue
        weight = arrays[f"{name}.weight"]
        if weight.shape[-1] != len(vector):
            raise InvalidRequest(
                f"this model's own layers read the {weight.shape[-1]} numbers of its own pooling, not the {len(vector)} of "
                "this one",
                "parameters.pooling",
            )
        if layer["kind"] == "layer_norm":
            centred = vector - vector.mean()
            vector = centred / np.sqrt(np.square(centred).mean() + np.float32(1e-5)) * weight + arrays[f"{name}.bias"]
            continue
        given = vector
        vector = weight @ given + arrays.get(f"{name}.bias", np.float32(0))
        vector = ACTIVATIONS[layer["activation"]](vector)
        if layer["residual"]:
            projected = arrays.get(f"{name}.residual")
            vector = vector + (given if projected is None else projected @ given)
    return np.asarray(vector, dtype=np.float32)
