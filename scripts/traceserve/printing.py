"""How the command looks: the progress bar and the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Sequence, Tuple

from traceserve_runtime.errors import TraceserveError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from traceserve.catalog import Entry
    from traceserve.export import Exported
    from traceserve.formats import Format
    from traceserve.server import Instance
    from traceserve.tune import Tuned
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
        ("dtype", manifest.dtype),
        ("shapes", describe(manifest.shapes, manifest.max_length)),
        (
            "largest difference",
            f"{findings.largest_difference:.1e} (limit {findings.limit.difference:.0e}), in {len(findings.cells)} cells",
        ),
        ("answers changed", _changed(findings)),
        *_compiled(exported),
        ("seconds", f"{seconds:.1f}"),
    ):
        table.add_row(label, value)
    console().print(table, highlight=False)
    if len(exported.candidates) > 1 or exported.compared:
        _print_candidates(exported)
    if not findings.passed:
        console(error=True).print("[yellow]warning:[/] the gate did not pass; --allow-drift exported it all the same")
        print_findings(findings)


def _compiled(exported: Exported) -> List[Tuple[str, str]]:
    """Of what was compiled for a chip: how much of it, and what the figures above are of."""
    shares = exported.manifest.runtime.get("compiler", {}).get("shares")
    if not shares:
        return []
    from traceserve.export import COMPILED

    compared = f"the {exported.findings.compared['compared']}"
    if exported.findings.compared["compared"] != COMPILED:
        compared += ": no chip is at hand here, so these were never run"
    return [("compiled", f"{min(shares.values()):.1%} of each graph or more"), ("compared", compared)]


def _changed(findings: Findings) -> str:
    """How many answers changed, and of how many may: the user's own, where these decide."""
    limit = findings.limit
    if findings.own_decide:
        return f"{findings.own_changed} of {findings.own_answers} of your samples (limit {limit.changed:.1%})"
    allowed = f" (limit {limit.changed_elsewhere:.1%})" if limit.changed_elsewhere else ""
    return f"{len(findings.changed)} of {findings.answers}{allowed}"


def _print_candidates(exported: Exported) -> None:
    """What was tried, and why one was taken."""
    from rich.table import Table

    compared = exported.compared
    times = ["ratio"] if compared else []  # of the speeds
    table = Table("dtype", "answers changed", "largest difference", "requests/s here", *times, "size", "")
    for candidate in exported.candidates:
        found, speed = candidate.findings, candidate.speed
        taken = candidate.dtype == exported.manifest.dtype
        table.add_row(
            candidate.dtype,
            _changed(found) if found else "",
            f"{found.largest_difference:.1e}" if found else "",
            f"{speed:,.0f}" if speed else "",
            *([f"{speed / compared.speed:.2f}" if speed else ""] if compared else []),
            megabytes(candidate.size) if candidate.size else "",
            "taken" if taken else "refused" if candidate.refused else "passed",
        )
    if compared:
        table.add_row("float32", "", "", f"{compared.speed:,.0f}", "1.00", megabytes(compared.size), compared.save_mode)
    console().print(table, highlight=False)
    chosen = next(item for item in exported.candidates if item.dtype == exported.manifest.dtype)
    if chosen.findings and chosen.findings.limit.changed and not chosen.findings.own_decide:
        console().print(
            "judged on built-in texts; --samples FILE with 334 or more of your own judges on these, more strictly",
            highlight=False,
        )


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


def print_formats(formats: Sequence[Format]) -> None:
    from rich.table import Table

    from traceserve.formats import options

    table = Table("save mode", "hardware")
    for name in ("tasks", "dtype", "why not others"):
        table.add_column(name, overflow="fold")  # a narrow terminal breaks long names, and loses none
    every = {task for item in formats for task in item.tasks}
    for item in formats:
        tasks = "all" if set(item.tasks) == every else ", ".join(item.tasks)
        reasons = [f"{dtype}: {reason}" if dtype else reason for dtype, reason in item.refused.items()]
        table.add_row(item.save_mode, item.hardware, tasks, ", ".join(item.dtypes) or "-", "\n".join(reasons))
    own = Table("save mode", "hardware", "option", "", "default", "", title="options", title_justify="left")
    for save_mode, hardware in dict.fromkeys((item.save_mode, item.hardware) for item in formats if item.dtypes):
        for option in options(save_mode, hardware).values():
            default = "-" if option.default is None else json.dumps(option.default)
            own.add_row(save_mode, hardware, option.name, option.legal, default, option.description)
    console().print(table, *([own] if own.row_count else []), highlight=False)


def print_bench(document: Dict[str, Any]) -> None:
    """What was measured: for each server the medians and where the time goes, and the ratios of two."""
    from rich.markup import escape
    from rich.table import Table

    from traceserve.report import load_name

    screen = console()
    load = "connections" if document["plan"]["rate"] is None else "sent a second"
    for subject in document["subjects"]:
        own = [summary for summary in document["summary"] if summary["subject"] == subject]
        screen.print(f"\n[bold]{escape(subject)}[/]", highlight=False)
        screen.print(_latency_table(own, load, document["plan"]["rounds"] > 1), highlight=False)
        for summary in own:
            for note in _bench_notes(summary, document["plan"]["seconds"]):
                screen.print(f"[yellow]note:[/] {load_name(summary)}: {escape(note)}", highlight=False)
        if all(summary["server"] for summary in own):
            screen.print(_time_table(own, load), highlight=False)
    if document["ratios"]:
        screen.print("\n[bold]{} / {}[/]".format(*map(escape, document["subjects"])), highlight=False)
        table = Table(load, "requests/s", *document["ratios"][0]["latency"], box=None, header_style="dim")
        for ratio in document["ratios"]:
            table.add_row(
                _load(ratio), *(f"{value:.2f}" for value in (ratio["throughput"], *ratio["latency"].values()))
            )
        screen.print(_figures_right(table), highlight=False)


def _load(figures: Dict[str, Any]) -> str:
    """The number of a measurement's load."""
    return str(figures["connections"]) if figures["rate"] is None else f"{figures['rate']:g}"


def _figures_right(table: Table) -> Table:
    table.columns[0].min_width = len(str(table.columns[0].header))
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    return table


def _latency_table(own: Sequence[Dict[str, Any]], load: str, several_rounds: bool) -> Table:
    from rich.table import Table

    names = [name for name in own[0]["latency_ms"] if name != "mean"]
    span = ["±"] if several_rounds else []  # half of what lies between the slowest and the fastest round
    table = Table(load, "requests/s", *span, f"{names[0]} ms", *names[1:], "errors", box=None, header_style="dim")
    for summary in own:
        latencies = (_figure(summary["latency_ms"][name]) for name in names)
        low, high = summary["throughput_range"]
        spans = [f"{50 * (high - low) / summary['throughput']:.0f} %"] if several_rounds else []
        errors = f"{sum(summary['errors'].values()):,}"
        table.add_row(_load(summary), _figure(summary["throughput"]), *spans, *latencies, errors)
    return _figures_right(table)


def _figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bench_notes(summary: Dict[str, Any], seconds: float) -> Iterator[str]:
    """What makes a measurement less than it seems."""
    for reason, count in summary["errors"].items():
        yield f"{count:,} times {reason}"
    over = summary["seconds"] - seconds
    if summary["rate"] and over > 0.1 * seconds and 1000 * over > 3 * summary["curve_ms"][0][1]:
        yield (
            f"the last request was answered {over:.1f} s after the end: the server cannot answer {summary['rate']:g} a second, "
            "more wait the longer this goes on, and the latencies say how long it went on"
        )
    if summary["generator_cpu"] > 0.8:
        yield (
            f"sending took {100 * summary['generator_cpu']:.0f} % of a core: the server may be faster than measured here; "
            "measure it from another machine"
        )


def _time_table(own: Sequence[Dict[str, Any]], load: str) -> Table:
    """Where the mean time of a request goes, in a server of traceserve."""
    from rich.table import Table

    table = Table(f"mean time, at {load}:", *map(_load, own), box=None, header_style="dim")
    for part in own[0]["server"]["time_ms"]:
        times = [(s["server"]["time_ms"][part], sum(s["server"]["time_ms"].values())) for s in own]
        table.add_row(part, *(f"{_figure(time)} ms {100 * time / whole:3.0f} %" for time, whole in times))
    servers = [summary["server"] for summary in own]
    table.add_row("tokens of a request", *(_figure(server["tokens"]) for server in servers))
    table.add_row("padding of a batch", *(f"{100 * server['padding_share']:.0f} %" for server in servers))
    return _figures_right(table)


def print_tuned(tuned: Tuned) -> None:
    """What was measured, the chosen row marked, and what padding wastes."""
    from rich.markup import escape
    from rich.table import Table

    from traceserve.tune import describe

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for header in ("workers", "threads", "batch", "delay", "step", "conn", "req/s", "p50", "p99", "rate"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("")
    failed = [trial for trial in tuned.trials if trial.failure]
    for trial in tuned.trials:
        serving, chosen = trial.serving, trial.serving == tuned.chosen
        words = (["chosen"] if chosen else []) + (["as it was"] if serving == tuned.own else [])
        knobs = (
            serving.workers or 1,
            serving.threads,
            serving.batch_size,
            serving.max_batch_delay,
            serving.length_step,
        )
        row = ["-" if knob is None else str(knob) for knob in (*knobs, trial.connections)]
        if trial.failure:
            row += ["", "", "", "", f"failed ({failed.index(trial) + 1})"]
        else:
            row += [_figure(trial.throughput), *(_figure(1000 * trial.percentile(p)) for p in (50, 99))]
            row += ["" if trial.relative is None else f"{trial.relative:.2f}", ", ".join(words) or trial.remark]
        table.add_row(*row, style="bold" if chosen else None)
    screen = console()
    screen.print(table, highlight=False)
    for number, trial in enumerate(failed, 1):
        screen.print(f"({number}) {describe(trial.serving)}: {escape(str(trial.failure))}", highlight=False)
    ended = "until nothing helped any more" if tuned.in_time else "until the time was up"
    screen.print(
        f"\nmeasured for {tuned.seconds:.0f} s, {ended}. delay, p50, p99: in ms; rate: requests/s compared with "
        "the archive as it was, measured in turn",
        highlight=False,
    )
    refused = tuned.texts.refused
    if refused:
        screen.print(
            f"[yellow]left out:[/] {len(refused)} samples that the archive refuses, number {refused[0][0]} for example: "
            f"{escape(refused[0][1])}",
            highlight=False,
        )
    screen.print()
    screen.print(_waste_table(tuned), highlight=False)


def _waste_table(tuned: Tuned) -> Table:
    from rich.table import Table

    rows = sum(map(len, tuned.texts.lengths))
    tokens = sum(map(sum, tuned.texts.lengths))
    title = f"what padding wastes on these texts ({rows:,} rows, {tokens / rows:.1f} tokens in the mean)"
    table = Table(box=None, pad_edge=False, header_style="dim", title=title, title_justify="left")
    for header in ("lengths", "of the tokens", "of their cost", "cost in all"):
        table.add_column(header, justify="left" if header == "lengths" else "right")
    least = tuned.wastes[-1].total
    for waste in tuned.wastes:
        table.add_row(waste.name, f"{waste.tokens:.1%}", f"{waste.cost:.1%}", f"{waste.total / least:.2f}")
    return table


def print_error(error: TraceserveError) -> None:
    from rich.markup import escape

    findings = getattr(error, "findings", None)
    if findings is not None:
        print_findings(findings)
    console(error=True).print(f"[red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
