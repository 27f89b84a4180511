"""The builder side of traceserve: turns a checkpoint into a verified TorchServe archive, and runs a server for it."""

import importlib
from typing import TYPE_CHECKING, Any

from traceserve_runtime import __version__

if TYPE_CHECKING:
    from traceserve.api import BuiltArchive, LoadedArchive, build, load

__all__ = ["BuiltArchive", "LoadedArchive", "__version__", "build", "load"]


def __getattr__(name: str) -> Any:
    """Import the Python API when it is first used: the commands start faster without it."""
    if name in __all__:
        return getattr(importlib.import_module("traceserve.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
