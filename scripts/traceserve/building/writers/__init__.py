"""The writers of the save modes, one file or folder each."""

from __future__ import annotations

from typing import Dict

from traceserve.building.writers import aot_inductor, pretrained, shapes
from traceserve.building.writers.contract import Writer
from traceserve.building.writers.lowering import precision
from traceserve.building.writers.onnx import writer as onnx
from traceserve.building.writers.openvino import writer as openvino
from traceserve.building.writers.torchscript import gradients
from traceserve.building.writers.torchscript import writer as torchscript
from traceserve.building.writers.tracing import graphs

WRITERS: Dict[str, Writer] = {
    "torchscript": Writer(
        write=torchscript.write,
        model_file=graphs.MODEL_FILE,
        lowered=precision.lowered,
        shapes=shapes.with_graphs,
        check=torchscript.check,
        plainer=torchscript.plainer,
        note=torchscript.note,
        gradients=gradients.write_gradients,
    ),
    "pretrained": Writer(
        write=pretrained.write,
        model_file=pretrained.MODEL_FILE,
        lowered=precision.lowered,
        shapes=shapes.one_graph,
        check=pretrained.check,
        gradients=pretrained.gradients,
    ),
    "onnx": Writer(
        write=onnx.write,
        model_file=onnx.MODEL_FILE,
        lowered=onnx.lowered,
        shapes=shapes.one_graph,
        check=onnx.check,
    ),
    "openvino": Writer(
        write=openvino.write,
        model_file=openvino.MODEL_FILE,
        lowered=openvino.lowered,
        shapes=shapes.one_graph,
        check=openvino.check,
        most_texts=openvino.MOST_TEXTS,
        fixes_ranges=True,
    ),
    "aot_inductor": Writer(
        write=aot_inductor.write,
        model_file=aot_inductor.MODEL_FILE,
        lowered=precision.lowered,
        shapes=shapes.one_graph,
        check=aot_inductor.check,
    ),
}
