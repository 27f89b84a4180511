"""One file per save mode: how it is read. A runner takes named arrays and gives named arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Dict, Optional

from traceserve_runtime.batching import Runner
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes import aot_inductor, onnx, pretrained, torchscript

Reader = Callable[[Manifest, Path, str, Optional[int]], Runner]  # the last: how many threads

RUNTIMES: Dict[str, Reader] = {
    "torchscript": torchscript.read,
    "pretrained": pretrained.read,
    "onnx": onnx.read,
    "aot_inductor": aot_inductor.read,
}
