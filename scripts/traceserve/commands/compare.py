"""build --compare: every save mode and dtype of one checkpoint, in one table."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple

from traceserve.commands.printing import ProgressBar, console, figure, megabytes, print_line, print_note

if TYPE_CHECKING:
    from traceserve.measuring.engine_figures import EngineFigures, WritingFigures
    from traceserve.measuring.formats_compared import ComparedFormat


def compare_formats(options: argparse.Namespace) -> int:
    """Build and measure all, print them, and keep nothing; returns 1 if all were refused."""
    from traceserve_runtime import processor

    from traceserve.building.config import parsing
    from traceserve.measuring.formats_compared import compared_formats

    loaded = parsing.load_config(options.config)
    with ProgressBar() as bar:
        rows = list(compared_formats(loaded, bar, options.samples))
    if options.json:
        document = {"processor": processor.name(), "threads": processor.cores(), "formats": list(map(_as_json, rows))}
        print(json.dumps(document, indent=2))
    else:
        _print_rows(rows)
        print_line(f"{processor.name()}, {processor.cores()} threads, each in a process of its own", style="dim")
    return 0 if any(row.figures for row in rows) else 1


def _as_json(row: ComparedFormat) -> Dict[str, object]:
    return {**row._asdict(), "figures": row.figures.document() if row.figures else None}


class _Column(NamedTuple):
    """A column of figures: how to read one, how to show it, and which is best."""

    title: str
    value: Callable[[ComparedFormat, EngineFigures], float]
    show: Callable[[Any], str]
    best: Callable[..., float]


_FIRST = (
    _Column("size", lambda row, found: row.bytes, megabytes, min),
    _Column("load, s", lambda row, found: found.load_seconds, figure, min),
    _Column("memory", lambda row, found: found.memory, megabytes, min),
)
_RUN_ONCE = (
    _Column("p50 of one, ms", lambda row, found: found.p50_ms, figure, min),
    _Column("requests/s", lambda row, found: found.per_second, figure, max),
)
_WRITTEN = (
    _Column("first token, ms", lambda row, found: _writing(found).first_token_ms, figure, min),
    _Column("p50 of a text, ms", lambda row, found: found.p50_ms, figure, min),
    _Column("tokens/s, 1", lambda row, found: _writing(found).tokens_per_second, figure, max),
    _Column("16 clients", lambda row, found: _writing(found).tokens_per_second_together, figure, max),
)


def _writing(found: EngineFigures) -> WritingFigures:
    assert found.writing is not None
    return found.writing


def _print_rows(rows: List[ComparedFormat]) -> None:
    """Print a row for each, with the best of each column marked; refused ones with the reason."""
    from rich.table import Table
    from rich.text import Text

    measured = [(row, row.figures) for row in rows if row.figures]
    writes = any(found.writing for _, found in measured)
    columns = (*_FIRST, *(_WRITTEN if writes else _RUN_ONCE))
    table = Table(
        "save mode", "dtype", *(column.title for column in columns), "changed" if writes else "answers changed"
    )
    values = [[column.value(row, found) for column in columns] for row, found in measured]
    best = [column.best(each) for column, each in zip(columns, zip(*values))]
    for (row, _), own in zip(measured, values):
        shown = [column.show(value) for column, value in zip(columns, own)]
        marked = [
            Text(f"{text} *", "bold green") if value == top else text for text, value, top in zip(shown, own, best)
        ]
        counted = f" {row.counted}" if writes else ""
        table.add_row(row.save_mode, row.dtype, *marked, f"{row.changed} of {row.answers:,}{counted}")
    console().print(table, highlight=False)
    refused = max((found.refused for _, found in measured), default=0)
    if refused:
        print_note(f"{refused:,} requests that the archives refuse were left out of the figures", "warning")
    for row in rows:
        if row.refused:
            print_line(f"{row.save_mode} in {row.dtype}: {row.refused}")
