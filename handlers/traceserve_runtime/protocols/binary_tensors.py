"""Binary tensors of the Open Inference Protocol: the tensors' bytes follow the JSON, whose length is in a header.

Tritonclient sends and requests them by default. A BYTES element is its length (4 bytes, little-endian), then its bytes;
FP32 is little-endian too.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from traceserve_runtime.errors import InvalidRequest
from traceserve_runtime.protocols.wording import JsonBudget, kind_of, parse_json

LENGTH_HEADER = "Inference-Header-Content-Length"
CONTENT_TYPE = "application/octet-stream"
_SIZE = "binary_data_size"


def read_binary(body: bytes, header_length: int, most: int = 0) -> object:
    """Return the JSON of a body with its binary tensors' elements as "data"; raises InvalidRequest, or InputTooLong where
    it has more values than `most` requests need."""
    if header_length > len(body):
        raise InvalidRequest(f"{LENGTH_HEADER} is {header_length:,}, but the body has {len(body):,} bytes", "body")
    try:
        text = body[:header_length].decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the JSON before the tensors is not UTF-8 text at byte {error.start}", "body") from None
    value = parse_json(text, "body", budget=JsonBudget(most))
    if not isinstance(value, dict) or not isinstance(value.get("inputs"), list):
        raise InvalidRequest('the JSON before the tensors should be an object with a list of "inputs"', "inputs")
    start = header_length
    for i, item in enumerate(value["inputs"]):
        size = _size_of(item, f"inputs[{i}]") if isinstance(item, dict) else None
        if size is None:
            continue
        if start + size > len(body):
            raise InvalidRequest(f"the body ends before the {size:,} bytes of this tensor", f"inputs[{i}]")
        item["data"] = _elements(body[start : start + size], item.get("datatype"), f"inputs[{i}]")
        start += size
    if start != len(body):
        raise InvalidRequest(f"{len(body) - start:,} bytes follow the last tensor", "body")
    return value


def _size_of(item: Dict[str, object], where: str) -> Optional[int]:
    """Pop the parameter with a tensor's size in bytes behind the JSON; None if its data is inline."""
    parameters = item.get("parameters")
    if not isinstance(parameters, dict) or _SIZE not in parameters:
        return None
    if "data" in item:
        raise InvalidRequest(f'a tensor has "data" or {_SIZE}, not both', where)
    size = parameters.pop(_SIZE)
    if type(size) is not int or size < 0:
        raise InvalidRequest(f'"{_SIZE}" should be a whole number, not {kind_of(size)}', f"{where}.parameters.{_SIZE}")
    return size


def _elements(raw: bytes, datatype: object, where: str) -> List[str]:
    if datatype != "BYTES":
        return []  # whoever reads the datatype reports it
    elements: List[str] = []
    start = 0
    while start < len(raw):
        if start + 4 > len(raw):
            raise InvalidRequest("the tensor ends within the length of an element", f"{where}.data[{len(elements)}]")
        (length,) = struct.unpack_from("<I", raw, start)
        start += 4
        if start + length > len(raw):
            raise InvalidRequest("the tensor ends within an element", f"{where}.data[{len(elements)}]")
        try:
            elements.append(raw[start : start + length].decode("utf-8"))
        except UnicodeDecodeError as error:
            place = f"{where}.data[{len(elements)}]"
            raise InvalidRequest(f"an element is not UTF-8 text at byte {error.start}", place) from None
        start += length
    return elements


def wanted(value: Mapping[str, object], output: Mapping[str, object]) -> bool:
    """Return whether the output is requested in binary."""
    own, all_outputs = (part.get("parameters") for part in (output, value))
    if isinstance(own, dict) and "binary_data" in own:
        return bool(own["binary_data"])
    return isinstance(all_outputs, dict) and bool(all_outputs.get("binary_data_output"))


def written(document: Mapping[str, Any]) -> Tuple[bytes, Dict[str, str]]:
    """Return a body with `document`'s outputs behind its JSON, and the header that says where they begin."""
    outputs, tensors = [], []
    for output in document["outputs"]:
        rest = {key: item for key, item in output.items() if key != "data"}
        tensors.append(_encoded(output["datatype"], output["data"]))
        outputs.append({**rest, "parameters": {_SIZE: len(tensors[-1])}})
    head = json.dumps({**document, "outputs": outputs}, ensure_ascii=False).encode("utf-8", "replace")
    return b"".join([head, *tensors]), {LENGTH_HEADER: str(len(head))}


def _encoded(datatype: str, data: List[Any]) -> bytes:
    if datatype == "FP32":
        return np.array(data, dtype="<f4").tobytes()
    elements = [text.encode("utf-8", "replace") for text in data]
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)
