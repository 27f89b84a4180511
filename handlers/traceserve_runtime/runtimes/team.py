"""Chooses the cores of a run: one fewer while another process holds one.

OpenMP's threads synchronize after every operator, so one thread without a core delays all of them:
beside a busy process a single text took four times as long on two cores, and as long as ever on one
(docs/measurements.md).
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import Callable, Iterator, Optional, TypeVar

Result = TypeVar("Result")

_IN_A_ROW = 2  # consecutive runs that waited; a single one may be chance
# Runs before one more core is tried, initially; and if it is taken repeatedly, since each attempt costs two slow runs.
_SOONEST, _LATEST = 20, 320
# Held while torch's number of threads is asked for and may be another thread's: a new thread begins with the process's, which
# `take_one_core` sets too.
COUNTING = threading.RLock()
_this_thread = threading.local()  # `one_core` is set in threads that compute on one


class Team:
    """The threads of one thread's runs. Runs of other threads, such as lanes, are left alone.

    It is the first thread that runs and has not taken one core: most hosts load in one thread and answer in another.
    """

    def __init__(self, most: int, resize: Callable[[int], None]) -> None:
        self._most = most
        self._resize = resize
        self._now = most
        self._waited = 0  # consecutive runs
        self._runs = 0
        self._pause = _SOONEST
        self._smaller_at = self._wider_at = 0  # by the number of runs
        self._thread: Optional[int] = None

    @property
    def most(self) -> int:
        """On how many cores it runs while nobody holds one."""
        return self._most

    @property
    def now(self) -> int:
        """On how many cores the next run begins."""
        return self._now

    def run(self, act: Callable[..., Result], *arguments: object) -> Result:
        """Call `act` with these arguments on as many cores as are free."""
        if not self._is_own_thread():
            return act(*arguments)
        self._runs += 1
        if self._now < self._most and self._runs >= self._wider_at:
            self._take(self._now + 1)
        began, own = time.perf_counter(), time.thread_time()
        result = act(*arguments)
        computed, took = time.thread_time() - own, time.perf_counter() - began
        self._waited = self._waited + 1 if computed < enough(self._now) * took else 0
        if self._waited >= _IN_A_ROW and self._now > 1:
            again = self._runs - self._smaller_at < 2 * self._pause
            self._pause = min(2 * self._pause, _LATEST) if again else _SOONEST
            self._smaller_at = self._runs
            self._take(self._now - 1)
        return result

    def _is_own_thread(self) -> bool:
        if self._thread is None and not getattr(_this_thread, "one_core", False):
            self._thread = threading.get_ident()
        return self._thread == threading.get_ident()

    def _take(self, cores: int) -> None:
        self._now, self._waited = cores, 0
        self._wider_at = self._runs + self._pause
        self._resize(cores)


def enough(cores: int) -> float:
    """Return the share of a run's time that a thread computes, below which one core fewer is faster.

    Alone it computes all of it, and half beside a process that holds a core, whatever the number of cores: it waits for the
    thread there. One of n cores fewer computes 1 - 1 / n as much.
    """
    return min(max(0.6, 1 - 1 / cores), 0.8)


def of_torch(most: Optional[int] = None) -> Optional[Team]:
    """Make one for torch's runs on `most` cores, by default as many as this thread has; None if that is one anyway."""
    import torch

    threads = torch.get_num_threads() if most is None else most
    return Team(threads, torch.set_num_threads) if threads > 1 else None


def take_one_core() -> None:
    """Restrict torch to one core in this thread; query first, since torch resets a thread's settings on the first query."""
    import torch

    torch.get_num_threads()
    torch.set_num_threads(1)
    _this_thread.one_core = True


@contextmanager
def threads_kept() -> Iterator[int]:
    """Restore this thread's number of torch's threads, which is given: some of torch's libraries count per process, so
    `take_one_core` in another thread changes it too. One thread at a time does so."""
    import torch

    with COUNTING:
        threads = torch.get_num_threads()
        try:
            yield threads
        finally:
            torch.set_num_threads(threads)
