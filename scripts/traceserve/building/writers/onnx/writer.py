"""The save mode onnx: torch's exporter, ONNX Runtime's fusions and int8, and weights in one file beside the graphs."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterable, List, Sequence, Tuple, Type

from traceserve_runtime.runtimes.onnx import (
    GRAPHS,
    INT8_SINCE,
    LEVEL,
    MODEL,
    START_GRAPH,
    STEP,
    int8_known,
    onnx_runtime,
)
from traceserve_runtime.tasks.contract import TextOrPair

from traceserve.building.checkpoints.original import Original
from traceserve.building.config.save_modes import ONNX_FLOAT32_FILE, Target
from traceserve.building.writers.contract import Written
from traceserve.building.writers.lowering import precision
from traceserve.building.writers.onnx import export, int8, weights
from traceserve.building.writers.onnx import optimization as onnx_optimization
from traceserve.building.writers.onnx.export import OnnxGraph
from traceserve.building.writers.onnx.int8 import RoundedLinear, SmoothedLinear
from traceserve.building.writers.tracing.graphs import TRACED_BATCH, TRACED_LENGTH
from traceserve.errors import ExportError

if TYPE_CHECKING:
    import onnx
    from traceserve_runtime.manifest import Shapes
    from traceserve_runtime.tasks.contract import Task

MODEL_FILE, START_FILE = "model.onnx", "start.onnx"
WEIGHTS = ".data"  # suffix of the weights file, after the graph's name


def check(dtype: str, target: Target) -> None:
    """Raise ExportError without the exporter, or if the gate could not run the result."""
    try:
        import onnx  # noqa: F401

        onnxruntime = onnx_runtime()
    except ImportError as error:
        raise ExportError(f"save_mode onnx needs more packages: pip install 'traceserve[onnx]' ({error})") from error
    if dtype == "int8" and not int8_known(onnxruntime.__version__):
        raise ExportError(
            f"dtype int8 needs onnxruntime {INT8_SINCE} or newer, to build as to serve; this is {onnxruntime.__version__}"
        )


def lowered(original: Original, dtype: str, texts: Sequence[TextOrPair], hardware: str) -> Iterable[Original]:
    """Return the original; for int8 one with smoothed layers to quantize."""
    if dtype != "int8":
        return precision.lowered(original, dtype, texts, hardware)
    return precision.to_int8(original, texts, layer=SmoothedLinear, measured=RoundedLinear)


def write(original: Original, task: Type[Task], shapes: Shapes, folder: Path, target: Target) -> Written:
    """Write the graphs and their weights; see Writer. Raises ExportError with the model's own reason."""
    optimization = target.options["optimization"]
    graphs, step_inputs = _graphs(original, task, shapes)
    level = onnx_optimization.LEVELS[optimization]
    made: Dict[str, onnx.ModelProto] = {}
    plain: Dict[str, onnx.ModelProto] = {}
    fused: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix=".onnx.", dir=folder) as name:
        for number, graph in enumerate(graphs):
            scratch = Path(name, str(number))
            scratch.mkdir()
            model = export.export_graph(graph, original, target.options["opset"], scratch, level.tool)
            if target.options["keep_float32"] and int8.quantized_layers(original.model):
                plain[graph.file] = weights.copy_model(model)
            int8.quantize(model, original.model)
            model, counts = onnx_optimization.fuse(model, original.model, level, bool(task.loop))
            fused.update(counts)
            made[graph.file] = model
        files = weights.write_models(made, folder, MODEL_FILE + WEIGHTS)
        if plain:
            files += weights.write_models({ONNX_FLOAT32_FILE: plain[MODEL_FILE]}, folder, ONNX_FLOAT32_FILE + WEIGHTS)
    return Written(
        step_inputs,
        tuple(file for file in files if file != MODEL_FILE),
        {
            GRAPHS: {graph.name: graph.file for graph in graphs},
            LEVEL: level.session,
            "opset": target.options["opset"],
            "optimization": optimization,
            "fused": dict(sorted(fused.items())),
        },
        {"onnxruntime": onnx_runtime().__version__},
    )


def _graphs(original: Original, task: Type[Task], shapes: Shapes) -> Tuple[List[OnnxGraph], Tuple[str, ...]]:
    """Return the graphs to export: one for all shapes, or those of a loop; and a step's inputs."""
    if task.loop:
        start, step, step_inputs = export.of_loop(original, task, TRACED_BATCH, TRACED_LENGTH)
        return [
            step._replace(name=STEP, file=MODEL_FILE),
            start._replace(name=START_GRAPH, file=START_FILE),
        ], step_inputs
    length = max(shapes.lengths) if shapes.lengths else min(TRACED_LENGTH, original.max_length)
    graph = export.of_shape(original, task, TRACED_BATCH, length)
    return [graph._replace(name=MODEL, file=MODEL_FILE)], ()
