"""Tasks that run once, in turns: requests join whenever they come, take turns by rows, and are answered as if alone."""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, cast

import numpy as np
import pytest
from conftest import Called, finish, joined, left_behind, run_export
from oracle import rounded
from traceserve.building.gate.texts import SENTENCES, VERY_LONG
from traceserve_runtime import rounds, service
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine, Work
from traceserve_runtime.errors import InvalidRequest, TraceserveError
from traceserve_runtime.pending import Unrun
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.rounds import Rounds
from traceserve_runtime.runner import Arrays
from traceserve_runtime.service import Call, Service
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Job, Request
from transformer_handler import TransformerHandler

ENTAILMENT = {0: "contradiction", 1: "neutral", 2: "entailment"}
OPTIONS: Dict[str, Dict[str, Any]] = {
    "sequence_classification": {"id2label": {0: "red", 1: "green", 2: "blue"}},
    "token_classification": {"id2label": {0: "O", 1: "B-X", 2: "I-X"}},
    "question_answering": {},
    "fill_mask": {},
    "feature_extraction": {},
    "text_ranking": {"num_labels": 1},
    "zero_shot_classification": {"id2label": ENTAILMENT, "label2id": {name: i for i, name in ENTAILMENT.items()}},
}
TEXTS = [text for text in SENTENCES if text]
LONG = VERY_LONG[:1200]  # 13 windows

Make = Callable[[str], Engine]


@pytest.fixture(scope="module")
def engine_of(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    @lru_cache(maxsize=None)
    def make(task: str) -> Engine:
        folder = tmp_path_factory.mktemp("turns") / task
        source = checkpoint("bert", TASKS[task].auto_model, **OPTIONS[task])
        run_export(folder, {"model_name": str(source), "task": task, "max_length": 32})
        return Engine.load(folder)

    return make


@pytest.fixture(scope="module")
def engine(engine_of: Make) -> Engine:
    return engine_of("sequence_classification")


def request_for(task: str, chosen: random.Random, group: Optional[int]) -> Request:
    """Return a request of one row or of many."""
    text = chosen.choice([chosen.choice(TEXTS)] * 4 + [LONG])
    others = [*chosen.sample(TEXTS, chosen.randint(2, 9)), text]
    parameters: Dict[str, Any] = {"long_inputs": chosen.choice(["window", "window", "truncate"])}
    inputs: Dict[str, Any] = {"text": text}
    if task == "question_answering":
        inputs = {"question": "What is it?", "context": text}
    elif task == "fill_mask":
        inputs = {"text": f"[MASK] {text}"}
    elif task == "text_ranking":
        inputs = {"query": "a small boat", "documents": others}
    elif task == "zero_shot_classification":
        parameters["candidate_labels"] = [f"label {i}" for i in range(len(others))]
    elif task == "feature_extraction":
        parameters["pooling"] = "mean"
    elif task == "sequence_classification":
        parameters["top_k"] = None
    return Request(inputs, parameters, group)


def value_of(result: Any) -> Any:
    return result.value if isinstance(result, Answer) else (type(result), result.message)


@pytest.mark.parametrize("task", OPTIONS)
def test_each_is_answered_as_alone_whatever_joins_when(task: str, engine_of: Make) -> None:
    engine, chosen = engine_of(task), random.Random(task)
    sent = [[request_for(task, chosen, group) for _ in range(chosen.choice([1, 1, 1, 5]))] for group in range(20)]
    sent[7] = [Request({**sent[7][0].inputs}, {**sent[7][0].parameters, "long_inputs": "reject"}, 7)]
    alone = [[value_of(each) for each in engine.answer(own)] for own in sent]
    assert len({str(each) for own in alone for each in own}) > 15
    for seed, seconds in enumerate((0.0, 0.002, 0.02, math.inf)):
        arrivals = list(range(len(sent)))
        random.Random(seed).shuffle(arrivals)
        found = joined(Work(engine, Stats(), seconds), [sent[i] for i in arrivals], chosen)
        for i, pending in zip(arrivals, found):
            assert [value_of(each.answer()) for each in pending] == [rounded(each, 1e-5) for each in alone[i]]
        assert len(found) == len(alone)


@pytest.mark.parametrize("task", OPTIONS)
def test_nothing_is_left_behind_by_an_answered_call(task: str, engine_of: Make) -> None:
    request = request_for(task, random.Random(0), None)
    body = {**request.inputs, "parameters": request.parameters}
    assert left_behind(Service(engine_of(task), "turns"), Call({"body": body}, Headers("application/json"))) == []


def texts(count: int, group: int, text: str = "Yes.") -> List[Request]:
    """Return one client's requests, each of one row."""
    return [Request({"text": text}, {}, group) for _ in range(count)]


def test_a_short_request_is_answered_while_a_long_one_runs(engine: Engine) -> None:
    work = Work(engine, Stats(), 0.0)  # one row in each turn
    [long] = work.join([Request({"text": LONG}, {}, 0)], [None])
    for _ in range(3):
        work.turn()
    [short] = work.join(texts(1, 1), [None])
    turns = 0
    while not short.done:
        work.turn()
        turns += 1
    assert turns <= 2 and not long.done
    assert finish(work) > 3 and isinstance(long.answer(), Answer)


def test_clients_take_turns_by_rows_and_not_by_requests(engine: Engine) -> None:
    """A list of many texts is one client, as is a text of many windows."""
    work = Work(engine, Stats(), 0.0)
    many = work.join(texts(40, 0), [None] * 40)
    [windows] = work.join([Request({"text": LONG}, {}, 1)], [None])
    for _ in range(4):
        work.turn()
    few = work.join(texts(2, 2), [None] * 2)
    for _ in range(6):
        work.turn()
    assert all(each.done for each in few) and not windows.done
    assert [each.done for each in many].count(True) in (3, 4, 5)
    finish(work)


def test_a_request_that_nobody_waits_for_is_computed_no_further(engine: Engine) -> None:
    stats = Stats()
    work = Work(engine, stats, 0.0)
    [long] = work.join([Request({"text": LONG}, {}, 0)], [None])
    many = work.join(texts(40, 1), [None] * 40)
    stays = work.join(texts(3, 2), [None] * 3)
    for _ in range(3):
        work.turn()
    for each in [long, *many]:
        work.leave(each)
    assert finish(work) == 2 and stats.rows == 3 + 2
    assert all(isinstance(each.answer(), Answer) for each in stays)
    [later] = work.join(texts(1, 3), [None])
    finish(work)
    assert later.done


def test_one_that_leaves_before_it_is_read_is_not_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    work, stats = Work(engine, Stats(), 0.0), Stats()
    goes = work.join(texts(5, 0), [None] * 5)
    for each in goes:
        work.leave(each)
    monkeypatch.setattr(engine.task, "tokenize", lambda requests, parts: [] if not requests else pytest.fail("read"))
    assert finish(work) == 1 and stats.rows == 0


class Timed:
    """A runner that needs a tenth of a millisecond per token, and notes the tokens of each turn."""

    def __init__(self) -> None:
        self.tokens: List[int] = [0]

    def __call__(self, inputs: Arrays) -> Arrays:
        size = inputs["input_ids"].size
        self.tokens[-1] += size
        time.sleep(1e-4 * size)
        return {"logits": np.zeros((len(inputs["input_ids"]), 3), dtype=np.float32)}


def test_a_turn_lasts_about_as_long_as_it_should(engine: Engine) -> None:
    timed = Timed()
    own = Engine(engine.folder, engine.manifest, engine.task, Called(timed))  # type: ignore[arg-type]
    work = Work(own, Stats(), 0.05)
    work.join([request for i in range(8) for request in texts(30, i, VERY_LONG[:60])], [None] * 240)
    while work.busy:
        work.turn()
        timed.tokens.append(0)
    assert sum(timed.tokens) >= 240 * 10 and len(timed.tokens) > 10
    assert 150 < statistics.median(timed.tokens[3:-2]) < 700  # 500 where sleeping is all that costs time


def test_without_limit_all_runs_in_one_turn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the gate and a host without joining calls need it."""
    runs: List[int] = []
    run = engine.run

    def counted(jobs: Sequence[Job], stats: Stats) -> Any:
        runs.append(len(jobs))
        return run(jobs, stats)

    monkeypatch.setattr(engine, "run", counted)
    engine.answer([*texts(100, 0), *texts(50, 1)])
    assert runs == [150]


def test_memory_holds_the_rows_of_few_long_requests(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten wait with their text alone; a short one that comes later is read and answered before most of them."""
    read: List[int] = []
    tokenize = engine.task.tokenize

    def noted(requests: Sequence[Request], parts: Any) -> Any:
        read.extend(request.group or 0 for request in requests)
        return tokenize(requests, parts)

    limits = engine.task.tokenizer.limits
    monkeypatch.setattr(engine.task.tokenizer, "limits", limits._replace(characters=len(LONG) * 2))
    monkeypatch.setattr(engine.task, "tokenize", noted)
    work = Work(engine, Stats(), 0.0)
    long = work.join([Request({"text": LONG}, {}, i) for i in range(10)], [None] * 10)
    for _ in range(5):
        work.turn()
    assert read == [0, 1]
    [short] = work.join(texts(1, 10, "Yes."), [None])
    turns = 0
    while not short.done:
        work.turn()
        turns += 1
    assert turns <= 3 and read == [0, 1, 10]
    finish(work)
    assert read == [0, 1, *read[2:]] and sorted(read) == list(range(11)) and all(each.done for each in long)


# As a service


def call(body: Any) -> Call:
    return Call({"body": json.dumps(body).encode()}, Headers("application/json"))


@pytest.fixture
def rows_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(rounds, "_SECONDS", 0.0)


@pytest.mark.usefixtures("rows_one_by_one")
def test_calls_that_join_later_have_limits_of_their_own(engine: Engine) -> None:
    """The tokens of calls that are read in one turn are not added up, whenever they came."""
    full = [" ".join(["."] * 30)] * 40  # of 64 that one call may have
    session = Service(engine, "turns").session(Stats())
    [one] = session.join([call(full)], [None])
    [two] = session.join([call(full)], [None])
    while session.busy:
        session.turn()
    assert one.reply is not None and two.reply is not None
    assert (one.reply.status, two.reply.status) == (200, 200)


@pytest.mark.usefixtures("rows_one_by_one")
def test_rounds_answer_a_short_call_before_a_long_one(engine: Engine) -> None:
    going = Rounds(Service(engine, "turns"))
    bodies: Dict[str, Any] = {"long": {"text": LONG}, "short": {"text": "Yes."}, "gone": ["Yes."] * 50}
    expected = {
        name: json.loads(Service(engine, "turns").answer([call(body)])[0].body) for name, body in bodies.items()
    }

    def go_on(*ids: str) -> Dict[str, Any]:
        parts = going.go_on(ids, lambda i: call(bodies[ids[i]]))
        return {part_id: json.loads(part.reply.body) for part_id, part in zip(ids, parts) if part is not None}

    assert go_on("long", "gone") == {} == go_on("long", "gone")
    rows = going._stats.rows
    found: List[Tuple[str, Any]] = []
    ids = ["long", "short"]
    while ids:
        found += go_on(*ids).items()
        ids = [each for each in ids if each not in dict(found)]
    assert [name for name, _ in found] == ["short", "long"]
    assert all(answer == rounded(expected[name], 1e-5) for name, answer in found)
    assert going._stats.rows - rows < 50  # that of the one who went were not run


class Round:
    """TorchServe's context of one round, as far as the handler uses it."""

    metrics = None
    model_yaml_config = {"continuousBatching": True}

    def __init__(self, ids: Sequence[str]) -> None:
        self.request_ids = dict(enumerate(ids))
        self.stopping_criteria: Dict[int, Any] = {}

    def get_request_id(self, index: int) -> str:
        return self.request_ids[index]

    def get_all_request_header(self, index: int) -> Dict[str, str]:
        return {"Content-Type": "application/json"}

    def set_response_header(self, index: int, key: str, value: str) -> None:
        pass


@pytest.mark.usefixtures("rows_one_by_one")
def test_nobody_waits_only_after_the_last_answer(engine: Engine) -> None:
    """A message that says so lets the worker measure runs and give back memory, which clients must not wait for."""
    handler, told = TransformerHandler(), []
    handler.engine = engine
    handler._reader = SimpleNamespace(answered=lambda: told.append(handler._rounds))  # type: ignore[assignment]
    rows = {"long": {"body": {"text": LONG}}, "short": {"body": {"text": "Yes."}}}
    waiting, answered = ["long", "short"], []
    while waiting:
        context: Any = Round(waiting)
        handler.handle([rows[each] for each in waiting], context)
        now = [context.request_ids[i] for i in context.request_ids]
        answered += now
        waiting = [each for each in waiting if each not in now]
        assert bool(told) == (not waiting)
    assert answered == ["short", "long"]


def test_an_error_in_one_turn_fails_its_own_request(engine: Engine) -> None:
    [encoded] = engine.task.encode([Request({"text": "zzzz"})])
    assert not isinstance(encoded, TraceserveError)
    poison = encoded.rows[0].encoding.ids[1]

    def fails(inputs: Arrays) -> Arrays:
        if (inputs["input_ids"][:, 1] == poison).any():
            raise RuntimeError("broken")
        return engine.runner(inputs)

    own = Engine(engine.folder, engine.manifest, engine.task, Called(fails))  # type: ignore[arg-type]
    work = Work(own, Stats(), 0.01)
    good = work.join(texts(20, 0), [None] * 20)
    [bad] = work.join([Request({"text": "zzzz"}, {}, 1)], [None])
    [refused] = work.join([Request({"text": LONG}, {"long_inputs": "reject"}, 2)], [None])
    finish(work)
    assert all(isinstance(each.answer(), Answer) for each in good)
    assert "broken" in str(bad.answer()) and not isinstance(bad.answer(), InvalidRequest)
    assert isinstance(refused.answer(), TraceserveError)


def test_a_row_that_waits_for_others_keeps_its_own_outputs_alone() -> None:
    """Others' rows ran with it, and are in the same array."""
    together = np.zeros((64, 1000), dtype=np.float32)
    unrun = Unrun(cast(Any, None), cast(Any, SimpleNamespace(rows=[1, 2])))
    unrun.keep(0, {"x": together[3]})
    unrun.keep(1, {"x": together[4]})
    outputs = unrun.outputs()
    assert outputs is not None
    assert [isinstance(each, dict) and each["x"].base is None for each in outputs] == [True, False]
