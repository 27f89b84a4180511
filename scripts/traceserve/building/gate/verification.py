"""The gate: compares the artifact with the original, in every variant that a worker may run.

Two questions, both on real sentences. The model: do its outputs equal the original's on a grid of batch sizes and
lengths, padded and not? The whole: does the engine, text in and answer out, answer like the original? The
original runs each row alone, without padding, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Sequence

from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import TraceserveError, last_reason
from traceserve_runtime.runtimes import VARIANTS
from traceserve_runtime.tasks.contract import Request, Task

from traceserve.building.gate import devices
from traceserve.building.gate.answers import compare_answers
from traceserve.building.gate.corpus import sentences
from traceserve.building.gate.findings import LIMITS, Findings, Limit
from traceserve.building.gate.outputs import GridRows, check_original, compare_outputs
from traceserve.building.gate.readiness import check_canary_answered, check_canary_fits
from traceserve.building.gate.reference import Reference
from traceserve.building.gate.texts import TEXTS
from traceserve.building.progress import Progress
from traceserve.errors import UnaskableError
from traceserve.option_names import option

CORPUS = (
    512  # sentences for a lower precision, besides the samples; a quarter of them for each variant except the default
)
# The user's samples for each variant except the default: in float32, where no answer may change, and in a lower
# precision, where some may, enough to judge (see Limit).
OWN_OF_OTHERS, OWN_OF_OTHERS_LOWER = 64, 512


def verify(
    folder: Path,
    reference: Reference,
    own_samples: Sequence[Request],
    progress: Progress,
    only_usual: bool = False,
    thorough: bool = False,
) -> Findings:
    """Compare the artifact in `folder` with the original on the built-in samples and on `own_samples`.

    In each variant that a worker may run, on each available device; unless the default one fails, or `only_usual`.
    A lower precision, of which few changed answers are allowed, needs more samples than 30. Unless
    `thorough`, the comparison stops once too many answers to the user's samples have changed. Raises UnaskableError if
    nothing can be compared, and ExportError for an artifact that no server could be ready with, see `readiness`.
    """
    usual = Engine.load(folder)
    manifest, task = usual.manifest, usual.task
    check_canary_fits(task)
    _check_own_samples(task, own_samples)
    limit = LIMITS[manifest.dtype]
    built_in = built_in_samples(task, limit)
    parts = [each for each in task.parts(built_in) if not isinstance(each, TraceserveError)]
    pairs = any(segments.pair for each in parts for segments in each)
    rows = GridRows(folder, manifest.tokenizer, reference.original, pairs)
    gate = _Gate(reference, built_in, own_samples, rows, progress, thorough)
    check_original(usual, reference, rows)
    first, *others = VARIANTS[manifest.save_mode](manifest, folder, devices.at_hand(manifest.hardware))
    findings = gate.compare(usual, Findings(limit, first.file, first.how, first.device))
    if not (findings.answers or findings.failure or findings.stopped):
        raise UnaskableError(
            "no answer can be compared with the original's, since no built-in text fits into max_length; choose a larger one, or "
            f"give your own texts with {option('samples')}"
        )
    if findings.passed:
        check_canary_answered(usual)
    del usual  # each has its own weights
    if not findings.passed or only_usual:
        return findings
    some = replace(
        gate,
        built_in=built_in_samples(task, limit, of_others=True),
        own=_spread(own_samples, OWN_OF_OTHERS_LOWER if limit.changed else OWN_OF_OTHERS),
    )
    for variant in others:
        engine = Engine(folder, manifest, task, variant.read())
        found = some.compare(engine, Findings(limit, variant.file, variant.how, variant.device))
        if limit.changed and (found.too_many_changed or found.drifts) and some.samples < gate.samples:
            # A share or a mean of few samples varies by chance: a rejection needs all of them.
            found = gate.compare(engine, Findings(limit, variant.file, variant.how, variant.device))
        findings.others.append(found)
    return findings


def _check_own_samples(task: Task, own: Sequence[Request]) -> None:
    """Raise UnaskableError if all of the user's own samples would be refused."""
    reason = ""
    for request in own:  # until one is read: all are encoded when they are compared
        [encoded] = task.encode([request])
        if not isinstance(encoded, TraceserveError):
            return
        reason = reason or encoded.message
    if own:
        raise UnaskableError(
            f"none of your samples can be compared: the model would refuse all of them, the first because {reason}; give "
            f"others with {option('samples')}"
        )


def built_in_samples(task: Task, limit: Limit, of_others: bool = False) -> Sequence[Request]:
    """Return the built-in samples, fewer `of_others` than the default variant: more of them where few answers may
    change."""
    more = sentences(CORPUS // 4 if of_others else CORPUS) if limit.changed and not task.loop else ()
    return task.from_texts((*TEXTS, *more))


def _spread(samples: Sequence[Request], most: int) -> Sequence[Request]:
    """Return a spread of at most this many of the user's samples: the default variant was asked all of them."""
    return samples if len(samples) <= most else [samples[i * len(samples) // most] for i in range(most)]


@dataclass(frozen=True)
class _Gate:
    """The questions to every variant of every artifact."""

    reference: Reference
    built_in: Sequence[Request]
    own: Sequence[Request]
    rows: GridRows
    progress: Progress
    thorough: bool = False

    @property
    def samples(self) -> int:
        """How many are answered."""
        return len(self.built_in) + len(self.own)

    def compare(self, engine: Engine, findings: Findings) -> Findings:
        """Fill in the findings of a variant."""
        try:
            # Before any comparison, so that the executor's late optimizations are compared too.
            engine.warm_up()
            compare_outputs(engine, self.reference, self.rows, findings, self.progress)
            samples = [*self.built_in, *self.own]
            compare_answers(engine, self.reference, samples, len(self.own), findings, self.progress, self.thorough)
        except RuntimeError as error:
            findings.failure = last_reason(error)
        return findings
