"""The builder's deliberate errors; the command prints the message and exits 1."""

from __future__ import annotations

import json
from typing import Sequence

from traceserve_hosts import reason_in
from traceserve_runtime.errors import TraceserveError


class ConfigError(TraceserveError):
    """setup_config.json, or a combination in it, is invalid."""

    page = "reference/setup-config.md"


class SourceError(TraceserveError):
    """The checkpoint cannot be found, read or trusted."""

    page = "checkpoints.md"


class AmbiguousTask(SourceError):
    """Several tasks fit the checkpoint, and nothing in it decides; `tasks` names them."""

    def __init__(self, message: str, tasks: Sequence[str]) -> None:
        super().__init__(message, "task")
        self.tasks = tasks


class ExportError(TraceserveError):
    """The model cannot be exported."""

    page = "refused-build.md"


class UnwritableError(ExportError):
    """The model cannot be written in this save mode, but perhaps in another."""


class UnaskableError(ExportError):
    """Nothing can be compared, or no server be ready, however the model is written: requests do not fit into max_length, or the
    original gives no numbers."""


class ArchiveError(TraceserveError):
    """The archive cannot be made, or is not ours."""

    page = "checking.md"


class SignatureError(ArchiveError):
    """An archive is not signed by whom it should be, or cannot be."""

    page = "signatures.md"


class ServerError(TraceserveError):
    """The server did not start or does not answer."""

    page = "serve.md"


class DeployError(TraceserveError):
    """Deployment files cannot be made from these archives, or not there."""

    page = "deploying.md"


class NoSpace(TraceserveError):
    """A disk is, or would be, full; the message names the path and the size needed."""


class UnwritableOutput(TraceserveError):
    """What a command prints could not be written."""


def first_line(error: Exception) -> str:
    """Return the kind and the first line of another library's error, with the next one where it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    count = next((i for i, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    return f"{type(error).__name__}: {' '.join(lines[:count])}" if lines else type(error).__name__


def last_line(output: str) -> str:
    """Return the last line of another program's output: after a traceback, the error."""
    return reason_in(output, "it ended without a message")


def json_reason(error: Exception) -> str:
    """Return why a text is no JSON; where a comment or a comma stands that other formats allow, that JSON has none."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, json.JSONDecodeError):
        before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
        last_comma = after[:1] in ("}", "]") and before.endswith(",") or after.startswith(",")
        if last_comma or after.startswith(("//", "/*", "#")):
            return f"{error}; JSON has no comments, and no comma before }} or ]"
    return str(error)


def unread_reason(error: Exception) -> str:
    """Return why a file cannot be read, without the number and the path that the system's errors show."""
    return str(getattr(error, "strerror", None) or error)


def some(names: Sequence[str], shown: int = 3) -> str:
    """List the first names, and the number of others."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def shortened(text: str, longest: int) -> str:
    """Cut a text to this many characters, the last of which then shows it."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
