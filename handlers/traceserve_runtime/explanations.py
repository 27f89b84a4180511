"""The explanations that an engine is working on: each is a list of short runs, between which predictions go first."""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import Callable, Deque, Generator, NamedTuple, Optional, Sequence, Union

from traceserve_runtime import failures
from traceserve_runtime.errors import OutOfTime, TraceserveError
from traceserve_runtime.explaining.methods import ExplainedRow, Explainer, Room, explanation_runs
from traceserve_runtime.explaining.pacing import Pacing
from traceserve_runtime.explaining.words import words_of
from traceserve_runtime.json_types import Json
from traceserve_runtime.pending import Pending
from traceserve_runtime.runner import Arrays
from traceserve_runtime.tasks.contract import Answer, Request, Task
from traceserve_runtime.texts.rows import Encoded

# Calls whose explanations are under way, beside predictions: each holds its texts' tokens, and a place in the queue.
_MOST_CALLS = 4


class _Explained(NamedTuple):
    """A request that is being explained, until `deadline`."""

    pending: Pending
    steps: _Steps
    deadline: float


class Explanations:
    """Explanations in progress. Calls take turns, and a call's requests come one after the other."""

    def __init__(
        self, task: Task, explainer: Callable[[], Explainer], pacing: Pacing, seconds: float, polite: bool
    ) -> None:
        """`explainer` is asked at each explanation's first run, since it loads the model's gradients; `seconds` is the
        most that one may take. `polite`: predictions may join between two runs, and go first."""
        self._task = task
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
        steps = _Steps(self._task, pending.request, answer, encoded, outputs)
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
        explained.steps.prepare(self._explainer)
        began = time.perf_counter()
        explained.pending.result = explained.steps.go_on(self._room)
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

    def __init__(
        self, task: Task, request: Request, answer: Answer, encoded: Encoded, outputs: Sequence[Arrays]
    ) -> None:
        self._task = task
        self._request = request
        self._answer = answer
        self._encoded = encoded
        self._outputs = outputs
        self._explainer: Optional[Explainer] = None
        self._runs: Optional[Generator[None, None, Json]] = None
        self._done = 0

    def prepare(self, explainer: Callable[[], Explainer]) -> None:
        """Get what the first run needs; it may load the model's gradients, which is no time of a run."""
        if self._explainer is None:
            self._explainer = explainer()

    def go_on(self, room: Room) -> Union[Answer, TraceserveError, None]:
        """Make one run; return the answer, or an error, once it is there."""
        return failures.contained("it explained this answer", partial(self._go_on, room))

    def _go_on(self, room: Room) -> Optional[Answer]:
        if self._runs is None:
            self._runs = self._explanation(room)
        try:
            next(self._runs)
            self._done += 1
        except StopIteration as end:
            return Answer(end.value, self._answer.unseen, self._answer.tokens)
        return None

    def _explanation(self, room: Room) -> Generator[None, None, Json]:
        assert self._explainer is not None
        request, rows, outputs = self._request, self._encoded.rows, self._outputs
        target = self._task.target(request, rows, outputs)
        segments = self._task.segments(request)
        texts = [
            ExplainedRow(aim, row, words_of(row, segments[row.part]), outputs[aim.row])
            for aim, row in ((aim, rows[aim.row]) for aim in target.aims)
        ]
        document = yield from explanation_runs(
            self._explainer, room, request.parameters, self._answer.value, target, texts
        )
        if len(rows) == 1:
            return document
        return {**document, "windows": {"of": len(rows), "explained": [aim.row for aim in target.aims]}}

    def out_of_time(self) -> OutOfTime:
        """Return the error for one that took too long."""
        return OutOfTime(
            f"predictions go first, and the explanation's time was over after {self._done} of its runs; ask again later, or "
            "for fewer steps, or with more seconds",
            "parameters.seconds",
        )
