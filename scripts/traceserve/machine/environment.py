"""What the libraries of a worker read of the environment; to be set before torch is imported.

OpenMP's waiting threads spin by default, and starve whatever shares the processor with them: with another busy process on
two cores MiniLM answered a tenth. Those that sleep at once are woken too late for the next operator. A short spin keeps
most of both. (GNU's OpenMP counts spins; others read the first line alone.)

oneDNN keeps code and buffers for each shape of a product that it has met, 1,024 of them and as many again in torch's own
cache. Rows of any length are many shapes: a worker in bfloat16 grew to twice its memory. With 64 it is as fast, where the
builder has the graph fill its tokens up to few numbers (torchscript/unpadding.py). The figures are in docs/measurements.md.
"""

from __future__ import annotations

import os
from typing import Dict

DEFAULTS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "2000",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "16",
}


def settings() -> Dict[str, str]:
    """What is to be set, as far as the user has not set it."""
    return {key: os.environ.get(key, value) for key, value in DEFAULTS.items()}
