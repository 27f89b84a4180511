"""The loop that texts join and leave: whatever joins when, each is answered as alone."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import pytest
from conftest import run_export
from oracle import rounded
from traceserve.building import attempt
from traceserve.building.gate.texts import SENTENCES, VERY_LONG
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine, Pending, Work
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request

TASK = {
    "gpt2": "text_generation",
    "llama": "text_generation",
    "bloom": "text_generation",
    "mamba": "text_generation",  # rereads everything at each step
    "t5": "text2text_generation",
    "marian": "text2text_generation",
}
MODES = [
    *((architecture, "torchscript") for architecture in TASK if architecture != "mamba"),
    ("mamba", "pretrained"),
    *((architecture, mode) for architecture in ("llama", "t5") for mode in ("onnx", "pretrained")),
    *((architecture, "openvino") for architecture in ("llama", "bloom", "t5")),
]
TEXTS = [*(text for text in SENTENCES if text), VERY_LONG[:60], VERY_LONG[:250]]
KINDS: List[Dict[str, Any]] = [
    {"num_beams": 1, "max_new_tokens": 5},
    {"num_beams": 1, "max_new_tokens": 40},
    {"num_beams": 3, "max_new_tokens": 12},
    {"num_beams": 2, "max_new_tokens": 25, "early_stopping": True},
    {"seed": 7, "temperature": 0.7, "max_new_tokens": 20},
    {"num_beams": 1, "max_new_tokens": 30, "stop": ["e", "t"]},
    {"num_beams": 1, "max_new_tokens": 15, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    {"num_beams": 1, "max_new_tokens": 9, "details": True, "top_n_tokens": 2},
    {"num_beams": 1, "max_new_tokens": 1},
]

Make = Callable[[str, str], Engine]


@pytest.fixture(scope="module")
def engine_of(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    @lru_cache(maxsize=None)
    def make(architecture: str, save_mode: str) -> Engine:
        source = checkpoint(architecture, TASKS[TASK[architecture]].auto_model)
        folder = tmp_path_factory.mktemp("loop") / f"{architecture}-{save_mode}"
        own = {"model_name": str(source), "task": TASK[architecture], "save_mode": save_mode, "max_length": 128}
        with pytest.MonkeyPatch.context() as patch:  # it takes as long as the rest
            patch.setattr(attempt, "measure_speeds", lambda folders, *rest: dict.fromkeys(folders, 1.0))
            run_export(folder, own)
        return Engine.load(folder)

    return make


def requests_for(seed: int, count: int) -> List[Request]:
    chosen = random.Random(seed)
    limits = {"long_inputs": "truncate"}
    return [Request({"text": chosen.choice(TEXTS)}, {**limits, **chosen.choice(KINDS)}) for _ in range(count)]


def joined(engine: Engine, requests: Sequence[Request], seed: int) -> Tuple[List[Pending], Stats]:
    """Answer requests that join at random turns, a few at a time."""
    chosen, stats = random.Random(seed), Stats()
    work, waiting, pending = Work(engine, stats), list(requests), []
    while waiting or work.busy:
        if waiting and chosen.random() < 0.4:
            some = [waiting.pop(0) for _ in range(min(len(waiting), chosen.randint(1, 4)))]
            pending += work.join(some, [None] * len(some))
        work.turn()
    return pending, stats


def value_of(result: Any) -> Any:
    assert isinstance(result, Answer), result
    return result.value


@pytest.mark.parametrize("architecture, save_mode", MODES)
@pytest.mark.combinations
def test_each_is_answered_as_alone_whatever_joins_when(architecture: str, save_mode: str, engine_of: Make) -> None:
    engine = engine_of(architecture, save_mode)
    requests = requests_for(len(architecture), 24)
    alone = [value_of(engine.answer([request])[0]) for request in requests]
    assert len(set(map(str, alone))) > 12
    order = list(range(len(requests)))
    for seed in range(3):
        random.Random(seed).shuffle(order)
        pending, stats = joined(engine, [requests[i] for i in order], seed)
        assert all(each.done for each in pending) and stats.requests == len(requests)
        assert [value_of(each.answer()) for each in pending] == [rounded(alone[i], 1e-4) for i in order]


def test_a_decoders_texts_share_steps_whenever_they_joined(engine_of: Make) -> None:
    """Sixteen texts that join one turn after another take little more steps than the longest."""
    stats = Stats()
    work = Work(engine_of("llama", "torchscript"), stats)
    for text in TEXTS[:16]:
        work.join([Request({"text": text}, {"max_new_tokens": 40})], [None])
        work.turn()
    while work.busy:
        work.turn()
    assert stats.rows == 16 and stats.micro_batches < 16 + 40 + 16  # each is read by itself


def test_a_finished_text_is_answered_while_others_are_written(engine_of: Make) -> None:
    work = Work(engine_of("gpt2", "torchscript"), Stats())
    [long] = work.join([Request({"text": TEXTS[0]}, {"max_new_tokens": 60})], [None])
    for _ in range(10):
        work.turn()
    [short] = work.join([Request({"text": TEXTS[1]}, {"max_new_tokens": 3})], [None])
    turns = 0
    while not short.done:
        work.turn()
        turns += 1
    assert turns == 3 and not long.done and value_of(short.answer())


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_who_leaves_is_written_no_further(architecture: str, engine_of: Make) -> None:
    engine, stats = engine_of(architecture, "torchscript"), Stats()
    request = Request({"text": TEXTS[0]}, {"max_new_tokens": 30, "num_beams": 1})
    alone = value_of(engine.answer([request])[0])
    work = Work(engine, stats)
    stays, goes = work.join(
        [request, Request({"text": TEXTS[1]}, {"max_new_tokens": 90, "num_beams": 1})], [None, None]
    )
    for _ in range(5):
        work.turn()
    work.leave(goes)
    while work.busy:
        work.turn()
    assert value_of(stays.answer()) == alone
    assert stats.micro_batches <= 30 + 1


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_others_join_when_all_have_left(architecture: str, engine_of: Make) -> None:
    engine = engine_of(architecture, "torchscript")
    request = Request({"text": TEXTS[0]}, {"max_new_tokens": 30, "num_beams": 1})
    alone = value_of(engine.answer([request])[0])
    work = Work(engine, Stats())
    [goes] = work.join([Request({"text": TEXTS[1]}, {"max_new_tokens": 90, "num_beams": 1})], [None])
    work.turn()
    work.leave(goes)
    [stays] = work.join([request], [None])
    while work.busy:
        work.turn()
    assert value_of(stays.answer()) == alone


def test_room_that_only_a_long_prompt_needed_is_given_back(engine_of: Make) -> None:
    engine, lengths = engine_of("llama", "torchscript"), []
    own = engine.runner

    class Watched:
        def step(self, inputs: Any, state: Any, rows: Optional[np.ndarray] = None) -> Any:
            lengths.append(inputs["attention_mask"].shape)
            return own.step(inputs, state, rows)

        def __getattr__(self, name: str) -> Any:
            return getattr(own, name)

    watched: Any = Watched()
    requests = [
        Request({"text": VERY_LONG[:250]}, {"max_new_tokens": 3}),
        Request({"text": "Yes."}, {"max_new_tokens": 20}),
    ]
    alone = [value_of(engine.answer([request])[0]) for request in requests]
    watching = Engine(engine.folder, engine.manifest, engine.task, watched)
    assert list(map(value_of, watching.answer(requests))) == alone
    together = [length for rows, length in lengths if rows == 2]
    assert max(together) > 50 and lengths[-1][1] < 40


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_a_failed_step_changes_no_answer(architecture: str, engine_of: Make) -> None:
    """All that ran in it are written again, each by itself, while others join; only the one that breaks the model
    always has its error."""
    engine = engine_of(architecture, "torchscript")
    requests = requests_for(5, 10)
    alone = [value_of(engine.answer([request])[0]) for request in requests]
    [encoded] = engine.task.encode([Request({"text": "zzzz"})])
    assert not isinstance(encoded, TraceserveError)
    poison, own, failed = encoded.rows[0].encoding.ids[0], engine.runner, []

    class Failing:
        """Fails to read a prompt that begins with the token, and once at a step of several rows."""

        def start(self, inputs: Any) -> Any:
            first = inputs["attention_mask"].argmax(axis=1)
            if (inputs["input_ids"][np.arange(len(first)), first] == poison).any():
                raise RuntimeError("not enough memory")
            return own.start(inputs)

        def step(self, inputs: Any, state: Any, rows: Optional[np.ndarray] = None) -> Any:
            if not failed and rows is not None and len(rows) > 2:
                failed.append(len(rows))
                raise RuntimeError("not enough memory")
            return own.step(inputs, state, rows)

        def __getattr__(self, name: str) -> Any:
            return getattr(own, name)

    failing: Any = Failing()
    other = Engine(engine.folder, engine.manifest, engine.task, failing)
    pending, _ = joined(other, [*requests[:5], Request({"text": "zzzz"}, {"num_beams": 1}), *requests[5:]], 1)
    results = [each.answer() for each in pending]
    refused = results.pop(5)
    assert failed and [value_of(each) for each in results] == [rounded(value, 1e-4) for value in alone]
    assert isinstance(refused, TraceserveError) and "not enough memory" in refused.message
