"""The explanations that an engine is working on: each is a list of short runs, between which predictions go first."""

from __future__ import annotations

import logging
import time
from collections import deque
from functools import partial
from typing import Callable, Deque, Dict, Generator, List, NamedTuple, Optional, Sequence, Tuple, Union

from traceserve_runtime import failures
from traceserve_runtime.errors import InvalidRequest, OutOfTime, TraceserveError
from traceserve_runtime.explaining import integrated_gradients, occlusion
from traceserve_runtime.explaining.answers import GRADIENTS, OCCLUSION, RowExplanation, explanation
from traceserve_runtime.explaining.integrated_gradients import STEPS
from traceserve_runtime.explaining.pacing import Pacing
from traceserve_runtime.explaining.targets import Aim, Differentiable, scalars
from traceserve_runtime.explaining.words import Word, words_of
from traceserve_runtime.json_types import Json
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.pending import Pending
from traceserve_runtime.runner import Arrays, Runner
from traceserve_runtime.tasks.contract import Answer, Request, Task
from traceserve_runtime.texts.rows import Encoded, Row

logger = logging.getLogger(__name__)

Room = Callable[[int], int]  # how many rows of a length the next run may have
_Text = Tuple[Aim, Row, Sequence[Word]]  # a row that is explained

_ALIKE = {"float32": 1e-3}  # how far the two graphs' numbers may differ, relative to those above 1
_NEARLY_ALIKE = 0.1  # in lower precisions, where they differ with the number of rows too


class Explainer(NamedTuple):
    """What an explanation needs of an engine; `gradients` is None, with the reason, for a model without them."""

    manifest: Manifest
    task: Task
    runner: Runner
    gradients: Union[Differentiable, str]


class Explanations:
    """Explanations in progress; they take turns."""

    def __init__(self, explainer: Callable[[], Explainer], pacing: Pacing, seconds: float, polite: bool) -> None:
        """`explainer` is asked at the first explanation, since it loads the model's gradients; `seconds` is the most
        that one may take by default. `polite`: predictions may join between two runs, and go first."""
        self._explainer = explainer
        self._pacing = pacing
        self._room = partial(pacing.rows, polite=polite)
        self._polite = polite
        self._seconds = seconds
        self._waiting: Deque[Tuple[Pending, _Steps, float]] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def begin(
        self, pending: Pending, answer: Answer, encoded: Encoded, outputs: Sequence[Arrays], began: float
    ) -> None:
        """Let a request whose prediction is there wait for its explanation."""
        steps = _Steps(pending.request, answer, encoded, outputs)
        limit = float(pending.request.parameters.get("seconds", self._seconds))
        self._waiting.append((pending, steps, began + limit))

    def wait(self) -> float:
        """Return for how many seconds predictions come first."""
        return self._pacing.wait(time.perf_counter()) if self._polite else 0.0

    def turn(self) -> None:
        """Make one run for the first that waits, and drop those that nobody wants or that are out of time."""
        now = time.perf_counter()
        for pending, steps, deadline in list(self._waiting):
            if not pending.left and now >= deadline:
                pending.result = steps.out_of_time()
        self._waiting = deque(each for each in self._waiting if not each[0].left and each[0].result is None)
        if not self._waiting or self.wait() > 0:
            return
        pending, steps, deadline = self._waiting.popleft()
        explainer = failures.contained("it loaded the model's gradients", self._explainer)
        if isinstance(explainer, TraceserveError):
            pending.result = explainer
            return
        began = time.perf_counter()
        pending.result = steps.go_on(explainer, self._room)
        self._pacing.ran(began, time.perf_counter())
        if pending.result is None:
            self._waiting.append((pending, steps, deadline))


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
            served = float(
                scalars({name: array[None] for name, array in outputs[text[0].row].items()}, text[0].cells)[0]
            )
            part = yield from _by_gradients(explainer, room, text, steps, served)
            if part is None:
                why_not = "the graph with gradients does not give the served answer for this text"
                break
            parts.append(part)
    wanted = request.parameters.get("method")
    if why_not and wanted == GRADIENTS:
        raise InvalidRequest(f"there are no gradients: {why_not}; ask for occlusion", "parameters.method")
    if why_not:
        parts = []
        for text in texts:
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
