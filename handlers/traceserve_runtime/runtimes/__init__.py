"""The readers of the save modes, one file each, with their variants. A runner maps named arrays to named arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Dict, List, Sequence

from traceserve_runtime.explaining.targets import Differentiable
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Runner
from traceserve_runtime.runtimes import aot_inductor, onnx, openvino, pretrained, torchscript
from traceserve_runtime.runtimes.torchscript import gradients
from traceserve_runtime.runtimes.variants import Variant
from traceserve_runtime.settings import Settings

Reader = Callable[[Manifest, Path, str, Settings], Runner]  # the third is the device
Variants = Callable[[Manifest, Path, Sequence[str]], List[Variant]]  # on these devices; the default here comes first

# Likewise; the last is the model's own runner, which has its weights.
Gradients = Callable[[Manifest, Path, str, Runner], Differentiable]

RUNTIMES: Dict[str, Reader] = {
    "torchscript": torchscript.read,
    "pretrained": pretrained.read,
    "onnx": onnx.read,
    "openvino": openvino.read,
    "aot_inductor": aot_inductor.read,
}

VARIANTS: Dict[str, Variants] = {
    "torchscript": torchscript.variants,
    "pretrained": pretrained.variants,
    "onnx": onnx.variants,
    "openvino": openvino.variants,
    "aot_inductor": aot_inductor.variants,
}

# Those whose archives may have the model's gradients, for explanations.
GRADIENT_READERS: Dict[str, Gradients] = {
    "torchscript": gradients.read_gradients,
    "pretrained": pretrained.gradients_of,
}
