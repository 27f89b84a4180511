"""What the builder raises on purpose; the command prints the message and exits 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from traceserve_runtime.errors import TraceserveError

if TYPE_CHECKING:
    from traceserve.verification import Findings


class ConfigError(TraceserveError):
    """setup_config.json, or a combination in it, is not possible."""


class SourceError(TraceserveError):
    """The checkpoint cannot be found, read or trusted."""


class ExportError(TraceserveError):
    """The model cannot be exported."""


class DriftError(ExportError):
    """The gate found that the artifact does not answer as the original does; `findings` says where."""

    def __init__(self, message: str, findings: Findings) -> None:
        super().__init__(message)
        self.findings = findings


class ArchiveError(TraceserveError):
    """The archive cannot be made, or is none of ours."""


class ServerError(TraceserveError):
    """TorchServe did not start, or does not answer."""
