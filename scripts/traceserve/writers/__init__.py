"""One file per save mode: how it is written."""

from __future__ import annotations

from typing import Dict

from traceserve.writers import torchscript
from traceserve.writers.contract import Writer

WRITERS: Dict[str, Writer] = {
    "torchscript": Writer(torchscript.write, torchscript.MODEL_FILE, ("cpu",)),
}
