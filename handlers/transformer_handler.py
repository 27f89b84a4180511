"""What TorchServe loads: the adapter between TorchServe and the engine.

TorchServe gives a batch of rows and wants a list as long, where each row has a status of its own. The handler does
not inherit TorchServe's BaseHandler, whose import takes seconds and which chooses devices by itself.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, List, Mapping, Optional, Sequence, Tuple, Union

if TYPE_CHECKING:
    from traceserve_runtime.batching.batches import Stats
    from traceserve_runtime.engine import Answer, Engine
    from traceserve_runtime.errors import TraceserveError
    from traceserve_runtime.frontend_socket import Reader
    from traceserve_runtime.protocols.bodies import Headers
    from traceserve_runtime.protocols.native import Model
    from traceserve_runtime.protocols.requests import Body
    from traceserve_runtime.streaming import Streams

logger = logging.getLogger(__name__)

TRUNCATED_HEADER = "X-Truncated"
STREAM_TYPE = "text/plain; charset=utf-8"
# A gRPC call's answer without it ends the worker; and one answered in pieces ends the model, unless it is a stream's,
# which cannot be told from others: so each is one piece, the last.
_LAST_PIECE = "ts_stream_next"
_HTTP_HEADERS = {"host", "content-length", "content-type", "url_path", "explain"}
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class TransformerHandler:
    """TorchServe calls `initialize` once and `handle` for every batch. (The file must define exactly one class.)"""

    def __init__(self) -> None:
        self.engine: Optional[Engine] = None
        self._reader: Optional[Reader] = None

    def initialize(self, context: Any) -> None:
        """Load the archive; a RuntimeError's message is what TorchServe reports.

        The imports stand here because TorchServe masks an ImportError of the handler's file.
        """
        try:
            from traceserve_runtime import settings
            from traceserve_runtime.engine import Engine
        except ImportError as error:
            raise RuntimeError(f"the worker's Python lacks a package that this archive needs: {error}") from error
        try:
            folder = Path(context.system_properties["model_dir"])
            wanted = settings.read(getattr(context, "model_yaml_config", None) or {})
            self.engine = Engine.load(folder, _device(context, folder), wanted)
            self.engine.warm_up()
            self.engine.open_lanes()
            self.engine.share_cores()
            self.engine.measure_while_idle()
        except (RuntimeError, MemoryError):
            raise
        except Exception as error:  # an outer edge: anything else kills the worker without a reason
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        self._reader = _read_at_once(self.engine.idle)
        logging.getLogger().addFilter(_without_traceback)
        # What is loaded stays: without this, each full collection walks torch's 200,000 objects while requests wait.
        gc.freeze()
        manifest = self.engine.manifest
        logger.info("traceserve loaded %s: %s, %s", manifest.name, manifest.task, manifest.save_mode)

    def handle(self, rows: Optional[Sequence[Mapping[str, Any]]], context: Any) -> List[bytes]:
        """One JSON document, bytes, for each row; the status of each is set in `context`."""
        from traceserve_runtime.batching.batches import Stats
        from traceserve_runtime.streaming import Streams

        started = time.perf_counter()
        stats = Stats()
        headers = [_headers(context, i) for i in range(len(rows or []))]
        try:
            bodies = [self._parse(row, i, each) for i, (row, each) in enumerate(zip(rows or [], headers))]
            streams = Streams(partial(_send_piece, context), {i for i, each in enumerate(headers) if each.grpc})
            results = self._answer(bodies, stats, streams, context)
        except Exception as error:  # an outer edge: what escapes fails with TorchServe's own words
            results = [_unexpected(error, len(rows or []))] * len(rows or [])
        told = zip(rows or [], headers, results)
        answers = [self._respond(i, row, each, result, context) for i, (row, each, result) in enumerate(told)]
        self._report(stats, len(answers), time.perf_counter() - started, context)
        if self._reader is not None:
            self._reader.answered()
        for i in [i for i, each in enumerate(headers) if each.ended]:
            context.request_ids.pop(i, None)  # TorchServe then tells nobody, and drops the request
        return answers

    def _parse(self, row: Mapping[str, Any], index: int, headers: Headers) -> Union[Body, TraceserveError]:
        from traceserve_runtime.errors import InvalidRequest, NotOffered, TraceserveError
        from traceserve_runtime.protocols.requests import parse

        assert self.engine is not None
        task = self.engine.task
        try:
            if headers.ended:
                raise NotOffered("StreamPredictions2 needs TorchServe's sequence batching")
            if headers.explain:
                raise NotOffered("answers are not explained here; ask for a prediction at /predictions/NAME")
            body = parse(row, headers, type(task), index, self.engine.manifest.max_rows)
            if not body.streamable and any(task.streams(request) for request in body.requests):
                raise InvalidRequest(
                    "a stream is plain text: send its request alone, not in a list and not in KServe's protocols",
                    "parameters.stream",
                )
            return body
        except TraceserveError as error:
            return error
        except Exception as error:  # an outer edge: it is this row's alone
            return _unexpected(error, 1)

    def _answer(
        self, bodies: Sequence[Union[Body, TraceserveError]], stats: Stats, streams: Streams, context: Any
    ) -> List[Union[Tuple[Any, List[Answer]], TraceserveError]]:
        """For each body its answers, as (document, answers), or its first error.

        Of a streamed answer the document is what was not told while it grew, as bytes.
        """
        from traceserve_runtime import failures
        from traceserve_runtime.errors import TraceserveError

        assert self.engine is not None
        requests = [r for body in bodies if not isinstance(body, TraceserveError) for r in body.requests]
        model = self._model(context)

        def emit(i: int, unseen: Any, text: str) -> None:
            row = requests[i].group
            assert row is not None
            if unseen and not streams.started(row):
                context.set_response_header(row, TRUNCATED_HEADER, json.dumps({0: unseen}))
            streams.tell(row, text)

        answers = iter(self.engine.answer(requests, stats, emit))
        results: List[Union[Tuple[Any, List[Answer]], TraceserveError]] = []
        for row, body in enumerate(bodies):
            if isinstance(body, TraceserveError):
                results.append(body)
                continue
            own = [next(answers) for _ in body.requests]
            results.append(
                failures.contained("it wrote this answer", partial(self._result, row, body, own, model, streams))
            )
        failures.log(results)
        return results

    def _result(
        self, row: int, body: Body, own: Sequence[Union[Answer, TraceserveError]], model: Model, streams: Streams
    ) -> Union[Tuple[Any, List[Answer]], TraceserveError]:
        """What one body is answered, from the answers to its requests; see `_answer`."""
        from traceserve_runtime import failures
        from traceserve_runtime.errors import TraceserveError

        assert self.engine is not None
        for i, answer in enumerate(own):
            if isinstance(answer, TraceserveError):
                placed = _at(answer, body.place(i, answer.field))
                if not streams.started(row):
                    return placed
                failures.log([placed])
                return streams.ended(placed), []
        answers: List[Answer] = list(own)  # type: ignore[arg-type]  # there is no error among them
        values = [_noted(answer) for answer in answers]
        if self.engine.task.streams(body.requests[0]):
            return streams.rest(row, values[0]), answers
        return body.protocol.document(values, model), answers

    def _respond(self, index: int, row: Mapping[str, Any], headers: Headers, result: Any, context: Any) -> bytes:
        """Set the row's status and headers; gives its body."""
        from traceserve_runtime.protocols.open_inference import infer_error

        context.set_response_header(index, "content-type", "application/json")
        if headers.grpc:
            context.set_response_header(index, _LAST_PIECE, "false")
        if isinstance(result, tuple):
            value, answers = result
            unseen = {i: answer.unseen for i, answer in enumerate(answers) if answer.unseen}
            if unseen:
                context.set_response_header(index, TRUNCATED_HEADER, json.dumps(unseen))
            if isinstance(value, bytes):
                context.set_response_header(index, "content-type", STREAM_TYPE)
                return value
        else:
            value = infer_error(result, row["body"], self._model(context)) if headers.infer else result.to_json()
            context.set_response_status(result.status, result.phrase, index)
        try:
            return _ENCODER.encode(value).encode("utf-8", "replace")
        except Exception as error:  # the edge of one request: an answer that is no JSON
            return self._respond(index, row, headers, _unexpected(error, 1), context)

    def _model(self, context: Any) -> Model:
        """The name that the model has in TorchServe, and the version that its archive was given."""
        from traceserve_runtime.protocols.native import Model

        assert self.engine is not None
        packed = (getattr(context, "manifest", None) or {}).get("model") or {}
        name = getattr(context, "model_name", None) or packed.get("modelName") or self.engine.manifest.name
        return Model(name, str(packed.get("modelVersion") or "1.0"))

    def _report(self, stats: Stats, rows: int, seconds: float, context: Any) -> None:
        """Tell TorchServe what was computed. Times are summed over requests, as its own are: each waits for its batch."""
        metrics = getattr(context, "metrics", None)
        if metrics is None or not stats.micro_batches:
            return
        counts = {
            "TraceserveRequests": stats.requests,
            "TraceserveTokens": stats.tokens,
            "TraceserveWindows": stats.rows,
            "TraceserveComputedTokens": stats.padded_tokens,
            "TraceserveMicroBatches": stats.micro_batches,
            "TraceserveModelMicroseconds": round(1e6 * stats.model_seconds) * rows,
            "TraceserveHandlerMicroseconds": round(1e6 * seconds) * rows,
        }
        # In the name of the batch's first request: else each line would hold the ids of all.
        for name, count in counts.items():
            metrics.add_counter(name, count, 0)
        metrics.add_percent("TraceservePaddingShare", round(100 * stats.padding_share, 1), 0)
        metrics.add_time("TraceserveModelTime", round(1000 * stats.model_seconds, 2), 0)


def _read_at_once(idle: Callable[[], None]) -> Optional[Reader]:
    """Let the worker read each message in few calls, and be told when nobody waits; the reader, where that can be.

    `_retrieve_buffer` is a private name of TorchServe's codec (0.8 to 0.12). Where it is gone, the worker reads as TorchServe
    does, and what runs cost stays a guess: no client waits for a measurement.
    """
    from traceserve_runtime.frontend_socket import Reader

    codec = sys.modules.get("ts.protocol.otf_message_handler")
    if not hasattr(codec, "_retrieve_buffer"):
        return None
    reader = Reader(idle)
    codec._retrieve_buffer = reader  # type: ignore[union-attr]
    return reader


def _without_traceback(record: logging.LogRecord) -> bool:
    """Keep TorchServe's one line about a body that it could not parse, without the traceback that it adds to each.

    The handler reads the body itself, and the client is told what is wrong with it.
    """
    if record.module == "otf_message_handler":
        record.exc_info = None
    return True


def _device(context: Any, folder: Path) -> str:
    """The GPU that TorchServe assigns, if there is one and the archive was made for GPUs; else the CPU."""
    from traceserve_runtime.manifest import Manifest

    gpu = context.system_properties.get("gpu_id")
    assigned = gpu is not None and int(gpu) >= 0
    return f"cuda:{int(gpu)}" if assigned and Manifest.read(folder, verify=False).hardware == "gpu" else "cpu"


def _headers(context: Any, index: int) -> Headers:
    """What TorchServe tells of a request beside its body: its headers, and a record of each part under the part's name.

    Over gRPC there are no headers. Over HTTP there always are: netty sets a length where the client sent none. A call of
    StreamPredictions2 bears the id of a sequence; where TorchServe keeps no sequences it fails such a call at once, and
    hands the request over none the less (GRPCJob, InferenceImpl of 0.12).
    """
    from traceserve_runtime.protocols.bodies import Headers

    told = context.get_all_request_header(index) or {}
    sent = {name.lower(): value for name, value in told.items() if isinstance(value, str)}
    parts = {name: record.get("content-type") or "" for name, record in told.items() if isinstance(record, dict)}
    length = sent.get("content-length", "")
    grpc = not _HTTP_HEADERS & set(sent)
    sequences = (getattr(context, "model_yaml_config", None) or {}).get("sequenceBatching")
    sequence_id = getattr(context, "header_key_sequence_id", "ts_request_sequence_id")
    return Headers(
        sent.get("content-type", ""),
        int(length) if length.isdecimal() else None,
        sent.get("content-encoding", ""),
        parts,
        grpc,
        explain=told.get("explain") == "True",  # of this spelling is TorchServe's own
        ended=grpc and not sequences and isinstance(told.get(sequence_id), str),
    )


def _noted(answer: Answer) -> Any:
    """The answer's value; where its dictionaries have room, with the characters that the model never saw."""
    if not answer.unseen or isinstance(answer.value, str):
        return answer.value
    note = {"truncated": answer.unseen}
    if isinstance(answer.value, dict):
        return {**answer.value, **note}
    return [{**item, **note} if isinstance(item, dict) else item for item in answer.value]


def _send_piece(context: Any, row: int, piece: bytes) -> None:
    """Send a piece of one row's text to its client, before the batch is answered.

    TorchServe's own way to do this sends one to every row of the batch, those too whose answer is one JSON document;
    here the message names this row alone.
    """
    from ts.handler_utils.utils import send_intermediate_predict_response  # type: ignore[import-untyped]

    context.set_response_header(row, "content-type", STREAM_TYPE)
    ids = {row: context.get_request_id(row)}
    send_intermediate_predict_response({row: piece}, ids, "Prediction success", 200, context)


def _at(error: TraceserveError, place: Optional[str]) -> TraceserveError:
    """The error with its field's whole path in the client's body."""
    placed = type(error)(error.message, place)
    placed.__cause__ = error.__cause__
    return placed


def _unexpected(error: Exception, rows: int) -> TraceserveError:
    """An error that is ours; logged without its own message, which may hold a client's text."""
    from traceserve_runtime.errors import TraceserveError

    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("traceserve: %s in a batch of %d\n%s", type(error).__name__, rows, where)
    return TraceserveError("an unexpected error in the worker; its log has the details")
