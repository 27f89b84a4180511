"""Requests that are being answered, and their rows that wait to be run."""

from __future__ import annotations

import time
from typing import Callable, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

from traceserve_runtime.batching.sharing import FairQueue, Unread
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.generation.loop import Member
from traceserve_runtime.runner import Arrays
from traceserve_runtime.tasks.contract import Answer, Job, Parts, Request, characters
from traceserve_runtime.texts.rows import Encoded

Result = Union[Answer, TraceserveError]
Outputs = List[Union[Arrays, TraceserveError]]


class Pending:
    """A request that is being answered."""

    def __init__(self, request: Request, emit: Optional[Callable[..., None]]) -> None:
        self.request = request
        self.joined = time.perf_counter()
        self.emit = emit
        self.members: List[Member] = []  # its rows in a loop
        self.left = False  # nobody wants its answer any more
        self.result: Union[Result, Callable[[], Result], None] = None

    @property
    def done(self) -> bool:
        """Whether nothing of it has to be run any more."""
        return self.result is not None and all(member.done for member in self.members)

    def answer(self) -> Result:
        """Return the answer, or the error, once done."""
        assert self.result is not None
        return self.result() if callable(self.result) else self.result


class Arrival:
    """What one client sent together: its requests share limits, and a place among the clients that take turns."""

    def __init__(self, pending: Sequence[Pending], parts: Sequence[Parts]) -> None:
        self.pending = pending
        self.parts = parts
        self.size = sum(map(characters, parts))
        self.unrun = 0  # its rows


class Unrun:
    """A tokenized request whose rows run once, each in any turn."""

    def __init__(self, pending: Pending, encoded: Encoded) -> None:
        self.pending = pending
        self.encoded = encoded
        self._outputs: List[Union[Arrays, TraceserveError, None]] = [None] * len(encoded.rows)
        self._missing = len(encoded.rows)

    def keep(self, position: int, output: Union[Arrays, TraceserveError]) -> None:
        """Keep a row's outputs."""
        self._missing -= 1
        if self._missing and not isinstance(output, TraceserveError):
            output = _by_themselves(output)
        self._outputs[position] = output

    def outputs(self) -> Optional[Outputs]:
        """Return all rows' outputs, once they are there."""
        return None if self._missing else [output for output in self._outputs if output is not None]


def _by_themselves(arrays: Arrays) -> Arrays:
    """Copy what is a small part of a larger array: it would keep the outputs of all rows that ran with it."""
    return {
        name: array if array.base is None or array.base.nbytes <= 2 * array.nbytes else array.copy()
        for name, array in arrays.items()
    }


class Waiting(NamedTuple):
    """A row that waits to be run; `number` counts all rows in the order of joining."""

    number: int
    arrival: Arrival
    unrun: Unrun
    position: int  # in its request
    job: Job


class Backlog:
    """What clients sent and has no answer yet: texts that wait to be tokenized, and rows that wait to be run."""

    def __init__(self, room: int) -> None:
        """At most about `room` characters are tokenized and not run; see `Unread`."""
        self._unread: Unread[Arrival] = Unread(room)
        self._rows: FairQueue[Waiting] = FairQueue()
        self._number = 0

    def __bool__(self) -> bool:
        return bool(self._unread or self._rows)

    def join(self, arrival: Arrival) -> None:
        """Let a client's requests wait to be tokenized."""
        self._unread.add(arrival, arrival.size)

    def unread(self) -> List[Arrival]:
        """Take those that are tokenized now; `add` must follow for each."""
        return self._unread.take()

    def add(self, arrival: Arrival, tokenized: Sequence[Tuple[Unrun, Sequence[Job]]]) -> None:
        """Let the rows of a client's requests wait to be run."""
        rows: List[Waiting] = []
        for unrun, jobs in tokenized:
            for position, job in enumerate(jobs):
                rows.append(Waiting(self._number + len(rows), arrival, unrun, position, job))
        self._number += len(rows)
        arrival.unrun = len(rows)
        self._rows.add(rows)
        self._release([arrival])

    def rows(self, room: float, cost: Callable[[int], float]) -> List[Waiting]:
        """Take rows of all clients in turn, as many as have room with the costs of their lengths, and at least one."""
        taken = self._rows.take(room, lambda row: cost(row.job.row.length))
        return sorted(taken, key=lambda row: row.number)

    def ran(self, rows: Sequence[Waiting]) -> None:
        """Count rows that are run, or never will be."""
        for row in rows:
            row.arrival.unrun -= 1
        self._release({id(row.arrival): row.arrival for row in rows}.values())

    def forget(self) -> None:
        """Drop the rows of requests that nobody waits for."""
        self.ran(self._rows.drop(lambda row: row.unrun.pending.left))

    def _release(self, arrivals: Iterable[Arrival]) -> None:
        for arrival in arrivals:
            if not arrival.unrun:
                self._unread.release(arrival.size)
