"""The Open Inference Protocol (V2) of KServe and Triton.

It is distinguished from our own `{"inputs": [...]}` by its inputs, which are tensors of datatype BYTES. Each element is
a request; several tensors are the fields that they name. A single tensor of another name is the task's first field; if
the task requires several fields, each element is the JSON text of an object with them, optionally with its own
"parameters". A list field comes as JSON text. Paths in errors count the elements of `data` as if it were flat. Vectors
are returned as one FP32 tensor, everything else as one BYTES tensor with each answer's JSON. Over gRPC (ModelInfer)
TorchServe passes elements in base64, and converts any JSON value in an answer's elements to bytes, so answers are left
as they are. An answer without outputs kills it, so errors are outputs too.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

from traceserve_runtime.errors import InvalidRequest, TraceserveError
from traceserve_runtime.json_types import Json, JsonObject
from traceserve_runtime.protocols import binary_tensors
from traceserve_runtime.protocols.contract import Document, Response, Served
from traceserve_runtime.protocols.native import noted
from traceserve_runtime.protocols.wording import (
    JsonBudget,
    checked_string,
    kind_of,
    listed,
    nearest_name,
    parse_json,
    path_to,
    short,
)
from traceserve_runtime.tasks.contract import Answer, Task

OUTPUT = "output"  # the default name
_BODY_KEYS = ("id", "model_name", "model_version", "parameters", "inputs", "outputs")
_TENSOR_KEYS = ("name", "shape", "datatype", "data", "parameters")
# Parameters of V2 servers that mean nothing here.
_IGNORED_PARAMETERS = (
    "binary_data",
    "binary_data_output",
    "content_type",
    "headers",
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "priority",
    "timeout",
)


@dataclass(frozen=True)
class Tensors:
    """V2; `columns` has the path of each field's tensor, if fields have tensors."""

    id: Optional[str]
    output: str
    columns: Mapping[str, str]
    infer: bool = False  # through gRPC
    binary: bool = False  # the output follows the JSON

    def reply(self, answers: Sequence[Answer], served: Served) -> Response:
        document = self.document([noted(answer) for answer in answers], served)
        if not self.binary:
            return document
        body, headers = binary_tensors.written(document)
        return Document(body, binary_tensors.CONTENT_TYPE, headers)

    def document(self, answers: Sequence[Json], served: Served) -> JsonObject:
        named = {"model_name": served.name, "model_version": served.version}
        own = {} if self.id is None else {"id": self.id}
        return {**named, **own, "outputs": [{"name": self.output, **_encoded(list(answers), self.infer)}]}

    def field_path(self, index: int, where: str, name: Optional[str]) -> Optional[str]:
        name = name or ""
        end = min(i for i in (name.find("."), name.find("["), len(name)) if i >= 0)
        if name[:end] in self.columns:
            return f"{self.columns[name[:end]]}.data[{index}]{name[end:]}"
        if self.columns and name[:end] == "parameters":
            return name
        return f"{where}.{name}" if name else where


class Sent(NamedTuple):
    """The contents of a V2 body: each request's fields with their path, and parameters with theirs."""

    protocol: Tensors
    elements: List[Tuple[str, Mapping[str, object]]]
    parameters: List[Tuple[str, object]]


class _Tensor(NamedTuple):
    name: str
    elements: List[str]
    where: str


def are_tensors(inputs: object) -> bool:
    """Return whether the value of "inputs" is V2's."""
    return (
        isinstance(inputs, list)
        and bool(inputs)
        and all(isinstance(item, dict) and ("datatype" in item or {"data", "shape"} <= set(item)) for item in inputs)
    )


def infer_error(error: TraceserveError, body: object, served: Served) -> Json:
    """Return an error as ModelInfer's answer to `body`: an output tensor named "error"."""
    sent = body.get("id") if isinstance(body, dict) else None
    protocol = Tensors(sent if isinstance(sent, str) else "", "error", {}, infer=True)
    return protocol.document([error.to_json()["error"]], served)


def read_tensors(value: Mapping[str, Any], task: Type[Task], infer: bool = False) -> Sent:
    """Read a V2 body; raises InvalidRequest if it is not one, or its tensors are not texts.

    `infer`: it came through gRPC, with its texts in base64.
    """
    _only(value, _BODY_KEYS, "")
    id = None if value.get("id") is None else checked_string(value["id"], "id", "id")
    inputs: Sequence[Mapping[str, object]] = value["inputs"]
    tensors = [_tensor(item, f"inputs[{i}]", infer) for i, item in enumerate(inputs)]
    columns = _columns(tensors, task)
    output = _output(value.get("outputs"))
    places = {name: tensor.where for name, tensor in columns.items()}
    binary = binary_tensors.wanted(value, output)
    protocol = Tensors(id, str(output["name"]), places, infer, binary)
    fields = _rows(columns, task) if columns else _objects(tensors[0], task)
    elements = [(f"{tensors[0].where}.data[{i}]", item) for i, item in enumerate(fields)]
    parts = [("", value), ("outputs[0]", output), *((t.where, item) for t, item in zip(tensors, inputs))]
    return Sent(protocol, elements, [(where, _known(part.get("parameters"), task)) for where, part in parts])


def _tensor(item: Mapping[str, object], where: str, infer: bool) -> _Tensor:
    _only(item, _TENSOR_KEYS, where)
    for key in ("name", "datatype", "shape", "data"):
        if key not in item:
            raise InvalidRequest(f'"{key}" of a tensor is missing', path_to(where, key))
    name, datatype, data = checked_string(item["name"], "name", f"{where}.name"), item["datatype"], item["data"]
    if datatype != "BYTES":
        sent = short(json.dumps(datatype))
        raise InvalidRequest(
            f'the tensor "{short(name)}" has the datatype {sent}; texts are "BYTES"', f"{where}.datatype"
        )
    if not isinstance(data, list):
        raise InvalidRequest(f'"data" should be a list, not {kind_of(data)}', f"{where}.data")
    elements = _flat(data, [])
    count = _count(item["shape"], f"{where}.shape")
    if len(elements) != count:
        hint = "; texts come in contents.bytes_contents: TorchServe drops raw_input_contents" if infer else ""
        raise InvalidRequest(
            f'the tensor "{short(name)}" has {len(elements):,} elements, but by its shape {count:,}{hint}',
            f"{where}.data",
        )
    if not elements:
        raise InvalidRequest(f'the tensor "{short(name)}" is empty: it asks nothing', f"{where}.data")
    for i, element in enumerate(elements):
        if not isinstance(element, str):
            raise InvalidRequest(f"an element should be a string, not {kind_of(element)}", f"{where}.data[{i}]")
    texts = [str(element) for element in elements]
    if infer:
        texts = [_from_base64(text, f"{where}.data[{i}]") for i, text in enumerate(texts)]
    return _Tensor(name, texts, where)


def _from_base64(element: str, where: str) -> str:
    try:
        return base64.b64decode(element).decode("utf-8")
    except ValueError as error:
        start = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        raise InvalidRequest(f"an element is not UTF-8 text{start}", where) from None


def _count(shape: object, where: str) -> int:
    """Return the number of elements of a legal shape for a column of texts."""
    numbers = shape if isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 64 for n in shape) else None
    if numbers is None or len(numbers) > 2 or (len(numbers) == 2 and 1 not in numbers):
        raise InvalidRequest('"shape" should be [n], [n, 1], [1, n] or []', where)
    return math.prod(numbers)


def _flat(values: Sequence[Json], into: List[Json]) -> List[Json]:
    """Flatten nested lists, row by row."""
    for value in values:
        if isinstance(value, list):
            _flat(value, into)
        else:
            into.append(value)
    return into


def _only(value: Mapping[str, object], known: Sequence[str], where: str) -> None:
    for key in value:
        if key not in known:
            raise InvalidRequest(
                f'unknown key "{short(key)}"{nearest_name(key, known)}; {listed(known)} are known', path_to(where, key)
            )


def _output(outputs: object) -> Mapping[str, object]:
    """Return the requested output."""
    if outputs is None or outputs == []:
        return {"name": OUTPUT}
    if not isinstance(outputs, list):
        raise InvalidRequest(f'"outputs" should be a list, not {kind_of(outputs)}', "outputs")
    if len(outputs) > 1:
        raise InvalidRequest(f"there is one output, but {len(outputs):,} are asked for", "outputs")
    output = outputs[0]
    if not isinstance(output, dict) or "name" not in output:
        raise InvalidRequest('an output is an object like {"name": "..."}', "outputs[0]")
    _only(output, ("name", "parameters"), "outputs[0]")
    checked_string(output["name"], "name", "outputs[0].name")
    return output


def _known(parameters: object, task: Type[Task]) -> object:
    """Drop the parameters that belong to no task."""
    if not isinstance(parameters, dict):
        return {} if parameters is None else parameters
    return {key: own for key, own in parameters.items() if key not in _IGNORED_PARAMETERS or task.has_parameter(key)}


def _columns(tensors: Sequence[_Tensor], task: Type[Task]) -> Dict[str, _Tensor]:
    """Return each field's tensor; none if the elements of a single tensor hold all fields."""
    known = [field.name for field in task.fields]
    required = [field for field in task.fields if field.required]
    first = tensors[0]
    if len(tensors) == 1 and first.name not in known:
        return {known[0]: first} if len(required) <= 1 else {}
    columns: Dict[str, _Tensor] = {}
    for tensor in tensors:
        name = tensor.name
        if name not in known:
            raise InvalidRequest(
                f'the tensor "{short(name)}" is no field{nearest_name(name, known)}; {listed(known)} are known',
                f"{tensor.where}.name",
            )
        if name in columns:
            raise InvalidRequest(f'two tensors are named "{name}"', f"{tensor.where}.name")
        if len(tensor.elements) != len(first.elements):
            raise InvalidRequest(
                f'the tensor "{name}" has {len(tensor.elements):,} elements, but "{first.name}" '
                f"{len(first.elements):,}",
                f"{tensor.where}.data",
            )
        columns[name] = tensor
    for field in required:
        if field.name not in columns:
            raise InvalidRequest(f'no tensor is named "{field.name}": {field.description}', "inputs")
    return columns


def _rows(columns: Mapping[str, _Tensor], task: Type[Task]) -> List[Mapping[str, object]]:
    """Return each request's fields; each tensor holds one field."""
    kinds = {field.name: field.kind for field in task.fields}
    budget = JsonBudget(max(len(tensor.elements) for tensor in columns.values()))
    values = [tensor.elements if kinds[name] == "text" else _parsed(tensor, budget) for name, tensor in columns.items()]
    return [dict(zip(columns, row)) for row in zip(*values)]


def _objects(tensor: _Tensor, task: Type[Task]) -> List[Mapping[str, object]]:
    """Return each request's fields; each element holds all of them."""
    needed = listed(field.name for field in task.fields if field.required)
    for i, text in enumerate(tensor.elements):
        if text.lstrip()[:1] != "{":
            raise InvalidRequest(
                f"a text alone is not enough: send tensors named {needed}, or elements that are the JSON text of an "
                f"object with {needed}",
                f"{tensor.where}.data[{i}]",
            )
    objects = _parsed(tensor, JsonBudget(len(tensor.elements)))
    return [each for each in objects if isinstance(each, dict)]  # all of them: each begins with a brace


def _parsed(tensor: _Tensor, budget: JsonBudget) -> List[object]:
    return [parse_json(text, f"{tensor.where}.data[{i}]", budget=budget) for i, text in enumerate(tensor.elements)]


def _encoded(answers: List[Json], infer: bool) -> JsonObject:
    """Return the answers as an output tensor."""
    shape = _shape(answers)
    if shape is not None and len(shape) > 1:
        return {"shape": list(shape), "datatype": "FP32", "data": _flat(answers, [])}
    if infer:
        return {"shape": [len(answers)], "datatype": "BYTES", "data": answers}
    texts = [json.dumps(answer, ensure_ascii=False, separators=(",", ":")) for answer in answers]
    return {"shape": [len(texts)], "datatype": "BYTES", "data": texts}


def _shape(value: object) -> Optional[Tuple[int, ...]]:
    """Return the shape of evenly nested lists of numbers; None for anything else."""
    if not isinstance(value, list) or not value:
        return None
    if {type(item) for item in value} <= {int, float}:
        return (len(value),)
    shapes = {_shape(item) for item in value}
    inner = shapes.pop()
    return None if shapes or inner is None else (len(value), *inner)
