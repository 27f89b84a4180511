"""A program that loads an artifact as a worker does, and writes its figures: FOLDER REQUESTS THREADS."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import List, NamedTuple

from traceserve_runtime.engine import Engine
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks.contract import Request

_AT_ONCE = 32  # requests per call, like TorchServe's batch_size
_ROUNDS = 3
_ALONE = 64  # requests asked one by one


class EngineFigures(NamedTuple):
    """Seconds until the engine answers, its process's memory in bytes (its share of what it shares), the median
    milliseconds of one request, and requests per second, 32 at once."""

    load_seconds: float
    memory: int
    p50_ms: float
    per_second: float


def measure_engine(folder: Path, requests: List[Request], threads: int) -> EngineFigures:
    """Load the artifact and measure it."""
    started = time.perf_counter()
    engine = Engine.load(folder, settings=Settings(threads=threads))
    engine.warm_up()
    loaded = time.perf_counter() - started
    engine.make_ready()
    engine.measure()
    rounds, alone = [], []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for start in range(0, len(requests), _AT_ONCE):
            engine.answer(requests[start : start + _AT_ONCE])
        rounds.append(time.perf_counter() - began)
    for request in requests[:_ALONE]:
        began = time.perf_counter()
        engine.answer([request])
        alone.append(time.perf_counter() - began)
    return EngineFigures(loaded, _memory(), 1000 * statistics.median(alone), len(requests) / statistics.median(rounds))


def _memory() -> int:
    """Return this process's proportional share of memory; 0 where Linux does not tell it."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    listed = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    asked = [Request(inputs, parameters) for inputs, parameters in listed]
    figures = measure_engine(Path(sys.argv[1]), asked, int(sys.argv[3]))
    sys.stdout.write(json.dumps(figures._asdict()) + "\n")
