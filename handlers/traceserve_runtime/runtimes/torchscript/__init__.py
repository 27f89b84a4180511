"""The save mode torchscript: its reader, and rewritings of loaded graphs."""

from __future__ import annotations

from traceserve_runtime.runtimes.torchscript.reader import read, variants

__all__ = ["read", "variants"]
