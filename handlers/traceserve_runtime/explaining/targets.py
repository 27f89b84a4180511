"""What is explained: one number of a model's output, as a task names it; and models that have its gradients."""

from __future__ import annotations

from typing import NamedTuple, Protocol, Sequence, Tuple, Union

import numpy as np

from traceserve_runtime.json_types import JsonObject
from traceserve_runtime.runner import Arrays


class OutputCell(NamedTuple):
    """One number of a row's outputs: its `position` in the output of this name, without the batch dimension."""

    output: str
    position: Tuple[int, ...]

    @property
    def everywhere(self) -> Tuple[Union[slice, int], ...]:
        """Its index in the outputs of a whole batch."""
        return (slice(None), *self.position)


class Aim(NamedTuple):
    """The part of a target that one row (window) of the request computes: the sum of these cells, times `weight`."""

    row: int
    cells: Tuple[OutputCell, ...]
    weight: float = 1.0


class ExplanationTarget(NamedTuple):
    """An explained number: `name` as the answer says it, the rows that compute it, and the `quantity` in words."""

    name: JsonObject
    aims: Tuple[Aim, ...]
    quantity: str = "logit"


def scalars(outputs: Arrays, cells: Sequence[OutputCell]) -> np.ndarray:
    """Return each row's sum of these cells, float64 of shape (batch)."""
    found: np.ndarray = np.sum([outputs[cell.output][cell.everywhere].astype(np.float64) for cell in cells], axis=0)
    return found


class Differentiable(Protocol):
    """A model from word embeddings to outputs, with its gradients. All rows have one length, and no padding."""

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Return the word embeddings, float32 of shape (batch, length, size), of token ids, int64 (batch, length)."""
        ...

    def outputs(self, embeddings: np.ndarray, inputs: Arrays) -> Arrays:
        """Return the outputs for these embeddings; `inputs` are the model's usual ones."""
        ...

    def gradients(self, embeddings: np.ndarray, inputs: Arrays, cells: Sequence[OutputCell]) -> np.ndarray:
        """Return the gradients of each row's sum of cells, float32 like `embeddings`."""
        ...
