"""The client of a running server: its words for errors of any server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any, Callable, Iterator, List, Tuple

import pytest
import trustme
from traceserve.errors import ServerError
from traceserve.measuring.load_generator import Endpoint
from traceserve.measuring.targets import TEXT, BenchTarget, Traffic, check_answer
from traceserve.serving import client, configuration
from traceserve.serving.client import Address
from traceserve.serving.metrics import metrics_of

DEEP = b'{"error": ' + b"[" * 200_000


@contextlib.contextmanager
def answering(status: int, content: bytes) -> Iterator[str]:
    """Yield the URL of a server that gives every request this answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


@contextlib.contextmanager
def secured(folder: Path, name: str) -> Iterator[Tuple[str, str]]:
    """Yield the URL of a server with a certificate for this name, which answers the key that it is sent, and its file."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"key": self.headers.get("Authorization")}).encode())

        def log_message(self, format: str, *args: Any) -> None: ...

    issued = trustme.CA().issue_cert(name)
    issued.private_key_and_cert_chain_pem.write_to_path(str(folder / "pair.pem"))
    issued.cert_chain_pems[0].write_to_path(str(folder / "certificate.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "pair.pem")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"https://127.0.0.1:{server.server_address[1]}", str(folder / "certificate.pem")
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"error": {"message": "too long", "field": "text"}}, "too long"),
        ({"error": {"code": 404}}, "{'code': 404}"),  # another server's
        ({"error": "no model"}, "no model"),
        ({"code": 400, "message": "no key"}, "no key"),  # the frontend's
        ({"detail": "x"}, "{'detail': 'x'}"),
        ("Bad gateway\n", "Bad gateway"),
        ("", "no reason given"),
        ([1], "[1]"),
    ],
)
def test_the_message_of_an_error(answer: Any, words: str) -> None:
    assert client.error_words(answer) == words


@pytest.mark.parametrize("content", [b'{"error": {"code": 400}}', DEEP, b"", b"\xff"])
def test_an_error_of_another_server_is_refused(content: bytes) -> None:
    with answering(400, content) as url, pytest.raises(client.RequestRefused) as refused:
        client.predict(Address(url), "x", {})
    assert refused.value.status == 400 and refused.value.words


def test_the_status_and_field_of_an_error() -> None:
    with answering(422, b'{"error": {"message": "too long", "field": "text"}}') as url:
        with pytest.raises(client.RequestRefused, match=re.escape("too long (at text)")) as refused:
            client.get_document(Address(url), "x")
        assert client.exchange(Address(url)) == (422, {"error": {"message": "too long", "field": "text"}})
    assert (refused.value.status, refused.value.words, refused.value.field) == (422, "too long", "text")


@pytest.mark.parametrize("status", [404, 503])
def test_a_missing_model_is_not_there_yet(status: int) -> None:
    with answering(status, b'{"message": "none"}') as url, pytest.raises(
        client.NotYet, match="no worker for x ready: none"
    ):
        client.predict(Address(url), "x", {})


CALLS = pytest.mark.parametrize(
    "call",
    [
        lambda url: client.predict(Address(url), "x", {}),
        lambda url: client.get_document(Address(url), "x"),
        lambda url: "".join(client.stream(Address(url), "x", {})),
        lambda url: client.exchange(Address(url), {}),
    ],
)


@CALLS
def test_nothing_answers(call: Callable[[str], Any]) -> None:
    """In the same words, whatever was asked."""
    url = f"http://127.0.0.1:{configuration.free_ports(1)[0]}"
    with pytest.raises(client.NotYet) as error:
        call(url)
    assert re.fullmatch(rf"{url} does not answer: \[Errno \d+\] Connection refused", error.value.message)


@pytest.mark.parametrize("content", [b"<html>", DEEP])
def test_an_answer_without_json(content: bytes) -> None:
    with answering(200, content) as url:
        with pytest.raises(ServerError, match="gave no JSON"):
            client.predict(Address(url), "x", {})
        with pytest.raises(ServerError, match="/x gave no JSON"):
            client.get_document(Address(url), "x")
        assert client.exchange(Address(url)) == (200, content.decode())


@pytest.mark.parametrize(
    ("name", "any_name", "reached"), [("127.0.0.1", False, True), ("x.org", True, True), ("x.org", False, False)]
)
def test_a_certificate_is_for_a_name(name: str, any_name: bool, reached: bool, tmp_path: Path) -> None:
    with secured(tmp_path, name) as (url, certificate):
        address = Address(url, "secret", certificate, any_name)
        if reached:
            assert client.exchange(address) == (200, {"key": "Bearer secret"})
        else:
            with pytest.raises(client.NotYet, match="certificate verify failed"):
                client.exchange(address)
        (tmp_path / "other").mkdir()
        with secured(tmp_path / "other", name) as (_, another), pytest.raises(client.NotYet, match="verify failed"):
            client.exchange(Address(url, "secret", another))


def test_no_proxy_stands_between(tmp_path: Path) -> None:
    """It would see keys and texts; one that a company's machines have does not even reach this one's servers."""
    with answering(200, b'{"label": "red"}') as url, secured(tmp_path, "x.org") as (safe, certificate):
        code = (
            "from traceserve.serving import client\n"
            f"print(client.predict(client.Address({url!r}), 'x', {{}}))\n"
            f"print(client.exchange(client.Address({safe!r}, None, {certificate!r})))\n"
        )
        dead = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
        own = {**os.environ, **dead, "no_proxy": "", "NO_PROXY": ""}
        result = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert result.stdout == "{'label': 'red'}\n(200, {'key': None})\n", result.stderr


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(status: int) -> None:
    """The request would arrive without its body, and its key at somebody else's server."""
    asked: List[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Location", "/other")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        whole, base = Address(f"{url}/predictions/x", "KEY"), Address(url, "KEY")
        try:
            for call in (
                lambda: client.exchange(whole),
                lambda: client.exchange(whole, {"text": "x"}),
                lambda: client.predict(base, "x", {}),
            ):
                with pytest.raises(ServerError) as error:
                    call()
                assert error.value.message == f"{url}/predictions/x redirects to {url}/other; give that URL"
        finally:
            server.shutdown()
    assert asked == 3 * ["/predictions/x"]


def test_a_character_in_two_pieces_of_a_stream_is_whole() -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in (b"gr\xc3", b"\xbc\xc3\x9fe"):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.flush()
                come.wait(5)
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, format: str, *args: Any) -> None: ...

    come, found = threading.Event(), []  # type: ignore[var-annotated]
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            for piece in client.stream(Address(f"http://127.0.0.1:{server.server_address[1]}"), "x", {}):
                found.append(piece)
                come.set()
        finally:
            server.shutdown()
    assert found == ["gr", "üße"]


@contextlib.contextmanager
def sending(content: bytes) -> Iterator[str]:
    """Yield the URL of a server that sends these bytes in place of an answer, and ends the connection."""

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
            self.wfile.write(content)

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


@pytest.mark.parametrize("content", [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nts_in", b"nonsense\r\n\r\n"])
def test_an_answer_that_breaks_off_is_no_answer(content: bytes) -> None:
    """Python's HTTPException is no OSError, which callers expect of a server that ends."""
    with sending(content) as url:
        with pytest.raises(OSError, match="no whole answer: "):
            list(metrics_of(url))
        asked = BenchTarget("a", Endpoint(url, {}), Traffic((b"text",), TEXT))
        with pytest.raises(ServerError, match="a cannot be reached: "):
            check_answer(asked)
