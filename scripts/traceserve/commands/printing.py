"""Output of the commands: the progress bar, figures, errors."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Optional

from traceserve_runtime.errors import TraceserveError

from traceserve.errors import shortened

if TYPE_CHECKING:
    from rich.console import Console

    from traceserve.building.gate.findings import Findings

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # not tabs and line ends


def console(error: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=error)


class ProgressBar:
    """A progress bar on standard error: called with a step's name, number and total (0: unknown)."""

    def __init__(self) -> None:
        self._progress: Any = None  # made on the first call: importing rich takes a tenth of a second
        self._task: object = None
        self._what = ""

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._progress is None:
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            screen = console(error=True)
            self._progress = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
            self._progress.start()
        if what != self._what:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task, self._what = self._progress.add_task(what, total=None), what
        self._progress.update(self._task, completed=done, total=total or None)


def figure(value: float) -> str:
    """Format with three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def printable(text: str) -> str:
    """Replace characters by which a stranger's text could control the terminal, or show in another order."""
    return _CONTROLS.sub("?", text)


def printable_json(document: object, indent: Optional[int] = None) -> str:
    """Return JSON in which the same characters are escaped."""
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def answer_in_brief(answer: object, longest: int) -> str:
    """Return an answer, or the first of several, in at most so many characters that are safe to print."""
    first = answer[0] if isinstance(answer, list) and answer else answer
    return shortened(printable(first) if isinstance(first, str) else printable_json(first), longest)


def print_findings(findings: Findings) -> None:
    """Print each failed variant's failing cells, and the samples whose answers changed."""
    for found in findings.every:
        if not found.alike:
            _print_variant(found)


def _print_variant(findings: Findings) -> None:
    from rich.table import Table

    from traceserve.building.gate.findings import MOST_UNEXPLAINED

    screen = console(error=True)
    where = f" ({findings.variant}, on {findings.device})" if findings.variant else ""
    if findings.failure:
        screen.print(f"the exported model failed{where}: {findings.failure}", highlight=False)
    if findings.failed:
        table = Table("batch", "length", "padded", "output", "difference", "limit", title=f"outputs that differ{where}")
        for cell in findings.failed[:20]:
            row = (
                cell.batch,
                cell.length,
                "yes" if cell.padded else "no",
                cell.output,
                f"{cell.difference:.2e}",
                findings.limit.difference,
            )
            table.add_row(*map(str, row))
        screen.print(table)
        if len(findings.failed) > 20:
            screen.print(f"and {len(findings.failed) - 20} more of {len(findings.cells)} cells")
    for output, share in findings.indistinct.items():
        screen.print(
            f"{output} hardly tells texts apart{where}: of its variance over them {share:.0%} is not the original's, limit "
            f"{MOST_UNEXPLAINED:.0%}",
            highlight=False,
        )
    if findings.judged is not None:
        _print_tokens(findings, where)
    for what, samples in (
        ("answered otherwise", findings.changed if findings.judged is None else ()),
        ("not what the choices along them give", findings.astray),
        ("tokenized otherwise", findings.tokenized_otherwise),
    ):
        if samples:
            shown = ", ".join(f"#{number + 1}" for number in samples[:10])
            screen.print(f"{len(samples)} of {findings.answers} samples are {what}{where}: {shown}", highlight=False)


def _print_tokens(findings: Findings, where: str) -> None:
    """Print what is over the limits for texts in a lower precision."""
    from traceserve.building.gate.findings import MOST_DRIFT

    counts, limit = findings.judged, findings.limit
    assert counts is not None
    allowed = limit.changed if findings.own_decide else limit.changed_elsewhere
    if findings.too_many_changed:
        console(error=True).print(
            f"{counts.changed} of {counts.tokens} tokens of the original's texts would be others, near ties not counted"
            f"{where}: {counts.share_changed:.2%}, limit {allowed:.1%}",
            highlight=False,
        )
    if findings.drifts:
        console(error=True).print(
            f"the logarithms of their probabilities fall by {counts.mean_drift:+.4f} on average{where}, limit "
            f"{MOST_DRIFT:.2f}",
            highlight=False,
        )


def print_error(error: TraceserveError) -> None:
    from rich.markup import escape

    findings = getattr(error, "findings", None)
    if findings is not None:
        print_findings(findings)
    more = f" [dim](docs/{error.page})[/]" if error.page else ""
    console(error=True).print(
        f"[red]error:[/] {escape(printable(error.message))}{more}", highlight=False, soft_wrap=True
    )
