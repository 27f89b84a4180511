"""Turns a client's body into requests. Input is checked here, once.

A body is text or parsed JSON (see `bodies`): a string, an object, or a list of these. An object holds the task's fields
(`{"text": ...}`), or `{"inputs": ..., "parameters": {...}}`, or `{"data": ...}`, whose value is a text, fields, or a
list; or it belongs to another protocol, see `protocols`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Dict, List, Mapping, Tuple, Type

from traceserve_runtime.errors import InputTooLong, InvalidRequest, TraceserveError
from traceserve_runtime.protocols import bodies
from traceserve_runtime.protocols.bodies import LEGAL_BODIES, UNUSED_FIELDS, Headers
from traceserve_runtime.protocols.contract import Body, ErrorFormat, Refusal, Served
from traceserve_runtime.protocols.decoding import decompress
from traceserve_runtime.protocols.kserve import Instances
from traceserve_runtime.protocols.native import PLAIN_TEXT, Plain
from traceserve_runtime.protocols.open_inference import are_tensors, infer_error, read_tensors
from traceserve_runtime.protocols.wording import (
    DEEPEST,
    MOST_ITEMS,
    MOST_KEYS,
    MOST_LISTS,
    checked_string,
    kind_of,
    listed,
    nearest_name,
    parse_json,
    path_to,
    short,
)
from traceserve_runtime.tasks.contract import Request, Task


class KServeErrors:
    """The error format of KServe's protocols."""

    def error(self, error: TraceserveError, parts: Mapping[str, object], headers: Headers, served: Served) -> Refusal:
        """Return a string: KServe's clients and tritonclient fail on an error that is an object."""
        return Refusal.of({"error": in_words(error)}, error)


class NativeErrors:
    """The error format of our own protocol."""

    def error(self, error: TraceserveError, parts: Mapping[str, object], headers: Headers, served: Served) -> Refusal:
        """Return an object with the error's type, message and field."""
        return Refusal.of(error.to_json(), error)


class _InferErrors:
    """The error format of gRPC's ModelInfer."""

    def error(self, error: TraceserveError, parts: Mapping[str, object], headers: Headers, served: Served) -> Refusal:
        """Return an output tensor."""
        return Refusal.of(infer_error(error, parts["body"], served), error)


class Native:
    """Our own protocol and KServe's two, which are recognized by the body."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Body:
        """Read a call."""
        body = parse_requests(parts, headers, served.task, group, served.manifest.max_rows)
        return replace(body, errors=errors_of(body, headers))

    def error(self, error: TraceserveError, parts: Mapping[str, object], headers: Headers, served: Served) -> Refusal:
        """Return the error in the format of its protocol."""
        own = _errors(headers, _is_of_kserve(parts.get("body"), headers))
        return own.error(error, parts, headers, served)


def errors_of(body: Body, headers: Headers) -> ErrorFormat:
    """Return the error format of a body's protocol, one of those that `Native` reads."""
    return _errors(headers, type(body.protocol) is not Plain)


def _errors(headers: Headers, of_kserve: bool) -> ErrorFormat:
    if headers.infer:
        return _InferErrors()
    return KServeErrors() if of_kserve else NativeErrors()


def in_words(error: TraceserveError) -> str:
    """Return an error as one sentence, with its field's path."""
    return f"{error.field}: {error.message}" if error.field else error.message


def _is_of_kserve(body: object, headers: Headers) -> bool:
    """Return whether an invalid body looks like one of KServe's protocols."""
    if headers.binary is not None:
        return True
    if isinstance(body, (bytes, bytearray)):
        try:
            body = decompress(body, headers.content_encoding)
        except TraceserveError:
            return False
        if not isinstance(body, (bytes, bytearray)) or (b'"instances"' not in body and b'"datatype"' not in body):
            return False
        try:
            body = parse_json(bytes(body).decode("utf-8"))
        except InputTooLong:
            return True  # in JSON such a name between its quotes is a key, or a whole text
        except (ValueError, TraceserveError):
            return False
    if not isinstance(body, dict):
        return False
    return "instances" in body or are_tensors(body.get("inputs"))


def parse_requests(row: Mapping[str, object], headers: Headers, task: Type[Task], group: int, most: int) -> Body:
    """Parse the requests of one item of TorchServe's batch.

    `row` holds `body`, or the fields of a form; `group` numbers the item, and `most` limits its requests.
    Raises InvalidRequest or InputTooLong, which name the field.
    """
    return parse_value(bodies.read_body(row, headers, task, most), task, group, most, headers.infer)


def parse_value(value: object, task: Type[Task], group: int, most: int, infer: bool = False) -> Body:
    """`parse_requests` for a body that is already decoded; `infer`: it came through gRPC's ModelInfer."""
    check_size(value, most)
    body = _read(value, task, group, infer)
    if len(body.requests) > most:
        raise InputTooLong(f"the list has {len(body.requests):,} texts; one request may have {most:,}; send several")
    return body


def check_size(value: object, most: int) -> None:
    """Raise for a list or an object larger than any legal one, before looking at its items.

    Deep nesting is refused here, since it must not raise a RecursionError: in Python 3.8, code that the
    garbage collector runs while one propagates can end the process ("Cannot recover from stack overflow").
    """
    most_items, items = max(MOST_ITEMS, most), 0
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise InvalidRequest("the body is nested too deeply")
        inner: List[object] = []
        for item in level:
            if isinstance(item, dict):
                if len(item) > MOST_KEYS:
                    key = next(iter(item))
                    raise InvalidRequest(
                        f'an object of {len(item):,} keys, as "{short(key)}", is no request; {LEGAL_BODIES}'
                    )
                inner += item.values()
            elif isinstance(item, list):
                items += len(item) - 1
                if len(item) > most_items or items > MOST_LISTS * most_items:
                    raise InputTooLong(
                        f"the body has lists of {items:,} items or more; one request may have {most:,} texts; send several"
                    )
                inner += item
        level = inner


def _read(value: object, task: Type[Task], group: int, infer: bool) -> Body:
    """Read parsed JSON by its protocol; `infer`: it came through gRPC's ModelInfer."""
    if isinstance(value, dict) and "instances" in value:
        if not isinstance(value["instances"], list):
            raise InvalidRequest(f'"instances" should be a list, not {kind_of(value["instances"])}', "instances")
        body = Body(_enveloped(value, "instances", task, group, "")[0], Instances())
    elif isinstance(value, dict) and are_tensors(value.get("inputs")):
        body = _from_tensors(value, task, group, infer)
    else:
        requests, is_list = _requests(value, task, group, "")
        body = Body(requests, Plain(is_list), None if is_list else PLAIN_TEXT)
    if not body.requests:
        where = "instances" if isinstance(body.protocol, Instances) else None
        raise InvalidRequest("the list is empty: it asks nothing", where)
    return body


def _from_tensors(value: Mapping[str, object], task: Type[Task], group: int, infer: bool) -> Body:
    """Return a V2 body's requests; the parameters of the body and of every tensor apply to each."""
    sent = read_tensors(value, task, infer)
    parameters: Dict[str, object] = {}
    for where, own in sent.parameters:
        for key, item in _parameters(own, task, where).items():
            if parameters.setdefault(key, item) != item:
                raise InvalidRequest(f'"{key}" occurs twice, and differs', path_to(where, f"parameters.{key}"))
    requests: List[Request] = []
    for i, (where, fields) in enumerate(sent.elements):
        try:
            [request], _ = _requests(fields, task, group, "", enveloped=True)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, sent.protocol.field_path(i, where, error.field)) from None
        requests.append(Request(request.inputs, {**parameters, **request.parameters}, group, where))
    return Body(requests, sent.protocol)


def _requests(
    value: object, task: Type[Task], group: int, where: str, enveloped: bool = False
) -> Tuple[List[Request], bool]:
    """Return the requests in parsed JSON at the path `where`, and whether it is a list."""
    if isinstance(value, list):
        items: List[Request] = []
        for i, item in enumerate(value):
            requests, is_list = _requests(item, task, group, f"{where}[{i}]", enveloped)
            if is_list:
                raise InvalidRequest("a list holds texts and objects, not lists", f"{where}[{i}]")
            items += requests
        return items, True
    if isinstance(value, str):
        first = task.fields[0].name
        if sum(field.required for field in task.fields) > 1:
            needed = listed(field.name for field in task.fields if field.required)
            raise InvalidRequest(f"a text alone is not enough: send an object with {needed}", where or None)
        return [Request(checked_fields({first: value}, task, where), {}, group, where)], False
    if not isinstance(value, dict):
        raise InvalidRequest(f"{kind_of(value)} is not a request; {LEGAL_BODIES}", where or None)
    envelope = next((key for key in ("inputs", "data") if key in value), None)
    if envelope is None or enveloped:
        parameters = _parameters(value.get("parameters", {}), task, where)
        fields = {key: item for key, item in value.items() if key not in ("parameters", *UNUSED_FIELDS)}
        return [Request(checked_fields(fields, task, where), parameters, group, where)], False
    return _enveloped(value, envelope, task, group, where)


def _enveloped(
    value: Mapping[str, object], envelope: str, task: Type[Task], group: int, where: str
) -> Tuple[List[Request], bool]:
    """Return the requests of `{"inputs": ..., "parameters": {...}}` or `{"data": ...}`; the parameters apply to
    each."""
    for key in value:
        if key not in (envelope, "parameters", *UNUSED_FIELDS):
            raise InvalidRequest(f'"{short(key)}" cannot stand beside "{envelope}"', path_to(where, key))
    parameters = _parameters(value.get("parameters", {}), task, where)
    # An instance may be {"data": ...}, as in TorchServe's KServe examples.
    enveloped = envelope != "instances"
    inner, is_list = _requests(value[envelope], task, group, path_to(where, envelope), enveloped)
    requests = [
        Request(
            r.inputs, {**parameters, **r.parameters}, group, r.where, envelope=r.envelope if r.parameters else where
        )
        for r in inner
    ]
    return requests, is_list


def checked_fields(fields: Mapping[str, object], task: Type[Task], where: str) -> Mapping[str, object]:
    known = {field.name: field for field in task.fields}
    for key, value in fields.items():
        if task.has_parameter(key):
            raise InvalidRequest(
                f'"{key}" is a parameter: send it as "parameters": {{"{key}": ...}}', path_to(where, key)
            )
        if key not in known:
            raise InvalidRequest(
                f'unknown field "{short(key)}"{nearest_name(key, known)}; {listed(known)} are known',
                path_to(where, key),
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


def _check_kind(value: object, kind: str, key: str, path: str) -> None:
    """Raise InvalidRequest if a field's value is not of its kind."""
    if kind == "text":
        checked_string(value, key, path)
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


def _parameters(parameters: object, task: Type[Task], where: str) -> Mapping[str, object]:
    path = path_to(where, "parameters")
    if not isinstance(parameters, dict):
        raise InvalidRequest(f'"parameters" should be an object, not {kind_of(parameters)}', path)
    known = {parameter.name: parameter for parameter in task.all_parameters()}
    for key, value in parameters.items():
        if key not in known:
            raise InvalidRequest(
                f'unknown parameter "{short(key)}"{nearest_name(key, known)}; {listed(known)} are known',
                path_to(path, key),
            )
        if not known[key].accepts(value):
            raise InvalidRequest(
                f'"{key}" should be {known[key].legal}, not {short(json.dumps(value))}', path_to(path, key)
            )
    return parameters
