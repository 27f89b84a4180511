"""The cost of runs on this machine, measured while requests are answered."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, Iterator, Type

import pytest
from traceserve_runtime.batching import measuring
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.batching.costs import CostModel
from traceserve_runtime.batching.lanes import Lanes
from traceserve_runtime.batching.measuring import Measuring
from traceserve_runtime.engine import Engine
from traceserve_runtime.runner import IN_ATTENTION, Arrays
from traceserve_runtime.tasks.contract import Answer, Request

REQUEST = Request({"text": "Where is my parcel?"})
GUESSED = CostModel(padding=IN_ATTENTION._replace(alone=16))


@pytest.fixture
def engine(artifact: Path, two_cores: None) -> Engine:
    return Engine.load(artifact)


def ask(engine: Engine, count: int = 1) -> float:
    """Return the score of equal requests, after checking that their answers are equal."""
    answers = engine.answer([REQUEST] * count)
    values = [answer.value for answer in answers if isinstance(answer, Answer)]
    assert len(values) == count and len({value["label"] for value in values}) == 1
    scores = [float(value["score"]) for value in values]
    assert scores == pytest.approx([scores[0]] * count, abs=1e-5)
    return scores[0]


def test_costs_are_learned_and_the_answers_stay(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traceserve_runtime.batching.measuring._ANSWERING", 0)
    alone = ask(engine)
    scheduler = engine.scheduler
    scheduler.make_ready()
    guessed = scheduler.lanes
    ended = time.monotonic() + 60
    while scheduler.lanes is guessed and time.monotonic() < ended:
        assert ask(engine, 5) == pytest.approx(alone, abs=1e-5)
        engine.idle()
    assert scheduler.lanes is not None and scheduler.lanes != guessed and scheduler.cost != GUESSED


def test_it_takes_a_small_part_of_the_time_and_none_of_the_first_answer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.scheduler.make_ready()
    monkeypatch.setattr(measuring, "_FIRST_ANSWERING", 1.0)  # on a busy machine the first answer may take a while
    measured = 0

    def runs() -> Iterator[float]:
        nonlocal measured
        while True:
            measured += 1
            yield 0.001

    engine.scheduler._measuring = Measuring(runs())
    ask(engine)
    engine.idle()
    assert not measured
    engine.scheduler._measuring.answered(1.0)
    began = time.monotonic()
    while time.monotonic() < began + 0.5:
        ask(engine)
        before = measured
        ask(engine)
        assert measured == before  # never before an answer
        engine.idle()
    assert 3 <= measured <= (time.monotonic() - began) / 0.03


def test_a_full_batch_runs_side_by_side_before_anything_is_measured(engine: Engine) -> None:
    alone = ask(engine, 16)
    engine.scheduler.open_lanes()
    stats = Stats()
    engine.answer([REQUEST] * 16, stats)
    assert stats.micro_batches > 1 and engine.scheduler.cost == GUESSED
    assert ask(engine, 16) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, IndexError, TypeError, ValueError])
def test_what_cannot_be_measured_is_guessed(
    kind: Type[Exception], engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    own = engine.runner

    class Broken:
        """Fails on measured runs: no request has their shapes."""

        def __call__(self, inputs: Arrays) -> Arrays:
            if len({*inputs["input_ids"].ravel()}) == 1:
                raise kind("not enough memory")
            return own(inputs)

        def __getattr__(self, name: str) -> Any:
            return getattr(own, name)

    broken: Any = Broken()
    engine = Engine(engine.folder, engine.manifest, engine.task, broken)
    engine.scheduler.make_ready()
    guessed = engine.scheduler.lanes
    with caplog.at_level(logging.WARNING):
        ended = time.monotonic() + 60
        while not caplog.text and time.monotonic() < ended:
            ask(engine)
            engine.idle()
    assert isinstance(guessed, Lanes) and engine.scheduler.lanes is guessed and engine.scheduler.cost == GUESSED
    assert "could not be measured, and is guessed: not enough memory" in caplog.text
    ask(engine, 5)
    assert caplog.text.count("guessed") == 1
