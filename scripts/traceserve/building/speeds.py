"""Rounds in which an engine answers many requests, and the speed of artifacts here, for the output and the report."""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path
from typing import Dict, List, Mapping, Sequence, Tuple, Union

from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.tasks.contract import Answer, Request

from traceserve.building.progress import Progress

AT_ONCE = 32  # requests per engine call, like TorchServe's batch_size
MOST = 256  # requests per round
SECONDS = 10  # that a round takes, about: a model of 600 million parameters would need minutes for all
ROUNDS = 3


def answer_round(engine: Engine, requests: Sequence[Request]) -> Tuple[List[Union[Answer, TraceserveError]], float]:
    """Return the answers to requests, `AT_ONCE` per call, and the seconds that all took."""
    answers: List[Union[Answer, TraceserveError]] = []
    started = time.perf_counter()
    for start in range(0, len(requests), AT_ONCE):
        answers += engine.answer(requests[start : start + AT_ONCE])
    return answers, time.perf_counter() - started


def in_a_round(engine: Engine, requests: Sequence[Request]) -> int:
    """Return how many of these requests the engine answers in a round: those of one call at least, `MOST` at most."""
    first = requests[:AT_ONCE]
    _, seconds = answer_round(engine, first)
    return max(len(first), min(MOST, int(len(first) * SECONDS / seconds)))


def measure_speeds(folders: Mapping[str, Path], requests: Sequence[Request], progress: Progress) -> Dict[str, float]:
    """Return each artifact's requests per second: medians of rounds that alternate between all, of as many requests as the
    slowest one answers in a round."""
    engines = {name: Engine.load(folder) for name, folder in folders.items()}
    seconds: Dict[str, List[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.warm_up()
        with contextlib.suppress(RuntimeError):  # mBART cannot run rows of padding alone: a worker guesses its cost
            engine.scheduler.measure()
    asked = requests[: min(in_a_round(engine, requests) for engine in engines.values())]
    for step in range(ROUNDS):
        for name, engine in engines.items():
            progress("measuring", step, ROUNDS)
            seconds[name].append(answer_round(engine, asked)[1])
    progress("measuring", ROUNDS, ROUNDS)
    return {name: len(asked) / statistics.median(values) for name, values in seconds.items()}
