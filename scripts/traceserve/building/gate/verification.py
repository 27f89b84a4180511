"""The gate: the original against the artifact, in every variant that a worker may run.

Two questions of each, each on real sentences. Of the model: do its outputs equal the original's on a grid of batch sizes and
lengths, padded and not? Of the whole: does the engine, text in and answer out, answer as the original does? The
original runs each row alone, without padding, in float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple, Union

import numpy as np
from traceserve_runtime.batching import batches
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.generation.steps import FEEDS
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays
from traceserve_runtime.runtimes import VARIANTS
from traceserve_runtime.tasks.contract import Answer, Request, by_part
from traceserve_runtime.texts.tokenization import Encoded, Row, Segments, TextTokenizer

from traceserve.building.checkpoints import languages
from traceserve.building.checkpoints.loading import Original
from traceserve.building.config.loops import LOOPS
from traceserve.building.gate import devices
from traceserve.building.gate.corpus import sentences
from traceserve.building.gate.findings import LIMITS, Cell, Findings
from traceserve.building.gate.loops import forced_tokens
from traceserve.building.gate.reference import FORCED_STEPS, Reference, Wanted, run_forced, run_original, run_text
from traceserve.building.gate.texts import TEXTS
from traceserve.building.progress import Progress

CORPUS = 512  # sentences that a lower precision is asked beside the samples
# Of the user's samples, for each variant but the usual one: in float32, where no answer may change, and in a lower
# precision, where some may, enough to tell (see Limit).
OWN_OF_OTHERS, OWN_OF_OTHERS_LOWER = 64, 512
BATCHES = (1, 2, 5)
_MOST_TOKENS = 1024  # of a cell, but for two rows


def verify(
    folder: Path,
    reference: Reference,
    own_samples: Sequence[Request],
    progress: Progress,
    only_usual: bool = False,
) -> Findings:
    """Compare the artifact in `folder` with the original on the built-in samples and on `own_samples`.

    In each variant that a worker may run, on each device at hand; unless the one that is usual here fails, or `only_usual`.
    A lower precision, of which few changed answers are allowed, is asked more: of 30 answers none may tell.
    """
    usual = Engine.load(folder)
    manifest, task = usual.manifest, usual.task
    limit = LIMITS[manifest.dtype]
    more = sentences(CORPUS) if limit.changed and not task.loop else ()
    built_in = task.from_texts((*TEXTS, *more))
    gate = _Gate(reference, built_in, own_samples, progress)
    first, *others = VARIANTS[manifest.save_mode](manifest, folder, devices.at_hand(manifest.hardware))
    findings = gate.compare(usual, Findings(limit, first.file, first.how, first.device))
    del usual  # each has weights of its own
    if not findings.passed or only_usual:
        return findings
    some = replace(gate, own=_spread(own_samples, OWN_OF_OTHERS_LOWER if limit.changed else OWN_OF_OTHERS))
    for variant in others:
        engine = Engine(folder, manifest, task, variant.read())
        found = some.compare(engine, Findings(limit, variant.file, variant.how, variant.device))
        if limit.changed and found.too_many_changed and len(some.own) < len(own_samples):
            # A share of few is off by chance: what is refused is refused by all of them.
            found = gate.compare(engine, Findings(limit, variant.file, variant.how, variant.device))
        findings.others.append(found)
    return findings


def _spread(samples: Sequence[Request], most: int) -> Sequence[Request]:
    """At most so many of the user's samples, from the first to the last: all of them were asked of the usual variant."""
    return samples if len(samples) <= most else [samples[i * len(samples) // most] for i in range(most)]


@dataclass(frozen=True)
class _Gate:
    """What every variant of every artifact is asked."""

    reference: Reference
    built_in: Sequence[Request]
    own: Sequence[Request]
    progress: Progress

    def compare(self, engine: Engine, findings: Findings) -> Findings:
        """Fill in the findings of a variant."""
        try:
            # Before anything is compared: what an executor optimises after its first runs is compared too.
            engine.warm_up()
            _compare_outputs(engine, self.reference, findings, self.progress)
            samples = [*self.built_in, *self.own]
            _compare_answers(engine, self.reference, samples, len(self.own), findings, self.progress)
        except RuntimeError as error:
            lines = [line for line in str(error).strip().splitlines() if line.strip()]
            findings.failure = lines[-1] if lines else type(error).__name__
        return findings


def _read_forced(engine: Engine, rows: Sequence[Row], manifest: Manifest) -> List[Arrays]:
    """The logits, (FORCED_STEPS + 1, vocabulary), where a loop is made to read given tokens after its rows."""
    feed = FEEDS[engine.task.loop](engine.runner, rows, manifest, Stats())
    forced = np.array([forced_tokens(row, FORCED_STEPS) for row in rows])
    same_rows = np.arange(len(rows))
    logits = [feed.first(), *(feed.next(same_rows, forced[:, step]) for step in range(FORCED_STEPS))]
    return [{"logits": np.stack([step[i] for step in logits])} for i in range(len(rows))]


def _compare_outputs(engine: Engine, reference: Reference, findings: Findings, progress: Progress) -> None:
    manifest, original = engine.manifest, reference.original
    rows = _Rows(engine, original)
    expected: Dict[Tuple[int, int], Arrays] = {}
    per_token = [output.name for output in engine.task.outputs if output.per_token]
    loop = engine.task.loop
    grid = list(_grid(manifest))
    most = _longest_row(engine)
    if not loop:
        numbers = [(min(n, most), i) for cell in grid for i, n in enumerate(_row_lengths(manifest, *cell))]
        wanted = (Wanted(("row", *number), rows.get(*number), dict) for number in dict.fromkeys(numbers))
        reference.prepare(wanted, manifest.outputs, partial(progress, "running the original"))
    for step, (batch, length, padded) in enumerate(grid):
        progress(f"comparing outputs of {findings.variant}", step, len(grid))
        lengths = [min(n, most) for n in _row_lengths(manifest, batch, length, padded)]
        shapes = manifest.shapes
        if padded and batch == 1:  # as with a `length_step`
            shapes = shapes.stepped(min(length, most), manifest.max_length)
        run_as = replace(manifest, shapes=shapes)
        keys = [(row_length, i) for i, row_length in enumerate(lengths)]
        for key in keys:
            row = rows.get(*key)
            if loop:
                compute = partial(run_forced, original, loop, row)
            else:
                compute = partial(run_original, original, row, manifest.outputs)
            expected[key] = reference.outputs(("row", *key), compute)
        if loop:
            got = _read_forced(engine, [rows.get(*key) for key in keys], run_as)
        else:
            got = batches.run(engine.runner, [rows.get(*key) for key in keys], run_as, per_token, Stats())
        for output in manifest.outputs:
            differences = [_difference(one[output], expected[key][output]) for one, key in zip(got, keys)]
            findings.cells.append(Cell(batch, length, padded, output, float(np.max(differences))))
    progress(f"comparing outputs of {findings.variant}", len(grid), len(grid))


def _longest_row(engine: Engine) -> int:
    """The longest row of the grid: a decoder writes after its rows, within the same length."""
    loop = engine.task.loop
    return engine.manifest.max_length - (FORCED_STEPS if loop and LOOPS[loop].writes_behind else 0)


def _grid(manifest: Manifest) -> Iterator[Tuple[int, int, bool]]:
    """Batch, length, padded: every allowed length, or a spread of them; batches up to what is allowed.

    Of long rows fewer: five of 512 tokens took half of the gate's time, and a row knows no more neighbours than of two.
    """
    most = manifest.max_length
    lengths = manifest.shapes.lengths or sorted({max(3, most // 16), max(3, most // 4), most // 2, most - 1, most})
    most_rows = max(manifest.shapes.batches or BATCHES)
    for length in lengths:
        fitting = max(2, _MOST_TOKENS // length)
        for batch in dict.fromkeys(min(batch, fitting) for batch in BATCHES if batch <= most_rows):
            yield batch, length, False
            if manifest.shapes.padded:
                yield batch, length, True


def _row_lengths(manifest: Manifest, batch: int, length: int, padded: bool) -> List[int]:
    """The lengths of the rows of one cell: all `length`; or, padded, shorter ones that run at `length` too."""
    if not padded:
        return [length] * batch
    below = max([n for n in manifest.shapes.lengths or () if n < length], default=2)  # runs at a smaller shape
    shorter = [max(below + 1, length * share // 6) for share in (4, 2, 3)]
    # Where any length is allowed, one whole row gives the cell its length; a row alone has padding with a `length_step`.
    whole = 1 if manifest.shapes.lengths is None and batch > 1 else 0
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
    encoded = engine.task.encode(samples)
    if not engine.task.loop:
        reference.prepare(
            _wanted(engine, samples, encoded), engine.manifest.outputs, partial(progress, "running the original")
        )
    progress(f"answering with {findings.variant}", 0, 0)
    answers = engine.answer(samples)
    for i, (sample, item, answer) in enumerate(zip(samples, encoded, answers)):
        progress(f"comparing answers of {findings.variant}", i, len(samples))
        if isinstance(item, TraceserveError) or not engine.task.repeatable(sample):
            continue  # a sample that this model refuses, as its own setting says
        is_own = i >= len(samples) - own
        findings.answers += 1
        findings.own_answers += is_own
        if not _tokenized_alike(original, sample, item, engine):
            findings.tokenized_otherwise.append(i)
        changed = _changed(engine, reference, sample, item, answer)
        if changed and _again_alone(reference, item, engine.manifest.outputs):
            changed = _changed(engine, reference, sample, item, answer)
        if changed:
            findings.changed.append(i)
            findings.own_changed += is_own
    progress(f"comparing answers of {findings.variant}", len(samples), len(samples))


def _wanted(
    engine: Engine, samples: Sequence[Request], encoded: Sequence[Union[Encoded, TraceserveError]]
) -> Iterator[Wanted]:
    """The rows of all samples that are answered."""
    for sample, item in zip(samples, encoded):
        if isinstance(item, Encoded) and engine.task.repeatable(sample):
            for row in item.rows:
                yield Wanted(_tokens(row), row, partial(engine.task.keep, row))


def _tokens(row: Row) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
    return tuple(row.encoding.ids), tuple(row.encoding.type_ids)


def _again_alone(reference: Reference, encoded: Encoded, outputs: Sequence[str]) -> bool:
    """Run the original on each row of a request by itself, where it was not: where a near tie may have fallen otherwise."""
    computed = [reference.alone(_tokens(row), outputs) for row in encoded.rows]  # all of them
    return any(computed)


def _changed(
    engine: Engine, reference: Reference, sample: Request, encoded: Encoded, answer: Union[Answer, TraceserveError]
) -> bool:
    """Whether an answer is another than what the original's outputs decode to."""
    outputs = [_expected(engine, reference, row, sample) for row in encoded.rows]
    try:
        expected = engine.task.answer(sample, encoded.rows, outputs)
    except TraceserveError as error:
        return type(answer) is not type(error)
    return isinstance(answer, TraceserveError) or not engine.task.same(answer.value, expected)


def _expected(engine: Engine, reference: Reference, row: Row, sample: Request) -> Arrays:
    """What the original gives for a row, as far as its task reads it."""
    task, original = engine.task, reference.original
    tokens = _tokens(row)
    if task.loop:
        asked = json.dumps(sample.parameters, sort_keys=True)
        return reference.outputs((asked, tokens), partial(run_text, original, task.loop, row, sample))
    whole = partial(run_original, original, row, engine.manifest.outputs)
    return reference.outputs(tokens, lambda: task.keep(row, whole()))


def _tokenized_alike(original: Original, sample: Request, encoded: Encoded, engine: Engine) -> bool:
    """Whether transformers' tokenizer gives the same rows; a text of several windows is compared by its token count."""
    parts = by_part(encoded.rows, encoded.rows)
    with languages.reading(original.tokenizer, sample.parameters.get("src_lang")):
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
