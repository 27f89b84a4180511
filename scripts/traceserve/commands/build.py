"""export, archive, build: a configuration to an artifact and an archive."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Tuple

from traceserve.archives.names import STORE
from traceserve.building.config import CONFIG_FILE
from traceserve.commands.arguments import add_samples
from traceserve.commands.compare import compare_formats
from traceserve.commands.contract import Command
from traceserve.commands.printing import (
    ProgressBar,
    console,
    figure,
    megabytes,
    print_findings,
    print_line,
    print_note,
    printable,
    recorded,
)

if TYPE_CHECKING:
    from traceserve_runtime.manifest import Manifest

    from traceserve.building.exported import Exported
    from traceserve.building.gate.findings import Findings, TokenCounts
    from traceserve.building.gate_options import GateOptions

_NOT_COMPARED = ("output", "store", "version", "force", "keep_samples", "allow_drift")  # options of a build alone


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, default=Path(CONFIG_FILE), metavar="FILE", help="the configuration [%(default)s]"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="artifacts/NAME",
        help="the artifact's folder [artifacts/ and the last part of model_name]",
    )


def _add_gate(parser: argparse.ArgumentParser) -> None:
    add_samples(parser, "compare on your own texts too:")
    parser.add_argument(
        "--keep-samples",
        action="store_true",
        help="put up to 256 of your --samples, with the original's answers, into the archive, so that `traceserve verify` asks "
        "them too; without it no text of yours is in the archive",
    )
    parser.add_argument(
        "--allow-drift",
        action="store_true",
        help="export even if answers differ from the original's; recorded in the manifest",
    )


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace an existing one")


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", type=Path, default=STORE, metavar="FOLDER", help="folder of archives [%(default)s]")
    parser.add_argument(
        "--version",
        metavar="V",
        help="the archive's version, in /predictions/NAME/V [the configuration's, else 1.0]; with another one, a second build "
        "can be registered beside the first",
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    _add_gate(parser)
    _add_force(parser)


def _add_archive(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="artifacts/NAME", help="a folder that `traceserve export` made")
    _add_store(parser)
    _add_force(parser)


def _add_build(parser: argparse.ArgumentParser) -> None:
    _add_export(parser)
    _add_store(parser)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="write nothing: build every save mode and dtype that works here into temporary folders, and print their figures",
    )
    parser.add_argument("--json", action="store_true", help="with --compare: print JSON")


def _export(options: argparse.Namespace) -> int:
    make(options.config, _gate(options), options.output, force=options.force)
    return 0


def _build(options: argparse.Namespace) -> int:
    from traceserve.errors import ConfigError

    if options.compare:
        given = [name for name in _NOT_COMPARED if getattr(options, name) not in (None, False, STORE)]
        if given:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"--compare writes nothing, and takes no {named}, which a build without it does")
        return compare_formats(options)
    if options.json:
        raise ConfigError("--json is for --compare; a build's figures are in NAME.report.json beside the archive")
    make(options.config, _gate(options), options.output, options.store, options.version, options.force)
    return 0


def _gate(options: argparse.Namespace) -> GateOptions:
    from traceserve.building.gate_options import GateOptions
    from traceserve.building.samples import OwnSamples

    samples = OwnSamples.read(options.samples) if options.samples else None  # before anything is downloaded
    return GateOptions(samples, options.allow_drift, options.keep_samples)


def make(
    config: Path,
    gate: GateOptions,
    output: Optional[Path] = None,
    store: Optional[Path] = None,
    version: Optional[str] = None,
    force: bool = False,
) -> Path:
    """Export, and archive if there is a store; both appear at the end, or neither. Returns the archive's or the artifact's
    path."""
    from traceserve.archives.reports import report_file
    from traceserve.building.config import parsing, targets

    loaded = parsing.load_config(config)
    for note in loaded.notes:
        print_note(note, error=True)
    written = targets.build_targets(loaded, output, store, version, force)
    from traceserve.building.packing import export_and_pack

    started = time.monotonic()
    with ProgressBar() as bar:
        exported = export_and_pack(loaded, written, bar, gate)
    if exported.note:
        print_line(exported.note)
    made = written.archive or written.artifact
    _print_exported(exported, made, time.monotonic() - started)
    print_line(f"report  {report_file(made)}", style="dim")
    step = "serve it:  traceserve serve" if written.archive else "pack it:  traceserve archive"
    print_line(f"\n{step} {shlex.quote(str(made))}")
    return made


def _archive(options: argparse.Namespace) -> int:
    from traceserve.archives import archive, reports, staging
    from traceserve.building.config import targets

    target = targets.archive_target(options.artifact, options.store, options.force)
    started = time.monotonic()
    with ProgressBar() as bar, staging.staged(target) as folder:
        bar("packing", 0, 0)
        archive.pack_archive(options.artifact, target.stem, folder, options.version)
    reports.copy_report(options.artifact, target)
    size = target.stat().st_size
    print_line(f"{target}: {megabytes(size)} in {time.monotonic() - started:.1f} s")
    print_line(f"\nserve it:  traceserve serve {shlex.quote(str(target))}")
    return 0


def _print_exported(exported: Exported, path: Path, seconds: float) -> None:
    from rich.table import Table

    from traceserve.archives.shapes_in_words import describe_shapes
    from traceserve.machine import space

    manifest, findings = exported.manifest, exported.findings
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for label, value in (
        ("file", str(path)),
        ("size", megabytes(space.size([path]))),
        ("task", f"{manifest.task} ({exported.task_found})" if exported.task_found else manifest.task),
        ("parameters", f"{exported.parameters:,}"),
        *_save_mode(exported),
        ("dtype", _dtype(manifest)),
        ("shapes", describe_shapes(manifest.shapes, manifest.max_length)),
        *_padding(manifest),
        ("largest difference", f"{findings.largest_difference:.1e} (limit {findings.limit.difference:.0e})"),
        *_judged(findings),
        *_compiled(exported),
        ("seconds", f"{seconds:.1f}"),
    ):
        table.add_row(label, printable(value))
    console().print(table, highlight=False)
    _print_variants(findings)
    if len(exported.candidates) > 1 or exported.compared:
        _print_candidates(exported)
    _print_samples(findings)
    if not findings.passed:
        print_note("the gate did not pass; --allow-drift exported it anyway", "warning", error=True)
        print_findings(findings)


def _print_samples(findings: Findings) -> None:
    """Print which samples were not compared, and whether there were too few to judge."""
    if findings.own_refused:
        of = findings.own_refused + findings.own_answers
        print_note(
            f"{findings.own_refused:,} of your {of:,} samples were not compared: {findings.own_refusal}",
            "warning",
            error=True,
        )
    if findings.limit.changed and not findings.own_decide:
        enough = "334 or more tokens to write" if findings.along is not None else "334 or more of your own"
        if findings.own_answers:
            compared = f"{findings.own_answers:,} of your own"
            print_line(f"judged on built-in texts and {compared}; {enough} are judged alone, more strictly")
        else:
            print_line(f"judged on built-in texts; --samples FILE with {enough} judges on these, more strictly")


def _padding(manifest: Manifest) -> List[Tuple[str, str]]:
    """Return where a CPU computes padding in a single pass, or why there is none."""
    if not manifest.shapes.padded:
        from traceserve.building.attempt import PADDING_CHANGES

        by = manifest.receipt.get(PADDING_CHANGES)
        changes = f" (padding changes outputs by {by:.1e})" if by is not None else ""
        return [("padding", f"none: only rows of one length run together{changes}")]
    from traceserve_runtime.runtimes.torchscript.reader import UNPADDED

    if UNPADDED not in manifest.runtime or manifest.step_inputs:
        return []
    if manifest.runtime[UNPADDED]:
        return [("padding", "computed in attention alone")]
    from traceserve.building.attempt import REFUSED

    refused = [
        f"{recorded(row['largest_difference'])} in {row['variant']}" for row in manifest.receipt.get(REFUSED, ())
    ]
    why = f": the rewritten graph was refused (largest difference {'; '.join(refused)})" if refused else ""
    return [("padding", "computed as tokens are" + why)]


def _save_mode(exported: Exported) -> List[Tuple[str, str]]:
    """Return the save mode that `auto` took, and why."""
    because = exported.save_mode_because
    return [("save mode", f"{exported.manifest.save_mode} ({because})")] if because else []


def _dtype(manifest: Manifest) -> str:
    kept = len(manifest.receipt["in_float32"])
    return f"{manifest.dtype}, {kept} layers in float32" if kept else manifest.dtype


def _compiled(exported: Exported) -> List[Tuple[str, str]]:
    """Return the compiled share of a chip's graphs, and what the comparison above was made with."""
    shares = exported.manifest.runtime.get("compiler", {}).get("shares")
    if not shares:
        return []
    from traceserve.building.attempt import COMPILED

    compared = f"the {exported.findings.compared['compared']}"
    if exported.findings.compared["compared"] != COMPILED:
        compared += ": no chip is at hand here, so these were never run"
    return [("compiled", f"{min(shares.values()):.1%} of each graph or more"), ("compared", compared)]


def _judged(findings: Findings) -> List[Tuple[str, str]]:
    """Return what changed: answers; or tokens along the original's texts, with the texts that changed therefore."""
    counts = findings.judged
    if counts is None:
        return [("answers changed", _changed(findings))]
    from traceserve.building.gate.findings import MOST_DRIFT

    drift = f"{counts.mean_drift:+.4f} (limit {MOST_DRIFT:.2f})"
    return [
        ("tokens changed", f"{_changed(findings)}, and {counts.near_ties} near ties"),
        ("log-probability lost", f"{drift} per token"),
        ("texts changed", f"{len(findings.changed)} of {findings.answers}"),
    ]


def _changed(findings: Findings) -> str:
    """Return how many answers, or tokens of texts, changed, out of how many: the user's own if these decide."""
    limit = findings.limit
    if findings.judged is not None:
        whose = " of your samples" if findings.own_decide else ""
        most = limit.changed if findings.own_decide else limit.changed_elsewhere
        return f"{_tokens(findings.judged)}{whose} (limit {most:.1%})"
    if findings.own_decide:
        return f"{findings.own_changed} of {findings.own_answers} of your samples (limit {limit.changed:.1%})"
    allowed = f" (limit {limit.changed_elsewhere:.1%})" if limit.changed_elsewhere else ""
    return f"{len(findings.changed)} of {findings.answers}{allowed}"


def _print_variants(findings: Findings) -> None:
    """Print all comparisons with the original: each file and each way in which a worker may run it."""
    from rich.table import Table

    table = Table("compared", "device", "cells", "largest difference", "answers changed")
    for found in findings.every:
        row = found.row
        changed = f"{row['answers_changed']} of {row['answers']}" if found.along is None else _tokens(found.along)
        table.add_row(row["variant"], row["device"], str(row["cells"]), recorded(row["largest_difference"]), changed)
    console().print(table, highlight=False)


def _tokens(counts: TokenCounts) -> str:
    return f"{counts.changed} of {counts.tokens} tokens"


def _print_candidates(exported: Exported) -> None:
    """Print the candidates that were tried, and the speed of the one that was taken beside another save mode's."""
    from rich.table import Table

    compared = exported.compared
    speeds = ["requests/s here", "ratio"] if compared else []
    table = Table("dtype", "answers changed", "largest difference", *speeds, "size", "")
    for candidate in exported.candidates:
        found, speed = candidate.findings, exported.speed_of(candidate)
        taken = candidate.dtype == exported.manifest.dtype
        table.add_row(
            candidate.dtype,
            _changed(found) if found else "",
            f"{found.largest_difference:.1e}" if found else "",
            *([figure(speed), f"{speed / compared.speed:.2f}"] if compared and speed else [""] * len(speeds)),
            megabytes(candidate.size) if candidate.size else "",
            "taken" if taken else "refused",
        )
    if compared:
        table.add_row("float32", "", "", figure(compared.speed), "1.00", megabytes(compared.size), compared.save_mode)
    console().print(table, highlight=False)


COMMANDS = (
    Command(
        "export",
        "Download, export and compare a model.\n\nWrites artifacts/NAME/: tokenizer.json, traceserve.json, and the model as "
        "its save mode stores it (torchscript:\ntraced_model.pt). It is compared with the original on real sentences; if it "
        "does not answer as the original does, nothing\nis written and the exit code is 1.",
        _add_export,
        _export,
    ),
    Command(
        "archive",
        "Pack an artifact with torch-model-archiver.\n\nWrites model_store/NAME.mar; the same "
        "artifact always gives the same bytes.",
        _add_archive,
        _archive,
    ),
    Command(
        "build",
        "Export and archive.\n\nThe archive is named after the artifact's folder, and answers at /predictions/NAME.",
        _add_build,
        _build,
    ),
)
