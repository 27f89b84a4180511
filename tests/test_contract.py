"""The parts common to all tasks: parameters and their legal values, parts and windows, functions from logits to
scores."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from traceserve_runtime import json_types
from traceserve_runtime.errors import InputTooLong, InvalidRequest, ModelFailure
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays
from traceserve_runtime.softmax import softmax
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import ModelFacts, Request, Task, by_part, only_whole
from traceserve_runtime.tasks.parameters import LARGEST_NUMBER, Field, Output, Parameter, strings
from traceserve_runtime.tasks.scores import FUNCTIONS, average, function_to_apply, sigmoid
from traceserve_runtime.texts.rows import Encoded, Row, Segments
from traceserve_runtime.texts.tokenization import TextTokenizer

quick = settings(deadline=None, max_examples=100, database=None)
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
NAN, INFINITY = float("nan"), float("inf")
HALF_A_PAIR = json.loads('"\\ud83d"')  # as in a client's JSON

# Parameters.

COUNT = Parameter("count", int, "")
FEW = Parameter("few", int, "", least=0, most=1000)
SHARE = Parameter("share", float, "", least=0.0, most=1)
FACTOR = Parameter("factor", float, "", least=-10)
SWITCH = Parameter("switch", bool, "")
TEXT = Parameter("text", str, "")
KIND = Parameter("kind", str, "", ("cls", "mean"))
WORDS = Parameter("words", list, "")
STOPPING = Parameter("stopping", bool, "", ("never",))
BIASES = Parameter("biases", dict, "", least=-100, most=100)
OPTIONAL = [replace(one, nullable=True) for one in (COUNT, SHARE, SWITCH, TEXT, KIND, WORDS)]

LEGAL: List[Tuple[Parameter, str]] = [
    (COUNT, "a whole number of 1 or more"),
    (FEW, "a whole number from 0 to 1,000"),
    (SHARE, "a number from 0 to 1"),
    (FACTOR, "a number of -10 or more"),
    (SWITCH, "true or false"),
    (TEXT, "a string"),
    (KIND, 'one of "cls", "mean"'),
    (WORDS, "a string or a list of strings"),
    (STOPPING, 'true or false or "never"'),
    (BIASES, "an object with tokens' numbers as keys and numbers from -100 to 100"),
    (replace(FACTOR, least=0.01, most=2.5), "a number from 0.01 to 2.5"),
    (replace(COUNT, nullable=True), "a whole number of 1 or more or null"),
    (replace(KIND, nullable=True), 'one of "cls", "mean" or null'),
]

ACCEPTED: List[Tuple[Parameter, Sequence[Any]]] = [
    (COUNT, (1, 2, 10**9, LARGEST_NUMBER)),
    (FEW, (0, 1, 1000)),
    (SHARE, (0, 1, 0.0, 0.5, 1.0, 1e-300)),
    (FACTOR, (-10, -9.5, 0, 1e15)),
    (SWITCH, (True, False)),
    (TEXT, ("", "x", "This is {}.", "größe 👍🏽", "\0")),
    (KIND, ("cls", "mean")),
    (WORDS, ("x", ["x"], ["x", "y"], "größe", ["\0"])),
    (STOPPING, (True, False, "never")),
    (BIASES, ({}, {"0": 1}, {"50256": -100, "7": 0.5, "999999999": 100})),
    *((parameter, (None,)) for parameter in OPTIONAL),
]

REFUSED: List[Tuple[Parameter, Sequence[Any]]] = [
    (COUNT, (0, -1, 1.0, 1.5, True, False, "1", "", [1], {}, None, NAN, INFINITY, LARGEST_NUMBER + 1, 10**400)),
    (FEW, (-1, 1001, 1e2, True, NAN)),
    (SHARE, (-0.01, 1.01, 2, True, False, "0.5", NAN, INFINITY, -INFINITY, [0.5], None, 10**400)),
    (FACTOR, (-10.5, -11, NAN, INFINITY, -INFINITY, 10**400, -(10**400))),
    (SWITCH, (0, 1, "true", "", None, [])),
    (TEXT, (0, True, [], ["x"], {}, None, HALF_A_PAIR, "before " + HALF_A_PAIR)),
    (KIND, ("", "sum", "CLS", 0, True, ["cls"], None, HALF_A_PAIR)),
    (WORDS, ("", [], [""], ["x", ""], ["x", 1], ["x", None], [["x"]], {}, {"x": 1}, 0, True, None)),
    (WORDS, (HALF_A_PAIR, ["x", HALF_A_PAIR])),
    (STOPPING, ("always", "", 0, 1, None, ["never"])),
    (BIASES, (None, [], "5", 5, {"": 1}, {"x": 1}, {"-1": 1}, {"05": 1}, {"1.0": 1}, {"1\n": 1}, {"\u0661": 1})),
    (
        BIASES,
        ({"1": "2"}, {"1": True}, {"1": None}, {"1": 101}, {"1": NAN}, {"1": -INFINITY}, {"1000000000": 1}, {5: 1.0}),
    ),
    (OPTIONAL[0], (0, "null", "")),
    (OPTIONAL[-1], ([None], "")),
]


@pytest.mark.parametrize(("parameter", "legal"), LEGAL, ids=[legal for _, legal in LEGAL])
def test_what_is_legal_is_said(parameter: Parameter, legal: str) -> None:
    assert parameter.legal == legal


@pytest.mark.parametrize(("parameter", "value"), [(one, value) for one, values in ACCEPTED for value in values])
def test_what_is_legal_is_accepted(parameter: Parameter, value: Any) -> None:
    assert parameter.accepts(value) is True


@pytest.mark.parametrize(("parameter", "value"), [(one, value) for one, values in REFUSED for value in values])
def test_what_is_not_legal_is_refused(parameter: Parameter, value: Any) -> None:
    assert parameter.accepts(value) is False


def test_numbers_that_json_does_not_have_are_refused() -> None:
    """Python's JSON reads them anyway."""
    for text in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999"):
        value = json.loads(text)
        assert not any(parameter.accepts(value) for parameter in (COUNT, FEW, SHARE, FACTOR, *OPTIONAL))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(HALF_A_PAIR),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("7"), inner, max_size=3),
    max_leaves=5,
)


@quick
@given(value=json_values)
def test_any_json_is_accepted_or_refused(value: Any) -> None:
    for parameter in [*(one for one, _ in LEGAL), *(one for task in TASKS.values() for one in task.parameters)]:
        assert parameter.accepts(value) in (True, False)


@quick
@given(value=json_values)
def test_what_is_accepted_can_be_computed_with(value: Any) -> None:
    """Numbers fit into numpy's arrays, texts into the tokenizer; null only where allowed."""
    for task in TASKS.values():
        for parameter in task.parameters:
            if not parameter.accepts(value) or value is None:
                continue
            if isinstance(value, (list, str)):
                assert all(text.encode("utf-8").decode("utf-8") == text for text in strings(value))
            elif isinstance(value, dict):
                assert all(int(np.int64(token)) >= 0 and np.isfinite(np.float32(n)) for token, n in value.items())
            else:
                assert math.isfinite(np.float64(value)) and int(np.int64(value)) == int(value)


@every_task
def test_a_tasks_own_tables_are_in_order(task: Type[Task]) -> None:
    names = [field.name for field in task.fields] + [parameter.name for parameter in task.all_parameters()]
    assert len(set(names)) == len(names)
    assert {field.kind for field in task.fields} <= {"text", "texts", "messages"}
    assert all(field.description for field in task.fields)
    assert len({output.name for output in task.outputs}) == len(task.outputs) > 0
    for parameter in task.parameters:
        assert parameter.description
        assert parameter.default is None or parameter.accepts(parameter.default)


@every_task
def test_a_tasks_own_requests_are_legal(task: Type[Task]) -> None:
    known = {parameter.name: parameter for parameter in task.all_parameters()}
    for parameters in (task.sample_parameters, task.gate_parameters):
        assert all(known[name].accepts(value) for name, value in parameters.items())
    assert set(task.sample) <= {field.name for field in task.fields}
    assert all(field.name in task.sample for field in task.fields if field.required)
    task.check(task.sample)


@every_task
def test_windows_may_be_asked_for_where_they_can_be_merged(task: Type[Task]) -> None:
    (long_inputs,) = [one for one in task.all_parameters() if one.name == "long_inputs"]
    assert long_inputs.accepts("window") is task.merges_windows
    assert long_inputs.accepts("truncate") and long_inputs.accepts("reject")
    assert not long_inputs.accepts("cut") and not long_inputs.accepts(None)


# A task.


class Counting(Task):
    """Returns the characters of each part of a text, and the tokens of each of its rows."""

    name = "counting"
    fields = (Field("text", True, "the text"), Field("other", False, "another"))
    outputs = (Output("lengths", per_token=False),)
    parameters = (
        Parameter("separator", str, "where parts end", default="|"),
        Parameter("limit", int, "the longest row"),
    )
    gate_parameters = {"separator": ";"}
    sample = {"text": "one two"}

    def segments(self, request: Request) -> List[Segments]:
        if "other" in request.inputs:
            return super().segments(request)
        parts = request.inputs["text"].split(self.parameter(request, "separator"))
        if "" in parts:
            raise InvalidRequest("a part is empty", "text")
        return [Segments(part, fields=("text", ""), limit=self.parameter(request, "limit")) for part in parts]

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Any:
        return [[int(output["lengths"]) for output in own] for _, own in by_part(rows, outputs)]


@pytest.fixture(scope="module")
def manifest(artifact: Path) -> Manifest:
    return Manifest.read(artifact)


@pytest.fixture(scope="module")
def tokenizer(artifact: Path, manifest: Manifest) -> TextTokenizer:
    return TextTokenizer(artifact, manifest.tokenizer, manifest.max_length, manifest.max_rows)


@pytest.fixture(scope="module")
def task(manifest: Manifest, tokenizer: TextTokenizer) -> Counting:
    return Counting(replace(manifest, parameters={}), tokenizer)


def rows_of(encoded: Any) -> List[Row]:
    assert isinstance(encoded, Encoded), encoded
    return encoded.rows


@pytest.mark.parametrize(
    ("of_request", "of_model", "value"),
    [
        ({}, {}, "|"),
        ({}, {"separator": ";"}, ";"),
        ({"separator": ","}, {"separator": ";"}, ","),
        ({"separator": None}, {"separator": ";"}, None),
        ({}, {"separator": None}, None),
        ({"limit": 5}, {}, "|"),
    ],
)
def test_the_request_goes_before_the_model_and_the_model_before_the_task(
    manifest: Manifest, tokenizer: TextTokenizer, of_request: Dict[str, Any], of_model: Dict[str, Any], value: Any
) -> None:
    task = Counting(replace(manifest, parameters=of_model), tokenizer)
    assert task.parameter(Request({"text": "x"}, of_request), "separator") == value


def test_a_request_may_choose_how_it_is_shortened(manifest: Manifest, tokenizer: TextTokenizer) -> None:
    task = Counting(replace(manifest, long_inputs="reject"), tokenizer)
    assert task.long_inputs(Request({"text": "x"})) == "reject"
    assert task.long_inputs(Request({"text": "x"}, {"long_inputs": "truncate"})) == "truncate"


@pytest.mark.parametrize(
    ("fields", "inputs", "segments"),
    [
        (("text",), {"text": "a"}, Segments("a", None, ("text", "text"))),
        (("text", "text_pair"), {"text": "a"}, Segments("a", None, ("text", "text_pair"))),
        (("query", "answer"), {"query": "a", "answer": "b"}, Segments("a", "b", ("query", "answer"))),
    ],
)
def test_the_first_and_the_last_field_are_text_and_pair(
    manifest: Manifest, tokenizer: TextTokenizer, fields: Sequence[str], inputs: Dict[str, str], segments: Segments
) -> None:
    class Plain(Task):
        pass

    Plain.fields = tuple(Field(name, True, "") for name in fields)
    assert Plain(manifest, tokenizer).segments(Request(inputs)) == [segments]


def test_each_part_of_a_request_is_rows_of_its_own(task: Counting) -> None:
    requests = [Request({"text": text}) for text in ("one|two words|three", "four", "five|six")]
    encoded = task.encode(requests)
    assert [[row.part for row in rows_of(item)] for item in encoded] == [[0, 1, 2], [0], [0, 1]]
    for request, item in zip(requests, encoded):
        for part, row in zip(request.inputs["text"].split("|"), rows_of(item)):
            (alone,) = rows_of(task.encode([Request({"text": part})])[0])
            assert row.encoding.ids == alone.encoding.ids
            assert replace(row, encoding=alone.encoding, part=0) == alone


def test_the_windows_of_a_part_have_its_number(task: Counting) -> None:
    text = "|".join(("short", "a long one " * 20, "short again"))
    rows = rows_of(task.encode([Request({"text": text}, {"limit": 12})])[0])
    numbers = [row.part for row in rows]
    assert numbers == sorted(numbers) and set(numbers) == {0, 1, 2}
    assert (numbers.count(0), numbers.count(2)) == (1, 1) and numbers.count(1) > 3


def test_a_request_that_cannot_be_encoded_stands_in_its_place(task: Counting) -> None:
    texts = ["one", "two||three", "four|" + "long " * 50, "five|six"]
    parameters = {"long_inputs": "reject"}
    first, empty, long, last = task.encode([Request({"text": text}, parameters) for text in texts])
    assert len(rows_of(first)) == 1 and len(rows_of(last)) == 2
    assert isinstance(empty, InvalidRequest) and empty.message == "a part is empty"
    assert isinstance(long, InputTooLong) and long.field == "text"


def test_what_is_unseen_of_several_parts_is_the_span_of_all(task: Counting) -> None:
    long = "word " * 40
    (whole,) = task.encode([Request({"text": long}, {"long_inputs": "truncate", "limit": 12})])
    (shorter,) = task.encode([Request({"text": long[:100]}, {"long_inputs": "truncate", "limit": 12})])
    assert isinstance(whole, Encoded) and isinstance(shorter, Encoded)
    assert shorter.unseen["text"][1] == 100 and whole.unseen["text"][1] == 200
    for text in (f"short|{long[:100]}|{long}", f"{long}|short|{long[:100]}"):
        (together,) = task.encode([Request({"text": text}, {"long_inputs": "truncate", "limit": 12})])
        assert isinstance(together, Encoded)
        assert together.unseen == {"text": (shorter.unseen["text"][0], 200)}


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("place", [0, 1])
def test_an_output_that_is_no_number_is_no_answer(task: Counting, value: float, place: int) -> None:
    request = Request({"text": "one|two"})
    rows = rows_of(task.encode([request])[0])
    outputs: List[Arrays] = [{"lengths": np.float32(3)}, {"lengths": np.float32(4)}]  # type: ignore[dict-item]
    assert task.answer(request, rows, outputs) == ([[3], [4]], None)
    outputs[place] = {"lengths": np.float32(value)}  # type: ignore[dict-item]
    with pytest.raises(ModelFailure, match="not a number"):
        task.answer(request, rows, outputs)


def test_the_gate_asks_about_each_text_and_some_pairs(task: Counting) -> None:
    texts = [f"text {i}" for i in range(10)]
    requests = task.from_texts(texts)
    assert [request.inputs for request in requests[:10]] == [{"text": text} for text in texts]
    assert [request.inputs for request in requests[10:]] == [
        {"text": "text 3", "other": "text 4"},
        {"text": "text 7", "other": "text 8"},
    ]
    assert all(request.parameters == {"separator": ";"} for request in requests)


def test_warming_up_asks_short_and_as_long_as_any(task: Counting) -> None:
    short, long = (rows_of(item) for item in task.encode(task.warm_up_requests()))
    assert len(short) == len(long) == 1
    assert short[0].length < long[0].length == task.manifest.max_length


# Parts and windows.


def row(part: int = 0, tokens: int = 1) -> Row:
    return Row(None, tokens, tokens, part=part)  # type: ignore[arg-type]  # nothing reads the encoding


@pytest.mark.parametrize(
    ("parts", "expected"),
    [([], []), ([0], ["a"]), ([0, 0, 0], ["abc"]), ([0, 1, 2], ["a", "b", "c"]), ([0, 1, 1, 2], ["a", "bc", "d"])],
)
def test_by_part_puts_rows_and_what_belongs_to_them_together(parts: List[int], expected: List[str]) -> None:
    rows, values = [row(part) for part in parts], "abcdef"[: len(parts)]
    grouped = by_part(rows, values)
    assert ["".join(own) for _, own in grouped] == expected
    for number, (own_rows, own) in enumerate(grouped):
        assert len(own_rows) == len(own)
        assert all(one.part == number for one in own_rows)


@quick
@given(
    windows=st.lists(
        st.tuples(
            st.integers(1, 500),
            st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_the_average_is_weighted_by_tokens(windows: List[Tuple[int, List[float]]]) -> None:
    values = [np.array(value, dtype=np.float32) for _, value in windows]
    rows = [row(tokens=tokens) for tokens, _ in windows]
    total = sum(tokens for tokens, _ in windows)
    expected = [math.fsum(tokens * value[i] for tokens, value in windows) / total for i in range(3)]
    got = average(values, rows)
    assert got.shape == (3,)
    assert got.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_the_average_of_one_is_itself() -> None:
    """Even for a text without tokens, which has no weight."""
    value = np.array([1.5, NAN], dtype=np.float32)
    assert average([value], [row(tokens=0)]) is value


def test_what_cannot_be_merged_is_refused() -> None:
    only_whole([row()], "never told")
    only_whole([], "never told")
    with pytest.raises(InvalidRequest, match="^two windows$") as raised:
        only_whole([row(), row()], "two windows")
    assert raised.value.field == "parameters.long_inputs"


@pytest.mark.parametrize(("value", "listed"), [("one", ["one"]), (["one", "two"], ["one", "two"]), (("x",), ["x"])])
def test_one_string_stands_for_a_list_of_one(value: Any, listed: List[str]) -> None:
    assert strings(value) == listed


# Functions.

logits = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8)


@quick
@given(values=logits)
@example(values=[1e4, -1e4])
@example(values=[0.0, 0.0, 0.0])
@example(values=[88.8, 88.7, -200.0])
def test_softmax(values: List[float]) -> None:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    expected = [power / math.fsum(powers) for power in powers]
    got = softmax(np.array(values, dtype=np.float32))
    assert got.dtype == np.float32
    assert got.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert math.fsum(got.tolist()) == pytest.approx(1, abs=1e-5)


def test_softmax_is_over_the_last_axis() -> None:
    values = np.array([[[1.0, 2.0], [3.0, 5.0]], [[0.0, 0.0], [-1.0, 1.0]]], dtype=np.float32)
    got = softmax(values)
    assert got.shape == values.shape
    for i in range(2):
        for j in range(2):
            assert got[i, j].tolist() == softmax(values[i, j]).tolist()


@quick
@given(values=logits)
@example(values=[1e4, -1e4, 0.0])
@example(values=[-90.0, 90.0])
def test_sigmoid(values: List[float]) -> None:
    """Without an overflow warning, which would be an error here."""
    expected = [(1 + math.tanh(value / 2)) / 2 for value in values]
    got = sigmoid(np.array(values, dtype=np.float32))
    assert got.dtype == np.float32
    assert got.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_functions_have_the_pipelines_names() -> None:
    from transformers.pipelines.text_classification import ClassificationFunction

    assert list(FUNCTIONS) and set(FUNCTIONS) == {function.value for function in ClassificationFunction}
    values = np.array([1.0, -2.0], dtype=np.float32)
    assert FUNCTIONS["none"](values).tolist() == [1.0, -2.0]
    assert FUNCTIONS["softmax"](values).tolist() == softmax(values).tolist()
    assert FUNCTIONS["sigmoid"](values).tolist() == sigmoid(values).tolist()


@pytest.mark.parametrize(
    ("labels", "problem", "function"),
    [
        (2, None, "softmax"),
        (3, "single_label_classification", "softmax"),
        (3, "multi_label_classification", "sigmoid"),
        (1, None, "sigmoid"),
        (1, "regression", "none"),
        (2, "regression", "none"),
    ],
)
def test_the_function_of_a_classifier(labels: int, problem: Optional[str], function: str) -> None:
    names = tuple(str(i) for i in range(labels))
    model = ModelFacts(
        config={"id2label": dict(enumerate(names)), "problem_type": problem},
        generation={},
        tokens={},
        labels=names,
        chat_template=None,
        read_json=lambda name: None,
    )
    assert function_to_apply(model) == function


def test_answers_of_another_shape_are_not_compared() -> None:
    """`same` reads scores of answers through these."""
    assert json_types.json_objects([{"score": 1}]) == [{"score": 1}] and json_types.number(0.5) == 0.5
    for value in ({"score": 1}, "text", [1], None):
        with pytest.raises(TypeError, match="a list of objects is needed"):
            json_types.json_objects(value)
    with pytest.raises(TypeError, match="a number is needed, not str"):
        json_types.number("0.5")
