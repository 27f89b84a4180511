"""The generating model as a feed: rows of tokens in, the next token's logits out."""

from __future__ import annotations

import time
from typing import Any, Dict, Optional, Sequence, Type

import numpy as np

from traceserve_runtime.batching import batches
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays, Runner, State
from traceserve_runtime.texts.rows import Row


class _Feed:
    """The parts common to both kinds: the rows read first, the loop's state, and one step."""

    def __init__(self, runner: Runner, rows: Sequence[Row], manifest: Manifest, stats: Stats) -> None:
        self._runner = runner
        self._manifest = manifest
        self._read, _ = batches.pad(rows, manifest)
        self._mask = self._read["attention_mask"]
        self._stats = stats
        stats.rows += len(rows)
        stats.tokens += sum(row.length for row in rows)
        stats.padded_tokens += self._mask.size
        self._state: State = ()

    def _step(self, inputs: Arrays, rows: Optional[np.ndarray] = None) -> np.ndarray:
        """Return the logits after one step, for all rows of the last one or for `rows`."""
        if rows is not None:
            self._stats.tokens += len(rows)
            self._stats.padded_tokens += len(rows)
            if np.array_equal(rows, np.arange(self._state[0].shape[0])):
                rows = None  # all of them, in order: nothing is copied
        started = time.perf_counter()
        outputs, self._state = self._runner.step(inputs, self._state, rows)
        self._stats.model_seconds += time.perf_counter() - started
        self._stats.micro_batches += 1
        return outputs["logits"]


class DecoderFeed(_Feed):
    """A decoder: the prompts are left-padded and read in one step; then one token per remaining row."""

    def first(self) -> np.ndarray:
        self._state = self._runner.start(self._read)
        positions = np.maximum(self._mask.cumsum(axis=1) - 1, 0)
        return self._step({**self._read, "position_ids": positions})

    def next(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        self._mask = np.concatenate([self._mask[rows], np.ones((len(rows), 1), dtype=np.int64)], axis=1)
        positions = self._mask.sum(axis=1, keepdims=True) - 1
        return self._step({"input_ids": tokens[:, None], "attention_mask": self._mask, "position_ids": positions}, rows)


class EncoderDecoderFeed(_Feed):
    """An encoder and a decoder: the sources are read once; every decoder row begins with the same token."""

    def first(self) -> np.ndarray:
        self._state = self._runner.start(self._read)
        begin = np.full((len(self._mask), 1), self._manifest.facts["start_id"], dtype=np.int64)
        return self._step({"decoder_input_ids": begin, "attention_mask": self._mask})

    def next(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        self._mask = self._mask[rows]
        return self._step({"decoder_input_ids": tokens[:, None], "attention_mask": self._mask}, rows)


FEEDS: Dict[str, Type[Any]] = {"decoder": DecoderFeed, "encoder_decoder": EncoderDecoderFeed}
