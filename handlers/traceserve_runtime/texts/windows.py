"""Merges a text's windows into one sequence of tokens."""

from __future__ import annotations

from typing import List, NamedTuple, Sequence

from traceserve_runtime.texts.rows import Row


class TokenPosition(NamedTuple):
    """A token of the whole sequence: the window that answers for it, and its position there."""

    window: int
    position: int
    special: bool


def merge_windows(rows: Sequence[Row]) -> List[TokenPosition]:
    """Return every token of the text once, special tokens before and after, like a single row.

    A token that two windows share is taken from the one with more context on both sides; the middle
    one from the earlier, since some post-processors leave a row's first token its leading space.
    """
    positions = []
    begin = rows[0].start
    for number, row in enumerate(rows):
        own = row.positions()
        last = number == len(rows) - 1
        end = row.start + row.tokens
        stop = end if last else (end + rows[number + 1].start + 1) // 2
        if number == 0:
            positions += [TokenPosition(0, i, True) for i in range(own[0] if own else row.length)]
        positions += [TokenPosition(number, own[i - row.start], False) for i in range(begin, stop)]
        if last and own:
            positions += [TokenPosition(number, i, True) for i in range(own[-1] + 1, row.length)]
        begin = stop
    return positions
