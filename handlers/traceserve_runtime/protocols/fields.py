"""Bodies of foreign protocols: their legal keys, and the parameters of ours that these map to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from traceserve_runtime.errors import InvalidRequest, NotFound, WrongTask
from traceserve_runtime.protocols import bodies
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Served
from traceserve_runtime.protocols.requests import check_size, checked_fields
from traceserve_runtime.protocols.wording import kind_of, listed, nearest_name, path_to, short
from traceserve_runtime.tasks.contract import Request


class Key(NamedTuple):
    """The meaning of a key in a foreign body: one of our parameters, something for the protocol itself, or unsupported.

    `neutral` values are ignored: they ask for what is done anyway.
    """

    parameter: Optional[str] = None
    neutral: Sequence[object] = ()
    read: bool = False  # by the protocol itself
    why: str = "it is not supported here"


READ = Key(read=True)
IGNORED = Key(read=True)  # it means nothing here


def json_body(parts: Mapping[str, object], headers: Headers, served: Served) -> Dict[str, object]:
    """Return a call's body as an object; raises InvalidRequest if it is not one."""
    value = bodies.read_body(parts, headers, served.task, served.manifest.max_rows)
    check_size(value, served.manifest.max_rows)
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body should be a JSON object, not {kind_of(value)}")
    return value


def read_keys(value: Mapping[str, object], keys: Mapping[str, Key], where: str = "") -> Dict[str, object]:
    """Return the parameters in a foreign protocol's object; raises InvalidRequest if one is unknown or unsupported, or if two
    keys of one parameter differ.

    null counts as absent, as these protocols' clients expect, also of an unknown key: they send whole objects of theirs.
    """
    parameters: Dict[str, object] = {}
    sent: Dict[str, str] = {}
    for name, item in value.items():
        if item is None:
            continue
        if name not in keys:
            raise InvalidRequest(
                f'unknown key "{short(name)}"{nearest_name(name, keys)}; {listed(keys)} are known', path_to(where, name)
            )
        key = keys[name]
        if key.read or _is_neutral(item, key.neutral):
            continue
        if key.parameter is None:
            raise InvalidRequest(f'"{name}": {key.why}; leave it out', path_to(where, name))
        other = sent.setdefault(key.parameter, name)
        if other != name and item != parameters[key.parameter]:
            raise InvalidRequest(f'"{other}" and "{name}" differ; send one of them', path_to(where, name))
        parameters[key.parameter] = item
    return parameters


def _is_neutral(item: object, neutral: Sequence[object]) -> bool:
    return any(
        type(item) is type(each) and item == each or _are_numbers(item, each) and item == each for each in neutral
    )


def _are_numbers(*values: object) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def check_values(
    parameters: Mapping[str, object], served: Served, names: Mapping[str, str], where: str = ""
) -> Dict[str, object]:
    """Check our parameters' values; `names` has each one's foreign name, for errors."""
    known = {parameter.name: parameter for parameter in served.task.all_parameters()}
    for name, value in parameters.items():
        foreign = names.get(name, name)
        if name not in known:
            raise InvalidRequest(f'"{foreign}": this model\'s task has no such parameter', path_to(where, foreign))
        if not known[name].accepts(value):
            raise InvalidRequest(f'"{foreign}" should be {known[name].legal}', path_to(where, foreign))
    return dict(parameters)


def foreign_names(keys: Mapping[str, Key], value: Optional[Mapping[str, object]] = None) -> Dict[str, str]:
    """Map our parameters to their keys in the foreign body `value`: of several keys to the one that is sent."""
    sent = [name for name, item in (value or {}).items() if name in keys and item is not None]
    named = ((keys[name].parameter, name) for name in [*keys, *sent])
    return {parameter: name for parameter, name in named if parameter is not None}


def require_key(value: Mapping[str, object], name: str, where: str = "") -> object:
    """Return the value of a required key."""
    if value.get(name) is None:
        raise InvalidRequest(f'"{name}" is missing', path_to(where, name))
    return value[name]


def boolean(value: Mapping[str, object], name: str, default: bool = False) -> bool:
    """Return the value of a boolean key."""
    item = value.get(name)
    if item is None:
        return default
    if not isinstance(item, bool):
        raise InvalidRequest(f'"{name}" should be true or false, not {kind_of(item)}', name)
    return item


def named_texts(value: Mapping[str, object], name: str) -> List[Tuple[object, str]]:
    """Return the texts at a key that holds one text or a list, each with its path."""
    found = require_key(value, name)
    if not isinstance(found, list):
        return [(found, name)]
    if not found:
        raise InvalidRequest(f'"{name}" is an empty list: it asks nothing', name)
    return [(item, f"{name}[{i}]") for i, item in enumerate(found)]


def text_requests(
    named: Iterable[Tuple[object, str]], parameters: Mapping[str, object], served: Served, group: int
) -> List[Request]:
    """Make a request of each text and its path."""
    return [Request(checked_fields({"text": text}, served.task, path), parameters, group, path) for text, path in named]


def check_served(name: str, served: Served) -> None:
    """Raise NotFound for a model other than the served one."""
    if name != served.name:
        raise NotFound(f"the model {short(name)} is not served here; {served.name} is", "model")


def wrong_task(served: Served, what: str, needed: str) -> WrongTask:
    """Return the error for `what` is asked of a model of another task than `needed`."""
    return WrongTask(f"this model's task is {served.task.name}; {what} by one of {needed}")


def check_reads_vectors(served: Served, what: str) -> None:
    """Raise WrongTask if the model's task returns no vectors."""
    if not served.task.reads_vectors:
        raise wrong_task(served, what, "feature_extraction")


def pooled(served: Served) -> Dict[str, object]:
    """Return the pooling that yields one vector per text, even if the model names no pooling."""
    return {"pooling": "mean"} if served.manifest.parameters.get("pooling", "none") == "none" else {}


def without_beams(parameters: Mapping[str, object], served: Served) -> Dict[str, object]:
    """Return a request's parameters as an archive whose texts are searched with beams needs them, to tell of each token."""
    # Beside an archive's do_sample a num_beams would end the sampling.
    beams = served.manifest.parameters.get("num_beams", 1) > 1 and not served.task.samples(parameters, served.manifest)
    return {**({"num_beams": 1} if beams else {}), **parameters}


def classifies(served: Served) -> bool:
    """Return whether the model's task labels texts, with a selectable function."""
    return all(map(served.task.has_parameter, ("top_k", "function_to_apply")))


def check_classifies(served: Served) -> None:
    """Raise WrongTask if the model's task does not label texts."""
    if not classifies(served):
        raise wrong_task(served, "texts are classified", "sequence_classification")


@dataclass(frozen=True)
class FieldPaths:
    """The paths of our fields and parameters in a foreign body, for errors."""

    fields: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    root: str = ""  # path of the object with the parameters

    def field_path(self, index: int, where: str, name: Optional[str]) -> Optional[str]:
        """Return the path of the field `name` of a request at `where`; see `contract.Form`."""
        if name is None:
            return where or None
        if name.startswith("parameters."):
            own = name[len("parameters.") :]
            return path_to(self.root, self.parameters.get(own, own))
        end = re.search(r"[.\[]|$", name).start()  # type: ignore[union-attr]  # the end always matches
        return (where or self.fields.get(name[:end], name[:end])) + name[end:]
