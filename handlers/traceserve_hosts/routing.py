"""Several archives behind one address: which of them a request means, and whose version.

/predictions/NAME/VERSION/...   that version
/predictions/NAME               one of the versions, each with its share of the requests
/v1/models, /v2                 what is served
/PATH                           the model that the path or the body names (`"model"`), or the only one that there is
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, AsyncGenerator, Callable, Dict, List, Mapping, Optional, Tuple

from traceserve_hosts.asgi import (
    LIVENESS,
    Asgi,
    Bodies,
    Left,
    Limits,
    Message,
    Receive,
    Refused,
    Scope,
    Send,
    guarded,
    headers_of,
    path_of,
    replied,
    replied_live,
    sent_within,
    until_gone,
)

if TYPE_CHECKING:
    from traceserve_runtime.errors import TraceserveError

# The messages of the answer that a name's version gives to a request with this body; cancelled where the client goes.
Ask = Callable[[str, str, Scope, bytes], AsyncGenerator[Message, None]]
_PASSED = ("type", "method", "path", "query_string", "headers")  # of a scope; the rest is of this process alone
_BEHIND = ("v1/models/", "v2/models/", "models/")  # a model's name
_OF_SERVERS = ("v2",)  # every archive gives the same answer
_STREAM = (b'"stream"', b"%22stream%22")  # in JSON; in a form's JSON


class Router:
    """An ASGI application over others; `shares` has the versions of each name."""

    def __init__(self, shares: Mapping[str, Mapping[str, float]], limits: Limits, ask: Ask) -> None:
        self._shares = shares
        self._limits = limits
        self._bodies = Bodies(limits)
        self._ask = ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await guarded(self._answer, scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = path_of(scope), headers_of(scope)
        if path in ("/ping", "/health"):
            await self._answer_health(send)
            return
        if path in LIVENESS:  # of this process; Ray asks each replica for its own
            await replied_live(send, None)
            return
        self._limits.check(scope["method"], headers)
        if path.strip("/") == "v2/health/ready":
            await self._answer_health(send)
            return
        if path.strip("/") in ("v1/models", "models"):
            await replied(send, 200, self._models())
            return
        with self._bodies.of_a_request() as take:
            body = await self._limits.body(headers, receive, take)
            name, version, path = self._located(path, headers, body)
            asked = {key: scope[key] for key in _PASSED if key in scope}
            await self._relayed(self._ask(name, version, {**asked, "path": path}, body), receive, send)

    async def _relayed(self, answer: AsyncGenerator[Message, None], receive: Receive, send: Send) -> None:
        """Send these messages; where the client goes first, or reads nothing, whoever answers is cancelled, and Left raised."""
        relaying = asyncio.ensure_future(_sent(answer, send, self._limits.body_seconds))
        watch = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({relaying, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not relaying.done():
                raise Left
            relaying.result()
        finally:
            relaying.cancel()
            watch.cancel()

    async def _answer_health(self, send: Send) -> None:
        """200 where every version of every archive answers."""
        for name, versions in self._shares.items():
            for version in versions:
                scope = {"type": "http", "method": "GET", "path": "/health", "headers": []}
                messages = [message async for message in self._ask(name, version, scope, b"")]
                if messages[0]["status"] != 200:
                    for message in messages:
                        await send(message)
                    return
        await replied(send, 200, {"status": "Healthy"})

    def _models(self) -> Dict[str, object]:
        """What OpenAI's clients and KServe's read of a list of models."""
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "traceserve"} for name in self._shares]
        return {"object": "list", "data": data, "models": list(self._shares)}

    def _located(self, path: str, headers: Mapping[str, str], body: bytes) -> Tuple[str, str, str]:
        """The name and the version that are meant, and the path as this version's own application has it; raises Refused."""
        door, _, rest = path.lstrip("/").partition("/")
        if door not in ("predictions", "explanations"):
            name = self._named(path.lstrip("/"), headers, body)
            return name, self._chosen(name), path
        name, _, rest = rest.partition("/")
        self._check(name)
        version, _, rest = rest.partition("/")
        if version and version not in self._shares[name]:
            known = ", ".join(self._shares[name])
            raise Refused(404, "ModelVersionNotFound", f"this version is not served; of {name} there are {known}")
        # Without the version where a client gave none: while replicas are replaced, some already have the next one.
        own = f"/{door}/{name}/{version}/{rest}" if version else f"/{door}/{name}"
        return name, version or self._chosen(name), own.rstrip("/")

    def _named(self, path: str, headers: Mapping[str, str], body: bytes) -> str:
        """The model that a path or a body names; raises Refused."""
        for begin in _BEHIND:
            if path.startswith(begin):
                name = path[len(begin) :].partition("/")[0].partition(":")[0]
                self._check(name)
                return name
        if len(self._shares) == 1 or path.strip("/") in _OF_SERVERS:
            return next(iter(self._shares))
        named = _model(headers, body)
        if named is None:
            known = ", ".join(f"/predictions/{each}" for each in self._shares)
            raise Refused(404, "ModelNotFound", f'several models are served; name one as "model", or ask at {known}')
        self._check(named)
        return named

    def _check(self, name: str) -> None:
        if name not in self._shares:
            raise Refused(404, "ModelNotFound", f"no such model is served here; there are {', '.join(self._shares)}")

    def _chosen(self, name: str) -> str:
        versions = self._shares[name]
        [chosen] = random.choices(list(versions), list(versions.values()))
        return chosen


def may_stream(scope: Scope, body: bytes) -> bool:
    """Whether the answer may come in pieces; also where the body cannot be searched: it is compressed, or UTF-16 or UTF-32."""
    encoding = headers_of(scope).get("content-encoding", "").strip().lower()
    return encoding not in ("", "identity") or b"\0" in body or any(word in body for word in _STREAM)


def _model(headers: Mapping[str, str], body: bytes) -> Optional[str]:
    """What the JSON object in a body, which is decoded as the archives do, calls its model; raises Refused for one that
    cannot be decompressed, or is larger than any legal one: it would hold the event loop."""
    from traceserve_runtime.errors import InputTooLong, TraceserveError
    from traceserve_runtime.protocols.decoding import decode_text, decompress, media_of
    from traceserve_runtime.protocols.wording import parse_json

    try:
        plain = decompress(body, headers.get("content-encoding", ""))
    except TraceserveError as error:
        raise _refused(error) from None
    assert isinstance(plain, bytes)
    try:
        value = parse_json(decode_text(plain, media_of(headers.get("content-type", "")), "body"))
    except InputTooLong as error:
        raise _refused(error) from None
    except TraceserveError:
        return None
    name = value.get("model") if isinstance(value, dict) else None
    return name if isinstance(name, str) else None


def _refused(error: TraceserveError) -> Refused:
    return Refused(error.status, type(error).__name__, error.message)


async def _sent(answer: AsyncGenerator[Message, None], send: Send, seconds: float) -> None:
    try:
        async for message in answer:
            await sent_within(send, message, seconds)
    finally:
        await answer.aclose()  # else the error's frames keep it, and what it asked goes on


async def messages(application: Asgi, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
    """What an application sends for a request whose body is there."""
    sent: asyncio.Queue[Optional[Message]] = asyncio.Queue()
    received: List[Message] = [{"type": "http.request", "body": body}]
    forever: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    async def receive() -> Message:
        return received.pop() if received else await forever

    async def send(message: Message) -> None:
        sent.put_nowait(message)

    async def run() -> None:
        try:
            await application(scope, receive, send)
        finally:
            sent.put_nowait(None)

    running = asyncio.ensure_future(run())
    try:
        while True:
            message = await sent.get()
            if message is None:
                break
            yield message
        await running
    finally:
        running.cancel()
        forever.cancel()
