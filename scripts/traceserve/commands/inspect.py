"""inspect: what an archive says of itself, and what is wrong with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Sequence, Tuple

from traceserve.commands.arguments import add_signature
from traceserve.commands.contract import Command
from traceserve.commands.printing import console, megabytes, print_line, print_note, printable, printable_json, recorded
from traceserve.errors import some

if TYPE_CHECKING:
    from rich.table import Table

    from traceserve.checking.inspection import Inspection

_LABELS, _FILES = 8, 12  # shown; --json has all


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="a .mar file, or an artifact's folder")
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 if there is an error or a warning; notes alone do not count"
    )
    add_signature(parser)
    parser.add_argument("--json", action="store_true", help="print all of it as JSON, with every file's SHA-256")


def _inspect(options: argparse.Namespace) -> int:
    from traceserve.checking.inspection import inspect_archive

    found = inspect_archive(options.archive, options.require_signature)
    if options.json:
        print(printable_json(found.document(), indent=2))
    else:
        _print_inspection(found)
    return int(options.strict and not found.passed)


def _print_inspection(found: Inspection) -> None:
    from rich.text import Text

    screen = console()
    table = _grid()
    for label, value in _facts(found):
        table.add_row(label, Text(printable(value)))
    screen.print(table, highlight=False)
    screen.print(_package_table(found), highlight=False)
    screen.print(_file_table(found), highlight=False)
    for finding in found.findings:
        print_note(finding.message, finding.severity)
    if not found.findings:
        print_line("nothing is wrong with it", style="green")


def _grid() -> Table:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _facts(found: Inspection) -> Iterator[Tuple[str, str]]:
    """Yield the lines of the page's head."""
    from traceserve.archives.shapes_in_words import describe_shapes

    manifest, receipt = found.manifest, found.manifest.receipt
    yield "archive", f"{found.listing.path} ({megabytes(found.listing.size)})"
    yield "name, version", f"{manifest.name}, {manifest.version}"
    yield "task", manifest.task
    if manifest.labels:
        yield f"{len(manifest.labels)} labels", some(manifest.labels, _LABELS)
    yield "shapes", describe_shapes(manifest.shapes, manifest.max_length)
    kept: Sequence[str] = receipt.get("in_float32", ())
    yield "save mode, dtype", f"{manifest.save_mode} for {manifest.hardware}, {manifest.dtype}"
    if kept:
        yield "left in float32", f"{len(kept)} layers: {some(kept, _LABELS)}"
    yield from _source(found)
    yield "built by", ", ".join(f"{name} {manifest.versions.get(name, '?')}" for name in ("traceserve", "python"))
    yield "receipt", _receipt(receipt)
    yield "signature", _signature(found)
    needed = found.needed
    if needed is not None:
        yield (
            "a worker needs",
            f"about {needed.memory:,} MiB with TorchServe, by a rule of thumb; {needed.cpu - 1} core(s)",
        )
    if found.features:
        which = "all of" if manifest.runtime.get("instructions") else "for speed one of"
        yield "processor", f"{which} {some(found.features, _LABELS)}"


def _source(found: Inspection) -> Iterator[Tuple[str, str]]:
    source, license_ = found.manifest.source, found.manifest.receipt.get("license")
    commit = f" at {source.revision}" if source.revision else ""
    yield "source", f"{source.name} ({source.kind}, {source.library}){commit}"
    if source.base is not None:
        yield (
            "adapter of",
            f"{source.base.name} ({source.base.kind})"
            + (f" at {source.base.revision}" if source.base.revision else ""),
        )
    yield "licence", f"{license_['name']} (by {license_['file']})" if license_ else "not seen by the build"


def _signature(found: Inspection) -> str:
    if found.signature is None:
        return "none beside it"
    checked = (
        f"made with the key of {found.signer}" if found.signer else "not checked: --require-signature PUBLIC_KEY does"
    )
    return f"{found.signature} beside it, {checked}"


def _receipt(receipt: Mapping[str, Any]) -> str:
    if not receipt:
        return "none"
    answers, cells = receipt.get("answers", 0), receipt.get("cells", 0)
    passed = "passed" if receipt.get("passed") else "did not pass"
    what, judged = "answers", ""
    if receipt.get("own_answers"):
        judged = f", {receipt.get('own_answers_changed', 0)} of {receipt['own_answers']} of your own"
    if "along_texts" in receipt:
        what, along = "texts", receipt["along_texts"]
        own = (
            f" ({along['own']['tokens_changed']} of {along['own']['tokens']} along your own)" if "own" in along else ""
        )
        judged += (
            f"; along the original's texts {along['tokens_changed']} of {along['tokens']} tokens{own} and "
            f"{along['near_ties']} near ties, log-probability lost {recorded(along['mean_drift'], '+.4f')} per token"
        )
    limit = receipt.get("limits", {}).get("difference", float("nan"))
    return (
        f"{passed}: {receipt.get('answers_changed', 0)} of {answers} {what} changed{judged}; largest difference "
        f"{recorded(receipt.get('largest_difference'))} of {limit:.0e} in {cells} shapes; "
        f"{len(receipt.get('variants', ()))} way(s) of running it"
    )


def _package_table(found: Inspection) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("package", "built with", "here", "tested", "", box=None, header_style="dim")
    for each in found.packages:
        table.add_row(
            each.name,
            Text(printable(each.built or "-")),
            each.here or "missing",
            each.tested or "any",
            "" if each.worker else "build only",
        )
    return table


def _file_table(found: Inspection) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("inside", "size", box=None, header_style="dim")
    table.columns[1].justify = "right"
    rows: List[Tuple[str, int]] = []
    folders: Dict[str, List[int]] = {}
    for file in found.listing.files:
        if "/" in file.name:
            folders.setdefault(file.name.split("/")[0], []).append(file.size)
        else:
            rows.append((file.name, file.size))
    rows += [(f"{name}/ ({len(sizes)} files)", sum(sizes)) for name, sizes in folders.items()]
    rows.sort(key=lambda row: -row[1])
    for name, size in rows[:_FILES]:
        table.add_row(Text(printable(name)), _size(size))
    if len(rows) > _FILES:
        table.add_row(f"{len(rows) - _FILES} more", _size(sum(size for _, size in rows[_FILES:])))
    return table


def _size(size: int) -> str:
    return megabytes(size) if size >= 1e5 else f"{size / 1e3:.1f} kB"


COMMANDS = (
    Command(
        "inspect",
        "Show what an archive says of itself, and what is wrong with it.\n\nOne page: task, labels, shapes, dtype, source with "
        "commit and licence, the receipt, the packages with the versions of\nthe build, those here and the tested ranges, "
        "the files, what a worker needs. Nothing in the archive is run or unpickled,\nso one from strangers can be looked at: "
        "a file that leads out of its folder, or would grow without end, is refused by name.\n\nFindings are errors (it would "
        "not run here, or is not what the gate compared), warnings (drift that was allowed, code of the\ncheckpoint's own, "
        "versions outside the tested range, a processor on which it is slow) and notes.\n\n"
        "  traceserve inspect model_store/NAME.mar\n  traceserve inspect model_store/NAME.mar --strict   # for CI\n"
        "  traceserve inspect model_store/NAME.mar --json | jq .source\n\n"
        "exit code: 0; with --strict 1 if there is an error or a warning; 2 if it cannot be read",
        _add_inspect,
        _inspect,
        trouble=2,
    ),
)
