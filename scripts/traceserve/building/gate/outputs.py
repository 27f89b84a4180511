"""Compares a graph's outputs with the original's, on a grid of batch sizes and lengths, padded and not."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple, Union

import numpy as np
from traceserve_runtime.batching import batches
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.generation.steps import FEEDS
from traceserve_runtime.manifest import Manifest, Shapes, TokenizerFacts
from traceserve_runtime.runner import Arrays
from traceserve_runtime.runtimes.caches import FIXED_STATES
from traceserve_runtime.texts.rows import Encoded, Row, Segments
from traceserve_runtime.texts.tokenization import TextTokenizer

from traceserve.building.checkpoints.lookups import id_of_token
from traceserve.building.checkpoints.original import Original
from traceserve.building.config.loops import LOOPS
from traceserve.building.gate.findings import Cell, Findings
from traceserve.building.gate.loops import forced_tokens
from traceserve.building.gate.reference import FORCED_STEPS, Reference, Wanted, run_forced, run_original, run_padded
from traceserve.building.gate.texts import TEXTS
from traceserve.building.progress import Progress
from traceserve.errors import UnaskableError

BATCHES = (1, 2, 5)
_MOST_TOKENS = 1024  # per cell, except with two rows
_CONSTANT = 1e-5  # outputs that vary by less, relative as in Limit, are the same for all texts
_PARTS = 3  # or a few more, in which prompts are read


class GridCell(NamedTuple):
    """How many rows run together, at which length, and whether they are padded to it."""

    batch: int
    length: int
    padded: bool


def _read_forced(engine: Engine, rows: Sequence[Row], manifest: Manifest, part: float = math.inf) -> List[Arrays]:
    """Return the logits, (FORCED_STEPS + 1, vocabulary), when a loop reads given tokens after its rows, and these in parts
    of about so many positions."""
    feed = FEEDS[engine.task.loop](engine.runner, rows, manifest, Stats())
    forced = np.array([forced_tokens(row, FORCED_STEPS) for row in rows])
    same_rows = np.arange(len(rows))
    first = None
    while first is None:
        first = feed.read(same_rows, part)
    logits = [first, *(feed.next(same_rows, forced[:, step]) for step in range(FORCED_STEPS))]
    return [{"logits": np.stack([step[i] for step in logits])} for i in range(len(rows))]


def _difference_in_parts(engine: Engine, rows: Sequence[Row], expected: Sequence[Arrays]) -> float:
    """Return the largest difference of the logits when a loop reads these rows in parts; infinite if it cannot."""
    try:
        got = _read_forced(engine, rows, engine.manifest, sum(row.length for row in rows) / _PARTS)
    except RuntimeError:
        return math.inf
    return float(np.max([_difference(one["logits"], other["logits"]) for one, other in zip(got, expected)]))


def compare_outputs(
    engine: Engine, reference: Reference, rows: GridRows, findings: Findings, progress: Progress
) -> None:
    """Add to the findings each output's largest difference in each cell of the grid, those of prompts that are read in parts
    where a worker may do so, and the share of each output's variance that is lost."""
    manifest, most = engine.manifest, _longest_row(engine)
    cells = [(cell, _row_keys(manifest, cell, most)) for cell in _grid(manifest)]
    if not engine.task.loop:
        wanted = dict.fromkeys(key for _, keys in cells for key in keys)
        prepared = (Wanted(("row", *key), rows.get(*key), dict) for key in wanted)
        reference.prepare(prepared, manifest.outputs, partial(progress, "running the original"))
    in_parts, longest = _reads_in_parts(engine, reference), cells[-1][0].length
    of_texts: Dict[str, List[Tuple[np.ndarray, np.ndarray]]] = {output: [] for output in _outputs_of_texts(engine)}
    for step, (cell, keys) in enumerate(cells):
        progress(f"comparing outputs of {findings.variant}", step, len(cells))
        read = [rows.get(*key) for key in keys]
        expected = [_expected(engine, reference, row, key) for row, key in zip(read, keys)]
        _check_numbers(expected)
        got = _read_rows(engine, read, replace(manifest, shapes=_shapes_of(manifest, cell, most)))
        if cell.padded and findings.limit.changed and not engine.task.loop:
            findings.of_padding += _of_padding(engine, reference, read, expected, cell, most)
        for output in manifest.outputs:
            pairs = [(one[output], other[output]) for one, other in zip(got, expected)]
            findings.cells.append(Cell(*cell, output, float(np.max([_difference(*pair) for pair in pairs]))))
            if output in of_texts:
                of_texts[output] += pairs
        if in_parts and cell.length == longest:
            findings.in_parts.append(Cell(*cell, "logits", _difference_in_parts(engine, read, expected)))
    by_column = engine.task.answers_by_column
    findings.unexplained = {output: unexplained_variance(pairs, by_column) for output, pairs in of_texts.items()}
    progress(f"comparing outputs of {findings.variant}", len(cells), len(cells))


def _of_padding(
    engine: Engine, reference: Reference, rows: Sequence[Row], expected: Sequence[Arrays], cell: GridCell, most: int
) -> List[Cell]:
    """Return how far the original's own outputs for rows that it reads padded, as the graph does, are from those for each
    alone; infinite if it cannot read them so."""
    run_as = replace(engine.manifest, shapes=_shapes_of(engine.manifest, cell, most))

    def differences() -> Arrays:
        try:
            got = run_padded(reference.original, rows, run_as, _per_token(engine))
        except (RuntimeError, ValueError, IndexError):
            return {output: np.array(math.inf) for output in run_as.outputs}
        return {
            output: np.max([_difference(one[output], other[output]) for one, other in zip(got, expected)])
            for output in run_as.outputs
        }

    key = "padded", run_as.tokenizer.padding_side, run_as.shapes, cell
    return [Cell(*cell, output, float(each)) for output, each in reference.outputs(key, differences).items()]


def check_original(engine: Engine, reference: Reference, rows: GridRows) -> None:
    """Raise UnaskableError if the original itself computes no numbers, for a row as long as it reads."""
    key = _longest_row(engine), 0
    _check_numbers([_expected(engine, reference, rows.get(*key), key)])


def _check_numbers(expected: Sequence[Arrays]) -> None:
    """Raise UnaskableError if the original's outputs hold NaN or infinity; a token that is ruled out has -inf, among others."""
    for values in (np.atleast_1d(values) for outputs in expected for values in outputs.values()):
        if values.size and not np.isfinite(values.max(axis=-1)).all():
            raise UnaskableError(
                "the original model itself gives NaN or infinity instead of numbers, so no way of writing it can be compared: "
                "its weights hold NaN or infinity, or were damaged when they were trained or converted"
            )


def _row_keys(manifest: Manifest, cell: GridCell, most: int) -> List[Tuple[int, int]]:
    """Return the length and the number of each row in a cell."""
    return [(min(length, most), number) for number, length in enumerate(_row_lengths(manifest, *cell))]


def _shapes_of(manifest: Manifest, cell: GridCell, most: int) -> Shapes:
    """Return the shapes with which a cell is run: a padded row by itself as with `length_step`."""
    if cell.padded and cell.batch == 1:
        return manifest.shapes.stepped(min(cell.length, most), manifest.max_length)
    return manifest.shapes


def _per_token(engine: Engine) -> List[str]:
    return [output.name for output in engine.task.outputs if output.per_token]


def _outputs_of_texts(engine: Engine) -> List[str]:
    """Return the outputs that are of whole texts; none of a loop."""
    per_token = _per_token(engine)
    return [] if engine.task.loop else [output for output in engine.manifest.outputs if output not in per_token]


def _reads_in_parts(engine: Engine, reference: Reference) -> bool:
    """Return whether a worker may read prompts in parts."""
    loop, manifest = engine.task.loop, engine.manifest
    if not loop or not FEEDS[loop].together(manifest.shapes):
        return False
    return FIXED_STATES in manifest.runtime or reference.reads_only_new_tokens


def _expected(engine: Engine, reference: Reference, row: Row, key: Tuple[int, int]) -> Arrays:
    """Return the original's outputs for a row."""
    original, loop = reference.original, engine.task.loop
    if loop:
        return reference.outputs(("row", *key), partial(run_forced, original, loop, row))
    return reference.outputs(("row", *key), partial(run_original, original, row, engine.manifest.outputs))


def _read_rows(engine: Engine, rows: Sequence[Row], run_as: Manifest) -> List[Arrays]:
    """Return the graph's outputs for rows that run together."""
    if engine.task.loop:
        return _read_forced(engine, rows, run_as)
    return batches.run_batch(engine.runner, rows, run_as, _per_token(engine), Stats())


def _longest_row(engine: Engine) -> int:
    """Return the longest row of the grid: a decoder writes after its rows, within the same length."""
    loop = engine.task.loop
    return engine.manifest.max_length - (FORCED_STEPS if loop and LOOPS[loop].writes_behind else 0)


def _grid(manifest: Manifest) -> Iterator[GridCell]:
    """Yield the cells: every allowed length, or a spread of them; batches up to the limit.

    Fewer long rows: five of 512 tokens took half of the gate's time, and two suffice to show the influence of
    neighbours.
    """
    most = manifest.max_length
    lengths = manifest.shapes.lengths or sorted({max(3, most // 16), max(3, most // 4), most // 2, most - 1, most})
    most_rows = max(manifest.shapes.batches or BATCHES)
    for length in lengths:
        fitting = max(2, _MOST_TOKENS // length)
        for batch in dict.fromkeys(min(batch, fitting) for batch in BATCHES if batch <= most_rows):
            yield GridCell(batch, length, False)
            if manifest.shapes.padded:
                yield GridCell(batch, length, True)


def _row_lengths(manifest: Manifest, batch: int, length: int, padded: bool) -> List[int]:
    """Return the row lengths of one cell: all `length`; or, padded, shorter ones that run at `length` too."""
    if not padded:
        return [length] * batch
    below = max([n for n in manifest.shapes.lengths or () if n < length], default=2)  # runs at a smaller shape
    shorter = [max(below + 1, length * share // 6) for share in (4, 2, 3)]
    # If any length is allowed, one full row sets the cell's length; a single row is padded with `length_step`.
    whole = 1 if manifest.shapes.lengths is None and batch > 1 else 0
    return [length] * whole + [shorter[i % 3] for i in range(batch - whole)]


class GridRows:
    """Rows of an exact length, each from another position in the concatenated built-in texts.

    Every other one has end tokens in its text, as a client may write them. BART's classifier, for example, counts them,
    and mixes up rows in a batch with different counts. With `pairs` the others are pairs of texts, where the model reads
    any. All variants of an artifact share them.
    """

    def __init__(self, folder: Path, facts: TokenizerFacts, original: Original, pairs: bool = False) -> None:
        self._folder = folder
        self._facts = facts
        self._pairs = pairs
        self._texts = list(TEXTS)
        special = original.tokenizer.special_tokens_map
        self._end = str(special.get("eos_token") or special.get("sep_token") or "")
        known = original.known_tokens
        if known is not None and self._end and id_of_token(original.tokenizer, self._end) >= known:
            self._end = ""  # added only to the tokenizer: such texts are refused
        self._tokenizers: Dict[int, TextTokenizer] = {}
        self._made: Dict[Tuple[int, int], Row] = {}

    def get(self, length: int, index: int) -> Row:
        """Return row number `index`, 0 to the largest batch, of `length` tokens."""
        if (length, index) not in self._made:
            self._made[length, index] = self._make(length, index)
        return self._made[length, index]

    def _make(self, length: int, index: int) -> Row:
        if length not in self._tokenizers:
            self._tokenizers[length] = TextTokenizer(self._folder, self._facts, length, max_rows=1_000_000)
        text = self._text(length, index)
        if index % 2:
            text = f"{self._end} {text.split(' ', 1)[0]} {self._end} {text}"
        elif self._pairs:
            pair = self._encoded(length, Segments(text, self._text(length, index + 1)))
            if isinstance(pair, Encoded):  # and long enough for one
                return pair.rows[0]
        encoded = self._encoded(length, Segments(text))
        if isinstance(encoded, TraceserveError):
            raise encoded
        return encoded.rows[0]

    def _text(self, length: int, index: int) -> str:
        start = index * len(self._texts) // max(BATCHES)
        text = " ".join(self._texts[start:] + self._texts[:start])[: 16 * length]
        return " ".join([text] * (length // max(1, len(text.split())) + 1))

    def _encoded(self, length: int, segments: Segments) -> Union[Encoded, TraceserveError]:
        return self._tokenizers[length].encode([segments], ["truncate"])[0]


def unexplained_variance(results: Sequence[Tuple[np.ndarray, np.ndarray]], by_column: bool = False) -> float:
    """Return the variance of an output's differences from the original's over that of the original's, 0 where that is the
    same for all texts; `results` are an output and the original's, (columns,) each, per text. The variances are summed over the
    columns; `by_column`, each column has its own, and the largest share is returned.

    A small difference says little where the original's own outputs for all texts lie within it, as those of a
    cross-encoder for what does not match: a constant is near them too.
    """
    if any(got.shape != expected.shape for got, expected in results):
        return math.inf
    got, expected = (np.array(arrays, dtype=np.float64) for arrays in zip(*results))
    if by_column:
        return float(np.max(list(map(_share_lost, got.T, expected.T))))  # NaN wins, as it should
    return _share_lost(got, expected)


def _share_lost(got: np.ndarray, expected: np.ndarray) -> float:
    """Return that share for arrays whose first axis is that of texts."""
    varying = expected - expected.mean(axis=0)
    if np.abs(varying).max() <= _CONSTANT * max(1.0, float(np.abs(expected).max())):
        return 0.0
    apart = got - expected
    apart -= apart.mean(axis=0)
    return float(np.square(apart).sum() / np.square(varying).sum())


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference, divided by the largest expected value if that is above 1."""
    if got.shape != expected.shape:
        return float("inf")
    return float(np.abs(got - expected).max() / max(1.0, float(np.abs(expected).max()))) if got.size else 0.0
