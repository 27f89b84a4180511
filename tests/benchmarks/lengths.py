"""Checks whether the cost grows with the real tokens, and measures workers and connections.

    python tests/benchmarks/lengths.py --model FOLDER --texts FILE.csv [--part lengths|workers|both]

The first table sends texts of one length at a time, in words (sentences, joined and cut), and counts their tokens with
the archive's own tokenizer, including special ones: throughput times tokens per request should stay constant. The
second starts a server for each number of workers and loads it over each number of connections. All loads are closed
loops.
"""

from __future__ import annotations

import argparse
import functools
import random
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import building
import servers
import tables
import texts
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks.contract import Request
from traceserve_runtime.texts.rows import Encoded

TEXTS_OF_EACH_LENGTH = 256


def main() -> None:
    options = parse()
    measured: Dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lengths-") as name:
        archive = building.archive_of(options, Path(name))
        sentences = texts.read(options.texts)
        parts = ("lengths", "workers") if options.part == "both" else (options.part,)
        steps = len(options.words) if "lengths" in parts else 0
        steps += len(options.workers) * len(options.connections) if "workers" in parts else 0
        with tables.progress() as bar:
            task = bar.add_task("", total=steps * options.rounds)
            options.advance = functools.partial(bar.advance, task)
            for part in parts:
                bar.update(task, description=part)
                measured[part] = {"lengths": by_length, "workers": by_workers}[part](archive, sentences, options)
                tables.save(options.json, measured)
    for part, found in measured.items():
        {"lengths": show_lengths, "workers": show_workers}[part](found, options)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__, rounds=5)
    parser.add_argument("--texts", type=Path, required=True, metavar="CSV", help="sentences in a column `text`")
    building.add_archive_options(parser, 512)
    parser.add_argument("--part", choices=("lengths", "workers", "both"), default="both", help="[%(default)s]")
    parser.add_argument("--words", nargs="+", type=int, default=[8, 16, 32, 64, 100, 200, 400], help="%(default)s")
    parser.add_argument("--at", type=int, default=16, metavar="N", help="connections for the lengths [%(default)s]")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4], help="%(default)s")
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 4, 16, 64, 256], help="%(default)s")
    parser.add_argument("--seconds", type=float, default=8, help="of each load [%(default)s]")
    parser.add_argument("--warm-up", type=float, default=2, help="seconds of load before it [%(default)s]")
    return parser.parse_args()


def by_length(archive: Path, sentences: Sequence[str], options: argparse.Namespace) -> List[Dict[str, Any]]:
    """Return one entry per length; one server answers all, alternating."""
    random_state = random.Random(0)
    found = []
    for words in options.words:
        made = [texts.joined(sentences, words, random_state) for _ in range(TEXTS_OF_EACH_LENGTH)]
        found.append({"words": words, "texts": made, "throughput": [], "p50": [], "errors": 0})
    for entry, (tokens, rows) in zip(found, count_tokens(archive, [entry["texts"] for entry in found])):
        entry.update(tokens=tokens, rows=rows)
    with servers.ours(archive) as server:
        for _ in range(options.rounds):
            for entry in found:
                result = server.run(entry["texts"], options.at, options.seconds, options.warm_up)
                # By Little's law: a count would be rounded to whole batches, and few batches of long texts fit in the
                # time.
                entry["throughput"].append(options.at / float(result.latencies.mean()))
                entry["p50"].append(result.percentile(50))
                entry["errors"] += result.failed
                options.advance()
    return [{key: value for key, value in entry.items() if key != "texts"} for entry in found]


def count_tokens(archive: Path, groups: Sequence[Sequence[str]]) -> List[Tuple[float, float]]:
    """Return for each group of texts: tokens read by the model, and rows (several for a text in windows), per text."""
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine.load(building.unpacked(archive, Path(folder)))
        for group in groups:
            encoded = engine.task.encode([Request({"text": text}) for text in group])
            rows = [row for each in encoded if isinstance(each, Encoded) for row in each.rows]
            counts.append((sum(row.length for row in rows) / len(group), len(rows) / len(group)))
    return counts


def by_workers(archive: Path, sentences: Sequence[str], options: argparse.Namespace) -> List[Dict[str, Any]]:
    """Return one entry for each number of workers and of connections."""
    found: Dict[Any, Dict[str, Any]] = {}
    for _ in range(options.rounds):
        for workers in options.workers:
            with servers.ours(archive, workers) as server:
                for connections in options.connections:
                    result = server.run(sentences, connections, options.seconds, options.warm_up)
                    entry = found.setdefault(
                        (workers, connections),
                        {
                            "workers": workers,
                            "connections": connections,
                            "throughput": [],
                            "p50": [],
                            "p99": [],
                            "errors": 0,
                        },
                    )
                    entry["throughput"].append(result.throughput)
                    entry["p50"].append(result.percentile(50))
                    entry["p99"].append(result.percentile(99))
                    entry["errors"] += result.failed
                    options.advance()
    return list(found.values())


def show_lengths(found: List[Dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table, and the product's deviation from its own median."""
    products = [tables.median(entry["throughput"]) * entry["tokens"] for entry in found]
    middle = tables.median(products)
    rows = [
        {
            "words": str(entry["words"]),
            "tokens": f"{entry['tokens']:.1f}",
            "rows": tables.figure(entry["rows"]),
            "requests/s": tables.figure(tables.median(entry["throughput"])),
            "p50 in ms": tables.milliseconds(tables.median(entry["p50"])),
            "requests/s × tokens": tables.figure(product),
            "to the median": f"{product / middle - 1:+.0%}",
            "errors": f"{entry['errors']:,}",
        }
        for entry, product in zip(found, products)
    ]
    tables.show(rows, options.markdown, f"Texts of one length, {options.at} connections, one worker")
    print(f"\nfrom {min(products) / middle - 1:+.0%} to {max(products) / middle - 1:+.0%} around the median")


def show_workers(found: List[Dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table of workers and connections."""
    rows = [
        {
            "workers": str(entry["workers"]),
            "connections": str(entry["connections"]),
            "requests/s": tables.figure(tables.median(entry["throughput"])),
            "p50 in ms": tables.milliseconds(tables.median(entry["p50"])),
            "p99 in ms": tables.milliseconds(tables.median(entry["p99"])),
            "errors": f"{entry['errors']:,}",
        }
        for entry in found
    ]
    tables.show(rows, options.markdown, "Workers and connections")


if __name__ == "__main__":
    main()
