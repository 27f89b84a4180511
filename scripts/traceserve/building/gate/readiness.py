"""Asks an artifact the request by which a server shows that it is ready: an archive that cannot answer it cannot be served."""

from __future__ import annotations

from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.protocols.requests import parse_value
from traceserve_runtime.tasks.contract import Request, Task

from traceserve.errors import ExportError, UnaskableError


def check_canary_fits(task: Task) -> None:
    """Raise UnaskableError if max_length is too short for the task's canary, or for its warm-up."""
    for encoded in task.encode([_canary(task), *task.warm_up_requests()]):
        if isinstance(encoded, TraceserveError):
            raise UnaskableError(
                f"max_length {task.manifest.max_length} is too short for {task.name}: the built-in sample, which a server "
                f"answers before it is ready, does not fit ({encoded.message}); choose a larger max_length"
            )


def check_canary_answered(engine: Engine) -> None:
    """Raise ExportError if the artifact gives the canary no answer, of an artifact that otherwise passed."""
    [answer] = engine.answer([_canary(engine.task)])
    if isinstance(answer, TraceserveError):
        raise ExportError(
            f"the artifact does not answer the built-in sample, which a server answers before it is ready: {answer.message}"
        )


def _canary(task: Task) -> Request:
    body = parse_value(task.canary_body(task.manifest), type(task), 0, task.manifest.max_rows)
    [request] = body.requests
    return request
