"""The memory of workers after some requests: our archives and foreign ones, alternating.

    python tests/benchmarks/memory.py --texts FILE.csv ARCHIVE.mar [ARCHIVE.mar ...] [--foreign EXAMPLE.mar] [--workers 1 4]

PSS divides shared pages among their processes, so it adds up; RSS counts them in each process; private
(USS) is what a process alone holds. The frontend (the JVM) is reported separately.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any, Dict, List

import servers
import tables
import texts

KINDS = {"pss": "PSS", "rss": "RSS", "uss": "private"}


def main() -> None:
    options = parse()
    sentences = texts.read(options.texts)
    subjects = contenders(options)
    found: Dict[str, List[Dict[str, Any]]] = {name: [] for name in subjects}
    with tables.progress() as bar:
        task = bar.add_task("", total=options.rounds * len(subjects))
        for _ in range(options.rounds):
            for name, starter in subjects.items():
                bar.update(task, description=name)
                with starter() as server:
                    connections = 8 * len(server.workers)  # so that each worker has had batches
                    server.run(sentences, connections, options.seconds, 0)
                    workers = [servers.memory([pid]) for pid in server.workers]
                    found[name].append({"workers": workers, "frontend": servers.memory(server.frontend)})
                bar.advance(task)
            tables.save(options.json, found)
    tables.show([row(name, rounds) for name, rounds in found.items()], options.markdown)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__, rounds=3)
    parser.add_argument("archives", type=Path, nargs="+", metavar="ARCHIVE", help="ours")
    parser.add_argument("--foreign", type=Path, nargs="+", default=[], metavar="MAR", help="for plain torchserve")
    parser.add_argument("--texts", type=Path, required=True, metavar="CSV", help="sentences in a column `text`")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 4], help="of ours %(default)s")
    parser.add_argument("--seconds", type=float, default=5, help="of load before it is measured [%(default)s]")
    return parser.parse_args()


def contenders(options: argparse.Namespace) -> Dict[str, servers.Starter]:
    """Return each archive with each number of workers; a foreign one with one."""
    made: Dict[str, servers.Starter] = {}
    for workers in options.workers:
        for archive in options.archives:
            name = f"{archive.stem}, {workers} worker{'s' if workers > 1 else ''}"
            made[name] = functools.partial(servers.ours, archive.resolve(), workers)
    for archive in options.foreign:
        made[f"{archive.stem} under plain torchserve"] = functools.partial(servers.foreign, archive)
    return made


def row(name: str, rounds: List[Dict[str, Any]]) -> tables.Row:
    """Return medians over the rounds: all workers together, the mean worker, and the frontend, in MB."""

    def total(kind: str) -> float:
        return tables.median(sum(worker[kind] for worker in each["workers"]) for each in rounds)

    count = len(rounds[0]["workers"])
    cells = {"MB": name}
    for kind, shown in KINDS.items():
        cells[f"{shown} of a worker"] = tables.figure(total(kind) / count)
    for kind, shown in KINDS.items():
        cells[f"{shown}, all workers"] = tables.figure(total(kind))
    return {**cells, "PSS of the frontend": tables.figure(tables.median(each["frontend"]["pss"] for each in rounds))}


if __name__ == "__main__":
    main()
