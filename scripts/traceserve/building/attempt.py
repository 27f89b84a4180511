"""Attempts at an artifact: written in a dtype, the widest shapes first, and compared until one passes the gate."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union

from traceserve_runtime.engine import load_task
from traceserve_runtime.errors import InvalidManifest
from traceserve_runtime.generation.steps import IN_PARTS
from traceserve_runtime.manifest import Manifest, Shapes, Source
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Request, TextOrPair

from traceserve.archives.shapes_in_words import describe_shapes
from traceserve.building import artifact, explaining
from traceserve.building.checkpoints.original import Original
from traceserve.building.config import formats
from traceserve.building.config.dtypes import DTYPES
from traceserve.building.config.hardware import FIXED_SHAPES
from traceserve.building.config.save_modes import SAVE_MODES
from traceserve.building.config.setup_config import SetupConfig
from traceserve.building.exported import Compared
from traceserve.building.gate.corpus import sentences
from traceserve.building.gate.findings import DriftError, Findings
from traceserve.building.gate.reference import Reference
from traceserve.building.gate.texts import calibration
from traceserve.building.gate.verification import CORPUS, verify
from traceserve.building.progress import Progress
from traceserve.building.speeds import measure_speeds
from traceserve.building.writers import WRITERS
from traceserve.building.writers.neuron.compilers import CompileError
from traceserve.building.writers.shapes import without_padding
from traceserve.errors import ExportError, UnaskableError, UnwritableError
from traceserve.machine import neuron_cores, space
from traceserve.option_names import switch

_WRITTEN_TEXTS = 16  # for measuring the speed of generation
PADDING_CHANGES = "padding_changes_outputs_by"  # in the receipt, if rows are therefore never padded
REFUSED = "rewritten_graph_refused"  # in the receipt: the variants in which the rewritten graph failed
# What the gate compared for a chip: without one, the graphs before compilation instead of the compiled ones.
COMPILED, BEFORE_COMPILING = "compiled graphs", "graphs before they were compiled"


class AcceptedArtifact(NamedTuple):
    """An artifact that passed, or whose drift is allowed."""

    folder: Path
    manifest: Manifest
    findings: Findings


class Drifted(NamedTuple):
    """An artifact that did not pass: the gate's findings, the model that was written, and the shapes."""

    findings: Findings
    lowered: Original
    shapes: Shapes


def _lowered(config: SetupConfig, original: Original, dtype: str, texts: Sequence[TextOrPair]) -> Iterable[Original]:
    """Yield the models to write in this dtype, in turn; unchanged if the hardware's compiler converts it."""
    if config.hardware in DTYPES[dtype].by_compiler:
        return [replace(original, dtype=dtype)]
    return WRITERS[config.save_mode].lowered(original, dtype, texts, config.hardware)


def _speed_requests(made: AcceptedArtifact, own_samples: Sequence[Request]) -> Sequence[Request]:
    """Return the user's samples, or sentences of everyday length; only a few for generated texts."""
    task = load_task(made.folder, made.manifest)
    requests = own_samples or task.from_texts(sentences(CORPUS))
    return requests[:_WRITTEN_TEXTS] if task.loop else requests


@dataclass(frozen=True)
class Attempt:
    """The parts common to all attempts at an artifact."""

    config: SetupConfig
    source: Source
    reference: Reference
    name: str
    own_samples: Sequence[Request]
    progress: Progress
    allow_drift: bool = False  # a failing artifact may be taken, and is therefore compared completely

    def make(self, dtype: str, folder: Path) -> AcceptedArtifact:
        """Make an artifact of this dtype in `folder`, with the widest shapes that pass; raises ExportError,
        DriftError."""
        config, writer = self.config, WRITERS[self.config.save_mode]
        texts = calibration(TASKS[config.task], self.own_samples, writer.most_texts, writer.fixes_ranges)
        tried: List[Union[Drifted, ExportError]] = []
        for lowered in _lowered(config, self.reference.original, dtype, texts):
            for result in self._attempts(lowered, folder):
                if isinstance(result, AcceptedArtifact):
                    return result
                tried.append(result)
        return self._best_or_raise(dtype, tried, folder)

    def _attempts(self, lowered: Original, folder: Path) -> Iterator[Union[AcceptedArtifact, Drifted, ExportError]]:
        """Yield what becomes of a model in shapes, widest first, as long as narrower ones may mend what was wrong; last
        without padding, if padding alone was wrong in some of them."""
        by_padding: List[float] = []
        wrong_sides: Set[str] = set()  # padding there changes the original itself, whatever the shapes
        for padded, shapes in self._padded_ways(lowered):
            if padded.padding_side in wrong_sides:
                continue
            result = self._try(padded, shapes, folder)
            yield result
            if isinstance(result, Drifted):
                found = result.findings
                if self.config.hardware in FIXED_SHAPES or not found.shapes_fail:
                    return  # narrower shapes cannot mend what is wrong in all of them
                if found.changed_by_padding:
                    wrong_sides.add(padded.padding_side)
                    by_padding.append(max(cell.difference for cell in found.changed_by_padding))
                elif found.padding_changes:
                    by_padding.append(found.largest_difference)
        for shapes in without_padding(self.config) if by_padding else ():
            changes = {PADDING_CHANGES: min(by_padding)}
            yield self._try(lowered, replace(shapes, shortest=lowered.shortest), folder, changes)

    def _try(
        self, lowered: Original, shapes: Shapes, folder: Path, noted: Mapping[str, object] = {}
    ) -> Union[AcceptedArtifact, Drifted, ExportError]:
        """Return the artifact, finished if it passes, with what is `noted` in its receipt; or why it cannot be written:
        tracing may fail at one length and not at another."""
        try:
            manifest, findings = self._proven(lowered, shapes, folder)
        except (CompileError, UnaskableError):
            raise
        except ExportError as error:
            return error
        if not findings.passed:
            return Drifted(findings, lowered, shapes)
        findings.compared.update(noted)
        return self._finish(manifest, findings, lowered, folder)

    def _best_or_raise(
        self, dtype: str, tried: Sequence[Union[Drifted, ExportError]], folder: Path
    ) -> AcceptedArtifact:
        """Return the artifact that drifts least, if any may; else raise why none passed."""
        drifted = [each for each in tried if isinstance(each, Drifted)]
        runnable = [each for each in drifted if each.findings.failure is None]
        if self.allow_drift and runnable:
            findings, lowered, shapes = min(runnable, key=_distance)
            return self._finish(self._write(lowered, shapes, folder), findings, lowered, folder)
        if drifted:
            raise self._refusal(dtype, drifted)
        raise next(each for each in tried if isinstance(each, ExportError))

    def _refusal(self, dtype: str, drifted: Sequence[Drifted]) -> DriftError:
        """Return the error on artifacts that all failed, with the closest one's findings."""
        # The widest shapes of each model tried; of these the closest.
        widest = {(id(each.lowered.model), each.lowered.kept): each for each in reversed(drifted)}.values()
        findings, _, shapes = min(widest, key=lambda each: each.findings.share_changed)
        # A model that cannot even run in all shapes may run in another save mode.
        advice = formats.advice(self.config) if findings.failure else _without_padding(self.config, findings)
        return DriftError(_drift(dtype, shapes, self.reference.original) + advice, findings)

    def compared(self, made: AcceptedArtifact, scratch: Path) -> Optional[Compared]:
        """Return the speeds of an artifact and of the float32 one that its save mode is measured against, which is not
        verified; None if there is none, or it cannot be written."""
        save_mode = SAVE_MODES[self.config.save_mode].measured_against
        if save_mode is None:
            return None
        config = self.config.model_copy(update={"save_mode": save_mode, "options": {}})
        other = scratch / "compared"
        other.mkdir()
        try:
            replace(self, config=config)._write(self.reference.original, made.manifest.shapes, other)
        except ExportError:
            return None
        folders = {"": made.folder, save_mode: other}
        speeds = measure_speeds(folders, _speed_requests(made, self.own_samples), self.progress)
        return Compared(save_mode, speeds[save_mode], space.size([other]), speeds[""])

    def _padded_ways(self, lowered: Original) -> Iterator[Tuple[Original, Shapes]]:
        """Yield shapes, widest first, padded on the right, or on the left if the tokenizer says so."""
        own_side = TASKS[self.config.task].padding_side or lowered.tokenizer.padding_side
        sides = dict.fromkeys((lowered.padding_side, own_side))
        for shapes in candidate_shapes(self.config, lowered.max_length):
            for side in sides:
                yield replace(lowered, padding_side=side), replace(shapes, shortest=lowered.shortest)

    def _proven(self, lowered: Original, shapes: Shapes, folder: Path) -> Tuple[Manifest, Findings]:
        """Write the artifact and return it with the gate's findings.

        Graphs for a chip are compared before compilation, as the same graphs on the CPU, and after it, if the chip is
        available. Those that already differ are not compiled.
        """
        if self.config.hardware not in FIXED_SHAPES:
            return self._written(lowered, shapes, folder)
        with tempfile.TemporaryDirectory(prefix=".rehearsal.", dir=folder.parent) as scratch:
            rehearsal = self._write(replace(lowered, dtype="float32"), shapes, Path(scratch), rehearsal=True)
            before = self._verify(Path(scratch), only_usual=True)
        before.compared = {"compared": BEFORE_COMPILING}
        if not before.passed:
            return rehearsal, before
        manifest = self._write(lowered, shapes, folder)
        if not neuron_cores.count(self.config.hardware):
            return manifest, before
        findings = self._verify(folder)
        findings.compared = {"compared": COMPILED, "before_compiling": before.receipt()}
        return manifest, findings

    def _written(self, lowered: Original, shapes: Shapes, folder: Path) -> Tuple[Manifest, Findings]:
        """Write the artifact and verify it; if it fails, retry without its optional parts."""
        manifest, findings = self._write(lowered, shapes, folder), self._verify(folder)
        if not findings.outputs_differ:
            return manifest, findings
        plainer = WRITERS[self.config.save_mode].plainer(manifest, folder, findings.failing_files)
        again = self._verify(folder) if plainer else findings
        if plainer is None or not again.passed:
            return manifest, findings
        again.compared = {REFUSED: [found.row for found in findings.every if not found.alike]}
        return plainer, again

    def _verify(self, folder: Path, only_usual: bool = False) -> Findings:
        """Return the gate's findings; raises UnwritableError if the worker's reader cannot read what was written."""
        try:
            return verify(folder, self.reference, self.own_samples, self.progress, only_usual, self.allow_drift)
        except InvalidManifest as error:
            raise UnwritableError(error.message + formats.advice(self.config)) from error

    def _write(self, lowered: Original, shapes: Shapes, folder: Path, rehearsal: bool = False) -> Manifest:
        return artifact.write_artifact(
            self.config, self.source, lowered, shapes, self.name, folder, self.progress, rehearsal
        )

    def _finish(self, manifest: Manifest, findings: Findings, lowered: Original, folder: Path) -> AcceptedArtifact:
        receipt = {**findings.receipt(), "drift_allowed": not findings.passed, "in_float32": list(lowered.kept)}
        runtime = {**manifest.runtime, **({IN_PARTS: findings.prompts_in_parts} if findings.in_parts else {})}
        manifest = replace(manifest, receipt=receipt, runtime=runtime)
        if lowered.dtype == manifest.dtype and self.config.hardware not in FIXED_SHAPES:
            manifest = explaining.with_gradients(self.config, manifest, lowered, folder)
        manifest.write(folder)
        return AcceptedArtifact(folder, manifest, findings)


def _distance(drifted: Drifted) -> Tuple[float, float]:
    """Return how far an artifact is from the original: the share of changed answers, then the largest difference."""
    return drifted.findings.share_changed, drifted.findings.largest_difference


def _without_padding(config: SetupConfig, findings: Findings) -> str:
    """Return advice for a model whose answers change with padding, if running without was not tried."""
    if findings.padding_changes and config.hardware in FIXED_SHAPES:
        return (
            f"; padding changes the answers of this model, and {config.hardware} has fixed shapes, to which rows must be "
            'padded: take "hardware": "cpu"'
        )
    if findings.padding_changes and config.sequence_lengths != "auto":
        return '; padding changes the answers of this model: with "sequence_lengths": "auto" it is run without any'
    return ""


def _drift(dtype: str, shapes: Shapes, original: Original) -> str:
    return (
        f"the exported model does not answer as the original does (in {dtype}, "
        f"at {describe_shapes(shapes, original.max_length)}), so nothing "
        f"was written; {switch('allow-drift')} exports it anyway, and records it"
    )


def candidate_shapes(config: SetupConfig, max_length: int) -> Iterable[Shapes]:
    """Yield the shapes to try, widest first."""
    return WRITERS[config.save_mode].shapes(config, max_length)
