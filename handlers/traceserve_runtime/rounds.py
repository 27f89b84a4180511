"""Calls that a host passes in rounds: each round has all calls that are not answered yet, and some new ones.

TorchServe does so with `continuousBatching`. A call is known by its id; one that is passed no more has lost its client.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.service import Call, Exchange, Reply, Service

# A round has as many turns as fit, since passing all calls again takes a millisecond or two; it ends with any answer.
_SECONDS = 0.02
_REST = 0.002  # where only explanations wait, for predictions, which come with the next round


class Part(NamedTuple):
    """What a call is told in a round. `last` is None for a whole answer, else whether this ends the stream."""

    call: Call
    reply: Reply
    last: Optional[bool] = None


class _Known:
    """A call that is not answered yet."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.exchange: Optional[Exchange] = None
        self._pieces: List[bytes] = []
        self._headers: Mapping[str, str] = {}
        self._begun = False

    def send(self, piece: bytes, headers: Mapping[str, str]) -> None:
        """Keep a piece of a stream for the end of the round."""
        self._pieces.append(piece)
        self._headers = headers

    @property
    def answered(self) -> bool:
        return self.exchange is not None and self.exchange.reply is not None

    def part(self) -> Optional[Part]:
        """Return what it is told now, if anything.

        A stream whose first piece would be its last is a whole answer: TorchServe 0.12 lets the client of such a stream
        hang.
        """
        pieces, self._pieces = b"".join(self._pieces), []
        reply = None if self.exchange is None else self.exchange.reply
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
    """A session of a service that goes on in rounds."""

    def __init__(self, service: Service) -> None:
        self._stats = Stats()
        self._session = service.session(self._stats)
        self._known: Dict[str, _Known] = {}
        self._counted: Dict[str, float] = {}

    @property
    def busy(self) -> bool:
        """Whether a call waits for its answer."""
        return self._session.busy

    def go_on(self, ids: Sequence[str], call_of: Callable[[int], Call]) -> List[Optional[Part]]:
        """Go on with the calls of these ids; return what each is told now, or None. `call_of` is asked for new ones."""
        began = time.perf_counter()
        self._leave(set(ids))
        self._join({each: call_of(i) for i, each in enumerate(ids) if each not in self._known})
        while self._session.busy:
            if self._session.turn() or time.perf_counter() - began >= _SECONDS:
                break
            rest = self._session.rest
            if rest:
                time.sleep(min(rest, _REST))
                break
        if all(known.call.ended for known in self._known.values()):
            time.sleep(_SECONDS)  # a call that the host has ended gets no answer, and is passed again
        parts = [self._known[each].part() for each in ids]
        self._known = {each: known for each, known in self._known.items() if not known.answered}
        return parts

    def _leave(self, ids: Set[str]) -> None:
        for each in [each for each in self._known if each not in ids]:
            exchange = self._known.pop(each).exchange
            if exchange is not None:
                self._session.leave(exchange)

    def _join(self, calls: Mapping[str, Call]) -> None:
        self._known.update({each: _Known(call) for each, call in calls.items()})
        new = {each: self._known[each] for each, call in calls.items() if not call.ended}
        if new:
            exchanges = self._session.join(
                [known.call for known in new.values()], [known.send for known in new.values()]
            )
            for known, exchange in zip(new.values(), exchanges):
                known.exchange = exchange

    def counted(self, calls: int, seconds: float, told: bool) -> Tuple[Stats, Dict[str, float]]:
        """Return what the last round computed, and the counters since they were last told: where nobody was answered,
        they wait, since each takes a line of TorchServe's log."""
        stats = self._stats.taken()
        for name, count in stats.counters(calls, seconds).items():
            self._counted[name] = self._counted.get(name, 0) + count
        counted = self._counted if told else {}
        if told:
            self._counted = {}
        return stats, counted
