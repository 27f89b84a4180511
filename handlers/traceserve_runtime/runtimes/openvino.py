"""The save mode openvino: a graph and its weights, run by OpenVINO; without torch."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import Executor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, Optional, Sequence, Union

import numpy as np

from traceserve_runtime import processor
from traceserve_runtime.errors import InvalidManifest, MissingPackage, last_reason
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays, Padding, RunsOnce
from traceserve_runtime.runtimes.openvino_steps import ROWS, START_FILE_KEY, SteppingRunner
from traceserve_runtime.runtimes.positions import PAST, PRESENT
from traceserve_runtime.runtimes.variants import Variant
from traceserve_runtime.settings import Settings

_TELEMETRY = "openvino_telemetry"
_ONE_AT_A_TIME = threading.Lock()
# OpenVINO's name for what is not quantized. Without it, the plugin takes bfloat16 wherever the processor has it. In an
# int8 model the rest stays in float32, so that every processor computes the same.
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
# In `Manifest.runtime`: whether a step's int8 layers may round their inputs too, as they did where the answers were compared.
ROUNDED = "rounded_inputs"
# Each block of numbers by its own range, 32 as OpenVINO's default: a step of 16 rows takes two thirds of the time. A model
# that runs once has its own ranges.
_ROUNDING = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 32}
# Shapes of its operators for which it keeps code and buffers; by default 5,000, so that a worker grows with every new batch
# and length. With 256 single texts took as long, with 64 about 8 % longer. See docs/measurements.md for the figures.
_CACHED_SHAPES = 256
_CAPABILITIES = {"float32": "FP32", "bfloat16": "BF16", "int8": "INT8"}


class OpenVinoRunner(RunsOnce):
    """A model that runs once in OpenVINO on the CPU; see Runner."""

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


def core(openvino: Any) -> Any:
    """Return OpenVINO's Core, one for this process, which keeps it to its end.

    A Core's plugin gives signals another stack in the thread that loads it, and unmaps that stack as it goes. Of two
    Cores that go in the order they came the first one's stays in use: the next signal ends the process (2026.4).
    """
    with _ONE_AT_A_TIME:
        return _core(openvino)


@lru_cache(maxsize=None)
def _core(openvino: Any) -> Any:
    return openvino.Core()


def supported(openvino: Any, dtype: str) -> bool:
    """Return whether OpenVINO computes in this dtype on this processor."""
    known: FrozenSet[str] = frozenset(core(openvino).get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return _CAPABILITIES[dtype] in known


def read(
    manifest: Manifest, folder: Path, device: str, settings: Settings = Settings()
) -> Union[OpenVinoRunner, SteppingRunner]:
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
            f"the caller asks for the device {device}, but an archive of save mode openvino runs on the CPU"
        )
    loops = bool(manifest.step_inputs)
    if not only_weights(manifest):
        processor.check_dtype(manifest.dtype)
    properties = _properties(manifest.dtype, settings.threads, loops)
    if only_weights(manifest) and manifest.runtime.get(ROUNDED, True) and processor.native(manifest.dtype):
        properties.update(_ROUNDING)
    weights = (folder / manifest.model_file).with_suffix(".bin")  # of all graphs
    compiled = _compiled(openvino, folder / manifest.model_file, weights, properties)
    _check_ports(manifest, compiled, loops)
    if not loops:
        return OpenVinoRunner(compiled, manifest)
    start = manifest.runtime.get(START_FILE_KEY)
    if start is not None and start not in manifest.files:
        raise InvalidManifest(f"runtime.{START_FILE_KEY} should name a file of the archive")
    first = None if start is None else _compiled(openvino, folder / str(start), weights, properties)
    return SteppingRunner(compiled, first, openvino.Tensor)


def only_weights(manifest: Manifest) -> bool:
    """Return whether only weights are int8, which any processor multiplies in float32: those of a loop's steps."""
    return manifest.dtype == "int8" and bool(manifest.step_inputs)


def _compiled(openvino: Any, file: Path, weights: Path, properties: Dict[str, Any]) -> Any:
    """Return the model of a file for this processor; raises InvalidManifest."""
    one = core(openvino)
    try:
        return one.compile_model(one.read_model(str(file), str(weights)), "CPU", properties)
    except RuntimeError as error:
        raise InvalidManifest(
            f"{file.name} cannot be loaded by openvino {openvino.__version__}: {last_reason(error)}"
        ) from error


def _check_ports(manifest: Manifest, compiled: Any, loops: bool) -> None:
    """Raise InvalidManifest if a graph has other inputs and outputs than the manifest names, besides a loop's state."""
    inputs = {port.get_any_name() for port in compiled.inputs}
    outputs = {port.get_any_name() for port in compiled.outputs}
    known = set(manifest.step_inputs if loops else manifest.inputs)
    if loops:
        inputs = {name for name in inputs if name != ROWS and not name.startswith(PAST)}
        outputs = {name for name in outputs if not name.startswith(PRESENT)}
    if not inputs <= known or len(outputs) != len(manifest.outputs):
        raise InvalidManifest(f"{manifest.model_file} does not have the inputs and outputs that the manifest names")


def variants(manifest: Manifest, folder: Path, devices: Sequence[str]) -> List[Variant]:
    """Return the only way to run this graph."""
    how = f"by OpenVINO, {_PRECISIONS[manifest.dtype]}"
    return [Variant(manifest.model_file, how, "cpu", partial(read, manifest, folder, "cpu"))]


def _properties(dtype: str, threads: Optional[int], loops: bool) -> Dict[str, Any]:
    properties = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
        "INFERENCE_NUM_THREADS": threads or processor.cores(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # by default it binds threads to cores: two workers would share the same ones
        "CPU_RUNTIME_CACHE_CAPACITY": _CACHED_SHAPES,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # by default it may round the inputs of layers with int8 weights
    }
    if loops:  # by default keys and values are rounded to 8 bits
        properties["KV_CACHE_PRECISION"] = _PRECISIONS[dtype]
    return properties
