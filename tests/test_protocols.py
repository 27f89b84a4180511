"""KServe V1 and the Open Inference Protocol: requests, answers, and the fields of errors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Tuple, Type

import pytest
import traceserve_runtime
from hypothesis import example, given, settings
from hypothesis import strategies as st
from traceserve_runtime.errors import InputTooLong, InvalidRequest, TraceserveError
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body
from traceserve_runtime.protocols.kserve import Instances
from traceserve_runtime.protocols.native import Plain
from traceserve_runtime.protocols.open_inference import Tensors
from traceserve_runtime.protocols.requests import parse_requests
from traceserve_runtime.protocols.wording import parse_json
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Request, Task
from traceserve_runtime.tasks.parameters import Field
from traceserve_runtime.tasks.question_answering import QuestionAnswering
from traceserve_runtime.tasks.sequence_classification import SequenceClassification
from traceserve_runtime.tasks.text_ranking import TextRanking
from traceserve_runtime.tasks.zero_shot_classification import ZeroShotClassification

quick = settings(deadline=None, max_examples=300, database=None)

HANDLERS = str(Path(traceserve_runtime.__file__).parents[1])
JSON = Headers("application/json")
MODEL: Any = SimpleNamespace(name="tiny", version="2.0")
TEXT = "Où est la gare? 👍🏽"


def read(value: Any, task: Type[Task] = SequenceClassification, most: int = 100) -> Body:
    """Return a body's requests, parsed by TorchServe or not."""
    body = parse_requests({"body": value}, JSON, task, 3, most)
    for headers in (JSON, Headers()):
        assert parse_requests({"body": json.dumps(value).encode()}, headers, task, 3, most) == body
    return body


def refusal(value: Any, task: Type[Task] = SequenceClassification) -> TraceserveError:
    """Return the error for a body, parsed by TorchServe or not."""
    with pytest.raises(InvalidRequest) as caught:
        parse_requests({"body": value}, JSON, task, 3, 100)
    with pytest.raises(InvalidRequest) as other:
        parse_requests({"body": json.dumps(value).encode()}, JSON, task, 3, 100)
    assert other.value.to_json() == caught.value.to_json()
    json.dumps(caught.value.to_json(), ensure_ascii=False).encode("utf-8")
    return caught.value


def tensor(name: str, *data: Any, **others: Any) -> Dict[str, Any]:
    return {"name": name, "shape": [len(data)], "datatype": "BYTES", "data": list(data), **others}


def asked(*inputs: Dict[str, Any], **parameters: Any) -> List[Request]:
    return [Request(item, parameters, 3) for item in inputs]


class Chat(SequenceClassification):
    """A task with a field of messages, and fields of which one is required."""

    fields = (Field("text", False, "a text"), Field("messages", False, "a chat", "messages"))

    @classmethod
    def check(cls, inputs: Any) -> None:
        if len(inputs) != 1:
            raise InvalidRequest("one of both")


# KServe V1


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"instances": ["one"]}, asked({"text": "one"})),
        ({"instances": ["one", TEXT]}, asked({"text": "one"}, {"text": TEXT})),
        ({"instances": [{"text": "one", "text_pair": "two"}]}, asked({"text": "one", "text_pair": "two"})),
        ({"instances": [{"data": "one", "target": 0}, {"data": "two"}]}, asked({"text": "one"}, {"text": "two"})),
        ({"instances": ["one", "two"], "parameters": {"top_k": 2}}, asked({"text": "one"}, {"text": "two"}, top_k=2)),
        (
            {"instances": [{"text": "one", "parameters": {"top_k": 1}}, "two"], "parameters": {"top_k": None}},
            [*asked({"text": "one"}, top_k=1), *asked({"text": "two"}, top_k=None)],
        ),
    ],
)
def test_instances(value: Any, wanted: List[Request]) -> None:
    assert read(value) == Body(wanted, Instances())


def test_instances_are_answered_with_predictions() -> None:
    for count in (1, 2):
        body = read({"instances": ["one"] * count})
        assert body.protocol.document([{"label": "a"}] * count, MODEL) == {"predictions": [{"label": "a"}] * count}


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"instances": []}, "instances"),
        ({"instances": "one"}, "instances"),
        ({"instances": None}, "instances"),
        ({"instances": {"text": "one"}}, "instances"),
        ({"instances": ["one", 2]}, "instances[1]"),
        ({"instances": [["one"]]}, "instances[0]"),
        ({"instances": [{"data": ["one", "two"]}]}, "instances[0]"),
        ({"instances": ["one", {"text": "two"}, {"text": 3}]}, "instances[2].text"),
        ({"instances": ["one", {}]}, "instances[1].text"),
        ({"instances": [{"txt": "one"}]}, "instances[0].txt"),
        ({"instances": ["a", "b\0"]}, "instances[1].text"),
        ({"instances": [{"instances": ["one"]}]}, "instances[0].instances"),
        ({"instances": [{"text": "one", "parameters": {"top_k": 0}}]}, "instances[0].parameters.top_k"),
        ({"instances": ["one"], "parameters": {"colour": 1}}, "parameters.colour"),
        ({"instances": ["one"], "parameters": None}, "parameters"),
        ({"instances": ["one"], "inputs": "two"}, "inputs"),
        ({"instances": ["one"], "signature": "two"}, "signature"),
        ([{"instances": ["one"]}], "[0].instances"),
    ],
)
def test_illegal_instances(value: Any, field: str) -> None:
    assert refusal(value).field == field


# Open Inference Protocol


@pytest.mark.parametrize("name", ["input-0", "text", "anything at all", ""])
@pytest.mark.parametrize(
    ("shape", "data", "count"),
    [
        ([1], ["one"], 1),
        ([3], ["one", "two", "three"], 3),
        ([3, 1], ["one", "two", "three"], 3),
        ([3, 1], [["one"], ["two"], ["three"]], 3),
        ([1, 3], [["one", "two", "three"]], 3),
        ([1, 1], [[["one"]]], 1),
        ([], ["one"], 1),
    ],
)
def test_each_element_of_a_sole_tensor_is_a_request(name: str, shape: Any, data: Any, count: int) -> None:
    body = read({"inputs": [{"name": name, "shape": shape, "datatype": "BYTES", "data": data}]})
    texts: List[Dict[str, Any]] = [{"text": text} for text in ("one", "two", "three")]
    assert body == Body(asked(*texts[:count]), Tensors(None, "output", {"text": "inputs[0]"}))


def test_a_text_that_looks_like_json_is_a_text() -> None:
    text = '{"text": "one"}'
    assert read({"inputs": [tensor("input-0", text)]}).requests == asked({"text": text})


def test_tensors_are_fields_by_name() -> None:
    body = read({"inputs": [tensor("text_pair", "one", "two"), tensor("text", "three", TEXT)]})
    assert body.requests == asked({"text": "three", "text_pair": "one"}, {"text": TEXT, "text_pair": "two"})
    pair = tensor("question", "Who?", shape=[1, 1]), tensor("context", "A crow.", shape=[])
    assert read({"inputs": list(pair)}, QuestionAnswering).requests == asked({"question": "Who?", "context": "A crow."})


def test_lists_are_json_in_an_element() -> None:
    inputs = [tensor("query", "one", "two"), tensor("documents", '["a", "b"]', '["\\ud83d\\ude0d"]')]
    assert read({"inputs": inputs}, TextRanking).requests == asked(
        {"query": "one", "documents": ["a", "b"]}, {"query": "two", "documents": ["😍"]}
    )
    messages = [{"role": "user", "content": TEXT}]
    inputs = [tensor("messages", json.dumps(messages))]
    assert read({"inputs": inputs}, Chat).requests == asked({"messages": messages})
    assert read({"inputs": [tensor("input-0", "[]")]}, Chat).requests == asked({"text": "[]"})


def test_a_sole_tensor_holds_objects_where_several_fields_are_required() -> None:
    one, two = {"question": "Who?", "context": "A crow."}, {"question": "What?", "context": "A nut."}
    elements = json.dumps(one), " " + json.dumps({**two, "parameters": {"top_k": 2}})
    body = read({"inputs": [tensor("input-0", *elements)], "parameters": {"top_k": 3}}, QuestionAnswering)
    assert body.requests == [*asked(one, top_k=3), *asked(two, top_k=2)]
    assert [request.where for request in body.requests] == ["inputs[0].data[0]", "inputs[0].data[1]"]


def elements_of(task: Type[Task], name: str) -> str:
    """Return the sample's field as a tensor's element."""
    kind = next(field.kind for field in task.fields if field.name == name)
    return str(task.sample[name]) if kind == "text" else json.dumps(task.sample[name])


@pytest.mark.parametrize("name", list(TASKS))
def test_every_tasks_sample_in_every_protocol(name: str) -> None:
    task = TASKS[name]
    sample, parameters = task.sample, task.sample_parameters
    wanted = [Request(sample, parameters, 3)] * 2
    assert read({"instances": [sample, sample], "parameters": parameters}, task).requests == wanted
    columns = [tensor(key, *[elements_of(task, key)] * 2) for key in sample]
    assert read({"inputs": columns, "parameters": parameters}, task).requests == wanted
    first = task.fields[0].name
    if sum(field.required for field in task.fields) > 1:
        sole, wanted = json.dumps(sample), wanted[:1]
    else:
        sole, wanted = elements_of(task, first), [Request({first: sample[first]}, parameters, 3)]
    assert read({"inputs": [tensor("input-0", sole)], "parameters": parameters}, task).requests == wanted


IGNORED = {
    "binary_data_output": False,
    "content_type": "str",
    "headers": {"a": "b"},
    "sequence_id": 1,
    "sequence_start": True,
    "sequence_end": False,
    "priority": 1,
    "timeout": 1000,
}


def test_parameters_of_body_and_tensors_hold_for_all() -> None:
    value = {
        "inputs": [
            tensor("text", "one", "two", parameters={**IGNORED, "top_k": 2}),
            tensor("text_pair", "a", "b", parameters={"top_k": 2, "function_to_apply": "none"}),
        ],
        "parameters": {**IGNORED, "long_inputs": "reject"},
        "outputs": [{"name": "labels", "parameters": {"binary_data": False}}],
    }
    parameters = {"top_k": 2, "function_to_apply": "none", "long_inputs": "reject"}
    pairs = {"text": "one", "text_pair": "a"}, {"text": "two", "text_pair": "b"}
    assert read(value).requests == asked(*pairs, **parameters)


def test_nulls_are_as_nothing() -> None:
    """Clients with optional members in classes send these."""
    value = {
        **dict.fromkeys(("id", "model_name", "model_version", "parameters", "outputs")),
        "inputs": [tensor("input-0", "one", parameters=None)],
    }
    body = read(value)
    assert body == Body(asked({"text": "one"}), Tensors(None, "output", {"text": "inputs[0]"}))
    assert set(body.protocol.document([1], MODEL)) == {"model_name", "model_version", "outputs"}


def test_what_the_model_is_called_by_the_client_is_of_no_matter() -> None:
    value = {"id": "7", "model_name": "other", "model_version": "9", "inputs": [tensor("a", "one")]}
    assert read(value).protocol.document([{"a": 1}], MODEL) == {
        "model_name": "tiny",
        "model_version": "2.0",
        "id": "7",
        "outputs": [{"name": "output", "shape": [1], "datatype": "BYTES", "data": ['{"a":1}']}],
    }


@pytest.mark.parametrize(
    ("inputs", "is_ours"),
    [
        ([tensor("a", "one")], False),
        ([tensor("a", "one"), tensor("b", "two")], False),
        ([{"datatype": "BYTES"}], False),
        ([{"data": ["one"], "shape": [1]}], False),
        ([tensor("a", "one"), {"text": "two"}], True),
        ([tensor("a", "one"), "two"], True),
        ([{"data": ["one"]}], True),
        ([{"shape": [1], "name": "a"}], True),
        (tensor("a", "one"), True),
    ],
)
def test_tensors_are_told_from_our_own_inputs(inputs: Any, is_ours: bool) -> None:
    error = refusal({"inputs": inputs, "colour": 1})
    assert error.message.startswith('"colour" cannot stand beside "inputs"' if is_ours else 'unknown key "colour"')


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"datatype": "INT64"}, "datatype", 'the tensor "a" has the datatype "INT64"; texts are "BYTES"'),
        ({"datatype": None}, "datatype", 'the tensor "a" has the datatype null; texts are "BYTES"'),
        ({"shape": [3]}, "data", 'the tensor "a" has 2 elements, but by its shape 3'),
        ({"shape": []}, "data", 'the tensor "a" has 2 elements, but by its shape 1'),
        ({"shape": [1, 1]}, "data", 'the tensor "a" has 2 elements, but by its shape 1'),
        ({"shape": [0, 1]}, "data", 'the tensor "a" has 2 elements, but by its shape 0'),
        ({"shape": [(1 << 64) - 1]}, "data", "by its shape 18,446,744,073,709,551,615"),
        ({"shape": [1 << 64]}, "shape", '"shape" should be [n], [n, 1], [1, n] or []'),
        ({"shape": [2, 1, 1]}, "shape", '"shape" should be'),
        ({"shape": [2, 2]}, "shape", '"shape" should be'),
        ({"shape": [-1]}, "shape", '"shape" should be'),
        ({"shape": [True]}, "shape", '"shape" should be'),
        ({"shape": [2.0]}, "shape", '"shape" should be'),
        ({"shape": ["2"]}, "shape", '"shape" should be'),
        ({"shape": 2}, "shape", '"shape" should be'),
        ({"shape": None}, "shape", '"shape" should be'),
        ({"shape": [0], "data": []}, "data", 'the tensor "a" is empty: it asks nothing'),
        ({"data": "one"}, "data", '"data" should be a list, not a string'),
        ({"data": None}, "data", '"data" should be a list, not null'),
        ({"data": ["one", 2]}, "data[1]", "an element should be a string, not a number"),
        ({"data": [["one"], [None]]}, "data[1]", "an element should be a string, not null"),
        ({"data": ["one", {"text": "two"}]}, "data[1]", "an element should be a string, not an object"),
        ({"data": ["one", "two\0"]}, "data[1]", "the text holds a null character"),
        ({"data": ["\ud800", "two"]}, "data[0]", "the text holds half a surrogate pair at character 0"),
        ({"name": None}, "name", '"name" should be a string, not null'),
        ({"name": "\ud800"}, "name", "half a surrogate pair"),
        ({"name": "text_pair"}, "", 'no tensor is named "text": the text to classify'),
        ({"colour": 1}, "colour", 'unknown key "colour"; "name", "shape", "datatype", "data", "parameters" are known'),
        ({"parameters": []}, "parameters", '"parameters" should be an object, not a list'),
        ({"parameters": {"topk": 1}}, "parameters.topk", 'unknown parameter "topk" (did you mean "top_k"?)'),
        ({"parameters": {"top_k": 0}}, "parameters.top_k", '"top_k" should be a whole number'),
    ],
)
def test_an_illegal_tensor(change: Dict[str, Any], field: str, message: str) -> None:
    error = refusal({"inputs": [{**tensor("a", "one", "two"), **change}]})
    assert error.field == (f"inputs[0].{field}" if field else "inputs")
    assert message in error.message


@pytest.mark.parametrize("key", ["name", "shape", "data"])
def test_a_tensor_lacks_a_key(key: str) -> None:
    sent = tensor("a", "one")
    del sent[key]
    error = refusal({"inputs": [sent]})
    assert (error.field, error.message) == (f"inputs[0].{key}", f'"{key}" of a tensor is missing')


def test_a_tensor_lacks_its_datatype() -> None:
    error = refusal({"inputs": [{"name": "a", "shape": [1], "data": ["one"]}]})
    assert error.field == "inputs[0].datatype"


@pytest.mark.parametrize(
    ("others", "field"),
    [
        ({"colour": 1}, "colour"),
        ({"text": "one"}, "text"),
        ({"id": 7}, "id"),
        ({"id": "\ud800"}, "id"),
        ({"parameters": "a"}, "parameters"),
        ({"parameters": {"colour": 1}}, "parameters.colour"),
        ({"parameters": {"top_k": "1"}}, "parameters.top_k"),
        ({"outputs": "a"}, "outputs"),
        ({"outputs": {}}, "outputs"),
        ({"outputs": [{"name": "a"}, {"name": "b"}]}, "outputs"),
        ({"outputs": ["a"]}, "outputs[0]"),
        ({"outputs": [{}]}, "outputs[0]"),
        ({"outputs": [{"name": 1}]}, "outputs[0].name"),
        ({"outputs": [{"name": "a", "shape": [1]}]}, "outputs[0].shape"),
        ({"outputs": [{"name": "a", "parameters": {"classification": 2}}]}, "outputs[0].parameters.classification"),
        ({"outputs": [{"name": "a", "parameters": 1}]}, "outputs[0].parameters"),
    ],
)
def test_an_illegal_body_of_tensors(others: Dict[str, Any], field: str) -> None:
    assert refusal({"inputs": [tensor("a", "one")], **others}).field == field


@pytest.mark.parametrize(
    ("inputs", "field", "message"),
    [
        ([tensor("text", "a"), tensor("txet_pair", "b")], "inputs[1].name", '(did you mean "text_pair"?)'),
        ([tensor("a", "a"), tensor("b", "b")], "inputs[0].name", 'the tensor "a" is no field'),
        ([tensor("text", "a"), tensor("text", "b")], "inputs[1].name", 'two tensors are named "text"'),
        ([tensor("text", "a"), tensor("text_pair", "b", "c")], "inputs[1].data", '2 elements, but "text" 1'),
        ([tensor("text", "a", "b"), tensor("text_pair", "c", "d\0")], "inputs[1].data[1]", "null character"),
        (
            [tensor("text", "a", parameters={"top_k": 1}), tensor("text_pair", "b", parameters={"top_k": 2})],
            "inputs[1].parameters.top_k",
            "differs",
        ),
    ],
)
def test_tensors_that_do_not_go_together(inputs: Any, field: str, message: str) -> None:
    error = refusal({"inputs": inputs})
    assert error.field == field and message in error.message


def test_a_parameter_of_the_body_that_a_tensor_denies() -> None:
    value = {"inputs": [tensor("a", "a", parameters={"top_k": 1})], "parameters": {"top_k": 2}}
    assert refusal(value).field == "inputs[0].parameters.top_k"


@pytest.mark.parametrize(
    ("task", "inputs", "field", "message"),
    [
        (QuestionAnswering, [tensor("question", "a")], "inputs", 'no tensor is named "context": the text that holds'),
        (QuestionAnswering, [tensor("a", "Who?")], "inputs[0].data[0]", 'tensors named "question", "context"'),
        (QuestionAnswering, [tensor("a", "{}", "Who?")], "inputs[0].data[1]", "a text alone is not enough"),
        (QuestionAnswering, [tensor("a", "{")], "inputs[0].data[0]", "is not valid JSON"),
        (QuestionAnswering, [tensor("a", '{"question": "a"}')], "inputs[0].data[0].context", "is missing"),
        (QuestionAnswering, [tensor("a", '{"question": 1}')], "inputs[0].data[0].question", "should be a string"),
        (QuestionAnswering, [tensor("a", '{"data": {}}')], "inputs[0].data[0].data", "unknown field"),
        (
            QuestionAnswering,
            [tensor("a", '{"question": "a", "context": "b", "parameters": {"top_k": 0}}')],
            "inputs[0].data[0].parameters.top_k",
            "a whole number",
        ),
        (
            QuestionAnswering,
            [tensor("context", "a", "b"), tensor("question", "c", "")],
            "inputs[1].data[1]",
            "the question is empty",
        ),
        (TextRanking, [tensor("query", "a"), tensor("documents", "b")], "inputs[1].data[0]", "not valid JSON"),
        (TextRanking, [tensor("query", "a"), tensor("documents", '"b"')], "inputs[1].data[0]", "should be a list"),
        (TextRanking, [tensor("query", "a"), tensor("documents", "[]")], "inputs[1].data[0]", "the list is empty"),
        (TextRanking, [tensor("documents", '["b", 1]'), tensor("query", "a")], "inputs[0].data[0][1]", "a string"),
        (TextRanking, [tensor("query", "a"), tensor("documents", "[" * 10**5)], "inputs[1].data[0]", "nested too deep"),
        (Chat, [tensor("messages", '[{"role": 1, "content": ""}]')], "inputs[0].data[0][0].role", "a string"),
        (Chat, [tensor("messages", "[]"), tensor("text", "a")], "inputs[0].data[0]", "one of both"),
    ],
)
def test_fields_of_a_task(task: Type[Task], inputs: Any, field: str, message: str) -> None:
    error = refusal({"inputs": inputs}, task)
    assert error.field == field and message in error.message


@pytest.mark.parametrize(
    ("value", "task", "field", "place"),
    [
        (["a", "b"], SequenceClassification, None, "[1]"),
        (["a", "b"], SequenceClassification, "text", "[1].text"),
        ({"instances": ["a", "b"]}, SequenceClassification, "text", "instances[1].text"),
        ({"instances": ["a", "b"]}, SequenceClassification, "parameters.top_k", "parameters.top_k"),
        ({"inputs": ["a", "b"]}, SequenceClassification, "parameters.top_k", "parameters.top_k"),
        (["a", {"data": "b"}], SequenceClassification, "parameters.top_k", "[1].parameters.top_k"),
        (
            {"inputs": ["a", {"text": "b", "parameters": {"top_k": 1}}]},
            SequenceClassification,
            "parameters.top_k",
            "inputs[1].parameters.top_k",
        ),
        ({"inputs": [tensor("a", "a", "b")]}, SequenceClassification, "text", "inputs[0].data[1]"),
        ({"inputs": [tensor("a", "a", "b")]}, SequenceClassification, None, "inputs[0].data[1]"),
        ({"inputs": [tensor("a", "a", "b")]}, ZeroShotClassification, "parameters.candidate_labels", None),
        (
            {"inputs": [tensor("query", "a", "b"), tensor("documents", '["a"]', '["b"]')]},
            TextRanking,
            "documents[0]",
            "inputs[1].data[1][0]",
        ),
        (
            {"inputs": [tensor("a", *['{"query": "a", "documents": ["b"]}'] * 2)]},
            TextRanking,
            "documents[0]",
            "inputs[0].data[1].documents[0]",
        ),
    ],
)
def test_what_the_engine_finds_has_its_place_in_the_body(
    value: Any, task: Type[Task], field: Optional[str], place: Optional[str]
) -> None:
    assert read(value, task).field_path(1, field) == (place or field)


@pytest.mark.parametrize("value", [{"instances": ["a"] * 10}, {"inputs": [tensor("a", *["a"] * 10)]}])
def test_a_body_may_ask_as_much_as_the_limit(value: Any) -> None:
    assert len(read(value, most=10).requests) == 10
    with pytest.raises(InputTooLong, match="the list has 10 texts; one request may have 9;"):
        parse_requests({"body": value}, JSON, SequenceClassification, 0, 9)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: {"instances": inner},
        lambda inner: {"instances": ["a"], "parameters": {"top_k": inner}},
        lambda inner: {"inputs": [{"name": "a", "shape": [1], "datatype": "BYTES", "data": inner}]},
        lambda inner: {"inputs": [{"name": "a", "shape": [1], "datatype": inner, "data": ["a"]}]},
        lambda inner: {"inputs": [{"name": "a", "shape": inner, "datatype": "BYTES", "data": ["a"]}]},
    ],
)
def test_deeply_nested_values_are_refused(wrap: Any) -> None:
    value: Any = ["a"]
    for _ in range(50_000):
        value = [value]
    with pytest.raises(InvalidRequest):
        parse_requests({"body": wrap(value)}, JSON, SequenceClassification, 0, 10)


DEEP = """
import gc, sys
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.requests import parse_requests
from traceserve_runtime.errors import InvalidRequest
from traceserve_runtime.tasks.sequence_classification import SequenceClassification

class Garbage:
    def __init__(self):
        self.me = self
    def __del__(self):
        call(30)

def call(depth):
    return depth and call(depth - 1)

sys.unraisablehook = lambda found: call(60)
gc.callbacks.append(lambda *_: Garbage() and None)
gc.set_threshold(5)
for text in (False, True):
    value = ["a"]
    for _ in range(50_000):
        value = [value]
    body = {"instances": value}
    if text:
        body = b'{"instances":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    try:
        parse_requests({"body": body}, Headers("" if text else "application/json"), SequenceClassification, 0, 10)
    except InvalidRequest as error:
        assert "nested too deeply" in error.message
        print("refused")
"""


def test_no_garbage_of_a_deeply_nested_value_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", DEEP], capture_output=True, text=True, env={"PYTHONPATH": HANDLERS})
    assert done.stdout.split() == ["refused"] * 2, done.stderr


@pytest.mark.parametrize(
    ("text", "deep"),
    [
        ("[" * 64 + "]" * 64, False),
        ("[" * 200 + "]" * 200, True),
        ('{"a":' * 200 + "1" + "}" * 200, True),
        ('{"a":[' * 100 + "]}" * 100, True),
        ("[" + "[]," * 5000 + "[]]", False),
        (json.dumps({"text": "[" * 1000}), False),
        (json.dumps({"text": '"\\' + '[{"' * 1000}), False),
        (json.dumps({'\\"': '\\\\"[', **{str(i): [{}] for i in range(99)}}), False),
        ("[" * 1000, True),
        ("]" * 1000, False),
    ],
)
def test_how_deep_a_text_is_nested(text: str, deep: bool) -> None:
    try:
        parse_json(text)
        message = ""
    except InvalidRequest as error:
        message = error.message
    assert ("nested too deeply" in message) == deep


# Answers


@pytest.mark.parametrize(
    ("answers", "shape", "data"),
    [
        ([[0.5, 1.0]], [1, 2], [0.5, 1.0]),
        ([[0.5, 1], [2, -3.5], [0.0, 0.0]], [3, 2], [0.5, 1, 2, -3.5, 0.0, 0.0]),
        ([[[[1.0, 2.0]]], [[[3.0, 4.0]]]], [2, 1, 1, 2], [1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_vectors_are_one_tensor_of_numbers(answers: Any, shape: List[int], data: List[float]) -> None:
    document = Tensors(None, "output", {}).document(answers, MODEL)
    assert document["outputs"] == [{"name": "output", "shape": shape, "datatype": "FP32", "data": data}]


@pytest.mark.parametrize(
    "answers",
    [
        [{"label": "é", "score": 0.5}],
        [[0.5, 1.0], [2.0]],
        [[[1.0]], [1.0]],
        [[], []],
        [[[], []]],
        [[True, False]],
        [[1.0, None]],
        [[1.0], {"label": "a"}],
        [[{"label": "a"}], [{"label": "b"}]],
        [[1.0, [2.0]]],
        [1.0, 2.0],
        ["a"],
        [None],
    ],
)
def test_other_answers_are_json_texts(answers: List[Any]) -> None:
    [output] = Tensors(None, "o", {}).document(answers, MODEL)["outputs"]
    assert (output["name"], output["shape"], output["datatype"]) == ("o", [len(answers)], "BYTES")
    assert [json.loads(text) for text in output["data"]] == answers


def test_our_own_protocol_answers_as_it_was_asked() -> None:
    assert Plain(False).document([{"a": 1}], MODEL) == {"a": 1}
    assert Plain(True).document([{"a": 1}], MODEL) == [{"a": 1}]


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\0", "\ud800", "{"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
numbers = st.integers(0, 3) | st.floats(allow_nan=False, allow_infinity=False)
vectors = st.recursive(numbers, lambda inner: st.lists(inner, max_size=3), max_leaves=12)


@quick
@given(answers=st.lists(anything | vectors, min_size=1, max_size=4))
def test_every_answer_can_be_told(answers: List[Any]) -> None:
    [output] = Tensors(None, "output", {}).document(answers, MODEL)["outputs"]
    assert math.prod(output["shape"]) == len(output["data"])
    assert output["shape"][0] == len(answers)
    if output["datatype"] == "BYTES":
        assert [json.dumps(json.loads(text)) for text in output["data"]] == [json.dumps(answer) for answer in answers]
    else:
        assert all(isinstance(number, (int, float)) for number in output["data"])


def maybe(value: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return mostly the value, else anything."""
    return st.one_of(value, value, value, anything)


names = st.sampled_from(sorted({"input-0", *(field.name for task in TASKS.values() for field in task.fields)}))
parameters = maybe(
    st.dictionaries(
        st.sampled_from(sorted({*IGNORED, *(p.name for task in TASKS.values() for p in task.all_parameters())})),
        anything,
        max_size=2,
    )
)
elements = st.sampled_from(["a", "", "[]", '["a"]', '{"question": "a", "context": "b"}', "{", "\0"]) | st.text(
    max_size=5
)
fields = st.dictionaries(
    names | st.sampled_from(["parameters", "data", "inputs", "target"]), maybe(elements), max_size=3
)
tensors = st.fixed_dictionaries(
    {
        "name": maybe(names),
        "shape": maybe(st.sampled_from([[1], [2], [], [2, 1], [1, 2], [0], [1, 1]])),
        "datatype": maybe(st.sampled_from(["BYTES", "BYTES", "BYTES", "FP32"])),
        "data": maybe(st.lists(maybe(elements | st.lists(elements, max_size=2)), max_size=2)),
    },
    optional={"parameters": parameters},
)
bodies = st.one_of(
    st.fixed_dictionaries(
        {"instances": maybe(st.lists(maybe(elements | fields), max_size=3))},
        optional={"parameters": parameters, "inputs": anything},
    ),
    st.fixed_dictionaries(
        {"inputs": maybe(st.lists(tensors, max_size=2))},
        optional={
            "id": maybe(st.text(max_size=5)),
            "parameters": parameters,
            "outputs": maybe(st.lists(st.fixed_dictionaries({"name": maybe(names)}), max_size=2)),
            "model_name": anything,
        },
    ),
    st.dictionaries(st.sampled_from(["instances", "inputs", "id", "parameters", "outputs"]), anything, max_size=4),
)


@quick
@given(value=bodies, name=st.sampled_from(sorted(TASKS)), as_bytes=st.booleans())
@example(value={"inputs": [tensor("input-0", "a")]}, name="text_ranking", as_bytes=True)
def test_no_body_raises_what_is_not_its_own_fault(value: Any, name: str, as_bytes: bool) -> None:
    task = TASKS[name]
    try:
        body = parse_requests({"body": json.dumps(value).encode() if as_bytes else value}, JSON, task, 0, 2)
    except TraceserveError as error:
        assert 400 <= error.status < 500
        json.dumps(error.to_json(), ensure_ascii=False).encode("utf-8")
        assert error.message and error.message.isprintable()
        return
    assert body.requests
    places: List[Tuple[int, Optional[str]]] = [(i, None) for i in range(len(body.requests))]
    places += [(i, key) for i, request in enumerate(body.requests) for key in request.inputs]
    assert len({body.field_path(i, key) for i, key in places}) >= len(body.requests)
    document = body.protocol.document([{"score": 1.0}] * len(body.requests), MODEL)
    json.dumps(document, ensure_ascii=False).encode("utf-8")
