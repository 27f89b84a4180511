"""The wire of the load generator: requests as bytes, a keep-alive connection, timers that are exact."""

from __future__ import annotations

import asyncio
import random
import select
import selectors
import ssl
import time
import urllib.parse
from typing import List, Mapping, Optional, Protocol, Sequence, Tuple

from traceserve.errors import ServerError


class Owner(Protocol):
    """What a connection tells its owner; `due` is when the request was due."""

    def connected(self, connection: Connection) -> None: ...

    def disconnected(self, connection: Connection) -> None: ...

    def released(self, connection: Connection) -> None:
        """It can take a request."""

    def answered(self, due: float, status: int) -> None: ...

    def failed(self, due: float, reason: str) -> None: ...


def require() -> None:
    """Raise ServerError unless the parser of answers is installed."""
    try:
        import httptools  # noqa: F401
    except ImportError:
        raise ServerError(
            "sending load needs the package httptools; install it with: pip install 'traceserve[bench]'"
        ) from None


def requests(url: str, chosen: Mapping[str, str], bodies: Sequence[bytes], content_type: str, seed: int) -> List[bytes]:
    """Each request as it goes over the wire, in the order of sending."""
    if not bodies:
        raise ServerError("there is nothing to send")
    parts = urllib.parse.urlsplit(url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    given = {"Host": parts.netloc.rpartition("@")[2], "Accept": "*/*", "Content-Type": content_type}
    names = {name.lower() for name in chosen}
    headers = {**{name: value for name, value in given.items() if name.lower() not in names}, **chosen}
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    made = [b"%bContent-Length: %d\r\n\r\n%b" % (head.encode("latin-1"), len(body), body) for body in bodies]
    random.Random(seed).shuffle(made)
    return made


def fine_selector() -> selectors.BaseSelector:
    """Python rounds epoll's timeout up to whole milliseconds, as late as requests would be sent; select's is exact."""
    if not hasattr(selectors, "EpollSelector"):
        return selectors.DefaultSelector()

    class FineSelector(selectors.EpollSelector):
        def select(self, timeout: Optional[float] = None) -> List[Tuple[selectors.SelectorKey, int]]:
            if timeout is not None and timeout > 0:
                select.select([self.fileno()], [], [], timeout)
                timeout = 0
            return super().select(timeout)

    return FineSelector()


class Connection(asyncio.Protocol):
    """A keep-alive connection with one request on its way, or none."""

    def __init__(self, owner: Owner) -> None:
        import httptools

        self._owner = owner
        self._parser = httptools.HttpResponseParser(self)
        self._error = httptools.HttpParserError
        self._complete = self._keep = False
        self._partial = b""  # the beginning of an answer that came in pieces
        self.transport: Optional[asyncio.Transport] = None
        self.due: Optional[float] = None  # of the request on its way
        self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._owner.connected(self)

    def send(self, due: float, request: bytes) -> None:
        assert self.transport is not None
        self.due = due
        self.sent = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except self._error as error:
            if error.__context__ is not None:  # raised in on_message_complete: a signal's interruption
                raise error.__context__ from None
            self.fail("an answer that is not HTTP")
            return
        if not self._complete:
            if b"\r\n\r\n" not in self._partial:
                self._partial += data
            return
        self._complete = False
        self._partial = b""
        if self._parser.get_status_code() >= 200:  # below: 100 Continue, the answer is still to come
            self._end(self._keep)

    def on_message_complete(self) -> None:
        """The parser's; inside it the parser may not be left, and after it the answer's connection is forgotten."""
        self._complete = True
        self._keep = self._parser.should_keep_alive()

    def _end(self, keep: bool) -> None:
        due, self.due = self.due, None
        if due is None:  # nobody asked
            self.abort()
            return
        self._owner.answered(due, self._parser.get_status_code())
        if keep:
            self._owner.released(self)
        else:
            self.abort()

    def connection_lost(self, error: Optional[Exception]) -> None:
        if self.due is not None and error is None and self._ends_by_closing():
            self._end(keep=False)
        elif self.due is not None:
            self.fail(reason(error) if error else "connection closed without an answer")
        self._owner.disconnected(self)

    def _ends_by_closing(self) -> bool:
        """Whether the answer is of the old kind whose end is the connection's."""
        head, end, _ = self._partial.partition(b"\r\n\r\n")
        return bool(end) and b"\ncontent-length:" not in head.lower() and b"\ntransfer-encoding:" not in head.lower()

    def fail(self, why: str) -> None:
        """Count the request as failed and leave the connection, whose state is unknown."""
        due, self.due = self.due, None
        if due is not None:
            self._owner.failed(due, why)
        self.abort()

    def abort(self) -> None:
        assert self.transport is not None
        self.transport.abort()


def reason(error: Exception) -> str:
    """A few words, the same for the same cause: errors are counted by them."""
    for kind, words in (
        (ConnectionRefusedError, "connection refused"),
        (ConnectionResetError, "connection reset"),
        (BrokenPipeError, "connection reset"),
        (ssl.SSLError, "TLS failed"),
    ):
        if isinstance(error, kind):
            return words
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
