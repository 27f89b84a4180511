"""How often oneDNN prepares a product anew, by how many shapes it keeps (`handlers/traceserve_hosts/libraries.py`).

    python tests/benchmarks/shapes.py --artifact artifacts/NAME --texts FILE.csv [--keep 64,128,256,512] [--mix short mixed]

Each number of shapes has its own process, which answers the same lists of 1 to 64 texts, as they arrive: one half to see their
shapes, and the other to be counted. oneDNN tells what it prepares (`ONEDNN_VERBOSE`), and that slows all ways alike.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import List

import tables
import texts as sentences
from traceserve_hosts import libraries
from traceserve_runtime import processor

MIXES = ("short", "mixed")
BEGIN = "counted from here"
PREPARED, KEPT = "create:cache_miss", "create:cache_hit"


def main() -> None:
    parser = tables.parser(__doc__, rounds=1)
    parser.add_argument("--artifact", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--texts", type=Path, required=True, metavar="CSV", help="sentences in a column `text`")
    parser.add_argument("--keep", type=tables.numbers, default="64,128,256,512", help="shapes [%(default)s]")
    parser.add_argument(
        "--mix", nargs="+", choices=MIXES, default=list(MIXES), help="natural sentences; one in ten long"
    )
    parser.add_argument("--count", type=int, default=6000, help="texts counted [%(default)s]")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # what each process does
    options = parser.parse_args()
    if options.alone:
        answer(options)
        return
    found: List[tables.Row] = []
    with tables.progress() as bar:
        task = bar.add_task("", total=len(options.mix) * len(options.keep))
        for mix in options.mix:
            for kept in options.keep:
                bar.update(task, description=f"{mix}, {kept} shapes")
                found.append(row(options, mix, kept))
                bar.advance(task)
    tables.save(options.json, found)
    tables.show(found, options.markdown, processor.name())


def row(options: argparse.Namespace, mix: str, kept: int) -> tables.Row:
    """Return a line of the table, from a process of its own."""
    command = [sys.executable, __file__, "--alone", "--artifact", str(options.artifact), "--texts", str(options.texts)]
    command += ["--mix", mix, "--count", str(options.count)]
    own = {**os.environ, libraries.SHAPES: str(kept), "ONEDNN_VERBOSE": "profile_create"}
    lines = subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout.splitlines()
    seconds, megabytes = map(float, lines[-1].split())
    counted = lines[lines.index(BEGIN) :]
    prepared = [float(line.rsplit(",", 1)[1]) for line in counted if PREPARED in line]
    reused = sum(KEPT in line for line in counted)
    return {
        "texts": mix,
        "shapes kept": str(kept),
        "products": f"{reused + len(prepared):,}",
        "prepared": f"{len(prepared):,}",
        "s to prepare them": f"{sum(prepared) / 1e3:.2f}",
        "s for all, on all cores": f"{seconds:.1f}",
        "memory, MB": f"{megabytes:.0f}",
    }


def answer(options: argparse.Namespace) -> None:
    """Answer all lists, and print when the second half begins, how long it took, and the memory at the end (USS)."""
    libraries.set_defaults()  # torch is not imported yet
    import psutil
    from traceserve_runtime.engine import Engine
    from traceserve_runtime.tasks.contract import Request

    read = sentences.read(options.texts)
    [mix] = options.mix
    texts = sentences.mixed(read) if mix == "mixed" else read
    chosen = random.Random(0)
    requests = [Request({"text": text}, {"long_inputs": "truncate"}) for text in texts]
    chosen.shuffle(requests)
    engine = Engine.load(options.artifact)
    engine.warm_up()
    engine.runner.share_cores()
    engine.scheduler.measure()
    for half in (False, True):
        if half:
            print(BEGIN, flush=True)
        asked, began = 0, time.perf_counter()
        while asked < options.count:
            size = chosen.randint(1, min(64, len(requests)))
            start = chosen.randrange(len(requests) - size + 1)
            engine.answer(requests[start : start + size])
            asked += size
        seconds = time.perf_counter() - began
    print(seconds, psutil.Process().memory_full_info().uss / 1e6)


if __name__ == "__main__":
    main()
