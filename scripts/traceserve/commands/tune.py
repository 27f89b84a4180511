"""tune: find the best serving configuration of an archive."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from traceserve.commands.arguments import add_samples, positive, require_writable
from traceserve.commands.contract import Command
from traceserve.commands.printing import ProgressBar, console, figure, print_line, print_note
from traceserve.serving import engines

if TYPE_CHECKING:
    from rich.table import Table

    from traceserve.archives.model_config import Serving
    from traceserve.measuring.tune import Tuned


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="the archive to configure")
    add_samples(parser, "realistic texts:", "; the best configuration depends on their lengths", required=True)
    parser.add_argument(
        "--target",
        type=_p99,
        metavar="T",
        help="throughput: the most requests per second with all connections; or p99=MS: the most of which 99 %% are "
        "answered within MS milliseconds, with as many connections as that allows [throughput]",
    )
    parser.add_argument(
        "--connections",
        type=positive,
        default=64,
        metavar="N",
        help="number of concurrent requests: as many as at your busiest times; with p99=MS at most [%(default)s]",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        default=300,
        metavar="S",
        help="time limit in seconds; then the best so far is taken [%(default)s]",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots; it works offline")
    parser.add_argument(
        "--engine",
        default=engines.TORCHSERVE,
        choices=engines.NAMES,
        help="the server that the archive is tuned for; workers are replicas on ray [%(default)s]",
    )
    parser.add_argument("--dry-run", action="store_true", help="measure and report, but leave the archive unchanged")


def _p99(text: str) -> Optional[float]:
    """Return a target's p99 in seconds; None for throughput."""
    if text == "throughput":
        return None
    name, _, number = text.partition("=")
    try:
        milliseconds = float(number)
    except ValueError:
        milliseconds = 0.0
    if name != "p99" or not 0 < milliseconds < float("inf"):
        raise argparse.ArgumentTypeError("should be throughput, or p99=MS with the milliseconds, such as p99=50")
    return milliseconds / 1000


def _tune(options: argparse.Namespace) -> int:
    from traceserve.archives import contents, staging
    from traceserve.errors import ServerError
    from traceserve.measuring import page, tune
    from traceserve.measuring.search import Goal

    if options.html:
        page.require_plotly()
    contents.read_manifest(options.archive)  # whether it is an archive at all
    require_writable(options.html, None if options.dry_run else options.archive)
    goal = Goal(options.connections, options.target)
    with ProgressBar() as bar:
        tuned = tune.tune(options.archive, options.samples, goal, options.budget, bar, options.engine)
    said = ""
    try:  # the files first: whoever reads what is printed may stop reading; and the archive before the page, which may fail
        if tuned.chosen is not None:
            said = _configured(options, tuned.chosen, tuned.own)
        if options.html:
            from traceserve.measuring.tuning_page import tuning_page

            staging.write_whole(options.html, tuning_page(tuned, options.archive.name))
    finally:
        _print_tuned(tuned)
        if said:
            _print_next_step(options, said)
    if tuned.chosen is None:
        raise ServerError(tune.missed(tuned.best, goal, options.archive))
    return 0


def _configured(options: argparse.Namespace, chosen: Serving, own: Serving) -> str:
    """Write the chosen configuration into the archive, unless it has it or the run is dry; returns what was done."""
    from traceserve.archives import contents
    from traceserve.measuring.tune import describe_serving

    place = shlex.quote(str(options.archive))
    if chosen == own:
        return f"nothing better was found; {place} stays as it is: {describe_serving(chosen)}"
    if options.dry_run:
        return f"not written into {place}, as --dry-run says: {describe_serving(chosen)}"
    contents.configure_archive(options.archive, chosen)
    return f"written into {place}: {describe_serving(chosen)}"


def _print_next_step(options: argparse.Namespace, said: str) -> None:
    print_line(f"\n{said}")
    engine = "" if options.engine == engines.TORCHSERVE else f" --engine {options.engine}"
    print_line(f"serve it:  traceserve serve {shlex.quote(str(options.archive))}{engine}")


def _print_tuned(tuned: Tuned) -> None:
    """Print the measurements, the chosen row marked, and the waste by padding."""
    from rich.table import Table

    from traceserve.measuring.tune import describe_serving

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for header in ("workers", "threads", "batch", "delay", "step", "conn", "req/s", "p50", "p99", "rate"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("")
    failed = [trial for trial in tuned.trials if trial.failure]
    for trial in tuned.trials:
        serving, chosen = trial.serving, trial.serving == tuned.chosen
        words = (["chosen"] if chosen else []) + (["as it was"] if serving == tuned.own else [])
        settings = (
            serving.workers or 1,
            serving.threads,
            serving.batch_size,
            serving.max_batch_delay,
            serving.length_step,
        )
        row = ["-" if setting is None else str(setting) for setting in (*settings, trial.connections)]
        if trial.failure:
            row += ["", "", "", "", f"failed ({failed.index(trial) + 1})"]
        else:
            row += [figure(trial.throughput), *(figure(1000 * trial.percentile(p)) for p in (50, 99))]
            row += ["" if trial.relative is None else f"{trial.relative:.2f}", ", ".join(words) or trial.remark]
        table.add_row(*row, style="bold" if chosen else None)
    screen = console()
    screen.print(table, highlight=False)
    for number, trial in enumerate(failed, 1):
        print_line(f"({number}) {describe_serving(trial.serving)}: {trial.failure}")
    ended = "until nothing helped any more" if tuned.in_time else "until the time was up"
    print_line(
        f"\nmeasured for {tuned.seconds:.0f} s, {ended}. delay, p50, p99: in ms; rate: requests/s compared with "
        "the archive as it was, measured in turn"
    )
    refused = tuned.texts.refused
    if refused:
        example = f"number {refused[0][0]} for example: {refused[0][1]}"
        print_note(f"{len(refused)} samples that the archive refuses, {example}", "left out")
    print_line("")
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


COMMANDS = (
    Command(
        "tune",
        "Find an archive's best serving configuration on this machine.\n\nMeasures workers, threads, batch size, batch "
        "delay and length step with real servers, and writes the best into the archive:\n\n"
        "  traceserve tune model_store/NAME.mar --samples texts.txt\n"
        "  traceserve tune model_store/NAME.mar --samples texts.txt --target p99=50\n\nA candidate and the best so far "
        "run in parallel and are measured alternately; differences within the noise are ignored.\nOther running "
        "servers are not touched, but share the processor: stop them for better figures.",
        _add_tune,
        _tune,
        finds_servers=True,
    ),
)
