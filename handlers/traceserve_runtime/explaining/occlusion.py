"""Occlusion: how the explained number changes where words are hidden. For models without gradients.

A word's tokens are replaced by the mask token, or by the unknown or the padding token where a tokenizer has no mask.
Long texts are hidden in groups of neighbouring words, so that the cost stays bounded.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Callable, Generator, List, NamedTuple, Sequence, Tuple

import numpy as np

from traceserve_runtime.batching.batches import Stats, run_batch
from traceserve_runtime.errors import ModelFailure
from traceserve_runtime.explaining.targets import OutputCell, scalars
from traceserve_runtime.explaining.words import Word
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Runner
from traceserve_runtime.texts.rows import Row
from traceserve_runtime.texts.tokenization import TextTokenizer

_HIDING = ("[MASK]", "<mask>", "[UNK]", "<unk>")


class _Changed(NamedTuple):
    """What `pad` reads of an encoding, with other ids."""

    ids: Sequence[int]
    attention_mask: Sequence[int]
    type_ids: Sequence[int]


def hiding_id(tokenizer: TextTokenizer, manifest: Manifest) -> int:
    """Return the token that hides others."""
    facts = manifest.tokenizer
    known = (tokenizer.token_id(token) for token in _HIDING)
    most = math.inf if facts.embeddings is None else facts.embeddings
    return next((number for number in known if number is not None and number < most), facts.pad_id)


def grouped(words: Sequence[Word], most: int) -> List[Word]:
    """Return at most about `most` words: neighbours of one field are joined, as evenly as possible."""
    size = math.ceil(len(words) / most) if most else len(words)
    groups: List[List[Word]] = []
    for word in words:
        if groups and len(groups[-1]) < size and groups[-1][0].field == word.field:
            groups[-1].append(word)
        else:
            groups.append([word])
    return [_joined(group) for group in groups]


def _joined(group: Sequence[Word]) -> Word:
    first, last = group[0], group[-1]
    if first is last:
        return first
    positions = tuple(position for word in group for position in word.positions)
    text = first.text
    for before, word in zip(group, group[1:]):
        text += ("" if word.start == before.end else " ") + word.text
    return Word(first.field, first.start, last.end, text, positions)


def occlude(
    runner: Runner,
    row: Row,
    cells: Sequence[OutputCell],
    words: Sequence[Word],
    manifest: Manifest,
    hiding: int,
    per_token: Sequence[str],
    room: Callable[[int, int], int],
) -> Generator[None, None, Tuple[List[float], float, float]]:
    """Hide each word, in runs of at most `room(length, wanted)` rows; yields between two runs, and returns each word's
    effect, and the number on the text and without any word. Raises ModelFailure for a number that is none."""
    every = [position for word in words for position in word.positions]
    rows = [row, *(_hidden(row, positions, hiding) for positions in (every, *(word.positions for word in words)))]
    values: List[float] = []
    while len(values) < len(rows):
        count = room(row.length, len(rows) - len(values))
        if manifest.shapes.batches is not None:
            count = min(count, max(manifest.shapes.batches))
        part = rows[len(values) : len(values) + count]
        for outputs in run_batch(runner, part, manifest, per_token, Stats()):
            batch = {name: array[None] for name, array in outputs.items()}
            values.append(float(scalars(batch, cells)[0]))
        if len(values) < len(rows):
            yield
    if not np.isfinite(values).all():
        raise ModelFailure("the model gives no number where words are hidden, so this answer cannot be explained")
    return [values[0] - value for value in values[2:]], values[0], values[1]


def _hidden(row: Row, positions: Sequence[int], hiding: int) -> Row:
    ids = np.array(row.encoding.ids)
    ids[list(positions)] = hiding
    changed: Any = _Changed(ids.tolist(), row.encoding.attention_mask, row.encoding.type_ids)
    return replace(row, encoding=changed)
