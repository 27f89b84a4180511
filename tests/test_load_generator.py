"""The load generator, against real servers with known delays."""

from __future__ import annotations

import asyncio
import http.server
import re
import signal
import socket
import ssl
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Awaitable, Callable, Dict, Iterator, List, Optional

import numpy as np
import pytest
import trustme
from traceserve.errors import ServerError
from traceserve.measuring import load_generator, transfers
from traceserve.measuring.answers import Consistency, same_answer
from traceserve.measuring.load_generator import WRONG, Endpoint, Result, send_load

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
Answer = Callable[[int, bytes], Awaitable[Optional[bytes]]]  # a request's number and body; None: drop the connection


class Server:
    """An HTTP server in its own thread; it records requests."""

    def __init__(self, answer: Answer, tls: Optional[ssl.SSLContext] = None) -> None:
        self._answer = answer
        self._tls = tls
        self.bodies: List[bytes] = []
        self.heads: List[str] = []
        self.connections = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(5)

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/predict?x=1"

    def _run(self) -> None:
        async def serve() -> None:
            self._stopped = asyncio.Event()
            # Like TorchServe's and uvicorn's: beyond asyncio's backlog of 100, new connections would wait for a second
            # SYN.
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024, ssl=self._tls)
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()
            await self._stopped.wait()
            await asyncio.sleep(0.02)  # asyncio loses a connection accepted while closing
            server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            if tasks:  # they end with their clients, except sleeping ones
                _, asleep = await asyncio.wait(tasks, timeout=0.1)
                for task in asleep:
                    task.cancel()
                await asyncio.sleep(0.02)

        self._loop.run_until_complete(serve())
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = await reader.readexactly(int(fields["content-length"]))
                self.heads.append(head)
                self.bodies.append(body)
                answer = await self._answer(len(self.bodies), body)
                if answer is None:
                    break
                writer.write(answer)
                if b"connection: close" in answer.lower():
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()


@contextmanager
def serving(answer: Answer, tls: Optional[ssl.SSLContext] = None) -> Iterator[Server]:
    server = Server(answer, tls)
    try:
        yield server
    finally:
        server.stop()


async def at_once(number: int, body: bytes) -> bytes:
    return OK


def after(seconds: float) -> Answer:
    async def answer(number: int, body: bytes) -> bytes:
        await asyncio.sleep(seconds)
        return OK

    return answer


def always(answer: Optional[bytes]) -> Answer:
    async def give(number: int, body: bytes) -> Optional[bytes]:
        return answer

    return give


def short(server: Server, **options: Any) -> Result:
    """A run of half a second."""
    return send_load(Endpoint(server.url), [b"{}"], **{"connections": 2, "seconds": 0.5, "warm_up": 0.0, **options})


def test_a_closed_loop_measures_the_delay() -> None:
    with serving(after(0.05)) as server:
        result = short(server, connections=4, seconds=1.0)
        assert server.connections == 4 and result.connections == 4 and result.rate is None
    assert 0.05 <= result.percentile(0) <= result.percentile(50) < 0.08
    assert result.throughput == pytest.approx(4 / float(result.latencies.mean()), rel=0.1)
    assert not result.errors and result.failed == 0


def test_an_open_loop_sends_at_its_rate_whatever_is_answered() -> None:
    """Twenty are in flight at a time; two connections in a closed loop would send ten in a second."""
    with serving(after(0.2)) as server:
        result = short(server, rate=100.0, seconds=1.5)
    assert result.requests == pytest.approx(150, abs=4 * 150**0.5)
    assert 10 < result.connections < 60
    assert result.percentile(50) == pytest.approx(0.2, abs=0.05)


def stalling(at: int, seconds: float) -> Answer:
    """Stall everything once."""

    async def answer(number: int, body: bytes) -> bytes:
        if number == at:
            time.sleep(seconds)
        return OK

    return answer


def test_no_coordinated_omission() -> None:
    """A server stalls for one second of three: all requests due in it waited for its end.
    A closed loop, which waits with the server, sees one slow request."""
    with serving(stalling(at=200, seconds=1.0)) as server:
        result = short(server, rate=200.0, seconds=3.0)
    slow = np.sort(result.latencies[result.latencies > 0.1])
    assert len(slow) == pytest.approx(180, abs=4 * 180**0.5)
    # Due at any time in that second, they waited for the rest of it.
    assert np.percentile(slow, [10, 50, 90]) == pytest.approx([0.19, 0.55, 0.91], abs=0.1)
    assert result.percentile(99) > 0.9 > 0.1 > result.percentile(50)
    assert result.throughput == pytest.approx(200, rel=0.2)
    with serving(stalling(at=20, seconds=1.0)) as server:
        closed = short(server, connections=1, seconds=1.5)
    assert (closed.latencies > 0.1).sum() == 1 and closed.percentile(99) < 0.1


def test_waiting_for_a_connection_is_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection carries ten a second; forty a second are due for a second, and the last waits for all before
    it."""
    monkeypatch.setattr("traceserve.measuring.load_generator.MOST_CONNECTIONS", 1)
    with serving(after(0.1)) as server:
        result = short(server, connections=1, rate=40.0, seconds=1.0)
        assert server.connections == 1
    expected = 0.1 * result.requests - 1.0
    assert result.percentile(100) == pytest.approx(expected, rel=0.25)
    assert result.throughput < 11 and result.seconds > 2


def test_requests_are_sent_when_they_are_due() -> None:
    """Not rounded to the next millisecond."""
    with serving(at_once) as server:
        result = short(server, rate=200.0, seconds=1.0)
    assert result.percentile(20) < 0.0008
    with serving(after(0.2)) as server:  # four are in flight, and no answer arrives for some fifty milliseconds
        result = short(server, rate=20.0, seconds=1.5)
    assert 0.2 <= result.percentile(50) < 0.21


def test_the_slow_ones_at_the_end_count() -> None:
    async def answer(number: int, body: bytes) -> bytes:
        await asyncio.sleep(0.7 if number == 3 else 0.01)
        return OK

    with serving(answer) as server:
        assert short(server, seconds=0.3).percentile(100) >= 0.7


def test_the_warm_up_is_not_counted() -> None:
    async def answer(number: int, body: bytes) -> Optional[bytes]:
        await asyncio.sleep(0.3 if number <= 2 else 0.01)
        return None if number == 5 else OK

    with serving(answer) as server:
        result = short(server, warm_up=0.6)
    assert result.percentile(100) < 0.2 and not result.errors


def test_bodies_are_shuffled_by_the_seed_and_repeat() -> None:
    bodies = [b'{"text": "%d"}' % i for i in range(20)]
    orders = []
    for seed in (0, 0, 1):
        with serving(at_once) as server:
            send_load(Endpoint(server.url), bodies, connections=1, seconds=0.1, warm_up=0.0, seed=seed)
        assert server.bodies[:20] == server.bodies[20:40] and sorted(server.bodies[:20]) == sorted(bodies)
        orders.append(server.bodies[:20])
    assert orders[0] == orders[1] != orders[2] and orders[0] != bodies


def test_what_goes_over_the_wire() -> None:
    with serving(at_once) as server:
        target = Endpoint(server.url, {"Authorization": "Bearer abc", "content-type": "application/x-own"})
        send_load(target, ["ä".encode()], "text/plain", 1, seconds=0.05, warm_up=0.0)
        assert server.bodies[0] == "ä".encode()
        assert server.heads[0].split("\r\n") == [
            "POST /predict?x=1 HTTP/1.1",
            f"Host: 127.0.0.1:{server.port}",
            "Accept: */*",
            "Authorization: Bearer abc",
            "content-type: application/x-own",
            "Content-Length: 2",
            "",
            "",
        ]


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "answer, kept",
    [
        (CHUNKED, True),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), False),
        (CHUNKED.replace(b"\r\n", b"\r\nConnection: close\r\n", 1), False),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{}", False),  # its end is the connection's
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nX-Old: Connection: close\r\n\r\n{}", False),
    ],
)
def test_every_kind_of_answer(answer: bytes, kept: bool) -> None:
    with serving(always(answer)) as server:
        result = short(server, seconds=0.2)
        assert (server.connections == 2) is kept
    assert result.requests > 10 and not result.errors


def test_answers_in_pieces() -> None:
    """Each part of a large answer arrives separately, the last with the end."""
    large = b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 3_000_000
    with serving(always(large)) as server:
        result = short(server, seconds=0.3)
        assert server.connections == 2
    assert result.requests >= 2 and not result.errors


def test_an_old_server_of_the_standard_library() -> None:
    """HTTP/1.0 without a length."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        result = send_load(Endpoint(f"http://localhost:{server.server_address[1]}"), [b"{}"], seconds=0.2, warm_up=0.0)
        server.shutdown()
    assert result.requests > 10 and not result.errors


def test_errors_are_counted_by_reason() -> None:
    failures: Dict[int, Optional[bytes]] = {
        0: OK.replace(b"200 OK", b"413 Content Too Large"),
        1: OK.replace(b"200 OK", b"503 Service Unavailable"),
        2: None,
        3: b"no HTTP at all\r\n\r\n",
        4: b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\n{}",
    }

    async def answer(number: int, body: bytes) -> Optional[bytes]:
        await asyncio.sleep(0.002)
        return failures.get(number % 10, OK)

    for rate in (None, 100.0):
        with serving(answer) as server:
            result = short(server, rate=rate, seconds=1.0)
        assert set(result.errors) == {
            "HTTP 413",
            "HTTP 503",
            "connection closed without an answer",
            "an answer that is not HTTP",
        }
        assert result.errors["HTTP 413"] == pytest.approx(result.requests / 5, rel=0.3)
        assert result.errors["connection closed without an answer"] == pytest.approx(2 * result.requests / 5, rel=0.3)
        assert result.failed == sum(result.errors.values()) == pytest.approx(result.requests, rel=0.3)


@pytest.mark.parametrize("rate", [None, 50.0])
def test_a_server_that_goes_away(rate: Optional[float]) -> None:
    server = Server(at_once)
    threading.Timer(0.3, server.stop).start()
    result = short(server, rate=rate, seconds=1.0)
    assert result.requests and result.errors.get("connection refused", 0) > 5
    assert result.failed < 300  # it is not flooded


def test_a_server_that_never_answers() -> None:
    with serving(after(30)) as server:
        started = time.monotonic()
        result = short(server, timeout=0.4)
    assert time.monotonic() - started < 2
    assert result.requests == 0 and result.errors["no answer in 0.4 s"] >= 2
    assert np.isnan(result.percentile(50))


def test_an_idle_connection_that_the_server_closes_is_no_error() -> None:
    """As with a server's keep-alive timeout, longer than the second after which libcurl checks the connection."""

    class Impatient(Server):
        async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            patience: List[asyncio.TimerHandle] = []

            async def answer(number: int, body: bytes) -> bytes:
                for earlier in patience:
                    earlier.cancel()
                patience.append(asyncio.get_running_loop().call_later(1.1, writer.close))
                return OK

            self._answer = answer
            await super()._serve(reader, writer)

    server = Impatient(at_once)
    try:
        result = short(server, rate=1.0, seconds=3.6)
        assert server.connections == 3  # with this seed there are two gaps of more than a second
    finally:
        server.stop()
    assert result.requests == 4 and not result.errors


def test_tls_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an authority trusted by Python, here through SSL_CERT_FILE; a wrong name or an unknown authority is
    refused."""
    authority, other = trustme.CA(), trustme.CA()
    for number, (one, name) in enumerate([(authority, "127.0.0.1"), (authority, "example.org"), (other, "127.0.0.1")]):
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        one.issue_cert(name).configure_cert(tls)
        authority.cert_pem.write_to_path(tmp_path / "authority.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        with serving(at_once, tls) as server:
            target = Endpoint(server.url, {"Authorization": "Bearer abc"})
            if number:
                with pytest.raises(ServerError, match=f"{re.escape(server.url)} cannot be reached: TLS failed"):
                    send_load(target, [b"{}"], connections=2, seconds=0.3, warm_up=0.0)
                continue
            result = send_load(target, [b"{}"], connections=2, seconds=0.3, warm_up=0.0)
            assert server.connections == 2 and "Authorization: Bearer abc\r\n" in server.heads[0]
        assert result.requests > 10 and not result.errors


def test_nothing_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/x"
        with pytest.raises(ServerError, match="cannot be reached: connection refused"):
            send_load(Endpoint(url), [b"{}"])
    with pytest.raises(ServerError, match="nothing to send"):
        send_load(Endpoint(url), [])


def test_progress() -> None:
    heard: List[float] = []
    with serving(at_once) as server:
        short(server, warm_up=0.2, seconds=0.2, progress=heard.append)
    assert len(heard) > 4 and heard == sorted(heard) and heard[0] < 0.5 and heard[-1] == 1.0


class Stopped(BaseException):
    """The command's exception for a signal."""


@pytest.mark.parametrize("rate", [None, 100.0])
def test_another_thread_ends_it(rate: Optional[float]) -> None:
    """What is due until then is counted, and what was under way then is waited for."""
    ended = threading.Event()
    timer = threading.Timer(0.5, ended.set)
    with serving(after(0.2)) as server:
        timer.start()
        result = short(server, seconds=60.0, rate=rate, ended=ended)
    assert result.seconds == pytest.approx(0.5 if rate is None else 0.7, abs=0.2)
    assert result.requests == pytest.approx(6 if rate is None else 50, abs=2 if rate is None else 25)
    assert result.requests == len(result.moments) and not result.errors


@pytest.mark.skipif(sys.platform == "win32", reason="no timer of signals")
@pytest.mark.parametrize("rate", [None, 2000.0])
def test_a_signal_ends_it(rate: Optional[float]) -> None:
    """Wherever it strikes, even in asyncio's callbacks, which swallow exceptions."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped

    previous = signal.signal(signal.SIGALRM, stop)
    timers: List[threading.Timer] = []
    here = threading.get_ident()
    try:
        with serving(at_once) as server:
            for delay in np.linspace(0.02, 0.05, 8):
                timers.append(threading.Timer(0.1 + delay, signal.pthread_kill, (here, signal.SIGALRM)))
                started = time.monotonic()
                timers[-1].start()
                with pytest.raises(Stopped):
                    short(server, rate=rate, connections=16, seconds=5.0)
                assert time.monotonic() - started < 2
    finally:
        for timer in timers:  # without a handler, the signal would end this process
            timer.cancel()
            timer.join()
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # drops one that is still on its way
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("strike", range(8))
@pytest.mark.parametrize("method", [load_generator._Load._take, load_generator._Load._start])
def test_a_signal_between_two_lines_ends_it(method: Callable[..., Any], strike: int) -> None:
    """What libcurl works on and what we have written down of it may differ then."""
    lines = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal lines
        if frame.f_code is not method.__code__:
            return None
        lines += event == "line"
        if lines > strike:
            raise Stopped
        return trace

    previous = sys.gettrace()
    try:
        with serving(at_once) as server:
            sys.settrace(trace)
            with pytest.raises(Stopped):
                short(server)
    finally:
        sys.settrace(previous)


def test_libcurl_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycurl", None)
    with pytest.raises(ServerError, match=r"pip install 'traceserve\[bench\]'"):
        transfers.require_libcurl()


def every_second(failure: Optional[bytes]) -> Answer:
    """Fail requests with odd numbers; with one connection, the next one is the first one's retry."""

    async def answer(number: int, body: bytes) -> Optional[bytes]:
        return failure if number % 2 else OK

    return answer


@pytest.mark.parametrize("failure", [b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", None])
def test_a_failed_request_is_sent_again_after_a_second(failure: Optional[bytes]) -> None:
    with serving(every_second(failure)) as server:
        result = short(server, connections=1, seconds=1.5, retries=1)
        assert not result.errors and result.retried == result.requests == 2 == len(result.failures)
        assert server.bodies == [b"{}"] * len(server.bodies) and min(result.latencies) >= 1.0
        assert all(failed + 1.0 <= moment for failed, moment in zip(result.failures, result.moments))
        without = short(server, connections=1)
        assert without.failed == len(without.failures) > 10 and not without.retried


def test_what_fails_again_is_an_error_and_what_cannot_succeed_is_not_sent_again() -> None:
    with serving(always(None)) as server:
        result = short(server, connections=1, retries=1)
        assert (
            result.errors == {"connection closed without an answer": 1} and len(server.bodies) == 3
        )  # 1 after the end
        assert len(result.failures) == 2 and not result.retried
    with serving(always(b"HTTP/1.1 400 No\r\nContent-Length: 0\r\n\r\n")) as server:
        result = short(server, connections=1, retries=1, seconds=0.2)
        assert result.errors == {"HTTP 400": result.failed} and result.failed > 10 and not result.failures


def test_an_answer_that_differs_from_the_first_one_is_an_error() -> None:
    async def answer(number: int, body: bytes) -> bytes:
        content = b'{"score": 0.5%03d}' % (0 if number % 4 else 100)
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)

    with serving(answer) as server:
        result = short(server, connections=1, seconds=0.3, check=Consistency())
    assert result.failed == result.errors[WRONG] == pytest.approx((result.requests + result.failed) / 4, abs=1)


def test_equal_answers_differ_by_rounding_only() -> None:
    one = b'{"label": "a", "score": 0.25, "n": [1, 2]}'
    assert same_answer(one, b'{"score": 0.25001, "label": "a", "n": [1, 2]}')
    for other in (
        b'{"label": "b", "score": 0.25, "n": [1, 2]}',
        b'{"label": "a", "score": 0.26, "n": [1, 2]}',
        b'{"label": "a", "score": 0.25, "n": [1]}',
        b'{"label": "a", "score": 0.25, "n": [1, 3]}',
        b'{"label": "a", "score": 0.25}',
        b"no JSON",
    ):
        assert not same_answer(one, other)
