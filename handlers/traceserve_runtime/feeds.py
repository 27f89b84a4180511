"""A model that is run in a loop, as generation sees it: rows of tokens in, the logits of the next token out."""

from __future__ import annotations

import time
from typing import Any, Dict, Optional, Sequence, Tuple, Type

import numpy as np

from traceserve_runtime import batching
from traceserve_runtime.batching import Arrays, Runner, State, Stats
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.tokenization import Row


class DecoderFeed:
    """A decoder: the prompts are padded on the left and read in one step; then one token of each row that goes on."""

    def __init__(self, runner: Runner, rows: Sequence[Row], manifest: Manifest, stats: Stats) -> None:
        self._runner = runner
        self._prompts, _ = batching.pad(rows, manifest)
        self._stats = stats
        stats.rows += len(rows)
        stats.tokens += sum(row.length for row in rows)
        stats.padded_tokens += self._prompts["input_ids"].size
        self._state: State = ()
        self._mask = self._prompts["attention_mask"]

    def first(self) -> np.ndarray:
        positions = np.maximum(self._mask.cumsum(axis=1) - 1, 0)
        self._state = self._runner.start(self._prompts)
        return self._step(self._prompts["input_ids"], positions, None)

    def next(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        self._mask = np.concatenate([self._mask[rows], np.ones((len(rows), 1), dtype=np.int64)], axis=1)
        self._stats.tokens += len(rows)
        self._stats.padded_tokens += len(rows)
        unchanged = len(rows) == self._state[0].shape[0] and bool((rows == np.arange(len(rows))).all())
        return self._step(tokens[:, None], self._mask.sum(axis=1, keepdims=True) - 1, None if unchanged else rows)

    def _step(self, ids: np.ndarray, positions: np.ndarray, rows: Optional[np.ndarray]) -> np.ndarray:
        inputs = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        logits, self._state = _timed(self._runner, inputs, self._state, rows, self._stats)
        return logits


class EncoderDecoderFeed:
    """An encoder and a decoder: the sources are read once; every row of the decoder begins with the same token."""

    def __init__(self, runner: Runner, rows: Sequence[Row], manifest: Manifest, stats: Stats) -> None:
        self._runner = runner
        self._sources, _ = batching.pad(rows, manifest)
        self._begin = np.full((len(rows), 1), manifest.facts["start_id"], dtype=np.int64)
        self._stats = stats
        stats.rows += len(rows)
        stats.tokens += sum(row.length for row in rows)
        stats.padded_tokens += self._sources["input_ids"].size
        self._state: State = ()
        self._mask = self._sources["attention_mask"]

    def first(self) -> np.ndarray:
        self._state = self._runner.start(self._sources)
        return self._step(self._begin, None)

    def next(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        unchanged = len(rows) == len(self._mask) and bool((rows == np.arange(len(rows))).all())
        self._mask = self._mask[rows]
        self._stats.tokens += len(rows)
        self._stats.padded_tokens += len(rows)
        return self._step(tokens[:, None], None if unchanged else rows)

    def _step(self, ids: np.ndarray, rows: Optional[np.ndarray]) -> np.ndarray:
        inputs = {"decoder_input_ids": ids, "attention_mask": self._mask}
        logits, self._state = _timed(self._runner, inputs, self._state, rows, self._stats)
        return logits


def _timed(
    runner: Runner, inputs: Arrays, state: State, rows: Optional[np.ndarray], stats: Stats
) -> Tuple[np.ndarray, State]:
    started = time.perf_counter()
    outputs, state = runner.step(inputs, state, rows)
    stats.model_seconds += time.perf_counter() - started
    stats.micro_batches += 1
    return outputs["logits"], state


FEEDS: Dict[str, Type[Any]] = {"decoder": DecoderFeed, "encoder_decoder": EncoderDecoderFeed}
