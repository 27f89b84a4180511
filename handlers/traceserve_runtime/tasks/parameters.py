"""The fields and parameters of requests, and the outputs of models."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from traceserve_runtime.json_types import Json, JsonObject

# For numbers without their own limit: beyond it JSON's whole numbers are not exact, and numpy's overflow.
LARGEST_NUMBER = 2**53
_TOKEN = r"(0|[1-9][0-9]{0,8})"  # its number, as a key


class Field(NamedTuple):
    """An input of a request: a text or, by `kind`, a list of texts or a chat's messages."""

    name: str
    required: bool
    description: str
    kind: str = "text"  # "text", "texts" or "messages"


class Output(NamedTuple):
    """A model output: float32 of shape (batch, ...), or (batch, length, ...) if `per_token`."""

    name: str
    per_token: bool


@dataclass(frozen=True)
class Parameter:
    """A parameter of a request: one of `choices`, or of `type`, where list means a string or a list of strings, or with
    `numbers` a list of whole numbers, and dict a number for each of some tokens.

    If there are choices and `type` is not str, both are legal.

    Numbers lie between `least` and `most`. A list of strings has at most `most`, each of at most `longest` characters.
    `default` applies if neither request nor model sets a value.
    """

    name: str
    type: type
    description: str
    choices: Tuple[str, ...] = ()
    nullable: bool = False
    least: float = 1
    most: Optional[float] = None
    default: Json = None
    numbers: bool = False  # whether a list has whole numbers
    longest: Optional[int] = None

    @property
    def legal(self) -> str:
        """The legal values in words."""
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        words[list] = "a string or a list of strings"
        if self.most is not None:
            words[list] += f", at most {self.most:,}"
        if self.longest is not None:
            words[list] += f"{',' if self.most is None else ' of'} at most {self.longest:,} characters each"
        words[dict] = f"an object with tokens' numbers as keys and numbers from {self.least:g} to {self.most or 0:g}"
        if self.numbers:
            words[list] = f"a list of whole numbers of {self.least:,} or more"
        text = words[self.type]
        if self.type in (int, float):
            least, most = (f"{n:,}" if self.type is int else f"{n:g}" for n in (self.least, self.most or 0))
            text += f" of {least} or more" if self.most is None else f" from {least} to {most}"
        choices = ", ".join(f'"{choice}"' for choice in self.choices)
        if self.choices:
            text = f"one of {choices}" if self.type is str else f"{text} or {choices}"
        return text + (" or null" if self.nullable else "")

    @property
    def schema(self) -> JsonObject:
        """Return the values that `accepts` accepts, as JSON Schema."""
        most = LARGEST_NUMBER if self.most is None else self.most
        longest: JsonObject = {} if self.longest is None else {"maxLength": self.longest}
        text: JsonObject = {"type": "string", "minLength": 1, **longest}
        count: JsonObject = {} if self.most is None else {"maxItems": self.most}
        legal: Dict[type, List[JsonObject]] = {
            int: [{"type": "integer", "minimum": self.least, "maximum": most}],
            float: [{"type": "number", "minimum": self.least, "maximum": most}],
            bool: [{"type": "boolean"}],
            str: [] if self.choices else [{"type": "string"}],
            list: [text, {"type": "array", "items": text, "minItems": 1, **count}],
            dict: [
                {
                    "type": "object",
                    "propertyNames": {"pattern": f"^{_TOKEN}$"},
                    "additionalProperties": {"type": "number", "minimum": self.least, "maximum": most},
                }
            ],
        }
        if self.numbers:
            legal[list] = [{"type": "array", "items": {"type": "integer", "minimum": self.least}, "minItems": 1}]
        options = legal[self.type]
        options += [{"enum": list(self.choices)}] if self.choices else []
        options += [{"type": "null"}] if self.nullable else []
        return {"description": self.description, **(options[0] if len(options) == 1 else {"anyOf": options})}

    def accepts(self, value: object) -> bool:
        """Return whether `value`, parsed JSON, is legal."""
        if value is None:
            return self.nullable
        if self.choices and isinstance(value, str):
            return value in self.choices
        if self.type is list:
            if self.numbers:
                return (
                    isinstance(value, list) and bool(value) and all(type(n) is int and n >= self.least for n in value)
                )
            texts: List[Any] = value if isinstance(value, list) else [value]
            fits = 0 < len(texts) <= (math.inf if self.most is None else self.most)
            return fits and all(text and _is_text(text) and self._is_short(text) for text in texts)
        if self.type is dict:
            return isinstance(value, dict) and all(
                isinstance(token, str)
                and re.fullmatch(_TOKEN, token)
                and type(number) in (int, float)
                and self._holds(number)
                for token, number in value.items()
            )
        # Not isinstance: true is not a number.
        if type(value) is not self.type and not (self.type is float and type(value) is int):
            return False
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return self.type is not str or _is_text(value)
        return self._holds(value)

    def _is_short(self, text: str) -> bool:
        return self.longest is None or len(text) <= self.longest

    def _holds(self, number: float) -> bool:
        # Python's JSON reads NaN and Infinity, which are not legal.
        return bool(self.least <= number <= (LARGEST_NUMBER if self.most is None else self.most))


def _is_text(value: object) -> bool:
    """Return whether this is a string of whole characters: a JSON escape can be half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def strings(value: Union[str, Sequence[str]]) -> List[str]:
    """Return a list parameter's value; one string means a list of one."""
    return [value] if isinstance(value, str) else list(value)
