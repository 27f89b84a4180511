"""The builder side of traceserve: turns a checkpoint into a verified TorchServe archive, and runs a server for it."""

import importlib
from typing import TYPE_CHECKING, Any, List

from traceserve_runtime import __version__

if TYPE_CHECKING:
    from traceserve_runtime.errors import InputTooLong, InvalidRequest, TraceserveError

    from traceserve.api import BuiltArchive, LoadedArchive, build, load
    from traceserve.building.progress import Progress
    from traceserve.errors import ArchiveError, ConfigError, ExportError, SignatureError, SourceError

__all__ = [
    "ArchiveError",
    "BuiltArchive",
    "ConfigError",
    "ExportError",
    "InputTooLong",
    "InvalidRequest",
    "LoadedArchive",
    "Progress",
    "SignatureError",
    "SourceError",
    "TraceserveError",
    "__version__",
    "build",
    "load",
]

# The module of each name, imported when it is first used: the commands start faster without the Python API.
_MODULES = {
    "traceserve.api": ("BuiltArchive", "LoadedArchive", "build", "load"),
    "traceserve.building.progress": ("Progress",),
    "traceserve.errors": ("ArchiveError", "ConfigError", "ExportError", "SignatureError", "SourceError"),
    "traceserve_runtime.errors": ("InputTooLong", "InvalidRequest", "TraceserveError"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a name of the Python API."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> List[str]:
    """Return the names of the Python API."""
    return __all__
