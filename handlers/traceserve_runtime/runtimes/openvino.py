"""The save mode openvino: a graph and its weights, run by OpenVINO; without torch."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, Optional, Sequence, Tuple

import numpy as np

from traceserve_runtime import processor
from traceserve_runtime.errors import InvalidManifest, MissingPackage
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays, Padding, State
from traceserve_runtime.runtimes.variants import Variant
from traceserve_runtime.settings import Settings

_TELEMETRY = "openvino_telemetry"
# OpenVINO's name for what is not quantized. Without it, the plugin takes bfloat16 wherever the processor has it. In an
# int8 model the rest stays in float32, so that every processor computes the same.
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
_CAPABILITIES = {"float32": "FP32", "bfloat16": "BF16", "int8": "INT8"}


class OpenVinoRunner:
    """A model in OpenVINO on the CPU; see Runner. None runs in a loop."""

    padding = Padding()

    def __init__(self, compiled: Any, manifest: Manifest) -> None:
        self._request = compiled.create_infer_request()
        self._one_at_a_time = threading.Lock()  # a request that runs refuses another run
        self._inputs = tuple(port.get_any_name() for port in compiled.inputs)
        self._outputs = manifest.outputs

    def __call__(self, inputs: Arrays) -> Arrays:
        arrays = {name: np.ascontiguousarray(inputs[name]) for name in self._inputs}
        with self._one_at_a_time:
            results = self._request.infer(arrays, share_inputs=True)
        return dict(zip(self._outputs, results.to_tuple()))

    def start(self, inputs: Arrays) -> State:
        raise NotImplementedError("no writer of openvino writes a model that is run in a loop")

    def step(self, inputs: Arrays, state: State, rows: Optional[np.ndarray] = None) -> Tuple[Arrays, State]:
        raise NotImplementedError("no writer of openvino writes a model that is run in a loop")

    def join(self, states: Sequence[State], length: int) -> State:
        raise NotImplementedError("no writer of openvino writes a model that is run in a loop")

    def open_lanes(self) -> Sequence[Executor]:
        return []  # one stream on all cores was faster than one for each: docs/measurements.md

    def share_cores(self) -> None:
        pass  # its threads take pieces of an operator when free, and do not wait for the slowest


def library() -> Any:
    """Import and return OpenVINO, without its telemetry; raises ImportError.

    `import openvino` reports to Google Analytics, and makes a folder in the user's home, unless the package
    `openvino_telemetry`, which it depends on, cannot be imported.
    """
    sys.modules.setdefault(_TELEMETRY, None)  # type: ignore[arg-type]  # makes its import fail
    import openvino

    return openvino


def supported(openvino: Any, dtype: str) -> bool:
    """Return whether OpenVINO computes in this dtype on this processor."""
    known: FrozenSet[str] = frozenset(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return _CAPABILITIES[dtype] in known


def read(manifest: Manifest, folder: Path, device: str, settings: Settings = Settings()) -> OpenVinoRunner:
    """Return the model of `folder` as a runner.

    Raises MissingPackage without OpenVINO, or for int8 on a processor where it is wrong; InvalidManifest for an invalid
    file.
    """
    try:
        openvino = library()
    except ImportError as error:
        raise MissingPackage(
            f"this archive needs openvino, which cannot be imported: {error}; pip install openvino"
        ) from error
    if device != "cpu":
        raise MissingPackage(
            f"TorchServe asks for the device {device}, but an archive of save mode openvino runs on the CPU"
        )
    processor.check_dtype(manifest.dtype)
    core = openvino.Core()
    try:
        model = core.read_model(str(folder / manifest.model_file))
        compiled = core.compile_model(model, "CPU", _properties(manifest.dtype, settings.threads))
    except RuntimeError as error:
        reason = str(error).strip().rsplit("\n", 1)[-1]
        raise InvalidManifest(
            f"{manifest.model_file} cannot be loaded by openvino {openvino.__version__}: {reason}"
        ) from error
    names = {port.get_any_name() for port in compiled.inputs}
    if not names <= set(manifest.inputs) or len(compiled.outputs) != len(manifest.outputs):
        raise InvalidManifest(f"{manifest.model_file} does not have the inputs and outputs that the manifest names")
    return OpenVinoRunner(compiled, manifest)


def variants(manifest: Manifest, folder: Path, devices: Sequence[str]) -> List[Variant]:
    """Return the only way to run this graph."""
    how = f"by OpenVINO, {_PRECISIONS[manifest.dtype]}"
    return [Variant(manifest.model_file, how, "cpu", partial(read, manifest, folder, "cpu"))]


def _properties(dtype: str, threads: Optional[int]) -> Dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
        "INFERENCE_NUM_THREADS": threads or processor.cores(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # by default it binds threads to cores: two workers would share the same ones
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # by default it may quantize the inputs of layers with int8 weights
    }
