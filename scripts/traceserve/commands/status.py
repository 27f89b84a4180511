"""status: the running servers, and their activity."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from traceserve.commands.arguments import number_in
from traceserve.commands.contract import Command
from traceserve.commands.printing import console, figure, print_line, printable

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

    from traceserve.measuring.activity import Activity, Sample
    from traceserve.serving.instances import Instance

_FIGURES = {  # the header in a table, and the name in a line; times are in milliseconds
    "requests": "requests",
    "per s": "requests/s",
    "mean": "mean ms",
    "queue": "queue ms",
    "waiting": "waiting",
    "p50": "batch p50 ms",
    "p99": "batch p99 ms",
    "padding": "padding",
    "errors": "errors",
}


class _Archive(NamedTuple):
    """A served archive and its activity; None: its server has no figures."""

    name: str
    port: int
    activity: Optional[Activity]


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--watch",
        nargs="?",
        type=_interval,
        const=1.0,
        metavar="SECONDS",
        help="show each archive's activity in the last seconds [1], until Ctrl-C; one line per archive and interval "
        "if the output is not a terminal",
    )


def _interval(text: str) -> float:
    """Parse seconds, at least a tenth."""
    seconds = number_in(text)
    if not 0.1 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError("should be 0.1 or more")
    return seconds


def _status(options: argparse.Namespace) -> int:
    from traceserve.serving import instances

    if options.watch is not None:
        return _watch(options.watch)
    running = instances.running()
    for instance in instances.tidy_dead():
        _print_dead(instance)
        instances.mark_seen(instance)
    if not running:
        print_line("no server is running")
        return 0
    screen = console()
    by_status = {instance.port: _by_status(instance) for instance in running}
    screen.print(_servers(running, [port for port, words in by_status.items() if words is None]))
    screen.print(_report([*_since_start(running)], "since the start"))
    for instance in running:
        words = by_status[instance.port]
        places = f"{instance.url}/predictions/, metrics {instance.metrics_url}, log {instance.log}"
        print_line(f"{instance.port}: {'does not answer; ' if words is None else words}{places}")
    return 0


def _servers(running: Sequence[Instance], silent: Sequence[int]) -> Table:
    """Return a table of the servers; `silent`: the ports of those that do not answer, whose processes say nothing."""
    from rich.table import Table

    from traceserve.serving import instances

    table = Table("archive", "version", "port", "workers", "up", "pid")
    for instance in running:
        alive = instances.workers_alive(instance)
        up = _duration_since(instance.started)
        for name in instance.names:
            workers = "no answer" if instance.port in silent else f"{alive[name]} of {instance.workers[name]}"
            table.add_row(name, _version(instance, name), str(instance.port), workers, up, str(instance.pid))
    return table


def _duration_since(started: float) -> str:
    """Return the time since a Unix time, as 3:04:05 or "2 days, 3:04:05"."""
    return str(datetime.timedelta(seconds=int(time.time() - started)))


def _version(instance: Instance, name: str) -> str:
    """Return the version that answers those who name none; empty if several share them, as on Ray."""
    from traceserve_runtime.errors import TraceserveError

    with contextlib.suppress(TraceserveError, OSError):
        return instance.manifest(name).version
    return ""


def _by_status(instance: Instance) -> Optional[str]:
    """Return the number of answers by status, including the frontend's own refusals; None where it does not answer."""
    from traceserve.measuring import activity
    from traceserve.serving import engines

    if instance.engine != engines.TORCHSERVE:
        return ""
    try:
        counts = activity.answers_by_status(instance)
    except OSError:
        return None
    return ", ".join(f"{count:,} answers {status}" for status, count in counts.items()) + "; "


# --- what archives do -------------------------------------------------------------------------------------------------


def _samples(running: Sequence[Instance]) -> Iterator[Tuple[Instance, str, Optional[Sample]]]:
    from traceserve.measuring import activity

    for instance in running:
        for name in instance.names:
            found = None
            with contextlib.suppress(OSError, ValueError):  # as while it starts or stops
                found = activity.sample(instance, name)
            yield instance, name, found


def _since_start(running: Sequence[Instance]) -> Iterator[_Archive]:
    from traceserve.measuring import activity

    for instance, name, found in _samples(running):
        start = activity.Sample(instance.started)
        yield _Archive(name, instance.port, None if found is None else activity.between(start, found))


def _report(archives: Sequence[_Archive], title: str) -> Group:
    """Return a table of figures that fits 80 columns, and the reasons of errors below."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    legend = "ms: mean and queue of a request, p50 and p99 of a batch in the handler"
    table = Table(
        title=title, caption=legend, caption_justify="left", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("archive", overflow="fold")
    for header in _FIGURES:
        table.add_column(header, justify="right", no_wrap=True)
    for archive in archives:
        table.add_row(f"{archive.name}:{archive.port}", *_cells(archive.activity))
    reasons = [
        Text(printable(f"{archive.name}:{archive.port} failed: {_reasons(archive.activity)}"))
        for archive in archives
        if archive.activity is not None and archive.activity.errors
    ]
    return Group(table, *reasons)


def _cells(activity: Optional[Activity]) -> List[str]:
    """Return an archive's figures, in the order of `_FIGURES`."""
    if activity is None:
        return ["none", *[""] * (len(_FIGURES) - 1)]
    return [
        f"{activity.requests:,}",
        figure(activity.rate),
        *map(_milliseconds, (activity.latency, activity.queue)),
        "-" if activity.waiting is None else f"{activity.waiting:,}",
        *map(_milliseconds, (activity.batch_p50, activity.batch_p99)),
        "-" if activity.padding_share is None else f"{100 * activity.padding_share:.0f} %",
        f"{sum(activity.errors.values()):,}",
    ]


def _reasons(activity: Activity) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(activity.errors.items()))


def _milliseconds(seconds: Optional[float]) -> str:
    if seconds is None:
        return "-"
    return "> 10,000" if seconds == float("inf") else figure(1000 * seconds)


# --- watching ---------------------------------------------------------------------------------------------------------


def _watch(seconds: float) -> int:
    """Show each interval's activity until interrupted."""
    screen = console()
    with _until_interrupted() as interrupted:
        if not screen.is_terminal:
            for archives in _intervals(seconds, interrupted):
                for archive in archives:
                    print(_line(archive), flush=True)
                if not archives:
                    print(f"{time.strftime('%H:%M:%S')} no server is running", flush=True)
            return 0
        from rich.live import Live

        with Live("one moment", console=screen, auto_refresh=False) as live:
            for archives in _intervals(seconds, interrupted):
                live.update(_shown(archives, seconds), refresh=True)
    return 0


@contextlib.contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """Return an event that Ctrl-C sets: ending here is not a failure."""
    interrupted = threading.Event()

    def stop(number: int, frame: object) -> None:
        interrupted.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _intervals(seconds: float, interrupted: threading.Event) -> Iterator[List[_Archive]]:
    """Yield each archive's activity in each interval."""
    from traceserve.measuring import activity
    from traceserve.serving import instances

    before: Dict[Tuple[float, int, str], Sample] = {}
    while True:
        archives, now = [], {}
        for instance, name, found in _samples(instances.running()):
            key = (instance.started, instance.port, name)
            if found is not None:
                now[key] = found
            if found is None or key in before:
                last = None if found is None else activity.between(before[key], found)
                archives.append(_Archive(name, instance.port, last))
        if before or not now:
            yield archives
        before = now
        if interrupted.wait(seconds):
            return


def _shown(archives: Sequence[_Archive], seconds: float) -> RenderableType:
    if not archives:
        return "no server is running"
    return _report(archives, f"{time.strftime('%H:%M:%S')}, the last {seconds:g} s; Ctrl-C ends")


def _line(archive: _Archive) -> str:
    """Return one line for a log or another program."""
    figures = ", ".join(
        f"{header} {value}" for header, value in zip(_FIGURES.values(), _cells(archive.activity)) if value
    )
    reasons = f" ({_reasons(archive.activity)})" if archive.activity and archive.activity.errors else ""
    return f"{time.strftime('%H:%M:%S')} {archive.name}:{archive.port} {figures}{reasons}"


def _print_dead(instance: Instance) -> None:
    from traceserve.serving.log import last_words

    print_line(
        f"{', '.join(instance.names)} on port {instance.port} died{last_words(Path(instance.folder))}\n  its log, kept until "
        f"the next `traceserve serve` or `traceserve stop --port {instance.port}`: {instance.log}"
    )


COMMANDS = (
    Command(
        "status",
        "Show the running servers, and their activity.\n\nFor each archive: requests, the mean latency in the server and its "
        "part in the queue, how many\nrequests wait now, the quantiles of a batch's time in the handler (read from a "
        "histogram), the\nshare of padding in the model's computation, and failed requests by reason.",
        _add_status,
        _status,
        finds_servers=True,
    ),
)
