"""The save mode openvino: the traced graph, converted by OpenVINO, and its weights in a file beside it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, Iterator, Sequence, Type

import torch
from traceserve_runtime.errors import reason
from traceserve_runtime.runtimes.openvino import library, supported

from traceserve.building.checkpoints.original import Original
from traceserve.building.config.dtypes import AUTO
from traceserve.building.config.save_modes import Target
from traceserve.building.writers.contract import Written
from traceserve.building.writers.openvino import int8
from traceserve.building.writers.tracing.graphs import TRACED_BATCH, TRACED_LENGTH, trace
from traceserve.building.writers.tracing.wrapping import example, once, traceable
from traceserve.errors import ExportError, UnwritableError

if TYPE_CHECKING:
    from traceserve_runtime.manifest import Shapes
    from traceserve_runtime.tasks.contract import Task

MODEL_FILE = "model.xml"
WEIGHTS_FILE = "model.bin"  # OpenVINO looks for it beside the graph, under the same name
MOST_TEXTS = int8.TEXTS
_HALVED = ("bfloat16",)  # dtypes whose weights are stored in two bytes


def check(dtype: str, target: Target) -> None:
    """Raise ExportError without the packages, or if the gate could not run the result here."""
    try:
        openvino = library()
        if dtype == int8.DTYPE:
            int8.quantizer()
    except ImportError as error:
        raise ExportError(
            f"save_mode openvino needs more packages: pip install 'traceserve[openvino]' ({error})"
        ) from error
    if dtype != AUTO and not supported(openvino, dtype):
        raise ExportError(
            f"OpenVINO does not compute in {dtype} on this processor, so the archive could not be compared with the "
            'original here; take "dtype": "float32"'
        )


def lowered(original: Original, dtype: str, texts: Sequence[str]) -> Iterable[Original]:
    """Return the original: OpenVINO lowers its precision itself, for bfloat16 when it loads the model; for int8 several
    times, with more and more layers to leave."""
    if dtype == int8.DTYPE:
        return int8.to_calibrate(original, texts)
    return [replace(original, dtype=dtype)]


@contextlib.contextmanager
def _same_root_logger() -> Iterator[None]:
    """Give the root logger back as it was: OpenVINO leaves it at ERROR, with a filter of its own, if it fails."""
    root = logging.getLogger()
    level, filters, handlers = root.level, list(root.filters), list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers


def write(original: Original, task: Type[Task], shapes: Shapes, folder: Path, target: Target) -> Written:
    """Write the graph and its weights; see Writer. Raises ExportError with the model's own reason."""
    openvino = library()
    model = converted(openvino, original, task, shapes)
    versions = {"openvino": openvino.__version__.partition("-")[0]}
    if original.dtype == int8.DTYPE:
        model = int8.quantize_statically(model, original)
        versions["nncf"] = int8.quantizer().__version__
    openvino.save_model(model, str(folder / MODEL_FILE), compress_to_fp16=original.dtype in _HALVED)
    return Written(files=(WEIGHTS_FILE,), versions=versions)


def converted(openvino: Any, original: Original, task: Type[Task], shapes: Shapes) -> Any:
    """Trace the model, and return the trace as OpenVINO's: any batch and length, with the manifest's names."""
    length = max(shapes.lengths) if shapes.lengths else min(TRACED_LENGTH, original.max_length)
    outputs = tuple(output.name for output in task.outputs)
    inputs = example(original, TRACED_BATCH, length)
    module = once(original, outputs).eval()
    kind = type(original.model).__name__
    try:
        with warnings.catch_warnings(), traceable(original.model), torch.no_grad():
            warnings.simplefilter("ignore")  # tracer warnings: the gate checks their suspicions
            traced = trace(module, inputs)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise UnwritableError(f"torch.jit.trace cannot trace {kind}: {reason(error)}") from error
    failures = openvino.frontend
    try:
        with _same_root_logger():
            model = openvino.convert_model(traced, example_input=inputs)
    except (RuntimeError, failures.OpConversionFailure, failures.OpValidationFailure, failures.GeneralFailure) as error:
        last = (
            str(error).strip().rsplit("\n", 1)[-1].lstrip("- ")
        )  # a report, of which the first lines name its own files
        raise UnwritableError(f"OpenVINO cannot convert {kind}: {last}") from error
    for ports, names in ((model.inputs, original.inputs), (model.outputs, outputs)):
        if len(ports) != len(names):
            raise UnwritableError(f"OpenVINO converted {kind} to a graph with {len(ports)} of {', '.join(names)}")
        for port, name in zip(ports, names):
            port.get_tensor().set_names({name})
    return model
