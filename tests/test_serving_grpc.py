"""The real TorchServe over real gRPC: each of its calls, with valid and invalid bodies, and a worker that survives
them."""

from __future__ import annotations

import concurrent.futures
import json
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple

import grpc
import pytest
from conftest import run_export
from torchserve_grpc import Client
from traceserve.archives.archive import pack_archive
from traceserve.serving import configuration, instances, server
from traceserve.serving.client import predict
from traceserve.serving.instances import Instance
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks.contract import Answer, Request
from workers import worker_pids

TEXT = "Où est la gare?"
STORY = {"text": "The old harbour", "parameters": {"max_new_tokens": 12, "return_full_text": False}}


class Served(NamedTuple):
    instance: Instance
    client: Client
    engines: Dict[str, Engine]

    def expected(self, model: str, fields: Mapping[str, Any], parameters: Mapping[str, Any] = {}) -> Any:
        [answer] = self.engines[model].answer([Request(fields, parameters)])
        assert isinstance(answer, Answer)
        return answer.value


@pytest.fixture(scope="module")
def served(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that also supports the Open Inference Protocol."""
    folder = tmp_path_factory.mktemp("grpc")
    sources = {
        "colours": (checkpoint("bert", id2label={0: "red", 1: "green"}, label2id={"red": 0, "green": 1}), {}),
        "vectors": (checkpoint("bert", "AutoModel"), {"task": "feature_extraction"}),
        "stories": (checkpoint("llama", "AutoModelForCausalLM"), {"task": "text_generation"}),
        "joined": (
            checkpoint("llama", "AutoModelForCausalLM"),
            {"task": "text_generation", "continuous_batching": True},
        ),
    }
    archives = []
    for name, (source, content) in sources.items():
        run_export(folder / name, {"model_name": str(source), "max_length": 64, **content})
        archives.append(pack_archive(folder / name, name, folder))
    configure = configuration.configure_server

    def with_open_inference(own: Path, *arguments: Any) -> Any:
        written = configure(own, *arguments)
        with (own / "config.properties").open("a") as stream:
            stream.write("ts_open_inference_protocol=true\n")
        return written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configuration, "configure_server", with_open_inference)
        instance = server.start(archives, port=configuration.free_ports(1)[0], timeout=180)
    properties = dict(
        line.split("=", 1) for line in Path(instance.folder, "config.properties").read_text().splitlines()
    )
    client = Client(int(properties["grpc_inference_port"]))
    yield Served(instance, client, {name: Engine.load(folder / name) for name in sources})
    client.close()
    instances.stop(instance)


@pytest.fixture(autouse=True)
def the_workers_live_on(served: Served) -> Iterator[None]:
    """After each test every model answers, with the same worker."""
    before = worker_pids(served.instance)
    assert len(before) == 4
    yield
    for name in served.engines:
        assert predict(served.instance.address, name, {"text": "still there?"}, timeout=30)
    assert worker_pids(served.instance) == before
    assert "Healthy" in served.client.ping()


def both(served: Served, model: str, parts: Mapping[str, bytes]) -> bytes:
    """Return the single answer of Predictions and of StreamPredictions."""
    answer = served.client.predictions(model, parts)
    assert served.client.stream_predictions(model, parts) == [answer]
    return answer


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "parts",
    [
        {"data": TEXT.encode()},
        {"body": TEXT.encode()},
        {"text": TEXT.encode()},
        {"data": as_json({"text": TEXT})},
        {"body": as_json({"inputs": TEXT})},
        {"data": TEXT.encode("utf-16")},
        {"data": b"\xef\xbb\xbf" + as_json({"text": TEXT})},
    ],
)
def test_one_text(parts: Dict[str, bytes], served: Served) -> None:
    answer, expected = json.loads(both(served, "colours", parts)), served.expected("colours", {"text": TEXT})
    assert answer["label"] == expected["label"] and answer["score"] == pytest.approx(expected["score"], abs=1e-5)


def test_other_bodies(served: Served) -> None:
    pair = {"text": "one", "text_pair": "two"}
    for parts in ({k: v.encode() for k, v in pair.items()}, {"data": as_json(pair)}):
        assert json.loads(both(served, "colours", parts))["label"] == served.expected("colours", pair)["label"]
    assert len(json.loads(both(served, "colours", {"data": as_json(["a", "b"])}))) == 2
    assert len(json.loads(both(served, "colours", {"data": as_json({"instances": ["a", "b"]})}))["predictions"]) == 2
    assert len(json.loads(both(served, "colours", {"data": b"a", "parameters": b'{"top_k": 2}'}))) == 2


@pytest.mark.parametrize(
    "parts, field",
    [
        ({}, None),
        ({"data": b"\xff"}, "data"),
        ({"data": b'{"txt": "a"}'}, "txt"),
        ({"data": b'{"text": "half'}, "data"),
        ({"body": b'{"data":' * 5000 + b"1" + b"}" * 5000}, "body"),
        ({"colour": b"red"}, None),
        ({"data": b"a", "parameters": b"top_k=2"}, "parameters"),
        ({"": b""}, None),
    ],
)
def test_errors(parts: Dict[str, bytes], field: Any, served: Served) -> None:
    for model in ("colours", "stories"):
        error = json.loads(both(served, model, parts))["error"]
        assert error["type"] == "InvalidRequest" and len(error["message"]) > 10
        assert field is None or error["field"] == field


# Answered by batches, and by texts that join a running one.
EITHER = pytest.mark.parametrize("model", ["stories", "joined"])
#: A deadline is kept on both sides: the client's code where it ends the call itself, the other where TorchServe is first.
ENDED_BY_A_DEADLINE = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


@pytest.mark.parametrize("stream", [True, False])
@EITHER
def test_a_story(model: str, stream: bool, served: Served) -> None:
    """A stream arrives whole, as plain text."""
    body = {**STORY, "parameters": {**STORY["parameters"], "stream": stream}}  # type: ignore[dict-item]
    expected = served.expected(model, {"text": STORY["text"]}, STORY["parameters"])  # type: ignore[arg-type]
    answer = both(served, model, {"data": as_json(body)})
    assert (answer.decode() == expected[0]["generated_text"]) if stream else (json.loads(answer) == expected)


@EITHER
def test_streams_of_both_doors_in_one_batch(model: str, served: Served) -> None:
    """Over HTTP in pieces, over gRPC whole, together with errors."""
    body = {**STORY, "parameters": {**STORY["parameters"], "stream": True}}  # type: ignore[dict-item]
    expected = served.expected(model, {"text": STORY["text"]}, STORY["parameters"])[0]["generated_text"]  # type: ignore[arg-type]
    calls: List[Callable[[], Any]] = [
        lambda: served.client.predictions(model, {"data": as_json(body)}).decode(),
        lambda: b"".join(served.client.stream_predictions(model, {"data": as_json(body)})).decode(),
        lambda: predict_text(served, model, body),
        lambda: json.loads(served.client.predictions(model, {"data": b"\xff"}))["error"]["type"],
    ]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda call: call(), calls * 4))
    assert answers == [expected, expected, expected, "InvalidRequest"] * 4


def predict_text(served: Served, model: str, body: Any) -> str:
    import urllib.request

    request = urllib.request.Request(
        f"{served.instance.url}/predictions/{model}", as_json(body), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(response.read().decode())


@EITHER
def test_calls_that_end_before_their_answer(model: str, served: Served) -> None:
    body = {"data": as_json({"text": "a", "parameters": {"max_new_tokens": 40, "stream": True}})}
    for call in (served.client.predictions, served.client.stream_predictions):
        with pytest.raises(grpc.RpcError) as error:
            call(model, body, timeout=0.01)
        assert error.value.code() in ENDED_BY_A_DEADLINE  # type: ignore[attr-defined]
    assert json.loads(served.client.predictions(model, {"data": b"\xff"}))["error"]["type"] == "InvalidRequest"


@pytest.mark.parametrize("name", ["stories", "joined"])
def test_a_call_of_sequences_fails_alone(name: str, served: Served) -> None:
    """TorchServe keeps no sequences here: it fails the call immediately, and would fail on an answer too."""
    for model, body in ((name, as_json(STORY)), ("colours", b"a"), (name, b"\xff")):
        with pytest.raises(grpc.RpcError):
            served.client.stream_predictions_2(model, {"data": body}, "one")
    time.sleep(0.5)  # anything that ends the worker comes after the call


def test_an_unknown_model(served: Served) -> None:
    for call in (served.client.predictions, served.client.stream_predictions):
        with pytest.raises(grpc.RpcError) as error:
            call("nobody", {"data": b"a"})
        assert "Model not found" in str(error.value.details())  # type: ignore[attr-defined]


def tensor(*texts: bytes, name: str = "text", **fields: Any) -> Dict[str, Any]:
    return {
        "name": name, "datatype": "BYTES", "shape": [len(texts)], "contents": {"bytes_contents": texts}, **fields
    }  # fmt: skip


def test_model_infer(served: Served) -> None:
    answer = served.client.model_infer("colours", [tensor(TEXT.encode(), b"a")], id="7")
    assert (answer.id, answer.model_name, answer.model_version) == ("7", "colours", "1.0")
    [output] = answer.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("output", "BYTES", [2])
    for sent, got in zip((TEXT, "a"), output.contents.bytes_contents):
        assert json.loads(got)["label"] == served.expected("colours", {"text": sent})["label"]
    pair = served.client.model_infer("colours", [tensor(b"one"), tensor(b"two", name="text_pair")])
    expected = served.expected("colours", {"text": "one", "text_pair": "two"})
    assert json.loads(pair.outputs[0].contents.bytes_contents[0])["label"] == expected["label"] and pair.id == ""
    story = served.client.model_infer("stories", [tensor(STORY["text"].encode())])  # type: ignore[attr-defined]
    assert json.loads(story.outputs[0].contents.bytes_contents[0]) == served.expected(
        "stories", {"text": STORY["text"]}
    )


def test_vectors_of_model_infer_are_numbers(served: Served) -> None:
    [output] = served.client.model_infer("vectors", [tensor(TEXT.encode())]).outputs
    expected = served.expected("vectors", {"text": TEXT})
    flat = [number for rows in expected for row in rows for number in (row if isinstance(row, list) else [row])]
    assert output.datatype == "FP32" and list(output.contents.fp32_contents) == pytest.approx(flat, abs=1e-5)


@pytest.mark.parametrize(
    "tensors, fields, words",
    [
        ([], {}, "inputs"),
        ([tensor(b"\xff")], {}, "not UTF-8 text at byte 0"),
        ([tensor(b"a", name="txt"), tensor(b"b")], {}, 'did you mean "text"'),
        ([tensor(b"a", shape=[2])], {}, "1 elements, but by its shape 2"),
        ([tensor(shape=[1])], {"raw_input_contents": [b"\1\0\0\0a"]}, "raw_input_contents"),
        ([tensor(b"a", datatype="FP32")], {}, "FP32"),
        ([tensor(b"a", datatype="")], {}, "inputs[0].data"),
    ],
)
def test_errors_of_model_infer(tensors: List[Any], fields: Any, words: str, served: Served) -> None:
    answer = served.client.model_infer("colours", tensors, id="9", **fields)
    assert answer.id == "9" and [output.name for output in answer.outputs] == ["error"]
    error = json.loads(answer.outputs[0].contents.bytes_contents[0])
    assert error["type"] == "InvalidRequest" and words in f"{error['message']} {error['field']}"
