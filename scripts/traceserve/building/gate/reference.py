"""The original's outputs, with which every artifact is compared: without padding, in float32, as if each row ran
alone."""

from __future__ import annotations

import json
from functools import cached_property, partial
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from traceserve_runtime.batching import batches
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays
from traceserve_runtime.runtimes import stepping
from traceserve_runtime.runtimes.calling import Single
from traceserve_runtime.tasks.contract import Request
from traceserve_runtime.texts.rows import Row

from traceserve.building.checkpoints.original import Original
from traceserve.building.gate.loops import FORCED, forced_tokens, generate_original

FORCED_STEPS = 3  # of a loop, per cell of the gate's grid
MOST_ROWS, MOST_REFERENCE_TOKENS = 128, 2048  # of the original, at a time
SAME = 1e-5  # a tenth of the gate's limit in float32, by the same measure; seen between one row and many: 2e-6


class Wanted(NamedTuple):
    """A row whose outputs are wanted, their key, and the part to keep."""

    key: object
    row: Row
    keep: Callable[[Arrays], Arrays]


class Reference:
    """The original's outputs, each computed once, however many artifacts are compared.

    Rows of one length are computed together: without padding, a row's outputs do not depend on its neighbours. If that
    does not hold (BART's classifier, for example, counts the end tokens of all rows), each is computed alone: one row
    per batch always is, and must agree.
    """

    def __init__(self, original: Original) -> None:
        self.original = original
        self.together = True  # whether rows computed together equal those computed alone
        self._known: Dict[object, Arrays] = {}
        self._alone: Dict[object, Wanted] = {}  # computed together; may be recomputed

    @cached_property
    def reads_only_new_tokens(self) -> bool:
        """Whether a step of a decoder reads new tokens alone, with a cache: if it rereads its whole text, a prompt in parts
        would be read again and again."""
        return stepping.decoder(self.original.model).keeps_past

    def outputs(self, key: object, compute: Callable[[], Arrays]) -> Arrays:
        """Return the result of `compute`, cached."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def text(self, loop: str, row: Row, request: Request) -> Arrays:
        """Return the tokens of the original's own text, cached."""
        return self.outputs(self.key_of_text(row, request), partial(run_text, self.original, loop, row, request))

    def key_of_text(self, row: Row, request: Request) -> Tuple[object, ...]:
        """Return the key of a text that a request asks for."""
        return json.dumps(request.parameters, sort_keys=True), tokens_of(row)

    def prepare(self, wanted: Iterable[Wanted], outputs: Sequence[str], tell: Callable[[int, int], None]) -> None:
        """Compute what is missing; `tell` receives the number of finished rows, and of all."""
        unknown = {each.key: each for each in wanted if each.key not in self._known}
        done = 0
        for batch in _batches(list(unknown.values())):
            tell(done, len(unknown))
            self._compute(batch, outputs)
            done += len(batch)

    def alone(self, key: object, outputs: Sequence[str]) -> bool:
        """Recompute a row alone that was computed together with others; return whether it was."""
        each = self._alone.pop(key, None)
        if each is None:
            return False
        self._known[key] = each.keep(run_original(self.original, each.row, outputs))
        return True

    def _compute(self, batch: Sequence[Wanted], outputs: Sequence[str]) -> None:
        results = self._run_together([each.row for each in batch], outputs) if self.together else None
        if results is None:
            results = [run_original(self.original, each.row, outputs) for each in batch]
        elif len(batch) > 1:
            checked = len(self._known) % len(batch)
            exact = run_original(self.original, batch[checked].row, outputs)
            if not _equal(results[checked], exact):
                self.together = False
                self._forget(outputs)
                results = [run_original(self.original, each.row, outputs) for each in batch]
            else:
                self._alone.update({each.key: each for each in batch})
        for each, result in zip(batch, results):
            # Copies: a view would keep the outputs of all rows in memory.
            self._known[each.key] = {name: np.array(array) for name, array in each.keep(result).items()}

    def _run_together(self, rows: Sequence[Row], outputs: Sequence[str]) -> Optional[List[Arrays]]:
        """Return the outputs of rows of one length; None if the model refuses them together."""
        try:
            return run_originals(self.original, rows, outputs)
        except (RuntimeError, ValueError, IndexError):
            return None

    def _forget(self, outputs: Sequence[str]) -> None:
        """Recompute alone what was computed together."""
        for key in list(self._alone):
            self.alone(key, outputs)


def tokens_of(row: Row) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
    """Return a row's content, by which its outputs are known."""
    return tuple(row.encoding.ids), tuple(row.encoding.type_ids)


def _batches(wanted: Sequence[Wanted]) -> Iterator[Sequence[Wanted]]:
    """Group by length."""
    by_length: Dict[int, List[Wanted]] = {}
    for each in wanted:
        by_length.setdefault(each.row.length, []).append(each)
    for length, alike in sorted(by_length.items()):
        size = max(1, min(MOST_ROWS, MOST_REFERENCE_TOKENS // length))
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _equal(got: Arrays, expected: Arrays) -> bool:
    """Compare up to rounding, relative to an output's largest value; NaN equals NaN."""
    return all(
        got[name].shape == array.shape and np.allclose(got[name], array, 0, SAME * _largest(array), equal_nan=True)
        for name, array in expected.items()
    )


def _largest(array: np.ndarray) -> float:
    """Return the largest absolute value, if above 1: a small sum of large numbers has their rounding errors."""
    return float(np.abs(array[np.isfinite(array)]).max(initial=1.0))


def run_original(original: Original, row: Row, outputs: Sequence[str]) -> Arrays:
    """Return the original's outputs for one row alone, without padding, without the batch dimension."""
    return run_originals(original, [row], outputs)[0]


def run_originals(original: Original, rows: Sequence[Row], outputs: Sequence[str]) -> List[Arrays]:
    """Return the original's outputs for rows of one length, without padding, without the batch dimension.

    Rows are padded only if the original cannot read such short ones.
    """
    columns = {
        "input_ids": [row.encoding.ids for row in rows],
        "attention_mask": [[1] * row.length for row in rows],
        "token_type_ids": [row.encoding.type_ids for row in rows],
    }
    length, own = rows[0].length, None
    if length < original.shortest:
        columns, own = _lengthened(original, columns, length)
    with torch.no_grad():
        result = original.model(**{name: torch.tensor(columns[name]) for name in original.inputs})
    arrays = {name: result[name].float().numpy() for name in outputs}
    if own is not None:
        arrays.update({name: arrays[name][:, own] for name in original.per_token})
    return [{name: array[i] for name, array in arrays.items()} for i in range(len(rows))]


def run_padded(original: Original, rows: Sequence[Row], run_as: Manifest, per_token: Sequence[str]) -> List[Arrays]:
    """Return the original's outputs for rows that run together, padded as with this manifest, by the call that is
    written."""
    arrays, positions = batches.pad(rows, run_as)
    call = Single(original.model, run_as.inputs, run_as.outputs)
    with torch.no_grad():
        results = call(*(torch.from_numpy(arrays[name]) for name in run_as.inputs))
    outputs = {name: result.numpy() for name, result in zip(run_as.outputs, results)}
    return batches.unpad(outputs, positions, per_token)


def _lengthened(
    original: Original, columns: Dict[str, List[List[int]]], length: int
) -> Tuple[Dict[str, List[List[int]]], slice]:
    """Return rows of this length padded to the shortest that the original reads, and their own tokens' positions."""
    facts = original.tokenizer_facts
    fillers = {"input_ids": facts.pad_id, "attention_mask": 0, "token_type_ids": facts.pad_type_id}
    missing = original.shortest - length
    on_right = facts.padding_side == "right"

    def padded(name: str, row: List[int]) -> List[int]:
        filling = [fillers[name]] * missing
        return [*row, *filling] if on_right else [*filling, *row]

    own = slice(0, length) if on_right else slice(missing, original.shortest)
    return {name: [padded(name, row) for row in rows] for name, rows in columns.items()}, own


def run_forced(original: Original, loop: str, row: Row) -> Arrays:
    """Return the logits, (FORCED_STEPS + 1, vocabulary), when a loop reads given tokens after one row."""
    with torch.no_grad():
        return {"logits": FORCED[loop](original, row, forced_tokens(row, FORCED_STEPS)).float().numpy()}


def run_text(original: Original, loop: str, row: Row, request: Request) -> Arrays:
    """Return the new tokens of the original's own `generate` for one row alone."""
    with torch.no_grad():
        tokens = generate_original(original, loop, row, request)
    return {"tokens": np.array(tokens, dtype=np.int64)}
