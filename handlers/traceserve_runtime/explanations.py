"""The explanations that an engine is working on: each is a list of short runs, between which predictions go first."""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import Callable, Deque, Dict, Generator, List, NamedTuple, Optional, Sequence, Tuple, Union

from traceserve_runtime import failures
from traceserve_runtime.errors import InvalidRequest, OutOfTime, TraceserveError
from traceserve_runtime.explaining import integrated_gradients, occlusion
from traceserve_runtime.explaining.answers import GRADIENTS, OCCLUSION, RowExplanation, explanation
from traceserve_runtime.explaining.integrated_gradients import STEPS
from traceserve_runtime.explaining.pacing import MOST_TOKENS, Pacing
from traceserve_runtime.explaining.targets import Aim, Differentiable, scalars
from traceserve_runtime.explaining.words import Word, words_of
from traceserve_runtime.json_types import Json
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.pending import Pending
from traceserve_runtime.runner import Arrays, Runner
from traceserve_runtime.tasks.contract import Answer, Request, Task
from traceserve_runtime.texts.rows import Encoded, Row

Room = Callable[[int, int], int]  # how many rows of a length the next run may have, of those that are wanted
_Text = Tuple[Aim, Row, Sequence[Word]]  # a row that is explained

# Calls whose explanations are under way, beside predictions: each holds its texts' tokens, and a place in the queue.
_MOST_CALLS = 4
_ALIKE = {"float32": 1e-3}  # how far the two graphs' numbers may differ, relative to those above 1
_NEARLY_ALIKE = 0.1  # in lower precisions, where they differ with the number of rows too


class Explainer(NamedTuple):
    """What an explanation needs of an engine; `gradients` is the reason for a model that has none."""

    manifest: Manifest
    task: Task
    runner: Runner
    gradients: Union[Differentiable, str]


class _Explained(NamedTuple):
    """A request that is being explained, until `deadline`."""

    pending: Pending
    steps: _Steps
    deadline: float


class Explanations:
    """Explanations in progress. Calls take turns, and a call's requests come one after the other."""

    def __init__(self, explainer: Callable[[], Explainer], pacing: Pacing, seconds: float, polite: bool) -> None:
        """`explainer` is asked at the first explanation, since it loads the model's gradients; `seconds` is the most
        that one may take. `polite`: predictions may join between two runs, and go first."""
        self._explainer = explainer
        self._pacing = pacing
        self._room = partial(pacing.rows, polite=polite)
        self._polite = polite
        self._seconds = seconds
        self._calls: Deque[Deque[_Explained]] = deque()

    def __bool__(self) -> bool:
        return bool(self._calls)

    def begin(self, pending: Pending, answer: Answer, encoded: Encoded, outputs: Sequence[Arrays]) -> None:
        """Let a request whose prediction is there wait for its explanation."""
        steps = _Steps(pending.request, answer, encoded, outputs)
        limit = min(self._seconds, float(pending.request.parameters.get("seconds", self._seconds)))
        explained = _Explained(pending, steps, pending.joined + limit)
        group = pending.request.group
        own = next((call for call in self._calls if group is not None and call[0].pending.request.group == group), None)
        if own is not None:
            own.append(explained)
        elif self._polite and len(self._calls) >= _MOST_CALLS:
            pending.result = OutOfTime(
                f"explanations of {_MOST_CALLS} calls are under way, and predictions go first; ask again later"
            )
        else:
            self._calls.append(deque([explained]))

    def wait(self) -> float:
        """Return for how many seconds predictions come first."""
        return self._pacing.wait(time.perf_counter()) if self._polite else 0.0

    def turn(self) -> None:
        """Drop those that nobody wants or that are out of time, and make one run for the next call, if it may now."""
        if self._calls:
            self._drop(time.perf_counter())
        if not self._calls or self.wait() > 0:
            return
        call = self._calls.popleft()
        explained = call[0]
        explainer = self._explainer()  # the first call loads the gradients, which is no time of a run
        began = time.perf_counter()
        explained.pending.result = explained.steps.go_on(explainer, self._room)
        self._pacing.ran(began, time.perf_counter())
        if explained.pending.result is not None:
            call.popleft()
        if call:
            self._calls.append(call)

    def _drop(self, now: float) -> None:
        for explained in (each for call in self._calls for each in call):
            if not explained.pending.left and now >= explained.deadline:
                explained.pending.result = explained.steps.out_of_time()
        calls = (
            deque(each for each in call if not each.pending.left and each.pending.result is None)
            for call in self._calls
        )
        self._calls = deque(call for call in calls if call)


class _Steps:
    """One request's explanation, run by run."""

    def __init__(self, request: Request, answer: Answer, encoded: Encoded, outputs: Sequence[Arrays]) -> None:
        self._request = request
        self._answer = answer
        self._encoded = encoded
        self._outputs = outputs
        self._runs: Optional[Generator[None, None, Json]] = None
        self._done = 0

    def go_on(self, explainer: Explainer, room: Room) -> Union[Answer, TraceserveError, None]:
        """Make one run; return the answer, or an error, once it is there."""
        return failures.contained("it explained this answer", partial(self._go_on, explainer, room))

    def _go_on(self, explainer: Explainer, room: Room) -> Optional[Answer]:
        if self._runs is None:
            self._runs = _explain(explainer, room, self._request, self._answer.value, self._encoded.rows, self._outputs)
        try:
            next(self._runs)
            self._done += 1
        except StopIteration as end:
            return Answer(end.value, self._answer.unseen, self._answer.tokens)
        return None

    def out_of_time(self) -> OutOfTime:
        """Return the error for one that took too long."""
        return OutOfTime(
            f"predictions go first, and the explanation's time was over after {self._done} of its runs; ask again later, or "
            "for fewer steps, or with more seconds",
            "parameters.seconds",
        )


def _explain(
    explainer: Explainer,
    room: Room,
    request: Request,
    answer: Json,
    rows: Sequence[Row],
    outputs: Sequence[Arrays],
) -> Generator[None, None, Json]:
    """Explain an answer; yields after each run of the model."""
    task = explainer.task
    target = task.target(request, rows, outputs)
    segments = task.segments(request)
    texts = [(aim, rows[aim.row], words_of(rows[aim.row], segments[rows[aim.row].part])) for aim in target.aims]
    steps = int(request.parameters.get("steps", STEPS))
    parts: List[RowExplanation] = []
    why_not = _without_gradients(explainer, request, texts)
    if not why_not:
        for text in texts:
            if parts:
                yield
            served = float(
                scalars({name: array[None] for name, array in outputs[text[0].row].items()}, text[0].cells)[0]
            )
            part = yield from _by_gradients(explainer, room, text, steps, served)
            if part is None:
                why_not = "the graph with gradients does not give the served answer for this text, or no number"
                break
            parts.append(part)
    wanted = request.parameters.get("method")
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
    if len(rows) > 1:
        notes["windows"] = {"of": len(rows), "explained": [aim.row for aim in target.aims]}
    return {**explanation(method, answer, target.name, target.quantity, parts, steps), **notes}


def _without_gradients(explainer: Explainer, request: Request, texts: Sequence[_Text]) -> str:
    """Return why an answer is explained by occlusion; empty if it is explained by gradients."""
    if request.parameters.get("method") == OCCLUSION:
        return "the request asks for it"
    if isinstance(explainer.gradients, str):
        return explainer.gradients
    shortest = explainer.manifest.shapes.shortest
    if any(row.length < shortest for _, row, _ in texts):
        return f"the text is shorter than the {shortest} tokens that the model reads"
    if any(row.length > MOST_TOKENS for _, row, _ in texts):
        return f"the text has more than the {MOST_TOKENS:,} tokens whose gradients are computed at a time"
    return ""


def _by_gradients(
    explainer: Explainer, room: Room, text: _Text, steps: int, served: float
) -> Generator[None, None, Optional[RowExplanation]]:
    """Return None if the model with gradients gives another number than the `served` one: it would explain another
    answer."""
    aim, row, words = text
    assert not isinstance(explainer.gradients, str)
    manifest = explainer.manifest
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


def _by_occlusion(explainer: Explainer, room: Room, text: _Text, most: int) -> Generator[None, None, RowExplanation]:
    aim, row, words = text
    manifest, task = explainer.manifest, explainer.task
    hidden = occlusion.grouped(words, most)
    hiding = occlusion.hiding_id(task.tokenizer, manifest)
    per_token = [output.name for output in task.outputs if output.per_token]
    found, value, baseline = yield from occlusion.occlude(
        explainer.runner, row, aim.cells, hidden, manifest, hiding, per_token, room
    )
    return _weighted(RowExplanation(hidden, found, value, baseline), aim.weight)


def _weighted(part: RowExplanation, weight: float) -> RowExplanation:
    value, baseline, rest = (weight * each for each in part[2:])
    return RowExplanation(part.words, [weight * each for each in part.attributions], value, baseline, rest)
