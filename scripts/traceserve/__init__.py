"""The builder's side of traceserve: from a checkpoint to a verified TorchServe archive, and a server around it."""

from traceserve_runtime import __version__

__all__ = ["__version__"]
