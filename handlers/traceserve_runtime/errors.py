"""One root error; each child owns its HTTP status."""

from __future__ import annotations

from typing import Any, Dict, Optional


class TraceserveError(RuntimeError):
    """What traceserve raises on purpose: its message is a sentence for the person who can act on it.

    It is a RuntimeError because TorchServe reports only that (and MemoryError) cleanly when a model cannot be loaded;
    anything else kills its worker.
    """

    status = 500
    phrase = "Internal Server Error"  # ASCII: another character corrupts TorchServe's frame for the whole batch

    def __init__(self, message: str, field: Optional[str] = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def to_json(self) -> Dict[str, Any]:
        """The body of an error answer: `{"error": {"type", "message", "field"}}`."""
        return {"error": {"type": type(self).__name__, "message": self.message, "field": self.field}}


class InvalidRequest(TraceserveError):
    """The request cannot be understood; `field` says where."""

    status = 400
    phrase = "Bad Request"


class NotFound(TraceserveError):
    """Nothing is served at this path."""

    status = 404
    phrase = "Not Found"


class InputTooLong(TraceserveError):
    """The request is understood, but longer than this model answers."""

    status = 413
    phrase = "Request Entity Too Large"


class UnsupportedMedia(TraceserveError):
    """The body is compressed, or its text encoded, in a way that is not read here."""

    status = 415
    phrase = "Unsupported Media Type"


class WrongTask(TraceserveError):
    """The path is one of a protocol that this model's task cannot answer."""

    status = 400
    phrase = "Bad Request"


class NotOffered(TraceserveError):
    """A door of TorchServe's behind which nothing is done yet."""

    status = 501
    phrase = "Not Implemented"


class ModelFailure(TraceserveError):
    """The model failed on a valid request, or gave something that is no number."""


class Unsupported(TraceserveError):
    """This checkpoint cannot answer the task; raised on the builder's side, before anything is written."""


class InvalidManifest(TraceserveError):
    """The archive's `traceserve.json`, or a file that it names, is not what it should be."""


class MissingPackage(TraceserveError):
    """The worker lacks what this archive needs: a package, a device, or a feature of the processor."""


def reason(error: Exception) -> str:
    """The first line of what somebody else's error says, or its kind if it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
