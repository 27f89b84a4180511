"""What the builder raises on purpose; the command prints the message and exits 1."""

from __future__ import annotations

from typing import Sequence

from traceserve_runtime.errors import TraceserveError


class ConfigError(TraceserveError):
    """setup_config.json, or a combination in it, is not possible."""


class SourceError(TraceserveError):
    """The checkpoint cannot be found, read or trusted."""


class ExportError(TraceserveError):
    """The model cannot be exported."""


class UnwritableError(ExportError):
    """The model cannot be written in this save mode; it may be in another."""


class ArchiveError(TraceserveError):
    """The archive cannot be made, or is none of ours."""


class ServerError(TraceserveError):
    """TorchServe did not start, or does not answer."""


class NoSpace(TraceserveError):
    """A disk is full, or would be; the message names the path and what is needed."""


def first_line(error: Exception) -> str:
    """The kind of somebody else's error and the first line of what it says."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
