"""Requests come first, and a worker's own measurements go between them."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List

import pytest
import torch
from traceserve_runtime.batching import Arrays, CostModel
from traceserve_runtime.engine import Answer, Engine
from traceserve_runtime.tasks.contract import Request
from traceserve_runtime.turns import Turns

REQUEST = Request({"text": "Where is my parcel?"})


def test_one_computes_at_a_time() -> None:
    turns, running, most = Turns(), 0, 0

    def compute(kind: str) -> None:
        nonlocal running, most
        with turns.request() if kind == "request" else turns.measurement():
            running += 1
            most = max(most, running)
            time.sleep(0.001)
            running -= 1

    with ThreadPoolExecutor(5) as pool:
        measuring = pool.submit(lambda: [compute("measurement") for _ in range(40)])
        for done in [measuring, *(pool.submit(compute, "request") for _ in range(80))]:
            done.result(60)
    assert (running, most) == (0, 1)


def test_requests_pass_a_measurement_which_comes_in_the_end() -> None:
    turns, order = Turns(), []
    began = threading.Event()

    def measure() -> None:
        with turns.measurement():
            order.append("first measurement")
            began.set()
            while turns._waiting < 3:
                time.sleep(0.001)
        with turns.measurement():
            order.append("second measurement")

    def ask() -> None:
        with turns.request():
            order.append("request")

    with ThreadPoolExecutor(4) as pool:
        measuring = pool.submit(measure)
        assert began.wait(60)
        asking = [pool.submit(ask) for _ in range(3)]
        for done in (measuring, *asking):
            done.result(60)
    assert order == ["first measurement", "request", "request", "request", "second measurement"]


def test_a_measurement_is_not_kept_off_for_ever() -> None:
    turns, ended = Turns(), threading.Event()

    def ask() -> None:
        while not ended.is_set():
            with turns.request():
                time.sleep(0.002)

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]  # one of them always waits
        try:
            for _ in range(3):
                with turns.measurement():
                    pass
        finally:
            ended.set()
        for done in asking:
            done.result(60)


def test_what_fails_gives_its_turn_back() -> None:
    turns = Turns()
    for turn in (turns.request, turns.measurement):
        with pytest.raises(RuntimeError, match="no kernel"), turn():
            raise RuntimeError("no kernel")
    with turns.request():
        pass


def test_measured_beside_requests_the_answers_stay(artifact: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine = Engine.load(artifact)
        [alone] = engine.answer([REQUEST])
        measuring = threading.Thread(target=engine.measure_between_requests)
        measuring.start()
        together: List[object] = []
        while measuring.is_alive() or not together:
            together += engine.answer([REQUEST] * 5)
    finally:
        torch.set_num_threads(before)
    assert engine.lanes is not None and engine.cost != CostModel()
    assert isinstance(alone, Answer)
    for answer in together:
        assert isinstance(answer, Answer)
        assert answer.value["label"] == alone.value["label"]
        assert answer.value["score"] == pytest.approx(alone.value["score"], abs=1e-5)


def test_without_a_request_it_is_measured_too(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traceserve_runtime.engine._LONGEST_WAIT", 0.05)
    engine = Engine.load(artifact)
    engine.measure_between_requests()
    assert engine.cost != CostModel()


def test_what_cannot_be_measured_is_guessed(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine.load(artifact)
    engine.answer([REQUEST])

    def broken(inputs: Arrays) -> Arrays:
        raise RuntimeError("not enough memory")

    engine.runner = broken  # type: ignore[assignment]  # is run once only
    with caplog.at_level(logging.WARNING):
        engine.measure_between_requests()
    assert engine.lanes is None and engine.cost == CostModel()
    assert "could not be measured, and is guessed: not enough memory" in caplog.text
