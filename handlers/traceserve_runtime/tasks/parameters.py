"""What a request may hold and a model gives: fields, parameters, outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

# Of numbers without a limit of their own: beyond it JSON's whole numbers are not exact, and numpy's overflow.
LARGEST_NUMBER = 2**53


class Field(NamedTuple):
    """Something asked about: a text, or by `kind` a list of texts, or a chat's messages."""

    name: str
    required: bool
    description: str
    kind: str = "text"  # "text", "texts" or "messages"


class Output(NamedTuple):
    """An output of the model: float32 of shape (batch, ...), or (batch, length, ...) where `per_token`."""

    name: str
    per_token: bool


@dataclass(frozen=True)
class Parameter:
    """A parameter of a request: one of `choices`, or of `type`, where list means one string or a list of strings; or a list
    of whole numbers, where `numbers` says so.

    Where there are choices and `type` is not str, both are legal.

    Numbers lie between `least` and `most`. `default` is what holds where neither request nor model says anything.
    """

    name: str
    type: type
    description: str
    choices: Tuple[str, ...] = ()
    nullable: bool = False
    least: float = 1
    most: Optional[float] = None
    default: Any = None
    numbers: bool = False  # whether a list is one of whole numbers

    @property
    def legal(self) -> str:
        """The legal values, in words."""
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        words[list] = "a string or a list of strings"
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
    def schema(self) -> Dict[str, Any]:
        """What `accepts` accepts, as JSON Schema."""
        most = LARGEST_NUMBER if self.most is None else self.most
        text = {"type": "string", "minLength": 1}
        legal: Dict[type, List[Dict[str, Any]]] = {
            int: [{"type": "integer", "minimum": self.least, "maximum": most}],
            float: [{"type": "number", "minimum": self.least, "maximum": most}],
            bool: [{"type": "boolean"}],
            str: [] if self.choices else [{"type": "string"}],
            list: [text, {"type": "array", "items": text, "minItems": 1}],
        }
        if self.numbers:
            legal[list] = [{"type": "array", "items": {"type": "integer", "minimum": self.least}, "minItems": 1}]
        options = legal[self.type]
        options += [{"enum": list(self.choices)}] if self.choices else []
        options += [{"type": "null"}] if self.nullable else []
        return {"description": self.description, **(options[0] if len(options) == 1 else {"anyOf": options})}

    def accepts(self, value: Any) -> bool:
        """Whether `value`, parsed JSON, is legal."""
        if value is None:
            return self.nullable
        if self.choices and isinstance(value, str):
            return value in self.choices
        if self.type is list:
            if self.numbers:
                return (
                    isinstance(value, list) and bool(value) and all(type(n) is int and n >= self.least for n in value)
                )
            texts = value if isinstance(value, list) else [value]
            return bool(texts) and all(text and _is_text(text) for text in texts)
        # Not isinstance: true is no number.
        if type(value) is not self.type and not (self.type is float and type(value) is int):
            return False
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return self.type is not str or _is_text(value)
        # NaN and Infinity, which Python's JSON reads, are no legal numbers.
        return bool(self.least <= value <= (LARGEST_NUMBER if self.most is None else self.most))


def _is_text(value: Any) -> bool:
    """Whether this is a string of whole characters: an escape in JSON can write half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def strings(value: Any) -> List[str]:
    """A parameter of type list: one string stands for a list of one."""
    return [value] if isinstance(value, str) else list(value)
