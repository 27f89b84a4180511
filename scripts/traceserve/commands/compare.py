"""build --compare: every save mode and dtype of one checkpoint, in one table."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Dict, List

from traceserve.commands.printing import ProgressBar, console, figure, megabytes

if TYPE_CHECKING:
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
        console().print(f"{processor.name()}, {processor.cores()} threads, each in a process of its own", style="dim")
    return 0 if any(row.figures for row in rows) else 1


def _as_json(row: ComparedFormat) -> Dict[str, object]:
    return {**row._asdict(), "figures": row.figures._asdict() if row.figures else None}


def _print_rows(rows: List[ComparedFormat]) -> None:
    """Print a row for each, with the best of each column marked; refused ones with the reason."""
    from rich.table import Table

    table = Table("save mode", "dtype", "size", "load, s", "memory", "p50 of one, ms", "requests/s", "answers changed")
    measured = [(row, row.figures) for row in rows if row.figures]
    if measured:
        best = (
            min(row.bytes for row, _ in measured),
            min(found.load_seconds for _, found in measured),
            min(found.memory for _, found in measured),
            min(found.p50_ms for _, found in measured),
            max(found.per_second for _, found in measured),
        )
    for row, found in measured:
        values = (row.bytes, found.load_seconds, found.memory, found.p50_ms, found.per_second)
        shown = (megabytes(row.bytes), figure(values[1]), megabytes(found.memory), *map(figure, values[3:]))
        marked = [f"[bold green]{text} *[/]" if value == top else text for text, value, top in zip(shown, values, best)]
        table.add_row(row.save_mode, row.dtype, *marked, f"{row.changed} of {row.answers:,}")
    console().print(table, highlight=False)
    for row in rows:
        if row.refused:
            console().print(
                f"{row.save_mode} in {row.dtype}: {row.refused}", highlight=False, markup=False, soft_wrap=True
            )
