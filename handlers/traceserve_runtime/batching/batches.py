"""Runs rows together: pad, run, unpad."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Callable, Dict, List, Sequence, Tuple

import numpy as np

from traceserve_runtime.batching.plan import common_length
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays, Padding, Runner
from traceserve_runtime.texts.rows import Row


@dataclass
class Stats:
    """Counters of the computation for a list of requests."""

    requests: int = 0
    rows: int = 0
    tokens: int = 0  # real ones, including special tokens
    padded_tokens: int = 0  # computed by the model: real ones, and padding weighted by its cost
    micro_batches: int = 0
    model_seconds: float = 0.0
    errors: Dict[str, int] = field(default_factory=dict)  # calls that failed, by the name of their error

    def count_error(self, error: Exception) -> None:
        """Count a call that failed."""
        name = type(error).__name__
        self.errors[name] = self.errors.get(name, 0) + 1

    def taken(self) -> Stats:
        """Return the counts so far, and begin again."""
        own = replace(self)
        vars(self).update(vars(Stats()))
        return own

    def add(self, *lanes: Stats) -> None:
        """Add counters of parallel lanes: the time is the slowest one's."""
        for lane in lanes:
            self.rows += lane.rows
            self.tokens += lane.tokens
            self.padded_tokens += lane.padded_tokens
            self.micro_batches += lane.micro_batches
        self.model_seconds += max(lane.model_seconds for lane in lanes)

    def counters(self, calls: int, seconds: float) -> Dict[str, float]:
        """Return the host metrics for a batch of this many calls.

        Times are summed over calls, like TorchServe's own: each waits for its batch.
        """
        return {
            "traceserve_requests_total": self.requests,
            "traceserve_tokens_total": self.tokens,
            "traceserve_windows_total": self.rows,
            "traceserve_computed_tokens_total": self.padded_tokens,
            "traceserve_micro_batches_total": self.micro_batches,
            "traceserve_model_seconds_total": round(self.model_seconds * calls, 6),
            "traceserve_handler_seconds_total": round(seconds * calls, 6),
        }

    @property
    def padding_share(self) -> float:
        """The share of computed tokens that were padding, 0 to 1."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0


def pad(rows: Sequence[Row], manifest: Manifest, padding: Padding = Padding()) -> Tuple[Arrays, List[slice]]:
    """Return the model's inputs, int64 of shape (batch, length), for rows that run together, and each row's position.

    See `common_length` for `padding`.
    A fixed batch is filled by repeating the last row: a row of only padding has no token to
    attend to, and some models divide zero by zero.
    """
    length = common_length([row.length for row in rows], manifest.shapes, manifest.max_length, padding)
    batch = manifest.shapes.batch(len(rows))
    facts = manifest.tokenizer
    columns: Dict[str, Tuple[int, Callable[[Row], Sequence[int]]]] = {
        "input_ids": (facts.pad_id, lambda row: row.encoding.ids),
        "attention_mask": (0, lambda row: row.encoding.attention_mask),
        "token_type_ids": (facts.pad_type_id, lambda row: row.encoding.type_ids),
    }
    positions = [
        slice(0, row.length) if facts.padding_side == "right" else slice(length - row.length, length) for row in rows
    ]
    arrays = {}
    for name in manifest.inputs:
        filler, values = columns[name]
        array = np.full((batch, length), filler, dtype=np.int64)
        for i, (row, position) in enumerate(zip(rows, positions)):
            array[i, position] = values(row)
        array[len(rows) :] = array[len(rows) - 1]
        arrays[name] = array
    return arrays, positions


def filled(manifest: Manifest, batch: int, length: int) -> Arrays:
    """Return model inputs, int64 of shape (batch, length), with meaningless unpadded rows, for timing."""
    values = {"input_ids": manifest.tokenizer.pad_id, "attention_mask": 1, "token_type_ids": 0}
    return {name: np.full((batch, length), values[name], dtype=np.int64) for name in manifest.inputs}


def unpad(outputs: Arrays, positions: Sequence[slice], per_token: Sequence[str]) -> List[Arrays]:
    """Return each row's part of the outputs; per-token outputs are cut to the row's own tokens."""
    return [
        {name: array[i, position] if name in per_token else array[i] for name, array in outputs.items()}
        for i, position in enumerate(positions)
    ]


def run_batch(
    runner: Runner, rows: Sequence[Row], manifest: Manifest, per_token: Sequence[str], stats: Stats
) -> List[Arrays]:
    """Pad rows, run them together, unpad the outputs; adds to `stats`."""
    arrays, positions = pad(rows, manifest, runner.padding)
    started = time.perf_counter()
    outputs = runner(arrays)
    stats.model_seconds += time.perf_counter() - started
    stats.micro_batches += 1
    stats.rows += len(rows)
    tokens = sum(row.length for row in rows)
    stats.tokens += tokens
    stats.padded_tokens += tokens + round(runner.padding.cost * (arrays[manifest.inputs[0]].size - tokens))
    return unpad(outputs, positions, per_token)
