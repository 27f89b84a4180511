"""Every task behind the real TorchServe, over real HTTP: in our protocol, in KServe's two, and streamed."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import pytest
from conftest import run_export
from oracle import assert_equal
from traceserve import cli
from traceserve.archives.archive import pack_archive
from traceserve.serving import configuration, instances, server
from traceserve.serving.instances import Instance
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request

BATCH = 8

# A tiny checkpoint for each task: architecture and configuration.
CHECKPOINTS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    "zero_shot_classification": ("bert", {"id2label": {0: "contradiction", 1: "neutral", 2: "entailment"}}),
    "text_ranking": ("bert", {"num_labels": 1}),
    "text_generation": ("llama", {}),
    "text2text_generation": ("t5", {}),
}


class Reply(NamedTuple):
    status: int
    headers: Dict[str, str]
    chunks: List[bytes]

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.chunks))


class Served(NamedTuple):
    instance: Instance
    engines: Dict[str, Engine]

    def post(self, path: str, body: Any) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.instance.port, timeout=60)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            chunks = list(iter(lambda: response.read1(1 << 20), b""))
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, chunks)
        finally:
            connection.close()


@pytest.fixture(scope="module")
def served(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tasks")
    archives = []
    for name, task in TASKS.items():
        architecture, options = CHECKPOINTS.get(name, ("bert", {}))
        source = checkpoint(architecture, task.auto_model, **options)
        content = {
            "model_name": str(source),
            "task": name,
            "max_length": 64,
            "batch_size": BATCH,
            "max_batch_delay": 500,
        }
        run_export(folder / name, content)
        archives.append(pack_archive(folder / name, name, folder))
    instance = server.start(archives, port=configuration.free_ports(1)[0], timeout=180)
    yield Served(instance, {name: Engine.load(folder / name) for name in TASKS})
    instances.stop(instance)


def sample(served: Served, task: str) -> Tuple[Dict[str, Any], Dict[str, Any], Any]:
    """Return the sample's fields and parameters, and this process's engine's answer."""
    engine = served.engines[task]
    body = engine.task.sample_body(engine.manifest.facts)
    parameters = body.pop("parameters", {})
    [answer] = engine.answer([Request(body, parameters)])
    assert isinstance(answer, Answer), answer
    return body, parameters, answer.value


@pytest.mark.parametrize("task", TASKS)
def test_our_protocol(task: str, served: Served) -> None:
    body, parameters, expected = sample(served, task)
    for sent in ({**body, "parameters": parameters}, {"inputs": body, "parameters": parameters}):
        reply = served.post(f"/predictions/{task}", sent)
        assert reply.status == 200, reply
        assert_equal(reply.json, expected)
    assert_equal(served.post(f"/predictions/{task}", [{**body, "parameters": parameters}] * 2).json, [expected] * 2)


@pytest.mark.parametrize("task", TASKS)
def test_kserve_v1(task: str, served: Served) -> None:
    body, parameters, expected = sample(served, task)
    reply = served.post(f"/v1/models/{task}:predict", {"instances": [body, body], "parameters": parameters})
    assert reply.status == 200, reply
    assert_equal(reply.json, {"predictions": [expected, expected]})


@pytest.mark.parametrize("task", TASKS)
def test_open_inference_protocol(task: str, served: Served) -> None:
    body, parameters, expected = sample(served, task)
    tensors = [
        {"name": name, "shape": [2], "datatype": "BYTES", "data": [v if isinstance(v, str) else json.dumps(v)] * 2}
        for name, v in body.items()
    ]
    reply = served.post(f"/v2/models/{task}/infer", {"id": "7", "inputs": tensors, "parameters": parameters})
    assert reply.status == 200, reply
    assert (reply.json["id"], reply.json["model_name"]) == ("7", task)
    [output] = reply.json["outputs"]
    assert output["datatype"] in ("BYTES", "FP32") and output["shape"][0] == 2
    if output["datatype"] == "BYTES":
        assert_equal([json.loads(text) for text in output["data"]], [expected] * 2)
    else:
        assert_equal([float(x) for x in output["data"]], [x for vector in _flat([expected] * 2) for x in vector])


def _flat(value: Any) -> List[Any]:
    while isinstance(value[0][0], list):
        value = [row for rows in value for row in rows]
    return list(value)


@pytest.mark.parametrize("task", TASKS)
def test_an_unknown_parameter_is_named_with_the_legal_ones(task: str, served: Served) -> None:
    body, parameters, _ = sample(served, task)
    reply = served.post(f"/predictions/{task}", {**body, "parameters": {**parameters, "no_such": 1}})
    assert reply.status == 400
    assert reply.json["error"]["field"] == "parameters.no_such"
    for parameter in TASKS[task].all_parameters():
        assert f'"{parameter.name}"' in reply.json["error"]["message"]


def test_streams_beside_others_in_one_batch(served: Served) -> None:
    """Three streams, plain answers and an error, all in one TorchServe batch."""
    engine = served.engines["text_generation"]
    texts = ["The old harbour", "Où est la gare", "Я иду", "Yes", "No", "In 1889", "x", "y"]
    bodies: List[Dict[str, Any]] = [{"text": text, "parameters": {"max_new_tokens": 30}} for text in texts]
    for i in (0, 2, 5):
        bodies[i]["parameters"]["stream"] = True
    bodies[3] = {"txt": "no such field"}
    barrier = threading.Barrier(BATCH)

    def ask(body: Dict[str, Any]) -> Reply:
        barrier.wait()
        return served.post("/predictions/text_generation", body)

    with concurrent.futures.ThreadPoolExecutor(BATCH) as pool:
        replies = list(pool.map(ask, bodies))
    for i, (reply, text) in enumerate(zip(replies, texts)):
        if i == 3:
            assert reply.status == 400 and reply.json["error"]["field"] == "txt"
            continue
        streamed = i in (0, 2, 5)
        parameters = {"max_new_tokens": 30, "return_full_text": not streamed}
        [expected] = engine.answer([Request({"text": text}, parameters)])
        assert reply.status == 200 and isinstance(expected, Answer)
        if not streamed:
            assert reply.json == expected.value and "transfer-encoding" not in reply.headers
            continue
        assert reply.headers["transfer-encoding"] == "chunked"
        assert reply.headers["content-type"] == "text/plain; charset=utf-8"
        assert b"".join(reply.chunks).decode() == expected.value[0]["generated_text"]
        assert len(reply.chunks) > 5
        for chunk in reply.chunks:
            chunk.decode()  # no character is split


def test_a_stream_tells_what_was_cut(served: Served) -> None:
    parameters = {"stream": True, "max_new_tokens": 8, "long_inputs": "truncate"}
    reply = served.post("/predictions/text_generation", {"text": "word " * 400, "parameters": parameters})
    assert reply.status == 200
    [(name, (start, end))] = json.loads(reply.headers["x-truncated"])["0"].items()
    assert (name, start) == ("text", 0) and 0 < end < 2000


@pytest.mark.parametrize(
    "path, body",
    [
        ("/predictions/text_generation", [{"text": "a", "parameters": {"stream": True}}]),
        ("/v1/models/text_generation:predict", {"instances": ["a"], "parameters": {"stream": True}}),
    ],
)
def test_a_stream_is_asked_for_alone(path: str, body: Any, served: Served) -> None:
    reply = served.post(path, body)
    assert reply.status == 400 and "alone" in str(reply.json["error"])


def test_the_command_takes_parameters_and_streams(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    port = ["--port", str(served.instance.port)]
    parameters = {"max_new_tokens": 12, "return_full_text": False}
    [expected] = served.engines["text_generation"].answer([Request({"text": "The old harbour"}, parameters)])
    assert isinstance(expected, Answer)
    asked = ["predict", "text_generation", "The old harbour", "--parameters"]
    assert cli.main([*asked, json.dumps(parameters), *port]) == 0
    assert json.loads(capsys.readouterr().out) == expected.value
    assert cli.main([*asked, json.dumps({**parameters, "stream": True}), *port]) == 0
    assert capsys.readouterr().out == expected.value[0]["generated_text"] + "\n"
    assert cli.main([*asked, '{"max_new_tokens": 0}', *port]) == 1
    assert '"max_new_tokens" should be a whole number of 1 or more' in capsys.readouterr().err
    assert cli.main([*asked, "{", *port]) == 1
    assert "--parameters" in capsys.readouterr().err
    two = ["predict", "text_generation", "One", "Two", "--parameters", json.dumps(parameters), *port]
    assert cli.main(two) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
