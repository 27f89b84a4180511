"""A program that loads an artifact as a worker does, and writes its figures: FOLDER REQUESTS THREADS.

Of a task that writes text every request gets as many new tokens, whatever the model would end with, so that archives in
several dtypes do the same work.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.generation.loop import Member
from traceserve_runtime.generation.scores import GenerationSettings
from traceserve_runtime.generation.search import Sampling
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks.contract import Request
from traceserve_runtime.tasks.generating import Generating
from traceserve_runtime.texts.rows import Encoded, Row

from traceserve.building.speeds import ROUNDS, answer_round, in_a_round
from traceserve.errors import ExportError

_ALONE = 64  # requests asked one by one
_NEW_TOKENS = 32  # of each text, fewer where a row has less room
_TEXTS_ALONE, _TOGETHER = 8, 16  # texts written one by one, and by as many clients at once


class WritingFigures(NamedTuple):
    """The median milliseconds to a text's first token, and tokens per second after it: for one text, and for 16 at once,
    their first ones included."""

    first_token_ms: float
    tokens_per_second: float
    tokens_per_second_together: float


class EngineFigures(NamedTuple):
    """Seconds until the engine answers, its process's memory in bytes (its share of what it shares), the median
    milliseconds of one request, and requests per second, `AT_ONCE` per call; of texts 16 at once, and more of `writing`."""

    load_seconds: float
    memory: int
    p50_ms: float
    per_second: float
    writing: Optional[WritingFigures] = None
    refused: int = 0  # requests that the archive would refuse, which are not measured

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> EngineFigures:
        """Read what the program writes."""
        writing = document["writing"]
        return cls(**{**document, "writing": None if writing is None else WritingFigures(**writing)})

    def document(self) -> Dict[str, Any]:
        """Return all of it as JSON."""
        return {**self._asdict(), "writing": None if self.writing is None else self.writing._asdict()}


def measure_engine(folder: Path, requests: List[Request], threads: int) -> EngineFigures:
    """Load the artifact and measure it."""
    started = time.perf_counter()
    engine = Engine.load(folder, settings=Settings(threads=threads))
    engine.warm_up()
    loaded = time.perf_counter() - started
    encoded = engine.task.encode(requests)
    errors = [item for item in encoded if isinstance(item, TraceserveError)]
    if len(errors) == len(requests):
        raise ExportError(f"the archive refuses every one of these requests; the first: {errors[0].message}")
    requests = [request for request, item in zip(requests, encoded) if isinstance(item, Encoded)]
    if engine.task.loop:
        return _writing_figures(engine, requests, loaded)._replace(refused=len(errors))
    engine.make_ready()
    engine.scheduler.measure()
    asked = requests[: in_a_round(engine, requests)]
    rounds = [answer_round(engine, asked)[1] for _ in range(ROUNDS)]
    alone = []
    for request in requests[:_ALONE]:
        began = time.perf_counter()
        engine.answer([request])
        alone.append(time.perf_counter() - began)
    per_second = len(asked) / statistics.median(rounds)
    return EngineFigures(loaded, _memory(), 1000 * statistics.median(alone), per_second, refused=len(errors))


class _Text(NamedTuple):
    """The seconds to a text's first token, or that of several, and to their ends; and how many tokens they have."""

    first: float
    whole: float
    tokens: int


def _writing_figures(engine: Engine, requests: Sequence[Request], loaded: float) -> EngineFigures:
    encoded = engine.task.encode(requests)
    asked = [item.rows[0] for item in encoded if isinstance(item, Encoded)]
    if not any(_length(engine, row) > 1 for row in asked[:_TEXTS_ALONE]):
        raise ExportError(
            "none of the first samples leaves room for two new tokens, so writing cannot be measured; give shorter ones "
            "(--samples FILE)"
        )
    together = [asked[i % len(asked)] for i in range(_TOGETHER)]
    _write(engine, together)  # the first run of a shape is slow
    alone, rounds = [], []
    for _ in range(ROUNDS):
        alone += [_write(engine, [each]) for each in asked[:_TEXTS_ALONE]]
        rounds.append(_write(engine, together))
    all_at_once = statistics.median(text.whole for text in rounds)
    return EngineFigures(
        loaded,
        _memory(),
        1000 * statistics.median(text.whole for text in alone),
        _TOGETHER / all_at_once,
        WritingFigures(
            1000 * statistics.median(text.first for text in alone),
            statistics.median((text.tokens - 1) / (text.whole - text.first) for text in alone if text.tokens > 1),
            rounds[0].tokens / all_at_once,
        ),
    )


def _write(engine: Engine, asked: Sequence[Row]) -> _Text:
    """Write greedy texts of a fixed length for these rows at once."""
    task = engine.task
    assert isinstance(task, Generating)
    loop = task.open_loop(engine.runner, Stats())
    assert loop is not None
    lengths = [_length(engine, row) for row in asked]
    members = [
        Member(row, partial(Sampling, task.prompt(row), GenerationSettings(max_new_tokens=length)))
        for row, length in zip(asked, lengths)
    ]
    for member in members:
        loop.join(member)
    started = time.perf_counter()
    loop.turn()
    first = time.perf_counter() - started
    while loop.busy:
        loop.turn()
    whole = time.perf_counter() - started
    for member, length in zip(members, lengths):
        written = len(member.search.tokens) if member.search is not None else 0
        if member.error is not None or written != length:
            why = member.error or "no error"
            raise ExportError(f"a text ended after {written} of {length} tokens ({why}), so writing cannot be measured")
    return _Text(first, whole, sum(lengths))


def _length(engine: Engine, row: Row) -> int:
    """Return how many tokens are written behind a row."""
    task = engine.task
    assert isinstance(task, Generating)
    return min(_NEW_TOKENS, task.room(row))


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
    sys.stdout.write(json.dumps(figures.document()) + "\n")
