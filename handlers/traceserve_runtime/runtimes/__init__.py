"""One file per save mode: how it is read. A runner takes named arrays and gives named arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Dict

from traceserve_runtime.batching import Runner
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes import aot_inductor, onnx, pretrained, torchscript
from traceserve_runtime.settings import Settings

Reader = Callable[[Manifest, Path, str, Settings], Runner]  # the third is the device

RUNTIMES: Dict[str, Reader] = {
    "torchscript": torchscript.read,
    "pretrained": pretrained.read,
    "onnx": onnx.read,
    "aot_inductor": aot_inductor.read,
}
