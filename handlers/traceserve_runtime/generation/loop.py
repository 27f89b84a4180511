"""The loop that writes texts: rows join it between turns, and each leaves when its text ends.

A turn gives every row in the loop its next token, and reads the prompts of some that wait, for about as long as it may
take: a long one in parts, so that nobody else's tokens wait for it. A decoder's rows run together whenever they joined:
each is padded before its first token. Rows that the model cannot run together at different positions (an
encoder-decoder's have no mask for what was written) stay with those that they were read with; the groups take turns, so
none holds another for its whole length.

More rows gain nothing, and each has its memory: beyond a number of them the others wait, in the order of arrival.
"""

from __future__ import annotations

import math
import time
from collections import deque
from functools import partial
from typing import Callable, Deque, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from traceserve_runtime import failures
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.batching.costs import CostModel, Pace
from traceserve_runtime.batching.plan import MOST_BATCH_TOKENS, MOST_ROWS, plan_batches
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.generation.search import Moves, Search
from traceserve_runtime.generation.steps import FEEDS, IN_PARTS, LEAST_PART, Feed
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Runner
from traceserve_runtime.texts.rows import Row

# Groups that cannot be one: with more of them each would be small, and all would be slow.
_MOST_GROUPS = 2
_BEAMS = 4  # for which such a group has room, for each row: as many as text2text_generation has by default
_MOST_ALONE = 1  # rows that are written by themselves at a time
# The time to read prompts, in a turn's: others' tokens wait for it. A run reads all weights, so longer parts are faster, and
# where nobody's tokens wait they are twice as long (docs/measurements.md).
_READING, _READING_ALONE = 2.5, 5
_RUN = CostModel().run  # a run's own cost, in positions, beside those it reads
# A group that stays apart has as many steps as its longest text, so one run is cheaper than two, whatever the padding.
_TOGETHER = CostModel(run=1e9)


class Member:
    """A row in the loop: it waits, is written, and is done. `begin` makes its search, which has so many `beams`; again, if a
    step failed."""

    def __init__(self, row: Row, begin: Callable[[], Search], beams: int = 1) -> None:
        self.row = row
        self.beams = beams
        self.search: Optional[Search] = None
        self.error: Optional[Exception] = None  # why it could not be written
        self.done = False  # set it, and the row leaves the loop
        self.alone = False  # a step with it failed, so it is written again by itself
        self._begin = begin

    def begin(self) -> None:
        """Begin its text."""
        with failures.panics():
            self.search = self._begin()

    def advance(self, logits: np.ndarray, sound: bool) -> Optional[Moves]:
        """Return its next rows after the logits of the last ones, (rows, vocabulary), each with a likeliest token if `sound`;
        None when done."""
        assert self.search is not None
        if not sound:
            self.error, self.done = failures.not_a_number(), True
            return None
        with failures.panics():
            moves = self.search.advance(logits)
        self.done = moves is None
        return moves


class _Failed(NamedTuple):
    member: Member
    error: Exception


class _Group:
    """Members whose rows run together."""

    def __init__(self, feed: Feed, members: Sequence[Member]) -> None:
        self._feed = feed
        self._rows = 0  # of the last step
        self.reading = True
        self._live: List[Tuple[Member, Moves]] = [(member, Moves([i], [])) for i, member in enumerate(members)]

    @property
    def members(self) -> List[Member]:
        return [member for member, _ in self._live]

    @property
    def rows(self) -> int:
        """How many rows the next step has."""
        return sum(len(moves.rows) for _, moves in self._live)

    @property
    def most_rows(self) -> int:
        """How many rows it has once all its texts have begun."""
        return sum(max(member.beams, len(moves.rows)) for member, moves in self._live)

    @property
    def length(self) -> int:
        """How many positions its longest row has."""
        return self._feed.length

    @property
    def part(self) -> int:
        """How many positions of its prompts the last call of `read` has read."""
        return self._feed.part

    def read(self, most: float) -> List[_Failed]:
        """Continue reading the prompts of those that have not left, about `most` positions; after the last one, write the
        first tokens."""
        rows = [i for i, member in enumerate(self.members) if not member.done]
        self._live = [self._live[i] for i in rows]
        logits = self._feed.read(np.array(rows), most) if rows else None
        if logits is None:
            return []
        self.reading = False
        return self._advance([(member, 1) for member in self.members], logits, begin=True)

    def step(self) -> List[_Failed]:
        """Write the next tokens of those that have not left."""
        self._live = _settled([(member, moves) for member, moves in self._live if not member.done])
        if not self._live:
            return []
        rows = np.array([row for _, moves in self._live for row in moves.rows], dtype=np.int64)
        tokens = np.array([token for _, moves in self._live for token in moves.tokens], dtype=np.int64)
        return self._advance([(member, len(moves.rows)) for member, moves in self._live], self._feed.next(rows, tokens))

    def _advance(self, widths: Sequence[Tuple[Member, int]], logits: np.ndarray, begin: bool = False) -> List[_Failed]:
        """Give each member the logits of its rows, and let it `begin` before the first ones; return those that failed."""
        # Of all rows at once. The maximum is NaN if there is one, and -inf if no token is possible.
        sound = np.isfinite(logits.max(axis=1)).tolist()
        self._live, self._rows, failed = [], 0, []  # not before: if that fails, the members are tried again
        for member, width in widths:
            start = self._rows
            self._rows += width
            try:
                if begin:
                    member.begin()
                moves = member.advance(logits[start : self._rows], all(sound[start : self._rows]))
            except Exception as error:  # the edge of one request
                failed.append(_Failed(member, error))
                continue
            if moves is not None:
                self._live.append((member, Moves([start + row for row in moves.rows], moves.tokens)))
        return failed

    def absorb(self, other: _Group) -> None:
        """Add another group's rows."""
        self._feed.absorb(other._feed)
        self._live += [(m, Moves([self._rows + row for row in own.rows], own.tokens)) for m, own in other._live]
        self._rows += other._rows


def _settled(live: Sequence[Tuple[Member, Moves]]) -> List[Tuple[Member, Moves]]:
    """Return members in an order in which few rows move: the last ones come where others have left.

    Members with several rows, as of beams, keep their order.
    """
    if any(len(moves.rows) != 1 for _, moves in live):
        return list(live)
    staying = {moves.rows[0]: (member, moves) for member, moves in live if moves.rows[0] < len(live)}
    moving = iter([(member, moves) for member, moves in live if moves.rows[0] >= len(live)])
    return [staying.get(i) or next(moving) for i in range(len(live))]


class WritingLoop:
    """The rows that a model writes; see above. `kind` is the task's, for FEEDS; counts are added to `stats`.

    A turn reads prompts for a few times `seconds`, or for as long as its tokens took, by the `pace` of the last ones, in
    positions; by default all that wait.
    """

    def __init__(
        self,
        runner: Runner,
        manifest: Manifest,
        kind: str,
        stats: Stats,
        most_tokens: int = MOST_BATCH_TOKENS,
        pace: Optional[Pace] = None,
        seconds: float = math.inf,
    ) -> None:
        self._runner = runner
        self._manifest = manifest
        self._feed = FEEDS[kind]
        self._stats = stats
        self._most_tokens = most_tokens
        self._together = self._feed.together(manifest.shapes)
        self._most_rows = max((MOST_ROWS, *(manifest.shapes.batches or ()))) * (1 if self._together else _BEAMS)
        self._in_parts = self._together and bool(manifest.runtime.get(IN_PARTS))
        self._pace = Pace() if pace is None else pace
        self._seconds = seconds
        self._waiting: Deque[Member] = deque()
        self._partly_read: Optional[_Group] = None
        self._groups: List[_Group] = []

    @property
    def busy(self) -> bool:
        """Whether there is a row to write."""
        return bool(self._waiting or self._groups or self._partly_read)

    def join(self, member: Member) -> None:
        """Add a row: it is read in one of the next turns, in order."""
        self._waiting.append(member)

    def turn(self) -> None:
        """Write one token of every row, and read the prompts of some that wait."""
        began = time.perf_counter()
        for group in list(self._groups):
            self._try(group, group.step)
        self._groups = [group for group in self._groups if group.members]
        seconds = self._seconds * (_READING if self._groups else _READING_ALONE)
        self._admit(max(seconds, time.perf_counter() - began))

    def _try(self, group: _Group, act: Callable[[], Sequence[_Failed]]) -> bool:
        """Act on a group; if all of it fails, nobody knows who is to blame: each is tried again by itself."""
        try:
            failed, whole = act(), True
        except Exception as error:  # the edge of one request, not known yet which
            failed, whole = self._all_failed([group], error), False
        for each in failed:
            self._again(*each)
        return whole

    def _all_failed(self, groups: Sequence[_Group], error: Exception) -> List[_Failed]:
        """Give up these groups, and return their members."""
        self._groups = [group for group in self._groups if group not in groups]
        return [_Failed(member, error) for group in groups for member in group.members if not member.done]

    def _again(self, member: Member, error: Exception) -> None:
        """Let a member wait again, to be written by itself; or end it, if it was by itself."""
        if member.alone or isinstance(error, TraceserveError):
            member.error, member.done = error, True
        else:
            member.alone = True
            self._waiting.append(member)

    def _admit(self, seconds: float) -> None:
        """Read prompts for about so long: those that may join now, and the next part of one that is partly read."""
        most = max(LEAST_PART, self._pace.cost_within(seconds) - _RUN)
        left = most
        for members in self._next_batches(most):
            group = _Group(self._feed(self._runner, [m.row for m in members], self._manifest, self._stats), members)
            if self._in_parts and self._partly_read is None and group.rows * group.length > most:
                self._partly_read = group
            else:
                self._read(group, math.inf)
                left -= group.part
        if self._partly_read is not None:
            group, self._partly_read = self._partly_read, None
            self._read(group, max(left, most / 2))

    def _read(self, group: _Group, most: float) -> None:
        """Read more of a group's prompts; once they are read, it joins the others."""
        began = time.perf_counter()
        if not self._try(group, partial(group.read, most)) or not group.members:
            return
        self._pace.ran(_RUN + group.part, time.perf_counter() - began)
        if group.reading:
            self._partly_read = group
            return
        other = None if group.members[0].alone else self._group_for(group)
        if other is None:
            self._groups.append(group)
        else:
            self._unite(other, group)

    def _unite(self, group: _Group, other: _Group) -> None:
        try:
            group.absorb(other)
        except Exception as error:  # as above; memory, for example
            for each in self._all_failed([group, other], error):
                self._again(*each)

    def _group_for(self, other: _Group) -> Optional[_Group]:
        """Return the group that a newly read one becomes a part of, within the limits of a run."""
        if not self._together:
            return None
        for group in self._groups:
            rows = group.rows + other.rows
            fits = rows <= self._most_rows and rows * max(group.length, other.length) <= self._most_tokens
            if fits and not group.members[0].alone:
                return group
        return None

    def _next_batches(self, most: float) -> List[List[Member]]:
        """Take those that are read now, in the batches in which they are read, of about `most` positions in all."""
        if not self._waiting:
            return []
        room = _MOST_GROUPS - len(self._groups)
        waiting = [member for member in self._waiting if not member.done]
        admitted = self._admitted(waiting) if self._together or room > 0 else []
        batches = [[member] for member in admitted if member.alone]
        others = [member for member in admitted if not member.alone]
        if others:
            batches += self._planned(others, most if self._together else math.inf)
        order = {id(member): i for i, member in enumerate(admitted)}
        batches.sort(key=lambda batch: min(order[id(member)] for member in batch))
        batches = self._within(batches, most) if self._together else batches[:room]
        taken = {id(member) for batch in batches for member in batch}
        self._waiting = deque(member for member in waiting if id(member) not in taken)
        return batches

    def _admitted(self, waiting: Sequence[Member]) -> List[Member]:
        """Return those that the loop has room for, up to the first that has to wait: whoever comes later waits too.

        One with more beams than there ever is room for is written while there is nobody else.
        """
        groups = [*self._groups, *([self._partly_read] if self._partly_read is not None else [])]
        rows = sum(group.most_rows for group in groups)
        alone = sum(group.members[0].alone for group in groups if group.members)
        admitted: List[Member] = []
        for member in waiting:
            if member.alone and alone >= _MOST_ALONE:
                continue  # others may go ahead: it is the next one of its kind
            rows += member.beams
            if rows > _MOST_GROUPS * self._most_rows and rows > member.beams:
                break
            alone += member.alone
            admitted.append(member)
        return admitted

    def _within(self, batches: Sequence[List[Member]], most: float) -> List[List[Member]]:
        """Return the batches to read in this turn: the first ones within `most` positions, and one prompt that is longer.
        Half of the positions are left to one that is partly read."""
        chosen: List[List[Member]] = []
        long = self._partly_read is not None
        left = most / 2 if long else most
        for batch in batches:
            positions = len(batch) * max(member.row.length for member in batch)
            if positions > most and self._in_parts:
                chosen += [] if long else [batch]
                long = True
            elif positions <= left or not chosen:
                chosen.append(batch)
                left -= positions
            else:
                break
        return chosen

    def _planned(self, members: Sequence[Member], most: float = math.inf) -> List[List[Member]]:
        lengths = [member.row.length for member in members]
        cost = CostModel() if self._together else _TOGETHER
        planned = plan_batches(lengths, self._manifest.shapes, cost, int(min(most, self._most_tokens)))
        return [part for batch in planned for part in self._parted([members[i] for i in batch])]

    def _parted(self, batch: Sequence[Member]) -> List[List[Member]]:
        """Return the parts of a batch whose beams can run together."""
        parts: List[List[Member]] = []
        rows = self._most_rows
        for member in batch:
            rows += member.beams
            if rows > self._most_rows:
                parts.append([])
                rows = member.beams
            parts[-1].append(member)
        return parts
