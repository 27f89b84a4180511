"""The original's outputs, which every artifact is compared with: each row by itself, without padding, in float32."""

from __future__ import annotations

from typing import Any, Callable, Dict, Sequence

import numpy as np
from traceserve_runtime.batching import Arrays
from traceserve_runtime.tasks.contract import Request
from traceserve_runtime.tokenization import Row

from traceserve.loading import Original

FORCED_STEPS = 3  # of a loop, in each cell of the gate's grid


class Reference:
    """The original's outputs, each computed once however many artifacts are compared with it."""

    def __init__(self, original: Original) -> None:
        self.original = original
        self._known: Dict[Any, Arrays] = {}

    def outputs(self, key: Any, compute: Callable[[], Arrays]) -> Arrays:
        """What `compute` gives, the first time that it is asked for."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


def run_original(original: Original, row: Row, outputs: Sequence[str]) -> Arrays:
    """The original's outputs for one row alone, without padding: each as the row has it, without the batch."""
    import torch

    columns = {
        "input_ids": row.encoding.ids,
        "attention_mask": [1] * row.length,
        "token_type_ids": row.encoding.type_ids,
    }
    with torch.no_grad():
        result = original.model(**{name: torch.tensor([columns[name]]) for name in original.inputs})
    return {name: result[name][0].float().numpy() for name in outputs}


def run_forced(original: Original, loop: str, row: Row) -> Arrays:
    """The logits, (FORCED_STEPS + 1, vocabulary), where a loop is made to read given tokens after one row."""
    import torch

    from traceserve.looping import LOOPS

    with torch.no_grad():
        return {"logits": LOOPS[loop].forced(original, row, FORCED_STEPS).float().numpy()}


def run_text(original: Original, loop: str, row: Row, request: Request) -> Arrays:
    """The new tokens that the original's own `generate` writes after one row alone."""
    import torch

    from traceserve.looping import generate

    with torch.no_grad():
        tokens = generate(original, loop, row, request)
    return {"tokens": np.array(tokens, dtype=np.int64)}
