"""Explains one answer, run by run: by integrated gradients where they can be had, or by occlusion."""

from __future__ import annotations

from typing import Any, Callable, Dict, Generator, List, Mapping, NamedTuple, Optional, Sequence, Union

from traceserve_runtime.errors import InvalidRequest, TraceserveError
from traceserve_runtime.explaining import integrated_gradients, occlusion
from traceserve_runtime.explaining.answers import GRADIENTS, OCCLUSION, RowExplanation, explanation
from traceserve_runtime.explaining.integrated_gradients import STEPS
from traceserve_runtime.explaining.pacing import MOST_EXPLAINED_TOKENS
from traceserve_runtime.explaining.targets import Aim, Differentiable, ExplanationTarget, scalars
from traceserve_runtime.explaining.words import Word
from traceserve_runtime.json_types import Json, JsonObject
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays, Runner
from traceserve_runtime.texts.rows import Row
from traceserve_runtime.texts.tokenization import TextTokenizer

Room = Callable[[int, int], int]  # how many rows of a length the next run may have, of those that are wanted

_ALIKE = {"float32": 1e-3}  # how far the two graphs' numbers may differ, relative to those above 1
_NEARLY_ALIKE = 0.1  # in lower precisions, where they differ with the number of rows too


class Explainer(NamedTuple):
    """What explanations need of an engine; `gradients` is the reason of a model without any, or the failure of one that
    should have them. `per_token` names such outputs."""

    manifest: Manifest
    runner: Runner
    tokenizer: TextTokenizer
    per_token: Sequence[str]
    gradients: Union[Differentiable, str, TraceserveError]


class ExplainedRow(NamedTuple):
    """A row that is explained, its words, and the outputs that it was answered by."""

    aim: Aim
    row: Row
    words: Sequence[Word]
    outputs: Arrays


def explanation_runs(
    explainer: Explainer,
    room: Room,
    parameters: Mapping[str, Any],
    answer: Json,
    target: ExplanationTarget,
    texts: Sequence[ExplainedRow],
) -> Generator[None, None, JsonObject]:
    """Explain an answer; yields after each run of the model.

    Raises InvalidRequest, or the failure to load the gradients, if the request asks for these and there are none.
    """
    steps = int(parameters.get("steps", STEPS))
    wanted = parameters.get("method")
    parts: List[RowExplanation] = []
    why_not = _without_gradients(explainer, wanted, texts)
    if not why_not:
        for text in texts:
            if parts:
                yield
            part = yield from _by_gradients(explainer, room, text, steps)
            if part is None:
                why_not = "the graph with gradients does not give the served answer for this text, or no number"
                break
            parts.append(part)
    if why_not and wanted == GRADIENTS:
        raise InvalidRequest(f"there are no gradients: {why_not}; ask for occlusion", "parameters.method")
    if why_not:
        parts = []
        for text in texts:
            yield
            part = yield from _by_occlusion(explainer, room, text, steps)
            parts.append(part)
    method = OCCLUSION if why_not else GRADIENTS
    notes: Dict[str, Json] = {"because": why_not} if why_not and wanted is None else {}
    return {**explanation(method, answer, target.name, target.quantity, parts, steps), **notes}


def _without_gradients(explainer: Explainer, wanted: Json, texts: Sequence[ExplainedRow]) -> str:
    """Return why an answer is explained by occlusion; empty if it is explained by gradients."""
    if wanted == OCCLUSION:
        return "the request asks for it"
    if isinstance(explainer.gradients, TraceserveError):
        if wanted == GRADIENTS:
            raise explainer.gradients
        return explainer.gradients.message
    if isinstance(explainer.gradients, str):
        return explainer.gradients
    shortest = explainer.manifest.shapes.shortest
    if any(text.row.length < shortest for text in texts):
        return f"the text is shorter than the {shortest} tokens that the model reads"
    if any(text.row.length > MOST_EXPLAINED_TOKENS for text in texts):
        return f"the text has more than the {MOST_EXPLAINED_TOKENS:,} tokens whose gradients are computed at a time"
    return ""


def _by_gradients(
    explainer: Explainer, room: Room, text: ExplainedRow, steps: int
) -> Generator[None, None, Optional[RowExplanation]]:
    """Return None if the model with gradients gives another number than the served one: it would explain another
    answer."""
    aim, row, words, outputs = text
    assert not isinstance(explainer.gradients, (str, TraceserveError))
    manifest = explainer.manifest
    served = float(scalars({name: array[None] for name, array in outputs.items()}, aim.cells)[0])
    most = _ALIKE.get(manifest.dtype, _NEARLY_ALIKE) * max(1.0, abs(served))
    found = yield from integrated_gradients.attribute(
        explainer.gradients,
        row,
        aim.cells,
        manifest,
        steps,
        room,
        lambda own: abs(own - served) <= most,
    )
    if found is None:
        return None
    own = [float(found.attributions[list(word.positions)].sum()) for word in words]
    rest = float(found.attributions.sum()) - sum(own)
    return _weighted(RowExplanation(words, own, found.value, found.baseline, rest), aim.weight)


def _by_occlusion(
    explainer: Explainer, room: Room, text: ExplainedRow, most: int
) -> Generator[None, None, RowExplanation]:
    manifest = explainer.manifest
    hidden = occlusion.grouped(text.words, most)
    hiding = occlusion.hiding_id(explainer.tokenizer, manifest)
    found, value, baseline = yield from occlusion.occlude(
        explainer.runner, text.row, text.aim.cells, hidden, manifest, hiding, explainer.per_token, room
    )
    return _weighted(RowExplanation(hidden, found, value, baseline), text.aim.weight)


def _weighted(part: RowExplanation, weight: float) -> RowExplanation:
    value, baseline, rest = (weight * each for each in part[2:])
    return RowExplanation(part.words, [weight * each for each in part.attributions], value, baseline, rest)
