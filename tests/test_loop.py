"""The loop that texts join and leave: whatever joins when, each is answered as alone."""

from __future__ import annotations

import gc
import math
import random
import time
import weakref
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import pytest
import transformers
from conftest import finish, joined, run_export
from oracle import rounded
from traceserve.building import attempt
from traceserve.building.gate.texts import SENTENCES, VERY_LONG
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine, Pending, Work, load_task
from traceserve_runtime.errors import ModelFailure, TraceserveError
from traceserve_runtime.generation import loop
from traceserve_runtime.generation.steps import IN_PARTS, LEAST_PART, DecoderFeed
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.service import Call, Service
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request

V4 = transformers.__version__.startswith("4.")
TASK = {
    "gpt2": "text_generation",
    "llama": "text_generation",
    "bloom": "text_generation",
    "mamba": "text_generation",  # rereads everything at each step
    **{name: "text_generation" for name in ("qwen3.5", "falcon-h1", "mamba2") if not V4},  # with states of a fixed size
    "t5": "text2text_generation",
    "marian": "text2text_generation",
}
MODES = [
    *((architecture, "torchscript") for architecture in TASK if architecture != "mamba"),
    ("mamba", "pretrained"),
    *((architecture, "pretrained") for architecture in ("qwen3.5", "mamba2") if architecture in TASK),
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


def joined_alone(
    engine: Engine, requests: Sequence[Request], seed: int, seconds: float = math.inf
) -> Tuple[List[Pending], Stats]:
    """Answer requests that join at random turns, each in a group of its own."""
    stats = Stats()
    groups = joined(Work(engine, stats, seconds), [[request] for request in requests], random.Random(seed))
    return [pending for [pending] in groups], stats


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
    for seed, seconds in enumerate((math.inf, math.inf, 0.0, 0.0, 0.003)):
        random.Random(seed).shuffle(order)
        pending, stats = joined_alone(engine, [requests[i] for i in order], seed, seconds)
        assert all(each.done for each in pending) and stats.requests == len(requests)
        assert [value_of(each.answer()) for each in pending] == [rounded(alone[i], 1e-4) for i in order]


def test_a_decoders_texts_share_steps_whenever_they_joined(engine_of: Make) -> None:
    """Sixteen texts that join one turn after another take little more steps than the longest."""
    stats = Stats()
    work = Work(engine_of("llama", "torchscript"), stats)
    for text in TEXTS[:16]:
        work.join([Request({"text": text}, {"max_new_tokens": 40})], [None])
        work.turn()
    finish(work)
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
    finish(work)
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
    finish(work)
    assert value_of(stays.answer()) == alone


def test_nothing_is_kept_of_texts_whose_clients_have_all_left(engine_of: Make) -> None:
    service = Service(engine_of("llama", "torchscript"), "loop")
    body = {"text": TEXTS[0], "parameters": {"max_new_tokens": 9}}
    call = Call({"body": body}, Headers("application/json"))
    [alone] = service.answer([call])
    session = service.session(Stats())
    exchanges = session.join([call, call], [None, None])
    session.turn()
    kept = [weakref.ref(member) for each in exchanges for pending in each.pending for member in pending.members]
    for each in exchanges:
        session.leave(each)
    gc.collect()
    assert len(kept) == 2 and not any(member() for member in kept)
    [joins] = session.join([call], [None])
    while session.busy:
        session.turn()
    assert joins.reply == alone


class Around:
    """A runner that does as another one, but for what its subclasses do."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


class Watched(Around):
    """A runner that notes the rows and positions of each step: those it reads, and all that it attends to.

    By its clock a run takes a millisecond, and each position that it reads a tenth of one.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.runner)
        self._clock = 0.0
        self.read: List[Tuple[int, int]] = []
        self.attended: List[Tuple[int, int]] = []

    def start(self, inputs: Any) -> Any:
        self._ran(inputs["input_ids"].size)
        return self._own.start(inputs)

    def step(self, inputs: Any, state: Any, rows: Optional[np.ndarray] = None) -> Any:
        self.read.append(inputs["input_ids"].shape)
        self.attended.append(inputs["attention_mask"].shape)
        self._ran(inputs["input_ids"].size)
        return self._own.step(inputs, state, rows)

    def perf_counter(self) -> float:
        return self._clock

    def _ran(self, positions: int) -> None:
        self._clock += 1e-3 + 1e-4 * positions


Watch = Callable[[Engine], Tuple[Engine, Watched]]


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Return a function that makes an engine of the same archive whose steps are noted, by whose clock parts are planned: the
    machine may stall for a moment."""

    def watch(engine: Engine) -> Tuple[Engine, Watched]:
        watched: Any = Watched(engine)
        monkeypatch.setattr(loop, "time", watched)
        return Engine(engine.folder, engine.manifest, engine.task, watched), watched

    return watch


def test_no_step_has_more_positions_than_the_model(engine_of: Make, watching: Watch) -> None:
    """Where one text takes another's room to the end, and is not long enough for it itself."""
    engine = engine_of("llama", "torchscript")
    words = VERY_LONG.split()

    def filling(least: int) -> Request:
        """Return a request whose prompt has at least so many tokens, and whose text takes all others."""
        texts = (" ".join(words[:count]) for count in range(len(words)))
        text, tokens = next((t, n) for t in texts for n in [len(engine.task.tokenizer.token_ids(t))] if n >= least)
        return Request({"text": text}, {"max_new_tokens": engine.manifest.max_length - tokens})

    requests = [filling(112), filling(103), filling(103)]
    alone = [value_of(engine.answer([request])[0]) for request in requests]
    watched_engine, watched = watching(engine)
    assert list(map(value_of, watched_engine.answer(requests))) == alone
    assert max(length for _, length in watched.attended) == engine.manifest.max_length


def test_room_that_only_a_long_prompt_needed_is_given_back(engine_of: Make, watching: Watch) -> None:
    engine = engine_of("llama", "torchscript")
    requests = [
        Request({"text": VERY_LONG[:250]}, {"max_new_tokens": 3}),
        Request({"text": "Yes."}, {"max_new_tokens": 20}),
    ]
    alone = [value_of(engine.answer([request])[0]) for request in requests]
    watched_engine, watched = watching(engine)
    assert list(map(value_of, watched_engine.answer(requests))) == alone
    together = [length for rows, length in watched.attended if rows == 2]
    assert max(together) > 50 and watched.attended[-1][1] < 40


@pytest.mark.parametrize("without_logits", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_a_failed_step_changes_no_answer(architecture: str, without_logits: bool, engine_of: Make) -> None:
    """All that ran in it are written again, each by itself, while others join; only the one that breaks the model
    always has its error."""
    engine = engine_of(architecture, "torchscript")
    requests = requests_for(5, 10)
    alone = [value_of(engine.answer([request])[0]) for request in requests]
    [encoded] = engine.task.encode([Request({"text": "zzzz"})])
    assert not isinstance(encoded, TraceserveError)
    poison = encoded.rows[0].encoding.ids[0]
    failed: List[int] = []

    class Failing(Around):
        """Fails to read a prompt that begins with the token, and once at a step of several rows."""

        def start(self, inputs: Any) -> Any:
            first = inputs["attention_mask"].argmax(axis=1)
            if (inputs["input_ids"][np.arange(len(first)), first] == poison).any():
                raise RuntimeError("not enough memory")
            return self._own.start(inputs)

        def step(self, inputs: Any, state: Any, rows: Optional[np.ndarray] = None) -> Any:
            if not failed and rows is not None and len(rows) > 2:
                failed.append(len(rows))
                if without_logits:
                    outputs, state = self._own.step(inputs, state, rows)
                    return {name: output[:, :0] for name, output in outputs.items()}, state
                raise RuntimeError("not enough memory")
            return self._own.step(inputs, state, rows)

    failing: Any = Failing(engine.runner)
    other = Engine(engine.folder, engine.manifest, engine.task, failing)
    pending, _ = joined_alone(other, [*requests[:5], Request({"text": "zzzz"}, {"num_beams": 1}), *requests[5:]], 1)
    results = [each.answer() for each in pending]
    refused = results.pop(5)
    assert failed and [value_of(each) for each in results] == [rounded(value, 1e-4) for value in alone]
    assert isinstance(refused, TraceserveError) and "not enough memory" in refused.message


def test_the_models_seconds_are_the_encoders_too(engine_of: Make) -> None:
    engine = engine_of("t5", "torchscript")

    class Slow(Around):
        def start(self, inputs: Any) -> Any:
            time.sleep(0.3)
            return self._own.start(inputs)

    slow: Any = Slow(engine.runner)
    stats = Stats()
    asked = [Request({"text": TEXTS[0]}, {"max_new_tokens": 1})]
    value_of(Engine(engine.folder, engine.manifest, engine.task, slow).answer(asked, stats)[0])
    assert stats.model_seconds >= 0.3


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize("kind", ["PanicException", "ValueError"])
def test_a_text_that_cannot_begin_fails_alone(
    kind: str, architecture: str, engine_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the tokenizer cannot decode its prompt; pyo3's panics are no Exception."""
    engine = engine_of(architecture, "torchscript")
    error = type(kind, (BaseException if kind == "PanicException" else Exception,), {})
    requests = [Request({"text": text}, {"max_new_tokens": 6, "num_beams": 1}) for text in TEXTS[:5]]
    alone = [value_of(engine.answer([request])[0]) for request in requests]
    begin, begun = engine.task.settings, []  # type: ignore[attr-defined]

    def settings(request: Request, *rest: Any) -> Any:
        begun.append(request.inputs["text"])
        if request.inputs["text"] == TEXTS[2]:
            raise error
        return begin(request, *rest)

    monkeypatch.setattr(engine.task, "settings", settings)
    results = engine.answer(requests)
    refused = results.pop(2)
    assert isinstance(refused, ModelFailure) and [value_of(each) for each in results] == [*alone[:2], *alone[3:]]
    # Nobody else's text was begun again.
    assert sorted(begun) == sorted([*TEXTS[:5], TEXTS[2]])


# Rows that wait


class Stepping(Around):
    """A runner that notes how many rows each step has."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.runner)
        self.rows: List[int] = []

    def step(self, inputs: Any, state: Any, rows: Optional[np.ndarray] = None) -> Any:
        outputs, state = self._own.step(inputs, state, rows)
        self.rows.append(len(outputs["logits"]))
        return outputs, state


def stepping(engine: Engine) -> Tuple[Engine, Stepping]:
    """Return an engine of the same archive whose rows are noted."""
    noted: Any = Stepping(engine)
    return Engine(engine.folder, engine.manifest, engine.task, noted), noted


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 5, 64])
def test_no_more_rows_are_written_than_gain_from_it(beams: int, architecture: str, engine_of: Make) -> None:
    """Each beam is one; those that wait have the same texts in the end."""
    own = engine_of(architecture, "torchscript")
    count = (1200 if architecture == "t5" else 300) // beams + 3
    asked = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": beams, "long_inputs": "truncate"}
    requests = [Request({"text": TEXTS[i % len(TEXTS)]}, asked) for i in range(count)]
    most = loop.MOST_ROWS * (4 if architecture == "t5" else 1)  # whose usual four beams have room
    alone = [value_of(own.answer([request])[0]) for request in requests[: len(TEXTS)]]
    engine, noted = stepping(own)
    work = Work(engine, Stats())
    pending = work.join(requests, [None] * count)
    while work.busy:
        noted.rows.clear()
        work.turn()
        # Those in the loop have a step each, and those that join one more.
        assert max(noted.rows) <= most and sum(noted.rows) <= 4 * most
    expected = [rounded(alone[i % len(alone)], 1e-4) for i in range(count)]
    assert [value_of(each.answer()) for each in pending] == expected


def test_a_text_with_many_beams_is_not_overtaken_for_ever(engine_of: Make) -> None:
    """There is always room for those that come later, as others end; but it waits only for those before it."""
    work = Work(engine_of("llama", "torchscript"), Stats())
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 1}
    small = [Request({"text": text[:20]}, asked) for text in TEXTS[:8]] * 2
    for _ in range(9):
        work.join(small, [None] * len(small))
        work.turn()
    wide = Request({"text": TEXTS[0]}, {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 64})
    [pending] = work.join([wide], [None])
    turns = 0
    while not pending.done and turns < 40:
        work.join(small, [None] * len(small))
        work.turn()
        turns += 1
    assert pending.done and turns < 20


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_one_with_more_beams_than_there_is_room_for_is_written_by_itself(
    architecture: str, engine_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = engine_of(architecture, "torchscript")
    many = Request({"text": TEXTS[0]}, {"max_new_tokens": 6, "num_beams": 9})
    requests = [Request({"text": text}, {"max_new_tokens": 6, "num_beams": 1}) for text in TEXTS[1:6]]
    requests.insert(2, many)
    alone = [value_of(own.answer([request])[0]) for request in requests]
    monkeypatch.setattr(loop, "MOST_ROWS", 2)
    monkeypatch.setattr(loop, "_BEAMS", 1)
    engine, noted = stepping(own)
    assert list(map(value_of, engine.answer(requests))) == alone
    assert set(noted.rows) <= {1, 2, 9}


# Prompts that are read in parts

LONG = Request({"text": VERY_LONG}, {"long_inputs": "truncate", "max_new_tokens": 4, "num_beams": 1})
SHORT = Request({"text": "Yes."}, {"max_new_tokens": 60, "min_new_tokens": 60, "num_beams": 1})


def turns_until(work: Work, *pending: Pending) -> int:
    turns = 0
    while not all(each.done for each in pending):
        work.turn()
        turns += 1
    return turns


@pytest.mark.parametrize("architecture, save_mode", MODES)
def test_the_build_finds_out_whether_prompts_can_be_read_so(architecture: str, save_mode: str, engine_of: Make) -> None:
    manifest = engine_of(architecture, save_mode).manifest
    possible = TASK[architecture] == "text_generation" and architecture != "mamba"
    assert manifest.runtime.get(IN_PARTS) == (True if possible else None)
    assert manifest.receipt.get(IN_PARTS, {}).get("passed") == (True if possible else None)
    if possible:
        assert 0 < manifest.receipt[IN_PARTS]["largest_difference"] < 1e-4


def test_nobodys_tokens_wait_for_a_long_prompt(engine_of: Make, watching: Watch) -> None:
    engine = engine_of("llama", "torchscript")
    alone = [value_of(each) for each in engine.answer([LONG, SHORT])]
    parts, watched = watching(engine)
    work = Work(parts, Stats(), 0.0)
    [short] = work.join([SHORT], [None])
    work.turn()
    [long] = work.join([LONG], [None])
    assert turns_until(work, long) > 3 and not short.done  # a token of the short one in each turn
    finish(work)
    assert [value_of(long.answer()), value_of(short.answer())] == alone
    read = [rows * positions for rows, positions in watched.read if positions > 1]
    assert max(read) < 64 and sum(read) < 140  # a turn reads for as long as it writes; nothing twice


def test_short_prompts_are_read_beside_a_long_one_which_goes_on(engine_of: Make, watching: Watch) -> None:
    engine, _ = watching(engine_of("llama", "torchscript"))
    work = Work(engine, Stats(), 0.0)
    [long] = work.join([LONG], [None])
    work.turn()
    quick = Request({"text": "Yes."}, {"max_new_tokens": 1, "num_beams": 1})
    alone = value_of(engine.answer([quick])[0])
    for _ in range(3):
        [short] = work.join([quick], [None])
        assert turns_until(work, short) == 1 and value_of(short.answer()) == alone
    assert turns_until(work, long) < 128 / LEAST_PART + 4


def test_long_prompts_are_read_one_after_another(engine_of: Make, watching: Watch) -> None:
    engine, _ = watching(engine_of("llama", "torchscript"))
    expected = value_of(engine.answer([LONG])[0])
    work = Work(engine, Stats(), 0.0)
    pending = work.join([LONG] * 3, [None] * 3)
    done: List[int] = []
    while work.busy:
        work.turn()
        done += [i for i, each in enumerate(pending) if each.done and i not in done]
    assert done == [0, 1, 2] and [value_of(each.answer()) for each in pending] == [expected] * 3


def test_who_leaves_while_it_is_read_is_read_no_further(engine_of: Make, watching: Watch) -> None:
    engine = engine_of("llama", "torchscript")
    parts, watched = watching(engine)
    work = Work(parts, Stats(), 0.0)
    goes, stays = work.join([LONG, LONG], [None, None])
    for _ in range(3):
        work.turn()
    work.leave(goes)
    finish(work)
    assert value_of(stays.answer()) == value_of(engine.answer([LONG])[0])
    assert sum(rows * positions for rows, positions in watched.read) < 3 * LEAST_PART + 128 + 4


def test_a_part_that_fails_changes_no_answer(engine_of: Make) -> None:
    engine = engine_of("llama", "torchscript")
    alone = [value_of(each) for each in engine.answer([LONG, SHORT])]
    failed: List[int] = []

    class Failing(Around):
        """Fails once in the middle of a prompt."""

        def step(self, inputs: Any, state: Any, rows: Optional[np.ndarray] = None) -> Any:
            read, attended = inputs["input_ids"].shape[1], inputs["attention_mask"].shape[1]
            if not failed and 1 < read < attended and attended > 60:
                failed.append(attended)
                raise RuntimeError("not enough memory")
            return self._own.step(inputs, state, rows)

    failing: Any = Failing(engine.runner)
    work = Work(Engine(engine.folder, engine.manifest, engine.task, failing), Stats(), 0.0)
    pending = work.join([LONG, SHORT], [None, None])
    finish(work)
    assert failed and [value_of(each.answer()) for each in pending] == alone


def test_an_archive_that_does_not_say_so_reads_prompts_whole(engine_of: Make, watching: Watch) -> None:
    """As one of an earlier version: whole prompts still take turns."""
    engine = engine_of("llama", "torchscript")
    runtime = {name: value for name, value in engine.manifest.runtime.items() if name != IN_PARTS}
    older = replace(engine.manifest, runtime=runtime)
    parts, watched = watching(engine)
    work = Work(Engine(engine.folder, older, load_task(engine.folder, older), parts.runner), Stats(), 0.0)
    pending = work.join([LONG, LONG], [None, None])
    work.turn()
    work.turn()
    finish(work)
    assert value_of(pending[0].answer()) == value_of(pending[1].answer())
    assert [shape for shape in watched.read if shape[1] > 1] == [watched.read[0]] * 2


def test_parts_get_longer_where_the_model_is_fast_and_nobody_writes(engine_of: Make, watching: Watch) -> None:
    parts, watched = watching(engine_of("llama", "torchscript"))
    work = Work(parts, Stats(), 0.05)  # this model reads thousands of positions in that time
    for _ in range(5):
        [long] = work.join([LONG], [None])
        finish(work)
    assert watched.read[-4] == (1, watched.attended[-4][1]) and watched.attended[-4][1] > 100


def test_a_model_that_reads_parts_otherwise_reads_prompts_whole(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here its positions begin again with each part."""
    read = DecoderFeed.read

    def begins_again(self: DecoderFeed, rows: np.ndarray, most: float) -> Optional[np.ndarray]:
        runner = self._runner
        if math.isinf(most) or isinstance(runner, Lost):
            return read(self, rows, most)
        self._runner = Lost(runner)  # type: ignore[assignment]
        return read(self, rows, most)

    class Lost(Around):
        def step(self, inputs: Any, state: Any, rows: Optional[np.ndarray] = None) -> Any:
            positions = inputs["position_ids"]
            if positions.shape[1] > 1:
                inputs = {**inputs, "position_ids": positions - positions[:, :1]}
            return self._own.step(inputs, state, rows)

    monkeypatch.setattr(DecoderFeed, "read", begins_again)
    source = checkpoint("llama", "AutoModelForCausalLM")
    own = {"model_name": str(source), "task": "text_generation", "max_length": 128, "dtype": "float32"}
    run_export(tmp_path / "model", own)
    manifest = Engine.load(tmp_path / "model").manifest
    assert manifest.runtime[IN_PARTS] is False and manifest.receipt["passed"]
    assert manifest.receipt[IN_PARTS]["largest_difference"] > 1e-3
