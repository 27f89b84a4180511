"""diff: two archives, what they say and how they answer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, List, Sequence, Union

from traceserve.commands.arguments import add_samples, positive, require_writable
from traceserve.commands.contract import Command
from traceserve.commands.printing import (
    ProgressBar,
    answer_in_brief,
    console,
    figure,
    megabytes,
    print_note,
    printable,
    printable_json,
)

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from traceserve.checking.comparing import AnswerChange, ArchiveComparison, FieldChange

_SHOWN, _LONGEST = 10, 48


def _add_diff(parser: argparse.ArgumentParser) -> None:
    for name, text in (("one", "A"), ("other", "B")):
        parser.add_argument(name, type=Path, metavar=text, help="a .mar file, or an artifact's folder")
    add_samples(
        parser,
        "ask your own texts instead of built-in ones:",
        "; they stay on this machine, and the page of --html quotes those whose answer changed",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="for each archive [this machine's cores]")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with all of it; it works offline")
    parser.add_argument("--json", action="store_true", help="print JSON, with the requests whose answer changed")


def _diff(options: argparse.Namespace) -> int:
    from traceserve.archives import staging
    from traceserve.building.samples import OwnSamples
    from traceserve.checking.comparing import compare_archives
    from traceserve.checking.comparison_page import comparison_page

    require_writable(options.html)
    samples = OwnSamples.read(options.samples) if options.samples else None
    with ProgressBar() as bar:
        found = compare_archives(options.one, options.other, samples, options.threads, bar)
    try:  # the page first: whoever reads what is printed may stop reading
        if options.html:
            staging.write_whole(options.html, comparison_page(found))
    finally:
        if options.json:
            print(printable_json(found.document(), indent=2))
        else:
            _print_comparison(found)
    return int(not found.equal)


def _print_comparison(found: ArchiveComparison) -> None:
    from rich.table import Table
    from rich.text import Text

    from traceserve.building.speeds import AT_ONCE

    screen = console()
    table = Table("", "A", "B", box=None, header_style="dim")
    for column in table.columns[1:]:
        column.overflow = "fold"
    one, other = found.sides
    for label, values in (
        ("archive", [one.path, other.path]),
        ("size", [megabytes(side.size) for side in found.sides]),
        ("p50 of one request", [f"{figure(side.p50_ms)} ms" for side in found.sides]),
        (f"requests/s, {AT_ONCE} at a time", [figure(side.requests_per_second) for side in found.sides]),
        ("memory", [f"{side.memory_mib:,.0f} MiB" for side in found.sides]),
    ):
        table.add_row(label, *map(Text, values))
    for title, changes in (("labels", found.labels), ("tokenizer", found.tokenizer), ("manifest", found.fields)):
        _add_changes(table, title, changes)
    screen.print(table, highlight=False)
    if found.moves:
        moves = Table("from", "to", "answers", box=None, header_style="dim")
        for before, after, count in found.moves[:_SHOWN]:
            moves.add_row(Text(printable(before)), Text(printable(after)), f"{count:,}")
        screen.print(moves, highlight=False)
    if found.changed:
        examples = Table("#", "A", "B", box=None, header_style="dim")
        for each in found.changed[:_SHOWN]:
            examples.add_row(str(each.number), *_side_by_side(each))
        screen.print(examples, highlight=False)
    refused = f" ({found.refused:,} refused by both)" if found.refused else ""
    print_note(
        f"{len(found.changed):,} of {found.asked:,} answers changed{refused}; {found.drift_in_words}",
        "equal" if found.equal else "different",
    )


def _add_changes(table: Table, title: str, changes: Sequence[FieldChange]) -> None:
    from rich.text import Text

    for each in changes[:_SHOWN]:
        table.add_row(Text(printable(f"{title}: {each.what}")), *_side_by_side(each))
    if len(changes) > _SHOWN:
        table.add_row(f"{title}: {len(changes) - _SHOWN} more", "", "")


def _side_by_side(change: Union[AnswerChange, FieldChange]) -> List[Text]:
    from rich.text import Text

    return [Text(answer_in_brief(each, _LONGEST)) for each in (change.one, change.other)]


COMMANDS = (
    Command(
        "diff",
        "Compare two archives: what they say of themselves, and how they answer.\n\nBoth are asked the same requests, each in a "
        "process of its own with the same threads: answers that changed, what moved\nto what, drift of scores, latency and "
        "memory; and labels, tokenizers (by content) and manifests are compared.\nDifferent are: labels, tokenizers, an "
        "answer, or a score beyond the limit of the gate for the wider dtype of the two.\nOther differences of the manifests are "
        "shown, and do not count.\n\n  traceserve diff model_store/OLD.mar model_store/NEW.mar\n"
        "  traceserve diff OLD.mar NEW.mar --samples texts.txt --html diff.html\n\n"
        "exit code: 0 equal; 1 different; 2 trouble, as of two archives of different tasks",
        _add_diff,
        _diff,
        trouble=2,
    ),
)
