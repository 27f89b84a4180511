"""Feeds one thread with batches: each holds what waits when the thread is free.

The service's micro-batches and lanes need the whole list at once, and one thread: OpenMP keeps threads for each that calls it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Callable, Deque, List, Mapping, NamedTuple, Optional, Sequence, Union

if TYPE_CHECKING:
    from traceserve_runtime.batching.batches import Stats
    from traceserve_runtime.service import Call, Reply, Service

logger = logging.getLogger(__name__)

_SECONDS_IDLE = 0.02  # without a request, until the engine is told that nobody waits

# Called after each batch: what was computed, the replies, and the seconds that it took.
Report = Callable[["Stats", Sequence["Reply"], float], None]


class Piece(NamedTuple):
    """A piece of a stream, with the headers of its response."""

    body: bytes
    headers: Mapping[str, str]


class Asked:
    """A call that waits or is being answered."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.gone = False  # its client has left: it is not computed, if that has not begun
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
        """At most `most` calls go together, and the first of them waits `delay` seconds at most for others."""
        self._service = service
        self._most = most
        self._delay = delay
        self._report = report
        self._thread = ThreadPoolExecutor(1, "traceserve")
        self._waiting: Deque[Asked] = deque()
        self._busy = False  # a batch runs, or the next one is being collected
        self._full: Optional[asyncio.Event] = None  # a whole batch waits

    @property
    def waiting(self) -> int:
        """Calls that no batch holds yet."""
        return len(self._waiting)

    def ask(self, call: Call) -> Asked:
        """Queue a call."""
        job = Asked(call)
        self._waiting.append(job)
        if not self._busy:
            self._busy = True
            asyncio.ensure_future(self._collect())
        elif self._full is not None and len(self._waiting) >= self._most:
            self._full.set()
        return job

    async def _collect(self) -> None:
        """Wait for others, then hand over a batch."""
        if self._delay > 0 and len(self._waiting) < self._most:
            self._full = asyncio.Event()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._full.wait(), self._delay)
            self._full = None
        batch: List[Asked] = []
        while self._waiting and len(batch) < self._most:
            job = self._waiting.popleft()
            if not job.gone:
                batch.append(job)
        if batch:
            loop = asyncio.get_running_loop()
            self._thread.submit(self._run, batch, loop)
        else:
            self._busy = False

    def _run(self, batch: List[Asked], loop: asyncio.AbstractEventLoop) -> None:
        """Answer a batch, in the thread."""
        from traceserve_runtime.batching.batches import Stats

        def send(index: int, body: bytes, headers: Mapping[str, str]) -> None:
            loop.call_soon_threadsafe(batch[index].tell, Piece(body, headers))

        stats, began = Stats(), time.perf_counter()
        replies = self._service.answer([job.call for job in batch], stats, send)
        seconds = time.perf_counter() - began
        loop.call_soon_threadsafe(self._finish, batch, replies)
        if self._report is not None:
            try:
                self._report(stats, replies, seconds)
            except Exception:  # metrics are not worth an answer
                logger.exception("traceserve: what a batch was could not be counted")

    def _finish(self, batch: Sequence[Asked], replies: Sequence[Reply]) -> None:
        for job, reply in zip(batch, replies):
            job.tell(reply)
        if self._waiting:
            asyncio.ensure_future(self._collect())
        else:
            self._busy = False
            asyncio.get_running_loop().call_later(_SECONDS_IDLE, self._rest)

    def _rest(self) -> None:
        """Give back memory, or measure one run, where nobody waits."""
        if not self._busy:
            self._thread.submit(self._service.engine.idle)
