"""Writes OpenVINO models with one file of weights: what several graphs share is there once, and workers map it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO, Dict, Mapping, Tuple
from xml.etree import ElementTree

WEIGHTS_FILE = "model.bin"  # OpenVINO looks for it beside model.xml, under the same name
_ALIGNMENT = 64

Offsets = Dict[Tuple[int, bytes], int]  # from a constant's size and digest to its offset


def save_models(openvino: Any, models: Mapping[str, Any], folder: Path, halved: bool) -> Tuple[str, ...]:
    """Write each OpenVINO model into the file of its name, the first as `model.xml`; returns all files' names."""
    first, *others = models
    openvino.save_model(models[first], str(folder / first), compress_to_fp16=halved)
    offsets: Offsets = {}
    with (folder / WEIGHTS_FILE).open("r+b") as whole:
        if others:
            for constant in _constants(ElementTree.parse(folder / first)):
                offsets.setdefault(*_placed(constant, whole))
        for file in others:
            openvino.save_model(models[file], str(folder / file), compress_to_fp16=halved)
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
