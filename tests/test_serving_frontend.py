"""TorchServe's own answers, as listed in docs/frontend.md; and no request's text stays in its files."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import re
import socket
import time
import urllib.request
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Tuple

import grpc
import psutil
import pytest
from conftest import ROOT
from torchserve_grpc import Client
from traceserve.archives.archive import pack_archive
from traceserve.serving import configuration, instances, server
from traceserve.serving.instances import Instance

MARKER = b"zanzibarzanzibar"
FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=b"


class Row(NamedTuple):
    """A row of the table in docs/frontend.md."""

    request: str
    body: bytes
    status: int
    type: str


def documented() -> List[Row]:
    lines = (ROOT / "docs" / "frontend.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return [
        Row(request, body.strip("`").encode().decode("unicode_escape").encode(), int(status), kind.strip("`"))
        for request, body, status, kind in cells
    ]


@pytest.fixture(scope="module")
def instance(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """A server that asks for keys, and lets one request wait."""
    mar = pack_archive(artifact, "NAME", tmp_path_factory.mktemp("frontend"))
    started = server.start([mar], host="0.0.0.0", port=configuration.free_ports(1)[0], timeout=120)
    yield started
    instances.stop(started)


def send(instance: Instance, request: bytes) -> Tuple[int, bytes]:
    """Return the status and body for raw bytes; 0 without an answer."""
    answer = b""
    with socket.create_connection(("127.0.0.1", instance.port), 5) as connection, contextlib.suppress(OSError):
        connection.settimeout(5)
        connection.sendall(request)
        while True:
            received = connection.recv(1 << 16)
            answer += received
            head, _, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            if not received or (length and len(body) >= int(length[1])):
                return int(head.split()[1]) if head else 0, body
    return 0, b""


def raw(line: str, content_type: str, body: bytes, key: str, length: int = -1, more: bytes = b"") -> bytes:
    head = f"{line} HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Authorization: Bearer {key}\r\n" if key else ""
    head += f"Content-Type: {content_type}\r\n" if content_type else ""
    return head.encode() + more + b"Content-Length: %d\r\n\r\n%b" % (len(body) if length < 0 else length, body)


def test_the_table_is_read() -> None:
    rows = documented()
    assert len(rows) >= 18 and {row.status for row in rows} == {400, 403, 404, 413, 500}


@pytest.mark.parametrize("row", documented(), ids=lambda row: f"{row.request} {row.body[:60]!r}")
def test_what_is_documented(row: Row, instance: Instance) -> None:
    line, _, how = row.request.partition("`, ")
    key = {"without its key": "", "with a wrong key": "x"}.get(how, instance.key or "")
    content_type = {"a form": FORM, "multipart": MULTIPART}.get(how, "text/plain" if row.body else "")
    length = 99_000_000 if how == "99 MB long" else -1
    status, body = send(instance, raw(line.strip("`"), content_type, row.body, key, length))
    assert status == row.status
    assert (json.loads(body)["type"] == row.type) if body else row.type == "an empty body"


def test_a_full_queue(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure = configuration.configure_server

    def with_a_short_queue(folder: Path, *arguments: object) -> object:
        written = configure(folder, *arguments)  # type: ignore[arg-type]
        path = folder / "config.properties"
        path.write_text(path.read_text().replace("job_queue_size=1000", "job_queue_size=1"))
        return written

    monkeypatch.setattr(configuration, "configure_server", with_a_short_queue)
    started = server.start([pack_archive(artifact, "NAME", tmp_path)], port=configuration.free_ports(1)[0], timeout=120)
    try:
        request = raw("POST /predictions/NAME", "text/plain", b"word " * 400, "")
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(lambda _: send(started, request), range(400)))
        refused = [json.loads(body) for status, body in answers if status == 503]
        assert refused and {error["type"] for error in refused} == {"ServiceUnavailableException"}
        assert "no worker" in refused[0]["message"] and "scale workers API" in refused[0]["message"]
    finally:
        instances.stop(started)


# --- what it makes of HTTP ---------------------------------------------------------------------------------------------


def received(instance: Instance, request: bytes, half_closed: bool = False) -> Tuple[bytes, str]:
    """Return all that comes within two seconds, and whether the connection is open, closed or reset then."""
    answer = b""
    with socket.create_connection(("127.0.0.1", instance.port), 5) as connection:
        connection.settimeout(2)
        connection.sendall(request)
        if half_closed:
            connection.shutdown(socket.SHUT_WR)
        try:
            for piece in iter(lambda: connection.recv(1 << 16), b""):
                answer += piece
        except socket.timeout:
            return answer, "open"
        except ConnectionResetError:
            return answer, "reset"
        return answer, "closed"


def test_pipelined_requests_are_answered_as_they_end(instance: Instance) -> None:
    """The second one first, as the first one waits for a worker."""
    long = json.dumps(["word"] * 50).encode()
    requests = [("POST /predictions/NAME", long), ("GET /ping", b"")]
    sent = b"".join(raw(line, "application/json", body, instance.key or "") for line, body in requests)
    answers, state = received(instance, sent)
    assert answers.count(b"HTTP/1.1 200") == 2 and state == "open"
    assert answers.index(b'"status": "Healthy"') < answers.index(b'"label"')


@pytest.mark.parametrize(("version", "more"), [("1.1", b"Connection: close\r\n"), ("1.0", b"")])
def test_a_connection_stays_open_after_an_answer(version: str, more: bytes, instance: Instance) -> None:
    request = raw("POST /predictions/NAME", "text/plain", b"well", instance.key or "", more=more)
    answer, state = received(instance, request.replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
    assert answer.startswith(b"HTTP/1.1 200") and b"connection: keep-alive" in answer and state == "open"


def test_a_client_that_half_closes_gets_no_answer(instance: Instance) -> None:
    request = raw("POST /predictions/NAME", "text/plain", b"well", instance.key or "")
    assert received(instance, request, half_closed=True) == (b"", "reset")


@pytest.mark.parametrize(
    ("line", "body", "status", "answered"),
    [
        ("PUT /predictions/NAME", b"well", 200, True),
        ("HEAD /predictions/NAME", b"well", 200, False),
        ("HEAD /predictions/NAME", b"", 400, False),
        ("HEAD /ping", b"", 200, False),
    ],
)
def test_other_methods(line: str, body: bytes, status: int, answered: bool, instance: Instance) -> None:
    answer, _ = received(instance, raw(line, "text/plain", body, instance.key or ""))
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status) and (b'"label"' in content) == answered, answer
    assert answered or content == b""


def part(headers: bytes, body: bytes = MARKER) -> bytes:
    return b"--b\r\n" + headers + b"\r\n\r\n" + body + b"\r\n--b--\r\n"


NAMED = b'Content-Disposition: form-data; name="text"'
UPLOAD = NAMED + b'; filename="' + MARKER + b'"'
# Every kind of malformed request, with the marker in place of a text, a name or a path: (line, content type, body).
BODIES: Dict[str, List[bytes]] = {
    FORM: [
        *(b"a=%zz" + MARKER, MARKER + b"%z=1", b"=" + MARKER, MARKER + b"=1&=2", b"a=" + MARKER + b"\rb"),
        *(MARKER + b"\n\tat " + MARKER + b"%zz", b"java.lang.Error: " + MARKER + b"%zz", b"text=%FF" + MARKER),
        *(MARKER + b"&b", MARKER + b"=1", b"\0=" + MARKER),
    ],
    MULTIPART: [
        *(part(b"Content-Disposition: form-data"), part(b""), part(MARKER), MARKER, b""),
        *(part(b'Content-Disposition: form-data; name=""'), part(NAMED)[:-6], part(NAMED, MARKER + b"\xff")),
        part(NAMED + b"\r\nContent-Type: text/plain; charset=" + MARKER),
        part(NAMED + b"\r\nContent-Type: multipart/mixed"),
        part(UPLOAD + b"\r\nContent-Transfer-Encoding: " + MARKER),
        part(UPLOAD + b"\r\nContent-Type: application/json"),
        part(UPLOAD + b"\r\nContent-Length: " + MARKER),
        part(UPLOAD + b"\r\nContent-Length: 99999999999"),
    ],
    "multipart/form-data": [MARKER],
    "application/json": [
        *(b'{"text": ' + MARKER + b"}", b'"' + MARKER + b'\xff"', b'{"' + MARKER + b'": 1}', b"[" * 5000 + MARKER),
    ],
    "text/plain": [MARKER + b"\xff", MARKER + b"\0"],
    "text/plain; charset=" + MARKER.decode(): [MARKER],
    "text/csv": [MARKER + b"\n" + MARKER],
    "application/octet-stream": [b"\x1f\x8b" + MARKER, b'{"text": "' + MARKER],
    "application/jsonlines": [MARKER],
}
WIRE = [
    b"GET /predictions/%zz" + MARKER + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /invocations?" + MARKER + b"=%zz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /" + MARKER + b"?" + MARKER + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST * HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n" + MARKER,
    b"GET /ping HTTP/1.1\r\nX: " + MARKER * 1000 + b"\r\n\r\n",
    b"GET /" + MARKER * 1000 + b" HTTP/1.1\r\n\r\n",
    MARKER + b"\r\n\r\n",
    MARKER + b" " + MARKER + b" " + MARKER + b"\r\n\r\n",
    b"GET /ping HTTP/1.1\r\n" + MARKER + b"\r\n\r\n",
    b"POST /predictions/NAME HTTP/1.1\r\nContent-Length: " + MARKER + b"\r\n\r\n",
    b"POST /predictions/NAME HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + MARKER + b"\r\n",
    b"POST /predictions/NAME HTTP/1.1\r\nExpect: " + MARKER + b"\r\nContent-Length: 3\r\n\r\nabc",
    b"POST /predictions/NAME HTTP/1.1\r\nContent-Length: 99000000\r\n\r\n" + MARKER,
    b"GET /ping HTTP/1.1\r\nAuthorization: Bearer " + MARKER + b"\r\n\r\n",
]


def test_no_text_stays_whatever_fails(instance: Instance) -> None:
    """A worker that is killed at work, clients that go, half bodies, wrong keys: in no file and no metric; nor a key."""
    folder, key = Path(instance.folder), instance.key or ""
    words = b" ".join([MARKER] * 2)
    long = raw("POST /predictions/NAME", "application/json", json.dumps([words.decode()] * 20).encode(), key)
    for request in (long[:-100], long[: len(long) // 2], raw("POST /predictions/NAME", "text/plain", words, "wrong")):
        with socket.create_connection(("127.0.0.1", instance.port), 5) as connection:
            connection.sendall(request)
            time.sleep(0.05)
    [worker] = [
        child for child in psutil.Process(instance.pid).children(True) if "model_service_worker" in str(child.cmdline())
    ]
    worker.suspend()  # so that all of them are at work
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        killed = [pool.submit(send, instance, long) for _ in range(8)]
        time.sleep(0.5)
        worker.kill()
        statuses = {answer.result()[0] for answer in killed}
    assert statuses - {200} and statuses <= {0, 200, 500, 503, 507}, statuses  # who waited is answered by the next
    deadline = time.monotonic() + 60
    while send(instance, raw("POST /predictions/NAME", "text/plain", b"well", key))[0] != 200:
        assert time.monotonic() < deadline
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if MARKER in path.read_bytes()] == []
    assert {path.name for path in files if key.encode() in path.read_bytes()} == {"key_file.json"}
    with urllib.request.urlopen(f"http://127.0.0.1:{instance.metrics_port}/metrics") as metrics:
        found = metrics.read()
    assert b"traceserve_requests_total" in found and MARKER not in found and key.encode() not in found


def test_no_text_of_a_malformed_request_stays(instance: Instance) -> None:
    """In none of the server's files: logs, temporary folder, the worker's and the JVM's output."""
    folder, key = Path(instance.folder), instance.key or ""
    with instance.log.open("rb") as log:
        before = len(log.read())
    requests = [
        raw("POST /predictions/NAME", kind, body, key, more=b"Content-Encoding: zip\r\n" if kind == "text/csv" else b"")
        for kind, bodies in BODIES.items()
        for body in bodies
    ]
    paths = [
        f"/predictions/{MARKER.decode()}",
        f"/predictions/NAME/{MARKER.decode()}",
        f"/v1/models/NAME:{MARKER.decode()}",
        "/invocations",
    ]
    requests += [raw(f"POST {path}", "text/plain", MARKER, key) for path in paths]
    for request in [*requests, *WIRE]:
        send(instance, request)
    properties = dict(line.split("=", 1) for line in (folder / "config.properties").read_text().splitlines())
    client = Client(int(properties["grpc_inference_port"]), key)
    for model, body in (("NAME", MARKER + b"\xff"), ("NAME", b'{"text": ' + MARKER), (MARKER.decode(), MARKER)):
        for call in (client.predictions, client.stream_predictions):
            with contextlib.suppress(grpc.RpcError):
                call(model, {"data": body, MARKER.decode(): body})
    with contextlib.suppress(grpc.RpcError):
        client.stream_predictions_2("NAME", {"data": MARKER}, MARKER.decode())
    client.close()
    time.sleep(1)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert instance.log in files and any(path.name == "start.log" for path in files)
    assert [path for path in files if MARKER in path.read_bytes()] == []
    written = instance.log.read_bytes()[before:].decode()
    assert written.count("TorchServe refused a request: ") > 10  # the event is logged
    assert "io.netty.handler.codec.http.multipart.HttpPostRequestDecoder$ErrorDataDecoderException in " in written
    assert "Failed json decoding" in written and "\tat " not in written and "Traceback" not in written
    assert len(written) < 300 * (len(requests) + len(WIRE))
    assert send(instance, raw("POST /predictions/NAME", "text/plain", b"well", key))[0] == 200
