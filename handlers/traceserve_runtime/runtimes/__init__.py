"""One file per save mode: how it is read. A runner takes named arrays and gives named arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Dict

from traceserve_runtime.batching import Runner
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes import torchscript

Reader = Callable[[Manifest, Path, str], Runner]

RUNTIMES: Dict[str, Reader] = {
    "torchscript": torchscript.read,
}
