"""Checks common to all bodies (JSON, strings), and the words of errors."""

from __future__ import annotations

import difflib
import json
import re
from typing import Iterable, Optional

from traceserve_runtime.errors import InvalidRequest

DEEPEST = 64  # levels of nesting: tensors have few dimensions, and a chat a few levels
_NO_BRACKETS = re.compile(r"[^][{}]+")
_LONGEST_NAME = 64  # in characters: comparing megabytes with the known names takes seconds


def parse_json(text: str, what: str = "body", field: Optional[str] = None) -> object:
    """Parse JSON text; raises InvalidRequest, which says `what` is wrong and names its `field`."""
    if _is_deep(text):
        raise InvalidRequest(f"{what if field else 'the ' + what} is nested too deeply", field or what)
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"{what if field else 'the ' + what} is not valid JSON: {error}", field or what) from None


def _is_deep(text: str) -> bool:
    """Return whether JSON is nested deeper than DEEPEST (certain from twice that depth on), in linear time."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return False
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    brackets = _NO_BRACKETS.sub("", outside)
    for _ in range(DEEPEST):
        rest = brackets.replace("[]", "").replace("{}", "")  # the innermost ones
        if len(rest) == len(brackets):
            break
        brackets = rest
    return brackets.count("[") + brackets.count("{") > DEEPEST


def checked_string(text: object, key: str, where: str) -> str:
    """Return the value of `key` at the path `where`; raises InvalidRequest if it is not a legal text."""
    if not isinstance(text, str):
        raise InvalidRequest(f'"{key}" should be a string, not {kind_of(text)}', where)
    if "\0" in text:
        raise InvalidRequest("the text holds a null character", where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the text holds half a surrogate pair at character {error.start}", where) from None
    return text


def path_to(where: str, key: str) -> str:
    """Return the path of a key of the object at `where`."""
    return f"{where}.{short(key)}" if where else short(key)


def short(text: str) -> str:
    """Shorten and clean client input, so that it can be quoted in an error."""
    if len(text) <= 40 and text.isprintable():
        return text
    return "".join(c if c.isprintable() else "?" for c in text[:40]) + ("..." if len(text) > 40 else "")


def nearest_name(key: str, known: Iterable[str]) -> str:
    """Suggest the known name that may have been meant, or nothing."""
    near = difflib.get_close_matches(key[:_LONGEST_NAME], list(known), n=1)
    return f' (did you mean "{near[0]}"?)' if near else ""


def listed(names: Iterable[str]) -> str:
    """List names in words."""
    return ", ".join(f'"{name}"' for name in names)


def kind_of(value: object) -> str:
    """Name the kind of a parsed JSON value."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a string"}
    return "null" if value is None else kinds.get(type(value), "binary data")
