"""The explanation of an answer, as clients get it."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Sequence, Tuple

from traceserve_runtime.explaining.integrated_gradients import completeness_error
from traceserve_runtime.explaining.words import Word
from traceserve_runtime.json_types import Json, JsonObject

GRADIENTS, OCCLUSION = "integrated_gradients", "occlusion"
METHODS = (GRADIENTS, OCCLUSION)


class RowExplanation(NamedTuple):
    """What one row (window) adds: its words and their attributions, the number on the text and on the baseline, and
    what special tokens got."""

    words: Sequence[Word]
    attributions: Sequence[float]
    value: float
    baseline: float
    rest: float = 0.0


def explanation(
    method: str, answer: Json, target: JsonObject, quantity: str, parts: Sequence[RowExplanation], steps: int
) -> JsonObject:
    """Return the document; `parts` are already weighted."""
    amounts: Dict[Tuple[str, int, int], float] = {}  # windows share words
    texts: Dict[Tuple[str, int, int], str] = {}
    for part in parts:
        for word, amount in zip(part.words, part.attributions):
            span = word.field, word.start, word.end
            texts[span] = word.text
            amounts[span] = amounts.get(span, 0.0) + float(amount)
    words: List[JsonObject] = [
        {"word": texts[span], "field": span[0], "start": span[1], "end": span[2], "attribution": amount}
        for span, amount in amounts.items()
    ]
    value, baseline = sum(part.value for part in parts), sum(part.baseline for part in parts)
    every = [amount for part in parts for amount in (*part.attributions, part.rest)]
    return {
        "method": method,
        "answer": answer,
        "target": target,
        "quantity": quantity,
        "value": value,
        "baseline_value": baseline,
        "words": words,
        "completeness_error": completeness_error(every, value - baseline),
        "steps": steps,
    }
