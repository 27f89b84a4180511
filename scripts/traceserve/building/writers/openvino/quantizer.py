"""NNCF, the quantizer of OpenVINO's models: imported quietly, and the layers that its graphs' products belong to."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from typing import Any, ContextManager

from traceserve_runtime.runtimes.openvino import core, library

DTYPE = "int8"
SMALLEST = 1e-12  # a range, and so a scale


def quantizer() -> Any:
    """Import and return NNCF, without telemetry and progress bars; raises ImportError."""
    core(library())  # before NNCF's own; and without its telemetry
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)  # nncf.set_log_level also changes handlers, which may be others'
    return nncf


def without_bars() -> ContextManager[object]:
    """Return a context in which NNCF shows no progress."""
    return contextlib.redirect_stdout(io.StringIO())


def layer_of(product: str) -> str:
    """Return the name of the layer to which this product belongs: the traced module's is in its own; empty for others."""
    found = re.match(r"__module\.(?:module\.)?model\.(.+)/aten::\w+/", product)
    return found.group(1) if found else ""
