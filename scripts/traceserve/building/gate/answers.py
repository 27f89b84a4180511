"""Compares the engine's answers with the original's, text in and answer out."""

from __future__ import annotations

import json
from functools import partial
from typing import Iterator, Sequence, Tuple, Union

from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.json_types import Json
from traceserve_runtime.runner import Arrays
from traceserve_runtime.tasks.contract import Answer, Request, Task, by_part
from traceserve_runtime.texts.rows import Encoded, Row, Segments

from traceserve.building.checkpoints import languages
from traceserve.building.checkpoints.original import Original
from traceserve.building.gate.findings import Findings
from traceserve.building.gate.reference import Reference, Wanted, run_original, run_text
from traceserve.building.progress import Progress

_AT_ONCE = 512  # the user's samples per batch, before checking whether enough have failed


def compare_answers(
    engine: Engine,
    reference: Reference,
    samples: Sequence[Request],
    own: int,
    findings: Findings,
    progress: Progress,
    thorough: bool = True,
) -> None:
    """Compare the engine's answers with the decoded outputs of the original.

    The last `own` samples are the user's. Unless `thorough`, these come first if few answers may change, and the
    comparison stops once more of them have changed than of all may: a lower precision is tried several times, and most
    attempts fail.
    """
    encoded = engine.task.encode(samples)
    if not engine.task.loop:
        reference.prepare(
            _wanted(engine, samples, encoded), engine.manifest.outputs, partial(progress, "running the original")
        )
    done, most = 0, 0.0 if thorough else findings.limit.changed * own
    for part in _parts(len(samples), own, stops_early=most >= 1):
        progress(f"answering with {findings.variant}", done, len(samples))
        answers = engine.answer(samples[part])
        for i, answer in zip(range(part.start, part.stop), answers):
            item = encoded[i]
            # The model's own settings may refuse a sample.
            if isinstance(item, Encoded) and engine.task.repeatable(samples[i]):
                _compare(engine, reference, i, samples[i], item, answer, i >= len(samples) - own, findings)
        done += part.stop - part.start
        if 1 <= most < findings.own_changed:
            findings.stopped = True
            break
    findings.changed.sort()
    progress(f"comparing answers of {findings.variant}", len(samples), len(samples))


def _parts(count: int, own: int, stops_early: bool) -> Iterator[slice]:
    """Yield the samples to answer at once: all of them, or the user's first, in parts."""
    if not stops_early:
        yield slice(0, count)
        return
    for start in range(count - own, count, _AT_ONCE):
        yield slice(start, min(start + _AT_ONCE, count))
    if own < count:
        yield slice(0, count - own)


def _compare(
    engine: Engine,
    reference: Reference,
    index: int,
    sample: Request,
    encoded: Encoded,
    answer: Union[Answer, TraceserveError],
    is_own: bool,
    findings: Findings,
) -> None:
    """Compare one answer, and record the result."""
    findings.answers += 1
    findings.own_answers += is_own
    if not _tokenized_alike(reference.original, sample, encoded, engine):
        findings.tokenized_otherwise.append(index)
    changed = _changed(engine, reference, sample, encoded, answer)
    if changed and _again_alone(reference, encoded, engine.manifest.outputs):
        changed = _changed(engine, reference, sample, encoded, answer)
    if changed:
        findings.changed.append(index)
        findings.own_changed += is_own


def _wanted(
    engine: Engine, samples: Sequence[Request], encoded: Sequence[Union[Encoded, TraceserveError]]
) -> Iterator[Wanted]:
    """Return the rows of all answered samples."""
    for sample, item in zip(samples, encoded):
        if isinstance(item, Encoded) and engine.task.repeatable(sample):
            for row in item.rows:
                yield Wanted(_tokens(row), row, partial(engine.task.keep, row))


def _tokens(row: Row) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
    return tuple(row.encoding.ids), tuple(row.encoding.type_ids)


def _again_alone(reference: Reference, encoded: Encoded, outputs: Sequence[str]) -> bool:
    """Rerun the original on each row of a request alone, if it was not: a near tie may have been decided
    differently."""
    computed = [reference.alone(_tokens(row), outputs) for row in encoded.rows]  # all of them
    return any(computed)


def _changed(
    engine: Engine, reference: Reference, sample: Request, encoded: Encoded, answer: Union[Answer, TraceserveError]
) -> bool:
    """Return whether an answer differs from the decoded outputs of the original."""
    try:
        expected = expected_answer(engine.task, reference, sample, encoded)
    except TraceserveError as error:
        return type(answer) is not type(error)
    return isinstance(answer, TraceserveError) or not engine.task.same(answer.value, expected)


def expected_answer(task: Task, reference: Reference, sample: Request, encoded: Encoded) -> Json:
    """Return the original's answer: its outputs for each row, decoded by the task; raises TraceserveError."""
    outputs = [_expected(task, reference, row, sample) for row in encoded.rows]
    return task.answer(sample, encoded.rows, outputs)


def _expected(task: Task, reference: Reference, row: Row, sample: Request) -> Arrays:
    """Return the original's outputs for a row, as far as its task reads them."""
    original = reference.original
    tokens = _tokens(row)
    if task.loop:
        asked = json.dumps(sample.parameters, sort_keys=True)
        return reference.outputs((asked, tokens), partial(run_text, original, task.loop, row, sample))
    whole = partial(run_original, original, row, task.manifest.outputs)
    return reference.outputs(tokens, lambda: task.keep(row, whole()))


def _tokenized_alike(original: Original, sample: Request, encoded: Encoded, engine: Engine) -> bool:
    """Return whether transformers' tokenizer makes the same rows; a text with several windows is compared by its token
    count."""
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
