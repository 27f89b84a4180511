"""Whether the engine answers as the original does, text in and answer out."""

from __future__ import annotations

import json
from functools import partial
from typing import Iterator, Sequence, Tuple, Union

from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.runner import Arrays
from traceserve_runtime.tasks.contract import Answer, Request, by_part
from traceserve_runtime.texts.tokenization import Encoded, Row, Segments

from traceserve.building.checkpoints import languages
from traceserve.building.checkpoints.original import Original
from traceserve.building.gate.findings import Findings
from traceserve.building.gate.reference import Reference, Wanted, run_original, run_text
from traceserve.building.progress import Progress


def compare_answers(
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
