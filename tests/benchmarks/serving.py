"""Ours against the pytorch/serve example and other servers: throughput, latency, start, memory, alternating, one at a
time.

    python tests/benchmarks/serving.py --model FOLDER --texts FILE.csv --foreign EXAMPLE.mar \\
        --litserve-python PYTHON --infinity-python PYTHON [--kind embeddings]

Each round starts every server, loads it in a closed loop and stops it. All have one worker unless --workers overrides
ours, and truncate texts to --max-length tokens, ours too (`long_inputs` is `truncate`), so that they compute
the same. In brackets: relative to the first foreign archive, or else to the first rival.
The environments of the rivals need: litserve, transformers, torch; infinity_emb[torch,server] 0.0.77 with
transformers<4.49, optimum<2, click<8.2.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import building
import servers
import tables
import texts
from traceserve.measuring import load_generator

MIXES = ("short", "mixed")


def main() -> None:
    options = parse()
    sentences = texts.read(options.texts)
    mixes = {"short": sentences, "mixed": texts.mixed(sentences)}
    with tempfile.TemporaryDirectory(prefix="serving-") as name:
        starters, sizes = contenders(options, Path(name))
        rivals = [tables.packages(each) for each in (options.litserve_python, options.infinity_python) if each]
        measured: Dict[str, List[Dict[str, Any]]] = {name: [] for name in starters}
        with tables.progress() as bar:
            task = bar.add_task("", total=options.rounds * len(starters) * len(options.mix) * len(options.connections))
            for _ in range(options.rounds):
                for name, starter in starters.items():
                    bar.update(task, description=name)
                    with starter() as server:
                        found: Dict[str, Any] = {"start": server.seconds, "runs": {}}
                        for mix in options.mix:
                            for connections in options.connections:
                                result = server.run(mixes[mix], connections, options.seconds, options.warm_up)
                                found["runs"][f"{mix}, {connections}"] = summary(result)
                                bar.advance(task)
                        found["workers"] = servers.memory(server.workers)
                        found["frontend"] = servers.memory(server.frontend)
                    measured[name].append(found)
                tables.save(options.json, {"archives": sizes, "rivals": rivals, "servers": measured})
    names = list(measured)
    first_other = len(options.archive) or 1
    base = names[first_other] if first_other < len(names) else names[0]
    tables.show(rows(measured, sizes, base), options.markdown)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__, rounds=5)
    parser.add_argument("--texts", type=Path, required=True, metavar="CSV", help="sentences in a column `text`")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the checkpoint for all servers")
    parser.add_argument("--kind", choices=building.SETTINGS, default="classification", help="[%(default)s]")
    parser.add_argument(
        "--archive",
        type=Path,
        action="append",
        default=[],
        metavar="MAR",
        help="ours; several times: several of ours; without it one is built from --model",
    )
    building.add_build_options(parser, 128)
    parser.add_argument("--workers", type=int, default=1, help="of ours [%(default)s]")
    parser.add_argument(
        "--foreign",
        type=Path,
        action="append",
        default=[],
        metavar="MAR",
        help="an archive for plain torchserve, as the pytorch/serve example's; several times: several",
    )
    parser.add_argument("--foreign-batch", type=int, metavar="N", help="its batch size [its own, which is 1]")
    parser.add_argument("--litserve-python", type=Path, metavar="PYTHON", help="the interpreter that has litserve")
    parser.add_argument("--infinity-python", type=Path, metavar="PYTHON", help="the one that has infinity_emb")
    parser.add_argument("--mix", nargs="+", choices=MIXES, default=MIXES, help="natural sentences; one in ten long")
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 16, 64], help="%(default)s")
    parser.add_argument("--seconds", type=float, default=10, help="of each load [%(default)s]")
    parser.add_argument("--warm-up", type=float, default=2, help="seconds of load before it [%(default)s]")
    return parser.parse_args()


def contenders(options: argparse.Namespace, folder: Path) -> Tuple[Dict[str, servers.Starter], Dict[str, float]]:
    """Return each server's start function, ours first, and the size in MB of archives."""
    own = options.archive
    if not own:
        settings = building.settings(options, long_inputs="truncate", **building.SETTINGS[options.kind])
        own = [building.build(options.model, folder, settings)]
    starters: Dict[str, servers.Starter] = {}
    sizes = {}
    for archive in own:
        name = "traceserve" if len(own) == 1 else f"traceserve {archive.stem}"
        starters[name] = functools.partial(servers.ours, archive.resolve(), options.workers)
        sizes[name] = archive.stat().st_size / 1e6
    for archive in options.foreign:
        name = "torchserve" if len(options.foreign) == 1 else f"torchserve {archive.stem}"
        starters[name] = functools.partial(servers.foreign, archive, options.foreign_batch)
        sizes[name] = archive.stat().st_size / 1e6
    if options.litserve_python and options.kind == "classification":
        starters["LitServe"] = functools.partial(
            servers.litserve, options.litserve_python, options.model, options.max_length
        )
    if options.infinity_python:
        starters["infinity"] = functools.partial(
            servers.infinity, options.infinity_python, options.model, options.kind, options.max_length
        )
    return starters, sizes


def summary(result: load_generator.Result) -> Dict[str, Any]:
    """Return the recorded figures of a load."""
    return {
        "throughput": result.throughput,
        "p50": result.percentile(50),
        "p99": result.percentile(99),
        "errors": result.errors,
        "load generator": result.cpu,
    }


def rows(measured: Dict[str, List[Dict[str, Any]]], sizes: Dict[str, float], base: str) -> List[tables.Row]:
    """Return a line per figure, a column per server; medians."""
    figures: Dict[str, Dict[str, float]] = {}

    def add(figure: str, read: Callable[[Dict[str, Any]], float]) -> None:
        figures[figure] = {name: tables.median(map(read, found)) for name, found in measured.items()}

    def of_run(run: str, key: str, scale: float = 1.0) -> Callable[[Dict[str, Any]], float]:
        return lambda found: float(found["runs"][run][key]) * scale

    runs = list(measured[base][0]["runs"])
    for run in runs:
        add(f"requests/s: {run}", of_run(run, "throughput"))
    for run in runs:
        add(f"p50 in ms: {run}", of_run(run, "p50", 1000))
        if not run.endswith(", 1"):
            add(f"p99 in ms: {run}", of_run(run, "p99", 1000))
    add("start to first answer in s", lambda found: found["start"])
    figures["archive in MB"] = sizes
    add("memory of the worker in MB (PSS)", lambda found: found["workers"]["pss"])
    add("memory of all processes in MB (PSS)", lambda found: found["workers"]["pss"] + found["frontend"]["pss"])
    table = [
        {"": name, **{server: cell(values, server, base) for server in measured}} for name, values in figures.items()
    ]
    errors = {
        name: sum(sum(run["errors"].values()) for each in found for run in each["runs"].values())
        for name, found in measured.items()
    }
    return [*table, {"": "errors in all", **{name: f"{count:,}" for name, count in errors.items()}}]


def cell(values: Dict[str, float], server: str, base: str) -> str:
    """Return the figure, and its ratio to the base's."""
    if server not in values:
        return "–"
    ratio = "" if server == base or base not in values else f" ({tables.figure(values[server] / values[base])})"
    return tables.figure(values[server]) + ratio


if __name__ == "__main__":
    main()
