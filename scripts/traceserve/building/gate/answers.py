"""Compares the engine's answers with the original's, text in and answer out."""

from __future__ import annotations

from functools import partial
from typing import Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine, Work
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.generation.search import Beams
from traceserve_runtime.json_types import Json
from traceserve_runtime.runner import Arrays
from traceserve_runtime.tasks.contract import Answer, Request, Task, by_part
from traceserve_runtime.texts.rows import Encoded, Row, Segments

from traceserve.building.checkpoints import languages
from traceserve.building.checkpoints.original import Original
from traceserve.building.gate.along import OwnText, compare_along
from traceserve.building.gate.findings import VECTOR, Findings
from traceserve.building.gate.outputs import unexplained_variance
from traceserve.building.gate.reference import Reference, Wanted, run_original, tokens_of
from traceserve.building.progress import Progress

_AT_ONCE = 512  # the user's samples per batch, before checking whether enough have failed
_MOST_VECTORS = 2048  # whose variance is compared


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
    attempts fail. Texts in a lower precision are judged along the original's, see `along`.
    """
    encoded = engine.task.encode(samples)
    along: Optional[List[OwnText]] = [] if engine.task.loop and findings.limit.changed else None
    if not engine.task.loop:
        reference.prepare(
            _wanted(engine, samples, encoded), engine.manifest.outputs, partial(progress, "running the original")
        )
    refused = [item for item in encoded[len(samples) - own :] if isinstance(item, TraceserveError)]
    findings.own_refused, findings.own_refusal = len(refused), refused[0].message if refused else ""
    vectors: List[Tuple[np.ndarray, np.ndarray]] = []
    done, most = 0, 0.0 if thorough or along is not None else findings.limit.changed * own
    for part in _parts(len(samples), own, stops_early=most >= 1):
        progress(f"answering with {findings.variant}", done, len(samples))
        answers = written_answers(engine, samples[part])
        for i, (answer, tokens, claimed) in zip(range(part.start, part.stop), answers):
            item = encoded[i]
            # The model's own settings may refuse a sample.
            if isinstance(item, Encoded) and engine.task.repeatable(samples[i]):
                is_own = i >= len(samples) - own
                expected = _compare(engine, reference, i, samples[i], item, answer, is_own, findings)
                if findings.limit.changed and len(vectors) < _MOST_VECTORS:
                    vectors += _vectors(engine.task, samples[i], answer, expected)
                if along is not None and isinstance(answer, TraceserveError):
                    findings.astray += [i] if i in findings.changed else []  # the original refuses it too, otherwise
                elif along is not None:
                    along.append(OwnText(i, samples[i], item.rows[0], tokens, is_own, claimed))
        done += part.stop - part.start
        if 1 <= most < findings.own_changed:
            findings.stopped = True
            break
    findings.changed.sort()
    if vectors:
        findings.unexplained[VECTOR] = unexplained_variance(vectors)
    if along:
        progress(f"going along the original's texts with {findings.variant}", 0, 0)
        compare_along(engine, reference, along, findings)
    progress(f"comparing answers of {findings.variant}", len(samples), len(samples))


def written_answers(
    engine: Engine, samples: Sequence[Request]
) -> Iterator[Tuple[Union[Answer, TraceserveError], Sequence[int], Optional[float]]]:
    """Yield the engine's answers, the tokens of each that is written, and the sum of logarithms of those of beams."""
    work = Work(engine, Stats())
    pending = work.join(samples, [None] * len(samples))
    while work.busy:
        work.turn()
    for each in pending:
        search = each.members[0].search if each.members else None
        claimed = search.logarithm if isinstance(search, Beams) else None
        yield each.answer(), search.tokens if search is not None else (), claimed


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
) -> Union[Json, TraceserveError]:
    """Compare one answer, and record the result; return the original's, or why it has none."""
    findings.answers += 1
    findings.own_answers += is_own
    if not _tokenized_alike(reference.original, sample, encoded, engine):
        findings.tokenized_otherwise.append(index)
    expected = _answer_or_refusal(engine.task, reference, sample, encoded)
    changed = _changed(engine, reference, encoded, answer, expected)
    if changed and _again_alone(reference, encoded, engine.manifest.outputs):
        expected = _answer_or_refusal(engine.task, reference, sample, encoded)
        changed = _changed(engine, reference, encoded, answer, expected)
    if changed:
        findings.changed.append(index)
        findings.own_changed += is_own
    return expected


def _vectors(
    task: Task, sample: Request, answer: Union[Answer, TraceserveError], expected: Union[Json, TraceserveError]
) -> List[Tuple[np.ndarray, np.ndarray]]:
    """Return the vector that a text is answered with, beside the original's; nothing for other answers."""
    if isinstance(answer, TraceserveError) or isinstance(expected, TraceserveError):
        return []
    if not task.answers_with_vector(sample):
        return []
    return [(np.array(answer.value, np.float32), np.array(expected, np.float32))]


def _wanted(
    engine: Engine, samples: Sequence[Request], encoded: Sequence[Union[Encoded, TraceserveError]]
) -> Iterator[Wanted]:
    """Return the rows of all answered samples."""
    for sample, item in zip(samples, encoded):
        if isinstance(item, Encoded) and engine.task.repeatable(sample):
            for row in item.rows:
                yield Wanted(tokens_of(row), row, partial(engine.task.keep, row))


def _again_alone(reference: Reference, encoded: Encoded, outputs: Sequence[str]) -> bool:
    """Rerun the original on each row of a request alone, if it was not: a near tie may have been decided
    differently."""
    computed = [reference.alone(tokens_of(row), outputs) for row in encoded.rows]  # all of them
    return any(computed)


def _changed(
    engine: Engine,
    reference: Reference,
    encoded: Encoded,
    answer: Union[Answer, TraceserveError],
    expected: Union[Json, TraceserveError],
) -> bool:
    """Return whether an answer differs from the decoded outputs of the original."""
    if engine.task.cleans_up and not _decoded_alike(reference.original, encoded, engine.task):
        return True
    if isinstance(expected, TraceserveError):
        return type(answer) is not type(expected)
    return isinstance(answer, TraceserveError) or not engine.task.same(answer.value, expected)


def _answer_or_refusal(
    task: Task, reference: Reference, sample: Request, encoded: Encoded
) -> Union[Json, TraceserveError]:
    try:
        return expected_answer(task, reference, sample, encoded)
    except TraceserveError as error:
        return error


def expected_answer(task: Task, reference: Reference, sample: Request, encoded: Encoded) -> Json:
    """Return the original's answer: its outputs for each row, decoded by the task; raises TraceserveError."""
    outputs = [_expected(task, reference, row, sample) for row in encoded.rows]
    answer, _ = task.answer(sample, encoded.rows, outputs)
    return answer


def _expected(task: Task, reference: Reference, row: Row, sample: Request) -> Arrays:
    """Return the original's outputs for a row, as far as its task reads them."""
    original = reference.original
    if task.loop:
        return reference.text(task.loop, row, sample)
    whole = partial(run_original, original, row, task.manifest.outputs)
    return reference.outputs(tokens_of(row), lambda: task.keep(row, whole()))


def _tokenized_alike(original: Original, sample: Request, encoded: Encoded, engine: Engine) -> bool:
    """Return whether transformers' tokenizer makes the same rows; a text with several windows is compared by its token
    count."""
    parts = by_part(encoded.rows, encoded.rows)
    with languages.reading(original.tokenizer, sample.parameters.get("src_lang")):
        return all(
            _part_alike(original, segments, rows, bool(encoded.unseen))
            for segments, (rows, _) in zip(engine.task.segments(sample), parts)
        )


def _decoded_alike(original: Original, encoded: Encoded, task: Task) -> bool:
    """Return whether transformers' tokenizer makes the same texts of the rows: answers are decoded by our own."""
    ids = [row.encoding.ids for row in encoded.rows]
    return all(
        task.tokenizer.decode(each, skip_special_tokens=True)
        == original.tokenizer.decode(each, skip_special_tokens=True)
        for each in ids
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
