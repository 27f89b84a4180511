"""The generating model as a feed: rows of tokens in, the next token's logits out."""

from __future__ import annotations

import time
from typing import ClassVar, Dict, Optional, Sequence, Type

import numpy as np

from traceserve_runtime.batching import batches
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.manifest import Manifest, Shapes
from traceserve_runtime.runner import Arrays, Runner, State
from traceserve_runtime.texts.rows import Row

# Unused positions before all rows are dropped once they are more than this share of all: dropping may copy the state.
_UNUSED = 0.125
# In `Manifest.runtime`: whether the gate found that prompts may be read in parts. Older archives do not say.
IN_PARTS = "prompts_in_parts"
LEAST_PART = 16  # positions: fewer take as long, since a run reads all weights


class Feed:
    """The model with rows that run together: the parts common to both kinds."""

    joins: ClassVar[bool]  # whether rows at different positions can run together

    def __init__(self, runner: Runner, rows: Sequence[Row], manifest: Manifest, stats: Stats) -> None:
        self._runner = runner
        self._manifest = manifest
        self._prompts, _ = batches.pad(rows, manifest)
        self._mask = self._prompts["attention_mask"]
        self._stats = stats
        self.part = 0  # how many positions, padding included, the last call of `read` has read
        stats.rows += len(rows)
        stats.tokens += sum(row.length for row in rows)
        stats.padded_tokens += self._mask.size
        self._state: State = ()

    @classmethod
    def together(cls, shapes: Shapes) -> bool:
        """Return whether all rows of a model with these shapes can run together, at any positions."""
        return cls.joins and shapes.padded and shapes.lengths is None and shapes.batches is None

    @property
    def length(self) -> int:
        """How many positions the rows have, padding included."""
        return int(self._mask.shape[1])

    def read(self, rows: np.ndarray, most: float) -> Optional[np.ndarray]:
        """Continue reading the prompts of `rows`, indices into the rows of the last call, and drop the others: about `most`
        positions, or all if the kind cannot stop in between. Return the logits, (rows, vocabulary), after the last part."""
        raise NotImplementedError

    def next(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the logits after `tokens`, each of which continues the row of the last call with the index in
        `rows`."""
        raise NotImplementedError

    def absorb(self, other: Feed) -> None:
        """Add the rows of another feed of the same model behind its own, for a kind that `joins`."""
        raise NotImplementedError

    def _write(self, inputs: Arrays, rows: np.ndarray) -> np.ndarray:
        """Return the logits after a token of each of `rows`."""
        self._stats.tokens += len(rows)
        self._stats.padded_tokens += len(rows)
        return self._step(inputs, rows)

    def _start(self) -> None:
        """Make the state before the first step: an encoder reads the prompts here."""
        started = time.perf_counter()
        self._state = self._runner.start(self._prompts)
        self._stats.model_seconds += time.perf_counter() - started

    def _step(self, inputs: Arrays, rows: Optional[np.ndarray] = None) -> np.ndarray:
        """Return the logits after one step, for all rows of the last one or for `rows`."""
        if rows is not None and np.array_equal(rows, np.arange(self._state[0].shape[0])):
            rows = None  # all of them, in order: nothing is copied
        started = time.perf_counter()
        outputs, self._state = self._runner.step(inputs, self._state, rows)
        self._stats.model_seconds += time.perf_counter() - started
        self._stats.micro_batches += 1
        return outputs["logits"]


class DecoderFeed(Feed):
    """A decoder: the prompts are left-padded and read in one step or several; then one token per remaining row."""

    joins = True
    _done = 0  # positions of the prompts that were read

    def read(self, rows: np.ndarray, most: float) -> Optional[np.ndarray]:
        if not self._done:
            self._start()
        self._mask = self._mask[rows]
        self._prompts = {name: array[rows] for name, array in self._prompts.items()}
        begin, self._done = self._done, self._done + self._part(most)
        positions = np.maximum(self._mask.cumsum(axis=1) - 1, 0)
        new = {**self._prompts, "position_ids": positions}
        inputs = {name: array[:, begin : self._done] for name, array in new.items()}
        self.part = inputs["input_ids"].size
        logits = self._step({**inputs, "attention_mask": self._mask[:, : self._done]}, rows)
        return logits if self._done == self.length else None

    def _part(self, most: float) -> int:
        """Return how many more positions of each row to read: all, or a multiple of the shortest part."""
        each = most / len(self._mask)
        left = self.length - self._done
        return left if left <= each else min(left, LEAST_PART * max(1, round(each / LEAST_PART)))

    def next(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        self._drop_unused(rows)
        self._mask = np.concatenate([self._mask[rows], np.ones((len(rows), 1), dtype=np.int64)], axis=1)
        positions = self._mask.sum(axis=1, keepdims=True) - 1
        return self._write(
            {"input_ids": tokens[:, None], "attention_mask": self._mask, "position_ids": positions}, rows
        )

    def absorb(self, other: Feed) -> None:
        length = max(self.length, other.length)
        self._state = self._runner.join([self._state, other._state], length)
        self._mask = np.concatenate([_left_padded(self._mask, length), _left_padded(other._mask, length)])

    def _drop_unused(self, rows: np.ndarray) -> None:
        """Drop the positions that only longer rows, which have left, used: once they are many, or where the next token would
        be beyond the model's last position."""
        unused = int(self._mask[rows].any(axis=0).argmax())
        enough = 0 if self.length >= self._manifest.max_length else _UNUSED * self.length
        if self._manifest.shapes.padded and unused > enough:
            self._state = self._runner.join([self._state], self.length - unused)
            self._mask = self._mask[:, unused:]


class EncoderDecoderFeed(Feed):
    """An encoder and a decoder: the sources are read once; every decoder row begins with the same token."""

    joins = False  # the decoder's rows have no mask

    def read(self, rows: np.ndarray, most: float) -> Optional[np.ndarray]:
        self._start()
        self.part = self._mask.size
        self._mask = self._mask[rows]
        begin = np.full((len(rows), 1), self._manifest.facts["start_id"], dtype=np.int64)
        return self._step({"decoder_input_ids": begin, "attention_mask": self._mask}, rows)

    def next(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        self._mask = self._mask[rows]
        return self._write({"decoder_input_ids": tokens[:, None], "attention_mask": self._mask}, rows)


def _left_padded(mask: np.ndarray, length: int) -> np.ndarray:
    return np.pad(mask, ((0, 0), (length - mask.shape[1], 0)))


FEEDS: Dict[str, Type[Feed]] = {"decoder": DecoderFeed, "encoder_decoder": EncoderDecoderFeed}
