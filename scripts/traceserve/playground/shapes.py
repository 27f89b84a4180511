"""How an answer is shown: as bars, as marks in the text, as a text, as vectors; by the shape that it has, whatever the task.

All of it is HTML in which every text is escaped. Nothing is told by colour alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from traceserve.playground import heat
from traceserve.playground.description import Description
from traceserve.playground.marks import Mark, changed_words, escaped, marked
from traceserve.serving import attributions

# Where a form begins with other parameters than its task's sample, so that the answer shows more; by task.
STARTING: Dict[str, Dict[str, object]] = {
    "sequence_classification": {"top_k": 5},
    "token_classification": {"aggregation_strategy": "simple"},
    "question_answering": {"top_k": 3},
    "text_ranking": {"sort": True},
    "feature_extraction": {"pooling": "mean"},
    "text_generation": {"stream": True},
}
_SAME = 5e-4  # scores that differ by less are shown alike


@dataclass(frozen=True)
class Context:
    """What was asked, of which model."""

    description: Description
    body: Mapping[str, Any]


class Bar(NamedTuple):
    """A score and what it is of."""

    name: str
    score: float
    note: str = ""


# A part of an answer's bars: their caption, and they.
Bars = List[Tuple[str, List[Bar]]]


class Shape(NamedTuple):
    """A shape of answers; `show` is given the answer, what was asked, and the other model's answer of the same shape."""

    fits: Callable[[object], bool]
    show: Callable[[object, Context, Optional[object]], str]
    differs: Callable[[object, object], str]  # how two of them differ, in a sentence; "" where they do not


def shape_of(value: object) -> Shape:
    """The first shape that an answer has."""
    return next(shape for shape in SHAPES if shape.fits(value))


def show(value: object, context: Context, other: Optional[object] = None) -> str:
    """An answer as HTML; beside another model's, with what differs marked."""
    shape = shape_of(value)
    alike = other is not None and shape_of(other) is shape
    return shape.show(value, context, other if alike else None)


def difference(value: object, other: object) -> str:
    """How two models' answers differ, in a sentence."""
    if value == other:
        return "Both give the same answer."
    shape = shape_of(value)
    if shape_of(other) is not shape:
        return "The answers are of different kinds."
    return shape.differs(value, other) or "Both give the same answer, but for the last digits of scores."


def _listed(value: object) -> List[Any]:
    """An answer's objects, whose keys its shape has checked."""
    return value if isinstance(value, list) else [value]


def _has(*keys: str) -> Callable[[object], bool]:
    """Whether an answer is, or begins with, an object of these keys."""

    def fits(value: object) -> bool:
        first = _listed(value)[0] if _listed(value) else None
        return isinstance(first, dict) and set(keys) <= set(first)

    return fits


# Bars


def _labels(value: object, context: Optional[Context]) -> Bars:
    return [("", [Bar(item["label"], item["score"]) for item in _listed(value)])]


def _candidates(value: object, context: Optional[Context]) -> Bars:
    [answer] = _listed(value)
    return [("", [Bar(*each) for each in zip(answer["labels"], answer["scores"])])]


def _tokens(value: object, context: Optional[Context]) -> Bars:
    listed = _listed(value)
    masks = listed if isinstance(listed[0], list) else [listed]
    return [
        (
            f"mask {number + 1}" if len(masks) > 1 else "",
            [Bar(item["token_str"], item["score"], item["sequence"]) for item in mask],
        )
        for number, mask in enumerate(masks)
    ]


def _ranks(value: object, context: Optional[Context]) -> Bars:
    documents = context.body.get("documents", []) if context else []
    return [
        (
            "",
            [
                Bar(f"document {item['index'] + 1}", item["score"], documents[item["index"]] if documents else "")
                for item in _listed(value)
            ],
        )
    ]


def _bars(read: Callable[[object, Optional[Context]], Bars]) -> Dict[str, Any]:
    """The shape of answers that are read as bars."""

    def show_bars(value: object, context: Context, other: Optional[object]) -> str:
        others = dict(read(other, None)) if other is not None else {}
        return "".join(
            _table(caption, bars, others.get(caption) if other is not None else None)
            for caption, bars in read(value, context)
        )

    def differs(value: object, other: object) -> str:
        one, two = ([bar for _, part in read(each, None) for bar in part] for each in (value, other))
        if [bar.name for bar in one[:1]] != [bar.name for bar in two[:1]]:
            return f"They differ: the first has {one[0].name}, the second {two[0].name}."
        if [bar.name for bar in one] != [bar.name for bar in two]:
            return "Both have the same first, and others in another order."
        largest = max(abs(a.score - b.score) for a, b in zip(one, two))
        return f"The order is the same; scores differ by {largest:.3g} at most." if largest >= _SAME else ""

    return {"show": show_bars, "differs": differs}


def _table(caption: str, bars: Sequence[Bar], other: Optional[Sequence[Bar]]) -> str:
    if not bars:
        return "<p>The answer is empty.</p>"
    widest = max(1.0, *(abs(bar.score) for bar in bars))
    there = {bar.name: (rank, bar.score) for rank, bar in enumerate(other or [])}
    rows = []
    for rank, bar in enumerate(bars):
        width = 100 * abs(bar.score) / widest
        note = f'<span class="ts-note">{escaped(bar.note)}</span>' if bar.note else ""
        drawn = f'<span class="ts-bar" aria-hidden="true"><span style="width:{width:.1f}%"></span></span>'
        name, score = escaped(bar.name), f'<td class="ts-score">{_score(bar.score)}</td>'
        if other is None:
            rows.append(f'<tr><th scope="row">{name}{note}</th><td>{drawn}</td>{score}</tr>')
            continue
        compared, differs = _compared(
            rank, bar, there
        )  # two tables stand side by side, so that the bar is under its name
        own = ' class="ts-differs"' if differs else ""
        rows.append(
            f'<tr{own}><th scope="row"><span class="ts-name">{name}</span>{note}{drawn}</th>{score}{compared}</tr>'
        )
    title = f"<caption>{escaped(caption)}</caption>" if caption else ""
    columns = f"<th></th>{'<th></th>' if other is None else ''}<th>score</th>"
    columns += "" if other is None else "<th>to the other</th>"
    return f'<table class="ts-bars">{title}<thead class="ts-columns"><tr>{columns}</tr></thead>{"".join(rows)}</table>'


def _compared(rank: int, bar: Bar, there: Mapping[str, Tuple[int, float]]) -> Tuple[str, bool]:
    """The cell that compares a bar with the other model's of the same name, and whether it is another one."""
    if bar.name not in there:
        return '<td class="ts-delta">only here</td>', True
    other_rank, score = there[bar.name]
    moved = f" (there {_ordinal(other_rank + 1)})" if other_rank != rank else ""
    delta = bar.score - score
    return f'<td class="ts-delta">{f"{delta:+.3f}" if abs(delta) >= _SAME else "same"}{moved}</td>', bool(moved)


def _ordinal(number: int) -> str:
    last = 0 if number % 100 in (11, 12, 13) else number % 10
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(last, 'th') }"


def _score(score: float) -> str:
    return f"{score:.4f}" if 1e-4 <= abs(score) < 100 or not score else f"{score:.3g}"


# Marks in the text


def _kind(label: str) -> str:
    """The kind of entity that a label is of, whether it begins one or goes on with it."""
    return label[2:] if label[:2] in ("B-", "I-") else label


def _spans(value: object) -> List[Mark]:
    """Entities, or the answers to a question, as marks."""
    found = []
    for number, item in enumerate(_listed(value)):
        label = item.get("entity_group", item.get("entity"))
        if label is None:
            label = f"answer {number + 1}" if len(_listed(value)) > 1 else "answer"
        found.append(Mark(item["start"], item["end"], label, _kind(label), item["score"]))
    return found


def _show_spans(value: object, context: Context, other: Optional[object]) -> str:
    name = context.description.long_field
    kinds = list(dict.fromkeys(map(_kind, context.description.labels)))
    marks = _spans(value)
    if other is not None:
        there = {(mark.start, mark.end, mark.kind) for mark in _spans(other)}
        marks = [mark._replace(only_here=(mark.start, mark.end, mark.kind) not in there) for mark in marks]
    text = marked(str(context.body.get(name, "")), [mark for mark in marks if mark.end > mark.start], kinds)
    none = "" if marks else '<p class="ts-facts">Nothing is marked in this text.</p>'
    answers = [Bar(item["answer"] or "no answer", item["score"]) for item in _listed(value) if "answer" in item]
    return f'<p class="ts-text">{text}</p>{none}{_table("", answers, None) if answers else ""}'


def _spans_differ(value: object, other: object) -> str:
    one, two = ({(mark.start, mark.end, mark.kind) for mark in _spans(each)} for each in (value, other))
    if one == two:
        return ""
    return (
        f"{len(one & two)} marks are the same; {len(one - two)} only the first has, {len(two - one)} only the second."
    )


# Texts


def _written(value: object) -> Union[str, List[Dict[str, str]]]:
    """A text, or a chat's messages."""
    written: Union[str, List[Dict[str, str]]] = value if isinstance(value, str) else _listed(value)[0]["generated_text"]
    return written


def _show_text(value: object, context: Context, other: Optional[object]) -> str:
    written = _written(value)
    if isinstance(written, list):
        messages = "".join(f"<dt>{escaped(m['role'])}</dt><dd>{escaped(m['content'])}</dd>" for m in written)
        return f'<dl class="ts-chat">{messages}</dl>'
    text = escaped(written) if other is None else changed_words(written, str(_written(other)))
    return f'<p class="ts-text ts-written">{text}</p>'


def _texts_differ(value: object, other: object) -> str:
    return "" if _written(value) == _written(other) else "The texts differ; the words that only one has are underlined."


# Vectors


def _vectors(value: object) -> List[List[float]]:
    found = _listed(value)
    while found and isinstance(found[0], list) and found[0] and isinstance(found[0][0], list):
        found = found[0]
    return found if found and isinstance(found[0], list) else [found]


def _is_numbers(value: object) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _show_vectors(value: object, context: Context, other: Optional[object]) -> str:
    vectors = _vectors(value)
    count = f"{len(vectors)} vectors of" if len(vectors) > 1 else "A vector of"
    rows = "".join(
        f'<tr><th scope="row">{number + 1}</th><td>{_stripes(vector)}</td><td class="ts-score">{_norm(vector):.3f}</td></tr>'
        for number, vector in enumerate(vectors[:64])
    )
    more = f'<p class="ts-facts">and {len(vectors) - 64} more</p>' if len(vectors) > 64 else ""
    columns = "<th></th><th>upwards: above 0, downwards: below</th><th>length</th>"
    return (
        f'<p class="ts-facts">{count} {len(vectors[0]):,} numbers</p><table class="ts-bars ts-vectors">'
        f'<thead class="ts-columns"><tr>{columns}</tr></thead>{rows}</table>{more}'
    )


def _norm(vector: Sequence[float]) -> float:
    return math.sqrt(sum(number * number for number in vector))


def _stripes(vector: Sequence[float]) -> str:
    """A vector's first numbers as a picture: for each a stroke upwards or downwards."""
    shown = vector[:256]
    largest = max(map(abs, shown), default=0) or 1
    strokes = "".join(f"M{i + 0.5} 20v{-18 * number / largest:.1f}" for i, number in enumerate(shown))
    said = ", ".join(f"{number:.3f}" for number in vector[:4])
    return (
        f'<svg class="ts-vector" viewBox="0 0 {len(shown)} 40" preserveAspectRatio="none" role="img" '
        f'aria-label="begins with {said}"><path d="{strokes}"/></svg>'
    )


def _vectors_differ(value: object, other: object) -> str:
    one, two = _vectors(value), _vectors(other)
    if [len(v) for v in one] != [len(v) for v in two]:
        return f"The vectors have {len(one[0]):,} and {len(two[0]):,} numbers, and cannot be compared."
    least = min(sum(a * b for a, b in zip(v, w)) / (_norm(v) * _norm(w) or 1) for v, w in zip(one, two))
    return f"Cosine of the two: {least:.4f}{' at least' if len(one) > 1 else ''}."


def _show_json(value: object, context: Context, other: Optional[object]) -> str:
    return f'<pre class="ts-json">{escaped(json.dumps(value, indent=1, ensure_ascii=False))}</pre>'


def _show_heat(value: object, context: Context, other: Optional[object]) -> str:
    return "".join(heat.heat_map(explanation, context.body) for explanation in _listed(value))


def _heat_differs(value: object, other: object) -> str:
    return heat.explanations_differ(_listed(value)[0], _listed(other)[0])


def _is_filled(value: object) -> bool:
    """What may stand at a mask, or at each of several."""
    return any(
        map(_has("token_str", "score", "sequence"), (value, value[0] if value and isinstance(value, list) else 0))
    )


SHAPES: Tuple[Shape, ...] = (
    Shape(_has(*attributions.KEYS), _show_heat, _heat_differs),
    Shape(_has("label", "score"), **_bars(_labels)),
    Shape(lambda value: isinstance(value, dict) and {"labels", "scores"} <= set(value), **_bars(_candidates)),
    Shape(_is_filled, **_bars(_tokens)),
    Shape(_has("start", "end", "score"), _show_spans, _spans_differ),
    Shape(_has("index", "score"), **_bars(_ranks)),
    Shape(lambda value: value == [], _show_spans, _spans_differ),  # a text without entities
    Shape(lambda value: isinstance(value, str) or _has("generated_text")(value), _show_text, _texts_differ),
    Shape(_is_numbers, _show_vectors, _vectors_differ),
    Shape(lambda value: True, _show_json, lambda value, other: "The answers differ."),
)
