"""Output of the commands: the progress bar, figures, errors."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any, Iterator, Optional, Sequence, TextIO, Tuple, cast

from traceserve_runtime.errors import TraceserveError

from traceserve.errors import UnwritableOutput, shortened

if TYPE_CHECKING:
    from rich.console import Console

    from traceserve.building.gate.findings import Findings

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # not tabs and line ends
_ESCAPED = "traceserve.escaped"  # how Python calls `_escaped`
_WIDE = 100_000  # characters, of what is no terminal
_COLOURS = {  # of words that begin a line
    "note": "cyan",
    "warning": "yellow",
    "left out": "yellow",
    "error": "red",
    "different": "red",
    "equal": "green",
    "verified": "green",
    "updated": "green",
}


def print_in_any_encoding() -> None:
    """Let the output hold characters that its encoding lacks, as escapes that JSON has too: no answer is lost for a label."""
    codecs.register_error(_ESCAPED, _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPED)


def is_terminal(stream: Optional[TextIO]) -> bool:
    """Return whether somebody sits before this standard stream; None, a closed one, is no terminal."""
    return stream is not None and stream.isatty()


def _escaped(error: UnicodeError) -> Tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)), error.end


@contextlib.contextmanager
def standard_output() -> Iterator[None]:
    """Within it, and at its end, standard output that cannot be written raises UnwritableOutput, or BrokenPipeError where nobody
    reads it any more."""
    stream = sys.stdout
    if stream is None:  # closed by who started the command, and so not wanted
        yield
        return
    sys.stdout = cast(TextIO, _StandardOutput(stream))
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        finally:
            sys.stdout = stream


class _StandardOutput:
    """A stream whose errors say that it is standard output: a full disk's names no file."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._errors_told():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._errors_told():
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What the stream still holds goes nowhere, or Python would fail with it once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            reason = error.strerror or error
            raise UnwritableOutput(f"standard output could not be written: {reason}; send it elsewhere") from error


def console(error: bool = False) -> Console:
    """Return the terminal; a pipe or a file is wide enough for whole lines, so that tables break no name and no path.

    What is printed stays as it is: read as markup or as names of emoji, paths and messages would change.
    """
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            """Leave it to `cli.main` that nobody reads any more: rich 13.9 and newer exit with 1."""
            raise BrokenPipeError

    screen = Screen(stderr=error, markup=False, emoji=False)
    if not screen.is_terminal:
        screen.width = _WIDE
    return screen


def print_line(text: str, style: str = "", error: bool = False) -> None:
    """Print one or more lines that are not broken at the terminal's width, so that paths and commands can be copied."""
    _print_whole(((printable(text), style),), error)


def print_note(text: str, word: str = "note", error: bool = False, more: str = "") -> None:
    """Print such a line after a word of `_COLOURS` and a colon; `more` ends it, dimmed."""
    _print_whole(((f"{word}:", _COLOURS[word]), (f" {printable(text)}", ""), (more, "dim")), error)


def _print_whole(parts: Sequence[Tuple[str, str]], error: bool) -> None:
    """Print parts of a line, each with its style."""
    from rich.text import Text

    console(error).print(Text.assemble(*parts), highlight=False, soft_wrap=True)


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

            name = TextColumn("{task.description}", markup=False)
            columns = (SpinnerColumn(), name, BarColumn(), TimeElapsedColumn())
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


def recorded(value: Optional[float], form: str = ".1e") -> str:
    """Format a number of the receipt, which has null for NaN and infinities."""
    return "not a finite number" if value is None else format(value, form)


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

    from traceserve.building.gate.findings import LIMITS, most_unexplained

    where = f" ({findings.variant}, on {findings.device})" if findings.variant else ""
    if findings.failure:
        print_line(f"the exported model failed{where}: {findings.failure}", error=True)
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
        console(error=True).print(table)
        if len(findings.failed) > 20:
            print_line(f"and {len(findings.failed) - 20} more of {len(findings.cells)} cells", error=True)
    if findings.changed_by_padding:
        most = max(cell.difference for cell in findings.changed_by_padding)
        print_line(
            f"padding changes the original's own outputs by {most:.2e}, limit {LIMITS['float32'].difference}",
            error=True,
        )
    for output, share in findings.indistinct.items():
        print_line(
            f"{output} does not tell texts apart as the original does{where}: {share:.0%} of its variance over them, or of one "
            f"column's, is lost, limit {most_unexplained(output):.0%}",
            error=True,
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
            print_line(f"{len(samples)} of {findings.answers} samples are {what}{where}: {shown}", error=True)


def _print_tokens(findings: Findings, where: str) -> None:
    """Print what is over the limits for texts in a lower precision."""
    from traceserve.building.gate.findings import MOST_DRIFT

    counts, limit = findings.judged, findings.limit
    assert counts is not None
    allowed = limit.changed if findings.own_decide else limit.changed_elsewhere
    if findings.too_many_changed:
        print_line(
            f"{counts.changed} of {counts.tokens} tokens of the original's texts would be others, near ties not counted"
            f"{where}: {counts.share_changed:.2%}, limit {allowed:.1%}",
            error=True,
        )
    if findings.drifts:
        print_line(
            f"the logarithms of their probabilities fall by {counts.mean_drift:+.4f} on average{where}, limit "
            f"{MOST_DRIFT:.2f}",
            error=True,
        )


def print_error(error: TraceserveError) -> None:
    findings = getattr(error, "findings", None)
    if findings is not None:
        print_findings(findings)
    print_note(error.message, "error", error=True, more=f" (docs/{error.page})" if error.page else "")
