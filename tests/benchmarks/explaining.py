"""The cost of explanations, their completeness error, and what predictions wait beside them.

    python tests/benchmarks/explaining.py --model FOLDER --texts FILE [--task TASK] [--dtype DTYPE] [--steps 24] [--count 50]
        [--clients 4] [--seconds 15] [--rounds 3] [--engines web,torchserve] [--json FILE]

`--texts` has one text a line. First, in this process, each text is predicted and explained in turn: medians of the ratios.
Then the archive is served by a host of our own (`web`), and by TorchServe with `continuous_batching`. Clients ask predictions
one after another; in every other part of a round one more client asks explanations all the time. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from conftest import run_export
from rich.console import Console
from rich.table import Table
from traceserve.archives.archive import pack_archive
from traceserve.serving import configuration, instances, server
from traceserve_runtime.engine import Engine
from traceserve_runtime.explaining.integrated_gradients import STEPS
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.service import Call, Service

NAME = "explained"


class Cost(NamedTuple):
    """Over all texts."""

    prediction_ms: float
    explanation_ms: float
    predictions: float  # the median of the explanations' cost in predictions
    most: float  # the 95th percentile of it
    error: float  # completeness error, median
    error_95: float
    error_most: float


class Waits(NamedTuple):
    """Predictions' latency in milliseconds, and what was explained meanwhile."""

    p50: float
    p99: float
    predictions: float  # per second
    explained: float  # per minute
    out_of_time: int


def cost(folder: Path, texts: Sequence[str], steps: int) -> Cost:
    """Predict and explain each text alone, three times in turn; the best of each."""
    engine = Engine.load(folder)
    engine.make_ready()
    engine.scheduler.measure()
    service = Service(engine, NAME)

    def ask(text: str, explain: bool) -> Any:
        began = time.perf_counter()
        body = json.dumps({"text": text, **({"parameters": {"steps": steps}} if explain else {})}).encode()
        [reply] = service.answer([Call({"body": body}, Headers("application/json", explain=explain))])
        assert reply.status == 200, reply.body
        return time.perf_counter() - began, json.loads(reply.body)

    for text in texts[:3]:
        ask(text, True)
    predicted, explained, errors = [], [], []
    for text in texts:
        pairs = [(ask(text, False)[0], *ask(text, True)) for _ in range(3)]
        predicted.append(min(pair[0] for pair in pairs))
        explained.append(min(pair[1] for pair in pairs))
        errors.append(pairs[0][2]["completeness_error"])
    ratios = [one / other for one, other in zip(explained, predicted)]
    return Cost(
        1000 * statistics.median(predicted),
        1000 * statistics.median(explained),
        statistics.median(ratios),
        float(np.quantile(ratios, 0.95)),
        statistics.median(errors),
        float(np.quantile(errors, 0.95)),
        max(errors),
    )


@contextmanager
def web(archive: Path) -> Iterator[str]:
    """Serve by uvicorn."""
    [port] = configuration.free_ports(1)
    command = [sys.executable, "-m", "traceserve_hosts.web", str(archive), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def torchserve(archive: Path) -> Iterator[str]:
    """Serve by TorchServe."""
    instance = server.start([archive], port=configuration.free_ports(1)[0], timeout=120)
    try:
        yield instance.url.split("//")[1]
    finally:
        instances.stop(instance)


ENGINES = {"web": web, "torchserve": torchserve}


def waits(address: str, texts: Sequence[str], clients: int, seconds: float, beside: bool) -> Waits:
    """Ask predictions for a while, with or without explanations beside them."""
    end = time.perf_counter() + seconds
    took: List[float] = []
    statuses: List[int] = []

    def ask(door: str, number: int, into: List[float]) -> None:
        connection = http.client.HTTPConnection(address, timeout=300)
        while time.perf_counter() < end:
            number += 7
            body = json.dumps({"text": texts[number % len(texts)]})
            began = time.perf_counter()
            connection.request("POST", f"/{door}/{NAME}", body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            reply.read()
            into.append(time.perf_counter() - began)
            if door == "explanations":
                statuses.append(reply.status)
            elif reply.status != 200:
                raise RuntimeError(f"a prediction was answered with {reply.status}")

    explaining: List[float] = []
    threads = [threading.Thread(target=ask, args=("predictions", i, took)) for i in range(clients)]
    threads += [threading.Thread(target=ask, args=("explanations", 0, explaining))] if beside else []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Waits(
        1000 * float(np.quantile(took, 0.5)),
        1000 * float(np.quantile(took, 0.99)),
        len(took) / seconds,
        60 * statuses.count(200) / max(seconds, sum(explaining)),
        statuses.count(503),
    )


def compare(address: str, texts: Sequence[str], options: argparse.Namespace) -> Dict[str, List[float]]:
    """Measure in turn, alone and beside explanations; return the medians, and the ratio of each."""
    waits(address, texts, options.clients, min(3.0, options.seconds), beside=True)  # both are warm
    time.sleep(1.5)
    rounds: Dict[bool, List[Waits]] = {False: [], True: []}
    for _ in range(options.rounds):
        for beside, measured in rounds.items():
            measured.append(waits(address, texts, options.clients, options.seconds, beside))
    columns = {way: [statistics.median(column) for column in zip(*measured)] for way, measured in rounds.items()}
    return {"alone": columns[False], "beside": columns[True]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--task", default="sequence_classification")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the explanations in this process")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", default="web,torchserve")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    texts = [line for line in options.texts.read_text(encoding="utf-8").splitlines() if line.strip()][: options.count]
    screen = Console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, NAME)
        config = {"model_name": options.model, "task": options.task, "dtype": options.dtype}
        run_export(folder, {**config, "continuous_batching": True})
        Path(scratch, "store").mkdir()
        archive = pack_archive(folder, NAME, Path(scratch, "store"))
        own = cost(folder, texts, options.steps)
        screen.print(
            f"a prediction {own.prediction_ms:.1f} ms, an explanation {own.explanation_ms:.1f} ms: {own.predictions:.1f} "
            f"predictions (95 of 100 below {own.most:.1f}); completeness error {100 * own.error:.2g} % (95 of 100 below "
            f"{100 * own.error_95:.2g} %, at most {100 * own.error_most:.2g} %)"
        )
        found: Dict[str, Any] = {}
        table = Table("host", "predictions", "p50 (ms)", "p99 (ms)", "predictions/s", "explained/min", "out of time")
        for engine in filter(None, options.engines.split(",")):
            with ENGINES[engine](archive) as address:
                found[engine] = compare(address, texts, options)
            for way, row in found[engine].items():
                table.add_row(engine, way, *(f"{value:.1f}" for value in row))
            ratio = found[engine]["beside"][1] / found[engine]["alone"][1]
            table.add_row(engine, "ratio of p99", "", f"{ratio:.2f}", "", "", "")
        screen.print(table)
    if options.json:
        options.json.write_text(json.dumps({"cost": own._asdict(), "waits": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
