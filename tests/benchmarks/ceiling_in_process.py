"""The share of the runner's own speed that is served: the same model in process with ideal batches, and over HTTP.

    python tests/benchmarks/ceiling_in_process.py --model FOLDER --texts FILE.csv

In process every text is answered, sorted by length and divided into full batches: by the model alone (tokenized and
padded before), and by the engine (including tokenization and decoding), which also gets batches in a random order, as
they arrive. It runs in its own process with --threads threads and a worker's library settings, while no server runs.
Then `traceserve serve` with one worker gets the same texts, in a random order, over many connections. Alternating
rounds, medians.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import building
import fresh
import servers
import tables
import texts

SERVED = "served over HTTP"


def main() -> None:
    options = parse()
    sentences = texts.read(options.texts)[: options.limit]
    measured: Dict[str, List[float]] = {}
    with tempfile.TemporaryDirectory(prefix="ceiling-") as name, tables.progress() as bar:
        archive = building.archive_of(options, Path(name))
        folder = building.unpacked(archive, Path(name, "unpacked"))
        task = bar.add_task("", total=2 * options.rounds)
        for _ in range(options.rounds):
            bar.update(task, description="in process")
            found = fresh.run(in_process, folder, sentences, options.batches, options.threads)
            bar.advance(task)
            bar.update(task, description=SERVED)
            with servers.ours(archive, 1) as server:
                found[SERVED] = server.run(sentences, options.connections, options.seconds, options.warm_up).throughput
            bar.advance(task)
            for way, rate in found.items():
                measured.setdefault(way, []).append(rate)
            tables.save(options.json, measured)
    tables.show(rows(measured), options.markdown, f"{options.connections} connections, one worker")


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__, rounds=5)
    parser.add_argument("--texts", type=Path, required=True, metavar="CSV", help="sentences in a column `text`")
    building.add_archive_options(parser, 128)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N texts")
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 32, 64], help="%(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="of the model in process [torch's default]")
    parser.add_argument("--connections", type=int, default=64, help="[%(default)s]")
    parser.add_argument("--seconds", type=float, default=10, help="of load [%(default)s]")
    parser.add_argument("--warm-up", type=float, default=2, help="seconds of load before it [%(default)s]")
    return parser.parse_args()


def in_process(
    folder: Path, sentences: Sequence[str], batches: Sequence[int], threads: Optional[int]
) -> Dict[str, float]:
    """Return the model's and the engine's texts/s for each batch size, after a warm-up round."""
    import torch
    from traceserve_runtime.batching.batches import pad
    from traceserve_runtime.engine import Engine
    from traceserve_runtime.tasks.contract import Request
    from traceserve_runtime.texts.rows import Encoded

    engine = Engine.load(folder)
    if threads:
        torch.set_num_threads(threads)
    engine.warm_up()
    engine.scheduler.measure()
    requests = [Request({"text": text}, {"long_inputs": "truncate"}) for text in sentences]
    encoded = {i: each for i, each in enumerate(engine.task.encode(requests)) if isinstance(each, Encoded)}
    order = sorted(encoded, key=lambda i: encoded[i].rows[0].length)
    arrived = random.Random(0).sample(order, len(order))
    found = {}
    for size in batches:
        cuts, unsorted = ([way[start : start + size] for start in range(0, len(way), size)] for way in (order, arrived))
        padding = engine.runner.padding
        padded = [pad([encoded[i].rows[0] for i in cut], engine.manifest, padding)[0] for cut in cuts]
        for arrays in padded[:: max(1, len(padded) // 20)]:
            engine.runner(arrays)
        started = time.perf_counter()
        for arrays in padded:
            engine.runner(arrays)
        found[f"the model alone, batches of {size}"] = len(order) / (time.perf_counter() - started)
        for way, asked in (("", cuts), (", unsorted", unsorted)):
            started = time.perf_counter()
            for cut in asked:
                engine.answer([requests[i] for i in cut])
            found[f"the engine, batches of {size}{way}"] = len(order) / (time.perf_counter() - started)
    return found


def rows(measured: Dict[str, List[float]]) -> List[tables.Row]:
    """Return each way's throughput, and the served share of it."""
    rates = {way: tables.median(values) for way, values in measured.items()}
    served = rates[SERVED]
    best = max((way for way in rates if way != SERVED), key=rates.__getitem__)
    return [
        {
            "": way + (", the best" if way == best else ""),
            "texts/s": tables.figure(rate),
            "share that is served": "" if way == SERVED else f"{served / rate:.0%}",
            "all": " ".join(tables.figure(value) for value in measured[way]),
        }
        for way, rate in rates.items()
    ]


if __name__ == "__main__":
    main()
