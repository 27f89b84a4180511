"""Calls that a host passes in rounds: each round has all calls that are not answered yet, and some new ones.

TorchServe does so with `continuousBatching`. A call is known by its id; one that is passed no more has lost its client.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.service import Call, Exchange, Reply, Service

_SECONDS = 0.02  # of a round without an answer: passing all calls again takes a millisecond or two


class Part(NamedTuple):
    """What a call is told in a round. `last` is None for a whole answer, else whether this ends the stream."""

    call: Call
    reply: Reply
    last: Optional[bool] = None


class _Known:
    """A call that is not answered yet."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.exchange: Optional[Exchange] = None  # once it joined
        self.reply: Optional[Reply] = None
        self._pieces: List[bytes] = []
        self._headers: Mapping[str, str] = {}
        self._begun = False

    def send(self, piece: bytes, headers: Mapping[str, str]) -> None:
        """Keep a piece of a stream for the end of the round."""
        self._headers = headers
        self._pieces.append(piece)

    def part(self) -> Optional[Part]:
        """Return what it is told now, if anything.

        A stream whose first piece would be its last is a whole answer: TorchServe 0.12 lets the client of such a stream
        hang.
        """
        reply = self.reply
        taken, self._pieces = self._pieces, []
        pieces = b"".join(taken)
        if reply is not None and not self._begun:
            return Part(self.call, replace(reply, body=pieces + reply.body))
        if reply is not None:
            return Part(self.call, self._piece(pieces + reply.body), True)
        if not pieces:
            return None
        self._begun = True
        return Part(self.call, self._piece(pieces), False)

    def _piece(self, body: bytes) -> Reply:
        headers = {name: value for name, value in self._headers.items() if name != "content-type"}
        return Reply(body, self._headers["content-type"], headers=headers)


class Rounds:
    """A session of a service that goes on in rounds.

    Where rows run once, the turns are in a thread of their own, which goes on while the host writes answers, reads, and passes
    the calls again; a round waits for the first answer there. A loop that writes texts is in Python for much of a step, and
    would only take turns with the host: its turns are in the rounds. All methods are called in one thread, the host's.
    """

    def __init__(self, service: Service, ahead: Optional[bool] = None) -> None:
        """`ahead`: whether turns are in a thread; by default as above."""
        self._service = service
        self._ahead = not service.engine.task.loop if ahead is None else ahead
        self._thread = ThreadPoolExecutor(1, "traceserve")
        self._counted: Dict[str, float] = {}
        self._begin()

    def _begin(self) -> None:
        self._computing = Stats()
        self._session = self._service.session(self._computing)
        self._known: Dict[str, _Known] = {}
        self._live: List[_Known] = []  # joined, and without a reply
        self._turns: Optional[Future[None]] = None
        # The lock of all that follows, and of what `_Known` keeps; the end of each turn is told.
        self._changed = threading.Condition()
        self._joining: List[_Known] = []
        self._leaving: List[_Known] = []
        self._active = False  # the thread takes turns, or is about to
        self._stats = Stats()

    @property
    def busy(self) -> bool:
        """Whether a call waits for its answer."""
        return any(not known.call.headers.ended for known in self._known.values())

    def go_on(self, ids: Sequence[str], call_of: Callable[[int], Call]) -> List[Optional[Part]]:
        """Go on with the calls of these ids; return what each is told now, or None. `call_of` is asked for new ones."""
        until = time.perf_counter() + _SECONDS
        gone = [self._known.pop(each) for each in set(self._known).difference(ids)]
        new = {each: _Known(call_of(i)) for i, each in enumerate(ids) if each not in self._known}
        self._known.update(new)
        with self._changed:
            self._leaving += gone
            self._joining += [known for known in new.values() if not known.call.headers.ended]
            if self._ahead and not self._active and (self._leaving or self._joining):
                self._active = True
                self._turns = self._thread.submit(self._take_turns)
            self._changed.notify_all()
        if not self._ahead:
            self._take_turns(until)
        with self._changed:
            # A call that the host has ended gets no answer, and is passed again.
            while not self._some_answered() and time.perf_counter() < until:
                self._changed.wait(until - time.perf_counter())
            parts = [self._known[each].part() for each in ids]
        self._raise_what_ended_it()
        self._known = {each: known for each, known in self._known.items() if known.reply is None}
        return parts

    def _some_answered(self) -> bool:
        return any(known.reply for known in self._known.values())

    def _raise_what_ended_it(self) -> None:
        """Raise the error of the thread, if any, and begin again without the calls: the host fails all that it passed."""
        error = self._turns.exception() if self._turns is not None and self._turns.done() else None
        if error is not None:
            self._begin()
            raise error

    def _take_turns(self, until: Optional[float] = None) -> None:
        """Answer all calls, and those that join; or go on until then, or the first answer."""
        while self._turn():
            if until is not None and (self._some_answered() or time.perf_counter() >= until):
                return

    def _turn(self) -> bool:
        """Go one step further with all calls; return whether there were any."""
        session = self._session
        with self._changed:
            leaving, self._leaving = self._leaving, []
            joining, self._joining = [known for known in self._joining if known not in leaving], []
            if not (joining or leaving or session.busy):
                self._active = False
                return False
        self._leave(leaving)
        self._join(joining)
        self._live = [known for known in [*self._live, *joining] if known not in leaving]
        session.turn()
        with self._changed:
            self._stats.add(self._computing.taken())
            for known in self._live:
                known.reply = known.exchange.reply if known.exchange else None
            self._live = [known for known in self._live if known.reply is None]
            self._changed.notify_all()
            if session.rest and not self._joining:
                self._changed.wait(min(session.rest, _SECONDS))
        return True

    def _leave(self, leaving: Sequence[_Known]) -> None:
        for known in leaving:
            if known.exchange is not None:
                self._session.leave(known.exchange)

    def _join(self, joining: Sequence[_Known]) -> None:
        sends = [partial(self._send, known) for known in joining]
        for known, exchange in zip(joining, self._session.join([known.call for known in joining], sends)):
            known.exchange = exchange

    def _send(self, known: _Known, piece: bytes, headers: Mapping[str, str]) -> None:
        with self._changed:
            known.send(piece, headers)

    def counted(self, calls: int, seconds: float, told: bool) -> Tuple[Stats, Dict[str, float]]:
        """Return what the last round computed, and the counters since they were last told: where nobody was answered,
        they wait, since each takes a line of TorchServe's log."""
        with self._changed:
            stats = self._stats.taken()
        for name, count in stats.counters(calls, seconds).items():
            self._counted[name] = self._counted.get(name, 0) + count
        counted = self._counted if told else {}
        if told:
            self._counted = {}
        return stats, counted
