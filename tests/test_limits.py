"""Refusals come before the work; and a batch is processed in parts that fit into memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from itertools import accumulate
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import pytest
from conftest import run_export
from hypothesis import given
from hypothesis import strategies as st
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InputTooLong
from traceserve_runtime.tasks import feature_extraction
from traceserve_runtime.tasks.contract import Answer, Request
from traceserve_runtime.texts import limits
from traceserve_runtime.texts.limits import RequestLimits
from traceserve_runtime.texts.rows import Encoded
from transformer_handler import TransformerHandler


class Context:
    """TorchServe's context, as far as the handler uses it here."""

    metrics = None

    def get_all_request_header(self, index: int) -> Dict[str, str]:
        return {"Content-Type": "application/json"}

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        pass

    def set_response_header(self, index: int, key: str, value: str) -> None:
        pass


MEGABYTE = 1_000_000
TINY = ["a"] * 200_000
HUGE: Dict[str, Any] = {
    "punctuation": {"text": ".,!?" * (MEGABYTE // 4)},
    "spaces": {"text": " " * MEGABYTE},
    "letters": {"text": "a " * (MEGABYTE // 2)},
    "one word": {"text": "a" * MEGABYTE},
    "ideographs": {"text": "\u6f22" * (MEGABYTE // 3)},
    "emoji": {"text": "\U0001f600" * (MEGABYTE // 4)},
    "emoji, escaped": {"text": "\U0001f600" * (MEGABYTE // 12)},
    "truncated": {"text": ".,!?" * (MEGABYTE // 4), "parameters": {"long_inputs": "truncate"}},
    "a pair": {"text": "a b " * (MEGABYTE // 8), "text_pair": "a b " * (MEGABYTE // 8)},
    "texts": ["a b " * 1000] * 250,
    "tiny texts": TINY,
    "inputs": {"inputs": TINY},
    "instances": {"instances": TINY},
    "a tensor": {"inputs": [{"name": "x", "shape": [len(TINY)], "datatype": "BYTES", "data": TINY}]},
    "nested lists": [["a"] * 500] * 500,
    "a long name": {"t" * MEGABYTE: 1},
    "many keys": {f"key{i}": i for i in range(80_000)},
    "many parameters": {"text": "a", "parameters": {f"key{i}": i for i in range(80_000)}},
    "a long parameter": {"text": "a", "parameters": {"t" * MEGABYTE: 1}},
}


@pytest.fixture(scope="module")
def engine(artifact: Path) -> Engine:
    return Engine.load(artifact)


def serve(engine: Engine, body: Any) -> Tuple[Any, float]:
    """Return the parsed answer to a body, and this process's seconds for it."""
    handler = TransformerHandler()
    handler.engine = engine
    began = time.process_time()
    [answer] = handler.handle([{"body": body}], Context())
    return json.loads(answer), time.process_time() - began


@pytest.mark.parametrize("name", HUGE)
def test_a_megabyte_that_is_refused_is_refused_at_once(engine: Engine, name: str) -> None:
    """Within milliseconds; with a margin for a busy machine. Tokenizing any of these takes a second."""
    taken = []
    for _ in range(3):
        answer, seconds = serve(engine, HUGE[name])
        error = answer["error"]
        # KServe's clients expect a string.
        kind = (
            error["type"] if isinstance(error, dict) else "InputTooLong" if "one request may have" in error else error
        )
        taken.append(seconds)
    assert kind == ("InputTooLong" if not {"long", "nested", "many"} & set(name.split()) else kind) != "TraceserveError"
    assert min(taken) < 0.1


@pytest.fixture(scope="module")
def others(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Engine]:
    """Engines of tasks that make many rows of one request."""
    made = {}
    for task, labels, auto in (
        ("text_ranking", {"num_labels": 1}, "AutoModelForSequenceClassification"),
        ("question_answering", {}, "AutoModelForQuestionAnswering"),
        (
            "zero_shot_classification",
            {"id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}},
            "AutoModelForSequenceClassification",
        ),
        ("feature_extraction", {}, "AutoModel"),
    ):
        folder = tmp_path_factory.mktemp("limits") / task
        run_export(folder, {"model_name": str(checkpoint("bert", auto, **labels)), "max_length": 32, "task": task})
        made[task] = Engine.load(folder)
    return made


LABELS = [f"label {i}" for i in range(250)]
MANY: List[Tuple[str, Any]] = [
    ("text_ranking", {"query": "a b", "documents": ["a b c " * 600] * 250}),
    ("text_ranking", {"query": "a b " * 120_000, "documents": ["a", "b"]}),
    ("text_ranking", {"query": "a b", "documents": TINY}),
    ("question_answering", {"question": "a ? " * 120_000, "context": "a b " * 120_000}),
    ("zero_shot_classification", {"text": "a b " * 800, "parameters": {"candidate_labels": LABELS}}),
    ("zero_shot_classification", {"text": "a b", "parameters": {"candidate_labels": ",".join(TINY)}}),
    ("zero_shot_classification", {"text": "a b", "parameters": {"candidate_labels": TINY}}),
]


@pytest.mark.parametrize("task, body", MANY, ids=lambda value: value if isinstance(value, str) else "")
def test_so_is_what_one_request_makes_many_rows_of(others: Dict[str, Engine], task: str, body: Any) -> None:
    taken = []
    for _ in range(3):
        answer, seconds = serve(others[task], body)
        assert answer["error"]["type"] == "InputTooLong"
        taken.append(seconds)
    assert min(taken) < 0.1


@pytest.mark.parametrize(
    "task, inputs, parameters, field",
    [
        (
            "zero_shot_classification",
            {"text": "a"},
            {"candidate_labels": ["a" * 20_000], "hypothesis_template": "{}" * 20_000},
            "parameters.hypothesis_template",
        ),
        (
            "zero_shot_classification",
            {"text": "a"},
            {"candidate_labels": ["a" * 100] * 200, "hypothesis_template": "{}" * 1000},
            "parameters.hypothesis_template",
        ),
        ("feature_extraction", {"text": "a"}, {"prompt": "a" * 60_000}, "parameters.prompt"),
    ],
)
def test_texts_that_are_too_long_are_not_made(
    others: Dict[str, Engine], task: str, inputs: Any, parameters: Any, field: str
) -> None:
    tracemalloc.start()
    answers = others[task].answer([Request(inputs, parameters, 0)] * 50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for error in answers:
        assert isinstance(error, InputTooLong) and error.field == field and "characters" in error.message
    assert peak < 1 << 20


def test_neither_are_those_of_a_list_beyond_its_limit(others: Dict[str, Engine]) -> None:
    """Each has room alone; together they took as many times the limit as there are."""
    task = others["zero_shot_classification"].task
    most = task.tokenizer.limits.characters
    labels = ["a" * 100] * 10
    template = "{}" * (most // 1000 - 1)
    listed = [
        Request({"text": "a"}, {"candidate_labels": labels, "hypothesis_template": template}, i) for i in (0, 1, 1)
    ]
    alone, *_ = task.parts(listed)
    assert isinstance(alone, list) and len(alone) == 10
    tracemalloc.start()
    parts = task.parts(listed[1:] * 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * most
    for error in parts:
        assert isinstance(error, InputTooLong) and f"more than the {most:,} characters" in error.message


def test_an_object_of_more_keys_than_any_request_has_is_counted_only(engine: Engine) -> None:
    for name in ("many keys", "many parameters"):
        answer, _ = serve(engine, HUGE[name])
        assert answer["error"]["type"] == "InvalidRequest"
        assert "80,000 keys" in answer["error"]["message"] and '"key0"' in answer["error"]["message"]
    answer, _ = serve(engine, {"text": "a", **{f"key{i}": i for i in range(255)}})
    assert 'unknown field "key0"' in answer["error"]["message"]


MOST = 64 * 32  # `engine`'s limit on one request's tokens


def refused(engine: Engine, texts: Sequence[str], how: str = "window", group: Optional[int] = 0) -> bool:
    """Return whether texts are refused after their beginning."""
    parts = engine.task.parts([Request({"text": text}, {"long_inputs": how}, group) for text in texts])
    kinds = {isinstance(part, InputTooLong) for part in parts}
    assert len(kinds) == 1
    return kinds.pop()


@pytest.mark.parametrize(
    "texts, how, expected",
    [
        ([".,!?" * 4000], "window", True),
        ([".,!?" * 4000], "reject", True),
        ([".,!?" * 4000], "truncate", False),
        (["a " * 8000], "window", True),
        (["\u6f22" * 8000], "window", True),
        (["a" * 16_000], "window", False),  # one unknown word
        (["The train leaves at nine. " * 600], "window", True),
        ([".," * 20] * 200, "window", True),
        ([".," * 20] * 200, "truncate", True),
        ([".," * 1000] * 8, "truncate", False),  # 8 rows
        ([".,!?" * (MOST // 4 - 1)], "window", False),
    ],
)
def test_what_has_more_tokens_at_its_beginning_is_not_tokenized(
    engine: Engine, texts: List[str], how: str, expected: bool
) -> None:
    assert refused(engine, texts, how) == expected
    assert not refused(engine, texts, how, None)
    if expected:
        [answer, *_] = engine.answer([Request({"text": text}, {"long_inputs": how}, 0) for text in texts])
        assert f"more tokens than the {MOST:,}" in str(answer)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a ", "a", "train ", ".", " ", "\u6f22", "e\u0301", "\U0001f600", "\n"]),
            st.integers(1, 6000),
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
def test_nothing_is_refused_for_its_beginning_that_fits(
    engine: Engine, pieces: List[Tuple[str, int]], one: bool
) -> None:
    runs = [piece * count for piece, count in pieces]
    texts = ["".join(runs)[:16_000]] if one else [run[:3000] for run in runs]
    if refused(engine, texts):
        found = engine.task.tokenizer._tokenizer.encode_batch(texts, add_special_tokens=False)
        assert sum(map(len, found)) > MOST


def test_a_refused_text_leaves_nothing_in_memory(engine: Engine) -> None:
    """A traceback would hold its tokens until the batch is answered."""
    [answer] = engine.answer([Request({"text": "." * 16_000})])
    assert isinstance(answer, InputTooLong) and answer.__traceback__ is None


@pytest.mark.parametrize("max_rows, full_rows", [(1, 64), (64, 64), (256, 64), (1000, 250)])
def test_a_quarter_of_the_rows_may_be_full(max_rows: int, full_rows: int) -> None:
    assert RequestLimits.of(32, max_rows) == RequestLimits(max_rows, 32 * full_rows, 8 * 32 * full_rows)


@pytest.mark.parametrize("max_length, max_rows", [(16, 1), (512, 1000)])
def test_the_largest_body_holds_all_that_is_allowed(max_length: int, max_rows: int) -> None:
    """Also in the longest way of JSON: two escapes for a character."""
    allowed = RequestLimits.of(max_length, max_rows)
    texts = ["𝄞" * (allowed.characters // max_rows)] * max_rows
    assert len(json.dumps({"text": texts}, indent=4)) <= allowed.largest_body <= 13 * allowed.characters + (2 << 20)


def test_the_tokens_of_a_group_are_limited(engine: Engine) -> None:
    """Fewer rows than allowed, but long ones; a request beside it is answered."""
    full = " ".join(["."] * 30)
    answers = engine.answer([Request({"text": full}, {}, 0)] * 64 + [Request({"text": full}, {}, 1)] * 65)
    assert all(isinstance(answer, Answer) for answer in answers[:64])
    assert all(isinstance(answer, InputTooLong) for answer in answers[64:])
    assert "2,080 tokens" in str(answers[-1]) and "may have 2,048" in str(answers[-1])


def test_the_token_vectors_of_a_group_are_limited(others: Dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their JSON would hold the worker; pooled vectors, and the longest text's, are answered."""
    engine = others["feature_extraction"]
    engine.warm_up()
    [short, long] = engine.answer([Request({"text": " ".join(["."] * count)}) for count in (2, 30)])
    assert isinstance(short, Answer) and isinstance(long, Answer)
    size = np.shape(short.value)[-1]
    monkeypatch.setattr(feature_extraction, "_MOST_NUMBERS", 16 * size)
    fit, more = [Request({"text": ". ."}, {}, 0)] * 8, [Request({"text": ". ."}, {}, 1)] * 9
    pooled = [Request({"text": ". ."}, {"pooling": "mean"}, 2)] * 9
    longest = [Request({"text": " ".join(["."] * 30)}, {}, 3)]
    answers = engine.answer([*fit, *more, *pooled, *longest])
    assert [type(answer) for answer in answers] == [Answer] * 8 + [InputTooLong] * 9 + [Answer] * 10
    assert f"{36 * size:,} numbers" in str(answers[8]) and "ask for a pooling" in str(answers[8])
    assert answers[-1] == long


@given(st.lists(st.sampled_from([0, 0, 0, 1]), max_size=30), st.booleans())
def test_neighbours_of_one_group_stay_together(new: List[int], grouped: bool) -> None:
    groups: List[Optional[int]] = list(accumulate(new)) if grouped else [None] * len(new)
    found = limits.groups_of(groups)
    assert [i for own in found for i in range(len(groups))[own]] == list(range(len(groups)))
    assert all(len(set(groups[own])) == 1 and (grouped or own.stop - own.start == 1) for own in found)
    assert len(found) == (len(set(groups)) if grouped else len(groups))


def test_answers_of_a_batch_that_memory_does_not_hold_at_once_are_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["Yes.", "No, thank you!", "The train leaves at nine. " * 3, "", "a b c"] * 5
    requests = [Request({"text": text}, {"top_k": None}, i) for i, text in enumerate(texts)]

    def scores(answers: Sequence[Any]) -> List[Dict[str, float]]:
        return [{item["label"]: item["score"] for item in answer.value} for answer in answers]

    whole = scores(engine.answer(requests))
    rows = sum(len(item.rows) for item in engine.task.encode(requests) if isinstance(item, Encoded))
    runs: List[int] = []
    monkeypatch.setattr(engine.task.tokenizer, "limits", engine.task.tokenizer.limits._replace(characters=100))
    run = engine.run

    def counted(jobs: Any, stats: Stats) -> Any:
        runs.append(len(jobs))
        return run(jobs, stats)

    monkeypatch.setattr(engine, "run", counted)
    parted = scores(engine.answer(requests))
    assert len(runs) > 4 and sum(runs) == rows > len(texts)
    for one, two in zip(whole, parted):
        assert one == pytest.approx(two, abs=1e-5)
