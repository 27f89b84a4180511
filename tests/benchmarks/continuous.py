"""Generation by TorchServe with and without `continuous_batching`, in turn: what clients wait, and what a step computes.

    python tests/benchmarks/continuous.py [--model FOLDER] [--clients 16] [--seconds 20] [--rounds 3]

Both archives are of the same checkpoint, each on a server of its own; only one is asked at a time. Every client sends one
request after another: a prompt, and between 8 and 200 new tokens (as likely each time twice as many as half as many), every
other one streamed. Each round asks the same requests of both. Medians of the rounds are reported; ratios to the second line.
Without --model it is a Llama with 135 million random weights, as wide and deep as SmolLM2.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import text_models
from rich.console import Console
from rich.table import Table
from traceserve.archives.archive import pack_archive
from traceserve.building.gate.texts import SENTENCES
from traceserve.serving import configuration, instances, server
from traceserve.serving.instances import Instance

LEAST, MOST, SHORT = 8, 200, 40  # new tokens
LONGEST = 512  # tokens of a text and its prompt
WAYS = {"joined": True, "by batches": False}


class Asked(NamedTuple):
    tokens: int
    streamed: bool
    first: float  # seconds until the first byte of the text
    whole: float


class Measured(NamedTuple):
    first: float
    short: float
    requests: float
    slowest: float
    step: float


COLUMNS = {
    "first": ("first token p50 (ms)", 1000.0),
    "short": (f"texts of {SHORT} tokens or fewer p50 (ms)", 1000.0),
    "requests": ("requests/s", 1.0),
    "slowest": ("p99 (ms)", 1000.0),
    "step": ("tokens per step", 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a decoder; without it a random Llama")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0, help="of asking each, per round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    running: Dict[str, Instance] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = options.model or text_models.random_llama(Path(folder, "llama"))
            for way, joins in WAYS.items():
                running[way] = started(model, Path(folder, way.replace(" ", "-")), joins)
            found: Dict[str, List[Measured]] = {way: [] for way in WAYS}
            for number in range(options.rounds):
                for way, instance in running.items():
                    found[way].append(measured(instance, options.clients, options.seconds, number))
                    print(way, found[way][-1], flush=True)
        finally:
            for instance in running.values():
                instances.stop(instance)
    report(found)


def started(model: Path, folder: Path, joins: bool) -> Instance:
    own: Dict[str, Any] = {"model_name": str(model.resolve()), "task": "text_generation", "continuous_batching": joins}
    archive = pack_archive(text_models.built(folder / "text", {**own, "max_length": LONGEST}), "text", folder)
    return server.start([archive], port=configuration.free_ports(1)[0])


def measured(instance: Instance, clients: int, seconds: float, seed: int) -> Measured:
    before, began = steps(instance), time.perf_counter()
    until = began + seconds
    with ThreadPoolExecutor(clients) as pool:
        each = pool.map(lambda client: ask(instance, until, random.Random(1000 * seed + client)), range(clients))
        asked = [one for own in each for one in own]
    took = time.perf_counter() - began
    time.sleep(1)  # until TorchServe has read its worker's log
    return Measured(
        statistics.median(one.first for one in asked if one.streamed),
        statistics.median(one.whole for one in asked if one.tokens <= SHORT),
        len(asked) / took,
        statistics.quantiles([one.whole for one in asked], n=100, method="inclusive")[98],
        sum(one.tokens for one in asked) / (steps(instance) - before),
    )


def ask(instance: Instance, until: float, chosen: random.Random) -> List[Asked]:
    asked: List[Asked] = []
    connection = http.client.HTTPConnection("127.0.0.1", instance.port, timeout=300)
    while time.perf_counter() < until:
        tokens = round(LEAST * (MOST / LEAST) ** chosen.random())
        streamed = bool(len(asked) % 2)
        parameters = {"max_new_tokens": tokens, "min_new_tokens": tokens, "stream": streamed}
        text = chosen.choice([sentence for sentence in SENTENCES if 5 < len(sentence) < 100])
        began = time.perf_counter()
        body = json.dumps({"text": text, "parameters": parameters})
        connection.request("POST", "/predictions/text", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        first = response.read1(1)
        first_at = time.perf_counter()
        rest = response.read()
        if response.status != 200 or not first:
            raise SystemExit(f"answered with {response.status}: {(first + rest)[:200]!r}")
        asked.append(Asked(tokens, streamed, first_at - began, time.perf_counter() - began))
    connection.close()
    return asked


def steps(instance: Instance) -> float:
    """Return how many steps the model has made."""
    with urllib.request.urlopen(f"http://127.0.0.1:{instance.metrics_port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("traceserve_micro_batches_total{"))


def report(found: Dict[str, List[Measured]]) -> None:
    medians = {way: Measured(*map(statistics.median, zip(*rounds))) for way, rounds in found.items()}
    table = Table("way", *(name for name, _ in COLUMNS.values()))
    for way, own in medians.items():
        table.add_row(way, *(f"{getattr(own, field) * factor:,.1f}" for field, (_, factor) in COLUMNS.items()))
    joined, batches = medians.values()
    table.add_row("ratio", *(f"{one / two:.2f}" for one, two in zip(joined, batches)))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
