"""Compares all save modes and dtypes: size, load, memory, latency, throughput, changed answers.

    python tests/benchmarks/formats.py --model FOLDER --texts FILE.csv [--ways torchscript:float32,onnx:int8,...]

Each archive is built by `traceserve build --samples`, so its own gate counts the changed answers; refused ones are
reported as refused. Then every archive is served, alternating, in rounds: medians. `loaded` is the time in which a
process reads the archive and warms up, without TorchServe; `start` is from `traceserve serve` to the first answer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import building
import servers
import tables
import texts as sentences
from traceserve.archives.contents import read_manifest
from traceserve.building.config.save_modes import SAVE_MODES
from traceserve_runtime.tasks import TASKS

Way = Tuple[str, str]

LOAD = """
import sys, time
from pathlib import Path
started = time.perf_counter()
from traceserve_runtime.engine import Engine
engine = Engine.load(Path(sys.argv[1]))
engine.warm_up()
print(time.perf_counter() - started)
"""


def main() -> None:
    options = parse()
    texts = sentences.read(options.texts)
    measured: Dict[str, Dict[str, List[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="formats-") as name, tables.progress() as bar:
        task = bar.add_task("", total=len(options.ways) * (1 + options.rounds))
        archives: Dict[Way, Path] = {}
        refused: Dict[Way, str] = {}
        for way in options.ways:
            bar.update(task, description="building " + " ".join(way))
            folder = Path(name, "-".join(way))
            folder.mkdir()
            try:
                archives[way] = built(options, way, folder)
            except SystemExit as error:
                refused[way] = str(error).strip()
            bar.advance(task)
        for _ in range(options.rounds):
            for way, archive in archives.items():
                bar.update(task, description="measuring " + " ".join(way))
                for what, value in measure(archive, texts, options).items():
                    measured.setdefault(" ".join(way), {}).setdefault(what, []).append(value)
                bar.advance(task)
                tables.save(options.json, measured)
        rows = [row(way, archive, measured[" ".join(way)]) for way, archive in archives.items()]
    tables.show(rows, options.markdown, f"{options.model.name}, {options.task}, max_length {options.max_length}")
    for way, reason in refused.items():
        print(f"{' '.join(way)} was refused: {reason.splitlines()[-1] if reason else ''}")


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__, rounds=3)
    every = [(mode, dtype) for mode, kind in SAVE_MODES.items() if "cpu" in kind.hardware for dtype in kind.dtypes]
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--task", default="sequence_classification", choices=sorted(TASKS))
    parser.add_argument("--texts", type=Path, required=True, metavar="CSV", help="sentences in a column `text`")
    parser.add_argument(
        "--ways",
        type=lambda text: [tuple(way.split(":", 1)) for way in text.split(",")],
        default=every,
        help="save modes and dtypes, such as torchscript:float32,onnx:int8 [all that run on a CPU]",
    )
    building.add_build_options(parser, 128)
    parser.add_argument("--seconds", type=float, default=4, help="of each load [%(default)s]")
    parser.add_argument("--warm-up", type=float, default=1, help="seconds of load before it [%(default)s]")
    return parser.parse_args()


def built(options: argparse.Namespace, way: Way, folder: Path) -> Path:
    config = building.settings(options, task=options.task, long_inputs="truncate", save_mode=way[0], dtype=way[1])
    return building.build(options.model, folder, config, ("--samples", str(options.texts.resolve())))


def measure(archive: Path, texts: Sequence[str], options: argparse.Namespace) -> Dict[str, float]:
    """Measure an archive in one round."""
    found = {"loaded": load_time(archive)}
    with servers.ours(archive, 1) as server:
        found["start"] = server.seconds
        one = server.run(texts, 1, options.seconds, options.warm_up)
        many = server.run(texts, 16, options.seconds, options.warm_up)
        found.update(p50=one.percentile(50), rate=many.throughput, memory=servers.memory(server.workers)["pss"])
    return found


def load_time(archive: Path) -> float:
    """Return the seconds in which a fresh process reads the archive, with its libraries, and warms up."""
    with tempfile.TemporaryDirectory(prefix="formats-") as folder:
        building.unpacked(archive, Path(folder))
        found = subprocess.run([sys.executable, "-c", LOAD, folder], stdout=subprocess.PIPE, check=True)
        return float(found.stdout)


def row(way: Way, archive: Path, measured: Dict[str, List[float]]) -> Dict[str, str]:
    """Return a row of the table."""
    values = {what: tables.median(each) for what, each in measured.items()}
    receipt: Any = read_manifest(archive).receipt
    [own] = [each for each in receipt["candidates"] if each["dtype"] == way[1]]
    return {
        "save mode": way[0],
        "dtype": way[1],
        "archive, MB": tables.figure(archive.stat().st_size / 1e6),
        "loaded, s": tables.figure(values["loaded"]),
        "start, s": tables.figure(values["start"]),
        "memory, MB (PSS)": tables.figure(values["memory"]),
        "p50, 1 connection, ms": tables.milliseconds(values["p50"]),
        "requests/s, 16 connections": tables.figure(values["rate"]),
        "answers changed": f"{own['own_answers_changed']:,} of {own['own_answers']:,}",
    }


if __name__ == "__main__":
    main()
