"""Shares a worker among clients: what each of them sent is read and run in turns, so that none holds the others for long."""

from __future__ import annotations

from collections import deque
from typing import Callable, Deque, Generic, List, Tuple, TypeVar

Item = TypeVar("Item")

_SHORT = 16  # this many short texts have room together


class Unread(Generic[Item]):
    """Texts that wait until there is room for their tokens, beside those of earlier texts that are not answered yet.

    A text's tokens take a hundred times its memory. Short and long texts each have a room of their own, so neither waits for
    the other; a text that is larger than all the room is read when nothing else is in it.
    """

    def __init__(self, room: int) -> None:
        self._most_of_short = room // _SHORT
        self._lines: Tuple[_Line[Item], _Line[Item]] = (_Line(room), _Line(room))

    def __len__(self) -> int:
        return sum(len(line.waiting) for line in self._lines)

    def _line(self, size: int) -> _Line[Item]:
        return self._lines[size > self._most_of_short]

    def add(self, item: Item, size: int) -> None:
        """Let an item wait, of this size."""
        self._line(size).waiting.append((item, size))

    def take(self) -> List[Item]:
        """Take those for which there is room, short ones first; each keeps its room until it is released."""
        return [item for line in self._lines for item in line.take()]

    def release(self, size: int) -> None:
        """Give back the room of an item of this size."""
        self._line(size).held -= size


class _Line(Generic[Item]):
    def __init__(self, room: int) -> None:
        self.waiting: Deque[Tuple[Item, int]] = deque()
        self.held = 0
        self._room = room

    def take(self) -> List[Item]:
        taken = []
        while self.waiting and (not self.held or self.held + self.waiting[0][1] <= self._room):
            item, size = self.waiting.popleft()
            self.held += size
            taken.append(item)
        return taken


class FairQueue(Generic[Item]):
    """Items of several owners: the owners take turns, and each owner's items keep their order."""

    def __init__(self) -> None:
        self._owners: Deque[Deque[Item]] = deque()

    def __bool__(self) -> bool:
        return bool(self._owners)

    def add(self, items: List[Item]) -> None:
        """Add one owner's items."""
        if items:
            self._owners.append(deque(items))

    def take(self, room: float, size: Callable[[Item], float]) -> List[Item]:
        """Take one item of each owner in turn, as many as have room together, and at least one."""
        taken: List[Item] = []
        while self._owners:
            own = self._owners[0]
            room -= size(own[0])
            if taken and room < 0:
                break
            taken.append(own.popleft())
            self._owners.popleft()
            if own:
                self._owners.append(own)
        return taken

    def drop(self, unwanted: Callable[[Item], bool]) -> List[Item]:
        """Remove the unwanted items, and return them."""
        dropped = [item for own in self._owners for item in own if unwanted(item)]
        kept = (deque(item for item in own if not unwanted(item)) for own in self._owners) if dropped else self._owners
        self._owners = deque(own for own in kept if own)
        return dropped
