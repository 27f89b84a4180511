"""The service behind an ASGI server: paths, forms, limits, streams as TorchServe has them; archives from anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import gzip
import http.client
import http.server
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import (
    Any,
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Dict,
    List,
    NamedTuple,
    Optional,
    Tuple,
    Type,
)

import pytest
from conftest import run_export, served_over_http
from traceserve.archives.archive import pack_archive
from traceserve.errors import ArchiveError
from traceserve.serving.keys import write_key
from traceserve_hosts import (
    asgi,
    batcher,
    fetching,
    libraries,
    loading,
    lock_of_users,
    ray_config,
    reason_in,
    sagemaker,
    web,
)
from traceserve_hosts.asgi import Application, Limits, Message, Scope, key_from_environment
from traceserve_hosts.batcher import Asked, Batcher, Piece
from traceserve_hosts.routing import Router, may_stream, messages
from traceserve_runtime import service as core
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine, Work
from traceserve_runtime.errors import InvalidManifest, NotFound
from traceserve_runtime.manifest import Manifest, sha256
from traceserve_runtime.protocols import PROTOCOLS, protocol_of
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.service import Call, Exchange, Reply, Service, Session
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.texts.limits import RequestLimits

TEXT = "The boat is small."
JSON = {"content-type": "application/json"}


class Answer(NamedTuple):
    status: int
    headers: Dict[str, str]
    pieces: List[bytes]

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.pieces))


class Hosted:
    """An application that is asked as an ASGI server asks it."""

    def __init__(self, service: Service, limits: Limits = Limits(), most: int = 8, delay: float = 0.0) -> None:
        self.service = service
        self.batches: List[int] = []
        self.rows: List[int] = []
        self.batcher = Batcher(service, most, delay, self._report)
        self.application = Application(service, self.batcher, limits)

    def _report(self, stats: Stats, calls: int, seconds: float) -> None:
        self.batches.append(calls)
        self.rows.append(stats.rows)

    async def ask(self, path: str, body: Any = None, method: str = "", **headers: str) -> Answer:
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        own = {**({} if isinstance(body, bytes) or body is None else JSON), **headers}
        scope = {
            "type": "http",
            "method": method or ("GET" if body is None else "POST"),
            "path": path,
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in own.items()],
        }
        return await collected(messages(self.application, scope, raw))


async def collected(sent: AsyncIterator[Message]) -> Answer:
    found = [message async for message in sent]
    assert found[0]["type"] == "http.response.start" and not found[-1].get("more_body")
    headers = {name.decode(): value.decode() for name, value in found[0]["headers"]}
    return Answer(found[0]["status"], headers, [m["body"] for m in found[1:] if m["body"]])


@pytest.fixture(scope="module")
def folders(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    folder = tmp_path_factory.mktemp("hosts")
    own: Dict[str, Tuple[str, Dict[str, Any]]] = {
        "sequence_classification": ("bert", {"id2label": {0: "red", 1: "green", 2: "blue"}}),
        "feature_extraction": ("bert", {}),
        "text_generation": ("llama", {}),
    }
    for name, (architecture, options) in own.items():
        source = checkpoint(architecture, TASKS[name].auto_model, **options)
        run_export(folder / name, {"model_name": str(source), "task": name, "max_length": 64}, gradients=True)
    return {name: folder / name for name in own}


@pytest.fixture(scope="module")
def services(folders: Dict[str, Path]) -> Dict[str, Service]:
    return {name: Service(Engine.load(folder), "small", "1.0") for name, folder in folders.items()}


@pytest.fixture
def classifier(services: Dict[str, Service]) -> Service:
    return services["sequence_classification"]


def native(service: Service, body: Any) -> Any:
    [reply] = service.answer([Call({"body": json.dumps(body).encode()}, Headers("application/json"))])
    return json.loads(reply.body)


Asking = Callable[[], Awaitable[Answer]]


def run(asking: Awaitable[Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(asking, 60)

    return asyncio.run(limited())


# Paths


TENSOR = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}]}


@pytest.mark.parametrize(
    "path, body, found",
    [
        ("/predictions/small", {"text": TEXT}, lambda answer: answer),
        ("/predictions/small/1.0", {"text": TEXT}, lambda answer: answer),
        ("/", {"text": TEXT}, lambda answer: answer),
        ("/predictions/small/1.0/predict", {"inputs": TEXT}, lambda answer: answer[0]),
        ("/predict", {"inputs": TEXT}, lambda answer: answer[0]),
        ("/v1/models/small:predict", {"instances": [TEXT]}, lambda answer: answer["predictions"][0]),
        ("/v2/models/small/infer", TENSOR, lambda answer: json.loads(answer["outputs"][0]["data"][0])),
        ("/v2/models/small/versions/1.0/infer", TENSOR, lambda answer: json.loads(answer["outputs"][0]["data"][0])),
    ],
)
def test_every_path_gives_the_native_answer(
    path: str, body: Any, found: Callable[[Any], Any], classifier: Service
) -> None:
    answer = run(Hosted(classifier).ask(path, body))
    assert answer.status == 200, answer
    assert found(answer.json) == native(classifier, {"text": TEXT})


@pytest.mark.parametrize(
    "path, body, found",
    [
        ("/explanations/small", {"text": TEXT}, lambda answer: answer),
        ("/explanations/small/1.0", TEXT, lambda answer: answer),
        ("/v1/models/small:explain", {"instances": [TEXT]}, lambda answer: answer["explanations"][0]),
        ("/v2/models/small/explain", TENSOR, lambda answer: json.loads(answer["outputs"][0]["data"][0])),
    ],
)
def test_every_door_explains(path: str, body: Any, found: Callable[[Any], Any], classifier: Service) -> None:
    hosted = Hosted(classifier)
    answer = run(hosted.ask(path, body))
    assert answer.status == 200, answer
    explained = found(answer.json)
    assert explained["answer"] == native(classifier, {"text": TEXT}) and explained["method"] == "integrated_gradients"
    assert "".join(word["word"] for word in explained["words"]) == TEXT.replace(" ", "")


def test_predictions_are_answered_beside_an_explanation(classifier: Service) -> None:
    """They join between its runs, and a prediction that comes while it rests wakes the thread."""

    async def both() -> Tuple[Answer, List[float]]:
        hosted = Hosted(classifier)
        explaining = asyncio.ensure_future(hosted.ask("/explanations/small", {"text": " ".join([TEXT] * 60)}))
        took = []
        await asyncio.sleep(0.01)
        for _ in range(20):
            began = time.perf_counter()
            assert (await hosted.ask("/predictions/small", {"text": TEXT})).status == 200
            took.append(time.perf_counter() - began)
        beside = not explaining.done()
        assert beside
        return await explaining, took

    explained, took = run(both())
    assert explained.status == 200 and explained.json["windows"]["of"] > 3
    assert sorted(took)[10] < 0.2


@pytest.mark.parametrize(
    "path, found",
    [
        ("/v2", {"name": "traceserve"}),
        ("/live", {"live": True}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/small", {"name": "small", "versions": ["1.0"], "platform": "traceserve_torchscript"}),
        ("/v2/models/small/ready", {"name": "small", "ready": True}),
        ("/v2/models/small/versions/1.0/ready", {"ready": True}),
        ("/v1/models", {"object": "list", "models": ["small"]}),
        ("/v1/models/small", {"id": "small", "name": "small", "ready": True}),
        ("/ping", {"status": "Healthy"}),
        ("/health", {"status": "Healthy"}),
        ("/openapi.json", {"openapi": "3.1.0"}),
    ],
)
def test_documents(path: str, found: Dict[str, Any], classifier: Service) -> None:
    answer = run(Hosted(classifier).ask(path))
    assert answer.status == 200 and answer.json.items() >= found.items(), answer


@pytest.mark.parametrize(
    "path, status, words",
    [
        ("/predictions/other", 404, "small is"),
        ("/predictions/small/2.0", 404, "version 1.0 is"),
        ("/v2/models/other/infer", 404, "the model other is not served here"),
        ("/v2/models/small/versions/3/ready", 404, "version 3 is not served"),
        ("/v2/models/small/nothing", 404, "/infer, /explain and /ready"),
        ("/v1/models/small:regress", 501, "the verb regress is not offered"),
        ("/nothing", 404, "nothing is served at /nothing"),
    ],
)
def test_what_is_not_there_is_said(path: str, status: int, words: str, classifier: Service) -> None:
    answer = run(Hosted(classifier).ask(path, {"text": TEXT}))
    assert answer.status == status and words in json.dumps(answer.json), answer


# Bodies


def multipart(*parts: Tuple[str, str, bytes]) -> bytes:
    made = [
        b'--x\r\nContent-Disposition: form-data; name="%s"\r\n%s\r\n%s\r\n' % (name.encode(), kind.encode(), value)
        for name, kind, value in parts
    ]
    return b"".join([*made, b"--x--\r\n"])


FORM = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    "body, content_type",
    [
        (TEXT.encode(), "text/plain"),
        (TEXT.encode(), "application/x-www-form-urlencoded"),  # curl -d TEXT
        (b"text=The+boat%20is+small.", "application/x-www-form-urlencoded"),
        (b"data=The+boat+is+small.", "application/x-www-form-urlencoded; charset=utf-8"),
        (multipart(("text", "", TEXT.encode())), FORM),
        (multipart(("data", "", TEXT.encode())), FORM),
        (multipart(("data", "Content-Type: application/json\r\n", json.dumps({"text": TEXT}).encode())), FORM),
        (b'"The boat is small."', "application/json"),
        (b"body=%54he boat is sm%61ll.", "application/x-www-form-urlencoded"),
        (multipart(("body", "", TEXT.encode())), FORM),
        (multipart(("text", "Content-Type: text/plain; charset=cp037\r\n", TEXT.encode("cp037"))), FORM),
        (multipart(("data", 'Content-Type: text/plain; charset="cp037"\r\n', TEXT.encode("cp037"))), FORM),
    ],
)
def test_bodies_are_read_as_behind_torchserve(body: bytes, content_type: str, classifier: Service) -> None:
    answer = run(Hosted(classifier).ask("/predictions/small", body, content_type=content_type))
    assert answer.status == 200 and answer.json == native(classifier, {"text": TEXT}), answer


@pytest.mark.parametrize(
    "body, content_type, words",
    [
        (b"--x\r\nno header\r\n\r\n", FORM, "the form cannot be read"),
        (b"", "multipart/form-data", "the form cannot be read"),
        (b"", "text/plain", "the body is empty"),
        (b"{", "application/json", "not valid JSON"),
        (b"\xff\xfe\xfd=%zz", "application/x-www-form-urlencoded", ""),
    ],
)
def test_malformed_bodies_are_refused(body: bytes, content_type: str, words: str, classifier: Service) -> None:
    answer = run(Hosted(classifier).ask("/predictions/small", body, content_type=content_type))
    assert 400 <= answer.status < 500 and words in answer.json["error"]["message"], answer


@pytest.mark.parametrize(
    "body, content_type",
    [
        (b"text=one&top=1&text=two", "application/x-www-form-urlencoded"),
        (multipart(("text", "", b"one"), ("text", "", b"two")), FORM),
    ],
)
def test_a_field_that_is_sent_twice_is_refused(body: bytes, content_type: str, classifier: Service) -> None:
    answer = run(Hosted(classifier).ask("/predictions/small", body, content_type=content_type))
    assert answer.status == 400 and answer.json["error"]["field"] == "text"
    assert 'the field "text" was sent twice' in answer.json["error"]["message"]


def test_the_name_of_such_a_field_is_told_short_and_plain(classifier: Service) -> None:
    body = b"%ff%00" + b"x" * 99 + b"=1&%ff%00" + b"x" * 99 + b"=2"
    asking = Hosted(classifier).ask("/predictions/small", body, content_type="application/x-www-form-urlencoded")
    answer = run(asking)
    assert answer.status == 400 and answer.json["error"]["field"] == "??" + "x" * 38


def test_a_part_of_an_unknown_charset_is_refused(classifier: Service) -> None:
    body = multipart(("text", "Content-Type: text/plain; charset=klingon\r\n", TEXT.encode()))
    answer = run(Hosted(classifier).ask("/predictions/small", body, content_type=FORM))
    assert answer.status == 415 and '"klingon"' in answer.json["error"]["message"]


@pytest.mark.parametrize("kind", ["mixed", "related"])
def test_a_multipart_body_that_is_no_form_is_refused(kind: str, classifier: Service) -> None:
    body = multipart(("text", "", TEXT.encode()))
    answer = run(Hosted(classifier).ask("/predictions/small", body, content_type=f"multipart/{kind}; boundary=x"))
    assert answer.status == 415 and f"multipart/{kind} is not supported" in answer.json["error"]["message"]


# Limits


def test_a_body_that_is_too_large_is_not_read(classifier: Service) -> None:
    received: List[int] = []

    async def ask(declared: bool) -> List[Message]:
        sent: List[Message] = []

        async def receive() -> Message:
            received.append(1)
            return {"type": "http.request", "body": b"x" * 600, "more_body": True}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"content-length", b"5000")] if declared else []
        scope = {"type": "http", "method": "POST", "path": "/predictions/small", "headers": headers}
        await Hosted(classifier, Limits(largest_body=1000)).application(scope, receive, send)
        return sent

    assert run(ask(True))[0]["status"] == 413 and not received
    assert run(ask(False))[0]["status"] == 413 and len(received) == 2


def test_large_bodies_together_are_limited(classifier: Service) -> None:
    """As many of the largest size as clients like to send would end the process, and each alone is allowed."""

    async def asked() -> Tuple[int, int, int]:
        hosted = Hosted(classifier, Limits(largest_body=1000, all_bodies=1500))
        scope = {"type": "http", "method": "POST", "path": "/predictions/small", "headers": []}
        whole = asyncio.Event()

        async def receive() -> Message:
            if parts:
                return {"type": "http.request", "body": parts.pop(), "more_body": True}
            await whole.wait()
            whole.clear()  # nothing comes after the end, not even the client's leaving
            return {"type": "http.request", "body": b"", "more_body": False}

        parts, sent = [b"x" * 900], []

        async def send(message: Message) -> None:
            sent.append(message)

        first = asyncio.ensure_future(hosted.application(scope, receive, send))
        while parts:
            await asyncio.sleep(0)
        second = await hosted.ask("/predictions/small", b"y" * 900, content_type="text/plain")
        small = await hosted.ask("/predictions/small", b"y", content_type="text/plain")
        assert second.status == 503 and second.headers["retry-after"] == "1" and small.status == 200
        whole.set()
        await first
        third = await hosted.ask("/predictions/small", b"y" * 900, content_type="text/plain")
        return sent[0]["status"], second.status, third.status

    assert run(asked()) == (200, 503, 200)


def test_one_body_of_the_largest_size_has_room_and_no_larger_one(classifier: Service) -> None:
    hosted = Hosted(classifier, Limits(largest_body=1000, all_bodies=10))
    for size, status in ((1000, 200), (1001, 413)):
        assert run(hosted.ask("/predictions/small", b"x" * size, content_type="text/plain")).status == status


def test_where_the_queue_is_full_a_body_is_not_waited_for(classifier: Service) -> None:
    slow = Slow(classifier)
    hosted = Hosted(slow, Limits(queue=1), most=1)  # type: ignore[arg-type]

    async def ask() -> Message:
        asking = [asyncio.ensure_future(hosted.ask("/predictions/small", {"text": TEXT}))]
        while not slow.asked:
            await asyncio.sleep(0.01)
        asking.append(asyncio.ensure_future(hosted.ask("/predictions/small", {"text": TEXT})))
        while hosted.batcher.waiting < 1:
            await asyncio.sleep(0.01)
        sent: asyncio.Queue[Message] = asyncio.Queue()

        async def never() -> Message:
            raise AssertionError("the body was read")

        scope = {"type": "http", "method": "POST", "path": "/predictions/small", "headers": []}
        await hosted.application(scope, never, sent.put)
        slow.let.set()
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200, 200]
        return await sent.get()

    assert run(ask())["status"] == 503


@pytest.mark.parametrize("routed", [False, True])
def test_bodies_that_do_not_come_leave_their_room_to_others(routed: bool, classifier: Service) -> None:
    """A connection that sends all but the last byte, and then nothing, would have others refused for as long as it stays."""
    limits = Limits(largest_body=1000, all_bodies=1000, body_seconds=0.5)
    hosted = Hosted(classifier, limits)
    shares = {"small": {"1.0": 1.0}}
    router = Router(shares, limits, lambda name, version, scope, body: messages(hosted.application, scope, body))
    with served_over_http(router if routed else hosted.application) as address:

        def status() -> int:
            with contextlib.closing(http.client.HTTPConnection(*address, timeout=10)) as client:
                client.request("POST", "/predictions/small", b"x" * 900, {"Content-Type": "text/plain"})
                return client.getresponse().status

        with socket.create_connection(address, timeout=10) as idle:
            head = "POST /predictions/small HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 1000\r\n\r\n"
            idle.sendall(head.encode() + b"x" * 999)
            while status() != 503:
                time.sleep(0.01)
            response = http.client.HTTPResponse(idle)
            response.begin()
            error = json.loads(response.read())["error"]
            assert response.status == 408 and error["type"] == "TimedOut" and "too slowly" in error["message"]
            assert idle.recv(1) == b"", "the connection ends"
        assert status() == 200


def test_a_body_that_comes_steadily_has_more_time(classifier: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "_LEAST_PACE", 100)
    parts = [b"x" * 10] * 8

    async def ask() -> List[Message]:
        sent: List[Message] = []

        async def receive() -> Message:
            await asyncio.sleep(0.05)
            return {"type": "http.request", "body": parts.pop(), "more_body": bool(parts)}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/predictions/small", "headers": []}
        await Hosted(classifier, Limits(body_seconds=0.1)).application(scope, receive, send)
        return sent

    assert run(ask())[0]["status"] == 200


def test_a_body_may_begin_late(classifier: Service) -> None:
    """Its time begins with its first bytes: before, it holds no room."""
    pauses, parts = [0.1, 0.5], [b"at.", b"A bo"]

    async def ask() -> List[Message]:
        sent: List[Message] = []

        async def receive() -> Message:
            if not parts:
                return await asyncio.Event().wait()  # type: ignore[return-value]
            await asyncio.sleep(pauses.pop())
            return {"type": "http.request", "body": parts.pop(), "more_body": bool(parts)}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/predictions/small", "headers": []}
        await Hosted(classifier, Limits(body_seconds=0.4)).application(scope, receive, send)
        return sent

    assert run(ask())[0]["status"] == 200


@pytest.mark.parametrize("size, parts", [(0, 1), (1 << 18, 1), (1_000_000, 4)])
def test_a_long_answer_is_sent_in_parts(size: int, parts: int) -> None:
    """A server waits for its client between two of them, so that it holds little of it."""
    body = os.urandom(size)
    sent: List[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    run(asgi._send(send, 200, body, {}, 1.0))
    assert sent[0]["headers"] == [(b"content-length", str(size).encode())]
    more = [part.get("more_body", False) for part in sent[1:]]
    assert more == [True] * (parts - 1) + [False] and b"".join(part["body"] for part in sent[1:]) == body


def test_who_does_not_read_a_long_answer_is_left(classifier: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "_LEAST_PACE", 1 << 24)  # the system's own buffers hold some MB
    body = bytes(40_000_000)
    hosted = Hosted(classifier, Limits(body_seconds=0.5))

    def answered(call: Call) -> Asked:
        asked = Asked(call)
        asked.tell(Reply(body))
        return asked

    monkeypatch.setattr(hosted.batcher, "ask", answered)
    request = b"POST /predictions/small HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 1\r\n\r\nx"
    with served_over_http(hosted.application) as address, socket.create_connection(address, timeout=10) as reader:
        reader.sendall(request)
        time.sleep(4)
        read = 0
        with contextlib.suppress(ConnectionError):
            while part := reader.recv(1 << 20):
                read += len(part)
        assert 0 < read < len(body), "it was closed before its end"


@pytest.mark.parametrize("routed", [False, True])
def test_who_does_not_read_a_stream_is_left(routed: bool, classifier: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(body_seconds=0.2)
    hosted = Hosted(classifier, limits)
    jobs: List[Asked] = []

    def answered(call: Call) -> Asked:
        jobs.append(Asked(call))
        jobs[-1].tell(Piece(b"Once", {}))
        return jobs[-1]

    monkeypatch.setattr(hosted.batcher, "ask", answered)
    received: List[Message] = [{"type": "http.request", "body": b"x"}]
    shares = {"small": {"1.0": 1.0}}
    router = Router(shares, limits, lambda name, version, scope, body: messages(hosted.application, scope, body))

    async def receive() -> Message:
        return received.pop() if received else await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":  # the system's buffers are full
            await asyncio.Event().wait()

    async def ask() -> None:
        scope = {"type": "http", "method": "POST", "path": "/predictions/small", "headers": []}
        await asyncio.wait_for((router if routed else hosted.application)(scope, receive, send), 10)
        while not jobs[0].gone:
            await asyncio.sleep(0.01)

    run(ask())


@pytest.mark.parametrize("body", [b"a&" * 600_000, b"text=" + b"%41" * 400_000, b"&".join([b"a=b"] * 1200)])
def test_a_form_that_would_hold_the_event_loop_is_not_decoded(body: bytes, classifier: Service) -> None:
    asking = Hosted(classifier).ask("/predictions/small", body, content_type="application/x-www-form-urlencoded")
    answer = run(asking)
    assert (
        answer.status == 413 and "a form may have 1,048,576 bytes and 1,000 fields" in answer.json["error"]["message"]
    )


def test_no_part_of_a_form_is_a_file(classifier: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    body = multipart(("text", "", b"The boat. " * 20_000))
    assert run(Hosted(classifier).ask("/predictions/small", body, content_type=FORM)).status == 413  # by the engine


def test_headers_of_an_absurd_length_are_refused_or_ignored(classifier: Service) -> None:
    digits = "9" * 5000  # int() raises beyond 4,300
    asking = Hosted(classifier).ask("/predictions/small", {"text": TEXT}, content_length=digits)
    assert run(asking).status == 200
    asking = Hosted(classifier).ask("/predictions/small", {"text": TEXT}, inference_header_content_length=digits)
    answer = run(asking)
    assert answer.status == 400 and "but the body has" in answer.json["error"]


def test_a_key_is_needed_where_one_is_set(classifier: Service) -> None:
    hosted = Hosted(classifier, Limits(key="secret"))

    async def ask() -> List[Answer]:
        path, body = "/predictions/small", {"text": TEXT}
        return [
            await hosted.ask(path, body),
            await hosted.ask(path, body, authorization="Bearer wrong"),
            await hosted.ask(path, body, authorization="Bearer secret"),
            await hosted.ask("/health"),
        ]

    without, wrong, right, health = run(ask())
    assert [without.status, wrong.status, right.status, health.status] == [401, 401, 200, 200]
    assert without.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path, in_words",
    [
        ("/v2/models/small/infer", True),
        ("/v2/repository/index", True),
        ("/predictions/small/1.0/v2/models/small/infer", True),
        ("/v1/models/small:predict", True),
        ("/v2/rerank", False),
        ("/v1/models/small", False),
        ("/predictions/small", False),
    ],
)
def test_kserves_clients_get_the_hosts_refusals_in_a_string(path: str, in_words: bool, classifier: Service) -> None:
    """tritonclient fails on an object."""
    error = run(Hosted(classifier, Limits(key="secret")).ask(path, TENSOR)).json["error"]
    message = error if in_words else error["message"]
    assert message == "a key is needed: send the header Authorization: Bearer KEY"


def test_a_key_in_a_file_is_rotated_and_fails_closed(classifier: Service, tmp_path: Path) -> None:
    """Each request is compared with what the file holds then; without it nobody is let in."""
    file = tmp_path / "key"
    hosted = Hosted(classifier, Limits(key=file))

    async def statuses(*given: str) -> List[int]:
        path, body = "/predictions/small", {"text": TEXT}
        return [(await hosted.ask(path, body, authorization=f"Bearer {key}")).status for key in given]

    async def ask() -> None:  # in one event loop, as the batcher needs it
        write_key(file, "first")
        assert file.stat().st_mode & 0o077 == 0
        assert await statuses("first", "second", "") == [200, 401, 401]
        write_key(file, "second")
        assert await statuses("first", "second") == [401, 200]
        for content in ("", " \n"):
            file.write_text(content)
            assert await statuses("", "second") == [503, 503]
        file.unlink()
        assert await statuses("", "None") == [503, 503]

    run(ask())


def test_a_key_may_end_with_its_files_line_break(classifier: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a Kubernetes secret that was made of a file; no header can hold it."""
    monkeypatch.setenv("TRACESERVE_KEY", "secret\n")
    hosted = Hosted(classifier, Limits(key=key_from_environment()))
    reply = run(hosted.ask("/predictions/small", {"text": TEXT}, authorization="Bearer secret"))
    assert reply.status == 200


@pytest.mark.parametrize(
    "key, given, status",
    [
        ("schlüssel".encode(), "schlüssel".encode(), 200),
        ("schlüssel".encode(), "schlüssel".encode("latin-1"), 200),  # as Python's http.client sends it
        ("ключ".encode(), "ключ".encode(), 200),
        (b"k\xff", b"k\xff", 200),
        (b"k\xff", b"k?", 401),
        (b"k\xff", "k\udcff".encode("utf-8", "surrogatepass"), 401),
        ("schlüssel".encode(), b"schlussel", 401),
    ],
)
def test_a_key_need_not_be_ascii(
    key: bytes, given: bytes, status: int, classifier: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor UTF-8, where it comes from the environment."""
    monkeypatch.setitem(os.environb, b"TRACESERVE_KEY", key)
    hosted = Hosted(classifier, Limits(key=key_from_environment()))
    headers = [(b"authorization", b"Bearer " + given), (b"content-type", b"text/plain")]
    scope = {"type": "http", "method": "POST", "path": "/predictions/small", "headers": headers}
    assert run(collected(messages(hosted.application, scope, TEXT.encode()))).status == status


@pytest.mark.parametrize(
    "variables, options, words",
    [
        ({}, ["--host", "0.0.0.0"], "at 0.0.0.0 others can ask too, so a key is needed"),
        ({}, ["--host", "some.name"], "others can ask too"),
        ({"TRACESERVE_KEY": "secret"}, ["--host", "0.0.0.0"], "there is no archive"),
        ({"TRACESERVE_KEY": " \n"}, ["--host", "0.0.0.0"], "TRACESERVE_KEY is blank"),
        ({"TRACESERVE_KEY": "\n"}, ["--without-keys"], "TRACESERVE_KEY is blank"),
        ({"TRACESERVE_KEY_FILE": "/a/file"}, ["--host", "::"], "there is no archive"),
        ({}, ["--host", "0.0.0.0", "--without-keys"], "there is no archive"),
        ({}, ["--host", "::1"], "there is no archive"),
        ({}, ["--certificate", "x.pem"], "given together"),
        ({}, ["--certificate", "x.pem", "--key", "y.pem"], "make no pair"),
    ],
)
def test_beyond_the_loopback_address_a_key_has_to_be_set(
    variables: Dict[str, str], options: List[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it may serve, it goes on to the archive, which is not there."""
    for name in ("TRACESERVE_KEY", "TRACESERVE_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert words in (web.main(["nowhere.mar", *options]) or "")


@pytest.mark.parametrize("prefix", ["", "predictions/small/1.0/"])
@pytest.mark.parametrize(
    "path",
    [
        *filter(None, PROTOCOLS),
        "v1/models/small:predict",
        "v1/models/small:explain",
        "models/small:predict",
        "v2/models/small",
        "v2/models/small/infer",
        "v2/repository/index",
        "nothing",
    ],
)
def test_a_hosts_refusal_has_the_format_of_the_paths_own_errors(path: str, prefix: str, classifier: Service) -> None:
    headers = Headers(path=path)
    own = protocol_of(headers).error(NotFound("no"), {"body": b""}, headers, classifier.served).document
    refusal = asgi.Refused(404, "NotFound", "no").document(f"/{prefix}{path}")
    assert isinstance(refusal["error"], str) is (own == {"error": "no"})


def test_another_method_is_refused(classifier: Service) -> None:
    answer = run(Hosted(classifier).ask("/predictions/small", b"x", method="DELETE"))
    assert answer.status == 405 and answer.headers["allow"] == "GET, POST, HEAD"


class Slow:
    """A service that answers when it is let, and remembers what it was asked together."""

    def __init__(self, service: Service) -> None:
        self.engine = service.engine
        self.served = service.served
        self.let = threading.Event()
        self.asked: List[int] = []
        self._service = service

    def session(self, stats: Stats) -> Session:
        own, turn = self._service.session(stats), Session.turn

        def slowly() -> List[Exchange]:
            self.asked.append(len(own.live))
            assert self.let.wait(30)
            return turn(own)

        own.turn = slowly  # type: ignore[method-assign]
        return own


def test_what_waits_goes_together_and_too_many_are_refused_at_once(classifier: Service) -> None:
    slow = Slow(classifier)
    hosted = Hosted(slow, Limits(queue=5), most=4)  # type: ignore[arg-type]

    async def ask() -> List[Answer]:
        asking = [asyncio.ensure_future(hosted.ask("/predictions/small", {"text": TEXT}))]
        while not slow.asked:
            await asyncio.sleep(0.01)
        asking += [asyncio.ensure_future(hosted.ask("/predictions/small", {"text": TEXT})) for _ in range(7)]
        while hosted.batcher.waiting < 5 or sum(each.done() for each in asking) < 2:
            await asyncio.sleep(0.01)
        slow.let.set()
        return list(await asyncio.gather(*asking))

    answers = run(ask())
    assert [answer.status for answer in answers] == [200] * 6 + [503] * 2
    assert answers[-1].headers["retry-after"] == "1"
    assert slow.asked == [1, 4, 1]


def test_bodies_that_come_later_count_in_the_queue(classifier: Service) -> None:
    """All headers were there before any body."""
    slow = Slow(classifier)
    hosted = Hosted(slow, Limits(queue=3), most=1)  # type: ignore[arg-type]

    async def ask() -> List[int]:
        bodies, begun = asyncio.Event(), []

        async def one() -> int:
            sent: List[Message] = []

            received: List[Message] = [{"type": "http.request", "body": json.dumps({"text": TEXT}).encode()}]

            async def receive() -> Message:
                begun.append(received)
                await (bodies if received else asyncio.Event()).wait()
                return received.pop()

            async def send(message: Message) -> None:
                sent.append(message)

            headers = [(b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": "/predictions/small", "headers": headers}
            await hosted.application(scope, receive, send)
            return int(sent[0]["status"])

        asking = [asyncio.ensure_future(one()) for _ in range(12)]
        while len(begun) < 12:
            await asyncio.sleep(0.01)
        bodies.set()
        while sum(each.done() for each in asking) + hosted.batcher.waiting + sum(slow.asked) < 12:
            await asyncio.sleep(0.01)
        slow.let.set()
        return list(await asyncio.gather(*asking))

    statuses = run(ask())
    assert set(statuses) == {200, 503} and statuses.count(200) <= 5


def test_all_who_ask_for_its_health_wait_for_one_canary(classifier: Service) -> None:
    slow = Slow(classifier)
    hosted = Hosted(slow)  # type: ignore[arg-type]

    async def ask() -> None:
        with pytest.raises(asyncio.TimeoutError):  # who gives up leaves it to the others
            await asyncio.wait_for(hosted.application.unhealthy(), 0.1)
        asking = [asyncio.ensure_future(hosted.ask("/health")) for _ in range(30)]
        await asyncio.sleep(0.1)
        slow.let.set()
        assert {answer.status for answer in await asyncio.gather(*asking)} == {200}

    run(ask())
    assert slow.asked == [1]


def test_a_failure_is_looked_at_again_soon_and_an_answer_holds(
    classifier: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However seldom somebody wants a healthy process to be asked."""
    monkeypatch.setattr(asgi, "_SECONDS_OF_HEALTH", 0.05)
    paced = Paced(classifier, 0.0, fails=True)
    hosted = Hosted(paced)  # type: ignore[arg-type]

    async def ask() -> List[Optional[str]]:
        found = [await hosted.application.unhealthy(600.0)]
        paced._fails = False
        found.append(await hosted.application.unhealthy(600.0))
        for _ in range(2):
            await asyncio.sleep(0.1)
            found.append(await hosted.application.unhealthy(600.0))
        return found

    failed = "its sample was answered with 500"
    assert run(ask()) == [failed, failed, None, None]
    assert hosted.batches == [1, 1]


@pytest.mark.parametrize("path", ["/live", "/v2/health/live"])
def test_liveness_does_not_wait_in_the_queue(path: str, classifier: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes restarts a server whose liveness is late, so that all that waits is lost."""
    monkeypatch.setattr(asgi, "_SECONDS_OF_LIVENESS", 0.1)
    slow = Slow(classifier)
    hosted = Hosted(slow, Limits(key="secret", queue=4), most=1)  # type: ignore[arg-type]

    async def ask() -> None:
        waiting = [hosted.batcher.ask(Call({"body": b'"x"'}, Headers("application/json"))) for _ in range(6)]
        health = asyncio.ensure_future(hosted.ask("/health"))
        alive = await asyncio.wait_for(hosted.ask(path), 5)
        assert (alive.status, alive.json) == (200, {"live": True})
        assert not health.done()
        monkeypatch.setattr(asgi, "_LONGEST_STANDSTILL", 0.05)
        dead = await asyncio.wait_for(hosted.ask(path), 5)
        assert dead.status == 503 and dead.json["live"] is False and "nothing was computed" in dead.json["reason"]
        slow.let.set()
        assert (await health).status == 200 and [(await job.next()).status for job in waiting] == [200] * 6  # type: ignore[union-attr]

    run(ask())


class Paced(Slow):
    """A service whose turns end when it is let, or after their time, and may fail."""

    def __init__(self, service: Service, seconds: float, fails: bool = False) -> None:
        super().__init__(service)
        self._seconds, self._fails = seconds, fails

    def session(self, stats: Stats) -> Session:
        own, turn = self._service.session(stats), Session.turn

        def paced() -> List[Exchange]:
            self.let.wait(self._seconds)
            return turn(own)

        def fail() -> None:
            raise ValueError("no model")

        own.turn = paced  # type: ignore[method-assign]
        if self._fails:
            own._work.turn = fail  # type: ignore[method-assign]
        return own


@pytest.mark.parametrize(
    "seconds, fails, timeout, problem",
    [
        (0.1, False, 60.0, ""),
        (0.1, False, 0.2, ""),  # the queue is longer than an answer may take
        (0.1, True, 60.0, "nothing was computed"),
        (60.0, False, 60.0, "nothing was computed"),
    ],
    ids=["busy", "late", "failing", "stuck"],
)
def test_a_process_is_broken_where_its_queue_stands_still(
    seconds: float,
    fails: bool,
    timeout: float,
    problem: str,
    classifier: Service,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A canary waits behind the queue, so it is late on each of these."""
    monkeypatch.setattr(asgi, "_LONGEST_STANDSTILL", 1.5)
    monkeypatch.setattr(sagemaker, "_SECONDS_OF_PING", 0.1)
    paced = Paced(classifier, seconds, fails)
    hosted = Hosted(paced, Limits(timeout=timeout), most=1)  # type: ignore[arg-type]
    container = sagemaker.Container(hosted.application, batch_size=1, megabytes=1)

    async def ask() -> Tuple[List[Optional[str]], Answer]:
        for _ in range(40):
            hosted.batcher.ask(Call({"body": b'"x"'}, Headers("application/json")))
        found = [await hosted.application.broken(0.3)]
        await asyncio.sleep(1.3)
        found.append(await hosted.application.broken(0.3))
        ping = await collected(messages(container, {"type": "http", "path": "/ping", "headers": []}, b""))
        assert hosted.batcher.waiting > 5, "the canary waited behind others"
        paced.let.set()
        while hosted.batcher._busy:
            await asyncio.sleep(0.01)
        return found, ping

    found, ping = run(ask())
    assert found[0] is None, "it had just begun"
    assert (found[1] or "").partition(" for ")[0] == problem
    assert ping.status == (503 if problem else 200)


def test_an_idle_time_is_no_standstill(classifier: Service) -> None:
    """A process that nobody asked for an hour works, as its first request after that does."""
    slow = Slow(classifier)
    hosted = Hosted(slow)  # type: ignore[arg-type]
    hosted.batcher._moved = time.monotonic() - 3600

    async def ask() -> Tuple[Optional[str], Answer]:
        asking = asyncio.ensure_future(hosted.ask("/predictions/small", {"text": TEXT}))
        while not slow.asked:
            await asyncio.sleep(0.01)
        problem = await hosted.application.broken(0.1)
        slow.let.set()
        return problem, await asking

    problem, answer = run(ask())
    assert problem is None and answer.status == 200


def test_a_failing_model_without_a_queue_is_broken_at_once(classifier: Service) -> None:
    hosted = Hosted(Paced(classifier, 0.0, fails=True))  # type: ignore[arg-type]
    assert run(hosted.application.broken(5.0)) == "its sample was answered with 500"
    assert run(Hosted(Paced(classifier, 0.0, fails=True)).ask("/live")).status == 503  # type: ignore[arg-type]


async def leave(hosted: Hosted, body: bytes, gone: asyncio.Event) -> List[Message]:
    return await left(hosted.application, "/predictions/small", body, gone)


async def left(application: asgi.Asgi, path: str, body: bytes, gone: asyncio.Event) -> List[Message]:
    """A request whose client closes the connection; returns what it was sent."""
    sent: List[Message] = []
    received: List[Message] = [{"type": "http.request", "body": body}]

    async def receive() -> Message:
        if received:
            return received.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    await application(scope, receive, send)
    return sent


def test_nothing_is_computed_for_a_client_that_has_gone(classifier: Service) -> None:
    slow = Slow(classifier)
    hosted = Hosted(slow)  # type: ignore[arg-type]
    gone = asyncio.Event()

    async def ask() -> Tuple[List[Message], Answer]:
        first = asyncio.ensure_future(hosted.ask("/predictions/small", {"text": TEXT}))
        while not slow.asked:
            await asyncio.sleep(0.01)
        leaving = [asyncio.ensure_future(leave(hosted, b'"x"', gone)) for _ in range(3)]
        staying = asyncio.ensure_future(hosted.ask("/predictions/small", {"text": TEXT}))
        while hosted.batcher.waiting < 4:
            await asyncio.sleep(0.01)
        gone.set()
        sent = (await asyncio.gather(*leaving))[0]
        slow.let.set()
        assert (await first).status == 200
        return sent, await staying

    sent, stayed = run(ask())
    assert not sent and stayed.status == 200
    assert slow.asked == [1, 1]


def test_a_call_whose_client_goes_while_a_turn_begins_is_left_by_the_next_one() -> None:
    """It is never dropped without the session, which would go on computing it."""

    class Going:
        call = exchange = None

        def __init__(self) -> None:
            self._seen = iter((False, True, True))

        @property
        def gone(self) -> bool:
            return next(self._seen)

    left: List[object] = []
    asked = SimpleNamespace(reply=None)
    session = SimpleNamespace(join=lambda calls, sends: [asked], turn=lambda: None, leave=left.append)
    running = batcher._Running(session, None)  # type: ignore[arg-type]
    running.join([Going()])  # type: ignore[list-item]
    assert (running.turn(), left) == (1, [])
    assert (running.turn(), left) == (0, [asked])


def test_clients_that_have_gone_do_not_fill_the_queue(classifier: Service) -> None:
    slow = Slow(classifier)
    hosted = Hosted(slow, Limits(queue=3), most=1)  # type: ignore[arg-type]
    gone = asyncio.Event()

    async def ask() -> List[Answer]:
        answered = [asyncio.ensure_future(hosted.ask("/predictions/small", {"text": TEXT}))]
        while not slow.asked:
            await asyncio.sleep(0.01)
        first, second = (weakref.ref(hosted.batcher.ask(Call({}, Headers()))) for _ in range(2))
        leaving = asyncio.ensure_future(leave(hosted, b'"x"', gone))
        while hosted.batcher.waiting < 3:
            await asyncio.sleep(0.01)
        assert (await hosted.ask("/predictions/small", {"text": TEXT})).status == 503
        gone.set()
        assert await leaving == []
        assert hosted.batcher.waiting == 2
        answered.append(asyncio.ensure_future(hosted.ask("/predictions/small", {"text": TEXT})))
        while hosted.batcher.waiting < 3:
            await asyncio.sleep(0.01)
        for job in (first, second):
            hosted.batcher.leave(job())  # type: ignore[arg-type]
        gc.collect()
        assert first() is second() is None  # nor does anything of them stay in memory
        slow.let.set()
        return list(await asyncio.gather(*answered))

    assert [answer.status for answer in run(ask())] == [200, 200]
    assert slow.asked == [1, 1]


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_after_a_batch_of_clients_that_have_all_gone_others_are_answered(delay: float, classifier: Service) -> None:
    """They went before it was handed over."""
    hosted = Hosted(classifier, delay=delay)

    async def ask() -> Answer:
        hosted.batcher.leave(hosted.batcher.ask(Call({"body": b'"x"'}, Headers("application/json"))))
        await asyncio.sleep(0.2)
        return await asyncio.wait_for(hosted.ask("/predictions/small", {"text": TEXT}), 10)

    assert run(ask()).status == 200


def test_a_server_that_ends_leaves_nothing_that_waits(classifier: Service) -> None:
    slow = Slow(classifier)
    hosted = Hosted(slow)  # type: ignore[arg-type]

    async def ask() -> int:
        asking = asyncio.ensure_future(leave(hosted, b'"x"', asyncio.Event()))
        while not slow.asked:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait({asking})
        await asyncio.sleep(0)
        others = len(asyncio.all_tasks()) - 1
        slow.let.set()
        return others

    assert asyncio.run(ask()) == 0


@pytest.mark.parametrize("path", ["/predictions/small", "/"])
def test_a_websocket_is_closed_and_a_servers_life_acknowledged(path: str, classifier: Service) -> None:
    application = Hosted(classifier).application

    async def told(kind: str, *received: str) -> List[str]:
        waiting, sent = [{"type": each} for each in received], []

        async def receive() -> Message:
            return waiting.pop(0)

        async def send(message: Message) -> None:
            sent.append(message["type"])

        await application({"type": kind, "path": path, "headers": []}, receive, send)
        return sent

    assert run(told("websocket", "websocket.connect")) == ["websocket.close"]
    expected = ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert run(told("lifespan", "lifespan.startup", "lifespan.shutdown")) == expected


@pytest.mark.parametrize(
    ("root", "path", "whole"),
    [("", "/v1/embeddings", "/v1/embeddings"), ("/a", "/a/ping", "/a/ping"), ("/a", "/ping", "/a/ping")],
)
def test_a_path_is_whole_wherever_an_application_is_mounted(root: str, path: str, whole: str) -> None:
    """Newer servers leave the root in the path, older ones take it out."""
    assert asgi.path_of({"root_path": root, "path": path}) == whole


def test_an_answer_that_takes_too_long_is_given_up(classifier: Service) -> None:
    slow = Slow(classifier)
    hosted = Hosted(slow, Limits(timeout=0.1))  # type: ignore[arg-type]

    async def ask() -> Tuple[Answer, Answer]:
        answers = await hosted.ask("/predictions/small", {"text": TEXT}), await hosted.ask("/health")
        assert not hosted.batcher.waiting
        slow.let.set()
        return answers

    answer, health = run(ask())
    assert answer.status == health.status == 503 and "within 0.1 s" in answer.json["error"]["message"]
    assert health.json["status"] == "Unhealthy"


def test_the_first_of_a_batch_waits_for_others(classifier: Service) -> None:
    hosted = Hosted(classifier, most=3, delay=5.0)

    async def ask() -> List[Answer]:
        return list(await asyncio.gather(*(hosted.ask("/predictions/small", {"text": TEXT}) for _ in range(3))))

    assert [answer.status for answer in run(ask())] == [200] * 3
    hosted.batcher._thread.shutdown()
    assert hosted.batches == [3]  # and five seconds did not pass: the third made it whole


def test_the_engine_is_told_when_nobody_waits(classifier: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = threading.Event()
    monkeypatch.setattr(classifier.engine, "idle", idle.set)

    async def ask() -> bool:
        await Hosted(classifier).ask("/predictions/small", {"text": TEXT})
        return await asyncio.get_running_loop().run_in_executor(None, idle.wait, 5)

    assert run(ask())


def test_metrics_that_fail_cost_no_answer(classifier: Service, caplog: pytest.LogCaptureFixture) -> None:
    hosted = Hosted(classifier)

    def fail(*counted: Any) -> None:
        raise ValueError("no metrics")

    hosted.batcher._report = fail
    assert run(hosted.ask("/predictions/small", {"text": TEXT})).status == 200
    hosted.batcher._thread.shutdown()  # waits
    assert "could not be counted" in caplog.text


class PanicException(BaseException):
    """What pyo3 raises where Rust panics, in place of an Exception."""


@pytest.mark.parametrize("kind", [ValueError, PanicException])
def test_a_batch_that_no_session_answers_is_answered_and_the_next_one_runs(
    kind: Type[BaseException],
    classifier: Service,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*joined: Any) -> None:
        raise kind("".join(("sec", "ret")))  # the log has this line, and may not have the message

    async def ask() -> Tuple[Answer, Answer]:  # in one event loop, as a server asks
        hosted = Hosted(classifier)
        with monkeypatch.context() as patched:
            patched.setattr(Session, "join", fail)
            refused = await hosted.ask("/predictions/small", {"text": TEXT})
        return refused, await hosted.ask("/predictions/small", {"text": TEXT})

    answer, next_one = run(ask())
    assert answer.status == 500 and "unexpected error" in answer.json["error"]["message"]
    assert "secret" not in str(answer.json) and "a batch could not be answered" in caplog.text
    assert f"{kind.__name__} in 1 of 1 requests" in caplog.text and "secret" not in caplog.text
    assert next_one.status == 200


def test_an_idle_engine_that_fails_says_so(
    classifier: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = threading.Event()

    def fail() -> None:
        tried.set()
        raise ValueError("no memory")

    monkeypatch.setattr(classifier.engine, "idle", fail)

    async def ask() -> List[bool]:
        hosted = Hosted(classifier)
        await hosted.ask("/predictions/small", {"text": TEXT})
        waited = await asyncio.get_running_loop().run_in_executor(None, tried.wait, 5)
        hosted.batcher._thread.shutdown()
        return [waited]

    assert run(ask()) == [True]
    assert "no memory" in caplog.text


# Streams


def test_a_stream_comes_in_pieces_and_is_the_whole_answer(services: Dict[str, Service]) -> None:
    service = services["text_generation"]
    body = {"text": "Once upon a time", "parameters": {"max_new_tokens": 12, "do_sample": False}}
    expected = native(service, body)[0]["generated_text"]
    streamed = {**body, "parameters": {"max_new_tokens": 12, "do_sample": False, "stream": True}}
    answer = run(Hosted(service).ask("/predictions/small", streamed))
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain")
    assert len(answer.pieces) > 1 and expected.endswith(b"".join(answer.pieces).decode())
    events = run(
        Hosted(service).ask("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 12, "stream": True})
    )
    assert events.headers["content-type"].startswith("text/event-stream")
    assert b"".join(events.pieces).rstrip().endswith(b"data: [DONE]")


def broken_work(self: Any) -> None:
    raise ValueError("no memory")


def broken_session(self: Any) -> List[Exchange]:
    raise PanicException("no memory")


@pytest.mark.parametrize("owner, broken", [(Work, broken_work), (Session, broken_session)])
def test_a_session_that_fails_ends_a_stream_in_its_own_format(
    owner: Any, broken: Callable[[Any], object], services: Dict[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's clients read an event with the error; bare JSON is no event, and the text would seem complete."""
    turn, turns = owner.turn, itertools.count()
    monkeypatch.setattr(owner, "turn", lambda self: turn(self) if next(turns) < 8 else broken(self))
    asking = {"prompt": "Once upon a time", "max_tokens": 40, "stream": True}
    answer = run(Hosted(services["text_generation"]).ask("/v1/completions", asking))
    assert answer.status == 200 and len(answer.pieces) > 1
    *_, last, done = b"".join(answer.pieces).rstrip().split(b"\n\n")
    assert last.startswith(b"data: {") and done == b"data: [DONE]"
    assert "unexpected error in the worker" in json.loads(last[len(b"data: ") :])["error"]["message"]


@pytest.mark.parametrize("owner, broken", [(Work, broken_work), (Session, broken_session)])
def test_a_session_that_fails_before_a_streams_first_piece_has_the_errors_status(
    owner: Any, broken: Callable[[Any], object], services: Dict[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "turn", broken)
    asking = {"prompt": "Once upon a time", "max_tokens": 40, "stream": True}
    answer = run(Hosted(services["text_generation"]).ask("/v1/completions", asking))
    assert answer.status == 500 and answer.headers["content-type"] == "application/json"
    assert answer.json["error"]["type"] == "server_error"


def test_a_short_text_is_answered_while_a_long_one_is_written(services: Dict[str, Service]) -> None:
    """It joins the running loop, in which the stream's client gets its own pieces; and all is as if asked alone."""
    service = services["text_generation"]
    long = {"text": "Once upon a time", "parameters": {"max_new_tokens": 45, "return_full_text": False}}
    short = {"text": "The boat", "parameters": {"max_new_tokens": 3}}
    expected = native(service, long)[0]["generated_text"], native(service, short)
    hosted = Hosted(service)
    order: List[str] = []

    async def ask(name: str, body: Dict[str, Any]) -> Answer:
        answer = await hosted.ask("/predictions/small", body)
        order.append(name)
        return answer

    async def both() -> Tuple[Answer, Answer]:
        streamed = {**long, "parameters": {**long["parameters"], "stream": True}}  # type: ignore[dict-item]
        first = asyncio.ensure_future(ask("long", streamed))
        while not hosted.batches:
            await asyncio.sleep(0)
        second = await ask("short", short)
        return await first, second

    first, second = run(both())
    assert order == ["short", "long"] and max(hosted.batches) == 2
    assert b"".join(first.pieces).decode() == expected[0] and len(first.pieces) > 10
    assert second.json == expected[1]


def test_a_text_is_written_no_further_when_its_client_goes(services: Dict[str, Service]) -> None:
    service = services["text_generation"]
    hosted = Hosted(service)

    async def ask() -> int:
        body = json.dumps({"text": "Once", "parameters": {"max_new_tokens": 55, "stream": True}}).encode()
        asked = hosted.batcher.ask(Call({"body": body}, Headers("application/json")))
        await asked.next()
        hosted.batcher.leave(asked)
        while hosted.batcher._busy:
            await asyncio.sleep(0.01)
        return len(hosted.batches)

    assert run(ask()) < 45


def test_no_more_texts_are_written_together_than_a_batch_holds(services: Dict[str, Service]) -> None:
    """Those that join would lengthen every turn of the others."""
    hosted = Hosted(services["text_generation"], most=2)
    body = {"text": "Once", "parameters": {"max_new_tokens": 20}}

    async def ask() -> List[Answer]:
        return list(await asyncio.gather(*(hosted.ask("/predictions/small", body) for _ in range(5))))

    assert [answer.status for answer in run(ask())] == [200] * 5
    assert max(hosted.batches) == 2


# Rows that run once


def many(count: int, text: str = "Yes.") -> List[str]:
    return [text] * count


@pytest.fixture
def one_row_per_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "TURN_SECONDS", 0.0)


@pytest.mark.usefixtures("one_row_per_turn")
def test_a_short_request_is_answered_while_long_ones_run(classifier: Service) -> None:
    """More long ones than one batch holds; each gets its own answer."""
    hosted = Hosted(classifier, most=3)
    order: List[str] = []

    async def ask(name: str, body: Any) -> Any:
        answer = await hosted.ask("/predictions/small", body)
        order.append(name)
        assert answer.status == 200, answer
        return answer.json

    async def all_of_them() -> List[Any]:
        long = [asyncio.ensure_future(ask("long", many(60))) for _ in range(5)]
        while len(hosted.batches) < 4:
            await asyncio.sleep(0)
        short = asyncio.ensure_future(ask("short", {"text": TEXT}))
        return [await each for each in [short, *long]]

    short, *long = run(all_of_them())
    assert order == ["short"] + ["long"] * 5
    assert short == native(classifier, {"text": TEXT}) and long == [native(classifier, many(60))] * 5
    assert sum(hosted.rows) == 5 * 60 + 1


@pytest.mark.usefixtures("one_row_per_turn")
def test_rows_are_run_no_further_when_their_client_goes_or_has_waited_too_long(classifier: Service) -> None:
    hosted = Hosted(classifier, Limits(timeout=0.2))
    gone = asyncio.Event()
    slowly = classifier.engine.run

    async def ask() -> Answer:
        leaving = asyncio.ensure_future(leave(hosted, json.dumps(many(200)).encode(), gone))
        while len(hosted.rows) < 3:
            await asyncio.sleep(0.001)
        gone.set()
        assert await leaving == []
        late = await hosted.ask("/predictions/small", many(200))
        while hosted.batcher._busy:
            await asyncio.sleep(0.001)
        return late

    def run_slowly(jobs: Any, stats: Stats) -> Any:
        time.sleep(0.005)
        return slowly(jobs, stats)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier.engine, "run", run_slowly)
        late = run(ask())
    assert late.status == 503 and "within 0.2 s" in late.json["error"]["message"]
    assert 3 <= sum(hosted.rows) < 150  # of 400


@pytest.mark.usefixtures("one_row_per_turn")
def test_calls_that_joined_and_wait_for_their_turn_count_in_the_queue(classifier: Service) -> None:
    hosted = Hosted(classifier, Limits(queue=4), most=2)

    async def ask() -> List[Answer]:
        asking = [asyncio.ensure_future(hosted.ask("/predictions/small", many(40)))]
        while not hosted.batches:
            await asyncio.sleep(0)
        for _ in range(3):  # no more than join in a turn
            asking += [asyncio.ensure_future(hosted.ask("/predictions/small", many(40))) for _ in range(2)]
            before = len(hosted.batches)
            while len(hosted.batches) < before + 2:
                await asyncio.sleep(0)
        asking.append(asyncio.ensure_future(hosted.ask("/predictions/small", many(40))))
        return list(await asyncio.gather(*asking))

    assert [answer.status for answer in run(ask())] == [200] * 6 + [503] * 2


@pytest.mark.parametrize("name", ["sequence_classification", "text_generation"])
def test_answers_are_freed_without_a_garbage_collection(name: str, folders: Dict[str, Path]) -> None:
    """Full ones are rare, since hosts freeze what they have loaded: answers that waited for one would fill the memory."""

    async def ask() -> None:
        hosted = Hosted(Service(Engine.load(folders[name]), "small"))
        whole, streamed = {"text": TEXT}, {"text": TEXT, "parameters": {"stream": True, "max_new_tokens": 5}}
        for body in (whole, streamed if name == "text_generation" else whole, {"text": 5}, b"{"):
            await hosted.ask("/predictions/small", body, content_type="application/json")
        until = time.monotonic() + 10
        while kept() and time.monotonic() < until:  # the thread that answered may still end
            await asyncio.sleep(0.01)
        assert kept() == []

    def kept() -> List[str]:
        found = (each for each in gc.get_objects() if type(each) in (Exchange, core.Reply, Call))
        return [type(each).__name__ for each in found if not any(each is other for other in others)]

    gc.collect()
    others = [each for each in gc.get_objects() if type(each) in (Exchange, core.Reply, Call)]  # of other tests
    gc.disable()
    try:
        run(ask())
    finally:
        gc.enable()


# Several archives


class Several:
    """A router over applications in this process."""

    def __init__(self, shares: Dict[str, Dict[str, float]], applications: Dict[Tuple[str, str], Any]) -> None:
        self.asked: List[Tuple[str, str]] = []
        self.applications = applications
        self.router = Router(shares, Limits(), self._ask)

    async def _ask(self, name: str, version: str, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        self.asked.append((name, version))
        async for message in messages(self.applications[name, version], scope, body):
            yield message

    async def ask(self, path: str, body: Any = None, encoding: str = "") -> Answer:
        scope = {
            "type": "http",
            "method": "GET" if body is None else "POST",
            "path": path,
            "headers": [(b"content-type", b"application/json"), (b"content-encoding", encoding.encode())],
        }
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        return await collected(messages(self.router, scope, raw))


@pytest.fixture
def several(services: Dict[str, Service]) -> Several:
    def application(name: str, version: str, task: str) -> Application:
        service = Service(services[task].engine, name, version)
        return Application(service, Batcher(service, 8, 0.0))

    return Several(
        {"colours": {"1.0": 9, "2.0": 1}, "vectors": {"1.0": 1}},
        {
            ("colours", "1.0"): application("colours", "1.0", "sequence_classification"),
            ("colours", "2.0"): application("colours", "2.0", "sequence_classification"),
            ("vectors", "1.0"): application("vectors", "1.0", "feature_extraction"),
        },
    )


@pytest.mark.parametrize("begun", [False, True], ids=["before the answer", "within a stream"])
def test_the_router_cancels_what_a_client_that_has_gone_asked(begun: bool) -> None:
    async def ask() -> List[Message]:
        gone, asked, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def slow(name: str, version: str, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
            try:
                if begun:
                    yield {"type": "http.response.start", "status": 200, "headers": []}
                asked.set()
                await asyncio.sleep(600)
            finally:
                ended.set()

        router = Router({"colours": {"1.0": 1.0}}, Limits(), slow)
        leaving = asyncio.ensure_future(left(router, "/predictions/colours", b'"x"', gone))
        await asked.wait()
        gone.set()
        sent = await asyncio.wait_for(leaving, 10)
        await asyncio.wait_for(ended.wait(), 10)
        return sent

    assert [message["type"] for message in run(ask())] == ["http.response.start"] * begun


def test_what_an_application_does_for_messages_that_nobody_reads_ends() -> None:
    async def ask() -> bool:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def slow(scope: Scope, receive: Any, send: Any) -> None:
            try:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                begun.set()
                await asyncio.sleep(600)
            finally:
                ended.set()

        answer = messages(slow, {"type": "http"}, b"")
        await answer.__anext__()
        await begun.wait()
        await answer.aclose()  # type: ignore[attr-defined]
        await asyncio.wait_for(ended.wait(), 10)
        return ended.is_set()

    assert run(ask())


@pytest.mark.parametrize(
    "path", ["/predictions/colours", "/v1/models", "/v2/health/ready", "/v2/models/vectors", "/v2"]
)
def test_the_router_demands_the_key_before_anything_is_asked(path: str, several: Several) -> None:
    several.router = Router({"colours": {"1.0": 1}, "vectors": {"1.0": 1}}, Limits(key="secret"), several._ask)

    async def ask() -> List[int]:
        return [(await several.ask(each)).status for each in (path, "/live", "/health")]

    assert run(ask())[:2] == [401, 200]
    assert several.asked == [("colours", "1.0"), ("vectors", "1.0")], "for the health alone"


def test_the_only_name_need_not_be_named(several: Several) -> None:
    several.router = Router({"vectors": {"1.0": 1}}, Limits(), several._ask)
    assert run(several.ask("/v1/embeddings", {"input": TEXT})).status == 200
    assert several.asked == [("vectors", "1.0")]


@pytest.mark.parametrize(
    "path, body, meant",
    [
        ("/predictions/colours/2.0", {"text": TEXT}, ("colours", "2.0")),
        ("/predictions/vectors", {"text": TEXT}, ("vectors", "1.0")),
        ("/v1/embeddings", {"input": TEXT, "model": "vectors"}, ("vectors", "1.0")),
        ("/v2/models/vectors/ready", None, ("vectors", "1.0")),
        ("/v1/models/vectors:predict", {"instances": [TEXT]}, ("vectors", "1.0")),
        ("/v1/models/vectors", None, ("vectors", "1.0")),
        ("/predictions/vectors/1.0/embed", {"inputs": TEXT}, ("vectors", "1.0")),
    ],
)
def test_the_router_finds_the_archive(path: str, body: Any, meant: Tuple[str, str], several: Several) -> None:
    answer = run(several.ask(path, body))
    assert answer.status == 200, answer
    assert several.asked == [meant]


@pytest.mark.parametrize(
    "path, body, words",
    [
        ("/predictions/other", {"text": TEXT}, "there are colours, vectors"),
        ("/predictions/colours/3.0", {"text": TEXT}, "of colours there are 1.0, 2.0"),
        (
            "/v1/embeddings",
            {"input": TEXT},
            'name one as "model", or ask at /predictions/colours, /predictions/vectors',
        ),
        ("/v1/embeddings", {"input": TEXT, "model": "gpt"}, "no such model"),
        ("/v2/models/other/infer", {"inputs": []}, "no such model"),
    ],
)
def test_the_router_says_what_there_is(path: str, body: Any, words: str, several: Several) -> None:
    answer = run(several.ask(path, body))
    error = answer.json["error"]
    assert answer.status == 404 and words in (error if path.startswith("/v2/") else error["message"])


EMBED = json.dumps({"input": TEXT, "model": "vectors"})


@pytest.mark.parametrize(
    "body, encoding",
    [
        (gzip.compress(EMBED.encode(), mtime=0), "gzip"),
        (zlib.compress(EMBED.encode()), "deflate"),
        (EMBED.encode("utf-16"), ""),
        (EMBED.encode("utf-8-sig"), "identity"),
    ],
    ids=["gzip", "deflate", "UTF-16", "byte-order mark"],
)
def test_the_router_reads_bodies_as_archives_do(body: bytes, encoding: str, several: Several) -> None:
    answer = run(several.ask("/v1/embeddings", body, encoding))
    assert answer.status == 200, answer
    assert several.asked == [("vectors", "1.0")]


@pytest.mark.parametrize(
    "body, encoding, status, words",
    [
        (b"x", "br", 415, "send gzip, deflate, or a plain body"),
        (b"plain", "gzip", 400, "the body is not gzip"),
        (gzip.compress(b" " * (17 << 20), mtime=0), "gzip", 413, "when it is decompressed"),
        (gzip.compress(b"{", mtime=0), "gzip", 404, "name one"),
        (
            b'{"model": "vectors", "input": [' + b"[]," * (1 << 20) + b"[]]}",
            "",
            413,
            "lists and objects; one request may have",
        ),
    ],
    ids=["unknown", "not gzip", "too long", "not JSON", "too many values"],
)
def test_the_router_refuses_what_it_cannot_read(
    body: bytes, encoding: str, status: int, words: str, several: Several
) -> None:
    answer = run(several.ask("/v1/embeddings", body, encoding))
    assert answer.status == status and words in answer.json["error"]["message"], answer
    assert not several.asked


STREAM = json.dumps({"prompt": TEXT, "stream": True}).encode()


@pytest.mark.parametrize(
    "body, encoding, found",
    [
        (STREAM, "", True),
        (STREAM, "identity", True),
        (gzip.compress(STREAM, mtime=0), "gzip", True),
        (STREAM.decode().encode("utf-16"), "", True),
        (b"text=x&parameters=%7B%22stream%22%3A+true%7D", "", True),
        (b'{"text": "A stream."}', "", False),
        (b'{"text": "A stream."}', "identity", False),
    ],
)
def test_an_answer_that_may_stream_is_passed_on_in_pieces(body: bytes, encoding: str, found: bool) -> None:
    assert may_stream({"headers": [(b"Content-Encoding", encoding.encode())]}, body) is found


@pytest.mark.parametrize("path, status", [("/explanations/colours", 200), ("/explanations/colours/1.0", 404)])
def test_a_replica_of_the_next_version_answers_where_none_is_named(
    path: str, status: int, services: Dict[str, Service]
) -> None:
    """While replicas are replaced, the router only knows the version before."""
    service = Service(services["sequence_classification"].engine, "colours", "2.0")
    rolling = Several({"colours": {"1.0": 1}}, {("colours", "1.0"): Application(service, Batcher(service, 8, 0.0))})
    assert run(rolling.ask(path, {"text": TEXT})).status == status


def test_versions_share_the_requests_to_their_name(several: Several) -> None:
    async def ask() -> None:
        await asyncio.gather(*(several.ask("/predictions/colours", {"text": TEXT}) for _ in range(200)))

    run(ask())
    second = several.asked.count(("colours", "2.0"))
    assert several.asked.count(("colours", "1.0")) == 200 - second and 5 <= second <= 45  # 20 are its share


def test_the_router_is_healthy_where_all_are(several: Several) -> None:
    async def dead(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask() -> None:
        assert (await several.ask("/health")).json == {"status": "Healthy"}
        assert (await several.ask("/v2/health/ready")).status == 200
        assert set(several.asked) == {("colours", "1.0"), ("colours", "2.0"), ("vectors", "1.0")}
        several.applications["vectors", "1.0"] = dead
        assert (await several.ask("/health")).status == 503
        assert (await several.ask("/v2/health/ready")).status == 503
        for path in ("/live", "/v2/health/live"):  # of the router itself: its replicas are asked by themselves
            several.asked.clear()
            assert (await several.ask(path)).json == {"live": True} and not several.asked
        assert (await several.ask("/v2")).json["name"] == "traceserve"
        assert (await several.ask("/v1/models")).json["models"] == ["colours", "vectors"]

    run(ask())  # one event loop, as a server has


# Ray's configuration


def test_one_archive_is_its_own_ingress_at_the_root() -> None:
    [application] = ray_config.applications([ray_config.Hosted("/a/small.mar", "small", "1.0", sha256="0" * 64)])
    assert application["route_prefix"] == "/" and application["args"]["archive"] == "/a/small.mar"
    assert application["name"] == "small"  # the next version takes its place
    assert application["args"]["replicas"] == dataclasses.asdict(ray_config.Replicas())
    json.dumps(application)


def test_several_archives_have_a_router() -> None:
    hosted = [
        ray_config.Hosted("a", "colours", "1.0", share=9),
        ray_config.Hosted("b", "colours", "2.0"),
        ray_config.Hosted("c", "vectors", "1.0"),
    ]
    found = ray_config.applications(hosted)
    assert {each["name"]: each["route_prefix"] for each in found} == {
        "colours-1.0": "/predictions/colours/1.0",
        "colours-2.0": "/predictions/colours/2.0",
        "vectors": "/predictions/vectors",
        ray_config.ROUTER: "/",
    }
    assert found[-1]["args"]["models"]["colours"]["1.0"] == {"application": "colours-1.0", "share": 9}
    with pytest.raises(ValueError, match=r"vectors-1\.0 is given twice"):
        ray_config.applications([hosted[2], hosted[2]])
    with pytest.raises(ValueError, match=r"colours-1\.0 is given twice"):
        ray_config.applications([*hosted, ray_config.Hosted("d", "colours-1.0", "1.0")])
    with pytest.raises(ValueError, match="no archive"):
        ray_config.applications([])


def test_a_new_version_on_ray_is_beside_the_old_one_and_then_in_its_place() -> None:
    """As data: one replica at its own path; then the name's application with its arguments, and a router that knows it."""
    hosted = [ray_config.Hosted("/old", "colours", "1.0"), ray_config.Hosted("/c", "vectors", "1.0")]
    running = ray_config.applications(hosted)
    replicas = dataclasses.asdict(ray_config.Replicas(least=3, most=4, cpus=2, surge=50))
    new = {**running[0]["args"], "archive": "/new", "version": "2.0", "replicas": replicas}  # type: ignore[dict-item]
    beside = ray_config.beside(new, 1)
    assert beside["name"].startswith("colours-2.0-") and beside["name"] != ray_config.beside(new, 1)["name"]
    assert beside["route_prefix"] == "/predictions/colours/2.0"
    assert beside["args"] == {**new, "replicas": {**replicas, "least": 1, "most": 1, "cpus": 1}}
    application, router = ray_config.replacing(running, new)
    assert application == {**running[0], "args": new}
    assert router["name"] == ray_config.ROUTER and router["args"]["models"] == {
        "colours": {"2.0": {"application": "colours", "share": 1.0}},
        "vectors": {"1.0": {"application": "vectors", "share": 1.0}},
    }
    assert ray_config.replacing(ray_config.applications(hosted[:1]), new)[0]["route_prefix"] == "/"


# Archives from anywhere


@pytest.fixture
def packed(folders: Dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return pack_archive(folders["sequence_classification"], "small", tmp_path)


def test_an_archive_is_unpacked_once(packed: Path) -> None:
    folder = fetching.fetch_archive(str(packed))
    assert folder.name == sha256(packed) and (folder / "traceserve.json").is_file()
    before = (folder / "traceserve.json").stat().st_ino
    assert fetching.fetch_archive(str(packed), folder.name) == folder
    assert (folder / "traceserve.json").stat().st_ino == before
    packed.unlink()  # with the hash, what was fetched needs no address
    assert fetching.fetch_archive(str(packed), folder.name) == folder


HOLDING = """
import sys
from pathlib import Path
from traceserve_hosts import loading
loading._keep(Path(sys.argv[1]))
print("kept", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_archives_that_nobody_has_used_for_long_are_removed(
    folders: Dict[str, Path], packed: Path, tmp_path: Path
) -> None:
    old, held, another = fetching.fetch_archive(str(packed)), tmp_path / "held", tmp_path / "another"
    for folder, version in ((held, "2.0"), (another, "3.0")):
        folder.mkdir()
        pack_archive(folders["sequence_classification"], "small", folder, version)
    in_use = fetching.fetch_archive(str(held / "small.mar"))
    assert old.is_dir() and in_use.is_dir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(in_use)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "kept\n"
        for folder in (old, in_use):
            os.utime(lock_of_users(folder), (0, 0))
        latest = fetching.fetch_archive(str(another / "small.mar"))
        assert not old.exists() and in_use.is_dir() and latest.is_dir()
        process.communicate("")
    assert fetching.fetch_archive(str(held / "small.mar"), in_use.name) == in_use, "whoever asks for it uses it"
    os.utime(lock_of_users(in_use), (0, 0))
    assert fetching.fetch_archive(str(packed)) == old and (old / "traceserve.json").is_file()
    assert not in_use.exists()


def test_an_archive_that_is_exchanged_after_it_was_hashed_is_not_unpacked(
    folders: Dict[str, Path], packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is named by the SHA-256, by which others find it later."""
    (tmp_path / "other").mkdir()
    other = pack_archive(folders["sequence_classification"], "small", tmp_path / "other", "2.0").read_bytes()
    meant, unpack = sha256(packed), fetching.unpack

    def exchanged(archive: Path, folder: Path) -> None:
        packed.write_bytes(other)
        unpack(archive, folder)

    monkeypatch.setattr(fetching, "unpack", exchanged)
    assert Manifest.read(fetching.fetch_archive(str(packed), meant)).version == "1.0"

    def hashed(file: Path) -> str:
        digest = sha256(file)
        packed.write_bytes(whole)
        return digest

    whole = packed.read_bytes() + b"x"
    monkeypatch.setattr(fetching, "sha256", hashed)
    with pytest.raises(ArchiveError, match="small.mar was changed while it was read"):
        fetching.fetch_archive(str(packed))


def test_an_archive_is_known_by_its_digest_in_capitals_too(packed: Path) -> None:
    for _ in range(2):  # unpacked now, and before
        assert fetching.fetch_archive(str(packed), sha256(packed).upper()).name == sha256(packed)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_who_comes_second_waits_for_who_unpacks(packed: Path, tmp_path: Path) -> None:
    import fcntl

    cache = tmp_path / "cache" / "traceserve" / "archives"
    cache.mkdir(parents=True)
    found: List[Path] = []
    thread = threading.Thread(target=lambda: found.append(fetching.fetch_archive(str(packed))))
    with (cache / f".{sha256(packed)}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        thread.join(1)
        assert found == [] and not (cache / sha256(packed)).exists()
    thread.join(30)
    assert found == [cache / sha256(packed)]


def test_another_archive_than_was_meant_is_refused(packed: Path) -> None:
    with pytest.raises(RuntimeError, match="it is another one, or damaged"):
        fetching.fetch_archive(str(packed), "0" * 64)
    with pytest.raises(RuntimeError, match="there is no archive at"):
        fetching.fetch_archive(str(packed.with_name("other.mar")))
    assert fetching.fetch_archive(str(packed), sha256(packed).upper()).name == sha256(packed)


def test_an_archive_comes_from_any_storage_that_fsspec_opens(packed: Path) -> None:
    assert fetching.fetch_archive(f"file://{packed}").name == sha256(packed)
    with pytest.raises(RuntimeError, match="there is no archive at"):
        fetching.fetch_archive(f"file://{packed}.other")
    with pytest.raises(RuntimeError, match="cannot be fetched here"):
        fetching.fetch_archive("nothing://host/small.mar")


def test_an_archive_comes_by_http(packed: Path) -> None:
    pytest.importorskip("aiohttp")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(packed.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert fetching.fetch_archive(f"{address}/small.mar").name == sha256(packed)
        with pytest.raises(RuntimeError, match="there is no archive at"):
            fetching.fetch_archive(f"{address}/other.mar")
        server.shutdown()


@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
@pytest.mark.parametrize("status", [403, 500])
def test_why_a_server_does_not_give_an_archive_is_said(status: int, head: bool) -> None:
    """Also where only the archive itself is refused, and not what is asked about it before."""
    pytest.importorskip("aiohttp")

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def do_HEAD(self) -> None:
            self.send_response(200 if head else status)
            self.send_header("content-length", "1000")
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RuntimeError, match=f"small.mar could not be fetched: {status}, message="):
            fetching.fetch_archive(f"http://127.0.0.1:{server.server_address[1]}/small.mar")
        server.shutdown()
    with pytest.raises(RuntimeError, match="small.mar could not be fetched: Cannot connect to host"):
        fetching.fetch_archive("http://127.0.0.1:1/small.mar")


LOST: Dict[str, Callable[[Path], object]] = {
    "traced_model.pt": Path.unlink,
    "model-config.yaml": Path.unlink,
    "traceserve_runtime/engine.py": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "traceserve.json": Path.unlink,
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", LOST)
def test_an_unpacked_archive_that_lost_a_file_is_unpacked_again(name: str, known: bool, packed: Path) -> None:
    """As in a temporary folder that is cleaned by age."""
    folder = fetching.fetch_archive(str(packed))
    whole = (folder / name).read_bytes()
    LOST[name](folder / name)
    assert fetching.fetch_archive(str(packed), folder.name if known else None) == folder
    assert (folder / name).read_bytes() == whole
    before = folder.stat().st_ino
    assert fetching.fetch_archive(str(packed)).stat().st_ino == before  # and now it is whole


def test_an_error_in_an_unpacked_archive_names_its_folder(packed: Path) -> None:
    folder = fetching.fetch_archive(str(packed))
    model = folder / "traced_model.pt"
    whole = model.read_bytes()
    model.write_bytes(bytes(len(whole)))
    try:
        result = subprocess.run([sys.executable, "-c", SERVED, str(packed)], capture_output=True, text=True)
    finally:
        model.write_bytes(whole)
    assert result.returncode == 1
    assert "traced_model.pt is not the one that was verified" in result.stderr
    assert f"(the archive was unpacked into {folder}; if a file was changed there, remove that folder" in result.stderr


@pytest.mark.parametrize("content", [None, b"a: [", b"\xff"])
def test_a_serving_configuration_that_cannot_be_read_names_its_folder(content: Optional[bytes], tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model-config.yaml").write_bytes(content)
    with pytest.raises(InvalidManifest, match=re.escape(f"{tmp_path / 'model-config.yaml'} cannot be read: ")) as found:
        loading._serving(tmp_path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "said, reason", [("", "none"), (" \n\n", "none"), ("Traceback\n  a line\n\nValueError: so \n", "ValueError: so")]
)
def test_the_last_line_is_the_reason(said: str, reason: str) -> None:
    assert reason_in(said, "none") == reason


def test_a_process_of_its_own_fetches(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.unpacked(str(packed), sha256(packed)).name == sha256(packed)
    with pytest.raises(RuntimeError, match="there is no archive at .*nowhere.mar"):
        loading.unpacked("nowhere.mar")


SERVED = """
import asyncio, json, os, sys
from traceserve_hosts.loading import load_archive
loaded = load_archive(sys.argv[1], name="other", version="3", gpu=True)  # there is one, and the archive is for a processor
import traceserve_runtime
from traceserve_runtime.service import Call
from traceserve_runtime.protocols.bodies import Headers
[reply] = loaded.service.answer([Call({"body": b"The boat is small."}, Headers("text/plain"))])
spins = [os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]]
serving = [loaded.batch_size, loaded.batch_delay, loaded.timeout]
print(json.dumps([traceserve_runtime.__file__, serving, loaded.service.served[:2], json.loads(reply.body), spins]))
"""


def test_connections_idle_for_longer_than_proxies_reuse_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With uvicorn's own 5 s, a proxy sends requests on connections that are just being closed."""
    uvicorn = pytest.importorskip("uvicorn")
    given: Dict[str, Any] = {}
    monkeypatch.setattr(uvicorn, "run", lambda served, **options: given.update(options))
    web.serve_until_signal(asgi._live, "127.0.0.1", 1)  # type: ignore[arg-type]
    assert given["timeout_keep_alive"] > 90


def test_an_archive_answers_with_its_own_code(packed: Path, classifier: Service) -> None:
    own = {
        **{name: each for name, each in os.environ.items() if name not in libraries.settings()},
        "GOMP_SPINCOUNT": "3",
    }
    result = subprocess.run([sys.executable, "-c", SERVED, str(packed)], capture_output=True, text=True, env=own)
    assert result.returncode == 0, result.stderr
    file, serving, served, answer, spins = json.loads(result.stdout.splitlines()[-1])
    assert Path(file).parents[1] == fetching.fetch_archive(str(packed))
    assert serving == [64, 0.001, 300] and served == ["other", "3"]
    assert spins == ["PASSIVE", "3"]  # unless the user has set it
    assert answer["label"] == native(classifier, {"text": TEXT})["label"]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime, imported from a copy of it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    copied = tmp_path / "elsewhere" / "traceserve_runtime"
    shutil.copytree(Path(str(sys.modules["traceserve_runtime"].__file__)).parent, copied)
    monkeypatch.setattr(sys.modules["traceserve_runtime"], "__file__", str(copied / "__init__.py"))
    return copied


@pytest.mark.parametrize("change", [lambda each: each.write_text("x = 1\n"), lambda each: each.unlink()])
@pytest.mark.parametrize("name", ["softmax.py", "texts/limits.py"])
def test_another_runtime_must_not_be_there(
    packed: Path, elsewhere: Path, name: str, change: Callable[[Path], Any]
) -> None:
    change(elsewhere / name)
    with pytest.raises(RuntimeError, match="another traceserve_runtime was imported"):
        loading.load_archive(str(packed))


def test_a_runtime_with_a_module_more_is_another(packed: Path, elsewhere: Path) -> None:
    (elsewhere / "more.py").touch()
    with pytest.raises(RuntimeError, match="another traceserve_runtime was imported"):
        loading.load_archive(str(packed))


def test_the_same_runtime_may_lie_elsewhere(packed: Path, elsewhere: Path, classifier: Service) -> None:
    loaded = loading.load_archive(str(packed), own_process=False)
    assert native(loaded.service, {"text": TEXT}) == native(classifier, {"text": TEXT})


@pytest.mark.parametrize(
    ("flags", "shapes"), [("avx512_bf16 amx_bf16 amx_tile", "512"), ("avx512_bf16", "64"), (None, "64")]
)
def test_shapes_that_onednn_keeps_are_more_where_they_take_longer_to_prepare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: Optional[str], shapes: str
) -> None:
    monkeypatch.setattr(libraries, "CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    monkeypatch.delenv(libraries.SHAPES, raising=False)
    assert libraries.settings()[libraries.SHAPES] == shapes
    monkeypatch.setenv(libraries.SHAPES, "7")
    assert libraries.settings()[libraries.SHAPES] == "7"


SHARED = """
import gc, json, os, sys
from traceserve_hosts import libraries
from traceserve_hosts.loading import load_archive
while_loading = []
make = libraries.set_defaults
libraries.set_defaults = lambda: (make(), while_loading.append(os.environ["OMP_WAIT_POLICY"]))
load_archive(sys.argv[1], own_process=sys.argv[2] == "own")
left = [os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")]
print(json.dumps([while_loading, left, gc.get_freeze_count() > 0]))
"""


@pytest.mark.parametrize(
    ("process", "left", "frozen"), [("own", ["PASSIVE", "3"], True), ("shared", [None, "3"], False)]
)
def test_a_process_of_others_stays_as_it_was(
    packed: Path, process: str, left: List[Optional[str]], frozen: bool
) -> None:
    own = {
        **{name: each for name, each in os.environ.items() if name not in libraries.settings()},
        "GOMP_SPINCOUNT": "3",
    }
    command = [sys.executable, "-c", SHARED, str(packed), process]
    result = subprocess.run(command, capture_output=True, text=True, env=own)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [["PASSIVE"], left, frozen]


def test_a_runtime_of_a_folder_with_a_longer_name_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    own = tmp_path / "model1"
    own.mkdir()
    (own / "traceserve.json").touch()
    present = SimpleNamespace(__file__=f"{own}0/traceserve_runtime/__init__.py")
    monkeypatch.setitem(sys.modules, "traceserve_runtime", present)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="another traceserve_runtime was imported"):
        loading.load_archive(str(own))


def test_an_unpacked_archive_has_no_digest_to_compare(folders: Dict[str, Path]) -> None:
    with pytest.raises(RuntimeError, match="is an unpacked archive, and only of a packed one"):
        loading.load_archive(str(folders["sequence_classification"]), "0" * 64)


def test_of_a_folder_with_two_archives_none_is_served(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (web.DIGEST_VARIABLE, web.SIGNER_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    packed.with_name("other.mar").write_bytes(packed.read_bytes())
    with pytest.raises(RuntimeError, match="there is no archive at"):
        web.loaded(str(packed.parent))


def test_a_body_may_be_as_large_as_a_request_within_the_archives_limits(classifier: Service) -> None:
    manifest = classifier.served.manifest
    largest = RequestLimits.of(manifest.max_length, manifest.max_rows).largest_body
    assert largest != Limits.largest_body
    archive = loading.Loaded(classifier, 4, 0.0, 7.0)
    assert web.application(archive)._limits == Limits(None, largest, timeout=7.0)
    assert web.application(archive, 1000)._limits.largest_body == 1000


def test_batch_transform_is_told_no_more_than_it_may_send() -> None:
    """Bodies beyond the archive's own limit are refused, and SageMaker takes no product beyond 100 MB."""
    for megabytes, largest_body, payload, concurrent in (
        (99, 1 << 30, 99, 1),
        (1024, 1 << 30, 100, 1),
        (1024, 5 << 19, 2, 4),
        (1, 5 << 19, 1, 4),
        (1024, 40 << 20, 40, 2),
        (1024, 1000, 1, 4),
    ):
        container = sagemaker.Container(SimpleNamespace(largest_body=largest_body), 4, megabytes)  # type: ignore[arg-type]
        found = container._parameters()
        assert (found["MaxPayloadInMB"], found["MaxConcurrentTransforms"]) == (payload, concurrent)


@pytest.mark.parametrize(
    ("attributes", "path"),
    [
        ("", "/"),
        ("trace=1", "/"),
        ("xpath=1,my-path=2, file.path=3,pathology=4", "/"),
        ("trace=1,path=v1/classify", "/v1/classify"),
        ("a=1; path=/v1/classify;b=2", "/v1/classify"),
        ("path=v1/models/tiny:predict other", "/v1/models/tiny:predict"),
        ('path="v1/classify"', None),
        ("path='v1/classify'", None),
        ("Path=v1/classify", None),
        ("path = v1/classify", None),
        ("x=1&path=v1/classify", None),
        ("path=v1%2Fclassify", None),
        ('{"path": "v1/classify"}', None),
        ("path=", None),
    ],
)
def test_a_path_in_custom_attributes_is_followed_or_refused(attributes: str, path: Optional[str]) -> None:
    headers = {"x-amzn-sagemaker-custom-attributes": attributes}
    if path is not None:
        assert sagemaker._path(headers) == path
    else:
        with pytest.raises(asgi.Refused, match="write path=v1/embeddings") as refusal:
            sagemaker._path(headers)
        assert refusal.value.status == 400


@pytest.mark.parametrize("part", [1 << 18, 50])
def test_batch_transform_gets_json_lines(part: int, classifier: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of an answer that is sent in parts, as lines too."""
    monkeypatch.setattr(asgi, "_PART", part)
    hosted = Hosted(classifier)
    container = sagemaker.Container(hosted.application, 4, 6)

    async def ask(body: Any, accept: str = "application/jsonlines", attributes: str = "") -> Answer:
        own = {
            b"accept": accept,
            b"x-amzn-sagemaker-custom-attributes": attributes,
            b"content-type": "application/json",
        }
        headers = [(name, value.encode()) for name, value in own.items()]
        scope = {"type": "http", "method": "POST", "path": "/invocations", "headers": headers}
        return await collected(messages(container, scope, json.dumps(body).encode()))

    async def all_of_them() -> None:
        plain, lines = await ask([TEXT, "No."], "*/*"), await ask([TEXT, "No."])
        raw = b"".join(lines.pieces)
        assert [json.loads(line) for line in raw.splitlines()] == plain.json and raw.endswith(b"}\n")
        assert lines.headers["content-type"] == "application/jsonlines"
        assert lines.headers["content-length"] == str(len(raw))
        assert len(raw) > 50 and all(len(each) <= part for each in lines.pieces)
        one = await ask(TEXT)
        assert one.json["label"] == plain.json[0]["label"] and one.headers["content-type"] == "application/json"
        assert (await ask({"txt": 1})).status == 400
        other = await ask({"input": [TEXT]}, attributes="path=v1/classify")
        assert other.json["data"] and other.headers["content-type"] == "application/json"

    asyncio.run(all_of_them())


@pytest.mark.parametrize("call", ["web.main(['a.mar'])", "sagemaker.main(['serve'])"])
def test_sigterm_ends_a_host_that_loads(call: str) -> None:
    """Also where it is ignored so far, as by a container's first process."""
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); from traceserve_hosts import sagemaker, web; "
        f"web.loaded = lambda *given: (print('loading', flush=True), time.sleep(60)); {call}"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "loading\n"
        process.terminate()
        try:
            assert process.wait(20) == 143
        finally:
            process.kill()
