"""The cost of the libraries' settings (`handlers/traceserve_hosts/libraries.py`): throughput and memory in process,
alone and
beside a busy loop on one core.

python tests/benchmarks/waiting.py --artifact artifacts/NAME --texts FILE.csv

Each setting has its own process, alternating; texts are asked in lists of 1, 16 and 64 for --seconds each.
"""

from __future__ import annotations

import csv
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import tables
from traceserve_hosts.libraries import SHAPES, settings

OURS = settings()
SETTINGS: Dict[str, Dict[str, str]] = {
    "ours": OURS,
    "threads sleep at once": {**OURS, "GOMP_SPINCOUNT": "0"},
    "they spin 1,000 times": {**OURS, "GOMP_SPINCOUNT": "1000"},
    "they spin 10,000 times": {**OURS, "GOMP_SPINCOUNT": "10000"},
    "oneDNN keeps 16 shapes": {**OURS, SHAPES: "16"},
    "oneDNN keeps 64 shapes": {**OURS, SHAPES: "64"},
    "oneDNN keeps 256 shapes": {**OURS, SHAPES: "256"},
    "oneDNN's own caches": {key: value for key, value in OURS.items() if key.startswith(("OMP", "GOMP"))},
    "nothing set": {},
}
AT_ONCE = (1, 16, 64)
BUSY = "while True: pass"


def ask(artifact: Path, texts: List[str], seconds: float) -> Dict[str, Any]:
    """Return, from this process, texts per second for each list length, and the memory at the end in MB (USS)."""
    import psutil
    from traceserve_runtime.engine import Engine
    from traceserve_runtime.tasks.contract import Request

    engine = Engine.load(artifact)
    engine.warm_up()
    engine.runner.share_cores()
    engine.scheduler.measure()
    requests = [Request({"text": text}) for text in texts]
    found: Dict[str, Any] = {}
    for count in AT_ONCE:
        started, asked = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            start = asked % (len(requests) - count)
            engine.answer(requests[start : start + count])
            asked += count
        found[str(count)] = asked / (time.perf_counter() - started)
    found["memory"] = psutil.Process().memory_full_info().uss / 1e6
    return found


def main() -> None:
    parser = tables.parser(__doc__, rounds=3)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="a .csv with a column text")
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--alone", action="store_true", help="ask in this process, as each setting is")
    options = parser.parse_args()
    if options.alone:
        with options.texts.open(encoding="utf-8", newline="") as stream:
            texts = [line["text"] for line in csv.DictReader(stream)]
        random.Random(0).shuffle(texts)
        print(json.dumps(ask(options.artifact, texts, options.seconds)))
        return
    found: Dict[str, Dict[str, List[Dict[str, Any]]]] = {}
    clean = {key: value for key, value in os.environ.items() if key not in OURS}
    command = [sys.executable, __file__, "--alone", "--artifact", str(options.artifact), "--texts", str(options.texts)]
    command += ["--seconds", str(options.seconds)]
    for beside in ("alone", "beside a busy loop"):
        busy = subprocess.Popen([sys.executable, "-c", BUSY]) if beside != "alone" else None
        try:
            for _ in range(options.rounds):
                for name, variables in SETTINGS.items():
                    result = subprocess.run(command, env={**clean, **variables}, stdout=subprocess.PIPE, check=True)
                    found.setdefault(beside, {}).setdefault(name, []).append(json.loads(result.stdout))
        finally:
            if busy is not None:
                busy.kill()
    rows = []
    for name in SETTINGS:
        row = {"": name}
        for beside, results in found.items():
            for count in map(str, AT_ONCE):
                row[f"{beside}, {count} at once"] = f"{statistics.median(r[count] for r in results[name]):.0f}"
        row["memory, MB"] = f"{statistics.median(r['memory'] for r in found['alone'][name]):.0f}"
        rows.append(row)
    tables.show(rows, options.markdown)
    tables.save(options.json, found)


if __name__ == "__main__":
    main()
