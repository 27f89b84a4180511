"""How the command looks: the progress bar and the tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence

from traceserve_runtime.errors import TraceserveError

if TYPE_CHECKING:
    from rich.console import Console

    from traceserve.catalog import Entry
    from traceserve.export import Exported
    from traceserve.server import Instance
    from traceserve.verification import Findings


def console(error: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=error)


class Bar:
    """A progress bar on standard error: called with what is done, and how many steps of how many (0: unknown)."""

    def __init__(self) -> None:
        self._progress: Any = None  # made at the first call: importing rich takes a tenth of a second
        self._task: Any = None
        self._what = ""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: Any) -> None:
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


def print_exported(exported: Exported, path: Path, seconds: float) -> None:
    from rich.table import Table

    from traceserve.export import describe

    manifest, findings = exported.manifest, exported.findings
    size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    for label, value in (
        ("file", str(path)),
        ("size", megabytes(size)),
        ("task", manifest.task),
        ("parameters", f"{exported.parameters:,}"),
        ("shapes", describe(manifest.shapes, manifest.max_length)),
        (
            "largest difference",
            f"{findings.largest_difference:.1e} (limit {findings.limit.difference:.0e}), in {len(findings.cells)} cells",
        ),
        ("answers changed", f"{len(findings.changed)} of {findings.answers}"),
        ("seconds", f"{seconds:.1f}"),
    ):
        table.add_row(label, value)
    console().print(table, highlight=False)
    if not findings.passed:
        console(error=True).print("[yellow]warning:[/] the gate did not pass; --allow-drift exported it all the same")
        print_findings(findings)


def print_findings(findings: Findings) -> None:
    """The failing cells, and the samples whose answers changed."""
    from rich.table import Table

    screen = console(error=True)
    if findings.failure:
        screen.print(f"the exported model failed: {findings.failure}", highlight=False)
    if findings.failed:
        table = Table("batch", "length", "padded", "output", "difference", "limit", title="outputs that differ")
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
    for what, samples in (
        ("answered otherwise", findings.changed),
        ("tokenized otherwise", findings.tokenized_otherwise),
    ):
        if samples:
            shown = ", ".join(f"#{number + 1}" for number in samples[:10])
            screen.print(f"{len(samples)} of {findings.answers} samples are {what}: {shown}", highlight=False)


def print_instance(instance: Instance, seconds: float) -> None:
    from traceserve_runtime.tasks import TASKS

    from traceserve import catalog

    screen = console()
    screen.print(f"answering after {seconds:.1f} s at {instance.url}", highlight=False)
    for name in instance.names:
        manifest = instance.manifest(name)
        key = ("-H", f"Authorization: Bearer {instance.key}") if instance.key else ()
        body = TASKS[manifest.task].sample_body(manifest.facts)
        command = catalog.curl(f"{instance.url}/predictions/{name}", body, *key)
        screen.print(f"\n  {command}", highlight=False, markup=False, soft_wrap=True)
    if instance.key:
        screen.print(
            f"\nkeys, valid as long as this server runs:\n  inference   {instance.key}\n  management  {instance.management_key}",
            highlight=False,
        )
    port = "" if instance.port == 8080 else f" --port {instance.port}"
    screen.print(
        f"\nmetrics: http://127.0.0.1:{instance.metrics_port}/metrics    log: {instance.log}",
        highlight=False,
        soft_wrap=True,
    )
    screen.print(f"stop it: traceserve stop{port}", highlight=False)


def print_tasks(entries: Sequence[Entry]) -> None:
    """Each task with its fields and parameters, and a command to copy."""
    from rich.markup import escape
    from rich.table import Table

    screen = console()
    for entry in entries:
        screen.print(f"[bold]{entry.name}[/]  [dim]{entry.model}[/]", highlight=False)
        screen.print(f"  {entry.answer}", highlight=False, markup=False)
        table = Table(box=None, pad_edge=False, padding=(0, 1))
        table.add_column(no_wrap=True)
        for header in ("", "default", ""):
            table.add_column(header)
        for name, what, text in entry.fields:
            table.add_row(f"  [cyan]{name}[/]", what, "", text)
        for name, legal, default, text in entry.parameters:
            table.add_row(f"  [green]{name}[/]", escape(legal), escape(default), escape(text))
        screen.print(table, highlight=False)
        screen.print(f"\n  {entry.example}\n", highlight=False, markup=False, soft_wrap=True)


def print_error(error: TraceserveError) -> None:
    from rich.markup import escape

    findings = getattr(error, "findings", None)
    if findings is not None:
        print_findings(findings)
    console(error=True).print(f"[red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
