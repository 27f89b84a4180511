"""From what a client sent to requests: the edge where input is checked, once.

A body is a text (text/plain, or a JSON string), an object, or a list of these. An object holds the task's fields
(`{"text": ...}`), or `{"inputs": ..., "parameters": {...}}`, or `{"data": ...}`, whose value is a text, fields, or a list; or
it is of another protocol, see `protocols`.
A form holds the same fields; a form whose only key has no value is a text. (`curl -d TEXT` makes such forms. Of the text
in one, TorchServe's frontend forwards only what stands before a = or &: the rest of it never reaches the worker, and
what did is refused then. See `_is_whole`.)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Type, Union

from traceserve_runtime.errors import InputTooLong, InvalidRequest
from traceserve_runtime.protocols import (
    Instances,
    Plain,
    Protocol,
    are_tensors,
    check_string,
    kind_of,
    listed,
    nearest,
    parse_json,
    path_to,
    read_tensors,
    short,
)
from traceserve_runtime.tasks.contract import Request, Task

# `target` names the class that the pytorch/serve example explains; its clients send it with every request.
_UNUSED_FIELDS = ("target",)
_LEGAL_BODIES = (
    'send a text as text/plain, or JSON: a string, {"text": "..."}, {"inputs": ..., "parameters": {...}}, or a list'
)
_NOT_A_FORM = (
    "send a text by curl -H 'Content-Type: text/plain' --data-binary TEXT, or JSON by curl -H 'Content-Type: "
    "application/json' -d JSON"
)


class Headers(NamedTuple):
    """What is read of a request's headers: the content type in lower case ("": unknown), and the body's length."""

    content_type: str = ""
    content_length: Optional[int] = None


@dataclass(frozen=True)
class Body:
    """What one HTTP request asks, and the protocol in which it is answered."""

    requests: List[Request]
    protocol: Protocol

    @property
    def streamable(self) -> bool:
        """Whether its answer may be plain text, in pieces."""
        return self.protocol == Plain(False)

    def place(self, index: int, field: Optional[str]) -> Optional[str]:
        """The path in the client's body of a field of the request `index`."""
        return self.protocol.place(index, self.requests[index].where, field)


def parse(row: Mapping[str, Any], headers: Headers, task: Type[Task], group: int, most: int) -> Body:
    """The requests in one row of TorchServe's batch.

    `row` holds `body`, or the fields of a form; `group` numbers the row, and `most` is the limit on its requests.
    Raises InvalidRequest or InputTooLong, which name the field.
    """
    value = _body(row["body"], headers.content_type) if "body" in row else _form(row, headers, task)
    try:
        body = _read(value, task, group)
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    if len(body.requests) > most:
        raise InputTooLong(f"the list has {len(body.requests):,} texts; one request may have {most:,}; send several")
    return body


def _body(value: Any, content_type: str) -> Any:
    is_json = "json" in content_type
    if not isinstance(value, (bytes, bytearray)) and (value != "" or is_json):
        return value  # TorchServe has parsed JSON and decoded text
    text = _decode(value, "body")
    if not text:
        raise InvalidRequest(f"the body is empty; {_LEGAL_BODIES}")
    if is_json:
        return parse_json(text)
    if content_type.startswith("text/"):
        return text
    return _guess(text)


def _form(row: Mapping[str, Any], headers: Headers, task: Type[Task]) -> Any:
    """The fields of a form; or the text, or JSON, that was sent in the place of one."""
    if not row and not headers.content_length:
        raise InvalidRequest(f"the body is empty; {_LEGAL_BODIES}")
    # A part of a multipart form that says it is JSON arrives parsed.
    parsed = {str(key): value for key, value in row.items() if not isinstance(value, (bytes, bytearray, str))}
    fields = {str(key): _decode(value, str(key)) for key, value in row.items() if str(key) not in parsed}
    if not headers.content_type.startswith("multipart/") and not _is_whole(fields, headers.content_length):
        raise InvalidRequest(f"the body was sent as a form, of which only a part arrived; {_NOT_A_FORM}")
    known = {"data", "inputs", "parameters", *_UNUSED_FIELDS, *(field.name for field in task.fields)}
    if parsed or known & set(fields):
        documents = {"parameters", *(field.name for field in task.fields if field.kind != "text")}
        return {
            **{key: parse_json(value, key) if key in documents else value for key, value in fields.items()},
            **parsed,
        }
    body = "&".join(key + ("=" + value if value else "") for key, value in fields.items())
    if body.lstrip()[:1] in ("{", "[", '"'):
        return _guess(body)
    if len(fields) == 1 and not next(iter(fields.values())):
        return body
    raise InvalidRequest(f"the form has none of the fields {listed(f.name for f in task.fields)}; {_NOT_A_FORM}")


def _is_whole(fields: Mapping[str, str], content_length: Optional[int]) -> bool:
    """Whether the fields that arrived account for the length of the form that was sent.

    The frontend (netty 4.1.53) drops what follows the last & of a form, or a whole form, where it has no =. What
    arrives is decoded, so its length is compared under each usual way of encoding it: a cut form that by chance has the
    length of another encoding is not noticed.
    """
    if content_length is None:
        return True
    separators = max(0, 2 * len(fields) - 1)
    bare = sum(not value for value in fields.values())  # their = may not have been sent
    text = "".join(key + value for key, value in fields.items()).encode("utf-8", "surrogatepass")
    lengths = {len(text)}
    for unreserved in (b"-_.~", b"-_.*", b"-_.~!'()*"):
        escaped = sum(not (chr(byte).isalnum() and byte < 128) and byte not in unreserved for byte in text)
        lengths |= {len(text) + 2 * escaped, len(text) + 2 * (escaped - text.count(b" "))}
    return any(n + separators - bare <= content_length <= n + separators + 1 for n in lengths)


def _guess(text: str) -> Any:
    """JSON where it is, else text: for a body whose content type is unknown."""
    if text.lstrip()[:1] not in ("{", "[", '"'):
        return text
    try:
        return parse_json(text)
    except InvalidRequest:
        if text.lstrip()[0] == "{":
            raise
        return text


def _decode(value: Union[str, bytes, bytearray], field: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the {short(field)} is not UTF-8 text at byte {error.start}", short(field)) from None


def _read(value: Any, task: Type[Task], group: int) -> Body:
    """What parsed JSON asks, in the protocol that it is of."""
    if isinstance(value, dict) and "instances" in value:
        if not isinstance(value["instances"], list):
            raise InvalidRequest(f'"instances" should be a list, not {kind_of(value["instances"])}', "instances")
        body = Body(_enveloped(value, "instances", task, group, "")[0], Instances())
    elif isinstance(value, dict) and are_tensors(value.get("inputs")):
        body = _from_tensors(value, task, group)
    else:
        requests, is_list = _requests(value, task, group, "")
        body = Body(requests, Plain(is_list))
    if not body.requests:
        where = "instances" if isinstance(body.protocol, Instances) else None
        raise InvalidRequest("the list is empty: it asks nothing", where)
    return body


def _from_tensors(value: Mapping[str, Any], task: Type[Task], group: int) -> Body:
    """The requests of a body of V2; the parameters of the body and of every tensor hold for each."""
    sent = read_tensors(value, task)
    parameters: Dict[str, Any] = {}
    for where, own in sent.parameters:
        for key, item in _parameters(own, task, where).items():
            if parameters.setdefault(key, item) != item:
                raise InvalidRequest(f'"{key}" stands in two places, and differs', path_to(where, f"parameters.{key}"))
    requests: List[Request] = []
    for i, (where, fields) in enumerate(sent.elements):
        try:
            [request], _ = _requests(fields, task, group, "", enveloped=True)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, sent.protocol.place(i, where, error.field)) from None
        requests.append(Request(request.inputs, {**parameters, **request.parameters}, group, where))
    return Body(requests, sent.protocol)


def _requests(
    value: Any, task: Type[Task], group: int, where: str, enveloped: bool = False
) -> Tuple[List[Request], bool]:
    """The requests that parsed JSON at the path `where` asks, and whether it is a list."""
    if isinstance(value, list):
        items = [_requests(item, task, group, f"{where}[{i}]", enveloped) for i, item in enumerate(value)]
        for i, (_, is_list) in enumerate(items):
            if is_list:
                raise InvalidRequest("a list holds texts and objects, not lists", f"{where}[{i}]")
        return [request for requests, _ in items for request in requests], True
    if isinstance(value, str):
        first = task.fields[0].name
        if sum(field.required for field in task.fields) > 1:
            needed = listed(field.name for field in task.fields if field.required)
            raise InvalidRequest(f"a text alone is not enough: send an object with {needed}", where or None)
        return [Request(_fields({first: value}, task, where), {}, group, where)], False
    if not isinstance(value, dict):
        raise InvalidRequest(f"{kind_of(value)} is not a request; {_LEGAL_BODIES}", where or None)
    envelope = next((key for key in ("inputs", "data") if key in value), None)
    if envelope is None or enveloped:
        parameters = _parameters(value.get("parameters", {}), task, where)
        fields = {key: item for key, item in value.items() if key not in ("parameters", *_UNUSED_FIELDS)}
        return [Request(_fields(fields, task, where), parameters, group, where)], False
    return _enveloped(value, envelope, task, group, where)


def _enveloped(
    value: Mapping[str, Any], envelope: str, task: Type[Task], group: int, where: str
) -> Tuple[List[Request], bool]:
    """The requests of `{"inputs": ..., "parameters": {...}}` or `{"data": ...}`; the parameters hold for each."""
    for key in value:
        if key not in (envelope, "parameters", *_UNUSED_FIELDS):
            raise InvalidRequest(f'"{short(key)}" cannot stand beside "{envelope}"', path_to(where, key))
    parameters = _parameters(value.get("parameters", {}), task, where)
    # An instance may be {"data": ...}, as in TorchServe's own examples of KServe.
    enveloped = envelope != "instances"
    inner, is_list = _requests(value[envelope], task, group, path_to(where, envelope), enveloped)
    return [Request(r.inputs, {**parameters, **r.parameters}, group, r.where) for r in inner], is_list


def _fields(fields: Mapping[str, Any], task: Type[Task], where: str) -> Mapping[str, Any]:
    known = {field.name: field for field in task.fields}
    for key, value in fields.items():
        if key in (parameter.name for parameter in task.all_parameters()):
            raise InvalidRequest(
                f'"{key}" is a parameter: send it as "parameters": {{"{key}": ...}}', path_to(where, key)
            )
        if key not in known:
            raise InvalidRequest(
                f'unknown field "{short(key)}"{nearest(key, known)}; {listed(known)} are known', path_to(where, key)
            )
        _check_kind(value, known[key].kind, key, path_to(where, key))
    for field in task.fields:
        if field.required and field.name not in fields:
            raise InvalidRequest(f'"{field.name}" is missing: {field.description}', path_to(where, field.name))
    try:
        task.check(fields)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, path_to(where, error.field) if error.field else where or None) from None
    return fields


def _check_kind(value: Any, kind: str, key: str, path: str) -> None:
    """Raise InvalidRequest for a field's value that is not of its kind."""
    if kind == "text":
        check_string(value, key, path)
        return
    if not isinstance(value, list):
        raise InvalidRequest(f'"{key}" should be a list, not {kind_of(value)}', path)
    for i, item in enumerate(value):
        if kind == "texts":
            _check_kind(item, "text", key, f"{path}[{i}]")
            continue
        if not isinstance(item, dict) or set(item) != {"role", "content"}:
            raise InvalidRequest('a message is an object like {"role": "user", "content": "..."}', f"{path}[{i}]")
        for name, text in item.items():
            _check_kind(text, "text", name, f"{path}[{i}].{name}")


def _parameters(parameters: Any, task: Type[Task], where: str) -> Mapping[str, Any]:
    path = path_to(where, "parameters")
    if not isinstance(parameters, dict):
        raise InvalidRequest(f'"parameters" should be an object, not {kind_of(parameters)}', path)
    known = {parameter.name: parameter for parameter in task.all_parameters()}
    for key, value in parameters.items():
        if key not in known:
            raise InvalidRequest(
                f'unknown parameter "{short(key)}"{nearest(key, known)}; {listed(known)} are known', path_to(path, key)
            )
        if not known[key].accepts(value):
            raise InvalidRequest(
                f'"{key}" should be {known[key].legal}, not {short(json.dumps(value))}', path_to(path, key)
            )
    return parameters
