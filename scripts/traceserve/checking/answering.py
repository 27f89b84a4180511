"""Answers a file of requests with one archive, in a process of its own: `python -m traceserve.checking.answering ASKED ANSWERED`.

So two archives neither share memory nor warm each other's caches, and libraries are those of a worker.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import psutil
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks.contract import Answer, Request

from traceserve.building.speeds import answer_round
from traceserve.errors import ExportError, last_line

_TIMED = 64  # requests that are asked alone, for the latency


class Told(NamedTuple):
    """One request's answer; without one, the error's kind."""

    value: Any
    error: Optional[str]


class Answered(NamedTuple):
    """All answers, in order, and what they took."""

    answers: Sequence[Told]
    p50_ms: float  # of a request asked alone; 0 if none was answered
    seconds: float  # for all, `AT_ONCE` per call
    memory_mib: float  # of the process at its end


def ask_in_a_process(folder: Path, requests: Sequence[Request], threads: int, scratch: Path) -> Answered:
    """Run an unpacked archive in a fresh process with this many threads; raises ExportError if it cannot run here."""
    asked, answered = scratch / "asked.json", scratch / "answered.json"
    asked.write_text(
        json.dumps(
            {"folder": str(folder.resolve()), "requests": [[dict(r.inputs), dict(r.parameters)] for r in requests]}
        ),
        encoding="utf-8",
    )
    variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
    command = [sys.executable, "-m", "traceserve.checking.answering", str(asked), str(answered)]
    result = subprocess.run(  # not where the user is: Python imports from there first
        command,
        cwd=scratch,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if result.returncode:
        raise ExportError(f"{folder.name} cannot be run here: {last_line(result.stdout)}")
    document = json.loads(answered.read_text(encoding="utf-8"))
    return Answered([Told(*each) for each in document.pop("answers")], **document)


def _answer_all(asked: Path) -> Dict[str, Any]:
    document = json.loads(asked.read_text(encoding="utf-8"))
    requests = [Request(inputs, parameters) for inputs, parameters in document["requests"]]
    engine = Engine.load(Path(document["folder"]))
    engine.warm_up()
    alone: List[float] = []
    for request in requests:
        started = time.perf_counter()
        [answer] = engine.answer([request])
        if isinstance(answer, Answer):  # a refusal takes no time
            alone.append(time.perf_counter() - started)
        if len(alone) == _TIMED:
            break
    answers, seconds = answer_round(engine, requests)
    return {
        "answers": [
            [each.value, None] if isinstance(each, Answer) else [None, type(each).__name__] for each in answers
        ],
        "p50_ms": 1000 * statistics.median(alone or [0.0]),
        "seconds": seconds,
        "memory_mib": psutil.Process().memory_info().rss / (1 << 20),
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_answer_all(Path(sys.argv[1]))), encoding="utf-8")
