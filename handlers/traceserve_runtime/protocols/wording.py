"""Checks common to all bodies (JSON, strings), and the words of errors."""

from __future__ import annotations

import difflib
import json
import re
from typing import Iterable, Iterator, Optional

from traceserve_runtime.errors import InputTooLong, InvalidRequest

DEEPEST = 64  # levels of nesting: tensors have few dimensions, and a chat a few levels
# Of a list of something other than texts, such as a chat's messages; a list of texts has at most max_rows.
MOST_ITEMS = 4096
MOST_LISTS = 8  # per body, each of so many items
MOST_KEYS = 256  # per object, far above the fields and parameters of any task
_BEGINNING = 1 << 17  # characters; what is nested too deeply is so near its beginning
_PART = 1 << 16  # characters
_NO_BRACKETS = re.compile(r"[^][{}]+")
_LONGEST_NAME = 64  # in characters: comparing megabytes with the known names takes seconds


class JsonBudget:
    """Counts the values in the JSON texts of one body, before they are parsed: a few bytes each become a hundred in memory.

    The limits follow from those of a parsed body (`requests.check_size`), and are at least as large: every list or object is
    an item of a list, or one of a request's own few fields and parameters.
    """

    def __init__(self, most: int = 0) -> None:
        """`most` limits the requests of the body."""
        items = max(MOST_ITEMS, most)
        self._most_containers = 2 * MOST_LISTS * items
        self._most_commas = MOST_KEYS * items
        self._containers = self._commas = 0

    def spend(self, plain: str, what: str, field: Optional[str] = None) -> None:
        """Add a JSON text without its escapes; raises InputTooLong where all of them together are beyond any legal body."""
        most_quotes = 4 * (self._most_commas + self._most_containers)  # a key and a value each
        self._check(plain.count('"'), most_quotes, "quotation marks", what, field)
        for outside in _outside_strings(plain):
            self._containers += outside.count("[") + outside.count("{")
            self._commas += outside.count(",")
        self._check(self._containers, self._most_containers, "lists and objects", what, field)
        self._check(self._commas, self._most_commas, "commas", what, field)

    def _check(self, count: int, most: int, kind: str, what: str, field: Optional[str]) -> None:
        if count > most:
            raise InputTooLong(f"{what} has {count:,} {kind}; one request may have {most:,}; send several", field)


def _without_escapes(text: str) -> str:
    """Return JSON whose quotation marks all begin or end a string."""
    return text.replace("\\\\", "").replace('\\"', "")


def _outside_strings(plain: str) -> Iterator[str]:
    """Iterate over what stands outside the strings of JSON, as far as it is valid; part by part, which takes little memory."""
    inside = 0
    for start in range(0, len(plain), _PART):
        pieces = plain[start : start + _PART].split('"')
        yield "".join(pieces[inside::2])
        inside ^= (len(pieces) - 1) % 2


def parse_json(
    text: str, what: str = "body", field: Optional[str] = None, budget: Optional[JsonBudget] = None
) -> object:
    """Parse JSON text; raises InvalidRequest, which says `what` is wrong and names its `field`, or InputTooLong.

    Texts of one body share a `budget`.
    """
    named = what if field else f"the {what}"
    plain = _without_escapes(text[:_BEGINNING])
    if _is_deep(plain):
        raise InvalidRequest(f"{named} is nested too deeply", field or what)
    if len(text) > _BEGINNING:
        plain = _without_escapes(text)
    (budget or JsonBudget()).spend(plain, named, field or what)
    if len(text) > _BEGINNING and _is_deep(plain):
        raise InvalidRequest(f"{named} is nested too deeply", field or what)
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"{named} is not valid JSON: {error}", field or what) from None


def _is_deep(plain: str) -> bool:
    """Return whether JSON, without its escapes, is nested deeper than DEEPEST (certain from twice that depth on), in linear
    time."""
    if plain.count("[") + plain.count("{") <= DEEPEST:
        return False
    brackets = _NO_BRACKETS.sub("", "".join(_outside_strings(plain)))
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
