"""Which rows run together; pad, run, unpad."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Protocol, Sequence, Tuple

import numpy as np

from traceserve_runtime.manifest import Manifest, Shapes
from traceserve_runtime.tokenization import Row

Arrays = Dict[str, np.ndarray]
State = Tuple[Any, ...]  # what a runner keeps between the steps of a loop, on its own device


class Runner(Protocol):
    """A read model. One that is run once is called; one that is run in a loop is started, and then takes steps."""

    def __call__(self, inputs: Arrays) -> Arrays:
        """Named arrays to named arrays, in one pass."""
        ...

    def start(self, inputs: Arrays) -> State:
        """The state that a loop over these inputs begins with."""
        ...

    def step(self, inputs: Arrays, state: State, rows: Optional[np.ndarray] = None) -> Tuple[Arrays, State]:
        """The outputs of the next tokens, and the state with them; `rows`, int64, chooses and orders the state's rows."""
        ...


# More rows or tokens in one run gain nothing on any processor measured, and memory grows with them.
MOST_ROWS = 64
MOST_TOKENS = 16384


@dataclass(frozen=True)
class CostModel:
    """The cost of one run, in units of one token's linear layers: a + b * tokens + c * tokens * length."""

    run: float = 30.0
    token: float = 1.0
    attention: float = 0.002

    def __call__(self, batch: int, length: int) -> float:
        tokens = batch * length
        return self.run + self.token * tokens + self.attention * tokens * length


@dataclass
class Stats:
    """What was computed for a list of requests."""

    requests: int = 0
    rows: int = 0
    tokens: int = 0  # real ones, special tokens included
    padded_tokens: int = 0  # what the model computed: real ones and padding
    micro_batches: int = 0
    model_seconds: float = 0.0

    @property
    def padding_share(self) -> float:
        """The share of the computed tokens that were padding, 0 to 1."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0


def plan(
    lengths: Sequence[int], shapes: Shapes, cost: CostModel = CostModel(), most_tokens: int = MOST_TOKENS
) -> List[List[int]]:
    """The cheapest cut of rows, sorted by length, into contiguous micro-batches, as lists of indices into `lengths`.

    Dynamic programming over the cost model: best(i) = min over j < i of best(j) + cost of the rows j..i-1.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    most_rows = MOST_ROWS if shapes.batches is None else max(shapes.batches)
    best: List[float] = [0.0]
    cut: List[int] = [0]
    for end in range(1, len(order) + 1):
        length = shapes.length(lengths[order[end - 1]])
        rows = max(1, min(end, most_rows, most_tokens // length))
        costs = [best[end - n] + cost(shapes.batch(n), length) for n in range(1, rows + 1)]
        cheapest = min(range(len(costs)), key=costs.__getitem__)
        best.append(costs[cheapest])
        cut.append(end - cheapest - 1)
    batches = []
    end = len(order)
    while end:
        batches.append(order[cut[end] : end])
        end = cut[end]
    return batches[::-1]


def pad(rows: Sequence[Row], manifest: Manifest) -> Tuple[Arrays, List[slice]]:
    """The model's inputs, int64 of shape (batch, length), for rows that run together, and where each row lies in them.

    Where the shapes fix the batch, it is filled by repeating the last row: a row that is all padding has no token to
    attend to, and divides zero by zero in some models.
    """
    length = manifest.shapes.length(max(row.length for row in rows))
    batch = manifest.shapes.batch(len(rows))
    facts = manifest.tokenizer
    columns: Dict[str, Tuple[int, Callable[[Row], Sequence[int]]]] = {
        "input_ids": (facts.pad_id, lambda row: row.encoding.ids),
        "attention_mask": (0, lambda row: row.encoding.attention_mask),
        "token_type_ids": (facts.pad_type_id, lambda row: row.encoding.type_ids),
    }
    places = [
        slice(0, row.length) if facts.padding_side == "right" else slice(length - row.length, length) for row in rows
    ]
    arrays = {}
    for name in manifest.inputs:
        padding, values = columns[name]
        array = np.full((batch, length), padding, dtype=np.int64)
        for i, (row, place) in enumerate(zip(rows, places)):
            array[i, place] = values(row)
        array[len(rows) :] = array[len(rows) - 1]
        arrays[name] = array
    return arrays, places


def unpad(outputs: Arrays, places: Sequence[slice], per_token: Sequence[str]) -> List[Arrays]:
    """Each row's part of the outputs; what is given per token is cut to the row's own tokens."""
    return [
        {name: array[i, place] if name in per_token else array[i] for name, array in outputs.items()}
        for i, place in enumerate(places)
    ]


def run(
    runner: Callable[[Arrays], Arrays], rows: Sequence[Row], manifest: Manifest, per_token: Sequence[str], stats: Stats
) -> List[Arrays]:
    """The outputs of rows that run together: pad, run, unpad; adds to `stats`."""
    arrays, places = pad(rows, manifest)
    started = time.perf_counter()
    outputs = runner(arrays)
    stats.model_seconds += time.perf_counter() - started
    stats.micro_batches += 1
    stats.rows += len(rows)
    stats.tokens += sum(row.length for row in rows)
    stats.padded_tokens += arrays[manifest.inputs[0]].size
    return unpad(outputs, places, per_token)
