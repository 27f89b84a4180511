"""The neutral core of every host: takes clients' HTTP-like calls, and returns one reply per call.

A host translates its own requests to `Call`, and `Reply` to its own responses. The protocol of a call,
validation, the shape of errors, the note on truncated texts and the pieces of a stream are decided here and in
`protocols`.
"""

from __future__ import annotations

import json
import logging
import traceback
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from traceserve_runtime import failures
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidRequest, NotOffered, TraceserveError
from traceserve_runtime.protocols import protocol_of
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body, Document, Protocol, Served
from traceserve_runtime.streaming import Streams
from traceserve_runtime.tasks.contract import Answer, WrittenToken

logger = logging.getLogger(__name__)

TRUNCATED_HEADER = "X-Truncated"
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Call:
    """One request: `parts` holds its "body", or the fields of a form; `headers.path` follows the model's name."""

    parts: Mapping[str, Any]
    headers: Headers


@dataclass(frozen=True)
class Reply:
    """The response. A stream's body is its last piece."""

    body: bytes
    content_type: str = "application/json"
    status: int = 200
    phrase: str = "OK"  # ASCII
    headers: Mapping[str, str] = field(default_factory=dict)


# Sends one piece of the stream of call number `i`, with its response headers.
Send = Callable[[int, bytes, Mapping[str, str]], None]
_Result = Union["_Answered", TraceserveError]


@dataclass(frozen=True)
class _Answered:
    document: Document  # for a stream, its last piece as bytes
    answers: Sequence[Answer] = ()


class Service:
    """An engine, and the served name and version."""

    def __init__(self, engine: Engine, name: str, version: str = "1.0") -> None:
        self.engine = engine
        self.served = Served(name, version, engine.manifest, type(engine.task), self._text_of)

    def answer(self, calls: Sequence[Call], stats: Optional[Stats] = None, send: Optional[Send] = None) -> List[Reply]:
        """Return one reply per call, in order; adds to `stats`. Without `send`, a stream is returned whole."""
        stats = Stats() if stats is None else stats
        protocols = [protocol_of(call.headers) for call in calls]
        try:
            results = self._results(calls, protocols, stats, send)
        except Exception as error:  # an outer edge: the host would report it in its own words
            results = [_unexpected(error, len(calls))] * len(calls)
        return [self._reply(call, own, result, stats) for call, own, result in zip(calls, protocols, results)]

    def _text_of(self, ids: Sequence[int]) -> str:
        return self.engine.task.tokenizer.decode(ids, skip_special_tokens=True, raw=True)

    def _results(
        self, calls: Sequence[Call], protocols: Sequence[Protocol], stats: Stats, send: Optional[Send]
    ) -> List[_Result]:
        bodies = [self._read(call, i, own) for i, (call, own) in enumerate(zip(calls, protocols))]
        requests = [r for body in bodies if isinstance(body, Body) for r in body.requests]
        frames = {i: body.frames for i, body in enumerate(bodies) if isinstance(body, Body) and body.frames is not None}
        whole = {i for i, call in enumerate(calls) if call.headers.grpc or send is None}
        unseen: Dict[int, Dict[str, str]] = {}

        def tell(i: int, piece: bytes) -> None:
            if send is not None:
                send(i, piece, {"content-type": streams.content_type(i), **unseen.get(i, {})})

        streams = Streams(tell, whole, frames)

        def emit(
            number: int, cut: Mapping[str, Tuple[int, int]], text: str, tokens: Sequence[WrittenToken] = ()
        ) -> None:
            i = requests[number].group
            assert i is not None
            if cut and not streams.started(i):
                unseen[i] = {TRUNCATED_HEADER: json.dumps({0: cut})}
            streams.tell(i, text, tokens)

        answers = iter(self.engine.answer(requests, stats, emit))
        results: List[_Result] = []
        for i, body in enumerate(bodies):
            if isinstance(body, Body):
                own = [next(answers) for _ in body.requests]
                results.append(
                    failures.contained("it wrote this answer", partial(self._result, i, body, own, streams, stats))
                )
            elif isinstance(body, Document):
                results.append(_Answered(body))
            else:
                results.append(body)
        failures.log(results)
        return results

    def _read(self, call: Call, index: int, protocol: Protocol) -> Union[Body, Document, TraceserveError]:
        """Return a call's requests, a document that needs no model, or an error."""
        try:
            if call.headers.ended:
                raise NotOffered("StreamPredictions2 needs TorchServe's sequence batching")
            if call.headers.explain:
                raise NotOffered("answers are not explained here; ask for a prediction at /predictions/NAME")
            body = protocol.read(call.parts, call.headers, self.served, index)
            if isinstance(body, Body) and not body.streamable and any(map(self.engine.task.streams, body.requests)):
                raise InvalidRequest(
                    "a stream is plain text: send its request alone, not in a list and not in KServe's protocols",
                    "parameters.stream",
                )
            return body
        except TraceserveError as error:
            return error
        except Exception as error:  # an outer edge: only this call fails
            return _unexpected(error, 1)

    def _result(
        self, index: int, body: Body, own: Sequence[Union[Answer, TraceserveError]], streams: Streams, stats: Stats
    ) -> _Result:
        """Return the response to one body, from its requests' answers."""
        answers: List[Answer] = []
        for i, answer in enumerate(own):
            if isinstance(answer, Answer):
                answers.append(answer)
                continue
            placed = _at(answer, body.field_path(i, answer.field))
            if not streams.started(index):
                return placed
            failures.log([placed])
            stats.count_error(placed)
            return _Answered(Document(streams.ended(index, placed), streams.content_type(index)))
        if body.requests and self.engine.task.streams(body.requests[0]):
            last = streams.rest(index, answers[0].value, answers[0])
            return _Answered(Document(last, streams.content_type(index)), answers)
        document = body.protocol.reply(answers, self.served)
        return _Answered(document if isinstance(document, Document) else Document(document), answers)

    def _reply(self, call: Call, protocol: Protocol, result: _Result, stats: Stats) -> Reply:
        if isinstance(result, TraceserveError):
            stats.count_error(result)
            return self._failed(call, protocol, result)
        unseen = {i: answer.unseen for i, answer in enumerate(result.answers) if answer.unseen}
        headers = {**result.document.headers, **({TRUNCATED_HEADER: json.dumps(unseen)} if unseen else {})}
        try:
            return Reply(_encoded(result.document.value), result.document.content_type, headers=headers)
        except Exception as error:  # the edge of one request: an answer that is not JSON
            unexpected = _unexpected(error, 1)
            stats.count_error(unexpected)
            return self._failed(call, protocol, unexpected)

    def _failed(self, call: Call, protocol: Protocol, error: TraceserveError) -> Reply:
        try:
            refusal = protocol.error(error, call.parts, call.headers, self.served)
            return Reply(_encoded(refusal.document), status=refusal.status, phrase=refusal.phrase)
        except Exception as another:  # the edge of one request: not even its error fits its own format
            _unexpected(another, 1)
            return Reply(_encoded(error.to_json()), status=error.status, phrase=error.phrase)


def _encoded(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return _ENCODER.encode(value).encode("utf-8", "replace")


def _at(error: TraceserveError, place: Optional[str]) -> TraceserveError:
    """Return the error with its field's whole path in the client's body."""
    placed = type(error)(error.message, place)
    placed.__cause__ = error.__cause__
    return placed


def _unexpected(error: Exception, calls: int) -> TraceserveError:
    """Return a server error; it is logged without its message, which may contain a client's text."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("traceserve: %s in a batch of %d\n%s", type(error).__name__, calls, where)
    return TraceserveError("an unexpected error in the worker; its log has the details")
