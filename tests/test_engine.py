"""The engine: batching never changes an answer, and failures affect only their own request."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple, Type

import numpy as np
import pytest
import tokenizers
import torch
from conftest import Called, run_export
from hypothesis import given, settings
from hypothesis import strategies as st
from traceserve.building.gate.texts import SENTENCES, VERY_LONG
from traceserve_runtime import failures
from traceserve_runtime.batching import costs, measuring
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.batching.costs import CostModel
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import (
    InputTooLong,
    InvalidManifest,
    InvalidRequest,
    MissingPackage,
    ModelFailure,
    TraceserveError,
)
from traceserve_runtime.manifest import Manifest, Shapes, sha256
from traceserve_runtime.runner import IN_ATTENTION, Arrays, Runner
from traceserve_runtime.runtimes.torchscript.weights import GRAPH_FILE, WEIGHTS_FILE
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Job, Request, Task
from traceserve_runtime.tasks.sequence_classification import SequenceClassification
from traceserve_runtime.texts.rows import Row, Segments
from traceserve_runtime.texts.tokenization import TextTokenizer

quick = settings(deadline=None, max_examples=25, database=None)
ALL_LABELS = {"top_k": None}
TEXTS = [*SENTENCES, VERY_LONG[:1500], *(" ".join(SENTENCES[i : i + 2]) for i in range(3, 8))]  # 32 of them
POISON = "zzzz"


@pytest.fixture(scope="module")
def engine(artifact: Path) -> Engine:
    return Engine.load(artifact)


@pytest.fixture(scope="module")
def alone(engine: Engine) -> Dict[str, List[Dict[str, Any]]]:
    """Each text's answer when asked alone."""
    return {text: value_of(engine.answer([ask(text)])[0]) for text in TEXTS}


def ask(text: str, group: Any = None, **parameters: Any) -> Request:
    return Request({"text": text}, {**ALL_LABELS, **parameters}, group)


def value_of(answer: Any) -> Any:
    assert isinstance(answer, Answer), answer
    return answer.value


def scores_of(answer: List[Dict[str, Any]]) -> Dict[str, float]:
    return {item["label"]: item["score"] for item in answer}


def assert_same(answer: List[Dict[str, Any]], other: List[Dict[str, Any]]) -> None:
    assert answer[0]["label"] == other[0]["label"]
    assert scores_of(answer) == pytest.approx(scores_of(other), abs=1e-5)


class Through:
    """A runner whose runs go through `act`."""

    def __init__(self, own: Runner, act: Callable[[Arrays], Arrays]) -> None:
        self._own = own
        self._act = act

    def __call__(self, inputs: Arrays) -> Arrays:
        return self._act(inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def like(engine: Engine, **changes: Any) -> Engine:
    """Return the engine with another manifest."""
    manifest = dataclasses.replace(engine.manifest, **changes)
    return of(type(engine.task), engine, manifest)


def of(task: Type[Task], engine: Engine, manifest: Manifest) -> Engine:
    """Return the engine with another task."""
    tokenizer = TextTokenizer(engine.folder, manifest.tokenizer, manifest.max_length, manifest.max_rows)
    return Engine(engine.folder, manifest, task(manifest, tokenizer), engine.runner)


def test_an_answer_is_the_best_label_or_all_of_them(engine: Engine) -> None:
    best, everything = engine.answer([Request({"text": "Yes."}), ask("Yes.")])
    assert set(value_of(best)) == {"label", "score"}
    ranked = value_of(everything)
    assert ranked[0] == {"label": value_of(best)["label"], "score": pytest.approx(value_of(best)["score"], rel=1e-5)}
    assert {item["label"] for item in ranked} == {"red", "green", "blue"}
    assert sum(item["score"] for item in ranked) == pytest.approx(1, abs=1e-5)


def test_the_texts_are_told_apart(alone: Dict[str, List[Dict[str, Any]]]) -> None:
    """Proves that tests of the order can fail."""
    assert len(TEXTS) == 32
    assert len({round(answer[0]["score"], 4) for answer in alone.values()}) > 20


@quick
@given(order=st.permutations(range(len(TEXTS))))
def test_batching_never_changes_an_answer(
    engine: Engine, alone: Dict[str, List[Dict[str, Any]]], order: List[int]
) -> None:
    texts = [TEXTS[i] for i in order]
    for text, answer in zip(texts, engine.answer([ask(text) for text in texts])):
        assert_same(value_of(answer), alone[text])


@pytest.mark.parametrize(
    "shapes",
    [Shapes(lengths=(32,)), Shapes(lengths=(8, 16, 32)), Shapes(batches=(1, 2)), Shapes((16, 32), (4,))],
    ids=str,
)
def test_fixed_shapes_never_change_an_answer(
    engine: Engine, alone: Dict[str, List[Dict[str, Any]]], shapes: Shapes
) -> None:
    fixed = like(engine, shapes=shapes)
    for text, answer in zip(TEXTS, fixed.answer([ask(text) for text in TEXTS])):
        assert_same(value_of(answer), alone[text])


def test_pairs_and_texts_are_answered_in_order(engine: Engine) -> None:
    pairs = [Request({"text": text, "text_pair": "Yes."}, ALL_LABELS) for text in TEXTS[1:6]]
    mixed = [request for pair, text in zip(pairs, TEXTS[10:15]) for request in (pair, ask(text))]
    for request, answer in zip(mixed, engine.answer(mixed)):
        assert_same(value_of(answer), value_of(engine.answer([request])[0]))


def test_nothing_asked_is_nothing_answered(engine: Engine) -> None:
    stats = Stats()
    assert engine.answer([], stats) == []
    assert stats == Stats()


def test_errors_stand_in_their_place(engine: Engine, alone: Dict[str, List[Dict[str, Any]]]) -> None:
    requests = [
        ask("Yes."),
        ask(VERY_LONG, long_inputs="reject"),
        ask("No, thank you!"),
        ask(VERY_LONG, long_inputs="reject"),
    ]
    first, second, third, fourth = engine.answer(requests)
    assert_same(value_of(first), alone["Yes."])
    assert_same(value_of(third), alone["No, thank you!"])
    for error in (second, fourth):
        assert isinstance(error, InputTooLong) and error.field == "text"


def test_what_was_cut_is_told(engine: Engine) -> None:
    cut, whole = engine.answer([ask(VERY_LONG, long_inputs="truncate"), ask("Yes.", long_inputs="truncate")])
    assert isinstance(cut, Answer) and isinstance(whole, Answer)
    start, end = cut.unseen["text"]
    assert end == len(VERY_LONG)
    assert whole.unseen == {}
    assert_same(cut.value, value_of(engine.answer([ask(VERY_LONG[:start])])[0]))


def test_windows_are_merged_by_their_tokens(engine: Engine) -> None:
    """The mean of the windows' scores, weighted by their tokens, unlike the truncated text's."""
    (encoded,) = engine.task.encode([ask(VERY_LONG)])
    assert not isinstance(encoded, TraceserveError) and len(encoded.rows) > 3
    jobs = [Job(row, ask(VERY_LONG)) for row in encoded.rows]
    rows = [engine.task.predict(engine.runner, [job], Stats())[0]["logits"] for job in jobs]
    scores = [np.exp(row) / np.exp(row).sum() for row in rows]
    mean = sum(s * r.tokens for s, r in zip(scores, encoded.rows)) / sum(r.tokens for r in encoded.rows)
    answer = scores_of(value_of(engine.answer([ask(VERY_LONG)])[0]))
    assert [answer[label] for label in engine.manifest.labels] == pytest.approx(list(mean), abs=1e-5)


def test_stats_count_what_was_asked_and_computed(engine: Engine) -> None:
    stats = Stats()
    engine.answer([ask("Yes."), ask("Yes."), ask(VERY_LONG, long_inputs="reject")], stats)
    length = len(engine.task.encode([ask("Yes.")])[0].rows[0].encoding.ids)  # type: ignore[union-attr]
    assert (stats.requests, stats.rows, stats.tokens, stats.micro_batches) == (3, 2, 2 * length, 1)
    padding = stats.padded_tokens - stats.tokens
    assert padding == round(engine.runner.padding.cost * 2 * (16 - length)) and 0 < stats.padding_share < 0.3


def windows(engine: Engine, text: str) -> int:
    (encoded,) = engine.task.encode([ask(text)])
    assert not isinstance(encoded, TraceserveError)
    return len(encoded.rows)


def test_the_limit_on_the_rows_of_a_group(engine: Engine) -> None:
    long = VERY_LONG[:500]
    rows = windows(engine, long)
    assert rows > 2
    limited = like(engine, max_rows=2 * rows)
    requests = [
        ask(long, 1),
        ask("Yes.", 2),
        ask(long, 1),
        ask("No.", 1),
        ask(long, 2),
        ask("No.", None),
        ask(long, 3),
        ask(long, 3),
    ]
    answers = limited.answer(requests)
    assert [isinstance(answer, InputTooLong) for answer in answers] == [
        True,
        False,
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert f"{2 * rows + 1:,} windows" in str(answers[0]) and f"may have {2 * rows:,}" in str(answers[0])


def test_requests_without_a_group_share_no_limit(engine: Engine) -> None:
    limited = like(engine, max_rows=1)
    assert all(isinstance(answer, Answer) for answer in limited.answer([ask("Yes.")] * 5))
    assert all(isinstance(answer, InputTooLong) for answer in limited.answer([ask("Yes.", 0)] * 5))


def test_a_group_that_is_refused_computes_nothing(engine: Engine) -> None:
    stats = Stats()
    like(engine, max_rows=1).answer([ask("Yes.", 0)] * 5, stats)
    assert (stats.requests, stats.rows, stats.micro_batches) == (5, 0, 0)


class Parts(SequenceClassification):
    """Answers with the best label of each line of a text, and refuses some."""

    def segments(self, request: Request) -> List[Segments]:
        lines = request.inputs["text"].split("\n")
        if "refused" in lines:
            raise InvalidRequest("this line is refused", "text")
        return [Segments(line, fields=(f"text[{i}]", "")) for i, line in enumerate(lines)]

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Any:
        return [(row.part, self.manifest.labels[int(output["logits"].argmax())]) for row, output in zip(rows, outputs)]


def test_a_request_may_have_several_parts(engine: Engine, alone: Dict[str, List[Dict[str, Any]]]) -> None:
    short = [text for text in TEXTS if text and "\n" not in text and windows(engine, text) == 1]
    lines = [short[:4], short[4:5], short[5:8]]
    assert len(lines[-1]) == 3
    answers = of(Parts, engine, engine.manifest).answer([Request({"text": "\n".join(texts)}) for texts in lines])
    for texts, answer in zip(lines, answers):
        assert [part for part, _ in value_of(answer)] == list(range(len(texts)))
        assert [label for _, label in value_of(answer)] == [alone[text][0]["label"] for text in texts]


def test_what_is_cut_of_each_part_is_told(engine: Engine) -> None:
    text = f"Yes.\n{VERY_LONG}\nNo.\n{VERY_LONG[:300]}"
    (answer,) = of(Parts, engine, engine.manifest).answer([Request({"text": text}, {"long_inputs": "truncate"})])
    assert isinstance(answer, Answer)
    assert {name: end for name, (_, end) in answer.unseen.items()} == {"text[1]": len(VERY_LONG), "text[3]": 300}


def test_a_request_that_the_task_refuses_fails_alone(engine: Engine, alone: Dict[str, List[Dict[str, Any]]]) -> None:
    texts = ["Yes.", "No.\nrefused", "No, thank you!"]
    first, second, third = of(Parts, engine, engine.manifest).answer([Request({"text": text}) for text in texts])
    assert value_of(first) == [(0, alone["Yes."][0]["label"])]
    assert isinstance(second, InvalidRequest) and second.field == "text"
    assert value_of(third) == [(0, alone["No, thank you!"][0]["label"])]


def test_a_part_that_is_too_long_fails_its_request(engine: Engine) -> None:
    texts = [f"Yes.\n{VERY_LONG}", "Yes."]
    requests = [Request({"text": text}, {"long_inputs": "reject"}) for text in texts]
    first, second = of(Parts, engine, engine.manifest).answer(requests)
    assert isinstance(first, InputTooLong) and first.field == "text[1]"
    assert isinstance(second, Answer)


def test_the_rows_of_all_parts_count(engine: Engine) -> None:
    limited = of(Parts, engine, dataclasses.replace(engine.manifest, max_rows=3))
    requests = [Request({"text": "a\nb\nc"}, {}, 0), Request({"text": "a\nb"}, {}, 1), Request({"text": "a\nb"}, {}, 1)]
    assert [isinstance(answer, InputTooLong) for answer in limited.answer(requests)] == [False, True, True]


def test_a_task_may_set_how_many_tokens_run_together(engine: Engine) -> None:
    class Careful(SequenceClassification):
        @property
        def most_tokens(self) -> int:
            return 40

    careful, shapes = of(Careful, engine, engine.manifest), []

    def recording(inputs: Arrays) -> Arrays:
        shapes.append(inputs["input_ids"].shape)
        return engine.runner(inputs)

    careful.runner = Called(recording)  # type: ignore[assignment]  # is run once only
    careful.answer([ask("Yes.")] * 20)
    assert sum(batch for batch, _ in shapes) == 20
    assert all(batch * length <= 40 for batch, length in shapes)
    assert len(shapes) > 2


@pytest.mark.parametrize("cost, runs", [(CostModel(run=1e9), 1), (CostModel(run=0, attention=1), 2)])
def test_a_task_may_say_what_a_run_costs(engine: Engine, cost: CostModel, runs: int) -> None:
    class Priced(SequenceClassification):
        @property
        def cost(self) -> CostModel:
            return cost

    stats = Stats()
    of(Priced, engine, engine.manifest).answer([ask("Yes."), ask(VERY_LONG, long_inputs="truncate")], stats)
    assert (stats.rows, stats.micro_batches) == (2, runs)


def test_a_task_keeps_what_it_reads(engine: Engine) -> None:
    """And only that is checked: a model may return NaN where nobody reads."""

    class First(SequenceClassification):
        def keep(self, row: Row, outputs: Arrays) -> Arrays:
            return {"logits": outputs["logits"][:1]}

        def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Any:
            return [output["logits"].shape for output in outputs]

    first, own = of(First, engine, engine.manifest), engine.runner

    def broken(inputs: Arrays) -> Arrays:
        logits = own(inputs)["logits"].copy()
        logits[:, 1] = np.nan
        return {"logits": logits}

    first.runner = Called(broken)  # type: ignore[assignment]  # is run once only
    assert [value_of(answer) for answer in first.answer([ask("Yes."), ask("No.")])] == [[(1,)], [(1,)]]


class Telling(SequenceClassification):
    """Emits each row's length while it runs."""

    def predict(self, runner: Runner, jobs: Sequence[Job], stats: Stats) -> List[Arrays]:
        for job in jobs:
            if job.emit is not None:
                job.emit(f"{job.request.inputs['text']}: {job.row.length}")
        return super().predict(runner, jobs, stats)


def test_what_grows_is_told_under_its_requests_number(engine: Engine) -> None:
    """With the characters that the model does not see."""
    telling = of(Telling, engine, engine.manifest)
    texts = ["Yes.", VERY_LONG, "No, thank you!", VERY_LONG]
    requests = [ask(text, long_inputs=how) for text, how in zip(texts, ["reject", "reject", "window", "truncate"])]
    told: Dict[int, Tuple[Any, str]] = {}

    def emit(i: int, unseen: Any, text: str) -> None:
        told[i] = (unseen, text)

    answers = telling.answer(requests, emit=emit)
    assert set(told) == {0, 2, 3}
    assert all(told[i][1].startswith(f"{texts[i]}: ") for i in told)
    assert [isinstance(answer, Answer) for answer in answers] == [True, False, True, True]
    cut = answers[3]
    assert isinstance(cut, Answer) and cut.unseen
    assert [told[i][0] for i in (0, 2, 3)] == [{}, {}, cut.unseen]


def test_nothing_is_told_where_nobody_listens(engine: Engine) -> None:
    assert all(isinstance(answer, Answer) for answer in of(Telling, engine, engine.manifest).answer([ask("Yes.")]))


@pytest.fixture()
def poisoned(engine: Engine) -> Iterator[Tuple[Engine, int]]:
    """An engine to damage, and the token that marks the damaged row."""
    other = like(engine)
    (encoded,) = other.task.encode([ask(POISON)])
    assert not isinstance(encoded, TraceserveError)
    yield other, encoded.rows[0].encoding.ids[1]


def raising(engine: Engine, token: int, error: BaseException) -> Any:
    """Return the engine's runner, raising for each batch with the token."""
    own = engine.runner

    def runner(inputs: Arrays) -> Arrays:
        if (inputs["input_ids"] == token).any():
            raise error
        return own(inputs)

    return Called(runner)


def test_a_row_that_breaks_the_model_fails_alone(
    poisoned: Tuple[Engine, int], alone: Dict[str, List[Dict[str, Any]]]
) -> None:
    engine, token = poisoned
    engine.runner = raising(
        engine, token, RuntimeError("Traceback of TorchScript\n  line 1\nRuntimeError: out of range")
    )
    texts = ["Yes.", POISON, "No, thank you!"]
    first, second, third = engine.answer([ask(text) for text in texts])
    assert isinstance(second, ModelFailure)
    assert isinstance(second.__cause__, RuntimeError)
    assert_same(value_of(first), alone["Yes."])
    assert_same(value_of(third), alone["No, thank you!"])


@pytest.mark.parametrize("reason", ["out of range", "Traceback of TorchScript\n  line 1\nout of range\n"])
def test_the_failure_names_the_models_last_line_as_a_sentence(poisoned: Tuple[Engine, int], reason: str) -> None:
    engine, token = poisoned
    engine.runner = raising(engine, token, RuntimeError(reason))
    (answer,) = engine.answer([ask(POISON)])
    assert isinstance(answer, ModelFailure)
    assert answer.message == "the model failed on this input: out of range"


def test_an_error_that_names_its_own_reason_is_the_answer(
    poisoned: Tuple[Engine, int], alone: Dict[str, List[Dict[str, Any]]]
) -> None:
    engine, token = poisoned
    error = MissingPackage("this processor has no bfloat16")
    engine.runner = raising(engine, token, error)
    first, second = engine.answer([ask("Yes."), ask(POISON)])
    assert second is error and error.message == "this processor has no bfloat16"
    assert_same(value_of(first), alone["Yes."])


def test_a_failure_without_a_reason_is_a_failure(poisoned: Tuple[Engine, int]) -> None:
    engine, token = poisoned
    engine.runner = raising(engine, token, RuntimeError())
    assert isinstance(engine.answer([ask(POISON)])[0], ModelFailure)


class OtherFailure(Exception):
    """Not a RuntimeError, nor any known exception."""


ANY = [IndexError("index 70000 is out of bounds"), KeyError(POISON), MemoryError(), OtherFailure(), AssertionError()]


@pytest.mark.parametrize("error", ANY, ids=lambda error: type(error).__name__)
def test_whatever_a_row_meets_in_the_model_it_fails_alone(
    poisoned: Tuple[Engine, int], alone: Dict[str, List[Dict[str, Any]]], error: Exception
) -> None:
    engine, token = poisoned
    engine.runner = raising(engine, token, error)
    first, second, third = engine.answer([ask(text) for text in ("Yes.", POISON, "No, thank you!")])
    assert isinstance(second, ModelFailure) and second.__cause__ is error
    assert_same(value_of(first), alone["Yes."])
    assert_same(value_of(third), alone["No, thank you!"])


@pytest.mark.parametrize("verb", ["segments", "decode"])
@pytest.mark.parametrize("error", ANY, ids=lambda error: type(error).__name__)
def test_whatever_a_request_meets_in_the_task_it_fails_alone(
    engine: Engine,
    alone: Dict[str, List[Dict[str, Any]]],
    error: Exception,
    verb: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And the log has the traceback, without its text."""

    class Breaking(SequenceClassification):
        def broken_here(self, request: Request) -> None:
            if request.inputs["text"] == POISON:
                raise error

        def segments(self, request: Request) -> List[Segments]:
            if verb == "segments":
                self.broken_here(request)
            return super().segments(request)

        def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Any:
            if verb == "decode":
                self.broken_here(request)
            return super().decode(request, rows, outputs)

    answers = of(Breaking, engine, engine.manifest).answer(
        [ask(text) for text in ("Yes.", POISON, "No, thank you!", POISON)]
    )
    for failed in answers[1::2]:
        assert type(failed) is TraceserveError and failed.status == 500 and failed.__cause__ is error
        assert POISON not in failed.message
    assert_same(value_of(answers[0]), alone["Yes."])
    assert_same(value_of(answers[2]), alone["No, thank you!"])
    failures.log(answers)
    assert caplog.text.count(f"{type(error).__name__} in ") == 1 and "in broken_here" in caplog.text
    assert POISON not in caplog.text


@pytest.mark.parametrize("verb", ["tokenize", "decode"])
def test_a_panic_of_the_tokenizers_package_is_one_requests_own(verb: str, engine: Engine) -> None:
    """It is not an Exception, and would end the worker."""

    def panic() -> None:
        tokenizers.Tokenizer.from_file(str(engine.folder / engine.manifest.tokenizer.file)).encode("a a a a").truncate(
            2, stride=3
        )

    with pytest.raises(BaseException, match="stride") as raised:
        panic()
    assert not isinstance(raised.value, Exception)

    class Panicking(SequenceClassification):
        def tokenize(self, requests: Sequence[Request], parts: Sequence[Any]) -> Any:
            if verb == "tokenize" and any(request.inputs["text"] == POISON for request in requests):
                panic()
            return super().tokenize(requests, parts)

        def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Any:
            if verb == "decode" and request.inputs["text"] == POISON:
                panic()
            return super().decode(request, rows, outputs)

    first, failed, last = of(Panicking, engine, engine.manifest).answer([ask(t) for t in ("Yes.", POISON, "Yes.")])
    assert isinstance(first, Answer) and first == last
    assert type(failed) is TraceserveError and failed.status == 500 and "stride" not in failed.message


def test_what_ends_the_process_is_no_requests_own(poisoned: Tuple[Engine, int]) -> None:
    engine, token = poisoned
    engine.runner = raising(engine, token, SystemExit())
    with pytest.raises(SystemExit):
        engine.answer([ask("Yes."), ask(POISON)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_no_answer(
    poisoned: Tuple[Engine, int], alone: Dict[str, List[Dict[str, Any]]], value: float
) -> None:
    engine, token = poisoned
    own = engine.runner

    def runner(inputs: Arrays) -> Arrays:
        logits = own(inputs)["logits"].copy()
        logits[(inputs["input_ids"] == token).any(axis=1), 1] = value
        return {"logits": logits}

    engine.runner = Called(runner)  # type: ignore[assignment]  # is run once only
    first, second = engine.answer([ask("Yes."), ask(POISON)])
    assert isinstance(second, ModelFailure) and "not a number" in second.message
    assert_same(value_of(first), alone["Yes."])


def test_one_failed_window_fails_its_request(
    poisoned: Tuple[Engine, int], alone: Dict[str, List[Dict[str, Any]]]
) -> None:
    engine, token = poisoned
    engine.runner = raising(engine, token, RuntimeError("broken"))
    first, second = engine.answer([ask(f"{VERY_LONG[:600]} {POISON}"), ask("Yes.")])
    assert isinstance(first, ModelFailure)
    assert_same(value_of(second), alone["Yes."])


def test_warming_up_and_measuring_ask_the_model(poisoned: Tuple[Engine, int]) -> None:
    engine, _ = poisoned
    own, shapes = engine.runner, []

    def recording(inputs: Arrays) -> Arrays:
        shapes.append(inputs["input_ids"].shape)
        return own(inputs)

    recorded: Any = Through(own, recording)
    engine = Engine(engine.folder, engine.manifest, engine.task, recorded)
    engine.warm_up()
    engine.scheduler.measure()
    asked = len(engine.task.warm_up_requests())
    assert [batch for batch, _ in shapes[:asked]] == [1] * asked
    assert max(length for _, length in shapes) == engine.manifest.max_length
    assert max(batch for batch, _ in shapes) > 1 and engine.scheduler.cost != CostModel()


def test_an_idle_engine_releases_memory_after_many_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    released: List[int] = []
    monkeypatch.setattr("traceserve_runtime.memory.release_unused_memory", lambda: released.append(1))
    other = like(engine)
    for tokens, times in ((4096, 0), (1, 1), (4096, 1), (1, 2), (0, 2)):
        other.count_tokens(tokens)
        other.idle()
        assert len(released) == times


def test_only_the_workers_own_failures_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    refused, failed = InvalidRequest("no text"), ModelFailure("no answer")
    refused.__cause__, failed.__cause__ = KeyError("text"), ValueError("logits")
    failures.log([refused, failed, "an answer"])
    [record] = caplog.records
    assert record.getMessage().startswith("traceserve: ValueError in 1 of 3 requests")


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_windows_are_advised_where_the_task_merges_them(artifact: Path, tmp_path: Path, task: Type[Task]) -> None:
    changed = damaged(artifact, tmp_path, task=task.name, long_inputs="reject")
    tokenizer = Engine.load(changed).task.tokenizer
    (error,) = tokenizer.encode([Segments(VERY_LONG)], ["reject"])
    assert isinstance(error, InputTooLong)
    assert ('"window"' in error.message) is task.merges_windows
    assert '"truncate"' in error.message


def test_warming_up_raises_what_the_model_raises(poisoned: Tuple[Engine, int]) -> None:
    engine, _ = poisoned

    def broken(inputs: Arrays) -> Arrays:
        raise RuntimeError("no kernel")

    engine.runner = Called(broken)  # type: ignore[assignment]  # is run once only
    with pytest.raises(ModelFailure, match="no kernel"):
        engine.warm_up()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_missing_device_is_named(artifact: Path) -> None:
    with pytest.raises(MissingPackage, match="cuda:0.*sees no GPU"):
        Engine.load(artifact, "cuda:0")


def damaged(artifact: Path, folder: Path, **changes: Any) -> Path:
    """Copy the artifact with a changed manifest."""
    shutil.copytree(artifact, folder, dirs_exist_ok=True)
    manifest = dataclasses.replace(Manifest.read(artifact), **changes)
    manifest.write(folder)
    return folder


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(100)])
def test_a_model_file_that_is_no_torchscript_is_named(artifact: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(artifact, tmp_path, dirs_exist_ok=True)
    model = tmp_path / "traced_model.pt"
    model.write_bytes(content)
    manifest = Manifest.read(artifact)
    files = {name: digest for name, digest in manifest.files.items() if name not in (GRAPH_FILE, WEIGHTS_FILE)}
    dataclasses.replace(manifest, files={**files, model.name: sha256(model)}).write(tmp_path)
    with pytest.raises(InvalidManifest, match="traced_model.pt cannot be loaded by torch"):
        Engine.load(tmp_path)


def test_a_model_file_that_is_cut_is_named(artifact: Path, tmp_path: Path) -> None:
    content = (artifact / "traced_model.pt").read_bytes()
    test_a_model_file_that_is_no_torchscript_is_named(artifact, tmp_path, content[: len(content) // 2])


def test_a_model_file_that_is_not_there_is_named(artifact: Path, tmp_path: Path) -> None:
    """`model_file` need not be in `files`, which are checked before."""
    with pytest.raises(InvalidManifest, match="other.pt"):
        Engine.load(damaged(artifact, tmp_path, model_file="other.pt"))


def test_a_tokenizer_file_that_is_not_there_is_named(artifact: Path, tmp_path: Path) -> None:
    facts = dataclasses.replace(Manifest.read(artifact).tokenizer, file="other.json")
    with pytest.raises(InvalidManifest, match="other.json"):
        Engine.load(damaged(artifact, tmp_path, tokenizer=facts))


def test_no_changed_file_is_loaded(artifact: Path, tmp_path: Path) -> None:
    """Not even one that loading does not read; and that it was changed is told, not what torch says of it."""
    for name in ("model-config.yaml", "traced_model.pt"):
        changed = Path(shutil.copytree(artifact, tmp_path / name))
        (changed / name).write_bytes((changed / name).read_bytes()[:-1])
        with pytest.raises(InvalidManifest, match=f"the file {name} is not the one that was verified"):
            Engine.load(changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "fortune_telling"}, "task 'fortune_telling', only: .*sequence_classification"),
        ({"task": ""}, "task ''"),
        ({"save_mode": "papyrus"}, "save mode 'papyrus', only: .*torchscript"),
    ],
)
def test_an_unknown_task_or_save_mode_tells_the_known_ones(
    artifact: Path, tmp_path: Path, changes: Dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidManifest, match=message):
        Engine.load(damaged(artifact, tmp_path, **changes))


# Serving configurations


@pytest.mark.parametrize("step", [1, 8, 20, 32, 500])
def test_rows_are_padded_to_steps_and_answered_alike(
    artifact: Path, alone: Dict[str, List[Dict[str, Any]]], step: int
) -> None:
    stepped = Engine.load(artifact, settings=Settings(length_step=step))
    own, lengths = stepped.runner, set()

    def recording(inputs: Arrays) -> Arrays:
        lengths.add(inputs["input_ids"].shape[1])
        return own(inputs)

    stepped.runner = Through(own, recording)
    stepped.warm_up()
    for text, answer in zip(TEXTS, stepped.answer([ask(text) for text in TEXTS])):
        assert_same(value_of(answer), alone[text])
    most = stepped.manifest.max_length
    assert lengths <= {*range(step, most, step), most} and most in lengths
    assert len(lengths) > 1 or step >= most


def test_steps_change_nothing_where_the_lengths_are_fixed(artifact: Path, tmp_path: Path) -> None:
    fixed = damaged(artifact, tmp_path, shapes=Shapes(lengths=(12, 32)))
    assert Engine.load(fixed, settings=Settings(length_step=8)).manifest.shapes == Shapes(lengths=(12, 32))


def test_the_archives_own_manifest_stays(artifact: Path) -> None:
    Engine.load(artifact, settings=Settings(length_step=8))
    assert Manifest.read(artifact).shapes == Shapes()


@pytest.mark.parametrize(
    ("architecture", "task", "auto_model"),
    [
        ("gpt2", "text_generation", "AutoModelForCausalLM"),
        ("bart", "text2text_generation", "AutoModelForSeq2SeqLM"),
    ],
)
def test_steps_change_no_written_text(
    architecture: str, task: str, auto_model: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = {"model_name": str(checkpoint(architecture, auto_model)), "task": task, "max_length": 32}
    run_export(tmp_path / "x", {**config, "parameters": {"max_new_tokens": 5}})
    plain, stepped = Engine.load(tmp_path / "x"), Engine.load(tmp_path / "x", settings=Settings(length_step=12))
    requests = plain.task.from_texts(SENTENCES[1:9])
    for engine in (plain, stepped):
        engine.warm_up()
    lengths: List[int] = []
    start = stepped.runner.start

    def recording(inputs: Arrays) -> Any:
        lengths.append(inputs["input_ids"].shape[1])
        return start(inputs)

    stepped.runner.start = recording  # type: ignore[method-assign]
    for one, other in zip(plain.answer(requests), stepped.answer(requests)):
        assert value_of(one) == value_of(other)
    assert lengths and set(lengths) <= {12, 24, 32}


THREADS = """
import sys
from pathlib import Path
import torch
from traceserve_runtime.engine import Engine
from traceserve_runtime.settings import Settings

before = torch.get_num_threads()
Engine.load(Path(sys.argv[1]))
assert torch.get_num_threads() == before, "no threads were asked for"
Engine.load(Path(sys.argv[1]), settings=Settings(threads=3))
print(torch.get_num_threads())
"""


def test_as_many_threads_as_are_asked_for(artifact: Path) -> None:
    done = subprocess.run([sys.executable, "-c", THREADS, str(artifact)], stdout=subprocess.PIPE, check=True, text=True)
    assert done.stdout.split() == ["3"]


@pytest.mark.parametrize(
    "cost",
    [
        CostModel(run=0.0, attention=0.1),
        CostModel(run=2000.0, attention=0.0),
        CostModel(run=0.0, attention=0.0),
        CostModel(run=37.5, attention=0.0021),
    ],
    ids=repr,
)
def test_whatever_a_run_costs_the_answers_are_the_same(
    engine: Engine, alone: Dict[str, List[Dict[str, Any]]], cost: CostModel
) -> None:
    other = like(engine)
    other.scheduler.cost = cost
    for text, answer in zip(TEXTS, other.answer([ask(text) for text in TEXTS])):
        assert_same(value_of(answer), alone[text])


def test_the_cost_decides_what_runs_together(engine: Engine) -> None:
    """Proves that the test above can fail."""
    runs = []
    for cost in (CostModel(run=0.0, attention=0.1), CostModel(run=2000.0, attention=0.0)):
        other, stats = like(engine), Stats()
        other.scheduler.cost = cost
        other.answer([ask(text) for text in TEXTS], stats)
        runs.append(stats.micro_batches)
    assert runs[0] > 3 * runs[1]


def timed(engine: Engine) -> List[costs.Timing]:
    """Return the result of timing all runs at once."""
    runs = measuring.time_runs(engine.runner, engine.manifest)
    while True:
        try:
            next(runs)
        except StopIteration as end:
            found: List[costs.Timing] = end.value
            return found


@pytest.mark.parametrize(
    "shapes",
    [Shapes(), Shapes((32,)), Shapes((8, 32)), Shapes(batches=(1, 4)), Shapes((16, 32), (4, 8)), Shapes(batches=(1,))],
    ids=str,
)
def test_runs_are_timed_at_allowed_shapes(engine: Engine, shapes: Shapes) -> None:
    fixed = like(engine, shapes=shapes)
    own, seen = fixed.runner, []

    def recording(inputs: Arrays) -> Arrays:
        seen.append(inputs["input_ids"].shape)
        return own(inputs)

    fixed.runner = Through(own, recording)
    timings = timed(fixed)
    assert list(dict.fromkeys(seen)) == [(timing.batch, timing.length) for timing in timings]
    assert all(timing.seconds > 0 for timing in timings)
    assert min(seen.count(shape) for shape in seen) > 1  # a shape's first run is not representative
    tokens = [timing.batch * timing.length for timing in timings]
    assert tokens == sorted(tokens)
    for batch, length in seen:
        assert (shapes.batch(batch), shapes.length(length)) == (batch, length) and length <= 32


def test_a_slow_model_is_timed_three_times_only(engine: Engine) -> None:
    slow = like(engine)
    own = slow.runner

    def sleeping(inputs: Arrays) -> Arrays:
        time.sleep(0.05)
        return own(inputs)

    slow.runner = Through(own, sleeping)
    assert len(timed(slow)) == 3


def test_what_cannot_be_fitted_leaves_the_tasks_own_cost(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    other = like(engine)
    monkeypatch.setattr(costs, "fit_costs", lambda timings, padding: None)
    other.scheduler.measure()
    assert other.scheduler.cost == CostModel(padding=IN_ATTENTION._replace(alone=16))
