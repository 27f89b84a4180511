"""The save mode torchscript: its reader, and what may be rewritten in a graph that was read."""

from __future__ import annotations

from traceserve_runtime.runtimes.torchscript.reader import read, variants

__all__ = ["read", "variants"]
