"""The neutral core of every host: takes clients' HTTP-like calls, and returns one reply per call.

A host translates its own requests to `Call`, and `Reply` to its own responses. The protocol of a call,
validation, the shape of errors, the note on truncated texts and the pieces of a stream are decided here and in
`protocols`.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from traceserve_runtime import failures
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine, Work
from traceserve_runtime.errors import InvalidRequest, NotOffered, TraceserveError
from traceserve_runtime.manifest import DEFAULT_VERSION
from traceserve_runtime.mirror import Mirror
from traceserve_runtime.pending import Pending
from traceserve_runtime.protocols import protocol_of
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body, Document, ErrorFormat, Protocol, Served
from traceserve_runtime.streaming import Stream
from traceserve_runtime.tasks.contract import Answer, Request, Task, WrittenToken

TRUNCATED_HEADER = "X-Truncated"
_LONGEST_HEADER = 4096  # characters: common clients and proxies take 8 KiB of headers
TURN_SECONDS = 0.1  # after which calls that have come meanwhile join those that are being answered; see `Work`
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Call:
    """One request: `parts` holds its "body", or the fields of a form; `headers.path` follows the model's name.

    `ended`: the host has already ended it, so nobody gets the answer.
    """

    parts: Mapping[str, object]
    headers: Headers
    ended: bool = False


@dataclass(frozen=True)
class Reply:
    """The response. A stream's body is its last piece."""

    body: bytes
    content_type: str = "application/json"
    status: int = 200
    phrase: str = "OK"  # ASCII
    headers: Mapping[str, str] = field(default_factory=dict)


# Sends one piece of a stream, with its response headers.
SendPiece = Callable[[bytes, Mapping[str, str]], None]
# Likewise, of call number `i`.
SendOfCall = Callable[[int, bytes, Mapping[str, str]], None]
_Result = Union["_Answered", TraceserveError]


@dataclass(frozen=True)
class _Answered:
    document: Document  # for a stream, its last piece as bytes
    answers: Sequence[Answer] = ()


class Service:
    """An engine, and the served name and version; a mirror shows what was answered."""

    def __init__(
        self, engine: Engine, name: str, version: str = DEFAULT_VERSION, mirror: Optional[Mirror] = None
    ) -> None:
        self.engine = engine
        self.mirror = mirror
        self.served = Served(name, version, engine.manifest, type(engine.task), self._text_of)

    def answer(
        self, calls: Sequence[Call], stats: Optional[Stats] = None, send: Optional[SendOfCall] = None
    ) -> List[Reply]:
        """Return one reply per call, in order; adds to `stats`. Without `send`, a stream is returned whole."""
        session = Session(self, Stats() if stats is None else stats, math.inf)
        exchanges = session.join(calls, [partial(send, i) if send else None for i in range(len(calls))])
        while session.busy:
            session.turn()
        return [exchange.reply for exchange in exchanges if exchange.reply is not None]

    def session(self, stats: Stats) -> Session:
        """Return a session for calls that join one another between its turns, which are short; it adds to `stats`."""
        return Session(self, stats, TURN_SECONDS)

    def _text_of(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; raises InvalidRequest with the first unknown one's position among them."""
        tokenizer = self.engine.task.tokenizer
        unknown = {number for number in set(ids) if not tokenizer.has_token(number)}
        position = next((i for i, number in enumerate(ids) if number in unknown), None)
        if position is not None:
            raise InvalidRequest(
                "this model has no such token; send the text instead of another tokenizer's ids "
                "(LangChain: check_embedding_ctx_length=False)",
                f"[{position}]",
            )
        return tokenizer.decode(ids, skip_special_tokens=True, raw=True)

    def read(self, call: Call, index: int, protocol: Protocol) -> Union[Body, Document, TraceserveError]:
        """Return a call's requests, a document that needs no model, or an error."""
        return failures.contained("it read this request", partial(self._read, call, index, protocol))

    def _read(self, call: Call, index: int, protocol: Protocol) -> Union[Body, Document]:
        if call.ended:
            raise NotOffered("the host has ended this call")
        body = protocol.read(call.parts, call.headers, self.served, index)
        if isinstance(body, Body) and not body.streamable and any(map(self.engine.task.streams, body.requests)):
            return _whole(body)
        return body

    def reply_to(self, exchange: Exchange, result: _Result, stats: Stats) -> Reply:
        """Return the response to a call that is being answered; an error ends a stream that has begun, since its status was
        already sent."""
        if isinstance(result, TraceserveError) and exchange.begun:
            stats.count_error(result)
            result = exchange.ended(result)
        return self.reply(exchange.call, exchange.errors, result, stats)

    def reply(self, call: Call, errors: ErrorFormat, result: _Result, stats: Stats) -> Reply:
        """Return the response to a call, whose errors have this format."""
        if isinstance(result, TraceserveError):
            return self._failed(call, errors, result, stats)
        unseen = {i: answer.unseen for i, answer in enumerate(result.answers) if answer.unseen}
        headers = {**result.document.headers, **_truncated(unseen)}
        try:
            return Reply(_encoded(result.document.value), result.document.content_type, headers=headers)
        except Exception as error:  # the edge of one request: an answer that is not JSON
            unexpected = failures.unexpected(error, "it wrote this answer")
            failures.log([unexpected])
            return self._failed(call, errors, unexpected, stats)

    def show(self, exchange: Exchange, result: _Result) -> None:
        """Show a call's requests and answers in the mirror; predictions alone, since these are compared."""
        if self.mirror is None or not isinstance(result, _Answered):
            return
        if not any(request.explain for request in exchange.requests):
            self.mirror.show((self.served.name, self.served.version), exchange.requests, result.answers)

    def _failed(self, call: Call, errors: ErrorFormat, error: TraceserveError, stats: Stats) -> Reply:
        stats.count_error(error)
        try:
            refusal = errors.error(error, call.parts, call.headers, self.served)
            return Reply(_encoded(refusal.document), status=refusal.status, phrase=refusal.phrase)
        except Exception as another:  # the edge of one request: not even its error fits its own format
            failures.log([failures.unexpected(another, "it wrote this error")])
            return Reply(_encoded(error.to_json()), status=error.status, phrase=error.phrase)


def _whole(body: Body) -> Body:
    """Return a body that cannot be streamed, for whole answers whatever the archive's default; raises InvalidRequest where it
    asks for a stream itself."""
    if any(request.parameters.get("stream") for request in body.requests):
        raise InvalidRequest(
            "a stream is plain text: send its request alone, not in a list and not in KServe's protocols",
            "parameters.stream",
        )
    return replace(
        body, requests=[replace(each, parameters={**each.parameters, "stream": False}) for each in body.requests]
    )


def _truncated(unseen: Mapping[int, Mapping[str, Tuple[int, int]]]) -> Dict[str, str]:
    """Return the header with the characters of each request that the model did not see, or, for many, how many were cut."""
    if not unseen:
        return {}
    told = json.dumps(unseen)
    return {TRUNCATED_HEADER: told if len(told) <= _LONGEST_HEADER else json.dumps({"requests": len(unseen)})}


def _encoded(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    return _ENCODER.encode(value).encode("utf-8", "replace")


def _at(error: TraceserveError, place: Optional[str]) -> TraceserveError:
    """Return the error with its field's whole path in the client's body."""
    placed = copy.copy(error)
    placed.field = place
    placed.__cause__ = error.__cause__
    return placed


class Exchange:
    """A call that is being answered; `send` sends a piece of its stream, and None means to answer it whole."""

    def __init__(
        self, call: Call, protocol: Protocol, body: Union[Body, Document, TraceserveError], send: Optional[SendPiece]
    ) -> None:
        self.call = call
        self.errors: ErrorFormat = (body.errors if isinstance(body, Body) else None) or protocol
        self.reply: Optional[Reply] = None  # once answered
        self.requests: Sequence[Request] = body.requests if isinstance(body, Body) else ()
        self.pending: List[Pending] = []  # of its requests
        self._body = body
        self._send = send
        self._unseen: Dict[str, str] = {}
        frames = body.frames if isinstance(body, Body) else None
        whole = call.headers.grpc or send is None
        self._stream = Stream(None if whole else self._tell, frames)

    def _tell(self, piece: bytes) -> None:
        assert self._send is not None
        self._send(piece, {"content-type": self._stream.content_type, **self._unseen})

    def emit(self, cut: Mapping[str, Tuple[int, int]], text: str, tokens: Sequence[WrittenToken] = ()) -> None:
        """Send what is new of a stream's text; see `Engine.answer`."""
        if cut and not self._stream.started:
            self._unseen = _truncated({0: cut})
        self._stream.tell(text, tokens)

    def release(self) -> None:
        """Drop what calls back: in such a cycle the answer would stay in memory until a full garbage collection."""
        self.pending = []
        self._send = None
        self._stream.close()

    @property
    def done(self) -> bool:
        """Whether all its requests are."""
        return all(pending.done for pending in self.pending)

    @property
    def begun(self) -> bool:
        """Whether something of its stream was sent."""
        return self._stream.started

    def result(self, served: Served, task: Task) -> _Result:
        """Return the response's content, once done."""
        body, stream = self._body, self._stream
        if not isinstance(body, Body):
            return _Answered(body) if isinstance(body, Document) else body
        answers: List[Answer] = []
        for i, pending in enumerate(self.pending):
            answer = pending.answer()
            if isinstance(answer, TraceserveError):
                return _at(answer, body.field_path(i, answer.field))
            answers.append(answer)
        if body.requests and task.streams(body.requests[0]):
            answer = answers[0].continued
            last = stream.rest(str(answer.value), answer)
            return _Answered(Document(last, stream.content_type), answers)
        document = body.protocol.reply(answers, served)
        return _Answered(document if isinstance(document, Document) else Document(document), answers)

    def ended(self, error: TraceserveError) -> _Answered:
        """Return the last piece of a stream that fails."""
        return _Answered(Document(self._stream.ended(error), self._stream.content_type))


class Session:
    """Calls that a service answers in turns: others join between two turns, and answered ones leave; see `Work`.

    Exactly one thread at a time may use it. What is computed is added to `stats`. A turn takes about `seconds`.
    """

    def __init__(self, service: Service, stats: Stats, seconds: float) -> None:
        self._service = service
        self._stats = stats
        self._seconds = seconds
        self._work = self._opened()
        self._live: List[Exchange] = []
        self._calls = count()

    def _opened(self) -> Work:
        return Work(self._service.engine, self._stats, self._seconds)

    @property
    def busy(self) -> bool:
        """Whether a call is not answered."""
        return bool(self._live)

    @property
    def rest(self) -> float:
        """For how many seconds a turn would do nothing, unless others join; see `Work`."""
        return self._work.rest

    @property
    def live(self) -> Sequence[Exchange]:
        """The calls that are not answered."""
        return self._live

    def join(self, calls: Sequence[Call], sends: Sequence[Optional[SendPiece]]) -> List[Exchange]:
        """Add calls that came together; `turn` returns each when it is answered."""
        exchanges = []
        for call, send in zip(calls, sends):
            protocol = protocol_of(call.headers)
            exchanges.append(Exchange(call, protocol, self._service.read(call, next(self._calls), protocol), send))
        try:
            requests = [request for each in exchanges for request in each.requests]
            emits = [each.emit for each in exchanges for _ in each.requests]
            pending = iter(self._work.join(requests, emits))
        except Exception as error:  # an outer edge: the host would report it in its own words
            self._fail(exchanges, error)
            return exchanges
        for each in exchanges:
            each.pending = [next(pending) for _ in each.requests]
        self._live += exchanges
        return exchanges

    def turn(self) -> List[Exchange]:
        """Go one step further with all calls; return those that have their reply now."""
        try:
            self._work.turn()
        except Exception as error:  # an outer edge, as above
            failed, self._live = self._live, []
            self._work = self._opened()
            self._fail(failed, error)
            return failed
        done = [each for each in self._live if each.done]
        if not done:
            return []
        self._live = [each for each in self._live if each not in done]
        results = [failures.contained("it wrote this answer", partial(self._result, each)) for each in done]
        failures.log(results)
        for each, result in zip(done, results):
            self._reply(each, result)
            self._service.show(each, result)
        return done

    def leave(self, exchange: Exchange) -> None:
        """Compute nothing more for a call whose client has gone."""
        self._live = [each for each in self._live if each is not exchange]
        for pending in exchange.pending:
            self._work.leave(pending)
        exchange.release()
        if not self._live:  # no turn follows, in which the work would drop what it holds of those who left
            self._work = self._opened()

    def _result(self, exchange: Exchange) -> _Result:
        return exchange.result(self._service.served, self._service.engine.task)

    def _fail(self, exchanges: Sequence[Exchange], error: Exception) -> None:
        unexpected = failures.unexpected(error, "it answered this request")
        failures.log([unexpected] * len(exchanges))
        for each in exchanges:
            self._reply(each, unexpected)

    def _reply(self, exchange: Exchange, result: _Result) -> None:
        exchange.reply = self._service.reply_to(exchange, result, self._stats)
        exchange.release()
