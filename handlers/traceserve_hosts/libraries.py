"""Environment variables of a model's libraries; they count if set before torch is imported.

OpenMP's waiting threads spin by default, and starve other processes and threads: with another busy process on two cores
MiniLM had a tenth of its throughput. Threads that sleep immediately wake too late for the next operator. A short spin
keeps most of both. (GNU's OpenMP counts spins; others read only the first line.)

oneDNN caches code and buffers for each matrix shape, 1,024 of them, and torch's own cache as many again. Rows of any
length have many shapes: a worker in bfloat16 grew to twice its memory. With 64 it is as fast, since the builder's graph
rounds token counts up to few sizes. With AMX it is not: there a new shape takes as long as 190 tokens of a small model.
See docs/measurements.md for the figures.

ONNX Runtime reports to Microsoft when imported. The runtimes of earlier archives do not turn that off themselves.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Dict, Iterator

CPUINFO = Path("/proc/cpuinfo")
SHAPES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
DEFAULTS = {  # on every processor
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "2000",
    "LRU_CACHE_CAPACITY": "16",
    "ORT_DISABLE_TELEMETRY": "1",
}


def settings() -> Dict[str, str]:
    """Return the variables for a process on this processor, as the user has set them or else by default."""
    defaults = {**DEFAULTS, SHAPES: "512" if _has_amx() else "64"}
    return {variable: os.environ.get(variable, value) for variable, value in defaults.items()}


def _has_amx() -> bool:
    # An archive's own traceserve_runtime, which knows the processor, is not imported before these variables are set.
    # Only the first core is read: every command does this, and Linux makes each core's part when it is read.
    with contextlib.suppress(OSError), CPUINFO.open() as lines:
        return "amx_bf16" in next((line for line in lines if line.startswith("flags")), "")
    return False


def set_defaults() -> None:
    """Set them in this process."""
    os.environ.update(settings())


@contextlib.contextmanager
def defaults_while_loading() -> Iterator[None]:
    """Set them while a model is loaded into a process that also does other work: its children should not inherit them."""
    missing = [variable for variable in settings() if variable not in os.environ]
    set_defaults()
    try:
        yield
    finally:
        for variable in missing:
            os.environ.pop(variable, None)
