"""bench: measure a running server."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Optional, Sequence, Tuple

from traceserve_runtime.errors import TraceserveError

from traceserve.commands.arguments import (
    add_port,
    add_samples,
    duration,
    positive,
    quantity,
    require_writable,
    zero_or_more,
)
from traceserve.commands.contract import Command
from traceserve.commands.printing import ProgressBar, console, figure, print_line, print_note

if TYPE_CHECKING:
    from rich.table import Table

    from traceserve.measuring.documents import BenchDocument, Load, Peak, Summary

_NO_BREAKDOWN = "no breakdown of a request's time: with continuous_batching TorchServe counts its times once per round"
_BODIES_FOR_NAMES = "for a name, put request bodies into a .jsonl, and give it as --samples"
_HEADERS_FOR_NAMES = "the key of a named server is known, and sent; give the server's URL to send other headers"
_SPANS = 10  # of one request's time, that a closed loop should last


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="NAME|URL", help="a served archive, or any HTTP endpoint")
    add_samples(
        parser,
        "requests to send, shuffled and repeated: texts,",
        "; use realistic texts, since the speed depends on their lengths",
        required=True,
    )
    parser.add_argument(
        "--connections",
        type=_numbers,
        metavar="N[,N...]",
        help="closed loop: each of N connections sends its next request once the last is answered; several values are measured "
        "one after the other [16]",
    )
    parser.add_argument(
        "--rate",
        type=quantity,
        metavar="R",
        help="open loop: R requests per second at random times, regardless of earlier answers, as from many users; "
        "a latency counts from when its request was due, and up to 512 connections are opened as needed",
    )
    parser.add_argument(
        "--seconds", type=quantity, default=10.0, metavar="S", help="time per measurement [%(default)g s]"
    )
    parser.add_argument(
        "--warm-up", type=duration, default=2.0, metavar="S", help="the same load first, not counted [%(default)g s]"
    )
    parser.add_argument("--compare", metavar="OTHER", help="another NAME or URL, measured alternately, with the ratio")
    parser.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        help="number of rounds; medians are reported [3 with --compare, else 1]",
    )
    parser.add_argument(
        "--body",
        metavar="TEMPLATE",
        help='for URLs: the JSON around each text, such as \'{"input": ["{text}"]}\' [the text alone, as text/plain]',
    )
    parser.add_argument("--compare-body", metavar="TEMPLATE", help="the same for OTHER [as --body]")
    parser.add_argument(
        "--header",
        action="append",
        type=_header,
        default=[],
        metavar="'K: V'",
        help="for URLs: a header; repeatable",
    )
    parser.add_argument(
        "--retries",
        type=zero_or_more,
        default=0,
        metavar="N",
        help="send a request that got no answer, or 429, 502, 503 or 504, again up to N times, each after a second, as "
        "clients do; those that succeed then are reported, and not counted as errors [%(default)s]",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="count an answer as an error that differs from the first one to the same request, numbers by more than "
        "rounding; not for tasks that draw at random",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="for the order and the open loop's times [%(default)s]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with curves; it works offline")
    add_port(parser)


def _bench(options: argparse.Namespace) -> int:
    from traceserve.archives import staging
    from traceserve.building.samples import OwnSamples
    from traceserve.measuring import bench, load_generator, page, targets, transfers

    transfers.require_libcurl()
    if options.html:
        page.require_plotly()
    require_writable(options.json, options.html)
    most = load_generator.MOST_CONNECTIONS
    if options.rate and options.connections and (len(options.connections) > 1 or options.connections[0] <= most):
        raise TraceserveError(
            f"bench: at a --rate, up to {most} connections are opened as needed; leave --connections out, or give it one larger "
            "number, to open more"
        )
    plan = bench.BenchPlan(
        connections=options.connections or (16,),
        rate=options.rate,
        seconds=options.seconds,
        warm_up=options.warm_up,
        rounds=options.rounds or (3 if options.compare else 1),
        seed=options.seed,
        retries=options.retries,
        check=options.check,
    )
    _check_for_urls(options)
    headers = dict(options.header)
    samples = OwnSamples.read(options.samples)
    measured = [targets.bench_target(options.place, samples, options.port, options.body, headers)]
    if options.compare:
        body = options.body if options.compare_body is None else options.compare_body
        measured.append(targets.bench_target(options.compare, samples, options.port, body, headers))
    with ProgressBar() as bar:
        document = bench.measure(
            measured,
            plan,
            options.samples.name,
            lambda what, share: bar(what, int(1000 * share), 1000),
            _measure_peak if any(asked.arithmetic for asked in measured) else None,
        )
    try:  # the files first: whoever reads what is printed may stop reading
        if options.json:
            staging.write_whole(options.json, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        if options.html:
            staging.write_whole(options.html, page.page(document))
    finally:
        _print_bench(document)
    return 0


def _check_for_urls(options: argparse.Namespace) -> None:
    """Raise TraceserveError for an option that would have no effect, since no URL is asked with it."""
    other = [options.compare] if options.compare else []
    if options.compare_body is not None and not other:
        raise TraceserveError("bench: --compare-body is for the other server; name it with --compare")
    if options.port is not None and all("://" in place for place in (options.place, *other)):
        raise TraceserveError("bench: --port is for names; a URL has its own")
    given = {
        "--body": (options.body, [options.place, *other], _BODIES_FOR_NAMES),
        "--compare-body": (options.compare_body, other, _BODIES_FOR_NAMES),
        "--header": (options.header or None, [options.place, *other], _HEADERS_FOR_NAMES),
    }
    for option, (value, places, instead) in given.items():
        if value is not None and not any("://" in place for place in places):
            raise TraceserveError(f"bench: {option} is for URLs, not for {' and '.join(places)}; {instead}")


def _measure_peak(dtype: str, hardware: str) -> Optional[float]:
    from traceserve.measuring.peak import measure_peak  # imports torch, once nothing is measured any more

    return measure_peak(dtype, hardware)


def _numbers(text: str) -> Tuple[int, ...]:
    """Parse such numbers, separated by commas."""
    try:
        return tuple(positive(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError("should be whole numbers of 1 or more, as 1,16,64") from None


def _header(text: str) -> Tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or any(ord(c) < 32 or ord(c) > 255 for c in text):
        raise argparse.ArgumentTypeError("should look like 'Authorization: Bearer KEY'")
    return name.strip(), value.strip()


def _print_bench(document: BenchDocument) -> None:
    """Print the medians and time breakdown of each server, and the ratios of two."""
    from rich.table import Table

    from traceserve.measuring.page import load_name, time_parts

    screen = console()
    load = "connections" if document["plan"]["rate"] is None else "sent a second"
    for subject in document["subjects"]:
        own = [summary for summary in document["summary"] if summary["subject"] == subject]
        print_line(f"\n{subject}", style="bold")
        screen.print(_latency_table(own, load, document["plan"]["rounds"] > 1), highlight=False)
        for summary in own:
            for note in notes(summary, document["plan"]["seconds"]):
                print_note(f"{load_name(summary)}: {note}")
        if all(summary["server"] for summary in own):
            peak = document["peaks"].get(subject)
            if not all(map(time_parts, own)):
                print_note(_NO_BREAKDOWN)
            screen.print(_time_table(own, load, peak), highlight=False)
            if peak is not None:
                print_line(_peak_note(peak), style="dim")
    if document["ratios"]:
        print_line("\n{} / {}".format(*document["subjects"]), style="bold")
        table = Table(load, "requests/s", *document["ratios"][0]["latency"], box=None, header_style="dim")
        for ratio in document["ratios"]:
            table.add_row(
                _load(ratio), *(f"{value:.2f}" for value in (ratio["throughput"], *ratio["latency"].values()))
            )
        screen.print(_figures_right(table), highlight=False)


def _load(figures: Load) -> str:
    """Return a measurement's load as text."""
    return str(figures["connections"]) if figures["rate"] is None else f"{figures['rate']:g}"


def _figures_right(table: Table) -> Table:
    table.columns[0].min_width = len(str(table.columns[0].header))
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    return table


def _latency_table(own: Sequence[Summary], load: str, several_rounds: bool) -> Table:
    from rich.table import Table

    names = [name for name in own[0]["latency_ms"] if name != "mean"]
    span = ["±"] if several_rounds else []  # half the spread between the slowest and the fastest round
    table = Table(load, "requests/s", *span, f"{names[0]} ms", *names[1:], "errors", box=None, header_style="dim")
    for summary in own:
        latencies = (figure(summary["latency_ms"][name]) for name in names)
        low, high = summary["throughput_range"]
        spans = [f"{50 * (high - low) / summary['throughput']:.0f} %"] if several_rounds else []
        errors = f"{sum(summary['errors'].values()):,}"
        table.add_row(_load(summary), figure(summary["throughput"]), *spans, *latencies, errors)
    return _figures_right(table)


def notes(summary: Summary, seconds: float) -> Iterator[str]:
    """Yield the caveats of a measurement."""
    for reason, count in summary["errors"].items():
        yield f"{count:,} times {reason}"
    if summary["retried"]:
        yield f"{summary['retried']:,} requests were answered only when they were sent again"
    longest, p50 = summary["seconds"] / _SPANS, summary["latency_ms"]["p50"] / 1000
    if summary["rate"] is None and p50 > longest:
        yield (
            f"a request takes {p50:.3g} s, and the {summary['seconds']:g} s hold few of them, so the requests/s are rough; "
            f"--seconds {math.ceil(_SPANS * p50)} or more measures them"
        )
    over = summary["seconds"] - seconds
    if summary["rate"] and over > 0.1 * seconds and 1000 * over > 3 * summary["curve_ms"][0][1]:
        yield (
            f"the last request was answered {over:.1f} s after the end: the server cannot answer {summary['rate']:g} a second, "
            "so its queue keeps growing, and the latencies depend on --seconds"
        )
    if summary["generator_cpu"] > 0.8:
        yield (
            f"sending took {100 * summary['generator_cpu']:.0f} % of a core: the server may be faster than measured here; "
            "measure it from another machine"
        )


def _peak_note(peak: Peak) -> str:
    return (
        f"peak: products of matrices in {peak['dtype']} reach {peak['operations_per_second'] / 1e9:,.0f} GFLOP/s here"
    )


def _time_table(own: Sequence[Summary], load: str, peak: Optional[Peak]) -> Table:
    """Return the breakdown of a request's mean time in a traceserve server, and what its tokens are."""
    from rich.table import Table

    from traceserve.measuring.page import peak_share, time_parts

    parts = time_parts(own[0])
    table = Table(f"{'mean time, ' if parts else ''}at {load}:", *map(_load, own), box=None, header_style="dim")
    servers = [summary["server"] for summary in own if summary["server"]]
    for part in parts:
        times = [(time_ms[part], sum(time_ms.values())) for time_ms in map(time_parts, own)]
        table.add_row(part, *(f"{figure(time)} ms {100 * time / whole:3.0f} %" for time, whole in times))
    table.add_row("tokens of a request", *(figure(server["tokens"]) for server in servers))
    table.add_row("padding of a batch", *(f"{100 * server['padding_share']:.0f} %" for server in servers))
    if peak is not None:
        table.add_row("share of the peak", *(peak_share(summary, peak) for summary in own))
    return _figures_right(table)


COMMANDS = (
    Command(
        "bench",
        "Measure a running server.\n\nThroughput, latencies, errors, and for a traceserve server the breakdown of a "
        "request's time:\n\n  traceserve bench NAME --samples texts.txt --connections 1,16,64 --html bench.html\n"
        "  traceserve bench NAME --samples texts.txt --rate 200\n  traceserve bench NAME --samples texts.txt "
        "--compare http://127.0.0.1:7997/classify \\\n"
        '    --body \'{"model": "some/model", "input": ["{text}"]}\'',
        _add_bench,
        _bench,
        finds_servers=True,
    ),
)
