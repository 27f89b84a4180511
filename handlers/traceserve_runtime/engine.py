"""An archive's folder and a list of requests to a list of answers or errors; knows nothing of TorchServe."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, Generator, Iterator, List, Optional, Sequence, Union

from traceserve_runtime import failures, memory
from traceserve_runtime.batching import batches, costs
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.batching.costs import Timing
from traceserve_runtime.batching.lanes import Batches, Lanes, schedule
from traceserve_runtime.errors import InvalidManifest, TraceserveError
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays, Runner
from traceserve_runtime.runtimes import RUNTIMES
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Job, Parts, Request, Task, characters
from traceserve_runtime.texts import limits
from traceserve_runtime.texts.tokenization import Encoded, TextTokenizer

logger = logging.getLogger(__name__)

_SECONDS_TO_FIT = 0.4  # on all cores, and on one each; small models fit all shapes into it, large ones three
_RUNS_TO_FIT = 4  # of each shape
_FIRST_ANSWERING = 0.1  # seconds in which requests are answered before the first run is measured
_ANSWERING = 30  # times the last such run, they are before the next one: under load it is 3 % of the time
_MANY_TOKENS = 4096  # read since memory was given back: what these took is worth the millisecond
_OF_ONE_CORE = 0.9  # a token's cost there, of its cost on all cores times their number: a guess, until it is measured

Emit = Callable[..., None]  # see `Engine.answer`


def load_task(folder: Path, manifest: Manifest) -> Task:
    """The archive's task with its tokenizer, without its model."""
    kind = TASKS[manifest.task]
    tokenizer = TextTokenizer(
        folder, manifest.tokenizer, manifest.max_length, manifest.max_rows, windows=kind.merges_windows
    )
    task = kind(manifest, tokenizer)
    task.read_files(folder)
    return task


class Engine:
    """A loaded archive."""

    def __init__(self, folder: Path, manifest: Manifest, task: Task, runner: Runner) -> None:
        self.folder = folder
        self.manifest = manifest
        self.task = task
        self.runner = runner
        self.cost = replace(task.cost, padding=runner.padding)  # of a run on this machine, once measured
        self.lanes: Optional[Lanes] = None  # where it can run several micro-batches side by side
        self._measuring: Iterator[float] = iter(())
        self._answer_first = 0.0  # seconds of answering until the next run is measured
        self._tokens_since = 0  # memory was given back

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", settings: Settings = Settings()) -> Engine:
        """Read an archive's folder.

        Raises InvalidManifest for a folder that is not what its manifest says, MissingPackage without a library.
        """
        manifest = Manifest.read(folder, verify=False)
        if settings.length_step is not None and not manifest.shapes.padded:
            raise InvalidManifest(
                "model-config.yaml: length_step pads rows, and the answers of this model change with padding; leave it out"
            )
        if settings.length_step is not None:
            manifest = replace(manifest, shapes=manifest.shapes.stepped(settings.length_step, manifest.max_length))
        with ThreadPoolExecutor(1) as pool:  # hashing takes as long as loading, on another core
            verified = pool.submit(manifest.verify, folder)
            try:
                engine = cls._load(folder, manifest, device, settings)
            finally:
                verified.result()  # what is no longer what was verified is told first
        return engine

    @classmethod
    def _load(cls, folder: Path, manifest: Manifest, device: str, settings: Settings) -> Engine:
        for value, table, what in ((manifest.task, TASKS, "task"), (manifest.save_mode, RUNTIMES, "save mode")):
            if value not in table:
                raise InvalidManifest(f"this runtime does not know the {what} {value!r}, but: {', '.join(table)}")
        task = load_task(folder, manifest)
        return cls(folder, manifest, task, RUNTIMES[manifest.save_mode](manifest, folder, device, settings))

    def warm_up(self) -> None:
        """Answer the task's sample, short and long, so that no client waits for first calls."""
        for request in self.task.warm_up_requests():
            [answer] = self.answer([request])
            if isinstance(answer, TraceserveError):
                raise answer

    def open_lanes(self) -> None:
        """From now on run micro-batches side by side where the runner can; at guessed costs, until `measure` knows them."""
        if self.lanes is None and not self.task.loop:
            threads = self.runner.open_lanes()
            if threads:
                longer = _OF_ONE_CORE * len(threads)
                cost = replace(self.cost, token=longer * self.cost.token, attention=longer * self.cost.attention)
                self.lanes = Lanes(threads, cost)

    def share_cores(self) -> None:
        """From now on leave cores to other processes that hold them, where the runner can."""
        self.runner.share_cores()

    def measure_while_idle(self) -> None:
        """`measure`, but one run at a time, each in a call of `idle`: on the way to the first answer this would be a tenth of
        the time, and a thread of its own would have OpenMP's threads of its own, which keep these waiting."""
        self._measuring, self._answer_first = self._measure(), _FIRST_ANSWERING

    def idle(self) -> None:
        """To be called when nobody waits for an answer: memory goes back to the system, and one run may be measured."""
        if self._tokens_since > _MANY_TOKENS:
            memory.give_back()
            self._tokens_since = 0
        if self._answer_first > 0:
            return
        try:
            self._answer_first = _ANSWERING * next(self._measuring, 0.0)
        except (RuntimeError, MemoryError) as error:
            logger.warning("the cost of this model's runs could not be measured, and is guessed: %s", error)

    def measure(self) -> None:
        """Learn what a run costs on all cores, and on one of them while the others are as busy; see `lanes`.

        From then on what runs together, and so the last digits of answers, depends on this machine.
        """
        for _ in self._measure():
            pass

    def _measure(self) -> Iterator[float]:
        """`measure`; gives the seconds of each run."""
        if self.task.loop:
            return
        timings = yield from self._time_runs(self.runner)
        self.cost = costs.fit(timings, self.cost.padding) or self.cost
        self.open_lanes()
        if self.lanes is None:
            return
        threads = self.lanes.threads

        def side_by_side(inputs: Arrays) -> None:
            for running in [thread.submit(self.runner, inputs) for thread in threads]:
                running.result()

        alone = yield from self._time_runs(side_by_side)
        cost = costs.fit(alone, self.cost.padding)
        if cost is not None and timings:
            unit = costs.seconds_per_cost(alone, cost) / costs.seconds_per_cost(timings, self.cost)
            self.lanes = Lanes(threads, cost.scaled(unit))

    def _time_runs(self, run: Callable[[Arrays], object]) -> Generator[float, None, List[Timing]]:
        """How long runs of a few shapes take, smallest first, as far as the time for it goes; gives each run's seconds."""
        shapes, most = self.manifest.shapes, self.manifest.max_length
        wanted = [(1, 16), (4, 16), (1, 64), (16, 16), (4, 64), (1, most)]
        fitting = {(shapes.batch(b), shapes.length(min(n, most))) for b, n in wanted if shapes.holds(b)}
        timings: List[Timing] = []
        spent = 0.0
        for batch, length in sorted(fitting, key=lambda shape: shape[0] * shape[1]):
            inputs = batches.filled(self.manifest, batch, length)
            seconds = []
            for _ in range(1 + _RUNS_TO_FIT):  # the first run of a shape prepares others
                began = time.perf_counter()
                run(inputs)
                seconds.append(time.perf_counter() - began)
                yield seconds[-1]
            timings.append(Timing(batch, length, min(seconds[1:])))  # what takes longer was disturbed
            spent += sum(seconds)
            if len(timings) >= 3 and spent > _SECONDS_TO_FIT:
                break
        return timings

    def answer(
        self, requests: Sequence[Request], stats: Optional[Stats] = None, emit: Optional[Emit] = None
    ) -> List[Union[Answer, TraceserveError]]:
        """One answer, or the error that is this request's own, for each request, in order; adds to `stats`.

        `emit(i, unseen, text)` is called with the whole text so far, each time that it may have grown, for a request
        that is to be streamed; `unseen` as in Answer. Where it asks for details, its tokens follow, a sequence of WrittenToken.
        """
        stats = Stats() if stats is None else stats
        stats.requests += len(requests)
        parts = self.task.parts(requests)
        groups = [request.group for request in requests]
        most = self.task.tokenizer.limits.characters
        answers: List[Union[Answer, TraceserveError]] = []
        for own in limits.slices(groups, [characters(part) for part in parts], most):
            emits = [partial(emit, i) if emit is not None else None for i in range(own.start, own.stop)]
            answers += self._answer(requests[own], parts[own], stats, emits)
        return answers

    def _answer(
        self,
        requests: Sequence[Request],
        parts: Sequence[Parts],
        stats: Stats,
        emits: Sequence[Optional[Callable[..., None]]],
    ) -> List[Union[Answer, TraceserveError]]:
        """`answer`, for as many as are held in memory at once."""
        encoded = self._limit_groups(requests, self._tokenize(requests, parts))
        jobs = [
            Job(row, request, partial(emit, item.unseen) if emit is not None else None)
            for request, item, emit in zip(requests, encoded, emits)
            if isinstance(item, Encoded)
            for row in item.rows
        ]
        outputs = iter(self._run(jobs, stats))
        answers: List[Union[Answer, TraceserveError]] = []
        for request, item in zip(requests, encoded):
            if isinstance(item, TraceserveError):
                answers.append(item)
            else:
                answers.append(self._decode(request, item, [next(outputs) for _ in item.rows]))
        return answers

    def _tokenize(self, requests: Sequence[Request], parts: Sequence[Parts]) -> List[Union[Encoded, TraceserveError]]:
        """The rows of each request, or its error; where that fails for all of them, it is done one by one."""
        try:
            with failures.panics():
                return self.task.tokenize(requests, parts)
        except Exception:  # the edge of one request: of which, is not known yet
            alone = [
                failures.contained("it tokenized this request", partial(self.task.tokenize, [request], [part]))
                for request, part in zip(requests, parts)
            ]
            return [each if isinstance(each, TraceserveError) else each[0] for each in alone]

    def _limit_groups(
        self, requests: Sequence[Request], encoded: List[Union[Encoded, TraceserveError]]
    ) -> List[Union[Encoded, TraceserveError]]:
        """Refuse each group whose requests together have more rows or tokens than one HTTP request may take."""
        measured = (
            (request.group, len(item.rows), sum(row.length for row in item.rows))
            for request, item in zip(requests, encoded)
            if isinstance(item, Encoded)
        )
        refused = limits.refused(measured, self.task.tokenizer.limits.of_rows)
        if not refused:
            return encoded
        return [refused.get(request.group, item) for request, item in zip(requests, encoded)]

    def _run(self, jobs: List[Job], stats: Stats) -> List[Union[Arrays, TraceserveError]]:
        """The outputs of each row, in order; a micro-batch that fails is run again row by row."""
        outputs: List[Union[Arrays, TraceserveError, None]] = [None] * len(jobs)

        def run(batches: Batches) -> Stats:
            own = Stats()
            for batch in batches:
                results: Sequence[Union[Arrays, TraceserveError]]
                try:
                    results = self.task.predict(self.runner, [jobs[i] for i in batch], own)
                except Exception:  # the edge of one request: of which, is not known yet
                    results = [self._run_alone(jobs[i], own) for i in batch]
                for i, result in zip(batch, results):
                    outputs[i] = result
            return own

        lengths, lanes = [job.row.length for job in jobs], self.lanes
        planned = schedule(lengths, self.manifest.shapes, self.cost, lanes, self.task.most_tokens)
        began = time.perf_counter()
        if lanes is not None and len(planned) > 1:
            stats.add(*lanes.run(run, planned))
        else:
            stats.add(run(planned[0]))
        self._answer_first -= time.perf_counter() - began
        self._tokens_since += sum(lengths)
        return outputs  # type: ignore[return-value]  # the plan covers every row

    def _run_alone(self, job: Job, stats: Stats) -> Union[Arrays, TraceserveError]:
        try:
            return self.task.predict(self.runner, [job], stats)[0]
        except TraceserveError as error:
            return error
        except Exception as error:  # the edge of one request
            return failures.of_the_model(error)

    def _decode(
        self, request: Request, encoded: Encoded, outputs: Sequence[Union[Arrays, TraceserveError]]
    ) -> Union[Answer, TraceserveError]:
        arrays: List[Arrays] = []
        for output in outputs:
            if isinstance(output, TraceserveError):
                return output
            arrays.append(output)

        def decode() -> Answer:
            value = self.task.answer(request, encoded.rows, arrays)
            tokens = sum(row.length for row in encoded.rows)
            return Answer(value, encoded.unseen, tokens, self.task.details(request, encoded.rows, arrays))

        return failures.contained("it made this answer", decode)
