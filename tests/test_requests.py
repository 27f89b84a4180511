"""Clients' requests: every legal form is accepted, everything else is refused with its field."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import tracemalloc
from types import SimpleNamespace
from typing import Any, Dict, List, Mapping, Optional
from urllib.parse import quote, quote_plus, urlencode

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from traceserve_runtime.errors import InputTooLong, InvalidRequest, TraceserveError
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body
from traceserve_runtime.protocols.native import Plain
from traceserve_runtime.protocols.ranking import Rerank
from traceserve_runtime.protocols.requests import Native, parse_requests
from traceserve_runtime.protocols.wording import JsonBudget, parse_json
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Request
from traceserve_runtime.tasks.feature_extraction import FeatureExtraction
from traceserve_runtime.tasks.parameters import Field
from traceserve_runtime.tasks.question_answering import QuestionAnswering
from traceserve_runtime.tasks.sequence_classification import SequenceClassification
from traceserve_runtime.tasks.text_ranking import TextRanking

quick = settings(deadline=None, max_examples=50, database=None)

TEXT = "Où est la gare? 👍🏽"
PAIR = {"text": "one", "text_pair": "two"}
FORM = "application/x-www-form-urlencoded"
JSON = "application/json"


def read(row: Mapping[str, Any], content_type: str = "", content_length: Optional[int] = None, most: int = 10) -> Body:
    return parse_requests(row, Headers(content_type, content_length), SequenceClassification, 3, most)


def refusal(row: Mapping[str, Any], content_type: str = "", content_length: Optional[int] = None) -> TraceserveError:
    """Return the error for an item."""
    with pytest.raises(TraceserveError) as caught:
        read(row, content_type, content_length)
    return caught.value


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8")


# Each legal body, its requests (inputs, or inputs and parameters), and whether the answer is a list.
ONE: List[Any] = [{"text": TEXT}]
LEGAL: Dict[str, Any] = {
    "a text": (TEXT, ONE, False),
    "an empty text": ("", [{"text": ""}], False),
    "a field": ({"text": TEXT}, ONE, False),
    "a pair": (PAIR, [PAIR], False),
    "a field with parameters": ({"text": TEXT, "parameters": {"top_k": 2}}, [({"text": TEXT}, {"top_k": 2})], False),
    "inputs": ({"inputs": TEXT}, ONE, False),
    "inputs with parameters": (
        {"inputs": TEXT, "parameters": {"top_k": None}},
        [({"text": TEXT}, {"top_k": None})],
        False,
    ),
    "inputs of a pair": ({"inputs": PAIR}, [PAIR], False),
    "inputs of many": (
        {"inputs": ["one", PAIR], "parameters": {"top_k": 1}},
        [({"text": "one"}, {"top_k": 1}), (PAIR, {"top_k": 1})],
        True,
    ),
    "data": ({"data": TEXT}, ONE, False),
    "data of a field": ({"data": {"text": TEXT}}, ONE, False),
    "data of many": ({"data": ["one", "two"]}, [{"text": "one"}, {"text": "two"}], True),
    "data with parameters within": (
        {"data": {"text": TEXT, "parameters": {"top_k": 4}}},
        [({"text": TEXT}, {"top_k": 4})],
        False,
    ),
    "inner parameters prevail": (
        {
            "inputs": [{"text": "one", "parameters": {"top_k": 1}}, "two"],
            "parameters": {"top_k": 2, "long_inputs": "reject"},
        },
        [
            ({"text": "one"}, {"top_k": 1, "long_inputs": "reject"}),
            ({"text": "two"}, {"top_k": 2, "long_inputs": "reject"}),
        ],
        True,
    ),
    "a list of one": ([TEXT], ONE, True),
    "a list of any mix": (
        ["one", PAIR, {"inputs": "three"}, {"data": {"text": "four"}}, {"text": "five", "target": 0}],
        [{"text": "one"}, PAIR, {"text": "three"}, {"text": "four"}, {"text": "five"}],
        True,
    ),
    "target": ({"text": TEXT, "target": 1}, ONE, False),
    "target beside inputs": ({"inputs": TEXT, "target": "any"}, ONE, False),
    "target beside data": ({"data": TEXT, "target": None}, ONE, False),
}


def asked(wanted: List[Any]) -> List[Request]:
    """Return the requests of one item, of group 3, in a row of LEGAL."""
    return [Request(w[0], w[1], 3) if isinstance(w, tuple) else Request(w, {}, 3) for w in wanted]


@pytest.mark.parametrize("name", list(LEGAL))
def test_json_that_torchserve_has_parsed(name: str) -> None:
    value, wanted, is_list = LEGAL[name]
    assert read({"body": value}, JSON) == Body(asked(wanted), Plain(is_list))


@pytest.mark.parametrize("content_type", [JSON, "application/json; charset=utf-8", "application/vnd.any+json"])
@pytest.mark.parametrize("name", list(LEGAL))
def test_json_as_bytes(name: str, content_type: str) -> None:
    """As from SageMaker, and from TorchServe if the content type is more than application/json."""
    value, wanted, is_list = LEGAL[name]
    assert read({"body": as_json(value)}, content_type) == Body(asked(wanted), Plain(is_list))
    assert read({"body": bytearray(as_json(value))}, content_type) == Body(asked(wanted), Plain(is_list))


@pytest.mark.parametrize("content_type", ["", "application/octet-stream"])
@pytest.mark.parametrize("name", list(LEGAL))
def test_json_of_an_unknown_content_type(name: str, content_type: str) -> None:
    value, wanted, is_list = LEGAL[name]
    assert read({"body": b" \n" + as_json(value)}, content_type) == Body(asked(wanted), Plain(is_list))


@pytest.mark.parametrize("name", list(LEGAL))
def test_json_in_the_key_of_a_form(name: str) -> None:
    """`curl -d JSON` without a content type; netty splits it at = and &."""
    value, wanted, is_list = LEGAL[name]
    text = as_json(value).decode()
    assert read({text: b""}, FORM, len(text.encode())) == Body(asked(wanted), Plain(is_list))


def test_json_with_an_equals_sign_in_the_place_of_a_form() -> None:
    text = '{"text": "a=b"}'
    key, value = text.split("=")
    assert read({key: value.encode()}, FORM, len(text)).requests == asked([{"text": "a=b"}])


@pytest.mark.parametrize("content_type", ["text/plain", "text/plain; charset=utf-8", "text/csv"])
@pytest.mark.parametrize("text", [TEXT, '{"text": "no JSON here"}', '"quoted"', "[1]", "{", " "])
def test_plain_text_is_never_read_as_json(text: str, content_type: str) -> None:
    quotes = '"' if content_type == "text/csv" else ""  # around a cell; other texts have none at their ends
    wanted = Body(asked([{"text": text.strip(quotes) if quotes else text}]), Plain(False))
    assert read({"body": text.encode()}, content_type) == wanted
    assert read({"body": text}, content_type) == wanted


@pytest.mark.parametrize("text", [TEXT, "[sic] this is a text", '"Well", he said', "12", "null", "true"])
def test_bytes_of_an_unknown_content_type_that_are_no_json_are_a_text(text: str) -> None:
    assert read({"body": text.encode()}).requests == asked([{"text": text}])


def test_bytes_that_begin_an_object_and_are_no_json_are_refused() -> None:
    error = refusal({"body": b'{"text": "half'})
    assert isinstance(error, InvalidRequest)
    assert error.field == "body" and "not valid JSON" in error.message


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"text": TEXT.encode()}, {"text": TEXT}),
        ({"text": TEXT}, {"text": TEXT}),
        ({"text": bytearray(b"one"), "text_pair": b"two"}, PAIR),
        ({"data": TEXT.encode()}, {"text": TEXT}),
        ({"inputs": TEXT.encode()}, {"text": TEXT}),
        ({"text": b"one", "target": b"0"}, {"text": "one"}),
        ({"text": b"", "text_pair": b""}, {"text": "", "text_pair": ""}),
        ({TEXT: b""}, {"text": TEXT}),
        ({TEXT: ""}, {"text": TEXT}),
    ],
)
@pytest.mark.parametrize("content_type", [FORM, "multipart/form-data; boundary=x"])
def test_forms(row: Dict[str, Any], wanted: Dict[str, str], content_type: str) -> None:
    assert read(row, content_type) == Body(asked([wanted]), Plain(False))


@pytest.mark.parametrize("field", ["text", "inputs", "data"])
def test_a_form_has_parameters_as_json(field: str) -> None:
    body = read({field: b"one", "parameters": b'{"top_k": 2}'}, "multipart/form-data")
    assert body.requests == asked([({"text": "one"}, {"top_k": 2})])


def test_every_request_has_the_group_of_its_row() -> None:
    body = parse_requests({"body": ["a", {"data": ["b"]}["data"][0]]}, Headers(), SequenceClassification, 7, 5)
    assert [request.group for request in body.requests] == [7, 7]


def test_the_parameters_are_the_tasks_own() -> None:
    row = {"body": {"text": "a", "parameters": {"pooling": "mean", "normalize": True}}}
    assert parse_requests(row, Headers(), FeatureExtraction, 0, 1).requests[0].parameters == {
        "pooling": "mean",
        "normalize": True,
    }
    assert refusal(row).field == "parameters.pooling"


@pytest.mark.parametrize("name", list(TASKS))
def test_every_tasks_sample_is_legal(name: str) -> None:
    task = TASKS[name]
    sample, parameters = task.sample, task.sample_parameters
    request = Request(sample, parameters, 0)
    for body in ({**sample, "parameters": parameters}, {"inputs": sample, "parameters": parameters}):
        assert parse_requests({"body": as_json(body)}, Headers(JSON), task, 0, 1) == Body([request], Plain(False))
    many = {"data": [sample, {**sample, "parameters": parameters}]}
    assert parse_requests({"body": many}, Headers(), task, 0, 2).requests == [Request(sample, {}, 0), request]


@pytest.mark.parametrize("name", list(TASKS))
def test_a_bare_text_is_the_first_field_or_told_what_is_needed(name: str) -> None:
    task = TASKS[name]
    required = [field.name for field in task.fields if field.required]
    if len(required) <= 1:
        [request] = parse_requests({"body": "a text"}, Headers(), task, 0, 1).requests
        assert request.inputs == {task.fields[0].name: "a text"}
        return
    with pytest.raises(InvalidRequest, match="a text alone is not enough") as caught:
        parse_requests({"body": ["a text"]}, Headers(), task, 0, 1)
    assert caught.value.field == "[0]"
    assert all(f'"{name}"' in caught.value.message for name in required)


@pytest.mark.parametrize(
    ("value", "field", "message"),
    [
        ({"question": "Who?"}, "context", '"context" is missing: the text that holds the answer'),
        ([{"context": "A crow."}], "[0].question", '"question" is missing: the question'),
        ({"inputs": [{"question": "", "context": "A crow."}]}, "inputs[0].question", "the question is empty"),
        ({"question": ["Who?"], "context": "A crow."}, "question", '"question" should be a string, not a list'),
    ],
)
def test_several_required_fields(value: Any, field: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_requests({"body": value}, Headers(), QuestionAnswering, 0, 10)
    assert (caught.value.field, caught.value.message) == (field, message)


@pytest.mark.parametrize(
    ("documents", "field", "message"),
    [
        ("a", "documents", '"documents" should be a list, not a string'),
        (None, "documents", '"documents" should be a list, not null'),
        ([], "documents", "the list is empty: there is nothing to rank"),
        (["a", 1], "documents[1]", '"documents" should be a string, not a number'),
        (["a", ["b"]], "documents[1]", '"documents" should be a string, not a list'),
        (["\0"], "documents[0]", "the text holds a null character"),
        (["a", "b\ud800"], "documents[1]", "the text holds half a surrogate pair at character 1"),
    ],
)
def test_a_field_of_texts(documents: Any, field: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_requests({"body": [{"query": "a", "documents": documents}]}, Headers(), TextRanking, 0, 10)
    assert (caught.value.field, caught.value.message) == (f"[0].{field}", message)


class Chat(SequenceClassification):
    """A task with a field of messages, and fields of which one is required."""

    fields = (Field("text", False, "a text"), Field("messages", False, "the chat", "messages"))

    @classmethod
    def check(cls, inputs: Mapping[str, Any]) -> None:
        if len(inputs) != 1:
            raise InvalidRequest("send one of both")


def test_a_field_of_messages() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]
    [request] = parse_requests({"body": {"messages": messages}}, Headers(), Chat, 0, 1).requests
    assert request.inputs == {"messages": messages}


@pytest.mark.parametrize(("value", "field"), [({}, None), (["a", {}], "[1]"), ({"inputs": [{}]}, "inputs[0]")])
def test_fields_that_are_wrong_together_are_told_of_their_object(value: Any, field: Optional[str]) -> None:
    with pytest.raises(InvalidRequest, match="send one of both") as caught:
        parse_requests({"body": value}, Headers(), Chat, 0, 10)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ("a", "messages"),
        ({"role": "user", "content": "a"}, "messages"),
        (["a"], "messages[0]"),
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "user", "content": "a", "name": "b"}], "messages[0]"),
        ([{"role": "user", "content": "a"}, {"role": 1, "content": "a"}], "messages[1].role"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content"),
        ([{"role": "user", "content": "\0"}], "messages[0].content"),
    ],
)
def test_a_field_of_illegal_messages(messages: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_requests({"body": {"messages": messages}}, Headers(), Chat, 0, 1)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (1, None),
        (1.5, None),
        (None, None),
        (True, None),
        ([], None),
        ({"inputs": []}, None),
        ([1], "[0]"),
        (["a", None], "[1]"),
        (["a", ["b"]], "[1]"),
        ([[]], "[0]"),
        (["a", {"inputs": ["b", "c"]}], "[1]"),
        ({}, "text"),
        ({"text_pair": "b"}, "text"),
        ({"parameters": {}}, "text"),
        (["a", {}], "[1].text"),
        ({"text": 1}, "text"),
        ({"text": None}, "text"),
        ({"text": ["a"]}, "text"),
        ({"text": {"text": "a"}}, "text"),
        ({"text": "a", "text_pair": None}, "text_pair"),
        (["a", {"text": "b", "text_pair": 2}], "[1].text_pair"),
        ({"text": "a", "txet": "b"}, "txet"),
        ({"text": "a", "top_k": 1}, "top_k"),
        ({"inputs": 1}, "inputs"),
        ({"inputs": None}, "inputs"),
        ({"inputs": {"data": {"text": "a"}}}, "inputs.data"),
        ({"data": {"inputs": "a"}}, "data.inputs"),
        ({"data": [{"inputs": "a"}]}, "data[0].inputs"),
        ({"inputs": ["a", {"text": 2}]}, "inputs[1].text"),
        ({"data": {}}, "data.text"),
        ({"inputs": "a", "text": "b"}, "text"),
        ({"inputs": "a", "data": "b"}, "data"),
        ({"data": "a", "top_k": 1}, "top_k"),
        ([{"data": "a", "colour": 1}], "[0].colour"),
        ({"text": "a", "": "b"}, ""),
        ({"text": "a\0b"}, "text"),
        (["a", "b\0"], "[1].text"),
        ({"text": "\ud83d"}, "text"),
        (["a", {"text": "b", "text_pair": "c\udc4d"}], "[1].text_pair"),
        ({"text": "a", "parameters": []}, "parameters"),
        ({"text": "a", "parameters": None}, "parameters"),
        ({"text": "a", "parameters": "top_k"}, "parameters"),
        ([{"text": "a", "parameters": 1}], "[0].parameters"),
        ({"text": "a", "parameters": {"colour": 1}}, "parameters.colour"),
        ({"inputs": "a", "parameters": {"colour": 1}}, "parameters.colour"),
        ({"inputs": [{"text": "a", "parameters": {"top_k": 0}}]}, "inputs[0].parameters.top_k"),
        (["a", {"text": "b", "parameters": {"top_k": "1"}}], "[1].parameters.top_k"),
    ],
)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_illegal_bodies_are_refused_with_their_place(value: Any, field: Optional[str], as_bytes: bool) -> None:
    error = refusal({"body": json.dumps(value).encode() if as_bytes else value}, JSON)
    assert type(error) is InvalidRequest
    assert (error.status, error.phrase) == (400, "Bad Request")
    assert error.field == field
    json.dumps(error.to_json(), ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize(
    ("parameters", "legal"),
    [
        ({"top_k": True}, "a whole number of 1 or more or null, not true"),
        ({"top_k": 1.0}, "a whole number of 1 or more or null, not 1.0"),
        ({"top_k": "1"}, 'a whole number of 1 or more or null, not "1"'),
        ({"top_k": 0}, "a whole number of 1 or more or null, not 0"),
        ({"top_k": -1}, "a whole number of 1 or more or null, not -1"),
        ({"top_k": [1]}, "a whole number of 1 or more or null, not [1]"),
        ({"top_k": 10**30}, "a whole number of 1 or more or null, not 1000000000000000000000000000000"),
        ({"function_to_apply": None}, 'one of "softmax", "sigmoid", "none", not null'),
        ({"function_to_apply": "tanh"}, 'one of "softmax", "sigmoid", "none", not "tanh"'),
        ({"function_to_apply": 1}, 'one of "softmax", "sigmoid", "none", not 1'),
        ({"long_inputs": None}, 'one of "window", "truncate", "reject", not null'),
        ({"long_inputs": True}, 'one of "window", "truncate", "reject", not true'),
        ({"long_inputs": ["window"]}, 'one of "window", "truncate", "reject", not ["window"]'),
    ],
)
def test_a_wrong_parameter_is_told_what_is_legal(parameters: Dict[str, Any], legal: str) -> None:
    (name,) = parameters
    error = refusal({"body": {"text": "a", "parameters": parameters}})
    assert error.field == f"parameters.{name}"
    assert error.message == f'"{name}" should be {legal}'


@pytest.mark.parametrize(
    "parameters",
    [{"top_k": 1}, {"top_k": 2**53}, {"top_k": None}, {"function_to_apply": "none"}, {"long_inputs": "truncate"}, {}],
)
def test_legal_parameters(parameters: Dict[str, Any]) -> None:
    assert read({"body": {"text": "a", "parameters": parameters}}).requests[0].parameters == parameters


@pytest.mark.parametrize(
    ("sent", "meant"), [("topk", "top_k"), ("long_input", "long_inputs"), ("function_to_aply", "function_to_apply")]
)
def test_a_near_miss_of_a_parameter_is_corrected(sent: str, meant: str) -> None:
    error = refusal({"body": {"text": "a", "parameters": {sent: 1}}})
    assert f'unknown parameter "{sent}" (did you mean "{meant}"?)' in error.message


@pytest.mark.parametrize(("sent", "meant"), [("txt", "text"), ("text_piar", "text_pair"), ("texts", "text")])
def test_a_near_miss_of_a_field_is_corrected(sent: str, meant: str) -> None:
    assert f'unknown field "{sent}" (did you mean "{meant}"?)' in refusal({"body": {"text": "a", sent: "b"}}).message


def test_what_is_like_nothing_is_told_what_is_known() -> None:
    message = refusal({"body": {"text": "a", "parameters": {"zzz": 1}}}).message
    assert "did you mean" not in message
    assert '"top_k", "function_to_apply", "long_inputs" are known' in message


def test_a_parameter_in_the_place_of_a_field_is_told_its_place() -> None:
    assert 'send it as "parameters": {"top_k": ...}' in refusal({"body": {"text": "a", "top_k": 1}}).message


@pytest.mark.parametrize("key", ["k" * 5000, "\ud800", "a\nb\r\n\0", "\u202e\x1b[31m"])
@pytest.mark.parametrize(
    "envelope",
    [
        lambda key: {"text": "a", key: "b"},
        lambda key: {"text": "a", "parameters": {key: 1}},
        lambda key: {"data": "a", key: 1},
    ],
)
def test_a_key_is_told_back_short_and_plain(key: str, envelope: Any) -> None:
    error = refusal({"body": envelope(key)})
    assert error.field is not None
    for told in (error.field, error.message if "cannot stand beside" not in error.message else ""):
        assert told.isprintable()
        assert len(told) < 200
    json.dumps(error.to_json(), ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize("key", ["k" * 5000, "\ud800", "\u202e\x1b[31m"])
def test_a_key_beside_an_envelope_is_told_back_short_and_plain(key: str) -> None:
    error = refusal({"body": {"inputs": "a", key: 1}})
    assert error.message.isprintable() and len(error.message) < 200
    json.dumps(error.to_json(), ensure_ascii=False).encode("utf-8")


def nested(opening: str, closing: str, depth: int = 100_000) -> bytes:
    return (opening * depth + '"a"' + closing * depth).encode()


_NESTED = {
    "lists": nested("[", "]"),
    "data": nested('{"data":', "}"),
    "text": nested('{"text":', "}"),
    "parameters": nested('{"text": "a", "parameters":', "}"),
}


@pytest.mark.parametrize(
    ("what", "content_type"),
    [("lists", JSON), *itertools.product(("data", "text", "parameters"), ("", JSON))],
)
def test_deeply_nested_bytes_are_refused(what: str, content_type: str) -> None:
    error = refusal({"body": _NESTED[what]}, content_type)
    assert isinstance(error, InvalidRequest) and "nested too deeply" in error.message


def test_a_text_may_begin_as_nested_lists_do() -> None:
    """Where no header says that it is JSON."""
    body = _NESTED["lists"]
    assert read({"body": body}).requests[0].inputs["text"] == body.decode()


@pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: {"data": inner}, lambda inner: {"text": inner}])
def test_deeply_nested_values_are_refused(wrap: Any) -> None:
    value: Any = "a"
    for _ in range(5000):
        value = wrap(value)
    assert isinstance(refusal({"body": value}, JSON), InvalidRequest)


@pytest.mark.parametrize("name", ["top_k", "function_to_apply", "long_inputs"])
def test_a_deeply_nested_parameter_is_refused(name: str) -> None:
    value: Any = 1
    for _ in range(50_000):
        value = [value]
    assert isinstance(refusal({"body": {"text": "a", "parameters": {name: value}}}, JSON), InvalidRequest)


@pytest.mark.parametrize("content_type", ["", JSON, "text/plain"])
def test_an_empty_body_is_told_what_to_send(content_type: str) -> None:
    for row in ({"body": b""}, {}):
        error = refusal(row, content_type)
        assert isinstance(error, InvalidRequest)
        assert "the body is empty" in error.message and "text/plain" in error.message


@pytest.mark.parametrize("content_type", ["", JSON, "text/plain"])
@pytest.mark.parametrize("body", [b"\xffabc", b"caf\xe9", b"\xed\xa0\xbd", b"\x80"])
def test_bad_utf_8_is_told_its_place(body: bytes, content_type: str) -> None:
    error = refusal({"body": body}, content_type)
    assert isinstance(error, InvalidRequest)
    assert error.field == "body" and "not UTF-8 text at byte " in error.message


def test_bad_utf_8_in_a_form_names_the_field() -> None:
    error = refusal({"text": b"one", "text_pair": b"caf\xe9"}, "multipart/form-data")
    assert error.field == "text_pair" and "at byte 3" in error.message


@pytest.mark.parametrize("body", [b"{", b"{'text': 'a'}", b'{"text": "a",}', b"text", b'"half', b"[1,"])
def test_what_is_sent_as_json_and_is_none_is_refused(body: bytes) -> None:
    error = refusal({"body": body}, JSON)
    assert isinstance(error, InvalidRequest)
    assert error.field == "body" and "not valid JSON" in error.message


def test_surrogates_escaped_in_json() -> None:
    assert read({"body": b'"\\ud83d\\ude0d"'}, JSON).requests == asked([{"text": "😍"}])
    assert "half a surrogate pair at character 1" in refusal({"body": b'"a\\ud83d"'}, JSON).message


def listing(unit: str, count: int) -> bytes:
    return ("[" + ",".join([unit] * count) + "]").encode()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (listing("[]", 1 << 20), "lists and objects"),
        (listing("{}", 1 << 20), "lists and objects"),
        (listing("[" * 50 + "]" * 50, 1 << 15), "lists and objects"),
        (listing('{"":' * 20 + "1" + "}" * 20, 1 << 15), "lists and objects"),
        (b'{"inputs": ' + listing("[]", 1 << 20) + b"}", "lists and objects"),
        (b'{"instances": ' + listing("[]", 1 << 20) + b"}", "lists and objects"),
        (listing("1", 1 << 21), "commas"),
        (b'{"a"' + b':1,"a"' * (1 << 21) + b":1}", "commas"),
        (listing('""', 1 << 21), "commas"),
        (b'["' + b'"' * (5 << 20) + b"]", "quotation marks"),
    ],
    ids=["lists", "objects", "deep lists", "deep objects", "inputs", "instances", "numbers", "keys", "texts", "quotes"],
)
def test_json_of_more_values_than_any_request_has_is_not_parsed(body: bytes, kind: str) -> None:
    """A list of two bytes takes some 70 in memory, and 60 MB of them ten seconds."""
    tracemalloc.start()
    error = refusal({"body": body}, JSON)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert type(error) is InputTooLong and f"{kind}; one request may have" in error.message
    assert peak < 5 * len(body) + (1 << 20)


MARKS = ',[{"\\' * (1 << 18)


def test_marks_within_a_text_are_no_values() -> None:
    for text in (MARKS, MARKS + '"'):
        for body in (as_json({"text": text}), as_json([text, {"text": "a"}]), as_json(text)):
            assert read({"body": body}, JSON).requests[0].inputs["text"] == text
    assert "not valid JSON" in refusal({"body": as_json({"text": MARKS})[:-2]}, JSON).message


@pytest.mark.parametrize("most", [10, 4096, 20_000])
def test_no_legal_request_has_too_many_values(most: int) -> None:
    """As many as there may be, each with more lists and keys than a task has."""
    own = {"text": "a, b", "parameters": {**{f"list{i}": [{}, []] for i in range(3)}, **dict.fromkeys("abcdefgh", 1)}}
    text = json.dumps([own] * most)
    parse_json(text, budget=JsonBudget(most))
    lines, budget = [json.dumps(own)] * most, JsonBudget(most)
    for line in lines:
        parse_json(line, budget=budget)
    items = max(4096, most)
    parse_json(
        json.dumps([[1] * items] * 8 + [{str(i): i for i in range(256)}] * (items // 2)), budget=JsonBudget(most)
    )


def test_what_a_body_of_many_json_texts_holds_is_counted_together() -> None:
    few = json.dumps([[]] * 20_000)
    lines = "\n".join([few] * 5)
    error = refusal({"body": lines.encode()}, "application/jsonlines")
    assert type(error) is InputTooLong and "line 4 of the body has 80,004 lists and objects" in error.message
    cell = few.replace('"', '""')
    table = "query,documents\n" + f'a,"{cell}"\n' * 5
    tensors = [
        {"name": name, "shape": [5], "datatype": "BYTES", "data": [text] * 5}
        for name, text in (("query", "a"), ("documents", few))
    ]
    for body, media in ((table.encode(), "text/csv"), (as_json({"inputs": tensors}), JSON)):
        with pytest.raises(InputTooLong, match="has 80,004 lists and objects"):
            parse_requests({"body": body}, Headers(media), TextRanking, 0, 10)
    form = {"parameters": few.encode(), "data": few.encode(), "documents": few.encode(), "body": few.encode()}
    with pytest.raises(InputTooLong, match="has 80,004 lists and objects"):
        parse_requests(form, Headers("multipart/form-data; boundary=x"), TextRanking, 0, 10)


@pytest.mark.parametrize("value", [["a"] * 10, {"inputs": ["a"] * 10}, {"data": ["a"] * 10}])
def test_a_list_may_be_as_long_as_the_limit(value: Any) -> None:
    assert len(read({"body": value}, most=10).requests) == 10
    with pytest.raises(InputTooLong, match=r"the list has 10 texts; one request may have 9;") as caught:
        read({"body": value}, most=9)
    assert (caught.value.status, caught.value.phrase) == (413, "Request Entity Too Large")


@pytest.mark.parametrize(
    ("row", "content_length"),
    [
        ({"Where is it? R": b""}, 30),  # the text continued after an &
        ({}, 12),  # a text without =, dropped whole
        ({"text": b"salt "}, len("text=salt & pepper")),
        ({"text": b"one"}, len("text=one&text_pair=two")),
        ({'{"text": "salt ': b""}, len('{"text": "salt & pepper, please"}')),
    ],
)
def test_forms_that_the_frontend_cut_are_refused(row: Dict[str, Any], content_length: int) -> None:
    error = refusal(row, FORM, content_length)
    assert type(error) is InvalidRequest and error.status == 400
    assert "only a part arrived" in error.message and "--data-binary" in error.message


def test_the_length_of_a_multipart_form_is_not_that_of_its_fields() -> None:
    assert read({"text": b"one"}, "multipart/form-data; boundary=xyz", 500).requests == asked([{"text": "one"}])


def test_a_form_of_unknown_fields_is_refused() -> None:
    for row in ({"colour": b"red"}, {"colour": b"red", "size": b"42"}):
        error = refusal(row, "multipart/form-data")
        assert type(error) is InvalidRequest
        assert 'none of the fields "text", "text_pair"' in error.message


def test_a_form_with_one_unknown_field_is_refused() -> None:
    assert refusal({"text": b"one", "colour": b"red"}, "multipart/form-data").field == "colour"


def test_the_parameters_of_a_form_that_are_no_json() -> None:
    error = refusal({"text": b"one", "parameters": b"top_k=2"}, "multipart/form-data")
    assert error.field == "parameters" and "not valid JSON" in error.message


# TorchServe parses a part of a multipart form whose content type is application/json.
@pytest.mark.parametrize("value", [None, True, -1, 1.5, [1, 2], [300], [-1], ["a"], {}, {"a": 1}, []])
def test_parsed_json_in_a_form_is_no_text(value: Any) -> None:
    error = refusal({"text": value}, "multipart/form-data")
    assert type(error) is InvalidRequest and error.field == "text"


def test_a_number_in_a_form_is_not_a_size() -> None:
    """`bytes(n)` makes n zeros."""
    error = refusal({"text": 20_000_000}, "multipart/form-data")
    assert "null character" not in error.message


def test_parsed_parameters_in_a_form() -> None:
    body = read({"text": b"one", "parameters": {"top_k": 2}}, "multipart/form-data")
    assert body.requests == asked([({"text": "one"}, {"top_k": 2})])


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
special = st.text(st.sampled_from(" +%&=?/~*!'()-_.\n#é👍"), max_size=12)
forms = st.fixed_dictionaries({"text": texts | special}, optional={"text_pair": texts | special})


def form_row(fields: Mapping[str, str]) -> Dict[str, bytes]:
    """Return TorchServe's fields of a form that arrived whole."""
    return {key: value.encode("utf-8") for key, value in fields.items()}


@quick
@given(fields=forms)
@example(fields={"text": ""})
@example(fields={"text": "a b+c/~*!'()%41"})
@example(fields={"text": "", "text_pair": ""})
def test_whole_forms_are_accepted_however_they_were_encoded(fields: Dict[str, str]) -> None:
    for body in (
        urlencode(fields),
        urlencode(fields, quote_via=quote),
        urlencode(fields, safe="!'()*", quote_via=quote),
    ):
        for end in ("", "&"):
            parsed = read(form_row(fields), FORM, len(body + end))
            assert parsed == Body(asked([fields]), Plain(False))


@quick
@given(fields=st.fixed_dictionaries({"text": texts}, optional={"text_pair": texts}))
@example(fields={"text": TEXT})
def test_raw_forms_are_accepted(fields: Dict[str, str]) -> None:
    """As sent by `curl -d text=...`."""
    body = "&".join(f"{key}={value}" for key, value in fields.items())
    assert read(form_row(fields), FORM, len(body.encode("utf-8"))) == Body(asked([fields]), Plain(False))


def quote_all(text: str) -> str:
    """`quote` as called by urlencode: the slash is quoted too."""
    return quote(text, safe="")


@quick
@given(
    text=texts.filter(lambda text: text and text.lstrip()[:1] not in ("{", "[", '"')),
    encode=st.sampled_from([str, quote_all, quote_plus]),
)
def test_a_bare_text_is_accepted(text: str, encode: Any) -> None:
    if text in ("text", "text_pair", "inputs", "data", "parameters", "target", "body"):
        return
    for end in ("", "="):
        body = (encode(text) + end).encode("utf-8")
        assert read({text: b""}, FORM, len(body)).requests == asked([{"text": text}])


@quick
@given(text=texts, rest=texts.filter(lambda text: len(text) > 1))
def test_a_raw_text_cut_behind_its_ampersand_is_refused(text: str, rest: str) -> None:
    """Raw ASCII: no encoding of the received text has the length of the sent one."""
    arrived = "".join(c for c in text if c.isascii() and c.isalnum())
    sent = f"text={arrived}&{rest}".encode()
    error = refusal({"text": arrived.encode()}, FORM, len(sent))
    assert "only a part arrived" in error.message


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("body", "is_text"),
    [
        ({"instances": [{"data": "a"}]}, True),
        ({"instances": [3]}, True),
        ({"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}, True),
        ({"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [3]}]}, True),
        ({"inputs": "a"}, False),
        ({"text": 3}, False),
    ],
)
def test_an_error_of_kserves_protocols_is_a_string(body: Any, is_text: bool, packed: bool) -> None:
    """Also of a compressed body, and of one that was read: whose protocol is not looked for again."""
    source = json.dumps(body).encode()
    parts: Dict[str, object] = {"body": gzip.compress(source) if packed else source}
    headers = Headers("application/json", content_encoding="gzip" if packed else "")
    served: Any = SimpleNamespace(task=SequenceClassification, manifest=SimpleNamespace(max_rows=10))
    errors: Any = Native()
    with contextlib.suppress(InvalidRequest):
        errors = errors.read(parts, headers, served, 0).errors
    document = errors.error(InvalidRequest("no"), parts, headers, served).document
    assert isinstance(document["error"], str) is is_text


@pytest.mark.parametrize(
    ("body", "is_tei"), [({"query": "a", "texts": ["b"]}, True), ({"query": "a", "documents": ["b"]}, False)]
)
def test_a_ranking_that_was_read_has_the_errors_of_its_format(body: Any, is_tei: bool) -> None:
    parts: Dict[str, object] = {"body": json.dumps(body).encode()}
    served: Any = SimpleNamespace(task=TextRanking, manifest=SimpleNamespace(max_rows=10, labels=("a",), parameters={}))
    errors: Any = Rerank().read(parts, Headers("application/json"), served, 0).errors
    document = errors.error(InvalidRequest("no"), {}, Headers(), served).document
    assert ("error_type" in document) is is_tei
