"""Feeds one thread with batches: each holds what waits when the thread is free.

The service's micro-batches and lanes need the whole list at once, and one thread: OpenMP keeps threads for each that calls it.
Calls join a running batch between its turns, and each is answered when it is done: a turn is one token of each text that is
written, or else the rows that take about a tenth of a second, shared fairly by all clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Callable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from traceserve_hosts import earlier_runtimes

if TYPE_CHECKING:
    from traceserve_runtime.batching.batches import Stats
    from traceserve_runtime.errors import TraceserveError
    from traceserve_runtime.service import Call, Exchange, Reply, SendPiece, Service, Session

logger = logging.getLogger(__name__)

_LONGEST_REST = 0.05  # seconds; calls that come end it
_SECONDS_IDLE = 0.02  # without a request, until the engine is told that nobody waits

# Called after each turn: what was computed, the number of calls that were in it, and the seconds that it took.
Report = Callable[["Stats", int, float], None]


class Piece(NamedTuple):
    """A piece of a stream, with the headers of its response."""

    body: bytes
    headers: Mapping[str, str]


class Asked:
    """A call that waits or is being answered."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.gone = False  # its client has left: nothing more is computed for it
        self.exchange: Optional[Exchange] = None  # once a session has taken it
        self._events: asyncio.Queue[Union[Piece, Reply]] = asyncio.Queue()

    async def next(self) -> Union[Piece, Reply]:
        """The pieces of a stream as they come, and then, or at once, the reply."""
        return await self._events.get()

    def tell(self, event: Union[Piece, Reply]) -> None:
        """Add what `next` gives; in the event loop."""
        self._events.put_nowait(event)


class Batcher:
    """All methods but the constructor are called in one event loop."""

    def __init__(self, service: Service, most: int, delay: float, report: Optional[Report] = None) -> None:
        """At most `most` calls run together, and the first of them waits `delay` seconds at most for others."""
        self._service = service
        self._most = most
        self._delay = delay
        self._report = report
        self._thread = ThreadPoolExecutor(1, "traceserve")
        self._waiting: OrderedDict[Asked, None] = OrderedDict()  # the first one first
        self._joined: List[Asked] = []  # and are not answered
        self._moving = threading.Lock()  # a call is always in one of them, whichever thread asks
        self._busy = False  # a batch runs, or the next one is being collected
        self._moved = time.monotonic()
        self._full: Optional[asyncio.Event] = None  # a whole batch waits
        self._come = threading.Event()  # a call came while others are answered

    @property
    def waiting(self) -> int:
        """Calls beyond the one batch that is answered."""
        with self._moving:
            return len(self._waiting) + max(0, len(self._joined) - self._most)

    @property
    def standstill(self) -> float:
        """For how many seconds no turn went well, while calls waited."""
        return time.monotonic() - self._moved if self._busy else 0.0

    def ask(self, call: Call) -> Asked:
        """Queue a call."""
        job = Asked(call)
        with self._moving:
            self._waiting[job] = None
        self._come.set()
        if not self._busy:
            self._busy = True
            self._moved = time.monotonic()
            asyncio.ensure_future(self._collect())
        elif self._full is not None and len(self._waiting) >= self._most:
            self._full.set()
        return job

    def leave(self, job: Asked) -> None:
        """Forget a call whose client has gone, or was answered: it waits no longer, and nothing more is computed for it."""
        job.gone = True
        with self._moving:
            self._waiting.pop(job, None)

    async def _collect(self) -> None:
        """Wait for others, then hand over a batch."""
        if self._delay > 0 and len(self._waiting) < self._most:
            self._full = asyncio.Event()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._full.wait(), self._delay)
            self._full = None
        batch = self._taken(self._most)
        if batch:
            self._thread.submit(self._run, batch, asyncio.get_running_loop())
        else:
            self._busy = False

    def _taken(self, most: int) -> List[Asked]:
        """Take the first calls that wait."""
        taken: List[Asked] = []
        with self._moving:
            while self._waiting and len(taken) < most:
                taken.append(self._waiting.popitem(last=False)[0])
            self._joined += taken
        return taken

    def _run(self, batch: List[Asked], loop: asyncio.AbstractEventLoop) -> None:
        """Answer a batch and those that join it, in the thread."""
        try:
            self._answer(batch, loop)
        except BaseException as error:  # an outer edge: sessions answer their own failures; a panic is no Exception
            if not loop.is_closed():
                self._fail(error, loop)
        finally:
            self._joined = []
            if not loop.is_closed():  # else the server has ended
                loop.call_soon_threadsafe(self._finish)

    def _fail(self, error: BaseException, loop: asyncio.AbstractEventLoop) -> None:
        """Answer calls that no session could answer; log why, without the message, which may contain a text."""
        from traceserve_runtime import failures

        failure = failures.unexpected(error, "it answered this request")
        for job in self._joined:
            loop.call_soon_threadsafe(job.tell, _reply(self._service, job, failure))
        logger.error("traceserve: a batch could not be answered")
        failures.log([failure] * len(self._joined))

    def _answer(self, batch: List[Asked], loop: asyncio.AbstractEventLoop) -> None:
        from traceserve_runtime.batching.batches import Stats

        stats = Stats()
        running = _Running(self._service.session(stats), loop)
        running.join(batch)
        while running.calls:
            began = time.perf_counter()
            calls = running.turn()
            computed = stats.taken()
            if computed.micro_batches or not computed.errors:  # explanations count no micro-batches
                self._moved = time.monotonic()
            self._tell(computed, calls, time.perf_counter() - began)
            self._joined = [job for job, _ in running.calls]
            if running.calls:
                self._come.clear()
                running.join(self._taken(self._room()))
                if running.rest:  # only explanations wait, for predictions
                    self._come.wait(min(running.rest, _LONGEST_REST))
                    running.join(self._taken(self._room()))

    def _room(self) -> int:
        """How many calls may join now. Each text that is written lengthens every turn; rows that run once do not, and calls
        that wait behind long ones would wait for their end."""
        return self._most - len(self._joined) if self._service.engine.task.loop else self._most

    def _tell(self, stats: Stats, calls: int, seconds: float) -> None:
        if self._report is not None:
            try:
                self._report(stats, calls, seconds)
            except Exception:  # metrics are not worth an answer
                logger.exception("traceserve: what a batch was could not be counted")

    def _finish(self) -> None:
        if self._waiting:
            asyncio.ensure_future(self._collect())
        else:
            self._busy = False
            asyncio.get_running_loop().call_later(_SECONDS_IDLE, self._rest)

    def _rest(self) -> None:
        """Give back memory, or measure one run, where nobody waits."""
        if not self._busy:
            self._thread.submit(self._idle)

    def _idle(self) -> None:
        try:
            self._service.engine.idle()
        except Exception:  # nobody waits for this
            logger.exception("traceserve: an idle engine failed")


def _reply(service: Service, job: Asked, failure: TraceserveError) -> Reply:
    """The last reply to a call that no session could answer: in its protocol's format, and as the end of a begun stream."""
    from traceserve_runtime.batching.batches import Stats
    from traceserve_runtime.protocols import protocol_of
    from traceserve_runtime.service import Reply

    try:
        if job.exchange is not None:
            return service.reply_to(job.exchange, failure, Stats())
        return service.reply(job.call, protocol_of(job.call.headers), failure, Stats())
    except Exception:  # not even that, or the archive's runtime is of an earlier version
        return Reply(json.dumps(failure.to_json()).encode(), status=failure.status, phrase=failure.phrase)


class _Running:
    """The calls that the thread answers now; what they are told, they are told in the event loop."""

    def __init__(self, session: Session, loop: asyncio.AbstractEventLoop) -> None:
        self._session = session
        self._loop = loop
        self.calls: List[Tuple[Asked, Exchange]] = []

    def join(self, jobs: Sequence[Asked]) -> None:
        """Add calls."""
        if jobs:
            exchanges = self._session.join([job.call for job in jobs], [self._sender(job) for job in jobs])
            for job, exchange in zip(jobs, exchanges):
                job.exchange = exchange
                self.calls.append((job, exchange))

    @property
    def rest(self) -> float:
        """For how many seconds a turn would do nothing, unless others join."""
        return earlier_runtimes.rest_of(self._session)

    def turn(self) -> int:
        """Go one step further, and deliver the replies that there are now; returns the number of calls that were in it."""
        gone = {job for job, _ in self.calls if job.gone}  # read once: the event loop sets it meanwhile
        for job, exchange in self.calls:
            if job in gone:
                self._session.leave(exchange)
        calls = self.calls = [each for each in self.calls if each[0] not in gone]
        self._session.turn()
        for job, exchange in calls:
            if exchange.reply is not None:
                self._loop.call_soon_threadsafe(job.tell, exchange.reply)
        self.calls = [each for each in calls if each[1].reply is None]
        return len(calls)

    def _sender(self, job: Asked) -> SendPiece:
        def send(body: bytes, headers: Mapping[str, str]) -> None:
            self._loop.call_soon_threadsafe(job.tell, Piece(body, headers))

        return send
