"""An explanation, as a server answers it: what each word added, by the field that it stands in."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

KEYS = ("words", "target", "completeness_error")  # by which an explanation is known

Words = Sequence[Mapping[str, Any]]


class Heat(NamedTuple):
    """Characters [start, end) of a text, and what they added: -1 to 1 of the strongest."""

    start: int
    end: int
    share: float
    added: float


def is_explanation(value: object) -> bool:
    """Return whether an answer is an explanation in our own form."""
    return isinstance(value, dict) and set(KEYS) <= set(value)


def strongest(words: Words) -> List[Mapping[str, Any]]:
    """Return the words, those first that added or took most."""
    return sorted(words, key=lambda word: -abs(word["attribution"]))


def heats(words: Words) -> Dict[str, List[Heat]]:
    """Return the words of each field, in the order of its text."""
    largest = max((abs(word["attribution"]) for word in words), default=0.0) or 1.0
    found: Dict[str, List[Heat]] = {}
    for word in words:
        heat = Heat(word["start"], word["end"], word["attribution"] / largest, word["attribution"])
        found.setdefault(word["field"], []).append(heat)
    return {field: sorted(own) for field, own in found.items()}


def target_in_words(explanation: Mapping[str, Any]) -> str:
    """Say what was explained."""
    return ", ".join(f"{name} {value}" for name, value in explanation["target"].items())


def text_at(body: object, field: str) -> Optional[str]:
    """Return the text of a field, or of one of its items, such as "documents[2]", in a request; None if it has none."""
    if isinstance(body, str):
        return body
    name, _, number = field.partition("[")
    value = body.get(name) if isinstance(body, Mapping) else None
    if number and isinstance(value, list):
        value = value[int(number.rstrip("]"))]
    return value if isinstance(value, str) else None
