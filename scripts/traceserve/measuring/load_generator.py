"""A load generator for one HTTP endpoint: closed loop, or open loop without coordinated omission.

It shares its processor with the measured server, so it has one thread, and libcurl sends its requests;
`tests/benchmarks/ceiling.py` measures its cost. Requests due in the measured span count, and the load
continues until each has its answer, so slow ones are not lost at the end.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import random
import threading
import time
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Callable, Deque, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from traceserve.errors import ServerError
from traceserve.measuring.transfers import Transfer, failure_reason, never_connected, require_libcurl, retriable

if TYPE_CHECKING:
    import pycurl
    from numpy.typing import NDArray

WRONG = "a wrong answer"
AnswerCheck = Callable[[bytes, bytes], bool]  # whether a request's body was given the right answer

# An open loop opens connections as needed, up to this many (or the requested number, if larger). Beyond it requests
# wait, and the wait is part of their latency.
MOST_CONNECTIONS = 512
_FILES = 1000  # most connections: select(2), which waits for libcurl's sockets, knows 1,024 files
_RETRY = 0.05  # seconds before retrying a refused connection
_PAUSE = 1.0  # seconds before a request is sent again
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
    retried: int = 0  # answered requests that had failed at first
    moments: Sequence[float] = ()  # when each request of `latencies` was answered, in seconds since the span's start
    failures: Sequence[float] = ()  # when an attempt failed that could be retried, whether it was or not

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
        return nearest_rank(self._ordered, p) if self.requests else math.nan

    @cached_property
    def _ordered(self) -> NDArray[np.float64]:
        return np.sort(self.latencies)


def nearest_rank(ordered: NDArray[np.float64], p: float) -> float:
    """Return the least of these values, in ascending order, that `p` percent of them do not exceed."""
    return float(ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)])


def send_load(
    target: Endpoint,
    bodies: Sequence[bytes],
    content_type: str = "application/json",
    connections: int = 16,
    *,
    rate: Optional[float] = None,
    seconds: float = 10.0,
    warm_up: float = 2.0,
    seed: int = 0,
    progress: Optional[Callable[[float], None]] = None,
    timeout: float = 60.0,
    retries: int = 0,
    check: Optional[AnswerCheck] = None,
    ended: Optional[threading.Event] = None,
) -> Result:
    """POST `bodies`, in a shuffled order that repeats, and measure.

    Without `rate`, each connection sends its next request once its last one is answered (closed loop). With it,
    requests are due at the times of a Poisson process, regardless of earlier answers, and their latency counts
    from then (open loop). `progress` receives the elapsed share of the time, 0 to 1. A request that got no answer, or a
    status that asks to try again, is sent again up to `retries` times, each after a second; its latency includes that.
    An answer that `check` refuses is an error. The span ends before `seconds` have passed where `ended` is set. Raises
    ServerError if no connection can be made at the start; later
    failures are counted.
    """
    require_libcurl()
    if not bodies:
        raise ServerError("there is nothing to send")
    if connections > _FILES:
        raise ServerError(
            f"{connections:,} connections are more than the {_FILES:,} that this load generator can watch"
        )
    shuffled = list(bodies)
    random.Random(seed).shuffle(shuffled)
    options = _Options(
        content_type=content_type,
        connections=connections,
        rate=rate,
        seconds=seconds,
        warm_up=warm_up,
        seed=seed,
        timeout=timeout,
        retries=retries,
        check=check,
        ended=ended,
    )
    load = _Load(target, shuffled, options)
    collects = gc.isenabled()
    gc.disable()  # its pauses would be measured
    try:
        return load.run(progress)
    finally:
        if collects:
            gc.enable()
        load.close()


@dataclass(frozen=True)
class _Options:
    """The options of `send_load`; times in seconds."""

    content_type: str
    connections: int
    rate: Optional[float]
    seconds: float
    warm_up: float
    seed: int
    timeout: float
    retries: int
    check: Optional[AnswerCheck]
    ended: Optional[threading.Event]


class _Load:
    """The state of one run: requests due, in flight, and answered."""

    def __init__(self, target: Endpoint, bodies: Sequence[bytes], options: _Options) -> None:
        import pycurl

        self.target, self.options = target, options
        self.bodies = itertools.cycle(bodies)
        self.seconds = options.seconds  # shorter where the span ends early
        self.limit = options.connections if options.rate is None else max(options.connections, MOST_CONNECTIONS)
        self.gaps = random.Random(options.seed + 1)
        self.latencies = array("d")
        self.moments, self.failures = array("d"), array("d")
        self.retried = 0
        self.errors: Counter[str] = Counter()
        self.due: Deque[float] = deque()  # due times of the requests that wait for a connection
        self.idle: List[Transfer] = []
        self.resting: Deque[Tuple[float, Transfer]] = deque()  # until when, for those whose connection was refused
        self.again: Deque[Tuple[float, Transfer]] = deque()  # when each is to send its request again
        self.active: Dict[pycurl.Curl, Transfer] = {}
        self.transfers: List[Transfer] = []
        self.reached = False
        self.prepared = False  # whether libcurl has not seen a request
        self.pending = 0  # counted requests without an answer
        self.next_due = self.start = self.end = self.last = float("inf")
        self.cpu: List[float] = []  # processor seconds at the span's start and end
        self.multi = pycurl.CurlMulti()
        self.multi.setopt(pycurl.M_MAXCONNECTS, self.limit)

    def run(self, progress: Optional[Callable[[float], None]]) -> Result:
        begun = time.perf_counter()
        self.start = begun + self.options.warm_up
        self.end = self.last = self.start + self.seconds
        if self.options.rate is None:
            for _ in range(self.options.connections):
                self._release(self._another())
        else:
            self.next_due = begun
        tick = begun
        while True:
            self.prepared = False
            self.multi.perform()
            self._collect()
            self._wake()
            self._arrive()
            now = time.perf_counter()
            if self.options.ended is not None and self.options.ended.is_set() and self.start < now < self.end:
                self.end, self.seconds = now, now - self.start
            self._measure_cpu(now)
            if now >= tick:
                tick = now + _TICK
                if progress:
                    progress(min(1.0, (now - begun) / (self.options.warm_up + self.seconds)))
                if now >= self.end + _TICK and (not self.pending or now >= self.end + self.options.timeout):
                    return self._result()
            if not self.prepared:
                self._wait(min(tick, self.next_due) - time.perf_counter())

    def _measure_cpu(self, now: float) -> None:
        if len(self.cpu) < 2 and now >= (self.end if self.cpu else self.start):
            self.cpu.append(time.process_time())

    def _wait(self, seconds: float) -> None:
        """Wait until a socket is ready, or this many seconds, exactly: other ways round up to milliseconds."""
        import pycurl

        if seconds <= 0:
            return
        if not self.active:
            time.sleep(seconds)
            return
        with contextlib.suppress(pycurl.error):  # interrupted by a signal, whose handler runs next
            self.multi.select(seconds)

    def _result(self) -> Result:
        if self.pending:
            self.errors[self._no_answer] += self.pending
        latencies = np.array(self.latencies, dtype=np.float64)
        # A closed loop sends as many requests in the span as are answered in it. In an open loop the requested number
        # is due, whatever the server can do: the time of the last answer shows that.
        seconds = self.seconds if self.options.rate is None else max(self.end, self.last) - self.start
        cpu = (self.cpu[1] - self.cpu[0]) / self.seconds
        return Result(
            len(self.transfers),
            self.options.rate,
            seconds,
            latencies,
            dict(self.errors.most_common()),
            cpu,
            self.retried,
            self.moments,
            self.failures,
        )

    @property
    def _no_answer(self) -> str:
        return f"no answer in {self.options.timeout:g} s"

    def close(self) -> None:
        """Close the connections. A signal may strike anywhere, so `active` need not be what libcurl has at work."""
        for transfer in self.transfers:
            transfer.handle.close()  # takes it out of libcurl's work, too
        self.multi.close()

    # --- requests ---

    def _another(self) -> Transfer:
        kept = self.options.check is not None
        transfer = Transfer(self.target.url, self.target.headers, self.options.content_type, self.options.timeout, kept)
        self.transfers.append(transfer)
        return transfer

    def _arrive(self) -> None:
        """Send the requests due in an open loop, each over an idle connection or a new one."""
        while self.next_due <= time.perf_counter():
            self._admit(self.next_due)
            if self.idle or len(self.transfers) < self.limit:
                self._send(self.idle.pop() if self.idle else self._another())
            assert self.options.rate is not None
            self.next_due += self.gaps.expovariate(self.options.rate)

    def _admit(self, due: float) -> None:
        self.due.append(due)
        if self.start <= due < self.end:
            self.pending += 1

    def _release(self, transfer: Transfer) -> None:
        """Record that it can take a request."""
        if self.options.rate is None:
            self._admit(time.perf_counter())
        if self.due:
            self._send(transfer)
        else:
            self.idle.append(transfer)

    def _send(self, transfer: Transfer) -> None:
        transfer.prepare(self.due.popleft(), next(self.bodies))
        self._start(transfer)

    def _start(self, transfer: Transfer) -> None:
        self.active[transfer.handle] = transfer
        self.prepared = True
        self.multi.add_handle(transfer.handle)

    def _wake(self) -> None:
        while self.resting and self.resting[0][0] <= time.perf_counter():
            self._release(self.resting.popleft()[1])
        while self.again and self.again[0][0] <= time.perf_counter():
            transfer = self.again.popleft()[1]
            transfer.repeat()
            self._start(transfer)

    def _collect(self) -> None:
        """Count the answers, and send what is due next."""
        _, answered, failed = self.multi.info_read()
        for handle in answered:
            transfer = self._take(handle)
            self.reached = True
            status = transfer.status
            if retriable(status) and self._retry(transfer):
                continue
            self._answered(transfer, status)
            self._release(transfer)
        for handle, code, message in failed:
            self._fail(self._take(handle), code, message)

    def _take(self, handle: pycurl.Curl) -> Transfer:
        self.multi.remove_handle(handle)
        return self.active.pop(handle)

    def _counts(self, transfer: Transfer) -> bool:
        """Return whether its request was due in the measured span."""
        return self.start <= transfer.due < self.end

    def _retry(self, transfer: Transfer) -> bool:
        """Plan to send a failed request again, if it may be; count the failed attempt."""
        now = time.perf_counter()
        if self._counts(transfer):
            self.failures.append(now - self.start)
        if transfer.attempts > self.options.retries:
            return False
        self.again.append((now + _PAUSE, transfer))
        return True

    def _answered(self, transfer: Transfer, status: int) -> None:
        if not self._counts(transfer):
            return
        self.pending -= 1
        if not 200 <= status < 300:
            self.errors[f"HTTP {status}"] += 1
        elif self.options.check is not None and not self.options.check(transfer.body, transfer.answer):
            self.errors[WRONG] += 1
        else:
            self.last = time.perf_counter()
            self.latencies.append(self.last - transfer.due)
            self.moments.append(self.last - self.start)
            self.retried += transfer.attempts > 1

    def _fail(self, transfer: Transfer, code: int, message: str) -> None:
        import pycurl

        timed_out = code == pycurl.E_OPERATION_TIMEDOUT
        why = self._no_answer if timed_out else failure_reason(transfer.handle, code, message)
        if never_connected(code) and not self.reached:
            raise ServerError(f"{self.target.url} cannot be reached: {why}")
        self.reached = True
        if not timed_out and self._retry(transfer):
            return
        if self._counts(transfer):
            self.pending -= 1
            self.errors[why] += 1
        if never_connected(code):
            self.resting.append((time.perf_counter() + _RETRY, transfer))
        else:
            self._release(transfer)
