"""Texts in which parts are marked, as HTML."""

from __future__ import annotations

import difflib
import html
import re
from typing import List, NamedTuple, Sequence, Tuple

# Backgrounds of marks, on which dark letters are read easily, whether the page around is light or dark.
INK = "#16181d"
COLOURS = ("#ffd58a", "#a8dcff", "#b9ecb4", "#ffc2d4", "#d9ccff", "#a6ece4", "#f3d6b3", "#dfe48a")


class Mark(NamedTuple):
    """Characters [start, end) of a text, and what they are; `kind` decides the colour."""

    start: int
    end: int
    label: str
    kind: str
    score: float
    only_here: bool = False  # the other model does not have it


def escaped(text: object) -> str:
    """A text in HTML."""
    return html.escape(str(text))


def marked(text: str, marks: Sequence[Mark], kinds: Sequence[str] = ()) -> str:
    """The text with its marks, which may overlap: the first of them gives the colour. Each label stands behind its mark's
    end. `kinds` are those that are known, in order, so that a kind has the same colour in every text."""
    known = list(dict.fromkeys([*kinds, *(mark.kind for mark in marks)]))
    edges = sorted({0, len(text), *(edge for mark in marks for edge in (mark.start, mark.end) if edge <= len(text))})
    parts = []
    for start, end in zip(edges, edges[1:]):
        own = [mark for mark in marks if mark.start <= start and end <= mark.end]
        part = escaped(text[start:end])
        if not own:
            parts.append(part)
            continue
        colour = COLOURS[known.index(own[0].kind) % len(COLOURS)]
        tags = "".join(_tag(mark) for mark in own if mark.end == end)
        only = " ts-only" if any(mark.only_here for mark in own) else ""
        parts.append(f'<mark class="ts-mark{only}" style="background:{colour};color:{INK}">{part}{tags}</mark>')
    return "".join(parts)


def _tag(mark: Mark) -> str:
    only = ", only here" if mark.only_here else ""
    return f'<span class="ts-tag">{escaped(mark.label)} {mark.score:.2f}{only}</span>'


def unread(text: str, span: Tuple[int, int]) -> str:
    """The text with the characters [start, end) marked that the model never read."""
    start, end = span
    cut = f'<s class="ts-unread">{escaped(text[start:end])}</s><span class="ts-tag ts-cut">not read</span>'
    return escaped(text[:start]) + cut + escaped(text[end:])


def changed_words(text: str, other: str) -> str:
    """The text with the words marked that the other one has not at this position."""
    one, two = _words(text), _words(other)
    parts = []
    matcher = difflib.SequenceMatcher(None, one, two, autojunk=False)
    for operation, start, end, _, _ in matcher.get_opcodes():
        part = escaped("".join(one[start:end]))
        parts.append(part if operation == "equal" or not part else f'<mark class="ts-changed">{part}</mark>')
    return "".join(parts)


def _words(text: str) -> List[str]:
    return re.findall(r"\s+|\w+|[^\w\s]", text)
