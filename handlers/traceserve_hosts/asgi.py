"""The service as an ASGI application: what a Python web server needs to answer as TorchServe does, and at the root paths too.

    /predictions/NAME[/VERSION[/PATH]]   as TorchServe has it; PATH is that of a protocol
    /explanations/NAME[/VERSION]         the same requests, whose answers are explained
    /ping, /health                       whether the model answers: 503 with the reason where it does not
    /live, /v2/health/live               whether the process works, however long its queue is: 503 where it should be replaced
    /PATH                                any path of a protocol: /v1/embeddings, /v2/models/NAME/infer, /rerank, /docs, ...

What TorchServe's frontend does before a request reaches the worker is done here: paths, forms, keys, limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import io
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Awaitable,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)
from urllib.parse import parse_qsl

from traceserve_hosts import KEY_FILE_VARIABLE, earlier_runtimes
from traceserve_hosts.batcher import Asked, Batcher, Piece
from traceserve_hosts.keys import given_key

if TYPE_CHECKING:
    from traceserve_runtime.service import Call, Reply, Service

Scope = Mapping[str, Any]
Message = Dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

LIVENESS = ("/live", "/v2/health/live")
# KServe's paths; the ranking below v2 is Cohere's. As the archive's own protocols have it, which has not read such a request.
_OF_KSERVE = re.compile("/*(predictions/[^/]+/[^/]+/)?(v2(?!/+rerank/*$)(/|$)|(v1/)?models/.*:[^/]*/*$)")
_METHODS = ("GET", "POST", "HEAD")
_SECONDS_OF_LIVENESS = 1.5  # that a canary has; later the queue's progress decides
_SECONDS_OF_HEALTH = 1.0  # that a canary's answer holds
_LONGEST_STANDSTILL = 60.0  # seconds
_LEAST_PACE = 1 << 18  # of a body or an answer, in bytes per second: a slower one keeps others' room
_PART = 1 << 18  # bytes of an answer that are sent at once: a server waits for its client between two of them
# A form is decoded in the event loop: for a tenth of a second at most.
_LARGEST_FORM, _MOST_FIELDS = 1 << 20, 1000


class Refused(Exception):
    """A host's own refusal, before anything reaches a service."""

    def __init__(
        self, status: int, kind: str, message: str, headers: Mapping[str, str] = {}, field: Optional[str] = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self._error = {"type": kind, "message": message, "field": field}

    def document(self, path: str) -> Dict[str, object]:
        """The error as the clients of a path read it: those of KServe's protocols fail on one that is an object."""
        return {"error": str(self) if _OF_KSERVE.match(path) else self._error}


class Left(Exception):
    """The client has gone."""


@dataclass(frozen=True)
class Limits:
    """What the application takes, and from whom."""

    # Or its file; demanded of all requests but those about health, as `Authorization: Bearer KEY`.
    key: Union[str, Path, None] = None
    largest_body: int = 64 << 20  # bytes
    queue: int = 1000  # calls that may wait; more are answered with 503
    timeout: float = 120.0  # seconds until an answer, or its first piece
    all_bodies: int = 64 << 20  # bytes of those that are read, or wait for their answers; at least room for one
    # In which a body has to come after its first bytes, beside what the least pace takes for those that have come; and in
    # which an answer, or a piece of a stream, has to be read.
    body_seconds: float = 30.0

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """Raise Refused for a request without the key, or of another method."""
        if self.key is not None and not _is_given(_demanded(self.key), headers.get("authorization", "")):
            message = "a key is needed: send the header Authorization: Bearer KEY"
            raise Refused(401, "Unauthorized", message, {"www-authenticate": "Bearer"})
        if method not in _METHODS:
            raise Refused(405, "MethodNotAllowed", "send GET or POST", {"allow": ", ".join(_METHODS)})

    async def body(self, headers: Mapping[str, str], receive: Receive, take: Callable[[int], None]) -> bytes:
        """The whole body, for which `take` makes room; raises Refused for a larger or a slow one, Left where the client goes
        before its end."""
        from traceserve_runtime.protocols.bodies import length_in

        most = self.largest_body
        too_large = Refused(413, "InputTooLong", f"the body is larger than {most:,} bytes, which is the limit here")
        if (length_in(headers.get("content-length", "")) or 0) > most:
            raise too_large
        parts: List[bytes] = []
        size, began = 0, 0.0
        while True:
            if parts:
                message = await _within(began + self.body_seconds + size / _LEAST_PACE, receive)
            else:  # it holds no room yet, and most bodies have no other part
                message, began = await receive(), time.monotonic()
            if message["type"] == "http.disconnect":
                raise Left
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise too_large
            take(len(parts[-1]))
            if not message.get("more_body", False):
                return b"".join(parts)


async def _within(deadline: float, receive: Receive) -> Message:
    """The next message of a body; raises Refused where it comes too late."""
    try:
        return await asyncio.wait_for(receive(), deadline - time.monotonic())
    except asyncio.TimeoutError:
        message = "the body came too slowly; send it again, or a smaller one"
        raise Refused(408, "TimedOut", message, {"connection": "close"}) from None


class Bodies:
    """The room for the bodies of all requests together: one client's few large ones must not end the process."""

    def __init__(self, limits: Limits) -> None:
        self._room = max(limits.all_bodies, limits.largest_body)

    @contextlib.contextmanager
    def of_a_request(self) -> Iterator[Callable[[int], None]]:
        """Gives what makes room for so many bytes more, until the request ends; it raises Refused where there is none."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if count > self._room:
                raise Refused(503, "Overloaded", "too many large requests wait; try again", {"retry-after": "1"})
            taken, self._room = taken + count, self._room - count

        try:
            yield take
        finally:
            self._room += taken


def _demanded(key: Union[str, Path]) -> str:
    """The key; from a file anew for each request, which takes some microseconds. Raises Refused where there is none."""
    if isinstance(key, str):
        return key
    with contextlib.suppress(OSError, ValueError):
        found = key.read_text(encoding="utf-8").strip()
        if found:
            return found
    raise Refused(503, "Unavailable", "the key of this server cannot be read")


def _is_given(key: str, header: str) -> bool:
    """Whether a header holds the key, in UTF-8 or, as Python's own clients send it, in Latin-1; in constant time.

    `header` was decoded as Latin-1. A key of the environment that is not UTF-8 is there as its bytes.
    """
    demanded = f"Bearer {key}".encode("utf-8", "surrogateescape")
    in_utf_8 = hmac.compare_digest(header.encode("latin-1", "replace"), demanded)
    return in_utf_8 | hmac.compare_digest(header.encode("utf-8"), demanded)


class _Located(NamedTuple):
    """What is asked at a path of the application."""

    path: str  # behind the model's name and version
    explain: bool = False


class _Health(NamedTuple):
    """What a canary found."""

    when: float = -float("inf")
    problem: Optional[str] = None
    late: bool = False  # it got no answer, which may be the queue's fault


class Application:
    """One archive as an ASGI application."""

    def __init__(self, service: Service, batcher: Batcher, limits: Limits = Limits()) -> None:
        self._service = service
        self._batcher = batcher
        self._limits = limits
        self._bodies = Bodies(limits)
        self._health = _Health()
        self._canary: Optional[asyncio.Future[None]] = None  # on its way, for all who ask meanwhile

    @property
    def largest_body(self) -> int:
        """In bytes; larger ones are refused."""
        return self._limits.largest_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; websockets are closed."""
        await guarded(self._answer, scope, receive, send)

    async def unhealthy(self, holds: float = _SECONDS_OF_HEALTH) -> Optional[str]:
        """Why the model does not answer its own sample; None where it does. An answer holds for so many seconds, a failure
        for one at most."""
        holds = holds if self._health.problem is None else min(holds, _SECONDS_OF_HEALTH)
        if time.monotonic() - self._health.when >= holds:
            if self._canary is None or self._canary.done():
                self._canary = asyncio.ensure_future(self._ask_health())
            await asyncio.shield(self._canary)  # who asks may give up
        return self._health.problem

    async def broken(self, seconds: float, holds: float = _SECONDS_OF_HEALTH) -> Optional[str]:
        """Why this process should be replaced; None where it should not.

        As `unhealthy`, within so many seconds. But a canary waits behind the queue: where it is late, a process is broken only if
        nothing was computed for a minute.
        """
        with contextlib.suppress(asyncio.TimeoutError):
            problem = await asyncio.wait_for(self.unhealthy(holds), seconds)
            if not self._health.late:
                return problem
        standstill = self._batcher.standstill
        return f"nothing was computed for {standstill:.0f} s" if standstill > _LONGEST_STANDSTILL else None

    async def _ask_health(self) -> None:
        self._health = await self._try_canary()

    async def _try_canary(self) -> _Health:
        from traceserve_runtime.protocols.bodies import Headers
        from traceserve_runtime.service import Call

        body = _encoded(earlier_runtimes.canary_body(self._service.served))
        asked = self._batcher.ask(Call({"body": body}, Headers("application/json", len(body))))
        try:
            reply = await asyncio.wait_for(asked.next(), self._limits.timeout)
        except asyncio.TimeoutError:
            self._batcher.leave(asked)
            problem = f"its sample was not answered within {self._limits.timeout:g} s"
            return _Health(time.monotonic(), problem, late=True)
        status = getattr(reply, "status", 200)
        return _Health(time.monotonic(), None if status == 200 else f"its sample was answered with {status}")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = path_of(scope), headers_of(scope)
        if path in ("/ping", "/health"):
            problem = await self.unhealthy()
            status, document = (
                (503, {"status": "Unhealthy", "reason": problem}) if problem else (200, {"status": "Healthy"})
            )
            await replied(send, status, document)
            return
        if path in LIVENESS:
            await replied_live(send, await self.broken(_SECONDS_OF_LIVENESS))
            return
        self._limits.check(scope["method"], headers)
        located = self._located(path)
        self._check_queue()
        with self._bodies.of_a_request() as take:
            call = self._call(located, headers, await self._limits.body(headers, receive, take))
            self._check_queue()  # others have come while the body did
            await self._replied(self._batcher.ask(call), receive, send)

    def _check_queue(self) -> None:
        """Raise Refused where too many calls wait."""
        if self._batcher.waiting >= self._limits.queue:
            raise Refused(503, "Overloaded", "too many requests wait; try again", {"retry-after": "1"})

    def _located(self, path: str) -> _Located:
        """What stands at a path; raises Refused for another model or version."""
        served = self._service.served
        door, _, rest = path.lstrip("/").partition("/")
        if door not in ("predictions", "explanations"):
            return _Located(path.strip("/"))
        name, _, rest = rest.partition("/")
        if name != served.name:
            raise Refused(404, "ModelNotFound", f"no such model is served here; {served.name} is")
        version, _, rest = rest.partition("/")
        if version and version != served.version:
            raise Refused(404, "ModelVersionNotFound", f"this version is not served; version {served.version} is")
        return _Located(rest, door == "explanations")

    def _call(self, located: _Located, headers: Mapping[str, str], body: bytes) -> Call:
        from traceserve_runtime.protocols.bodies import Headers, length_in
        from traceserve_runtime.protocols.decoding import media_of
        from traceserve_runtime.service import Call

        content_type = headers.get("content-type", "")
        parts, media = _parts(body, content_type)
        return Call(
            parts,
            Headers(
                content_type,
                None if media_of(content_type).is_form else len(body),  # no frontend dropped anything of a form
                headers.get("content-encoding", ""),
                media,
                explain=located.explain,
                path=located.path,
                client=headers.get("user-agent", ""),
                binary=length_in(headers.get("inference-header-content-length", ""), sys.maxsize),
            ),
        )

    async def _replied(self, asked: Asked, receive: Receive, send: Send) -> None:
        """Send what a call is answered, in pieces where it comes in pieces; until the client goes, or reads nothing."""
        watch = asyncio.ensure_future(until_gone(receive))
        seconds = self._limits.body_seconds
        try:
            event = await self._next(asked, watch, self._limits.timeout)
            if isinstance(event, Piece):
                await sent_within(send, _start(200, event.headers), seconds)
                while isinstance(event, Piece):
                    piece = {"type": "http.response.body", "body": event.body, "more_body": True}
                    await sent_within(send, piece, seconds)
                    event = await self._next(asked, watch, None)
                await sent_within(send, {"type": "http.response.body", "body": event.body}, seconds)
            else:
                headers = {"content-type": event.content_type, **event.headers}
                await _send(send, event.status, event.body, headers, seconds)
        finally:
            self._batcher.leave(asked)
            watch.cancel()

    async def _next(self, asked: Asked, watch: asyncio.Future[None], timeout: Optional[float]) -> Union[Piece, Reply]:
        """The next event of a call; raises Left where the client goes first, Refused where it takes too long."""
        event = asyncio.ensure_future(asked.next())
        both: Set[asyncio.Future[Any]] = {event, watch}
        try:
            await asyncio.wait(both, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                return event.result()
        finally:
            event.cancel()  # also where this task is cancelled: a server ends
        if watch.done():
            raise Left
        raise Refused(503, "TimedOut", f"no answer within {timeout:g} s", {"retry-after": "1"})


def key_from_environment() -> Union[str, Path, None]:
    """The key that this process demands, or the file that holds it; raises RuntimeError for a blank one."""
    file = os.environ.get(KEY_FILE_VARIABLE)
    if file:
        return Path(file)
    try:
        return given_key()
    except ValueError as error:
        raise RuntimeError(f"{error} where none is to be demanded") from None


async def guarded(answer: Asgi, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer an HTTP request by `answer`, which may raise Refused or Left; what else a server tells is dealt with here."""
    if scope["type"] == "lifespan":
        await _live(receive, send)
    elif scope["type"] == "http":
        with contextlib.suppress(Left):
            try:
                await answer(scope, receive, send)
            except Refused as refusal:
                await replied(send, refusal.status, refusal.document(path_of(scope)), refusal.headers)
    else:
        await send({"type": "websocket.close"})


async def replied(send: Send, status: int, document: object, headers: Mapping[str, str] = {}) -> None:
    """Send a document of the host's own."""
    await _send(send, status, _encoded(document), {"content-type": "application/json", **headers}, Limits.body_seconds)


async def replied_live(send: Send, problem: Optional[str]) -> None:
    """Say whether a process works; `problem` is why it should be replaced."""
    if problem is None:
        await replied(send, 200, {"live": True})
    else:
        await replied(send, 503, {"live": False, "reason": problem})


def path_of(scope: Scope) -> str:
    """The whole path, whether the server leaves out what it is mounted under or not."""
    root: str = scope.get("root_path", "")
    path: str = scope["path"]
    return path if not root or path.startswith(root) else root + path


def headers_of(scope: Scope) -> Dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _parts(body: bytes, content_type: str) -> Tuple[Mapping[str, object], Mapping[str, str]]:
    """A body as TorchServe hands it over: by itself, or as the parts of a form with their media types."""
    from traceserve_runtime.protocols.decoding import URL_ENCODED, media_of

    media = media_of(content_type)
    if media.name == URL_ENCODED:
        if len(body) > _LARGEST_FORM or body.count(b"&") > _MOST_FIELDS:
            raise Refused(
                413, "InputTooLong", f"a form may have {_LARGEST_FORM:,} bytes and {_MOST_FIELDS:,} fields; send JSON"
            )
        pairs = parse_qsl(body.decode("utf-8", "surrogateescape"), keep_blank_values=True, errors="surrogateescape")
        _check_once([name for name, _ in pairs])
        return {name: value.encode("utf-8", "surrogateescape") for name, value in pairs}, {}
    if media.is_form:
        return _multipart(body, content_type)
    return {"body": body}, {}


def _multipart(body: bytes, content_type: str) -> Tuple[Mapping[str, object], Mapping[str, str]]:
    from multipart import MultipartError, MultipartParser, parse_options_header

    boundary = parse_options_header(content_type)[1].get("boundary", "")
    try:
        most = len(body) + 1  # none of it becomes a temporary file
        parser = MultipartParser(io.BytesIO(body), boundary, strict=True, memory_limit=most, spool_limit=most)
        parts = list(parser)
    except MultipartError as error:
        raise Refused(400, "InvalidRequest", f"the form cannot be read: {error}") from None
    _check_once([part.name for part in parts])
    values = {part.name: part.raw for part in parts}
    # With its charset; a part without a media type of its own is text.
    media = {part.name: part.headers.get("content-type") for part in parts}
    return values, {name: own for name, own in media.items() if own}


def _check_once(names: Sequence[str]) -> None:
    """Raise Refused for a form's field that was sent twice: which one is meant?"""
    found: Set[str] = set()
    for name in names:
        if name in found:
            shown = "".join(c if c.isprintable() else "?" for c in name[:40])
            raise Refused(
                400, "InvalidRequest", f'the field "{shown}" was sent twice; send a list as JSON', field=shown
            )
        found.add(name)


def _encoded(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8")


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def until_gone(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _start(status: int, headers: Mapping[str, str]) -> Message:
    encoded = [(name.lower().encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": encoded}


async def _send(send: Send, status: int, body: bytes, headers: Mapping[str, str], seconds: float) -> None:
    """Send an answer, whose parts have so many seconds beside what the least pace takes; raises Left where its client reads
    it slower, who would keep all of it here for as long as he stays."""
    began, sent = time.monotonic(), 0
    await sent_within(send, _start(status, {"content-length": str(len(body)), **headers}), seconds)
    for message in in_parts(body):
        await sent_within(send, message, began + seconds + sent / _LEAST_PACE - time.monotonic())
        sent += len(message["body"])


def in_parts(body: bytes) -> Iterator[Message]:
    """The messages of a whole answer's body."""
    for start in range(0, max(1, len(body)), _PART):
        end = start + _PART
        yield {"type": "http.response.body", "body": body[start:end], "more_body": end < len(body)}


async def sent_within(send: Send, message: Message, seconds: float) -> None:
    """Send a message; raises Left where the client does not read what was sent before."""
    try:
        await asyncio.wait_for(send(message), seconds)
    except asyncio.TimeoutError:
        raise Left from None
