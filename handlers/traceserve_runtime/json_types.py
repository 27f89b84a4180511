"""The types of JSON documents that are written: answers, replies, reports, schemas.

What arrives is `object` until it is checked. A numpy number or a tuple key in an answer is found by mypy, not by the
first client.
"""

from __future__ import annotations

from typing import Mapping, Sequence, Union

Json = Union[None, bool, int, float, str, Sequence["Json"], Mapping[str, "Json"]]
JsonObject = Mapping[str, Json]


def json_objects(value: Json) -> Sequence[JsonObject]:
    """Return a list of objects, such as a classifier's answer; raises TypeError for another value."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise TypeError(f"a list of objects is needed, not {type(value).__name__}")
    return value


def number(value: Json) -> float:
    """Return a number, such as a score; raises TypeError for another value."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"a number is needed, not {type(value).__name__}")
    return value
