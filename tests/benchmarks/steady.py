"""Checks whether a fresh server's first requests, and those beside another busy process, are as fast as they should be.

    python tests/benchmarks/steady.py --model FOLDER --texts FILE.csv [--part first|engine|bursts|busy ...]

first: a hundred texts of many lengths in random order, one after another, sent to a fresh server, and again later.
engine: the same texts to a fresh engine in process, as in a worker: without the rest of a fresh server.
bursts: 1 to 32 concurrent requests to a fresh server, and again later; the time until a whole burst is answered.
busy: a load with and without a process beside it that uses one core, alternating. On N cores a fair scheduler leaves
N - 1 cores' worth of N, so the remaining throughput should be at least (N - 1) / N.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

import building
import fresh
import numpy as np
import servers
import tables
import texts

PERCENTILES = {"median": 50, "p95": 95, "max": 100}
BURSTS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    options = parse()
    sentences = texts.read(options.texts)
    ways = {"first": first, "bursts": bursts, "busy": busy}
    measured: Dict[str, List[Any]] = {part: [] for part in options.part}
    with tempfile.TemporaryDirectory(prefix="steady-") as name, tables.progress() as bar:
        archive = building.archive_of(options, Path(name))
        folder = building.unpacked(archive, Path(name, "unpacked"))
        task = bar.add_task("", total=options.rounds * len(measured))
        for _ in range(options.rounds):
            for part, found in measured.items():
                bar.update(task, description=part)
                if part == "engine":
                    found.append(fresh.run(engine, folder, sentences, random.Random(0), options))
                else:
                    with servers.ours(archive, options.workers) as server:
                        found.append(ways[part](server, sentences, random.Random(0), options))
                bar.advance(task)
            tables.save(options.json, measured)
    captions = {
        "first": f"A fresh server, and later: {options.requests} requests, one after another",
        "engine": f"A fresh engine in process, and later: {options.requests} texts, one after another",
        "bursts": f"A fresh server, and later: bursts of {BURSTS}",
    }
    for part, caption in captions.items():
        if part in measured:
            tables.show(compared(measured[part]), options.markdown, caption)
    if "busy" in measured:
        cores = os.cpu_count() or 1
        caption = f"Beside a process that takes one of {cores} cores; a fair share of the throughput is {(cores - 1) / cores:.0%}"
        tables.show(beside(measured["busy"]), options.markdown, caption)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__, rounds=5)
    parser.add_argument("--texts", type=Path, required=True, metavar="CSV", help="sentences in a column `text`")
    building.add_archive_options(parser, 128)
    parts = ["first", "engine", "bursts", "busy"]
    parser.add_argument("--part", nargs="+", choices=parts, default=parts, help="[all]")
    parser.add_argument("--workers", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--requests", type=int, default=100, help="first requests of a server [%(default)s]")
    parser.add_argument("--longest", type=int, default=90, metavar="WORDS", help="of first requests [%(default)s]")
    parser.add_argument(
        "--connections", nargs="+", type=int, default=[1, 4, 16, 64], help="beside a busy loop %(default)s"
    )
    parser.add_argument("--seconds", type=float, default=8, help="of each load [%(default)s]")
    parser.add_argument("--warm-up", type=float, default=2, help="seconds of load before it [%(default)s]")
    return parser.parse_args()


def first(
    server: servers.Server, sentences: Sequence[str], random_state: random.Random, options: argparse.Namespace
) -> Dict[str, List[float]]:
    """Return each request's seconds, at first and later."""
    wanted = of_many_lengths(sentences, random_state, options)
    with connection(server) as link:
        found = {"first": [ask(link, server, text) for text in wanted]}
        server.run(sentences, 8, options.seconds, 0)
        found["later"] = [ask(link, server, text) for text in wanted]
    return found


def of_many_lengths(sentences: Sequence[str], random_state: random.Random, options: argparse.Namespace) -> List[str]:
    """Return a text per request, of 1 to `longest` words."""
    return [
        texts.joined(sentences, random_state.randint(1, options.longest), random_state) for _ in range(options.requests)
    ]


def engine(
    folder: Path, sentences: Sequence[str], random_state: random.Random, options: argparse.Namespace
) -> Dict[str, List[float]]:
    """Return each text's seconds, at first and later."""
    from traceserve_runtime.engine import Engine
    from traceserve_runtime.tasks.contract import Request

    own = Engine.load(folder)
    own.make_ready()
    wanted = of_many_lengths(sentences, random_state, options)

    def answered(asked: Sequence[str]) -> float:
        started = time.perf_counter()
        own.answer([Request({"text": text}, {"long_inputs": "truncate"}) for text in asked])
        return time.perf_counter() - started

    found = {"first": [answered([text]) for text in wanted]}
    ended = time.perf_counter() + options.seconds
    while time.perf_counter() < ended:
        answered(random_state.sample(sentences, 8))
        own.idle()
    found["later"] = [answered([text]) for text in wanted]
    return found


def bursts(
    server: servers.Server, sentences: Sequence[str], random_state: random.Random, options: argparse.Namespace
) -> Dict[str, List[float]]:
    """Return each burst's seconds, at first and later."""
    sizes = list(BURSTS) * max(1, options.requests // sum(BURSTS) * 2)
    random_state.shuffle(sizes)
    wanted = [
        [texts.joined(sentences, random_state.randint(1, options.longest), random_state) for _ in range(size)]
        for size in sizes
    ]
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(connection(server)) for _ in range(max(BURSTS))]
        pool = stack.enter_context(ThreadPoolExecutor(max(BURSTS)))

        def burst(group: Sequence[str]) -> float:
            started = time.perf_counter()
            list(pool.map(lambda pair: ask(pair[0], server, pair[1]), zip(links, group)))
            return time.perf_counter() - started

        found = {"first": [burst(group) for group in wanted]}
        server.run(sentences, 8, options.seconds, 0)
        found["later"] = [burst(group) for group in wanted]
    return found


def busy(
    server: servers.Server, sentences: Sequence[str], random_state: random.Random, options: argparse.Namespace
) -> Dict[str, Dict[str, List[float]]]:
    """Return throughput, p50 and p99 by connections, without and with a busy loop."""
    found: Dict[str, Dict[str, List[float]]] = {}
    for connections in options.connections:
        found[str(connections)] = {}
        for way in ("alone", "beside"):
            with busy_loop() if way == "beside" else contextlib.nullcontext():
                result = server.run(sentences, connections, options.seconds, options.warm_up)
            found[str(connections)][way] = [result.throughput, result.percentile(50), result.percentile(99)]
    return found


@contextlib.contextmanager
def busy_loop() -> Iterator[None]:
    """Run a process that uses a whole core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def connection(server: servers.Server) -> Iterator[http.client.HTTPConnection]:
    """Open a persistent connection."""
    link = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=60)
    link.connect()
    try:
        yield link
    finally:
        link.close()


def ask(link: http.client.HTTPConnection, server: servers.Server, text: str) -> float:
    """Return one request's seconds."""
    started = time.perf_counter()
    link.request(
        "POST", urllib.parse.urlsplit(server.url).path, server.body(text), {"Content-Type": server.content_type}
    )
    answer = link.getresponse()
    content = answer.read()
    seconds = time.perf_counter() - started
    if answer.status != 200:
        raise RuntimeError(f"HTTP {answer.status}: {content.decode(errors='replace')}")
    return seconds


def compared(rounds: List[Dict[str, List[float]]]) -> List[tables.Row]:
    """Return percentiles at first and later, and the ratio of their medians over the rounds."""
    found: List[tables.Row] = []
    for name, percentile in PERCENTILES.items():
        both = {
            when: tables.median(float(np.percentile(each[when], percentile)) for each in rounds)
            for when in ("first", "later")
        }
        found.append(
            {
                "": name,
                "first, ms": tables.milliseconds(both["first"]),
                "later, ms": tables.milliseconds(both["later"]),
                "ratio": tables.figure(both["first"] / both["later"]),
            }
        )
    ratios = [tables.median(one) for one in zip(*(np.divide(each["first"], each["later"]) for each in rounds))]
    worst = max(ratios)
    name = f"the worst, number {ratios.index(worst) + 1}, to itself later"
    return [*found, {"": name, "first, ms": "", "later, ms": "", "ratio": tables.figure(worst)}]


def beside(rounds: List[Dict[str, Dict[str, List[float]]]]) -> List[tables.Row]:
    """Return medians over the rounds."""
    found: List[tables.Row] = []
    for connections in rounds[0]:
        for i, name in enumerate(("requests/s", "p50 in ms", "p99 in ms")):
            scale = 1000 if i else 1
            alone, with_it = (
                tables.median(each[connections][way][i] for each in rounds) * scale for way in ("alone", "beside")
            )
            found.append(
                {
                    "": f"{name}, {connections} connections",
                    "alone": tables.figure(alone),
                    "beside it": tables.figure(with_it),
                    "ratio": tables.figure(with_it / alone),
                }
            )
    return found


if __name__ == "__main__":
    main()
