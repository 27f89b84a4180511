"""The builder side of traceserve: turns a checkpoint into a verified TorchServe archive, and runs a server for it."""

from traceserve_runtime import __version__

__all__ = ["__version__"]
