"""The handler with fakes of TorchServe's objects: each item has its own status and body, and no log contains a text."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import pytest
import torch
from conftest import ROOT, Called, run_export
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidManifest
from traceserve_runtime.runner import Arrays, Runner
from traceserve_runtime.runtimes import team
from traceserve_runtime.service import TRUNCATED_HEADER
from traceserve_runtime.settings import Settings, read
from traceserve_runtime.tasks.contract import Request
from traceserve_runtime.texts.rows import Encoded
from transformer_handler import TransformerHandler

JSON = {"Content-Type": "application/json"}
SECRET = "xylophone"
LONG = "The train to the coast leaves at a quarter past nine from platform four. " * 6


class Metrics:
    """Records a batch's metrics, as (kind, name) -> value; without a request's number they are of all of them."""

    def __init__(self) -> None:
        self.reported: Dict[Tuple[str, str], float] = {}

    def add_counter(self, name: str, value: float, idx: Optional[int] = None, dimensions: Sequence[Any] = ()) -> None:
        labels = ",".join(f"{dimension.name}={dimension.value}" for dimension in dimensions)
        self._add("counter", f"{name}{{{labels}}}" if labels else name, value, idx)

    def add_metric(
        self, name: str, value: float, unit: str, idx: Optional[int], dimensions: List[Any], metric_type: Any
    ) -> None:
        assert unit == "s" and dimensions == []
        self._add(str(metric_type), name, value, idx)

    def add_percent(self, name: str, value: float, idx: Optional[int] = None) -> None:
        self._add("percent", name, value, idx)

    def add_time(self, name: str, value: float, idx: Optional[int] = None, unit: str = "ms") -> None:
        assert unit == "s"  # as the names say
        self._add("time", name, value, idx)

    def _add(self, kind: str, name: str, value: float, idx: Optional[int]) -> None:
        assert idx == 0  # a log line has the ids of its requests
        self.reported[kind, name] = value


class Context:
    """TorchServe's context, as far as the handler uses it."""

    def __init__(self, folder: Path, headers: Sequence[Mapping[str, Any]] = (), **properties: Any) -> None:
        self.system_properties = {"model_dir": str(folder), "gpu_id": None, **properties}
        self.metrics: Optional[Metrics] = Metrics()
        self.sent = headers
        self.statuses: Dict[int, Tuple[int, str]] = {}
        self.headers: Dict[Tuple[int, str], str] = {}

    def get_all_request_header(self, index: int) -> Mapping[str, Any]:
        return self.sent[index] if index < len(self.sent) else JSON

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        self.statuses[index] = (code, phrase)

    def set_response_header(self, index: int, key: str, value: str) -> None:
        self.headers[index, key] = value


@pytest.fixture(scope="module")
def loaded(artifact: Path) -> Iterator[TransformerHandler]:
    threads = torch.get_num_threads()
    handler = TransformerHandler()
    handler.initialize(Context(artifact))
    yield handler
    torch.set_num_threads(threads)  # it may have yielded cores


@pytest.fixture()
def handler(loaded: TransformerHandler) -> TransformerHandler:
    """A handler whose engine a test may damage."""
    assert loaded.engine is not None
    other = TransformerHandler()
    other.engine = Engine(loaded.engine.folder, loaded.engine.manifest, loaded.engine.task, loaded.engine.runner)
    return other


def serve(
    handler: TransformerHandler, rows: Sequence[Any], headers: Sequence[Mapping[str, Any]] = ()
) -> Tuple[List[Any], Context]:
    """Return the items' parsed response bodies, and the context; an item that is not a dict is its body."""
    context = Context(Path("unused"), headers)
    bodies = handler.handle(
        [row if isinstance(row, dict) and "body" in row else {"body": row} for row in rows], context
    )
    assert len(bodies) == len(rows)
    assert all(type(body) is bytes for body in bodies)
    return [json.loads(body.decode("utf-8")) for body in bodies], context


def is_answer(body: Any) -> bool:
    return isinstance(body, dict) and set(body) == {"label", "score"} and body["label"] in ("red", "green", "blue")


def error_of(body: Any) -> Tuple[str, Optional[str]]:
    """Return the type and the field of an error's body; for KServe's, a string, only the field."""
    if isinstance(body["error"], str):
        field, colon, message = body["error"].partition(": ")
        assert set(body) == {"error"} and (message or not colon)
        return "", field if colon else None
    assert set(body) == {"error"} and set(body["error"]) == {"type", "message", "field"}
    assert body["error"]["message"]
    return body["error"]["type"], body["error"]["field"]


def poison(handler: TransformerHandler, act: Callable[[Runner, Arrays, np.ndarray], Arrays]) -> None:
    """Replace the runner by `act`, which is told which rows of a batch contain SECRET."""
    engine = handler.engine
    assert engine is not None
    own = engine.runner
    (encoded,) = engine.task.encode([Request({"text": SECRET})])
    assert isinstance(encoded, Encoded)
    ids = encoded.rows[0].encoding.ids[1:-1]

    def runner(inputs: Arrays) -> Arrays:
        texts = inputs["input_ids"][:, 1 : 1 + len(ids)]
        marked = np.array([row.tolist() == ids for row in texts])
        return act(own, inputs, marked)

    engine.runner = Called(runner)


def test_good_and_bad_rows_have_their_own_status(loaded: TransformerHandler) -> None:
    rows = [
        "Yes.",
        {"body": {"txt": "a"}},
        {"body": {"text": "No.", "parameters": {"top_k": 2}}},
        {"body": {"text": LONG, "parameters": {"long_inputs": "reject"}}},
        {"body": b"\xff"},
        {"body": ["Yes.", "No."]},
        {"body": 7},
    ]
    bodies, context = serve(loaded, rows)
    assert is_answer(bodies[0])
    assert error_of(bodies[1]) == ("InvalidRequest", "txt")
    assert [set(item) for item in bodies[2]] == [{"label", "score"}] * 2
    assert error_of(bodies[3]) == ("InputTooLong", "text")
    assert error_of(bodies[4]) == ("InvalidRequest", "body")
    assert len(bodies[5]) == 2 and all(map(is_answer, bodies[5]))
    assert error_of(bodies[6]) == ("InvalidRequest", None)
    bad, long = (400, "Bad Request"), (413, "Request Entity Too Large")
    assert context.statuses == {1: bad, 3: long, 4: bad, 6: bad}
    assert {key: value for key, value in context.headers.items() if key[1] == "content-type"} == {
        (i, "content-type"): "application/json" for i in range(7)
    }


def test_bad_neighbours_change_no_answer(loaded: TransformerHandler) -> None:
    (alone,), _ = serve(loaded, ["Yes, at nine."])
    (_, among, _), _ = serve(loaded, [{"body": None}, "Yes, at nine.", {"body": {"text": 1}}])
    assert among["label"] == alone["label"]
    assert among["score"] == pytest.approx(alone["score"], abs=1e-5)


def test_each_row_is_answered_by_its_own_text(loaded: TransformerHandler) -> None:
    texts = ["Yes.", LONG, "No, thank you!", "", "Où est la gare? 👍🏽"]
    together, _ = serve(loaded, [texts[0], {"body": texts[1:3]}, texts[3], {"body": {"data": texts[4]}}])
    alone = [serve(loaded, [text])[0][0]["score"] for text in texts]
    scores = [body["score"] for body in (together[0], *together[1], *together[2:])]
    assert scores == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in alone}) == len(texts)


def test_a_batch_of_bad_rows(loaded: TransformerHandler) -> None:
    bodies, context = serve(loaded, [{"body": 1}, {"body": []}, {"body": {}}])
    assert [error_of(body)[0] for body in bodies] == ["InvalidRequest"] * 3
    assert context.statuses == dict.fromkeys(range(3), (400, "Bad Request"))
    assert context.metrics is not None
    assert context.metrics.reported == {("counter", "traceserve_errors_total{reason=InvalidRequest}"): 3}


@pytest.mark.parametrize("rows", [None, []])
def test_a_batch_of_no_rows(loaded: TransformerHandler, rows: Any) -> None:
    assert loaded.handle(rows, Context(Path("unused"))) == []


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (["Yes.", {"txt": "a"}], ("InvalidRequest", "[1].txt")),
        (["Yes.", {"text": "a", "parameters": {"top_k": 0}}], ("InvalidRequest", "[1].parameters.top_k")),
        (["Yes.", None], ("InvalidRequest", "[1]")),
        (["Yes.", "No.", {"text": LONG, "parameters": {"long_inputs": "reject"}}], ("InputTooLong", "[2].text")),
        ([{"text": LONG, "text_pair": LONG}], ("InputTooLong", "[0].text_pair")),
        ({"text": LONG, "text_pair": LONG}, ("InputTooLong", "text_pair")),
        (["Yes."] * 257, ("InputTooLong", None)),
        ([LONG] * 200, ("InputTooLong", "[0]")),
    ],
)
def test_errors_in_a_list_name_their_place(
    loaded: TransformerHandler, body: Any, error: Tuple[str, Optional[str]]
) -> None:
    (answer, other), context = serve(loaded, [{"body": body}, "Yes."])
    assert error_of(answer) == error
    assert set(context.statuses) == {0}
    assert is_answer(other)


def test_what_was_cut_is_noted_in_body_and_header(loaded: TransformerHandler) -> None:
    cut = {"text": LONG, "parameters": {"long_inputs": "truncate"}}
    ranked = {"text": LONG, "parameters": {"long_inputs": "truncate", "top_k": 2}}
    (one, whole, many, top), context = serve(loaded, [{"body": cut}, "Yes.", {"body": ["Yes.", cut]}, {"body": ranked}])
    start, end = one["truncated"]["text"]
    assert 0 < start < end == len(LONG)
    assert set(one) == {"label", "score", "truncated"}
    assert is_answer(whole) and is_answer(many[0])
    assert many[1]["truncated"] == one["truncated"]
    assert [item["truncated"] for item in top] == [one["truncated"]] * 2
    noted = {i: json.loads(value) for (i, key), value in context.headers.items() if key == TRUNCATED_HEADER}
    assert noted == {0: {"0": one["truncated"]}, 2: {"1": one["truncated"]}, 3: {"0": one["truncated"]}}
    assert all(value.isascii() for value in context.headers.values())
    assert context.statuses == {}


def tensors(*texts: str, **others: Any) -> Dict[str, Any]:
    """Return an item of the Open Inference Protocol."""
    inputs = [{"name": "input-0", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}]
    return {"body": {"inputs": inputs, **others}}


def told(body: Any) -> List[Any]:
    """Return the answers in a body of the Open Inference Protocol."""
    [output] = body["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("output", "BYTES", [len(output["data"])])
    return [json.loads(text) for text in output["data"]]


def are_equal(answers: Any, others: Any) -> bool:
    """Return whether labels are equal, and scores up to the rounding of a batch's padding."""
    scores = [answer["score"] for answer in others]
    rest = [[{**answer, "score": 0} for answer in several] for several in (answers, others)]
    return rest[0] == rest[1] and [answer["score"] for answer in answers] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_each_row_of_a_batch_is_answered_in_its_own_protocol(loaded: TransformerHandler, as_bytes: bool) -> None:
    texts = ["Yes.", LONG]
    v1, v2 = {"body": {"instances": texts}}, tensors(*texts, id="7")
    rows = [
        {"body": texts[0]},
        {"body": texts},
        v1,
        v2,
        {"body": {"instances": ["Yes.", {"txt": "a"}]}},
        tensors("Yes.", id="8", outputs=[{"name": "a"}, {"name": "b"}]),
        tensors("Yes.", outputs=[{"name": "colours"}]),
        {"body": {"instances": ["Yes."]}},
    ]
    if as_bytes:
        rows = [{"body": json.dumps(row["body"]).encode()} for row in rows]
    (one, many, predictions, outputs, *others), context = serve(loaded, rows)
    assert are_equal([one], many[:1]) and len(many) == 2
    assert list(predictions) == ["predictions"] and are_equal(predictions["predictions"], many)
    assert {key: outputs[key] for key in outputs if key != "outputs"} == {
        "model_name": "tiny",
        "model_version": "1.0",
        "id": "7",
    }
    assert list(outputs) == ["model_name", "model_version", "id", "outputs"]
    assert are_equal(told(outputs), many)
    assert [error_of(body) for body in others[:2]] == [
        ("", "instances[1].txt"),
        ("", "outputs"),
    ]
    assert set(others[2]) == {"model_name", "model_version", "outputs"}
    assert [output["name"] for output in others[2]["outputs"]] == ["colours"]
    assert is_answer(others[3]["predictions"][0]) and len(others[3]["predictions"]) == 1
    assert context.statuses == dict.fromkeys((4, 5), (400, "Bad Request"))


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"body": {"instances": ["Yes.", LONG]}}, ("", "instances[1].text")),
        (tensors("Yes.", LONG), ("", "inputs[0].data[1]")),
    ],
)
def test_an_error_of_one_element_is_its_bodys_alone(
    loaded: TransformerHandler, row: Dict[str, Any], error: Tuple[str, str]
) -> None:
    strict = {"body": {**row["body"], "parameters": {"long_inputs": "reject"}}}
    (refused, answered, other), context = serve(loaded, [strict, row, "Yes."])
    assert error_of(refused) == error
    assert list(answered)[-1] in ("predictions", "outputs") and is_answer(other)
    assert context.statuses == {0: (413, "Request Entity Too Large")}


def test_an_element_that_breaks_the_model_fails_its_body(handler: TransformerHandler) -> None:
    def act(own: Runner, inputs: Arrays, marked: np.ndarray) -> Arrays:
        if marked.any():
            raise RuntimeError("no kernel for this shape")
        return own(inputs)

    poison(handler, act)
    rows = [{"body": {"instances": ["Yes.", SECRET]}}, tensors("Yes.", SECRET), tensors("Yes.", "No.")]
    (v1, v2, whole), context = serve(handler, rows)
    assert error_of(v1) == ("", "instances[1]") and "no kernel for this shape" in v1["error"]
    assert error_of(v2) == ("", "inputs[0].data[1]") and "no kernel for this shape" in v2["error"]
    assert all(map(is_answer, told(whole)))
    assert context.statuses == dict.fromkeys(range(2), (500, "Internal Server Error"))


def test_what_was_cut_is_noted_in_every_protocol(loaded: TransformerHandler) -> None:
    cut = {"long_inputs": "truncate"}
    rows = [{"body": {"instances": ["Yes.", LONG], "parameters": cut}}, tensors("Yes.", LONG, parameters=cut)]
    (v1, v2), context = serve(loaded, rows)
    assert are_equal(v1["predictions"], told(v2))
    whole, noted = v1["predictions"]
    assert is_answer(whole) and noted["truncated"]["text"][1] == len(LONG)
    headers = [json.loads(context.headers[i, TRUNCATED_HEADER]) for i in range(2)]
    assert headers == [{"1": noted["truncated"]}] * 2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, ("tiny", "1.0")),
        ({"manifest": None}, ("tiny", "1.0")),
        ({"manifest": {"model": {"modelName": "packed", "modelVersion": "2.1"}}}, ("packed", "2.1")),
        (
            {"model_name": "served", "manifest": {"model": {"modelName": "packed", "modelVersion": "2.1"}}},
            ("served", "2.1"),
        ),
    ],
)
def test_a_model_has_the_name_that_torchserve_gives_it(
    loaded: TransformerHandler, given: Dict[str, Any], told: Tuple[str, str]
) -> None:
    context = Context(Path("unused"))
    vars(context).update(given)
    body = json.loads(loaded.handle([tensors("Yes.")], context)[0])
    assert (body["model_name"], body["model_version"]) == told


def test_vectors_are_a_tensor_of_numbers(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "vectors"
    source = checkpoint("bert", "AutoModel")
    run_export(folder, {"model_name": str(source), "task": "feature_extraction", "max_length": 32})
    handler = TransformerHandler()
    handler.initialize(Context(folder))
    pooled, texts = {"pooling": "mean"}, ["Yes.", "No, thank you!", "Yes."]
    rows = [{"body": {"inputs": texts, "parameters": pooled}}, tensors(*texts, parameters=pooled), tensors(*texts[:2])]
    (plain, vectors, ragged), _ = serve(handler, rows)
    [output] = vectors["outputs"]
    assert (output["datatype"], output["shape"]) == ("FP32", [3, len(plain[0])])
    assert output["data"] == pytest.approx([number for vector in plain for number in vector], abs=1e-5)
    assert len({len(vectors) for [vectors] in told(ragged)}) == 2


def test_metrics_are_of_what_was_computed(loaded: TransformerHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = SimpleNamespace(MetricTypes=SimpleNamespace(HISTOGRAM="histogram"))  # TorchServe's, in its worker
    monkeypatch.setitem(sys.modules, "ts.metrics.metric_type_enum", kinds)
    _, context = serve(loaded, ["Yes.", {"body": ["No.", LONG]}, {"body": 1}])
    assert context.metrics is not None
    reported = context.metrics.reported
    assert reported["counter", "traceserve_requests_total"] == 3
    assert reported["counter", "traceserve_windows_total"] > 3
    assert reported["counter", "traceserve_micro_batches_total"] >= 1
    assert reported["counter", "traceserve_tokens_total"] > 50
    assert 0 < reported["percent", "traceserve_last_batch_padding_ratio"] < 1
    assert reported["time", "traceserve_last_batch_model_seconds"] > 0
    assert reported["counter", "traceserve_computed_tokens_total"] >= reported["counter", "traceserve_tokens_total"]
    model, handler = (reported["counter", f"traceserve_{part}_seconds_total"] for part in ("model", "handler"))
    assert (
        handler > model >= 3 * (reported["time", "traceserve_last_batch_model_seconds"] - 1e-6) > 0
    )  # for each of 3 rows
    assert reported["histogram", "traceserve_batch_seconds"] == pytest.approx(handler / 3, abs=1e-6)
    assert reported["counter", "traceserve_errors_total{reason=InvalidRequest}"] == 1
    assert len(reported) == 11


def test_a_worker_leaves_cores_to_others(artifact: Path, two_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "enough", lambda cores: float("inf"))  # each run has waited
    handler = TransformerHandler()
    handler.initialize(Context(artifact))
    assert torch.get_num_threads() == 2
    for _ in range(3):
        [body], _ = serve(handler, [{"text": "Yes."}])
        assert is_answer(body)
    assert torch.get_num_threads() == 1


def test_a_worker_without_metrics_answers(loaded: TransformerHandler) -> None:
    context = Context(Path("unused"))
    context.metrics = None
    (body,) = loaded.handle([{"body": "Yes."}], context)
    assert is_answer(json.loads(body))


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"Content-Type": "text/plain"}, b'{"txt": "a"}', None),
        ({"content-type": "APPLICATION/JSON"}, b'{"txt": "a"}', 400),
        ({"CONTENT-TYPE": "application/json; charset=utf-8"}, b"no json", 400),
        ({}, b"no json", None),
        ({"Content-Type": "multipart/form-data", "body": {"content-type": "application/json"}}, b"no json", 400),
        ({"Content-Type": "application/json", "body": {"content-type": "text/plain"}}, b"no json", None),
        ({"Content-Type": "application/json", "Content-Length": "?"}, b'"Yes."', None),
        ({"Content-Type": None}, b"Yes.", None),
        (None, b"Yes.", None),
    ],
)
def test_the_content_type_is_the_rows_own(
    loaded: TransformerHandler, headers: Any, body: bytes, status: Optional[int]
) -> None:
    (answer, _), context = serve(loaded, [{"body": body}, "Yes."], [headers, JSON])
    assert context.statuses == ({0: (status, "Bad Request")} if status else {})
    assert is_answer(answer) == (status is None)


def test_a_form_that_was_cut_is_refused_by_its_length(loaded: TransformerHandler) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded", "Content-Length": "30"}
    context = Context(Path("unused"), [form, {**form, "Content-Length": "8"}])
    cut, whole = loaded.handle([{"text": b"one"}, {"text": b"one"}], context)
    assert error_of(json.loads(cut)) == ("InvalidRequest", None)
    assert is_answer(json.loads(whole))


def test_a_header_of_an_absurd_length_fails_only_its_own_request(loaded: TransformerHandler) -> None:
    digits = "9" * 5000  # int() raises beyond 4,300
    tensors = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": digits}
    (refused, other, ignored), context = serve(
        loaded, [b"{}", "Yes.", b"No."], [tensors, JSON, {"Content-Type": "text/plain", "Content-Length": digits}]
    )
    assert "but the body has 2 bytes" in refused["error"] and context.statuses == {0: (400, "Bad Request")}
    assert is_answer(other) and is_answer(ignored)


# Requests with which one client could have failed others' requests.
@pytest.mark.parametrize(
    "row",
    [
        {"body": {"inputs": "a", "\ud800": 1}},
        {"body": {"text": "a", "\ud800": 1}},
        {"body": {"text": "a", "parameters": {"\ud800": 1}}},
        {"body": {"text": "\ud800"}},
        {"body": {"text": "a", "parameters": {"long_inputs": "\ud800"}}},
        {"text": -1},
        {"text": [300]},
        {"text": 10**18},
        {"text": None},
        {"parameters": {"top_k": "a"}},
        {},
    ],
    ids=repr,
)
def test_no_request_harms_its_neighbours(loaded: TransformerHandler, row: Dict[str, Any]) -> None:
    context = Context(Path("unused"), [JSON, {"Content-Type": "multipart/form-data"}, JSON])
    bodies = [json.loads(body) for body in loaded.handle([{"body": "Yes."}, row, {"body": "No."}], context)]
    assert is_answer(bodies[0]) and is_answer(bodies[2])
    assert error_of(bodies[1])[0] == "InvalidRequest"
    assert context.statuses == {1: (400, "Bad Request")}


def test_a_row_that_breaks_the_model_fails_alone(handler: TransformerHandler) -> None:
    def act(own: Runner, inputs: Arrays, marked: np.ndarray) -> Arrays:
        if marked.any():
            raise RuntimeError("no kernel for this shape")
        return own(inputs)

    poison(handler, act)
    (first, broken, many, last), context = serve(handler, ["Yes.", SECRET, {"body": ["No.", SECRET]}, "No, thank you!"])
    assert is_answer(first) and is_answer(last)
    assert error_of(broken) == ("ModelFailure", None)
    assert error_of(many) == ("ModelFailure", "[1]")
    assert "no kernel for this shape" in broken["error"]["message"]
    assert context.statuses == dict.fromkeys((1, 2), (500, "Internal Server Error"))


@pytest.mark.parametrize("where", ["document", "json"])
def test_an_answer_that_cannot_be_written_fails_alone(
    handler: TransformerHandler, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A task's own answer; or a protocol's body made from it."""
    engine = handler.engine
    assert engine is not None

    class Unwritable(type(engine.task)):  # type: ignore[misc]
        def decode(self, request: Request, *others: Any) -> Any:
            broken = [{0}] if where == "json" else {np.float32: "a key that is no name"}
            return broken if request.inputs["text"] == SECRET else super().decode(request, *others)

    engine.task = Unwritable(engine.manifest, engine.task.tokenizer)
    sent = {"body": SECRET} if where == "json" else tensors(SECRET)
    (first, broken, last), context = serve(handler, ["Yes.", sent, "No."])
    assert is_answer(first) and is_answer(last)
    assert error_of(broken) == ("TraceserveError" if where == "json" else "", None)
    assert context.statuses == {1: (500, "Internal Server Error")}
    assert "TypeError" in caplog.text and SECRET not in caplog.text


def test_a_row_whose_answer_is_no_number_fails_alone(handler: TransformerHandler) -> None:
    def act(own: Runner, inputs: Arrays, marked: np.ndarray) -> Arrays:
        logits = own(inputs)["logits"].copy()
        logits[marked] = np.nan
        return {"logits": logits}

    poison(handler, act)
    (first, broken, last), context = serve(handler, ["Yes.", SECRET, "No."])
    assert is_answer(first) and is_answer(last)
    assert error_of(broken) == ("ModelFailure", None)
    assert context.statuses == {1: (500, "Internal Server Error")}


def test_no_log_holds_a_text(handler: TransformerHandler, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    long = f"{SECRET} " * 100
    rows = [
        SECRET,
        {"body": {SECRET: 1}},
        {"body": {"text": long, "parameters": {"long_inputs": "reject"}}},
        {"body": long},
    ]
    serve(handler, [*rows, {"body": SECRET.encode() + b"\xff"}, {"body": b"{" + SECRET.encode()}])
    poison(handler, lambda own, inputs, marked: own({}))
    serve(handler, [SECRET])
    assert SECRET not in caplog.text


def test_no_log_holds_a_text_even_of_the_unexpected(
    handler: TransformerHandler, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(requests: Sequence[Any], *others: Any) -> Any:
        raise ValueError(f"cannot answer {requests[0].inputs['text']}")

    caplog.set_level(logging.DEBUG)
    assert handler.engine is not None
    handler.engine.encode = broken  # type: ignore[method-assign]
    bodies, context = serve(handler, [SECRET, "Yes."])
    assert [error_of(body) for body in bodies] == [("TraceserveError", None)] * 2
    assert context.statuses == dict.fromkeys(range(2), (500, "Internal Server Error"))
    assert "ValueError in 2 of 2 requests" in caplog.text and "in broken" in caplog.text
    for told in (
        caplog.text,
        json.dumps(bodies),
        repr(context.headers),
        *(repr(vars(record)) for record in caplog.records),
    ):
        assert SECRET not in told


def test_the_log_tells_what_was_loaded(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    TransformerHandler().initialize(Context(artifact))
    assert "loaded tiny: sequence_classification, torchscript" in caplog.text


def remove_model(folder: Path) -> None:
    (folder / "traced_model.pt").unlink()


def change_tokenizer(folder: Path) -> None:
    with (folder / "tokenizer.json").open("ab") as stream:
        stream.write(b" ")


def remove_manifest(folder: Path) -> None:
    (folder / "traceserve.json").unlink()


def spoil_manifest(folder: Path) -> None:
    (folder / "traceserve.json").write_bytes(b"{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_model, "traced_model.pt"),
        (change_tokenizer, "tokenizer.json"),
        (remove_manifest, "traceserve.json is missing"),
        (spoil_manifest, "traceserve.json is not valid JSON"),
        (shutil.rmtree, "traceserve.json is missing"),
    ],
)
def test_a_damaged_archive_is_a_runtime_error(
    artifact: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """TorchServe reports a RuntimeError's message; another exception kills its worker without a reason."""
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(RuntimeError, match=message):
        TransformerHandler().initialize(Context(copy))


def test_an_archive_for_the_cpu_runs_there_although_torchserve_assigns_a_gpu(artifact: Path) -> None:
    handler = TransformerHandler()
    handler.initialize(Context(artifact, gpu_id=3))
    assert handler.engine is not None


@pytest.mark.parametrize("part", ["engine", "service", "rounds"])
def test_a_missing_package_is_a_runtime_error(part: str, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the error of each request to a worker that seems healthy."""
    monkeypatch.setitem(sys.modules, f"traceserve_runtime.{part}", None)
    with pytest.raises(RuntimeError, match="lacks a package"):
        TransformerHandler().initialize(Context(artifact))


FIRST_REQUEST = """
import sys
from types import SimpleNamespace
from transformer_handler import TransformerHandler
context = SimpleNamespace(
    system_properties={"model_dir": sys.argv[1]},
    model_yaml_config={"continuousBatching": sys.argv[2] == "joining"},
    request_ids={0: "a"},
    get_request_id=lambda row: "a",
    get_all_request_header=lambda row: {"content-type": "application/json", "host": "here"},
    set_response_header=lambda *header: None,
)
handler = TransformerHandler()
handler.initialize(context)
before = set(sys.modules)
[body] = handler.handle([{"body": b'{"text": "Yes."}'}], context)
assert b'"label"' in body, body
print(*set(sys.modules) - before)
"""


@pytest.mark.parametrize("way", ["joining", "batch"])
def test_the_first_request_imports_nothing(way: str, artifact: Path) -> None:
    command = [sys.executable, "-c", FIRST_REQUEST, str(artifact), way]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "handlers")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


# model-config.yaml, as passed by TorchServe


@pytest.mark.parametrize(
    ("content", "settings"),
    [
        ({}, {}),
        ({"minWorkers": 1, "batchSize": 32}, {}),
        ({"handler": None}, {}),
        ({"handler": {}}, {}),
        ({"handler": {"threads": 1}}, {"threads": 1}),
        ({"minWorkers": 4, "maxWorkers": 4}, {"pack_weights": False}),
        ({"maxWorkers": 4, "handler": {"pack_weights": True}}, {}),
        ({"handler": {"pack_weights": False}}, {"pack_weights": False}),
        ({"handler": {"length_step": 16, "threads": 2}, "batchSize": 8}, {"threads": 2, "length_step": 16}),
    ],
    ids=repr,
)
def test_the_handlers_settings(content: Any, settings: Dict[str, Any]) -> None:
    assert read(content) == Settings(**settings)


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        ({"thread": 1}, "thread is 1"),
        ({"threads": 1, "size": 4}, "size is 4"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"threads": "2"}, "threads is '2'"),
        ({"threads": 2.0}, "threads is 2.0"),
        ({"threads": True}, "threads is True"),
        ({"threads": None}, "threads is None"),
        ({"pack_weights": 1}, "pack_weights is 1"),
        ({"length_step": 0}, "length_step is 0"),
        ({"length_step": [16]}, r"length_step is \[16\]"),
        (["threads"], r"handler is \['threads'\]"),
        ("threads", "handler is 'threads'"),
        (4, "handler is 4"),
    ],
    ids=repr,
)
def test_settings_that_cannot_be_meant_are_told(handler: Any, said: str, artifact: Path) -> None:
    context = Context(artifact)
    context.model_yaml_config = {"handler": handler}  # type: ignore[attr-defined]
    sentence = f"model-config.yaml: {said}; under handler may stand threads and length_step, 1 or more each"
    with pytest.raises(InvalidManifest, match=sentence):
        read({"handler": handler})
    with pytest.raises(RuntimeError, match=sentence):
        TransformerHandler().initialize(context)


def test_a_second_worker_cannot_join_texts(artifact: Path) -> None:
    assert read({"continuousBatching": True, "maxWorkers": 1}) == Settings()
    context = Context(artifact)
    context.model_yaml_config = {"continuousBatching": True, "maxWorkers": 2}  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="continuousBatching with 2 workers"):
        TransformerHandler().initialize(context)


def test_the_settings_reach_the_engine(artifact: Path) -> None:
    context = Context(artifact)
    context.model_yaml_config = {"handler": {"length_step": 16}}  # type: ignore[attr-defined]
    handler = TransformerHandler()
    handler.initialize(context)
    assert handler.engine is not None
    assert handler.engine.manifest.shapes.lengths == (16, 32)
    [body], _ = serve(handler, ["Yes."])
    assert is_answer(body)


@pytest.mark.parametrize("row", [{"body": {"text": "a"}}, {"data": b"a"}, {"text": b"a"}, {"body": b""}])
def test_a_door_for_explanations(loaded: TransformerHandler, row: Any) -> None:
    """TorchServe marks it with its own header, in this spelling; a client's own differs, or is overwritten."""
    (explained, other, another), context = serve_rows(
        loaded,
        [row, {"body": "a"}, {"body": "a"}],
        [{**HTTP, "explain": "True", "content-length": "6"}, {**HTTP, "explain": "False", "Explain": "True"}],
    )
    assert is_answer(other) and is_answer(another)
    if row == {"body": b""}:
        assert context.statuses == {0: (400, "Bad Request")} and error_of(explained) == ("InvalidRequest", None)
    else:
        assert not context.statuses and is_answer(explained["answer"]) and explained["words"][0]["word"] == "a"


HTTP = {"Host": "localhost", "content-length": "1"}
LAST = "ts_stream_next"


def serve_rows(
    handler: TransformerHandler, rows: Sequence[Any], headers: Sequence[Mapping[str, Any]]
) -> Tuple[List[Any], Context]:
    """Like `serve`, with unchanged items."""
    context = Context(Path("unused"), headers)
    return [json.loads(body.decode("utf-8")) for body in handler.handle(rows, context)], context


def test_every_answer_over_grpc_is_the_last_piece(loaded: TransformerHandler) -> None:
    """TorchServe's frontend fails without it; over HTTP it would mistake a whole answer for a stream's end."""
    record = {"content-type": ""}
    grpc: List[Mapping[str, Any]] = [
        {"data": record}, {"host": record, "text": record}, {}, {"body": record}, {"data": record, "explain": record}
    ]  # fmt: skip
    rows = [{"data": b'{"text": "a"}'}, {"host": b"x", "text": b"a"}, {}, {"body": b"\xff"}, {"data": b"a"}]
    bodies, context = serve_rows(loaded, [*rows, {"body": "a"}, {"body": b"\xff"}], [*grpc, HTTP, {"explain": "False"}])
    assert {index for index, key in context.headers if key == LAST} == set(range(5))
    assert {context.headers[index, LAST] for index in range(5)} == {"false"}
    assert is_answer(bodies[0]) and is_answer(bodies[4]) and is_answer(bodies[5])
    assert error_of(bodies[1]) == ("InvalidRequest", "host") and error_of(bodies[3]) == ("InvalidRequest", "body")
    assert "the body is empty" in bodies[2]["error"]["message"]


def test_errors_of_model_infer_are_output_tensors(loaded: TransformerHandler) -> None:
    """TorchServe's frontend reads these keys of any answer, and ends the worker if one is missing."""
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["YQ=="]}
    sent = [
        {"id": "7", "model_name": "m", "inputs": [tensor]},
        {"id": "", "model_name": "m", "inputs": [{**tensor, "shape": [2]}]},
        {"id": "9", "model_name": "m", "inputs": []},
    ]
    rows = [{"body": body} for body in sent]
    bodies, context = serve_rows(loaded, rows, [{"body": {"content-type": "application/json"}}] * 3)
    for body, asked in zip(bodies, sent):
        assert body["id"] == asked["id"] and body["model_name"] and body["model_version"] == "1.0"
    [right, wrong, empty] = [body["outputs"][0] for body in bodies]
    assert right["name"] == "output" and is_answer(right["data"][0])
    for output in (wrong, empty):
        assert (output["name"], output["datatype"], output["shape"]) == ("error", "BYTES", [1])
        assert output["data"][0]["type"] == "InvalidRequest" and output["data"][0]["message"]
    assert context.statuses.keys() == {1, 2}
