"""The real TorchServe, on real archives, over real HTTP."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

import grpc
import psutil
import pytest
import torchserve_grpc
from conftest import ROOT, run_export
from http_reply import Reply
from traceserve import cli
from traceserve.archives.archive import pack_archive
from traceserve.errors import ServerError
from traceserve.serving import configuration, instances, java, management, server
from traceserve.serving.client import Address, NotYet, RequestRefused, predict
from traceserve.serving.instances import Instance
from traceserve_runtime.engine import Engine
from traceserve_runtime.manifest import Manifest, sha256
from traceserve_runtime.tasks.contract import Answer, Request
from traceserve_runtime.texts.limits import RequestLimits
from workers import worker_pids

LABELS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
BATCH = 16
DELAY = 3.0  # TorchServe's wait for a batch to fill, in seconds: long, so that sixteen requests surely share one


class Served(NamedTuple):
    """A running server, and the same artifact's engine in this process."""

    instance: Instance
    archive: Path
    engine: Engine


def post(instance: Instance, name: str, body: bytes, content_type: Optional[str], **headers: str) -> Reply:
    own = {"Content-Type": content_type} if content_type is not None else {}
    request = urllib.request.Request(
        f"{instance.url}/predictions/{name}", data=body, headers={**own, **headers}, method="POST"
    )
    if content_type is None:  # otherwise urllib adds a form's
        request.add_unredirected_header("Content-type", "")
    return send(request)


def send(request: Union[str, urllib.request.Request]) -> Reply:
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return Reply(response.status, {k.lower(): v for k, v in response.headers.items()}, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())


@pytest.fixture(scope="module")
def tiny(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier's artifact, with the archive beside it, quick to answer."""
    folder = tmp_path_factory.mktemp("quick") / "tiny"
    run_export(folder, {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 32, "max_rows": 64})
    pack_archive(folder, "tiny", folder.parent)
    return folder


@pytest.fixture(scope="module")
def served(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for most tests; its archive waits for batches of sixteen."""
    folder = tmp_path_factory.mktemp("served") / "batched"
    content = {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 32, "max_rows": 64}
    run_export(folder, {**content, "batch_size": BATCH, "max_batch_delay": int(1000 * DELAY)})
    batched = pack_archive(folder, "batched", folder.parent)
    quick = tmp_path_factory.mktemp("served") / "quick"
    run_export(quick, content, gradients=True)
    instance = server.start(
        [batched, pack_archive(quick, "quick", quick.parent)], port=configuration.free_ports(1)[0], timeout=90
    )
    yield Served(instance, batched, Engine.load(folder))
    instances.stop(instance)


def expected(served: Served, body: Any) -> Any:
    [answer] = served.engine.answer([Request(body)])
    assert isinstance(answer, Answer)
    return answer.value


def assert_answers(reply: Reply, value: Any) -> None:
    assert reply.status == 200, reply.body
    assert reply.json["label"] == value["label"]
    assert reply.json["score"] == pytest.approx(value["score"], abs=1e-5)


def test_one_bad_request_among_sixteen(served: Served) -> None:
    """In one TorchServe batch: in two, the second would have waited for its delay."""
    bodies: List[Any] = [{"text": f"The train number {i} leaves from platform {i % 7}."} for i in range(BATCH)]
    bodies[7] = {"txt": "no such field"}
    barrier = threading.Barrier(BATCH)

    def ask(body: Any) -> Tuple[Reply, float]:
        barrier.wait()
        started = time.monotonic()
        reply = post(served.instance, "batched", json.dumps(body).encode(), "application/json")
        return reply, time.monotonic() - started

    with concurrent.futures.ThreadPoolExecutor(BATCH) as pool:
        results = list(pool.map(ask, bodies))
    assert max(seconds for _, seconds in results) < DELAY
    for i, ((reply, _), body) in enumerate(zip(results, bodies)):
        if i == 7:
            assert reply.status == 400
            assert 'did you mean "text"' in reply.json["error"]["message"] and reply.json["error"]["field"] == "txt"
        else:
            assert_answers(reply, expected(served, body))


TEXT = "The parcel is late & costs = 5 %!"


@pytest.mark.parametrize(
    "body, content_type",
    [
        (TEXT.encode(), "text/plain"),
        (TEXT.encode(), "text/plain; charset=utf-8"),
        (TEXT.encode(), "application/octet-stream"),
        (TEXT.encode(), ""),
        (json.dumps(TEXT).encode(), "application/json"),
        (json.dumps({"text": TEXT}).encode(), "application/json"),
        (json.dumps({"text": TEXT}).encode(), "application/json; charset=utf-8"),
        (json.dumps({"text": TEXT}).encode(), ""),
        (json.dumps({"data": TEXT}).encode(), "application/json"),
        (json.dumps({"data": {"text": TEXT}, "target": 0}).encode(), "application/json"),
        (json.dumps({"inputs": TEXT, "parameters": {}}).encode(), "application/json"),
        (urllib.parse.urlencode({"text": TEXT}).encode(), "application/x-www-form-urlencoded"),
        (urllib.parse.urlencode({"data": TEXT}).encode(), "application/x-www-form-urlencoded"),
        (urllib.parse.urlencode({TEXT: ""}).encode(), "application/x-www-form-urlencoded"),
        (
            b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\n%b\r\n--b--\r\n' % TEXT.encode(),
            "multipart/form-data; boundary=b",
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="data"; filename="a"\r\nContent-Type: text/plain\r\n\r\n%b\r\n--b--\r\n'
            % TEXT.encode(),
            "multipart/form-data; boundary=b",
        ),
    ],
)
def test_every_form_of_a_text(body: bytes, content_type: str, served: Served) -> None:
    reply = post(served.instance, "quick", body, content_type or None)
    assert_answers(reply, expected(served, {"text": TEXT}))
    assert reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "path, body, found",
    [
        ("explanations/quick", "one boat", lambda answer: answer),
        ("explanations/quick/1.0", {"text": "one boat"}, lambda answer: answer),
        ("v1/models/quick:explain", {"instances": ["one boat"]}, lambda answer: answer["explanations"][0]),
        (
            "v2/models/quick/explain",
            {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["one boat"]}]},
            lambda answer: json.loads(answer["outputs"][0]["data"][0]),
        ),
    ],
)
def test_the_frontends_doors_for_explanations(path: str, body: Any, found: Any, served: Served) -> None:
    request = urllib.request.Request(
        f"{served.instance.url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    reply = send(request)
    assert reply.status == 200, reply.body
    explained = found(reply.json)
    assert explained["method"] == "integrated_gradients" and explained["completeness_error"] < 0.1
    assert [(word["word"], word["start"], word["end"]) for word in explained["words"]] == [
        ("one", 0, 3),
        ("boat", 4, 8),
    ]
    assert explained["answer"]["label"] == expected(served, {"text": "one boat"})["label"]


def test_a_list_is_answered_with_a_list(served: Served) -> None:
    body = [
        "one",
        {"text": "two"},
        {"text": "three", "text_pair": "four"},
        {"inputs": "five", "parameters": {"top_k": 2}},
    ]
    reply = post(served.instance, "quick", json.dumps(body).encode(), "application/json")
    assert reply.status == 200 and len(reply.json) == 4
    assert reply.json[2]["label"] == expected(served, {"text": "three", "text_pair": "four"})["label"]
    assert len(reply.json[3]) == 2


@pytest.mark.parametrize(
    "body", [b"some text", b"Fish & chips", b"text=Fish & chips", b"a=b", b'{"text": "a & b"}', b'{"text": "a"}']
)
def test_a_text_that_the_frontend_cuts_as_a_form_is_refused(body: bytes, served: Served) -> None:
    """As sent by `curl -d`: only a part of these bodies, or nothing, reaches the worker."""
    reply = post(served.instance, "quick", body, "application/x-www-form-urlencoded")
    assert reply.status == 400 and "Content-Type: text/plain" in reply.json["error"]["message"]


def test_truncation_is_told(served: Served) -> None:
    text = "word " * 200
    body = {"text": text, "parameters": {"long_inputs": "truncate"}}
    reply = post(served.instance, "quick", json.dumps(body).encode(), "application/json")
    start, end = reply.json["truncated"]["text"]
    assert end == len(text) and 0 < start < end
    assert json.loads(reply.headers["x-truncated"]) == {"0": {"text": [start, end]}}


def test_too_long_is_413(served: Served) -> None:
    for body, words in (
        ({"text": "word " * 200, "parameters": {"long_inputs": "reject"}}, "tokens"),
        ({"text": "word " * 3000}, "tokens"),
        ({"text": "word " * 5000}, "characters"),
        ({"text": "w" * 2_000_000}, "characters"),
        (["word"] * 65, "texts"),
        (["word " * 20] * 40, "windows"),
        (["word " * 100] * 60, "characters"),
    ):
        reply = post(served.instance, "quick", json.dumps(body).encode(), "application/json")
        assert reply.status == 413 and words in reply.json["error"]["message"], reply.json


def malformed() -> List[Tuple[bytes, str]]:
    """Return two hundred bodies that are not requests."""
    wrong: List[Any] = [
        None,
        True,
        False,
        0,
        1,
        -1.5,
        1e308,
        [],
        {},
        [[]],
        [{}],
        [None],
        [1, 2],
        [["a"]],
        [[["a"]]],
        {"text": None},
    ]
    wrong += [{"text": value} for value in (1, 1.5, True, [], ["a"], {}, {"text": "a"}, [1], [[]])]
    wrong += [{"text": "a", "text_pair": value} for value in (None, 1, [], {}, False)]
    wrong += [
        {key: "a"}
        for key in (
            "",
            "Text",
            "txt",
            "texts",
            "input",
            "question",
            "instances",
            "x" * 5000,
            "\u0000",
            "é",
            "__class__",
        )
    ]
    wrong += [
        {"inputs": value} for value in (None, 1, {}, [], [[]], [None], {"txt": "a"}, {"text": 1}, [{"text": "a"}, {}])
    ]
    wrong += [{"data": value} for value in (None, 7, {}, [], {"data": {}}, {"data": {"data": None}})]
    wrong += [{"text": "a", "parameters": value} for value in (None, 1, "a", [], [1], True)]
    wrong += [{"text": "a", "parameters": {"top_k": value}} for value in (0, -1, 1.5, "3", True, [], {}, 1e9)]
    wrong += [
        {"text": "a", "parameters": {"function_to_apply": value}} for value in (None, 1, "max", "SOFTMAX", [], {})
    ]
    wrong += [{"text": "a", "parameters": {"long_inputs": value}} for value in (None, 1, "cut", "", [])]
    wrong += [{"text": "a", "parameters": {key: 1}} for key in ("", "topk", "temperature", "x" * 3000, "é")]
    wrong += [{"text": "a", "extra": 1}, {"text": "a", "top_k": 2}, {"inputs": "a", "text": "b"}, {"text_pair": "a"}]
    wrong += ["nul \u0000 inside", {"text": "\u0000"}, ["fine", "\u0000"], {"text": "a", "text_pair": "\u0000b"}]
    wrong += [["fine"] * 30 + [5], ["a"] * 100, {"inputs": ["a"] * 100}, [{"text": "a"}] * 65]
    wrong += ["x" * 3_000_000, {"text": "long words " * 100_000}, ["y" * 2_000_000]]
    bodies = [(json.dumps(value).encode(), "application/json") for value in wrong]
    deep = [b"[" * n + b"]" * n for n in (2, 50, 900, 5_000, 100_000)]
    deep += [b'{"data":' * n + b'"a"' + b"}" * n for n in (300, 900, 20_000)] + [
        b'{"text":' * 2000 + b"1" + b"}" * 2000
    ]
    broken = [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"'",
        b"{'text': 'a'}",
        b'{"text": "a"',
        b'{"text" "a"}',
        b'{"text": "a",}',
        b'{"text": a}',
    ]
    broken += [
        b"nul",
        b"NaN",
        b"Infinity",
        b"tru",
        b"1 2",
        b'"a" "b"',
        b'{"text": "a"} x',
        b"// a",
        b"<xml/>",
        b'{"text": "\\x"}',
        b"\x00",
    ]
    broken += [
        b'{"text": "\\ud800"}',
        b'"\\udfff x"',
        b'["\\ud83d"]',
        b'{"\\ud800": "a"}',
        b'{"text": "tab\tinside"}',
        b"[,]",
        b'{"a":}',
    ]
    utf8 = [
        b"\xff",
        b"\xfe\xff",
        b"\xc3\x28",
        b"\xa0\xa1",
        b"\xe2\x28\xa1",
        b"\xf0\x28\x8c\xbc",
        b"abc\x80",
        b"\xed\xa0\x80",
        b'"\xff"',
    ]
    bodies += [(body, "application/json") for body in deep + broken + utf8]
    bodies += [(body, "text/plain") for body in utf8 + [b"", b"\x00", b"a\x00b"]]
    bodies += [(body, "application/octet-stream") for body in utf8 + [b"", b"{", b"{'a': 1}", b"\x1f\x8b\x08\x00\x00"]]
    noise = random.Random(0)
    bodies += [(b"{" + bytes(noise.randrange(256) for _ in range(n)), "application/json") for n in range(1, 41)]
    bodies += [(b"", "application/json"), (b"", ""), (b"a=b", "application/x-www-form-urlencoded")]
    bodies += [
        (b"text=%FF%FE", "application/x-www-form-urlencoded"),
        (b"parameters=1&text=a", "application/x-www-form-urlencoded"),
    ]
    bodies += [
        (b"parameters=%7B&text=a", "application/x-www-form-urlencoded"),
        (b"text_pair=a", "application/x-www-form-urlencoded"),
    ]
    return bodies


def test_two_hundred_malformed_bodies(served: Served) -> None:
    """Each gets a 4xx with the reason; no worker dies, and valid requests among them are answered."""
    bodies = malformed()
    assert len(bodies) >= 200
    before = worker_pids(served.instance)

    def ask(item: Tuple[bytes, str]) -> Reply:
        return post(served.instance, "quick", item[0], item[1] or None)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, [*bodies, (b"all is well", "text/plain")]))
    wrong = [
        (body[:80], kind, r.status, r.body[:120])
        for (body, kind), r in zip(bodies, replies)
        if not 400 <= r.status < 500
    ]
    assert not wrong
    largest = RequestLimits.of(served.engine.manifest.max_length, served.engine.manifest.max_rows).largest_body
    for (body, _), reply in zip(bodies, replies):
        if len(body) > largest:  # no worker sees it
            assert (reply.status, reply.body) == (413, b"")
            continue
        error = reply.json["error"]
        if isinstance(error, str):  # for a body in one of KServe's protocols
            assert len(error) > 10
        else:
            assert error["type"] in ("InvalidRequest", "InputTooLong") and len(error["message"]) > 10
    assert replies[-1].status == 200
    assert worker_pids(served.instance) == before


def errors_of(instance: Instance, name: str) -> float:
    """The requests to an archive that its worker counted as failed."""
    page = send(f"http://127.0.0.1:{instance.metrics_port}/metrics").body.decode()
    found = re.findall(rf'^traceserve_errors_total\{{.*ModelName="{name}".*\}} (\S+)$', page, re.MULTILINE)
    return sum(map(float, found))


def test_no_text_is_logged(served: Served) -> None:
    marker = "zanzibarzanzibar"
    before = errors_of(served.instance, "quick")
    failed = 0
    for body, kind in (
        (marker.encode(), "text/plain"),
        (f'{{"text": {marker}}}'.encode(), "application/json"),
        (f'"{marker}\\ud800"'.encode(), "application/json"),
    ):
        failed += post(served.instance, "quick", body, kind).status != 200
    assert failed
    deadline = time.monotonic() + 10
    while errors_of(served.instance, "quick") < before + failed:  # they come as the worker's log does, and after it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    logs = {path: path.read_text(errors="replace") for path in Path(served.instance.folder).rglob("*.log")}
    assert logs[served.instance.log]
    assert not [path for path, text in logs.items() if marker in text]


def test_metrics(served: Served) -> None:
    post(served.instance, "quick", b"count me", "text/plain")
    wanted = {
        *(f"traceserve_{what}_total" for what in ("requests", "tokens", "computed_tokens", "windows", "micro_batches")),
        *(f"traceserve_{part}_seconds_total" for part in ("model", "handler")),
        "traceserve_last_batch_padding_ratio",
        "traceserve_last_batch_model_seconds",
    }
    deadline = time.monotonic() + 10
    found: Dict[str, float] = {}
    while time.monotonic() < deadline and not wanted <= set(found):
        text = send(f"http://127.0.0.1:{served.instance.metrics_port}/metrics").body.decode()
        found = {
            m[0]: float(m[1])
            for m in re.findall(r'^(traceserve_\w+)\{ModelName="quick".*\} (\S+)$', text, re.MULTILINE)
        }
    assert wanted <= set(found)
    assert found["traceserve_tokens_total"] >= 4 and 0 <= found["traceserve_last_batch_padding_ratio"] <= 1
    assert 0 < found["traceserve_model_seconds_total"] < found["traceserve_handler_seconds_total"] < 60


def test_the_management_of_models_is_closed_to_others(served: Served) -> None:
    """It is on a Unix socket in a folder that this user alone may enter; over gRPC nobody can connect to it."""
    folder = Path(served.instance.folder)
    path = served.instance.management_socket
    assert path == str(folder / "management.sock") and served.instance.management_port == 0
    assert folder.stat().st_mode & 0o077 == 0
    if os.geteuid() == 0:  # somebody else does not even see it
        assert subprocess.run(["test", "-S", path]).returncode == 0
        assert subprocess.run(["test", "-S", path], user=65534, group=65534).returncode == 1
    with pytest.raises(RequestRefused):  # outside of the store
        management.call(served.instance, "POST", "/models?url=file:///etc/passwd")
    properties = dict(line.split("=", 1) for line in (folder / "config.properties").read_text().splitlines())
    grpc_port = int(properties["grpc_management_port"])
    for address in ("127.0.0.1", "::1", properties["grpc_management_address"]):
        with pytest.raises(OSError):
            socket.create_connection((address, grpc_port), timeout=2)
    assert send(urllib.request.Request(served.instance.url + "/models", method="GET")).status in (404, 405)


def test_two_servers_side_by_side(served: Served, tiny: Path) -> None:
    other = server.start([tiny.with_suffix(".mar")], port=configuration.free_ports(1)[0], timeout=90)
    try:
        assert {i.port for i in instances.running()} >= {served.instance.port, other.port}
        with pytest.raises(ServerError, match="several servers"):
            instances.find_instance(None)
        assert predict(other.address, "tiny", "hello") == predict(served.instance.address, "quick", "hello")
        with pytest.raises(NotYet):
            predict(other.address, "quick", "hello")
    finally:
        instances.stop(other)
    assert other.port not in {i.port for i in instances.running()} and not Path(other.folder).exists()
    assert predict(served.instance.address, "quick", "hello")["label"] in ("red", "green", "blue")


def test_what_is_being_answered_is_answered_before_it_ends(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    content = {"model_name": str(checkpoint("llama", "AutoModelForCausalLM")), "task": "text_generation"}
    run_export(tmp_path / "x", {**content, "max_length": 128, "max_rows": 512})
    packed = pack_archive(tmp_path / "x", "writer", tmp_path)
    instance = server.start([packed], port=configuration.free_ports(1)[0], timeout=90)
    body = json.dumps({"inputs": ["a b"] * 512, "parameters": {"max_new_tokens": 120}}).encode()
    [worker] = map(psutil.Process, worker_pids(instance))
    before = worker.cpu_times().user
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, instance, "writer", body, "application/json")
        while worker.cpu_times().user < before + 0.3:  # of processor time: it is being answered
            assert not asked.done()
            time.sleep(0.01)
        instances.stop(instance)
        reply = asked.result()
    assert reply.status == 200 and len(reply.json) == 512


def test_a_taken_port_is_told(served: Served, tiny: Path) -> None:
    with pytest.raises(ServerError, match=f"port {served.instance.port} .*--port"):
        server.start([tiny.with_suffix(".mar")], port=served.instance.port)


def test_keys_are_demanded_beyond_the_loopback(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every port that others reach; in files of this user; and new ones take their place while the server runs."""
    port = str(configuration.free_ports(1)[0])
    with monkeypatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")  # what is printed is a log all the same
        command = ["serve", str(tiny.with_suffix(".mar")), "--host", "0.0.0.0", "--port", port, "--timeout", "90"]
        assert cli.main(command) == 0
    shown, instance = capsys.readouterr().out, instances.find_instance(int(port))

    def asked(key: Optional[str]) -> Reply:
        return post(instance, "tiny", b"hello", "text/plain", **({"Authorization": f"Bearer {key}"} if key else {}))

    try:
        first = instance.key
        assert first and instance.management_key and first not in shown and "Bearer KEY" in shown
        refusals = [asked(key) for key in (None, "wrong", instance.management_key, first[:-1], first.swapcase())]
        assert {(each.status, json.dumps(each.json)) for each in refusals} == {(400, json.dumps(refusals[0].json))}
        assert "label" not in refusals[0].json and asked(first).status == 200
        with pytest.raises(RequestRefused):
            management.call(replace(instance, management_key=None), "GET", "/models")
        properties = dict(
            line.split("=", 1) for line in Path(instance.folder, "config.properties").read_text().splitlines()
        )
        for key, door in (("", pytest.raises(grpc.RpcError)), (first, contextlib.nullcontext())):
            caller = torchserve_grpc.Client(int(properties["grpc_inference_port"]), key)
            with door:
                assert caller.predictions("tiny", {"data": b"hello"})
            caller.close()
        assert beyond_loopback(instance) == {instance.port}
        state = Path(os.environ["XDG_STATE_HOME"], "traceserve", "servers", f"{Path(instance.folder).name}.json")
        for file in (state, Path(instance.folder, "run", "key_file.json")):
            assert file.stat().st_mode & 0o077 == 0

        assert cli.main(["keys", "--port", port]) == 0 and f"inference   {first}" in capsys.readouterr().out
        assert cli.main(["keys", "--rotate", "--json", "--port", port]) == 0
        second = json.loads(capsys.readouterr().out)["inference"]
        assert second != first and asked(first).status == 400 and asked(second).status == 200
        assert cli.main(["predict", "tiny", "hello", "--port", port]) == 0  # it knows the new one
        file = tmp_path / "key.txt"
        assert cli.main(["keys", "--write", str(file), "--port", port]) == 0
        assert file.read_text() == f"{second}\n" and file.stat().st_mode & 0o077 == 0
        assert cli.main(["keys", "--rotate", "--key-file", str(file), "--port", port]) == 1
        assert "takes none" in capsys.readouterr().err
    finally:
        instances.stop(instance)


def beyond_loopback(instance: Instance) -> Set[int]:
    """The ports of a server's processes to which other machines may connect."""
    process = instance.process
    assert process is not None
    found = [
        connection
        for each in (process, *process.children(recursive=True))
        for connection in each.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(found) > 3
    return {each.laddr.port for each in found if not each.laddr.ip.rpartition(":")[2].startswith("127.")}


def test_a_server_on_the_loopback_address_has_no_keys_to_show(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert beyond_loopback(served.instance) == set()
    assert cli.main(["keys", "--port", str(served.instance.port)]) == 1
    assert "demands no key" in capsys.readouterr().err


def repack(mar: Path, target: Path, change: Callable[[Path], None]) -> Path:
    """A copy of an archive with its unpacked files changed."""
    with shutil_unpacked(mar, target.parent / "unpacked") as folder:
        change(folder)
        packed = shutil.make_archive(str(target.with_suffix("")), "zip", folder)
    return Path(packed).rename(target)


class shutil_unpacked:
    """A folder with an archive's files."""

    def __init__(self, mar: Path, folder: Path) -> None:
        self.mar, self.folder = mar, folder

    def __enter__(self) -> Path:
        shutil.unpack_archive(str(self.mar), str(self.folder), "zip")
        return self.folder

    def __exit__(self, *exception: Any) -> None:
        shutil.rmtree(self.folder)


def named(folder: Path, name: str, code: str) -> None:
    """Put code into an unpacked archive as if it were packed: the manifest names it."""
    (folder / name).write_text(code)
    manifest = Manifest.read(folder, verify=False)
    replace(manifest, files={**manifest.files, name: sha256(folder / name)}).write(folder)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json, which is missing"),
        (lambda folder: (folder / "traced_model.pt").write_bytes(b"no model"), "not the one that was verified"),
        (
            lambda folder: named(folder, "tokenizers.py", "raise ImportError('no tokenizers here')"),
            "no tokenizers here",
        ),
        (lambda folder: named(folder, "transformer_handler.py", "def broken(:"), "SyntaxError"),
    ],
    ids=["missing", "changed", "no package", "broken handler"],
)
def test_a_worker_that_cannot_load_is_told_at_once(
    change: Callable[[Path], Any], reason: str, tiny: Path, tmp_path: Path
) -> None:
    mar = repack(tiny.with_suffix(".mar"), tmp_path / "damaged.mar", change)
    port = configuration.free_ports(1)[0]
    started = time.monotonic()
    with pytest.raises(ServerError, match=re.escape(reason)) as error:
        server.start([mar], port=port, timeout=120)
    assert "\n" not in error.value.message and time.monotonic() - started < 60
    assert port not in {i.port for i in instances.running()}


def run(*arguments: Union[str, Path], cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "traceserve", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=300)


def test_the_command_from_configuration_to_prediction(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    config = {
        "model_name": str(checkpoint("bert", **LABELS)),
        "mode": "sequence_classification",
        "max_length": "32",
        "do_lower_case": True,
        "captum_explanation": True,
        "embedding_name": "bert",
        "FasterTransformer": False,
    }
    (tmp_path / "setup_config.json").write_text(json.dumps(config))
    port = str(configuration.free_ports(1)[0])
    built = run("build", "--output", "artifacts/colours", cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    assert "FasterTransformer has no meaning here" in built.stderr and "answers changed" in built.stdout
    again = run("build", "--output", "artifacts/colours", cwd=tmp_path)
    assert again.returncode == 1 and "--force" in again.stderr
    served = run("serve", "model_store/colours.mar", "--port", port, "--workers", "2", cwd=tmp_path)
    try:
        assert served.returncode == 0, served.stderr
        [curl] = re.findall(r"^  (curl .+)$", served.stdout, re.MULTILINE)
        reply = subprocess.run(curl, shell=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert set(json.loads(reply.stdout)) == {"label", "score"}
        status = run("status", cwd=tmp_path)
        assert port in status.stdout and "2 of 2" in status.stdout
        (tmp_path / "texts.txt").write_text("one\ntwo\n\nthree\n")
        (tmp_path / "body.json").write_text('{"inputs": "one", "parameters": {"top_k": 3}}')
        for arguments, stdin, count in (
            (("one", "two"), "", 2),
            (("one",), "", 1),
            (("--file", "texts.txt"), "", 3),
            (("--file", "body.json"), "", 1),
            (("--json", '{"text": "one", "text_pair": "two"}'), "", 1),
            (("-",), "one\ntwo\n", 2),
        ):
            asked = run("predict", "colours", "--port", port, *arguments, cwd=tmp_path, stdin=stdin)
            assert asked.returncode == 0, asked.stderr
            assert len([json.loads(line) for line in asked.stdout.splitlines()]) == count
        explained = run("explain", "colours", "--port", port, "one boat is small", "--json", cwd=tmp_path)
        assert explained.returncode == 0, explained.stderr
        own = json.loads(explained.stdout)
        assert own["method"] == "integrated_gradients" and [w["word"] for w in own["words"]][-1] == "small"
        refused = run("predict", "colours", "--port", port, "--json", '{"txt": "one"}', cwd=tmp_path)
        assert refused.returncode == 1 and "did you mean" in refused.stderr and not refused.stdout
        assert "has no other" in run("predict", "other", "--port", port, "x", cwd=tmp_path).stderr
        assert run("predict", "colours", "--port", port, cwd=tmp_path).returncode == 1
    finally:
        stopped = run("stop", "--port", port, cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    assert "no server" in run("predict", "colours", "--port", port, "x", cwd=tmp_path).stderr


@pytest.mark.usefixtures("hangups_heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_foreground_ends_with_its_signal(number: int, tiny: Path, tmp_path: Path) -> None:
    """Which the end of its terminal is, too."""
    port = configuration.free_ports(1)[0]
    command = [
        sys.executable,
        "-m",
        "traceserve",
        "serve",
        str(tiny.with_suffix(".mar")),
        "--port",
        str(port),
        "--foreground",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        instance = _await_instance(port)
        predict(instance.address, "tiny", "hello")
        family = [instance.pid, *worker_pids(instance)]
        process.send_signal(number)
        if number == signal.SIGHUP:  # of which the shell and the system may both send one
            time.sleep(0.2)
            process.send_signal(number)
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in family)


def _await_instance(port: int) -> Instance:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for instance in instances.running():
            if instance.port == port:
                try:
                    predict(instance.address, instance.names[0], "ready?")
                    return instance
                except ServerError:
                    pass
        time.sleep(0.1)
    raise AssertionError("no server within a minute")


def test_by_hand_without_our_commands(tiny: Path, tmp_path: Path) -> None:
    """torch-model-archiver, torchserve and curl, as in the README."""
    (tmp_path / "model_store").mkdir()
    (tmp_path / "artifacts").mkdir()
    shutil.copytree(tiny, tmp_path / "artifacts" / "tiny")
    port, management, metrics, grpc, grpc_management = configuration.free_ports(5)
    (tmp_path / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{port}\nmanagement_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\ngrpc_inference_port={grpc}\ngrpc_management_port={grpc_management}\n"
        "default_workers_per_model=1\n"
    )
    (tmp_path / "tmp").mkdir()
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path / "tmp"),
        "TEMP": str(tmp_path / "tmp"),
        **java.find_java(),
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"

    def shell(command: str) -> str:
        result = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout

    shell(
        "torch-model-archiver --model-name tiny --version 1.0 --serialized-file artifacts/tiny/traced_model.pt "
        f"--handler {ROOT}/handlers/transformer_handler.py --extra-files artifacts/tiny,{ROOT}/handlers "
        "--config-file artifacts/tiny/model-config.yaml --archive-format zip-store --export-path model_store"
    )
    try:
        shell(
            "torchserve --start --model-store model_store --models tiny=tiny.mar --ts-config config.properties "
            "--disable-token-auth --ncs > start.log 2>&1"
        )
        deadline = time.monotonic() + 90
        while True:
            try:
                address = Address(f"http://127.0.0.1:{port}")
                assert predict(address, "tiny", {"text": "by hand"})["label"] in ("red", "green", "blue")
                break
            except NotYet:
                assert time.monotonic() < deadline, (tmp_path / "start.log").read_text()
                time.sleep(0.2)
        answer = shell(
            f"curl -s http://127.0.0.1:{port}/predictions/tiny -H 'Content-Type: application/json' -d '{{\"text\": \"by hand\"}}'"
        )
        assert set(json.loads(answer)) == {"label", "score"}
    finally:
        shell("torchserve --stop")


def test_refused_carries_the_status(served: Served) -> None:
    with pytest.raises(RequestRefused) as error:
        predict(served.instance.address, "quick", {"text": 1})
    assert error.value.status == 400 and "(at text)" in error.value.message
    with pytest.raises(ServerError, match="the body is larger than this server takes"):
        predict(served.instance.address, "quick", {"text": "x" * 5_000_000})


def test_java_is_found_without_one_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    home = Path(java.find_java()["JAVA_HOME"])
    assert (home / "bin" / "java").is_file()
    old = tmp_path / "jre" / "bin" / "java"
    old.parent.mkdir(parents=True)
    old.write_text("#!/bin/sh\n")
    old.chmod(0o755)
    (tmp_path / "jre" / "release").write_text('JAVA_VERSION="1.8.0_402"\n')
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jre"))
    assert java.find_java() == {"JAVA_HOME": str(home)}
    (tmp_path / "jre" / "release").write_text('JAVA_VERSION="17.0.1"\n')
    assert java.find_java() == {}


@pytest.mark.parametrize("variable", ["JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS"])
def test_a_collector_that_the_user_chose_is_the_only_one(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "-XX:+UseSerialGC" in java.jvm_options(tmp_path)
    monkeypatch.setenv(variable, "-Xmx2g -XX:+UseG1GC")
    assert "-XX:+UseSerialGC" not in java.jvm_options(tmp_path)


def test_the_jvm_starts_from_the_classes_of_an_earlier_one(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "with space"))
    assert not any("Archive" in option for option in java.jvm_options(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    writes, options = "-XX:ArchiveClassesAtExit=", java.jvm_options(tmp_path)
    [written] = [option[len(writes) :] for option in options if option.startswith(writes)]
    Path(written).write_bytes(b"classes")
    java.keep_class_archive(tmp_path)
    kept = tmp_path / "cache" / "traceserve" / Path(written).name
    assert kept.read_bytes() == b"classes"
    assert f"-XX:SharedArchiveFile={kept}" in java.jvm_options(tmp_path)
    # The JVM sees that it is invalid, and ignores it.
    instance = server.start([tiny.with_suffix(".mar")], port=configuration.free_ports(1)[0], timeout=90)
    try:
        assert predict(instance.address, "tiny", "hello")
    finally:
        instances.stop(instance, at_once=True)


def test_classes_that_no_server_used_for_long_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As those of an earlier Java: at the next writing, and not those that a server started with since."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = java._class_archive().parent
    present, old, recent, other = (
        cache / name for name in (java._class_archive().name, "torchserve-1.jsa", "torchserve-2.jsa", "other.jsa")
    )
    for file in (present, old, recent, other):
        file.write_bytes(b"classes")
        if file != recent:
            os.utime(file, (0, 0))
    assert f"-XX:SharedArchiveFile={present}" in java.jvm_options(tmp_path)
    java._remove_unused(cache)
    assert [file.exists() for file in (present, old, recent, other)] == [True, False, True, True]
    os.utime(recent, (0, 0))
    (tmp_path / present.name).write_bytes(b"new classes")
    java.keep_class_archive(tmp_path)
    assert present.read_bytes() == b"new classes" and not recent.exists()


KEEP = """
import sys
from pathlib import Path
from traceserve.serving import java

print("ready", flush=True)
sys.stdin.readline()
java.keep_class_archive(Path(sys.argv[1]))
"""


def test_of_servers_that_end_at_once_one_keeps_its_classes_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = java._class_archive().name
    with contextlib.ExitStack() as stack:
        ending = []
        for number in range(1, 5):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / name).write_bytes(bytes([number]) * (number * 10_000_000))
            command = [sys.executable, "-c", KEEP, str(folder)]
            started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            ending.append(stack.enter_context(started))
        for process in ending:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in ending:
            assert process.stdin is not None
            process.stdin.close()
        assert [process.wait() for process in ending] == [0] * 4
    [kept] = (tmp_path / "cache" / "traceserve").iterdir()
    content = kept.read_bytes()
    assert content[0] in range(1, 5) and content == bytes([content[0]]) * (content[0] * 10_000_000)


def test_classes_on_a_full_disk_leave_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A limit on the size of files acts like a full disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = java._class_archive().name
    (tmp_path / name).write_bytes(bytes(1000))
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))" + KEEP
    command = [sys.executable, "-B", "-c", limited, str(tmp_path)]  # -B: Python does not notice that bytecode was cut
    failed = subprocess.run(command, input="\n", capture_output=True, text=True)
    assert "File too large" in failed.stderr and list((tmp_path / "cache" / "traceserve").iterdir()) == []


def test_after_an_update_of_java_its_classes_are_kept_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In its place, as by apt: the JVM would ignore the earlier one's, and the next servers start slowly for ever."""
    home = tmp_path / "jre"
    for file in ("bin/java", "lib/modules"):
        (home / file).parent.mkdir(parents=True)
        (home / file).write_text("#!/bin/sh\n")
        (home / file).chmod(0o755)
    (home / "release").write_text('JAVA_VERSION="17.0.1"\n')
    monkeypatch.setenv("JAVA_HOME", str(home))
    first = java._class_archive()
    assert java._class_archive() == first
    (home / "lib" / "modules").write_text("#!/bin/sh\n# 17.0.2")
    second = java._class_archive()
    assert second != first
    os.utime(home / "lib" / "modules", (0, 0))
    assert java._class_archive() not in (first, second)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/nohome cannot be made on Linux, by root either")
def test_every_command_without_a_home_folder(tiny: Path) -> None:
    """As in a container whose user cannot write its home: served, found, queried and stopped, by separate commands."""
    port = str(configuration.free_ports(1)[0])
    variables = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
    with tempfile.TemporaryDirectory() as temporary:

        def run(*arguments: str) -> str:
            command = [sys.executable, "-m", "traceserve", *arguments]
            environment = {**variables, "HOME": "/proc/nohome", "TMPDIR": temporary}
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            assert f"/traceserve-{os.getuid()}/state" in result.stderr
            return result.stdout

        archive_file = str(tiny.with_suffix(".mar"))
        assert "answering after" in run("serve", archive_file, "--port", port)
        assert port in run("status")
        assert json.loads(run("predict", "tiny", "hello"))["label"] in ("red", "green", "blue")
        assert f"stopped tiny on port {port}" in run("stop")
        assert "no server is running" in run("status")
        assert list(Path(temporary).glob(f"traceserve-{os.getuid()}/cache/*.jsa"))  # the second server starts faster


def test_two_versions_side_by_side(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Two builds of one name, registered with a TorchServe whose model API is open; each answers under its version."""
    store = tmp_path / "store"
    store.mkdir()
    expected = {}
    for version, labels in (("1.0", ["red", "green"]), ("2.0-rc.1", ["yes", "no"])):
        named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        folder = tmp_path / version / "same"
        run_export(folder, {"model_name": str(checkpoint("bert", **named)), "max_length": 32, "version": version})
        os.rename(pack_archive(folder, "same", tmp_path), store / f"same-{version}.mar")
        [answer] = Engine.load(folder).answer([Request({"text": "hello"})])
        assert isinstance(answer, Answer)
        expected[version] = answer.value
    inference, management, metrics, grpc, grpc_management = configuration.free_ports(5)
    properties = {
        "inference_address": f"http://127.0.0.1:{inference}",
        "management_address": f"http://127.0.0.1:{management}",
        "metrics_address": f"http://127.0.0.1:{metrics}",
        "grpc_inference_port": grpc,
        "grpc_management_port": grpc_management,
        "enable_model_api": "true",
        "disable_token_authorization": "true",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for sub in ("logs", "tmp", "run"):
            (folder / sub).mkdir()
        (folder / "config.properties").write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        settings = {"ts-config": folder / "config.properties", "model-store": store}
        try:
            server.launch(folder, settings, java.find_java())
            wait_for(f"http://127.0.0.1:{inference}/ping")
            for version in expected:
                query = f"url=same-{version}.mar&initial_workers=1&synchronous=true"
                reply = send(urllib.request.Request(f"http://127.0.0.1:{management}/models?{query}", method="POST"))
                assert reply.status == 200 and version in reply.json["status"], reply.body
            for version, value in expected.items():
                url = f"http://127.0.0.1:{inference}/predictions/same/{version}"
                assert_answers(send(urllib.request.Request(url, data=b"hello", headers=TEXT_TYPE)), value)
            url = f"http://127.0.0.1:{inference}/predictions/same"
            assert_answers(send(urllib.request.Request(url, data=b"hello", headers=TEXT_TYPE)), expected["1.0"])
            query = "url=same-1.0.mar&initial_workers=1&synchronous=true"
            reply = send(urllib.request.Request(f"http://127.0.0.1:{management}/models?{query}", method="POST"))
            assert reply.status == 409  # the same version again
        finally:
            instances.end_started_in(folder)
            folder.mkdir(exist_ok=True)


TEXT_TYPE = {"Content-Type": "text/plain"}


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if send(url).status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"{url} does not answer")
