"""A load generator for one HTTP endpoint: closed loop, or open loop without coordinated omission.

It shares its processor with the measured server, so it has one thread and one small protocol object per connection;
`tests/benchmarks/ceiling.py` measures its cost. Requests due in the measured span count, and the load
continues until each has its answer, so slow ones are not lost at the end.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import random
import ssl
import time
import urllib.parse
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, List, Mapping, Optional, Sequence, Set

import numpy as np

from traceserve.errors import ServerError
from traceserve.measuring.connections import Connection, fine_selector, reason, requests, require

if TYPE_CHECKING:
    from numpy.typing import NDArray

# An open loop opens connections as needed, up to this many (or the requested number, if larger). Beyond it requests
# wait,
# and the wait is part of their latency. Below the usual limit of 1,024 open files.
MOST_CONNECTIONS = 512
_RETRY = 0.05  # seconds before retrying a refused connection
_TICK = 0.05  # seconds between checks of the clock


@dataclass(frozen=True)
class Endpoint:
    """The target of requests: a complete URL, and additional headers."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """The measured values; times in seconds."""

    connections: int  # open concurrently, at most
    rate: Optional[float]  # requested requests/s; None: closed loop
    seconds: float  # the measured span; in an open loop until the last answer, if later
    latencies: NDArray[np.float64]  # of each 2xx answer, in order of completion
    errors: Dict[str, int]  # number of failures, by reason
    cpu: float = 0.0  # processor seconds of the load generator per second of the span

    @property
    def requests(self) -> int:
        """The number of answered requests."""
        return len(self.latencies)

    @property
    def failed(self) -> int:
        """The number of requests without an answer, or with a status other than 2xx."""
        return sum(self.errors.values())

    @property
    def throughput(self) -> float:
        """Answered requests per second."""
        return self.requests / self.seconds

    def percentile(self, p: float) -> float:
        """Return the latency that `p` percent of the answered requests did not exceed (nearest rank); NaN if there is
        none."""
        if not self.requests:
            return float("nan")
        return float(self._ordered[max(0, math.ceil(p / 100 * self.requests) - 1)])

    @cached_property
    def _ordered(self) -> NDArray[np.float64]:
        return np.sort(self.latencies)


def run(
    target: Endpoint,
    bodies: Sequence[bytes],
    content_type: str = "application/json",
    connections: int = 16,
    rate: Optional[float] = None,
    seconds: float = 10.0,
    warm_up: float = 2.0,
    seed: int = 0,
    progress: Optional[Callable[[float], None]] = None,
    timeout: float = 60.0,
) -> Result:
    """POST `bodies`, in a shuffled order that repeats, and measure.

    Without `rate`, each connection sends its next request once its last one is answered (closed loop). With it,
    requests are due at the times of a Poisson process, regardless of earlier answers, and their latency counts
    from then (open loop). `progress` receives the elapsed share of the time, 0 to 1. Raises ServerError
    if no connection can be made at the start; later failures are counted.
    """
    require()
    load = _Load(
        target,
        requests(target.url, target.headers, bodies, content_type, seed),
        connections,
        rate,
        seconds,
        warm_up,
        seed,
        timeout,
    )
    loop = asyncio.SelectorEventLoop(fine_selector())
    raised: List[BaseException] = []

    def stop(loop: asyncio.AbstractEventLoop, context: Dict[str, Any]) -> None:
        """Handle a callback's exception, including a signal's interruption, which asyncio would only log."""
        raised.append(context.get("exception") or RuntimeError(context["message"]))
        loop.stop()

    loop.set_exception_handler(stop)
    collects = gc.isenabled()
    gc.disable()  # its pauses would be measured
    try:
        return loop.run_until_complete(load.run(progress))
    except RuntimeError:
        if raised:
            raise raised[0] from None
        raise
    finally:
        if collects:
            gc.enable()
        load.close()
        _close(loop)


def _close(loop: asyncio.AbstractEventLoop) -> None:
    loop.set_exception_handler(lambda loop, context: None)  # for discarded connections
    loop.run_until_complete(_cancel_all())
    loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)  # transports close in the loop's next iteration


class _Load:
    """The state of one run: requests due, in flight, and answered."""

    def __init__(
        self,
        target: Endpoint,
        requests: Sequence[bytes],
        connections: int,
        rate: Optional[float],
        seconds: float,
        warm_up: float,
        seed: int,
        timeout: float,
    ) -> None:
        self.url = target.url
        self.requests = itertools.cycle(requests)
        self.connections, self.rate, self.seconds, self.warm_up = connections, rate, seconds, warm_up
        self.timeout = timeout
        self.limit = connections if rate is None else max(connections, MOST_CONNECTIONS)
        self.gaps = random.Random(seed + 1)
        self.latencies = array("d")
        self.errors: Counter[str] = Counter()
        self.due: Deque[float] = deque()  # due times of the requests that wait for a connection
        self.idle: List[Connection] = []
        self.open: Set[Connection] = set()
        self.opening = 0
        self.tasks: Set[asyncio.Task[None]] = set()
        self.most = 0
        self.pending = 0  # counted requests without an answer
        self.start = self.end = self.last = float("inf")
        self.cpu = 0.0
        self.over = False
        self.address: Dict[str, Any] = {}

    async def run(self, progress: Optional[Callable[[float], None]]) -> Result:
        await self._open_all()
        begun = time.perf_counter()
        self.start = begun + self.warm_up
        self.end = self.last = self.start + self.seconds
        if self.rate is None:
            for connection in list(self.open):
                self.released(connection)
        else:
            self.next_due = begun
            self.idle = list(self.open)
            self._arrive()
        loop = asyncio.get_running_loop()
        loop.call_later(self.warm_up, self._start_cpu)
        loop.call_later(self.warm_up + self.seconds, self._stop_cpu)
        while True:
            await asyncio.sleep(_TICK)
            now = time.perf_counter()
            if progress:
                progress(min(1.0, (now - begun) / (self.warm_up + self.seconds)))
            self._give_up(now)
            if now >= self.end + _TICK and (not self.pending or now >= self.end + self.timeout):
                break
        return self._finish()

    def _start_cpu(self) -> None:
        self.cpu = -time.process_time()

    def _stop_cpu(self) -> None:
        self.cpu = (self.cpu + time.process_time()) / self.seconds

    def _give_up(self, now: float) -> None:
        for connection in [c for c in self.open if c.due is not None and now - c.sent > self.timeout]:
            connection.fail(f"no answer in {self.timeout:g} s")

    def _finish(self) -> Result:
        if self.pending:
            self.errors[f"no answer in {self.timeout:g} s"] += self.pending
        latencies = np.array(self.latencies, dtype=np.float64)
        # A closed loop sends as many requests in the span as are answered in it. In an open loop the requested number
        # is due,
        # whatever the server can do: the time of the last answer shows that.
        seconds = self.seconds if self.rate is None else max(self.end, self.last) - self.start
        return Result(self.most, self.rate, seconds, latencies, dict(self.errors.most_common()), self.cpu)

    def close(self) -> None:
        self.over = True
        for connection in self.open:
            connection.abort()

    # --- requests ---

    def _arrive(self) -> None:
        """Send the requests that are due, and schedule the next call."""
        if self.over:
            return
        assert self.rate is not None
        while self.next_due <= time.perf_counter():
            self._admit(self.next_due)
            if self.idle:
                self.idle.pop().send(self.due.popleft(), next(self.requests))
            elif len(self.open) + self.opening < self.limit:
                self._open_one()
            self.next_due += self.gaps.expovariate(self.rate)
        asyncio.get_running_loop().call_later(max(0.0, self.next_due - time.perf_counter()), self._arrive)

    def _admit(self, due: float) -> None:
        self.due.append(due)
        if self.start <= due < self.end:
            self.pending += 1

    def released(self, connection: Connection) -> None:
        """Record that a connection can take a request."""
        if self.rate is None:
            self._admit(time.perf_counter())
        if self.due:
            connection.send(self.due.popleft(), next(self.requests))
        else:
            self.idle.append(connection)

    def answered(self, due: float, status: int) -> None:
        if self.start <= due < self.end:
            self.pending -= 1
            if 200 <= status < 300:
                self.last = time.perf_counter()
                self.latencies.append(self.last - due)
            else:
                self.errors[f"HTTP {status}"] += 1

    def failed(self, due: float, reason: str) -> None:
        if self.start <= due < self.end:
            self.pending -= 1
            self.errors[reason] += 1

    # --- connections ---

    async def _open_all(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        secure = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if secure else 80)
        self.address = {"host": parts.hostname, "port": port, "ssl": secure}
        if secure:
            self.address["server_hostname"] = parts.hostname
        try:
            first = await self._connect()
            assert first.transport is not None
            self.address["host"] = first.transport.get_extra_info("peername")[0]  # names are resolved once
            await asyncio.gather(*(self._connect() for _ in range(self.connections - 1)))
        except OSError as error:
            raise ServerError(f"{self.url} cannot be reached: {reason(error)}") from None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(self), **self.address)
        return connection

    def connected(self, connection: Connection) -> None:
        self.open.add(connection)
        self.most = max(self.most, len(self.open))

    def disconnected(self, connection: Connection) -> None:
        """Record a lost connection. In a closed loop, or if requests wait, another replaces it."""
        if connection not in self.open:
            return
        self.open.remove(connection)
        if connection in self.idle:
            self.idle.remove(connection)
        self._replace()

    def _replace(self) -> None:
        if self.over:
            return
        if self.rate is None:
            self._admit(time.perf_counter())
        if self.due and len(self.open) + self.opening < self.limit:
            self._open_one()

    def _open_one(self) -> None:
        self.opening += 1
        task = asyncio.get_running_loop().create_task(self._try())
        self.tasks.add(task)
        task.add_done_callback(self._tried)

    def _tried(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            raise error

    async def _try(self) -> None:
        try:
            connection = await self._connect()
        except OSError as error:
            if self.due:
                self.failed(self.due.popleft(), reason(error))
            await asyncio.sleep(_RETRY)
            self.opening -= 1
            self._replace()
            return
        self.opening -= 1
        if self.over:
            connection.abort()
        elif self.due:
            connection.send(self.due.popleft(), next(self.requests))
        else:
            self.idle.append(connection)
