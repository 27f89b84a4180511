"""The save mode onnx: graphs with one weights file, run by ONNX Runtime; without torch."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple, Type

import numpy as np

from traceserve_runtime import processor
from traceserve_runtime.errors import InvalidManifest, MissingPackage, reason
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays, Padding, State
from traceserve_runtime.runtimes.positions import PAST, joined_rows
from traceserve_runtime.runtimes.variants import Variant
from traceserve_runtime.settings import Settings
from traceserve_runtime.versions import release_of

# `Manifest.runtime`: each graph's file, and ONNX Runtime's optimization level when loading it.
GRAPHS, LEVEL = "graphs", "graph_optimization_level"
MODEL, START_GRAPH, STEP = "model", "start", "step"  # the graph of a single pass, and those of a loop
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED")
_NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"
INT8_SINCE = "1.22"  # older ONNX Runtimes end the process on blockwise int8 products


class _Tensor(Protocol):
    """ONNX Runtime's own tensor; the library has no types."""

    def numpy(self) -> np.ndarray: ...

    def shape(self) -> Sequence[int]: ...


class _Input(Protocol):
    name: str


class _Session(Protocol):
    def get_inputs(self) -> Sequence[_Input]: ...

    def run_with_ort_values(self, names: None, inputs: Dict[str, _Tensor]) -> List[_Tensor]: ...


class DeviceState(NamedTuple):
    """A tensor of a loop's state in ONNX Runtime's own memory: nothing is copied between steps."""

    value: _Tensor

    @property
    def shape(self) -> Tuple[int, ...]:
        return tuple(self.value.shape())


class _Graph:
    """A session, and its input names: inputs that the model does not read are not in the graph."""

    def __init__(self, session: _Session) -> None:
        self._session = session
        self._errors = _errors()
        self.inputs = tuple(item.name for item in session.get_inputs())

    def run(self, inputs: Dict[str, _Tensor]) -> List[_Tensor]:
        """Run named ONNX Runtime tensors to tensors, in order; raises RuntimeError."""
        try:
            return self._session.run_with_ort_values(None, {name: inputs[name] for name in self.inputs})
        except self._errors as error:
            raise RuntimeError(f"ONNX Runtime: {error}") from error


class OnnxRunner:
    """A model in ONNX Runtime on the CPU; see Runner."""

    padding = Padding()

    def __init__(self, graphs: Dict[str, _Graph], manifest: Manifest) -> None:
        self._graphs = graphs
        self._manifest = manifest

    def __call__(self, inputs: Arrays) -> Arrays:
        return self._outputs(self._graphs[MODEL].run(_values(inputs)))

    def start(self, inputs: Arrays) -> State:
        return tuple(map(DeviceState, self._graphs[START_GRAPH].run(_values(inputs))))

    def step(self, inputs: Arrays, state: State, rows: Optional[np.ndarray] = None) -> Tuple[Arrays, State]:
        if rows is not None:
            state = tuple(DeviceState(_value(kept.value.numpy().take(rows, axis=0))) for kept in state)
        past = {f"{PAST}{i}": kept.value for i, kept in enumerate(state)}
        results = self._graphs[STEP].run({**_values(inputs), **past})
        grown = tuple(map(DeviceState, results[len(self._manifest.outputs) :]))
        return self._outputs(results), (*grown, *state[len(grown) :])

    def join(self, states: Sequence[State], length: int) -> State:
        return tuple(
            DeviceState(_value(joined_rows([kept.value.numpy() for kept in tensors], length)))
            for tensors in zip(*states)
        )

    def open_lanes(self) -> Sequence[Executor]:
        return []  # a session has its own threads, and a second one would hold the weights again

    def share_cores(self) -> None:
        pass  # a session's threads take pieces of an operator when free, and do not wait for the slowest

    def _outputs(self, results: Sequence[_Tensor]) -> Arrays:
        return {name: value.numpy() for name, value in zip(self._manifest.outputs, results)}


def _values(inputs: Arrays) -> Dict[str, _Tensor]:
    return {name: _value(array) for name, array in inputs.items()}


def onnx_runtime() -> ModuleType:
    """Import and return ONNX Runtime, without its telemetry; raises ImportError.

    From 1.29 on, `import onnxruntime` reports to Microsoft, and makes files in the user's home, unless this is set.
    """
    os.environ[_NO_TELEMETRY] = "1"
    import onnxruntime

    module: ModuleType = onnxruntime
    return module


def _value(array: np.ndarray) -> _Tensor:
    import onnxruntime

    value: _Tensor = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    return value


def read(manifest: Manifest, folder: Path, device: str, settings: Settings = Settings()) -> OnnxRunner:
    """Return the model of `folder` as a runner.

    Raises MissingPackage without ONNX Runtime or with one too old for int8, InvalidManifest for an invalid file.
    """
    try:
        onnxruntime = onnx_runtime()
    except ImportError as error:
        raise MissingPackage(f"this archive needs onnxruntime, which cannot be imported: {error}") from error
    if device != "cpu":
        raise MissingPackage(
            f"the caller asks for the device {device}, but an archive of save mode onnx runs on the CPU"
        )
    if manifest.dtype == "int8" and not int8_known(onnxruntime.__version__):
        raise MissingPackage(
            f"int8 needs onnxruntime {INT8_SINCE} or newer; this is {onnxruntime.__version__}: "
            f"pip install 'onnxruntime>={INT8_SINCE}'"
        )
    processor.tell_slow(manifest.dtype)
    files, level = _facts(manifest)
    graphs = {}
    for name, file in files.items():
        try:
            session = onnxruntime.InferenceSession(
                str(folder / file), _options(level, settings.threads), providers=["CPUExecutionProvider"]
            )
        except _errors() as error:
            raise InvalidManifest(
                f"{file} cannot be loaded by onnxruntime {onnxruntime.__version__}: {reason(error)}"
            ) from error
        graphs[name] = _Graph(session)
    return OnnxRunner(graphs, manifest)


def variants(manifest: Manifest, folder: Path, devices: Sequence[str]) -> List[Variant]:
    """Return the only way to run these graphs: the archive sets their optimization."""
    how = f"by ONNX Runtime, {manifest.runtime[LEVEL]}"
    return [Variant(manifest.model_file, how, "cpu", partial(read, manifest, folder, "cpu"))]


def int8_known(version: str) -> bool:
    """Return whether this version of ONNX Runtime supports int8."""
    return release_of(version) >= release_of(INT8_SINCE)


def _facts(manifest: Manifest) -> Tuple[Dict[str, str], str]:
    """Return the graphs' files and the level; raises InvalidManifest."""
    runtime = manifest.runtime
    graphs, level = runtime.get(GRAPHS), runtime.get(LEVEL)
    if not isinstance(graphs, dict) or not graphs or not set(map(str, graphs.values())) <= set(manifest.files):
        raise InvalidManifest(f"runtime.{GRAPHS} should name graphs, each with a file of the archive")
    if level not in LEVELS:
        raise InvalidManifest(f"runtime.{LEVEL} should be one of {', '.join(LEVELS)}")
    return graphs, level


def _options(level: str, threads: Optional[int]) -> object:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    # By default it takes the machine's cores, and binds a thread to each: two workers would share the same ones.
    options.intra_op_num_threads = threads or processor.cores()
    # Spinning threads keep others from the cores: 9 ms instead of 6.5 alone, 19 instead of 14 beside two busy ones.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_mem_pattern = False  # a memory plan per seen shape; it gained nothing
    options.log_severity_level = 3
    return options


def _errors() -> Tuple[Type[Exception], ...]:
    """Return ONNX Runtime's exceptions: separate classes without a common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    return (RuntimeError, ValueError, *kinds)
