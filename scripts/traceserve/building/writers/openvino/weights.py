"""Writes OpenVINO models with one file of weights: what several graphs share is there once, and workers map it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO, Dict, Mapping, Tuple
from xml.etree import ElementTree

WEIGHTS_FILE = "model.bin"  # OpenVINO looks for it beside model.xml, under the same name
_ALIGNMENT = 64
_COMPRESSED = "_compressed"  # what OpenVINO adds to the name of a constant that it has halved

Offsets = Dict[Tuple[int, bytes], int]  # from a constant's size and digest to its offset


def save_models(openvino: Any, models: Mapping[str, Any], folder: Path, halved: bool) -> Tuple[str, ...]:
    """Write each OpenVINO model into the file of its name, the first as `model.xml`; returns all files' names. `halved`: with
    its matrices in float16."""
    first, *others = models
    _save(openvino, models[first], folder / first, halved)
    offsets: Offsets = {}
    with (folder / WEIGHTS_FILE).open("r+b") as whole:
        if others:
            for constant in _constants(ElementTree.parse(folder / first)):
                offsets.setdefault(*_placed(constant, whole))
        for file in others:
            _save(openvino, models[file], folder / file, halved)
            own = (folder / file).with_suffix(".bin")
            graph = ElementTree.parse(folder / file)
            with own.open("rb") as weights:
                for constant in _constants(graph):
                    key, offset = _placed(constant, weights)
                    if key not in offsets:
                        offsets[key] = _append(_read(weights, offset, key[0]), whole)
                    constant.set("offset", str(offsets[key]))
            own.unlink()
            graph.write(folder / file, encoding="utf-8", xml_declaration=True)
    return (*models, WEIGHTS_FILE)


def _save(openvino: Any, model: Any, file: Path, halved: bool) -> None:
    """Write one model. OpenVINO halves every constant; all that are no matrices are put back: an error of a rotary embedding's
    frequencies grows with the position."""
    openvino.save_model(model, str(file), compress_to_fp16=halved)
    if not halved:
        return
    vectors = {f"{node.friendly_name}{_COMPRESSED}": node.data for node in model.get_ordered_ops() if _is_vector(node)}
    graph = ElementTree.parse(file)
    with file.with_suffix(".bin").open("r+b") as weights:
        for layer in graph.iterfind(".//layer[@type='Const']"):
            name, constant, port = layer.get("name", ""), layer.find("data"), layer.find("output/port")
            if name in vectors and constant is not None and port is not None:
                numbers = vectors[name].tobytes()
                found = {"element_type": "f32", "offset": str(_append(numbers, weights)), "size": str(len(numbers))}
                constant.attrib.update(found)
                port.set("precision", "FP32")
    graph.write(file, encoding="utf-8", xml_declaration=True)


def _is_vector(node: Any) -> bool:
    """Return whether this is a constant in float32 with at most one dimension of more than one element."""
    if node.get_type_name() != "Constant" or node.get_element_type().get_type_name() != "f32":
        return False
    return len([size for size in node.shape if size > 1]) < 2


def _constants(graph: Any) -> Any:
    """Return the elements of a graph's constants that say where their numbers are."""
    return graph.findall(".//layer[@type='Const']/data")


def _placed(constant: Any, weights: BinaryIO) -> Tuple[Tuple[int, bytes], int]:
    """Return a constant's size and digest, and its offset."""
    size, offset = int(constant.get("size")), int(constant.get("offset"))
    return (size, hashlib.sha256(_read(weights, offset, size)).digest()), offset


def _read(weights: BinaryIO, offset: int, size: int) -> bytes:
    weights.seek(offset)
    return weights.read(size)


def _append(numbers: bytes, whole: BinaryIO) -> int:
    end = whole.seek(0, 2)
    whole.write(b"\0" * (-end % _ALIGNMENT))
    offset = whole.tell()
    whole.write(numbers)
    return offset
