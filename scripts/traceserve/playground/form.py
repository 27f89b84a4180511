"""The form of a model, made from the JSON schemas of its fields and parameters; and from what is typed into it to a body."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from traceserve_runtime.tasks.parameters import LARGEST_NUMBER

from traceserve.errors import ServerError
from traceserve.playground.description import Description, InputField

TEXT = "text"  # one text of any length
WORDS = "words"  # a text of one line
LINES = "lines"  # a list, an item a line
PAIRS = "pairs"  # an object of numbers, a key and its number a line
CHAT = "chat"  # messages, each of which begins with its role
NUMBER = "number"
CHOICE = "choice"  # one of a few values
OPEN = "open"  # a number, or one of a few values

PARAMETERS = "parameters"
_ROLE = re.compile(r"(system|user|assistant|tool):[ \t]?(.*)", re.DOTALL)


class FormError(ServerError):
    """What is typed is no value that could be sent; `field` says where."""


@dataclass(frozen=True)
class Control:
    """One input of the form. What is left empty is not sent, so that the model's own default holds."""

    key: str  # the path in the body: a field's name, or "parameters.NAME"
    kind: str
    info: str
    value: object  # what stands in it at first
    choices: Tuple[Tuple[str, str], ...] = ()  # what is shown, and the value as JSON; the first one is "", the default
    placeholder: str = ""
    required: bool = False
    whole: bool = False  # whether its numbers are whole ones

    @property
    def name(self) -> str:
        """The field's or the parameter's own."""
        return self.key.rpartition(".")[2]

    @property
    def is_parameter(self) -> bool:
        """Whether it is sent among the parameters."""
        return self.key.startswith(PARAMETERS + ".")


def controls(descriptions: Sequence[Description], starting: Mapping[str, object] = {}) -> List[Control]:
    """The form for one model, or for several that are asked the same: fields, then the parameters that all of them have.

    It begins with the first model's sample, and with the parameters `starting`.
    """
    first = descriptions[0]
    sample = {**first.sample.get(PARAMETERS, {}), **starting}
    found = [_control(field.name, field, first.sample.get(field.name), "") for field in first.fields]
    for parameter in first.parameters:
        same = [{own.name: own for own in each.parameters}.get(parameter.name) for each in descriptions]
        defaults = [own.schema.get("default") for own in same if own is not None]
        if len(defaults) == len(descriptions):
            told = " / ".join(dict.fromkeys(map(_shown, defaults))) if any(d is not None for d in defaults) else ""
            found.append(_control(f"{PARAMETERS}.{parameter.name}", parameter, sample.get(parameter.name), told))
    return found


def _control(key: str, asked: InputField, value: object, default: str) -> Control:
    kind, choices = _kind(asked)
    holds = f"default: {default}" if default else "default"
    info = ". ".join(part for part in (asked.description, _range(asked)) if part)
    return Control(
        key=key,
        kind=kind if key.startswith(PARAMETERS) or kind != WORDS else TEXT,
        info=info,
        value=_typed(kind, value),
        choices=(((holds, ""), *((_shown(choice), json.dumps(choice)) for choice in choices)) if choices else ()),
        placeholder=holds if key.startswith(PARAMETERS) else "",
        required=asked.required,
        whole=any("integer" in (option.get("type"), option.get("items", {}).get("type")) for option in asked.options),
    )


def _kind(asked: InputField) -> Tuple[str, List[object]]:
    """The kind of control, and the values that can be chosen."""
    choices: List[object] = []
    types: Dict[str, Mapping[str, Any]] = {}
    for option in asked.options:
        kind = option.get("type")
        if "enum" in option:
            choices += option["enum"]
        elif kind in ("boolean", "null"):
            choices += [True, False] if kind == "boolean" else [None]
        else:
            types[str(kind)] = option
    if "array" in types:
        return (CHAT if types["array"]["items"].get("type") == "object" else LINES), []
    if "object" in types:
        return PAIRS, []
    if "string" in types:
        return WORDS, []
    if types:
        return (OPEN if choices else NUMBER), choices
    return CHOICE, choices


def _range(asked: InputField) -> str:
    """The limits of a number, in words."""
    for option in asked.options:
        least, most = option.get("minimum"), option.get("maximum")
        if least is not None and most is not None:
            return f"{least:,} or more" if most >= LARGEST_NUMBER else f"{least:,} to {most:,}"
    return ""


def _shown(value: object) -> str:
    """A value as a person reads it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _typed(kind: str, value: object) -> object:
    """What stands at first in a control of this kind, for a value of the sample."""
    if value is None:
        return ""
    if kind == LINES:
        return "\n".join(map(str, value)) if isinstance(value, list) else value
    if kind == PAIRS and isinstance(value, dict):
        return "\n".join(f"{key}: {number}" for key, number in value.items())
    if kind == CHAT and isinstance(value, list):
        return "\n".join(f"{message['role']}: {message['content']}" for message in value)
    return json.dumps(value) if kind in (CHOICE, OPEN, NUMBER) else value


def body(form: Sequence[Control], values: Sequence[object]) -> Dict[str, object]:
    """The body that asks what is typed into the form, a value for each control; raises FormError."""
    sent: Dict[str, object] = {}
    parameters: Dict[str, object] = {}
    for control, value in zip(form, values):
        if value in (None, "") and not control.required:
            continue
        (parameters if control.is_parameter else sent)[control.name] = _read(control, value)
    return {**sent, **({PARAMETERS: parameters} if parameters else {})}


def _read(control: Control, value: object) -> object:
    text = "" if value is None else str(value)
    if control.kind == LINES:
        lines = [line for line in _lines(text) if line.strip()]
        return [_number(line) for line in lines] if control.whole else lines
    if control.kind == PAIRS:
        return _pairs(control, text)
    if control.kind == CHAT:
        return _messages(control, text)
    if control.kind == NUMBER:
        return _number(text)
    if control.kind in (CHOICE, OPEN):
        return json.loads(text) if text in {choice for _, choice in control.choices} else _number(text)
    return text


def _lines(text: str) -> List[str]:
    """A field's lines; not splitlines, since a text may hold a form feed or U+2028."""
    return text.replace("\r\n", "\n").split("\n")


def _number(text: str) -> object:
    """The number that is typed, or the text, of which the server says what is wrong with it."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _pairs(control: Control, text: str) -> Dict[str, object]:
    pairs: Dict[str, object] = {}
    for line in filter(str.strip, _lines(text)):
        key, colon, number = line.rpartition(":")
        if not colon:
            raise FormError('a line should be a token\'s number and what is added, as "50: -100"', control.key)
        pairs[key.strip()] = _number(number.strip())
    return pairs


def _messages(control: Control, text: str) -> List[Dict[str, str]]:
    """A message begins with its role; the lines that do not are the message's before."""
    messages: List[Dict[str, str]] = []
    for line in _lines(text):
        begins = _ROLE.fullmatch(line)
        if begins:
            messages.append({"role": begins[1], "content": begins[2]})
        elif messages:
            messages[-1]["content"] += "\n" + line
        elif line.strip():
            raise FormError('the first line should begin with who says it, as "user: Hello"', control.key)
    return [{**message, "content": message["content"].rstrip("\n")} for message in messages]


def control_at(form: Sequence[Control], path: Optional[str]) -> Optional[int]:
    """The number of the control that a path in the body leads to, as "parameters.top_k" or "documents[1]"."""
    for number, control in enumerate(form):
        if path is not None and re.match(re.escape(control.key) + r"($|[.\[])", path):
            return number
    return None
