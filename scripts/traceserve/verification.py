"""The gate: the original against the artifact, as the worker reads it; and the receipt.

Two questions, each on real sentences. Of the model: do its outputs equal the original's on a grid of batch sizes and
lengths, padded and not? Of the whole: does the engine, text in and answer out, answer as the original does? The
original runs each row alone, without padding, in float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from traceserve_runtime import batching
from traceserve_runtime.batching import Arrays, Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.feeds import FEEDS
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.tasks.contract import Request, by_part
from traceserve_runtime.tokenization import Encoded, Row, Segments, TextTokenizer

from traceserve.corpus import sentences
from traceserve.loading import Original
from traceserve.samples import TEXTS


class Limit(NamedTuple):
    """What is allowed of a dtype: the largest difference of an output, relative to its largest value where that is
    above 1; and the share of answers that change.

    The user's own samples decide where they are enough to tell: 334 for a share of 0.003. Otherwise all samples do, and
    more may change: the built-in texts are not of the model's kind, so that it guesses at them, and many answers are near
    ties. (Measured: six to ten times as many of them change as of the texts that a model is for, `docs/measurements.md`.)
    """

    difference: float
    changed: float
    changed_elsewhere: float


LIMITS = {
    "float32": Limit(1e-4, 0.0, 0.0),
    "bfloat16": Limit(0.1, 0.003, 0.015),
    "float16": Limit(0.02, 0.003, 0.015),
    "int8": Limit(0.3, 0.003, 0.015),
}
CORPUS = 512  # sentences that a lower precision is asked beside the samples
BATCHES = (1, 2, 5)
FORCED_STEPS = 3  # of a loop, in each cell of the grid

Progress = Callable[[str, int, int], None]  # what is being done, how many steps of how many are done


@dataclass(frozen=True)
class Cell:
    """One place of the grid and the largest difference found there, relative as Limit says."""

    batch: int
    length: int
    padded: bool
    output: str
    difference: float


@dataclass
class Findings:
    """What the gate found."""

    limit: Limit
    cells: List[Cell] = field(default_factory=list)
    answers: int = 0
    own_answers: int = 0  # of these, to the user's own samples
    changed: List[int] = field(default_factory=list)  # of the samples, the user's own last
    own_changed: int = 0
    tokenized_otherwise: List[int] = field(default_factory=list)  # of the samples
    failure: Optional[str] = None  # why the artifact could not be run at all
    compared: Dict[str, Any] = field(default_factory=dict)  # for the receipt, where it was not the artifact alone

    @property
    def failed(self) -> List[Cell]:
        """The cells over the limit; a difference that is no number is over it too."""
        return [cell for cell in self.cells if not cell.difference <= self.limit.difference]

    @property
    def passed(self) -> bool:
        """Whether the artifact answers as the original does."""
        return not (self.failure or self.failed or self.tokenized_otherwise or self.too_many_changed)

    @property
    def own_decide(self) -> bool:
        """Whether the user's own samples are enough to tell whether too many answers change."""
        return self.limit.changed * self.own_answers >= 1

    @property
    def too_many_changed(self) -> bool:
        """Whether more answers changed than the limit allows."""
        if self.own_decide:
            return self.own_changed > self.limit.changed * self.own_answers
        return len(self.changed) > self.limit.changed_elsewhere * self.answers

    @property
    def largest_difference(self) -> float:
        """Over all cells, relative as Limit says."""
        return float(np.max([cell.difference for cell in self.cells], initial=0.0))  # NaN prevails, as it should

    def receipt(self) -> Dict[str, Any]:
        """What the manifest records."""
        return {
            "passed": self.passed,
            "limits": self.limit._asdict(),
            "cells": len(self.cells),
            "batches": sorted({cell.batch for cell in self.cells}),
            "lengths": sorted({cell.length for cell in self.cells}),
            "largest_difference": self.largest_difference,
            "answers": self.answers,
            "answers_changed": len(self.changed),
            "own_answers": self.own_answers,
            "own_answers_changed": self.own_changed,
            **self.compared,
        }


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


def verify(folder: Path, reference: Reference, own_samples: Sequence[Request], progress: Progress) -> Findings:
    """Compare the artifact in `folder` with the original on the built-in samples and on `own_samples`.

    A lower precision, of which few changed answers are allowed, is asked more: of 30 answers none may tell.
    """
    engine = Engine.load(folder)
    limit = LIMITS[engine.manifest.dtype]
    more = sentences(CORPUS) if limit.changed and not engine.task.loop else ()
    samples = [*engine.task.from_texts((*TEXTS, *more)), *own_samples]
    findings = Findings(limit)
    try:
        # Before anything is compared: what an executor optimises after its first runs is compared too.
        engine.warm_up()
        _compare_outputs(engine, reference, findings, progress)
        _compare_answers(engine, reference, samples, len(own_samples), findings, progress)
    except RuntimeError as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        findings.failure = lines[-1] if lines else type(error).__name__
    return findings


def _read_forced(engine: Engine, rows: Sequence[Row]) -> List[Arrays]:
    """The logits, (FORCED_STEPS + 1, vocabulary), where a loop is made to read given tokens after its rows."""
    from traceserve.looping import forced_tokens

    feed = FEEDS[engine.task.loop](engine.runner, rows, engine.manifest, Stats())
    forced = np.array([forced_tokens(row, FORCED_STEPS) for row in rows])
    same_rows = np.arange(len(rows))
    logits = [feed.first(), *(feed.next(same_rows, forced[:, step]) for step in range(FORCED_STEPS))]
    return [{"logits": np.stack([step[i] for step in logits])} for i in range(len(rows))]


def _original_forced(original: Original, loop: str, row: Row) -> Arrays:
    """What `_read_forced` is compared with."""
    import torch

    from traceserve.looping import LOOPS

    with torch.no_grad():
        return {"logits": LOOPS[loop].forced(original, row, FORCED_STEPS).float().numpy()}


def _original_text(original: Original, loop: str, row: Row, request: Request) -> Arrays:
    """The new tokens that the original's own `generate` writes after one row alone."""
    import torch

    from traceserve.looping import generate

    with torch.no_grad():
        tokens = generate(original, loop, row, request)
    return {"tokens": np.array(tokens, dtype=np.int64)}


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


def _compare_outputs(engine: Engine, reference: Reference, findings: Findings, progress: Progress) -> None:
    manifest, original = engine.manifest, reference.original
    rows = _Rows(engine, original)
    expected: Dict[Tuple[int, int], Arrays] = {}
    per_token = [output.name for output in engine.task.outputs if output.per_token]
    loop = engine.task.loop
    grid = list(_grid(manifest))
    for step, (batch, length, padded) in enumerate(grid):
        progress("comparing outputs", step, len(grid))
        most = _longest_row(engine)
        lengths = [min(n, most) for n in _row_lengths(manifest, batch, length, padded)]
        keys = [(row_length, i) for i, row_length in enumerate(lengths)]
        for key in keys:
            row = rows.get(*key)
            if loop:
                compute = partial(_original_forced, original, loop, row)
            else:
                compute = partial(run_original, original, row, manifest.outputs)
            expected[key] = reference.outputs(("row", *key), compute)
        if loop:
            got = _read_forced(engine, [rows.get(*key) for key in keys])
        else:
            got = batching.run(engine.runner, [rows.get(*key) for key in keys], manifest, per_token, Stats())
        for output in manifest.outputs:
            differences = [_difference(one[output], expected[key][output]) for one, key in zip(got, keys)]
            findings.cells.append(Cell(batch, length, padded, output, float(np.max(differences))))
    progress("comparing outputs", len(grid), len(grid))


def _longest_row(engine: Engine) -> int:
    """The longest row of the grid: a decoder writes after its rows, within the same length."""
    from traceserve.looping import LOOPS

    loop = engine.task.loop
    return engine.manifest.max_length - (FORCED_STEPS if loop and LOOPS[loop].writes_behind else 0)


def _grid(manifest: Manifest) -> Iterator[Tuple[int, int, bool]]:
    """Batch, length, padded: every allowed length, or a spread of them; batches up to what is allowed."""
    most = manifest.max_length
    lengths = manifest.shapes.lengths or sorted({max(3, most // 16), max(3, most // 4), most // 2, most - 1, most})
    most_rows = max(manifest.shapes.batches or BATCHES)
    for length in lengths:
        for batch in BATCHES:
            if batch <= most_rows:
                yield batch, length, False
                if batch > 1 or manifest.shapes.lengths is not None:
                    yield batch, length, True


def _row_lengths(manifest: Manifest, batch: int, length: int, padded: bool) -> List[int]:
    """The lengths of the rows of one cell: all `length`; or, padded, shorter ones that run at `length` too."""
    if not padded:
        return [length] * batch
    below = max([n for n in manifest.shapes.lengths or () if n < length], default=2)  # runs at a smaller shape
    shorter = [max(below + 1, length * share // 6) for share in (4, 2, 3)]
    # Where any length is allowed, one whole row gives the cell its length.
    whole = 1 if manifest.shapes.lengths is None else 0
    return [length] * whole + [shorter[i % 3] for i in range(batch - whole)]


class _Rows:
    """Rows of an exact length, each from another place in the built-in samples' texts, laid end to end.

    Every other one has end tokens within its text, as a client may write them. BART's classifier, for one, counts them,
    and in a batch of rows that differ in this takes one row's for another's.
    """

    def __init__(self, engine: Engine, original: Original) -> None:
        self._engine = engine
        self._texts = list(TEXTS)
        special = original.tokenizer.special_tokens_map
        self._end = str(special.get("eos_token") or special.get("sep_token") or "")
        known = original.known_tokens
        if known is not None and original.tokenizer.convert_tokens_to_ids(self._end) >= known:
            self._end = ""  # added to the tokenizer alone: such texts are refused
        self._tokenizers: Dict[int, TextTokenizer] = {}

    def get(self, length: int, index: int) -> Row:
        """Row number `index`, 0 to the largest batch, of `length` tokens."""
        manifest = self._engine.manifest
        if length not in self._tokenizers:
            tokenizer = TextTokenizer(self._engine.folder, manifest.tokenizer, length, max_rows=1_000_000)
            self._tokenizers[length] = tokenizer
        start = index * len(self._texts) // max(BATCHES)
        text = " ".join(self._texts[start:] + self._texts[:start])[: 16 * length]
        text = " ".join([text] * (length // max(1, len(text.split())) + 2))
        if index % 2:
            text = f"{self._end} {text.split(' ', 1)[0]} {self._end} {text}"
        encoded = self._tokenizers[length].encode([Segments(text)], ["truncate"])[0]
        if isinstance(encoded, TraceserveError):
            raise encoded
        return encoded.rows[0]


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference, divided by the largest expected value where that is above 1."""
    if got.shape != expected.shape:
        return float("inf")
    return float(np.abs(got - expected).max() / max(1.0, float(np.abs(expected).max()))) if got.size else 0.0


def _compare_answers(
    engine: Engine,
    reference: Reference,
    samples: Sequence[Request],
    own: int,
    findings: Findings,
    progress: Progress,
) -> None:
    """The engine's answers, all samples at once, with the answers that the original's outputs decode to.

    The last `own` samples are the user's.
    """
    original = reference.original
    answers = engine.answer(samples)
    encoded = engine.task.encode(samples)
    for i, (sample, item, answer) in enumerate(zip(samples, encoded, answers)):
        progress("comparing answers", i, len(samples))
        if isinstance(item, TraceserveError) or not engine.task.repeatable(sample):
            continue  # a sample that this model refuses, as its own setting says
        is_own = i >= len(samples) - own
        findings.answers += 1
        findings.own_answers += is_own
        if not _tokenized_alike(original, sample, item, engine):
            findings.tokenized_otherwise.append(i)
        outputs = [_expected(engine, reference, row, sample) for row in item.rows]
        try:
            expected = engine.task.answer(sample, item.rows, outputs)
        except TraceserveError as error:
            changed = type(answer) is not type(error)
        else:
            changed = isinstance(answer, TraceserveError) or not engine.task.same(answer.value, expected)
        if changed:
            findings.changed.append(i)
            findings.own_changed += is_own
    progress("comparing answers", len(samples), len(samples))


def _expected(engine: Engine, reference: Reference, row: Row, sample: Request) -> Arrays:
    """What the original gives for a row, as far as its task reads it."""
    task, original = engine.task, reference.original
    tokens = (tuple(row.encoding.ids), tuple(row.encoding.type_ids))
    if task.loop:
        asked = json.dumps(sample.parameters, sort_keys=True)
        return reference.outputs((asked, tokens), partial(_original_text, original, task.loop, row, sample))
    whole = partial(run_original, original, row, engine.manifest.outputs)
    return reference.outputs(tokens, lambda: task.keep(row, whole()))


def _tokenized_alike(original: Original, sample: Request, encoded: Encoded, engine: Engine) -> bool:
    """Whether transformers' tokenizer gives the same rows; a text of several windows is compared by its token count."""
    parts = by_part(encoded.rows, encoded.rows)
    return all(
        _part_alike(original, segments, rows, bool(encoded.unseen))
        for segments, (rows, _) in zip(engine.task.segments(sample), parts)
    )


def _part_alike(original: Original, segments: Segments, rows: Sequence[Row], shortened: bool) -> bool:
    texts = [text for text in segments[:2] if text is not None]
    expected = original.tokenizer(
        *texts, truncation=False, padding=False, verbose=False, add_special_tokens=segments.special
    )
    if len(rows) > 1 or shortened:
        special = original.tokenizer.num_special_tokens_to_add(pair=len(texts) > 1)
        return shortened or sum(row.tokens for row in rows) >= len(expected["input_ids"]) - special
    encoding = rows[0].encoding
    columns = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}
    return all(expected[name] == columns[name] for name in original.inputs if name in columns and name in expected)
