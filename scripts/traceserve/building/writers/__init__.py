"""One file per save mode: how it is written. The rows say what each can do; `formats` reads them."""

from __future__ import annotations

from typing import Dict

from traceserve.building.writers import aot_inductor, pretrained, shapes
from traceserve.building.writers.contract import Writer
from traceserve.building.writers.lowering import precision
from traceserve.building.writers.neuron import writer as neuron
from traceserve.building.writers.onnx import writer as onnx
from traceserve.building.writers.torchscript import writer as torchscript

WRITERS: Dict[str, Writer] = {
    "torchscript": Writer(
        write=torchscript.write,
        model_file=torchscript.MODEL_FILE,
        hardware=("cpu", "gpu", *neuron.HARDWARE),
        dtypes=("float32", "bfloat16", "float16", "int8"),
        loops=("float32", "bfloat16", "float16"),
        auto=precision.fastest,
        lowered=precision.lowered,
        shapes=shapes.with_graphs,
        check=torchscript.check,
        options=neuron.OPTIONS,
        fails_with=("onnx",),  # torch's exporter traces as torch.jit.trace does, once for all shapes
        plainer=torchscript.plainer,
    ),
    "pretrained": Writer(
        write=pretrained.write,
        model_file=pretrained.MODEL_FILE,
        hardware=("cpu", "gpu"),
        dtypes=("float32", "bfloat16", "float16"),
        loops=("float32", "bfloat16", "float16"),
        auto=precision.fastest,
        lowered=precision.lowered,
        shapes=shapes.one_graph,
        check=pretrained.check,
        options=(pretrained.TORCH_COMPILE,),
        fails_with=("torchscript", "onnx", "aot_inductor"),  # it runs the model as it is
        refuses=pretrained.refuses,
    ),
    "onnx": Writer(
        write=onnx.write,
        model_file=onnx.MODEL_FILE,
        hardware=("cpu",),
        dtypes=("float32", "int8"),
        loops=("float32",),
        auto=onnx.auto,
        lowered=onnx.lowered,
        shapes=shapes.one_graph,
        check=onnx.check,
        options=onnx.OPTIONS,
        measured_against="torchscript",
    ),
    "aot_inductor": Writer(
        write=aot_inductor.write,
        model_file=aot_inductor.MODEL_FILE,
        hardware=("cpu",),
        dtypes=("float32",),
        loops=(),  # torch.export does not take a cache that a model is given from outside
        auto=aot_inductor.auto,
        lowered=precision.lowered,
        shapes=shapes.one_graph,
        check=aot_inductor.check,
        measured_against="torchscript",
    ),
}
