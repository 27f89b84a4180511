"""An explanation as a heat map: each word of the text on a background by what it added to the answer, and the strongest in a
table, since colour alone tells nothing to some."""

from __future__ import annotations

from typing import Any, Mapping, Sequence, Tuple

from traceserve.playground.marks import INK, escaped
from traceserve.serving.attributions import Heat, Words, heats, strongest, target_in_words, text_at

_ADDS, _TAKES = (94, 201, 128), (245, 139, 125)  # on white, of which dark letters are read easily
_STRONGEST = 8  # words in the table
_FAINT = 0.02  # of the strongest; weaker ones have no background


def heat_map(explanation: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """An explanation of the answer to this body, as HTML."""
    words: Words = explanation["words"]
    parts = [f'<p class="ts-facts">{escaped(_told(explanation))}</p>']
    for field, own in heats(words).items():
        parts.append(f'<p class="ts-text">{_coloured(text_at(body, field) or "", own)}</p>')
    return "".join([*parts, _table(words)])


def explanations_differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """How two explanations differ, in a sentence; "" where they do not."""
    if one["target"] != other["target"]:
        return f"The first explains {target_in_words(one)}, the second {target_in_words(other)}."
    first, second = (strongest(each["words"])[:1] for each in (one, other))
    if [word["word"] for word in first] != [word["word"] for word in second]:
        return "The strongest word is another one: " + ", ".join(f'"{w["word"]}"' for w in [*first, *second]) + "."
    return ""


def _told(explanation: Mapping[str, Any]) -> str:
    told = (
        f"Explains {target_in_words(explanation)}: {explanation['quantity']} {explanation['value']:.3f}, without the words "
        f"{explanation['baseline_value']:.3f}; {explanation['method'].replace('_', ' ')}, {explanation['steps']} steps, "
        f"completeness error {explanation['completeness_error']:.2%}."
    )
    because = explanation.get("because")
    return f"{told} No gradients: {because}." if because else told


def _coloured(text: str, own: Sequence[Heat]) -> str:
    parts, done = [], 0
    for heat in own:
        if heat.start < done or abs(heat.share) < _FAINT:
            continue
        word = escaped(text[heat.start : heat.end])
        style = f"background:{_background(heat.share)};color:{INK}"
        parts += [
            escaped(text[done : heat.start]),
            f'<mark class="ts-mark" style="{style}" title="{heat.added:+.3f}">{word}</mark>',
        ]
        done = heat.end
    return "".join(parts) + escaped(text[done:])


def _background(share: float) -> str:
    colour: Tuple[int, int, int] = _ADDS if share > 0 else _TAKES
    red, green, blue = (round(255 + abs(share) * (part - 255)) for part in colour)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _table(words: Words) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escaped(word["word"])}</th><td>{"adds" if word["attribution"] > 0 else "takes"}</td>'
        f'<td class="ts-score">{word["attribution"]:+.3f}</td></tr>'
        for word in strongest(words)[:_STRONGEST]
    )
    columns = "<th>word</th><th></th><th>attribution</th>"
    return f'<table class="ts-bars ts-heat"><thead class="ts-columns"><tr>{columns}</tr></thead>{rows}</table>'
