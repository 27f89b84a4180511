"""The benchmarks' reports: a table for the terminal or for docs/, and a JSON file with every measurement."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from traceserve_runtime import processor

Row = Mapping[str, str]


def parser(description: Optional[str], rounds: int) -> argparse.ArgumentParser:
    """Return a parser with every benchmark's options."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the started servers too
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        help="number of alternating rounds; medians are reported [%(default)s]",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write every measurement and its environment")
    made.add_argument("--markdown", action="store_true", help="print the tables in docs/measurements.md's format")
    return made


def show(rows: Sequence[Row], markdown: bool, caption: str = "") -> None:
    """Print rows of the same columns."""
    columns = list(rows[0])
    if markdown:
        lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
        print(f"\n{caption}\n" if caption else "")
        print("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
        return
    table = Table(title=caption or None, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    # As wide as needed if the output is a file.
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def show_medians(found: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Print the medians of each way's rounds, and their ratios to the first way's, in docs/measurements.md's format."""
    medians = {way: {key: median(one[key] for one in own) for key in own[0]} for way, own in found.items()}
    first, *_ = medians.values()
    show(
        [
            {"measured": key} | {way: f"{own[key]:.4g} ({own[key] / first[key]:.2f})" for way, own in medians.items()}
            for key in first
        ],
        True,
    )


def save(path: Optional[Path], measurements: Any) -> None:
    """Write the measurements, the command and the machine to a JSON file, if requested."""
    if path is None:
        return
    content = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "processor": processor.name(),
        "cores": processor.cores(),
        "load_average": os.getloadavg(),
        "environment": {key: value for key, value in os.environ.items() if key.startswith(("OMP_", "MKL_", "KMP_"))},
        "packages": packages(Path(sys.executable)),
        "measurements": measurements,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def packages(python: Path) -> Dict[str, str]:
    """Return the relevant versions in an interpreter's environment."""
    found = subprocess.run([str(python), "-c", _PACKAGES], stdout=subprocess.PIPE, check=True).stdout
    versions: Dict[str, str] = json.loads(found)
    return versions


_PACKAGES = """
import json, platform
from importlib import metadata
versions = {"python": platform.python_version()}
for name in ("torch", "transformers", "tokenizers", "torchserve", "litserve", "infinity_emb", "sentence-transformers", "optimum"):
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(versions))
"""


def progress() -> Progress:
    """Show a bar on standard error with the current measurement."""
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
    )


def median(values: Iterable[float]) -> float:
    """Return the median; NaN for nothing."""
    found = list(values)
    return statistics.median(found) if found else float("nan")


def numbers(text: str) -> List[int]:
    """Parse an option's whole numbers, separated by commas."""
    return [int(each) for each in text.split(",")]


def figure(value: float, unit: str = "") -> str:
    """Format with three significant digits, or more before the point."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}{unit and ' ' + unit}"


def milliseconds(seconds: float) -> str:
    """Format a time in ms."""
    return figure(seconds * 1000)
