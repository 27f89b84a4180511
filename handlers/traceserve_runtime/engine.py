"""Answers a list of requests from an archive's folder; independent of TorchServe."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Union

from traceserve_runtime import failures, memory
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.batching.lanes import Batches
from traceserve_runtime.batching.scheduler import Scheduler
from traceserve_runtime.errors import InvalidManifest, ModelFailure, TraceserveError, reason
from traceserve_runtime.explaining.methods import Explainer
from traceserve_runtime.explaining.pacing import Pacing
from traceserve_runtime.explaining.targets import Differentiable
from traceserve_runtime.explanations import Explanations
from traceserve_runtime.generation.loop import Member, WritingLoop
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.pending import Arrival, Backlog, Pending, Result, Unrun
from traceserve_runtime.runner import Arrays, Runner
from traceserve_runtime.runtimes import GRADIENT_READERS, RUNTIMES
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Job, Parts, Request, Task
from traceserve_runtime.texts import limits
from traceserve_runtime.texts.rows import Encoded
from traceserve_runtime.texts.tokenization import TextTokenizer

# In `Manifest.runtime`: why the archive has no gradients; empty if it has. Older archives do not say.
NO_GRADIENTS = "no_gradients"
_MANY_TOKENS = 4096  # read since memory was released: enough to spend a millisecond on it

Emit = Callable[..., None]  # see `Engine.answer`


def load_task(folder: Path, manifest: Manifest) -> Task:
    """Load the archive's task and tokenizer, without its model."""
    kind = TASKS[manifest.task]
    tokenizer = TextTokenizer(
        folder, manifest.tokenizer, manifest.max_length, manifest.max_rows, windows=kind.merges_windows
    )
    task = kind(manifest, tokenizer)
    task.read_files(folder)
    return task


class Engine:
    """A loaded archive."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        task: Task,
        runner: Runner,
        device: str = "cpu",
        settings: Settings = Settings(),
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.task = task
        self.runner = runner
        self.scheduler = Scheduler(runner, manifest, task.cost, task.most_tokens, loops=bool(task.loop))
        self._tokens_since = 0  # since memory was released
        self.pacing = Pacing()  # of explanations, beside predictions
        self.explain_seconds = settings.explain_seconds
        self._device = device
        self._explainer: Optional[Explainer] = None

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", settings: Settings = Settings()) -> Engine:
        """Load an archive's folder.

        Raises InvalidManifest if the folder does not match its manifest, MissingPackage if a library is missing.
        """
        manifest = Manifest.read(folder, verify=False)
        if settings.length_step is not None and not manifest.shapes.padded:
            raise InvalidManifest(
                "model-config.yaml: length_step pads rows, and the answers of this model change with padding; leave it out"
            )
        if settings.length_step is not None:
            manifest = replace(manifest, shapes=manifest.shapes.stepped(settings.length_step, manifest.max_length))
        with ThreadPoolExecutor(1) as pool:  # hashing takes as long as loading; use another core
            verified = pool.submit(manifest.verify, folder)
            try:
                engine = cls._load(folder, manifest, device, settings)
            finally:
                verified.result()  # report changed files first
        return engine

    @classmethod
    def _load(cls, folder: Path, manifest: Manifest, device: str, settings: Settings) -> Engine:
        for value, table, what in ((manifest.task, TASKS, "task"), (manifest.save_mode, RUNTIMES, "save mode")):
            if value not in table:
                raise InvalidManifest(f"this runtime does not support the {what} {value!r}, only: {', '.join(table)}")
        task = load_task(folder, manifest)
        runner = RUNTIMES[manifest.save_mode](manifest, folder, device, settings)
        return cls(folder, manifest, task, runner, device, settings)

    def make_ready(self) -> None:
        """Prepare to answer clients in a process of its own, as every host does."""
        self.warm_up()
        self.scheduler.make_ready()
        self.runner.share_cores()

    def warm_up(self) -> None:
        """Answer the task's sample, short and long, so that no client waits for the slow first calls."""
        for request in self.task.warm_up_requests():
            [answer] = self.answer([request])
            if isinstance(answer, TraceserveError):
                raise answer

    def idle(self) -> None:
        """Call this when nobody waits for an answer: it releases memory, and may measure one run."""
        if self._tokens_since > _MANY_TOKENS:
            memory.release_unused_memory()
            self._tokens_since = 0
        self.scheduler.idle()

    def count_tokens(self, tokens: int) -> None:
        """Count tokens of requests; see `idle`."""
        self._tokens_since += tokens

    def answer(
        self, requests: Sequence[Request], stats: Optional[Stats] = None, emit: Optional[Emit] = None
    ) -> List[Union[Answer, TraceserveError]]:
        """Return each request's answer or its own error, in order; adds to `stats`.

        For a streamed request, `emit(i, unseen, text)` is called with the whole text so far whenever it may have
        grown; `unseen` as in Answer. If the request asks for details, the tokens follow, a sequence of WrittenToken.
        """
        work = Work(self, Stats() if stats is None else stats)
        pending = work.join(requests, [partial(emit, i) if emit else None for i in range(len(requests))])
        while work.busy:
            work.turn()
        return [each.answer() for each in pending]

    def encode(self, requests: Sequence[Request], parts: Sequence[Parts]) -> List[Union[Encoded, TraceserveError]]:
        """Return each request's rows, or its error."""
        return self._limit_groups(requests, self._tokenize(requests, parts))

    def _tokenize(self, requests: Sequence[Request], parts: Sequence[Parts]) -> List[Union[Encoded, TraceserveError]]:
        """Return each request's rows, or its error; if tokenizing all fails, retry one by one."""
        try:
            with failures.panics():
                return self.task.tokenize(requests, parts)
        except Exception:  # the edge of one request, not known yet which
            alone = [
                failures.contained("it tokenized this request", partial(self.task.tokenize, [request], [part]))
                for request, part in zip(requests, parts)
            ]
            return [each if isinstance(each, TraceserveError) else each[0] for each in alone]

    def _limit_groups(
        self, requests: Sequence[Request], encoded: List[Union[Encoded, TraceserveError]]
    ) -> List[Union[Encoded, TraceserveError]]:
        """Refuse each group whose requests together exceed the rows or tokens of one HTTP request, or its answers' size."""
        measured = (
            (request.group, len(item.rows), sum(row.length for row in item.rows))
            for request, item in zip(requests, encoded)
            if isinstance(item, Encoded)
        )
        refused = self.task.refused_answers(requests, encoded)
        refused = {**refused, **limits.refused_groups(measured, self.task.tokenizer.limits.of_rows)}
        if not refused:
            return encoded
        return [refused.get(request.group, item) for request, item in zip(requests, encoded)]

    def explainer(self) -> Explainer:
        """Return what explanations need; the first call loads the model's gradients, and if that fails the next."""
        if self._explainer is None:
            per_token = [output.name for output in self.task.outputs if output.per_token]
            gradients = self._gradients()
            explainer = Explainer(self.manifest, self.runner, self.task.tokenizer, per_token, gradients)
            if isinstance(gradients, TraceserveError):
                return explainer
            self._explainer = explainer
        return self._explainer

    def _gradients(self) -> Union[Differentiable, str, TraceserveError]:
        """Return the model's gradients, why it has none, or the failure to load them."""
        why_not = str(self.manifest.runtime.get(NO_GRADIENTS, "the archive has none"))
        if why_not or self.manifest.save_mode not in GRADIENT_READERS:
            return why_not or "the archive has none"
        try:
            return GRADIENT_READERS[self.manifest.save_mode](self.manifest, self.folder, self._device, self.runner)
        except Exception as error:  # the edge of this explanation
            failure = ModelFailure(f"the graph of the gradients cannot be loaded: {reason(error)}")
            failure.__cause__ = error
            return failure

    def run(self, jobs: List[Job], stats: Stats) -> List[Union[Arrays, TraceserveError]]:
        """Return the outputs of each row, in order; a failed micro-batch is retried row by row."""
        outputs: List[Union[Arrays, TraceserveError, None]] = [None] * len(jobs)

        def run(batches: Batches) -> Stats:
            own = Stats()
            for batch in batches:
                results: Sequence[Union[Arrays, TraceserveError]]
                try:
                    results = self.task.predict(self.runner, [jobs[i] for i in batch], own)
                except Exception:  # the edge of one request, not known yet which
                    results = [self._run_alone(jobs[i], own) for i in batch]
                for i, result in zip(batch, results):
                    outputs[i] = result
            return own

        stats.add(*self.scheduler.run([job.row.length for job in jobs], run))
        return outputs  # type: ignore[return-value]  # the plan covers every row

    def _run_alone(self, job: Job, stats: Stats) -> Union[Arrays, TraceserveError]:
        try:
            return self.task.predict(self.runner, [job], stats)[0]
        except TraceserveError as error:
            return error
        except Exception as error:  # the edge of one request
            return failures.of_the_model(error)

    def decode(
        self, request: Request, encoded: Encoded, outputs: Sequence[Union[Arrays, TraceserveError]]
    ) -> Union[Answer, TraceserveError]:
        """Return a request's answer from its rows' outputs."""
        arrays: List[Arrays] = []
        for output in outputs:
            if isinstance(output, TraceserveError):
                return output
            arrays.append(output)

        def decode() -> Answer:
            value, details = self.task.answer(request, encoded.rows, arrays)
            answer = Answer(value, encoded.unseen, sum(row.length for row in encoded.rows), details)
            if not request.continues:
                return answer
            return replace(answer, continuation=self.task.continuation(request, encoded.rows, arrays, answer))

        return failures.contained("it made this answer", decode)


class Work:
    """Requests that an engine answers, in turns: others may join between two turns, and answered ones leave.

    A turn of a task that writes texts is one token of each, and the prompts that can be read in `seconds`, see
    `generation.loop`. For all other tasks it runs as many rows as `seconds` are expected to suffice for, and at least one,
    of all clients in turn. By default it runs all that memory holds at once, which is the fastest where nobody joins. Each
    group's number is its own among all that join.
    """

    def __init__(self, engine: Engine, stats: Stats, seconds: float = math.inf) -> None:
        self._engine = engine
        self._stats = stats
        self._seconds = seconds
        self._loop = engine.task.open_loop(engine.runner, stats, engine.scheduler.pace, seconds)
        self._backlog = Backlog(engine.task.tokenizer.limits.characters)
        self._explanations = Explanations(
            engine.task, engine.explainer, engine.pacing, engine.explain_seconds, polite=not math.isinf(seconds)
        )
        self._some_left = False

    @property
    def busy(self) -> bool:
        """Whether a request is not done."""
        return bool(self._backlog or self._explanations) or (self._loop is not None and self._loop.busy)

    @property
    def rest(self) -> float:
        """For how many seconds a turn would do nothing, unless others join: only explanations wait, for predictions."""
        resting = bool(self._explanations) and not self._backlog and self._loop is None
        return self._explanations.wait() if resting else 0.0

    def join(self, requests: Sequence[Request], emits: Sequence[Optional[Callable[..., None]]]) -> List[Pending]:
        """Add requests, and return them in order; see `Engine.answer` for the callbacks."""
        self._stats.requests += len(requests)
        parts = self._engine.task.parts(requests)
        pending = [Pending(request, emit) for request, emit in zip(requests, emits)]
        for own in limits.groups_of([request.group for request in requests]):
            self._backlog.join(Arrival(pending[own], parts[own]))
        return pending

    def leave(self, pending: Pending) -> None:
        """Compute nothing more for a request."""
        pending.left = self._some_left = True
        for member in pending.members:
            member.done = True

    def turn(self) -> None:
        """Go one step further with everything."""
        if self._some_left:
            self._some_left = False
            self._backlog.forget()
        began = time.perf_counter()
        self._read(self._backlog.unread())
        if self._loop is not None:
            self._loop.turn()
        else:
            self._run(self._seconds - (time.perf_counter() - began))
            self._explanations.turn()

    def _read(self, arrivals: Sequence[Arrival]) -> None:
        """Tokenize requests; their rows join the loop, or wait to be run."""
        wanted = [
            [(pending, part) for pending, part in zip(own.pending, own.parts) if not pending.left] for own in arrivals
        ]
        flat = [each for own in wanted for each in own]
        encoded = iter(self._engine.encode([pending.request for pending, _ in flat], [part for _, part in flat]))
        for own, each in zip(arrivals, wanted):
            tokenized = []
            for pending, _ in each:
                item = next(encoded)
                if isinstance(item, TraceserveError):
                    pending.result = item
                    continue
                self._engine.count_tokens(sum(row.length for row in item.rows))
                emit = partial(pending.emit, item.unseen) if pending.emit else None
                jobs = [Job(row, pending.request, emit) for row in item.rows]
                if self._loop is None:
                    tokenized.append((Unrun(pending, item), jobs))
                    self._answer(tokenized[-1][0])  # if it has no rows
                else:
                    self._write(self._loop, pending, item, jobs)
            self._backlog.add(own, tokenized)

    def _run(self, seconds: float) -> None:
        """Run rows for about this long, and answer the requests that they complete."""
        scheduler = self._engine.scheduler
        rows = self._backlog.rows(scheduler.pace.cost_within(seconds), scheduler.row_cost)
        if not rows:
            return
        for row, output in zip(rows, self._engine.run([row.job for row in rows], self._stats)):
            row.unrun.keep(row.position, output)
            self._answer(row.unrun)
        self._backlog.ran(rows)
        if not all(row.job.request.explain for row in rows):
            self._engine.pacing.predicted(time.perf_counter())

    def _answer(self, unrun: Unrun) -> None:
        outputs = unrun.outputs()
        if outputs is None:
            return
        pending = unrun.pending
        result = self._engine.decode(pending.request, unrun.encoded, outputs)
        if pending.request.explain and isinstance(result, Answer):
            arrays = [output for output in outputs if not isinstance(output, TraceserveError)]
            self._explanations.begin(pending, result, unrun.encoded, arrays)
        else:
            pending.result = result

    def _write(self, loop: WritingLoop, pending: Pending, encoded: Encoded, jobs: Sequence[Job]) -> None:
        pending.members = [self._engine.task.member(job) for job in jobs]
        pending.result = partial(self._written, pending.request, encoded, pending.members)
        for member in pending.members:
            loop.join(member)

    def _written(self, request: Request, encoded: Encoded, members: Sequence[Member]) -> Result:
        """Return the answer of a request whose rows left the loop."""
        return self._engine.decode(request, encoded, [self._output(member) for member in members])

    def _output(self, member: Member) -> Union[Arrays, TraceserveError]:
        if member.error is None:
            return self._engine.task.written(member)
        error = member.error
        return error if isinstance(error, TraceserveError) else failures.of_the_model(error)
