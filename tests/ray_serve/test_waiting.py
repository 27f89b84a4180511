"""What a request hears that waits for a replica: a real HAProxy before a stand-in for Ray's own proxy."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Dict, Iterator, Tuple

import pytest
from traceserve.serving import configuration
from traceserve.serving.ray_cluster import _UNAVAILABLE, _WAITING, _real_haproxy, _response

from ray_serve.cluster import ask, wait_until

SECONDS = 1  # after which it is refused
DEFAULTS = """defaults
    mode http
    timeout connect 5s
    timeout client 60s
    errorfile 504 {unavailable}
"""
REPLIES: Dict[str, Tuple[int, str, bytes]] = {
    "/removed": (503, "text/plain; charset=utf-8", b"unavailable because it failed to deploy."),
    "/broken": (500, "text/plain; charset=utf-8", b"Internal Server Error"),
    "/full": (503, "application/json", b'{"error": {"type": "Overloaded"}}'),
    "/answered": (200, "text/plain; charset=utf-8", b"a stream"),
}


class Proxy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/waits":
            time.sleep(SECONDS + 2)
            return
        status, kind, body = REPLIES[self.path]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # HAProxy needs no body that it replaces
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the tests' output."""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Where HAProxy listens."""
    folder = tmp_path_factory.mktemp("waiting")
    unavailable, file = folder / "unavailable.http", folder / "haproxy.cfg"
    unavailable.write_bytes(_response(503, "Service Unavailable", _UNAVAILABLE))
    [found] = configuration.free_ports(1)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    names = {"waiting": found, "fallback": proxy.server_port, "seconds": SECONDS, "unavailable": unavailable}
    file.write_text(DEFAULTS.format(**names) + _WAITING.format(**names))
    with subprocess.Popen([_real_haproxy(), "-db", "-f", str(file)]) as process:
        try:
            wait_until(lambda: listens(found), 10)
            yield found
        finally:
            process.kill()
            proxy.shutdown()
            proxy.server_close()


def listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        return ask(port, "/answered").status == 200
    return False


@pytest.mark.parametrize("path", ["/removed", "/broken", "/waits"])
def test_it_is_told_to_try_again(port: int, path: str) -> None:
    """Whatever Ray's proxy says of it, or if that says nothing."""
    reply = ask(port, path)
    assert (reply.status, reply.headers["retry-after"], reply.json) == (503, "1", _UNAVAILABLE)


@pytest.mark.parametrize("path", ["/full", "/answered"])
def test_a_replicas_own_answer_is_left(port: int, path: str) -> None:
    reply = ask(port, path)
    assert (reply.status, reply.headers["content-type"], reply.body) == REPLIES[path]
