"""One file per save mode: how it is written. The rows say what each can do; `formats` reads them."""

from __future__ import annotations

from typing import Dict

from traceserve import precision
from traceserve.writers import aot_inductor, compiled, onnx, pretrained, shapes, torchscript
from traceserve.writers.contract import Writer

WRITERS: Dict[str, Writer] = {
    "torchscript": Writer(
        write=torchscript.write,
        model_file=torchscript.MODEL_FILE,
        hardware=("cpu", "gpu", *compiled.HARDWARE),
        dtypes=("float32", "bfloat16", "float16", "int8"),
        loops=("float32", "bfloat16", "float16"),
        auto=precision.fastest,
        lowered=precision.lowered,
        shapes=shapes.with_graphs,
        check=torchscript.check,
        options=compiled.OPTIONS,
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
