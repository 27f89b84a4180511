"""A worker's behaviour with rude clients: the cost of refusing megabytes, the memory left, and a good client's waiting
time.

    python tests/benchmarks/rude.py [model_store/NAME.mar | artifacts/NAME]

It starts its own server (`traceserve serve`, one worker, only the loopback address), and measures:

1. each rude body, sent one at a time: its size, the status, the median and longest latency of --times tries, and the
   worker's memory before, maximum, and after (RSS; and PSS, which divides shared pages);
2. the longest legal request: the longest prose that the server answers, found by bisection;
3. a good client, who sends one short text after another on one connection: alone, beside --connections that send rude
   bodies, beside one and beside --connections that send the longest legal request.

Rude bodies have a megabyte, except those that pass the limit on characters and are refused for their tokens. A latency
is
the client's: it includes the frontend's copy of a megabyte, the JSON parser and the limits. `--kinds` selects some, as
in

    python tests/benchmarks/rude.py --kinds punctuation "80,000 keys" --times 20

It takes about a minute; after --budget seconds no new measurement begins, and missing ones are a dash.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.parse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import psutil
import servers
import tables
from traceserve.measuring import load_generator

MEGABYTE = 1_000_000
PROSE = "Where is my parcel today? It should have come last week. "
GOOD = servers.text_field("Where is my order?")
JSON = {"Content-Type": "application/json"}
_TIMEOUT = 60.0  # seconds for any answer
_SAMPLE = 0.002  # seconds between samples of the worker's memory


def _text(text: str, escaped: bool = False, **others: Any) -> bytes:
    return _json({"text": text, **others}, escaped)


def _json(value: Any, escaped: bool = False) -> bytes:
    return json.dumps(value, ensure_ascii=escaped, separators=(",", ":")).encode()


RUDE: Dict[str, bytes] = {
    "punctuation": _text(".,!?" * (MEGABYTE // 4)),
    "one word": _text("a" * MEGABYTE),
    "spaces": _text(" " * MEGABYTE),
    "line ends, escaped": _text("\n" * (MEGABYTE // 2)),
    "prose": _text(PROSE * (MEGABYTE // len(PROSE))),
    "ideographs": _text("\u6f22" * (MEGABYTE // 3)),
    "ideographs, escaped": _text("\u6f22" * (MEGABYTE // 6), escaped=True),
    "emoji": _text("\U0001f600" * (MEGABYTE // 4)),
    "emoji, escaped": _text("\U0001f600" * (MEGABYTE // 12), escaped=True),
    "punctuation, to be truncated": _text(".,!?" * (MEGABYTE // 4), parameters={"long_inputs": "truncate"}),
    "250 texts of 4,000 characters": _json(["a b " * 1000] * 250),
    "100,000 tiny texts": _json(["abcdefg"] * 100_000),
    "100,000 tiny instances": _json({"instances": ["abcdefg"] * 100_000}),
    "60,000 tiny objects": _json([{"text": "abcde"}] * 60_000),
    "nested lists": _json([["a"] * 500] * 500),
    "brackets alone": b"[" * MEGABYTE,
    "80,000 keys": _json({f"key{i}": i for i in range(80_000)}),
    "a name of a megabyte": _json({"k" * MEGABYTE: 1}),
    "a parameter of a megabyte": _text("a", parameters={"long_inputs": "x" * MEGABYTE}),
    "broken JSON": _text(PROSE * (MEGABYTE // len(PROSE)))[:-2],
    "60 kB of punctuation": _text(".,!?" * 15_000),
    "60 kB of ideographs": _text("\u6f22" * 20_000),
}


class Refusals(NamedTuple):
    """The answers to one body; memory in MB."""

    status: int
    seconds: List[float]
    before: Dict[str, float]
    most: float  # RSS
    after: Dict[str, float]


class Client:
    """One persistent connection."""

    def __init__(self, url: str) -> None:
        self._parts = urllib.parse.urlsplit(url)
        self._connection = http.client.HTTPConnection(
            str(self._parts.hostname), self._parts.port or 80, timeout=_TIMEOUT
        )

    def ask(self, body: bytes) -> Tuple[int, float]:
        """Return the status for a body, and the seconds."""
        began = time.perf_counter()
        self._connection.request("POST", self._parts.path, body, JSON)
        with self._connection.getresponse() as response:
            response.read()
            return response.status, time.perf_counter() - began


@contextlib.contextmanager
def watching(pid: int) -> Iterator[List[float]]:
    """Record a process's largest RSS in MB as the list's single item."""
    process, over = psutil.Process(pid), threading.Event()
    most = [process.memory_info().rss / 1e6]

    def watch() -> None:
        while not over.wait(_SAMPLE):
            most[0] = max(most[0], process.memory_info().rss / 1e6)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def refuse(client: Client, worker: int, body: bytes, times: int) -> Refusals:
    """Send one body repeatedly."""
    before = servers.memory([worker])
    with watching(worker) as most:
        answers = [client.ask(body) for _ in range(times)]
        time.sleep(0.1)  # a worker releases memory after a moment without requests
    return Refusals(answers[-1][0], [seconds for _, seconds in answers], before, most[0], servers.memory([worker]))


def longest(client: Client, ends: float) -> bytes:
    """Return the longest answered prose, to a hundredth of its words."""
    words = PROSE.split()

    def body(count: int) -> bytes:
        return _text(" ".join(words[i % len(words)] for i in range(count)))

    most = 1
    while time.monotonic() < ends and client.ask(body(2 * most))[0] == 200:
        most *= 2
    low, high = most, 2 * most
    while time.monotonic() < ends and high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if client.ask(body(middle))[0] == 200 else (low, middle)
    return body(low)


def bother(url: str, bodies: Sequence[bytes], connections: int, seconds: float) -> Dict[str, Any]:
    """Send bodies in turn, in a closed loop; how many were answered, and how many of these with which other status than 2xx."""
    sent = load_generator.send_load(
        load_generator.Endpoint(url), bodies, connections=connections, seconds=seconds, warm_up=0.0, timeout=_TIMEOUT
    )
    return {"answered": sent.requests + sent.failed, "statuses": sent.errors}


def beside(
    url: str, bodies: Sequence[bytes], connections: int, seconds: float
) -> Tuple[load_generator.Result, Dict[str, Any]]:
    """Return a good client's latencies beside others, who have their own process, and the others' answers."""

    def good() -> load_generator.Result:
        return load_generator.send_load(
            load_generator.Endpoint(url), [GOOD], connections=1, seconds=seconds, warm_up=0.5, timeout=_TIMEOUT
        )

    if not connections:
        return good(), {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(bother, url, [GOOD], 1, 0.1).result()  # finish its imports before the good client begins
        others = pool.submit(bother, url, bodies, connections, seconds + 1.0)
        return good(), others.result()


def main() -> None:
    options = parse()
    ends = time.monotonic() + options.budget
    bodies = {name: body for name, body in RUDE.items() if not options.kinds or name in options.kinds}
    found: Dict[str, Any] = {}
    with packed(options.archive) as archive, servers.ours(archive, workers=1) as server:
        client, worker = Client(server.url), server.workers[0]
        for _ in range(20):
            client.ask(GOOD)
        refusals = {n: refuse(client, worker, b, options.times) for n, b in bodies.items() if time.monotonic() < ends}
        found["refusals"] = {name: each._asdict() for name, each in refusals.items()}
        tables.show([refusal(name, body, refusals.get(name)) for name, body in bodies.items()], True)
        legal = longest(client, ends)
        alone = refuse(client, worker, legal, options.times)
        found["longest"] = {"bytes": len(legal), "words": len(legal.split()), **alone._asdict()}
        words = f"the longest legal request, {len(legal.split()):,} words"
        tables.show([refusal(words, legal, alone)], True)
        rude, count = list(bodies.values()), options.connections
        others: Dict[str, Tuple[Sequence[bytes], int]] = {
            "alone": ([], 0),
            f"{count} that send rude bodies": (rude, count),
            "1 that sends the longest legal request": ([legal], 1),
            f"{count} that send the longest legal request": ([legal], count),
        }
        rows = []
        for name, (sent, connections) in others.items():
            if time.monotonic() < ends:
                with watching(worker) as most:
                    good, answered = beside(server.url, sent, connections, options.seconds)
                found[name] = {"latencies": good.latencies.tolist(), "errors": good.errors, "others": answered}
                rows.append(waited(name, good, answered, most[0]))
        tables.show(rows, True)
        after = servers.memory([worker])
        print(f"\nthe worker at the end: {after['rss']:.0f} MB of RSS, {after['pss']:.0f} of PSS")
    tables.save(options.json, found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "archive",
        type=Path,
        nargs="?",
        default=Path("model_store/support-intents.mar"),
        help='an archive, or an artifact to pack, for requests of {"text": ...} [%(default)s, of `traceserve build`]',
    )
    parser.add_argument("--kinds", nargs="+", choices=RUDE, metavar="KIND", help=f"some of: {'; '.join(RUDE)}")
    parser.add_argument("--times", type=int, default=5, help="number of times that each body is sent [%(default)s]")
    parser.add_argument("--connections", type=int, default=4, help="of rude clients [%(default)s]")
    parser.add_argument("--seconds", type=float, default=5, help="per load of a good client [%(default)s]")
    parser.add_argument("--budget", type=float, default=90, help="seconds in which measurements begin [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement and its environment")
    options = parser.parse_args()
    if not options.archive.exists():
        parser.error(f"{options.archive} does not exist; `traceserve build` in the repository's root makes the demo's")
    return options


@contextlib.contextmanager
def packed(archive: Path) -> Iterator[Path]:
    """Return the archive; pack an artifact."""
    if not archive.is_dir():
        yield archive.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="rude-") as store:
        subprocess.run([*servers.TRACESERVE, "archive", str(archive), "--store", store], check=True)
        [made] = Path(store).glob("*.mar")
        yield made


def refusal(name: str, body: bytes, found: Optional[Refusals]) -> tables.Row:
    row = {"body": name, "bytes": f"{len(body):,}"}
    if found is None:
        return {**row, **dict.fromkeys(("status", "median, ms", "longest, ms", "RSS, MB", "PSS, MB"), "–")}
    return {
        **row,
        "status": str(found.status),
        "median, ms": tables.milliseconds(statistics.median(found.seconds)),
        "longest, ms": tables.milliseconds(max(found.seconds)),
        "RSS, MB": f"{found.before['rss']:.0f}, {found.most:.0f}, {found.after['rss']:.0f}",
        "PSS, MB": f"{found.before['pss']:.0f}, {found.after['pss']:.0f}",
    }


def waited(name: str, good: load_generator.Result, others: Dict[str, Any], most: float) -> tables.Row:
    failed = f", {good.failed} failed" if good.failed else ""
    return {
        "a good client, beside": name,
        "p50, ms": tables.milliseconds(good.percentile(50)),
        "p99, ms": tables.milliseconds(good.percentile(99)),
        "answers": f"{good.requests:,}{failed}",
        "the others' answers": f"{others['answered']:,}" if others else "–",
        "RSS at most, MB": f"{most:.0f}",
    }


if __name__ == "__main__":
    main()
