"""Parallel micro-batches: nothing is lost or changed, and they are never later than sequential ones."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence, Set

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from traceserve.building.gate.texts import SENTENCES, VERY_LONG
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.batching.costs import CostModel
from traceserve_runtime.batching.lanes import Batches, Lanes, schedule
from traceserve_runtime.batching.plan import plan_batches
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import ModelFailure
from traceserve_runtime.manifest import Shapes
from traceserve_runtime.runner import Arrays, Padding
from traceserve_runtime.tasks.contract import Answer, Request

quick = settings(deadline=None, max_examples=150, database=None)
TEXTS = [*SENTENCES, VERY_LONG[:1500], *(" ".join(SENTENCES[i : i + 2]) for i in range(3, 8))]
SHAPES = [Shapes(), Shapes((32, 512)), Shapes(batches=(1, 4, 16)), Shapes((64, 512), (1, 8))]
lengths_of_rows = st.lists(st.integers(1, 512), min_size=1, max_size=80)
costs = st.builds(
    CostModel, st.floats(1, 500), st.floats(0.5, 4), st.floats(0, 0.05), st.sampled_from([Padding(), Padding(0.1)])
)


@pytest.fixture(scope="module")
def threads() -> Iterator[List[ThreadPoolExecutor]]:
    pools = [ThreadPoolExecutor(1) for _ in range(4)]
    yield pools
    for pool in pools:
        pool.shutdown()


def total(batches: Batches, lengths: Sequence[int], shapes: Shapes, cost: CostModel) -> float:
    return sum(
        cost(shapes.batch(len(b)), shapes.length(max(lengths[i] for i in b)), sum(lengths[i] for i in b))
        for b in batches
    )


@quick
@given(lengths_of_rows, st.sampled_from(SHAPES), costs, costs, st.integers(2, 4), st.sampled_from([16384, 600]))
@example([10] * 64, Shapes(), CostModel(), CostModel().scaled(2), 2, 16384)
@example([512, 1], Shapes(), CostModel(), CostModel(), 4, 16384)
def test_a_schedule_covers_every_row_once_and_keeps_the_limits(
    threads: List[ThreadPoolExecutor],
    lengths: List[int],
    shapes: Shapes,
    together: CostModel,
    alone: CostModel,
    count: int,
    most_tokens: int,
) -> None:
    planned = schedule(lengths, shapes, together, Lanes(threads[:count], alone), most_tokens)
    assert 1 <= len(planned) <= count and all(planned)
    batches = [batch for lane in planned for batch in lane]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= (max(shapes.batches) if shapes.batches else 64)
        assert len(batch) == 1 or len(batch) * shapes.length(max(lengths[i] for i in batch)) <= most_tokens
    # By the model it is never later done than all cores are, one micro-batch after another.
    one_by_one = total(plan_batches(lengths, shapes, together, most_tokens), lengths, shapes, together)
    if len(planned) == 1:
        assert total(planned[0], lengths, shapes, together) == pytest.approx(one_by_one)
    else:
        assert max(total(lane, lengths, shapes, alone) for lane in planned) <= one_by_one * (1 + 1e-9)


def test_a_single_row_has_all_cores(threads: List[ThreadPoolExecutor]) -> None:
    assert schedule([9], Shapes(), CostModel(), Lanes(threads, CostModel())) == [[[0]]]
    assert schedule([], Shapes(), CostModel(), Lanes(threads, CostModel())) == [[]]


def test_lanes_share_the_work_where_they_are_as_fast(threads: List[ThreadPoolExecutor]) -> None:
    planned = schedule([10] * 64, Shapes(), CostModel(), Lanes(threads, CostModel().scaled(2)))
    assert [sum(map(len, lane)) for lane in planned] == [16] * 4


def test_slow_lanes_are_not_used(threads: List[ThreadPoolExecutor]) -> None:
    assert len(schedule([10] * 64, Shapes(), CostModel(), Lanes(threads[:2], CostModel().scaled(3)))) == 1


def test_where_padding_costs_little_a_lane_has_one_run_of_as_many_tokens(threads: List[ThreadPoolExecutor]) -> None:
    lengths = [*range(5, 45)]
    alone = CostModel(attention=0.0, padding=Padding(0.0))
    planned = schedule(lengths, Shapes(), CostModel().scaled(9), Lanes(threads[:2], alone))
    assert [len(lane) for lane in planned] == [1, 1]
    tokens = [sum(lengths[i] for i in batch) for [batch] in planned]
    assert abs(tokens[0] - tokens[1]) <= max(lengths)
    padded = schedule(lengths, Shapes(), CostModel().scaled(9), Lanes(threads[:2], CostModel(attention=0.0)))
    assert sum(map(len, padded)) > 2


def test_a_long_row_keeps_no_lane_waiting(threads: List[ThreadPoolExecutor]) -> None:
    """It has its own lane, and the short ones fill the others."""
    lengths = [400, *[10] * 40]
    planned = schedule(lengths, Shapes(), CostModel(), Lanes(threads[:2], CostModel()))
    [own] = [lane for lane in planned if [0] in lane]
    assert len(planned) == 2 and sum(map(len, own)) < 15


def test_lanes_run_side_by_side_and_all_end_before_an_error(threads: List[ThreadPoolExecutor]) -> None:
    lanes = Lanes(threads[:2], CostModel())
    both = threading.Barrier(2)
    seen: Set[int] = set()

    def act(batches: Batches) -> int:
        both.wait(10)
        if batches == [[0]]:
            raise KeyError("zero")
        time.sleep(0.05)
        seen.add(threading.get_ident())
        return len(batches)

    assert lanes.run(act, [[[1]], [[2], [3]]]) == [1, 2]
    assert len(seen) == 2
    seen.clear()
    with pytest.raises(KeyError, match="zero"):
        lanes.run(act, [[[0]], [[1]]])
    assert len(seen) == 1


def test_what_is_computed_side_by_side_takes_as_long_as_the_longest() -> None:
    stats = Stats(requests=5, rows=1, model_seconds=1.0)
    stats.add(Stats(0, 2, 10, 12, 1, 0.5), Stats(0, 3, 20, 24, 2, 0.25))
    assert stats == Stats(5, 6, 30, 36, 3, 1.5)


@pytest.fixture
def engine(artifact: Path, two_cores: None) -> Engine:
    engine = Engine.load(artifact)
    engine.warm_up()
    scheduler = engine.scheduler
    scheduler.measure()
    assert scheduler.lanes is not None and len(scheduler.lanes.threads) == 2
    scheduler.lanes = Lanes(scheduler.lanes.threads, scheduler.cost)  # as fast as all cores: always worth it
    return engine


def ask(engine: Engine, texts: Sequence[str], stats: Optional[Stats] = None) -> List[Any]:
    return engine.answer([Request({"text": text}, {"top_k": None}) for text in texts], stats)


def test_side_by_side_the_answers_are_the_same(engine: Engine) -> None:
    used: Set[str] = set()
    own = engine.runner

    class Watched:
        padding = Padding()

        def __call__(self, inputs: Arrays) -> Arrays:
            used.add(threading.current_thread().name)
            assert torch.get_num_threads() == 1
            return own(inputs)

    engine.runner = Watched()  # type: ignore[assignment]  # is run once only
    stats = Stats()
    together = ask(engine, TEXTS, stats)
    assert len(used) == 2
    assert stats.requests == len(TEXTS) < stats.rows and stats.model_seconds > 0
    engine.runner = own
    for text, answer in zip(TEXTS, together):
        [alone] = ask(engine, [text])
        assert isinstance(answer, Answer) and [item["label"] for item in answer.value] == [
            item["label"] for item in alone.value
        ]
        scores = [[item["score"] for item in each.value] for each in (answer, alone)]
        assert np.allclose(scores[0], scores[1], atol=1e-5)


def test_a_single_text_has_all_threads(engine: Engine) -> None:
    own, seen = engine.runner, []

    class Watched:
        padding = Padding()

        def __call__(self, inputs: Arrays) -> Arrays:
            seen.append(torch.get_num_threads())
            return own(inputs)

    engine.runner = Watched()  # type: ignore[assignment]  # is run once only
    ask(engine, ["Yes."])
    assert seen == [2]


def test_a_row_that_fails_fails_alone(engine: Engine) -> None:
    [marker] = engine.task.encode([Request({"text": "zzzz"}, {})])
    own, marked = engine.runner, marker.rows[0].encoding.ids[1]  # type: ignore[union-attr]

    class Broken:
        padding = Padding()

        def __call__(self, inputs: Arrays) -> Arrays:
            if (inputs["input_ids"][:, 1] == marked).any():
                raise RuntimeError("the input is poison")
            return own(inputs)

    engine.runner = Broken()  # type: ignore[assignment]  # is run once only
    texts = ["zzzz", *TEXTS[:12]]
    answers = ask(engine, texts)
    failed = [text for text, answer in zip(texts, answers) if isinstance(answer, ModelFailure)]
    assert failed == ["zzzz"] and sum(isinstance(answer, Answer) for answer in answers) == 12


def test_one_thread_has_no_lanes(artifact: Path, two_cores: None) -> None:
    torch.set_num_threads(1)
    engine = Engine.load(artifact)
    engine.scheduler.measure()
    assert engine.scheduler.lanes is None


def test_without_measuring_nothing_runs_side_by_side(artifact: Path, two_cores: None) -> None:
    engine = Engine.load(artifact)
    engine.warm_up()
    assert engine.scheduler.lanes is None and engine.scheduler.cost == CostModel(padding=engine.runner.padding)
