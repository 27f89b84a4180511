"""Short requests beside long ones, and by themselves, on several hosts in turn: how long they wait, and how many are answered.

    python tests/benchmarks/beside.py --way batches=torchserve:A.mar --way joined=torchserve:B.mar --way web=web:A.mar

Each way is a name, a host (`torchserve` or `web`, which is uvicorn) and an archive for requests of {"text": ...}. All servers
run at once, and only one is asked at a time. In each round each way answers short texts at each number of --connections, and
at one connection by themselves, beside --others clients that send a text of --words words again and again, and beside as many
that send a list of --rows short texts. (The archive's `max_rows` must allow them.) Medians of the rounds, and ratios to the
first way. (Clients that take turns end together, so the long ones answered a second come in steps of --others.)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple

import rude
import servers
import tables
from traceserve.measuring import load_generator
from traceserve.serving import configuration

SHORT = [servers.text_field(text) for text in ("Where is my order?", "Please cancel it.", "The cup is broken.")]


class Way(NamedTuple):
    name: str
    host: str
    archive: Path


def main() -> None:
    options = parse()
    words = rude.PROSE.split()
    long = {
        f"{options.words:,} words": servers.text_field(" ".join(words[i % len(words)] for i in range(options.words))),
        f"{options.rows:,} rows": json.dumps(["Where is my order?"] * options.rows).encode(),
    }
    found: Dict[str, List[Dict[str, float]]] = {way.name: [] for way in options.way}
    with contextlib.ExitStack() as stack:
        urls = {way.name: stack.enter_context(started(way)) for way in options.way}
        for url in urls.values():
            ask(url, SHORT, 4, 3.0)
        for _ in range(options.rounds):
            for name, url in urls.items():
                found[name].append(measured(url, long, options.connections, options.others, options.seconds))
                print(name, json.dumps(found[name][-1]), flush=True)
    tables.show_medians(found)


def measured(url: str, long: Dict[str, bytes], connections: List[int], others: int, seconds: float) -> Dict[str, float]:
    found = {f"requests/s: {each}": ask(url, SHORT, each, seconds).throughput for each in connections}
    alone = ask(url, SHORT, 1, seconds)
    found["alone, p50 in ms"] = 1000 * alone.percentile(50)
    for name, body in long.items():
        good, told = rude.beside(url, [body], others, seconds)
        if told["statuses"] or not told["answered"]:
            raise SystemExit(f"{url}: {name} were answered with {told}")
        found[f"beside {name}, p50 in ms"] = 1000 * good.percentile(50)
        found[f"beside {name}, p99 in ms"] = 1000 * good.percentile(99)
        found[f"{name}, answered a second"] = told["answered"] / seconds
    return found


def ask(url: str, bodies: List[bytes], connections: int, seconds: float) -> load_generator.Result:
    endpoint = load_generator.Endpoint(url)
    return load_generator.send_load(endpoint, bodies, connections=connections, seconds=seconds, warm_up=0.5)


@contextlib.contextmanager
def started(way: Way) -> Iterator[str]:
    """Start a way's server; return where it answers."""
    if way.host == "torchserve":
        with servers.ours(way.archive, workers=1) as server:
            yield server.url
        return
    [port] = configuration.free_ports(1)
    url = f"http://127.0.0.1:{port}/predictions/{way.archive.stem}"
    command = [sys.executable, "-m", "traceserve_hosts.web", str(way.archive), "--port", str(port)]
    process = subprocess.Popen([*command, "--name", way.archive.stem], env=os.environ)
    try:
        while True:
            with contextlib.suppress(OSError):
                rude.Client(url).ask(SHORT[0])
                break
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def way_of(text: str) -> Way:
    name, _, rest = text.partition("=")
    host, _, archive = rest.partition(":")
    if host not in ("torchserve", "web") or not Path(archive).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=torchserve:ARCHIVE or NAME=web:ARCHIVE")
    return Way(name, host, Path(archive).resolve())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", type=way_of, action="append", required=True, metavar="NAME=HOST:ARCHIVE")
    parser.add_argument("--words", type=int, default=6_000, help="of the long text [%(default)s]")
    parser.add_argument("--rows", type=int, default=256, help="of the list [%(default)s]")
    parser.add_argument("--connections", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--others", type=int, default=1, help="clients that send long ones [%(default)s]")
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
