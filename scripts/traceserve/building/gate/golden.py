"""The golden set: requests with the original's answers, in the archive, by which a server is verified later.

It holds built-in samples; the user's own only if the build was asked to keep them. Only requests whose answer is
determined (no sampling, no streams), and that the artifact itself answered as the original did.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from traceserve_runtime.engine import Engine, load_task
from traceserve_runtime.errors import InvalidManifest, TraceserveError
from traceserve_runtime.manifest import Manifest, sha256
from traceserve_runtime.tasks.contract import Answer, Request, Task
from traceserve_runtime.tasks.generating import Generating
from traceserve_runtime.texts.rows import Encoded

from traceserve.building.gate.along import GivenText, read_along
from traceserve.building.gate.answers import expected_answer, written_answers
from traceserve.building.gate.drift import score_difference
from traceserve.building.gate.findings import LIMITS
from traceserve.building.gate.reference import Reference, tokens_of
from traceserve.building.gate.verification import built_in_samples

GOLDEN_FILE = "golden.json"
GOLDEN_KEY = "golden"  # its key in the receipt
FORMAT = 1
MOST, MOST_WRITTEN, MOST_OWN = 64, 8, 256  # built-in samples, those of a task that writes text, and the user's own
MOST_BYTES = 1 << 20  # of the file; what does not fit is left out
_LONGEST = 2000  # characters of a built-in sample: a verification should be quick
_DIGITS = 7
_SHORTEST = 4  # tokens of a text in a lower precision that was cut before a near tie
_WITHOUT_DETAILS = {"details": False, "top_n_tokens": 0}  # probabilities: no other processor has them to the last digit


@dataclass(frozen=True)
class GoldenSample:
    """A request and the original's answer; `own`: it is the user's.

    A text in a lower precision may differ from the original's after a near tie: then `written` is the artifact's own, as it
    wrote it at the build, and as its servers should.
    """

    inputs: Dict[str, Any]
    parameters: Dict[str, Any]
    answer: Any
    own: bool = False
    written: Any = None

    @property
    def expected(self) -> Any:
        """The answer that a server should give."""
        return self.answer if self.written is None else self.written

    def document(self) -> Dict[str, Any]:
        """Return it for the file."""
        return {key: value for key, value in asdict(self).items() if key != "written" or value is not None}


@dataclass(frozen=True)
class GoldenSet:
    """`largest_difference` is that of the artifact's own scores from the original's, at the build; None if it could not
    run there."""

    samples: Tuple[GoldenSample, ...]
    largest_difference: Optional[float] = None

    def to_json(self) -> str:
        """Return the file's text."""
        told = {"samples": [each.document() for each in self.samples], "largest_difference": self.largest_difference}
        return json.dumps({"format": FORMAT, **told}, ensure_ascii=False, separators=(",", ":")) + "\n"


def read_golden(folder: Path) -> Optional[GoldenSet]:
    """Return the golden set of an unpacked archive; None without one. Raises InvalidManifest for an unknown format."""
    path = folder / GOLDEN_FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        samples = tuple(GoldenSample(**sample) for sample in document["samples"])
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}")
        return GoldenSet(samples, document["largest_difference"])
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidManifest(
            f"{GOLDEN_FILE} cannot be read ({error}); it should have format {FORMAT}: build the archive again"
        ) from None


def with_golden_set(
    folder: Path, manifest: Manifest, reference: Reference, own: Sequence[Request], runs_here: bool
) -> Tuple[Manifest, Optional[float]]:
    """Write the golden set into an artifact that passed; returns the manifest that names it, and the p50 in milliseconds
    of its requests in this process (None if the artifact does not run here)."""
    task = load_task(folder, manifest)
    along = bool(task.loop and LIMITS[manifest.dtype].changed)
    samples = _within_limits(
        task, _answered(task, reference, own), 2 * MOST_WRITTEN if along and runs_here else MOST_WRITTEN
    )
    golden, p50 = GoldenSet(tuple(samples)), None
    if runs_here and samples:
        golden, p50 = _with_own_texts(folder, task, samples, reference) if along else _compared(folder, task, samples)
    if not golden.samples:
        return manifest, None
    path = folder / GOLDEN_FILE
    path.write_text(golden.to_json(), encoding="utf-8")
    told = {
        "samples": len(golden.samples),
        "own_samples": sum(s.own for s in golden.samples),
        "bytes": path.stat().st_size,
    }
    files = dict(sorted({**manifest.files, GOLDEN_FILE: sha256(path)}.items()))
    return replace(manifest, files=files, receipt={**manifest.receipt, GOLDEN_KEY: told}), p50


def _answered(task: Task, reference: Reference, own: Sequence[Request]) -> Iterator[GoldenSample]:
    """Yield samples with the original's answers, the user's first; without those that it refuses, or samples."""
    built_in = built_in_samples(task, LIMITS[task.manifest.dtype])
    short = [request for request in built_in if len(json.dumps(dict(request.inputs))) <= _LONGEST]
    for requests, is_own in ((own[:MOST_OWN], True), (short[: 2 * MOST], False)):
        for request, encoded in zip(requests, task.encode(requests)):
            if not isinstance(encoded, Encoded) or not task.repeatable(request) or task.streams(request):
                continue
            try:
                answer = expected_answer(task, reference, request, encoded)
            except TraceserveError:
                continue
            yield GoldenSample(dict(request.inputs), dict(request.parameters), _rounded(answer), is_own)


def _within_limits(task: Task, samples: Iterable[GoldenSample], most_written: int = MOST_WRITTEN) -> List[GoldenSample]:
    """Return as many samples as may be kept, by number and by bytes."""
    left = {True: MOST_OWN, False: most_written if task.loop else MOST}
    room = MOST_BYTES - 100
    chosen: List[GoldenSample] = []
    for sample in samples:
        size = len(json.dumps(sample.document(), ensure_ascii=False).encode()) + 1
        if left[sample.own] and size <= room:
            left[sample.own] -= 1
            room -= size
            chosen.append(sample)
        if not left[False]:  # the built-in ones come last
            break
    return chosen


def _compared(folder: Path, task: Task, samples: Sequence[GoldenSample]) -> Tuple[GoldenSet, Optional[float]]:
    """Return the samples that the artifact answers as the original does, one at a time as a client asks, and the p50."""
    engine = Engine.load(folder)
    engine.warm_up()
    kept: List[GoldenSample] = []
    seconds, differences = [], [0.0]
    for sample in samples:
        started = time.perf_counter()
        [answer] = engine.answer([Request(sample.inputs, sample.parameters)])
        seconds.append(time.perf_counter() - started)
        if isinstance(answer, Answer) and task.same(answer.value, sample.answer):
            kept.append(sample)
            differences.append(score_difference(answer.value, sample.answer))
    return GoldenSet(tuple(kept), max(differences)), 1000 * statistics.median(seconds)


def _with_own_texts(
    folder: Path, task: Task, samples: Sequence[GoldenSample], reference: Reference
) -> Tuple[GoldenSet, Optional[float]]:
    """Return greedy samples with the artifact's own texts beside the original's, asked one at a time, and the p50.

    They end before the artifact's first near tie, which another processor may decide otherwise. Of the built-in ones the
    longest texts are kept.
    """
    engine = Engine.load(folder)
    engine.warm_up()
    found: List[Tuple[int, GoldenSample]] = []
    seconds: List[float] = []
    for sample in samples:
        plain = {name: off for name, off in _WITHOUT_DETAILS.items() if name in sample.parameters}
        whole = Request(sample.inputs, {**sample.parameters, **plain})
        length, tokens = _clear_length(engine, whole)
        cut = length < tokens
        request = Request(sample.inputs, {**whole.parameters, "max_new_tokens": length}) if cut else whole
        if not length or cut and (length < _SHORTEST or not _read_alike(task, whole, request)):
            continue
        started = time.perf_counter()
        [answer] = engine.answer([request])
        seconds.append(time.perf_counter() - started)
        [encoded] = task.encode([request])
        if isinstance(answer, Answer) and isinstance(encoded, Encoded):
            original = _rounded(expected_answer(task, reference, request, encoded))
            written = None if task.same(answer.value, original) else answer.value
            told = GoldenSample(dict(request.inputs), dict(request.parameters), original, sample.own, written)
            found.append((length, told))
    longest = sorted((each for each in found if not each[1].own), key=lambda each: -each[0])[:MOST_WRITTEN]
    kept = [sample for _, sample in found if sample.own] + [sample for _, sample in longest]
    return GoldenSet(tuple(kept), 0.0), 1000 * statistics.median(seconds) if seconds else None


def _read_alike(task: Task, one: Request, other: Request) -> bool:
    """Return whether the model reads the same for both: a long prompt is cut by how much is to be written."""
    rows = [[tokens_of(row) for row in item.rows] for item in task.encode([one, other]) if isinstance(item, Encoded)]
    return len(rows) == 2 and rows[0] == rows[1]


def _clear_length(engine: Engine, request: Request) -> Tuple[int, int]:
    """Return how many tokens the artifact writes before its first near tie, and how many in all; none for beams, which
    have no single text."""
    task = engine.task
    [encoded] = task.encode([request])
    if (
        not isinstance(task, Generating)
        or not isinstance(encoded, Encoded)
        or task.parameter(request, "num_beams") != 1
    ):
        return 0, 0
    [row] = encoded.rows
    [(answer, tokens, _)] = written_answers(engine, [request])
    if not isinstance(answer, Answer) or not tokens:
        return 0, 0
    [search] = read_along(engine, [GivenText(row, task.settings(request, row, task.prompt(row)), tokens)])
    if search is None or not search.agrees(tokens):
        return 0, 0
    # What the settings force has no rival.
    near = (position for position, rivals in enumerate(search.rivals) if len(rivals) > 1)
    return next(near, len(tokens)), len(tokens)


def _rounded(value: Any) -> Any:
    """Return an answer with as many digits as float32 has, since vectors are long."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
