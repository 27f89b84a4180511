"""One root error; each subclass has its HTTP status."""

from __future__ import annotations

from typing import List, Optional, Sequence

from traceserve_runtime.json_types import JsonObject


class TraceserveError(RuntimeError):
    """The base of deliberate errors: the message is a sentence for the person who can act on it.

    A RuntimeError, because TorchServe reports only this and MemoryError cleanly if a model cannot be loaded;
    anything else kills its worker.
    """

    status = 500
    phrase = "Internal Server Error"  # ASCII: other characters corrupt TorchServe's frame for the whole batch
    page: Optional[str] = None  # in docs/, that says more to whoever runs a command

    def __init__(self, message: str, field: Optional[str] = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def to_json(self) -> JsonObject:
        """Return the body of an error response: `{"error": {"type", "message", "field"}}`."""
        return {"error": {"type": type(self).__name__, "message": self.message, "field": self.field}}


class InvalidRequest(TraceserveError):
    """The request is invalid; `field` says where."""

    status = 400
    phrase = "Bad Request"


class NotFound(TraceserveError):
    """Nothing is served at this path."""

    status = 404
    phrase = "Not Found"


class InputTooLong(TraceserveError):
    """The request is valid, but longer than this model accepts."""

    status = 413
    phrase = "Request Entity Too Large"

    def __init__(
        self, message: str, field: Optional[str] = None, ways: Sequence[str] = (), exceeds_context: bool = False
    ) -> None:
        """`ways` are values of `long_inputs` that would help: the message advises them, `bare` does not.

        `exceeds_context`: one text alone, with what is to be written, is longer than the model reads.
        """
        advice = f', or ask for "parameters": {{"long_inputs": "{ways[0]}"}}' if ways else ""
        super().__init__(message + advice + "".join(f' or "{way}"' for way in ways[1:]), field)
        self.bare = message
        self.ways = ways
        self.exceeds_context = exceeds_context


class UnsupportedMedia(TraceserveError):
    """The body's compression or encoding is not supported."""

    status = 415
    phrase = "Unsupported Media Type"


class WrongTask(TraceserveError):
    """The path's protocol does not fit this model's task."""

    status = 400
    phrase = "Bad Request"


class NotOffered(TraceserveError):
    """A TorchServe endpoint without an implementation here."""

    status = 501
    phrase = "Not Implemented"


class OutOfTime(TraceserveError):
    """The answer was not ready within its own time budget."""

    status = 503
    phrase = "Service Unavailable"


class ModelFailure(TraceserveError):
    """The model failed on a valid request, or returned NaN or infinity."""


class Unsupported(TraceserveError):
    """This checkpoint cannot answer the task; raised by the builder, before anything is written."""

    page = "refused-build.md"


class InvalidManifest(TraceserveError):
    """The archive's `traceserve.json`, or a file in it, is invalid."""

    page = "checking.md"


class MissingPackage(TraceserveError):
    """The worker lacks a package, a device or a processor feature that this archive needs."""

    page = "save-modes.md"


def reason(error: Exception) -> str:
    """Return the first line of another library's error, or its kind if it has no message."""
    return _lines(error)[0]


def last_reason(error: Exception) -> str:
    """Return the last line of another library's error, or its kind if it has no message."""
    return _lines(error)[-1]


def _lines(error: Exception) -> List[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
