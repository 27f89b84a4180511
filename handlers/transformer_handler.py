"""TorchServe's entry point: the adapter between TorchServe and the engine.

TorchServe passes a batch of items and expects a list of equal length, in which each item has its own status; the
service makes the answers. The handler does not inherit TorchServe's BaseHandler, whose import takes seconds and which
chooses devices itself.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, List, Mapping, Optional, Sequence, Tuple, cast

if TYPE_CHECKING:
    from traceserve_runtime.batching.batches import Stats
    from traceserve_runtime.engine import Engine
    from traceserve_runtime.frontend_socket import SocketReader
    from traceserve_runtime.mirror import Mirror
    from traceserve_runtime.protocols.bodies import Headers
    from traceserve_runtime.rounds import Rounds
    from traceserve_runtime.service import Call, Reply, Service
    from traceserve_runtime.worker_context import JoiningContext, WorkerContext

logger = logging.getLogger(__name__)

# Without it a gRPC call's answer ends the worker; and one in several pieces ends the model, unless it is a stream's,
# which is indistinguishable: so each is a single, last piece.
_LAST_PIECE = "ts_stream_next"
_HTTP_HEADERS = {"host", "content-length", "content-type", "url_path", "explain"}
_OK = 200
_OF_REQUESTS = ("traceserve_runtime.service", "traceserve_runtime.rounds")  # what only `handle` uses
_CODEC = "ts.protocol.otf_message_handler"  # of TorchServe's worker, which has imported it


class TransformerHandler:
    """TorchServe calls `initialize` once and `handle` for every batch. (The file must define exactly one class.)"""

    def __init__(self) -> None:
        self.engine: Optional[Engine] = None
        self._reader: Optional[SocketReader] = None
        self._rounds: Optional[Rounds] = None
        self._mirror: Optional[Mirror] = None

    def initialize(self, context: WorkerContext) -> None:
        """Load the archive; TorchServe reports a RuntimeError's message.

        Imports are here because TorchServe masks an ImportError of the handler's file, and all are: none fails a request.
        """
        try:
            from traceserve_runtime import settings
            from traceserve_runtime.engine import Engine
            from traceserve_runtime.frontend_socket import read_at_once
            from traceserve_runtime.mirror import VARIABLE, Mirror

            folder = Path(context.system_properties["model_dir"])
            wanted = settings.read(getattr(context, "model_yaml_config", None) or {})
            self.engine = Engine.load(folder, _device(context, folder), wanted)
            self.engine.make_ready()
            for name in _OF_REQUESTS:
                importlib.import_module(name)
        except (RuntimeError, MemoryError):
            raise
        except ImportError as error:
            raise RuntimeError(f"the worker's Python lacks a package that this archive needs: {error}") from error
        except Exception as error:  # an outer edge: other exceptions kill the worker without a reason
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        self._mirror = Mirror(os.environ.get(VARIABLE))
        self._reader = read_at_once(sys.modules.get(_CODEC), self.engine.idle)
        logging.getLogger().addFilter(_without_traceback)
        # Loaded objects stay: otherwise each full collection walks torch's 200,000 objects while requests wait.
        gc.freeze()
        manifest = self.engine.manifest
        logger.info("traceserve loaded %s: %s, %s", manifest.name, manifest.task, manifest.save_mode)

    def handle(self, rows: Optional[Sequence[Mapping[str, object]]], context: WorkerContext) -> List[bytes]:
        """Return one response body per item; its status and headers are set in `context`."""
        from traceserve_runtime.batching.batches import Stats

        if (getattr(context, "model_yaml_config", None) or {}).get("continuousBatching"):
            return self._go_on(rows or [], cast("JoiningContext", context))
        started = time.perf_counter()
        stats = Stats()
        calls = [_call(context, row, i) for i, row in enumerate(rows or [])]
        replies = self._service(context).answer(calls, stats, partial(_send_piece, context))
        for i, (call, reply) in enumerate(zip(calls, replies)):
            _set_response(context, i, call.headers, reply)
        seconds = time.perf_counter() - started
        self._report(stats, stats.counters(len(replies), seconds) if stats.micro_batches else {}, seconds, context)
        if self._reader is not None:
            self._reader.answered()
        for i in [i for i, call in enumerate(calls) if call.ended]:
            context.request_ids.pop(i, None)  # TorchServe then silently drops the request
        return [reply.body for reply in replies]

    def _go_on(self, rows: Sequence[Mapping[str, object]], context: JoiningContext) -> List[bytes]:
        """Go on with all unanswered items for a moment, as TorchServe passes them with continuousBatching.

        An item without its id in `request_ids` gets nothing, and is passed again. (Seen with TorchServe 0.12.)
        """
        from traceserve_runtime.rounds import Rounds

        started = time.perf_counter()
        if self._rounds is None:
            self._rounds = Rounds(self._service(context))
        ids = [context.get_request_id(i) for i in range(len(rows))]
        parts = self._rounds.go_on(ids, lambda i: _call(context, rows[i], i))
        seconds = time.perf_counter() - started
        answered = any(part is not None and part.last is not False for part in parts)
        stats, counters = self._rounds.counted(len(rows), seconds, answered)
        self._report(stats, counters, seconds, context)
        context.stopping_criteria = {}
        for i, part in enumerate(parts):
            if part is None:
                del context.request_ids[i]
            else:
                _set_response(context, i, part.call.headers, part.reply)
                context.stopping_criteria[i] = partial(_is_last, part.last)
        if self._reader is not None and not self._rounds.busy:
            self._reader.answered()
        return [b"" if part is None else part.reply.body for part in parts]

    def _service(self, context: WorkerContext) -> Service:
        from traceserve_runtime.service import Service

        assert self.engine is not None
        return Service(self.engine, *self._name_and_version(context), self._mirror)

    def _name_and_version(self, context: WorkerContext) -> Tuple[str, str]:
        """Return the model's name in TorchServe, and its archive's version."""
        assert self.engine is not None
        packed = (getattr(context, "manifest", None) or {}).get("model") or {}
        name = getattr(context, "model_name", None) or packed.get("modelName") or self.engine.manifest.name
        return name, str(packed.get("modelVersion") or self.engine.manifest.version)

    def _report(self, stats: Stats, counters: Mapping[str, float], seconds: float, context: WorkerContext) -> None:
        """Report the computation to TorchServe."""
        metrics = getattr(context, "metrics", None)
        if metrics is None:
            return
        # In the name of the batch's first request: else each line would hold the ids of all.
        for reason, failed in stats.errors.items():
            metrics.add_counter("traceserve_errors_total", failed, 0, [SimpleNamespace(name="reason", value=reason)])
        if not counters:
            return
        for name, count in counters.items():
            metrics.add_counter(name, count, 0)
        # TorchServe's gauges are only times, sizes and percents: this one is from 0 to 1, as named.
        metrics.add_percent("traceserve_last_batch_padding_ratio", round(stats.padding_share, 3), 0)
        metrics.add_time("traceserve_last_batch_model_seconds", round(stats.model_seconds, 6), 0, "s")
        kinds = sys.modules.get("ts.metrics.metric_type_enum")
        if kinds is not None:  # one observation for the batch: one for each request would cost a line each
            metrics.add_metric("traceserve_batch_seconds", round(seconds, 6), "s", 0, [], kinds.MetricTypes.HISTOGRAM)


def _is_last(last: Optional[bool], body: bytes) -> Optional[bool]:
    """Return whether a body ends its stream; None for a whole answer. TorchServe asks."""
    return last


def _without_traceback(record: logging.LogRecord) -> bool:
    """Keep TorchServe's one line about a body that it could not parse, without its traceback.

    The handler parses the body itself, and reports what is wrong to the client.
    """
    if record.module == "otf_message_handler":
        record.exc_info = None
    return True


def _device(context: WorkerContext, folder: Path) -> str:
    """Return the GPU that TorchServe assigns, if any and the archive is for GPUs; else the CPU."""
    from traceserve_runtime.manifest import Manifest

    gpu = context.system_properties.get("gpu_id")
    number = -1 if gpu is None else int(gpu)
    return f"cuda:{number}" if number >= 0 and Manifest.read(folder, verify=False).on_gpu else "cpu"


def _call(context: WorkerContext, item: Mapping[str, object], index: int) -> Call:
    """Return an item as a call.

    A call of StreamPredictions2 has a sequence id; if TorchServe keeps no sequences it fails such a call immediately, but
    still passes the request on, and an answer would crash it (GRPCJob, InferenceImpl of 0.12).
    """
    from traceserve_runtime.service import Call

    headers = _headers(context, index)
    sequences = (getattr(context, "model_yaml_config", None) or {}).get("sequenceBatching")
    sequence_id = getattr(context, "header_key_sequence_id", "ts_request_sequence_id")
    told = context.get_all_request_header(index) or {}
    ended = headers.grpc and not sequences and isinstance(told.get(sequence_id), str)
    return Call(item, headers, ended)


def _headers(context: WorkerContext, index: int) -> Headers:
    """Return the facts that TorchServe passes beside a body: the headers, and a record of each part under the part's
    name.

    Over gRPC there are no headers. Over HTTP there always are: netty sets a length if the client sent none.
    """
    from traceserve_runtime.protocols.bodies import Headers, length_in

    told = context.get_all_request_header(index) or {}
    sent = {name.lower(): value for name, value in told.items() if isinstance(value, str)}
    parts = {name: record.get("content-type") or "" for name, record in told.items() if isinstance(record, dict)}
    return Headers(
        sent.get("content-type", ""),
        length_in(sent.get("content-length", "")),
        sent.get("content-encoding", ""),
        parts,
        not _HTTP_HEADERS & set(sent),
        explain=told.get("explain") == "True",  # TorchServe's own has this spelling
        path=sent.get("url_path", ""),
        client=sent.get("user-agent", ""),
        binary=length_in(sent.get("inference-header-content-length", ""), sys.maxsize),
    )


def _set_response(context: WorkerContext, index: int, headers: Headers, reply: Reply) -> None:
    """Set the status and headers of an item's response."""
    context.set_response_header(index, "content-type", reply.content_type)
    if headers.grpc:
        context.set_response_header(index, _LAST_PIECE, "false")
    for name, value in reply.headers.items():
        context.set_response_header(index, name, value)
    if reply.status != _OK:
        context.set_response_status(reply.status, reply.phrase, index)


def _send_piece(context: WorkerContext, row: int, piece: bytes, headers: Mapping[str, str]) -> None:
    """Send a piece of one item's text to its client, before the batch is answered.

    TorchServe's own way sends one to every item of the batch, even to those with a JSON document as their answer;
    here the message names only this item.
    """
    from ts.handler_utils.utils import send_intermediate_predict_response  # type: ignore[import-untyped]

    for name, value in headers.items():
        context.set_response_header(row, name, value)
    ids = {row: context.get_request_id(row)}
    send_intermediate_predict_response({row: piece}, ids, "Prediction success", 200, context)
