"""Measures the speed of artifacts here, in this process, for the output and the report."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Dict, List, Mapping, Sequence

from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks.contract import Request

from traceserve.building.progress import Progress

AT_ONCE = 32  # requests per engine call, like TorchServe's batch_size
MOST = 256  # requests per round
ROUNDS = 3


def measure_speeds(folders: Mapping[str, Path], requests: Sequence[Request], progress: Progress) -> Dict[str, float]:
    """Return each artifact's requests per second: medians of rounds that alternate between all."""
    engines = {name: Engine.load(folder) for name, folder in folders.items()}
    seconds: Dict[str, List[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.warm_up()
        engine.scheduler.measure()
    asked = requests[:MOST]
    for step in range(ROUNDS):
        for name, engine in engines.items():
            progress("measuring", step, ROUNDS)
            started = time.perf_counter()
            for start in range(0, len(asked), AT_ONCE):
                engine.answer(asked[start : start + AT_ONCE])
            seconds[name].append(time.perf_counter() - started)
    progress("measuring", ROUNDS, ROUNDS)
    return {name: len(asked) / statistics.median(values) for name, values in seconds.items()}
