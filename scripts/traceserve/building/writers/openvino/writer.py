"""The save mode openvino: the traced graph, converted by OpenVINO, and its weights in a file beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, Sequence, Tuple, Type

from traceserve_runtime import processor
from traceserve_runtime.runtimes.openvino import ROUNDED, library, supported
from traceserve_runtime.runtimes.openvino_steps import START_FILE_KEY
from traceserve_runtime.tasks.contract import TextOrPair

from traceserve.building.checkpoints.original import Original
from traceserve.building.config.dtypes import AUTO
from traceserve.building.config.save_modes import Target
from traceserve.building.writers.contract import Written
from traceserve.building.writers.lowering.precision import check_processor
from traceserve.building.writers.openvino import int8, int8_weights
from traceserve.building.writers.openvino.conversion import convert_traced
from traceserve.building.writers.openvino.loops import loop_models
from traceserve.building.writers.openvino.quantizer import DTYPE, quantizer
from traceserve.building.writers.openvino.weights import save_models
from traceserve.building.writers.tracing.graphs import TRACED_BATCH, TRACED_LENGTH
from traceserve.building.writers.tracing.wrapping import example, once
from traceserve.errors import ExportError

if TYPE_CHECKING:
    from traceserve_runtime.manifest import Shapes
    from traceserve_runtime.tasks.contract import Task

MODEL_FILE = "model.xml"
START_FILE = "start.xml"
MOST_TEXTS = int8.TEXTS
_HALVED = ("bfloat16",)  # dtypes whose weights are stored in two bytes


def check(dtype: str, target: Target) -> None:
    """Raise ExportError without the packages, or if the gate could not run the result here."""
    try:
        openvino = library()
        if dtype == DTYPE:
            quantizer()
    except ImportError as error:
        raise ExportError(
            f"save_mode openvino needs more packages: pip install 'traceserve[openvino]' ({error})"
        ) from error
    if dtype != AUTO and not supported(openvino, dtype):
        raise ExportError(
            f"OpenVINO does not compute in {dtype} on this processor, so the archive could not be compared with the "
            'original here; take "dtype": "float32"'
        )


def lowered(original: Original, dtype: str, texts: Sequence[TextOrPair], hardware: str) -> Iterable[Original]:
    """Return the original: OpenVINO lowers its precision itself, for bfloat16 when it loads the model; for int8 several
    times, with more and more layers to leave."""
    if dtype == DTYPE:
        if not original.loop:  # whose weights alone are rounded
            check_processor(dtype)
        return int8_weights.to_round(original, texts) if original.loop else int8.to_calibrate(original, texts)
    return [replace(original, dtype=dtype)]


def write(original: Original, task: Type[Task], shapes: Shapes, folder: Path, target: Target) -> Written:
    """Write the graphs and their weights; see Writer. Raises ExportError with the model's own reason."""
    openvino = library()
    versions = {"openvino": openvino.__version__.partition("-")[0]}
    if original.dtype == DTYPE:
        versions["nncf"] = quantizer().__version__
    graphs, step_inputs = _graphs(openvino, original, task, shapes)
    files = save_models(openvino, graphs, folder, original.dtype in _HALVED)
    runtime: Dict[str, object] = {START_FILE_KEY: START_FILE} if START_FILE in graphs else {}
    if original.dtype == DTYPE and task.loop:
        runtime[ROUNDED] = processor.native(original.dtype)  # the gate sees what this processor computes
    return Written(step_inputs, files[1:], runtime, versions)


def _graphs(
    openvino: Any, original: Original, task: Type[Task], shapes: Shapes
) -> Tuple[Dict[str, Any], Tuple[str, ...]]:
    """Return OpenVINO's models by file: one for all shapes, or those of a loop; and a step's inputs."""
    if not task.loop:
        model = converted(openvino, original, task, shapes)
        return {MODEL_FILE: int8.quantize_statically(model, original) if original.dtype == DTYPE else model}, ()
    models = loop_models(openvino, original, [output.name for output in task.outputs])
    graphs = {MODEL_FILE: models.step, **({} if models.start is None else {START_FILE: models.start})}
    if original.dtype == DTYPE:
        graphs = {file: int8_weights.round_weights(model, original) for file, model in graphs.items()}
    return graphs, models.inputs


def converted(openvino: Any, original: Original, task: Type[Task], shapes: Shapes) -> Any:
    """Trace a model that runs once, and return the trace as OpenVINO's: any batch and length, with the manifest's
    names."""
    length = max(shapes.lengths) if shapes.lengths else min(TRACED_LENGTH, original.max_length)
    outputs = tuple(output.name for output in task.outputs)
    module = once(original, outputs)
    return convert_traced(openvino, original, module, example(original, TRACED_BATCH, length), original.inputs, outputs)
