"""The client of a running server: its words for errors of any server."""

from __future__ import annotations

import contextlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Iterator

import pytest
from traceserve.errors import ServerError
from traceserve.serving import client, configuration
from traceserve.serving.client import Address

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
