"""Clients share a worker: none keeps another out, whatever the order and the sizes."""

from __future__ import annotations

import math
from typing import Dict, List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traceserve_runtime.batching.costs import Pace
from traceserve_runtime.batching.sharing import FairQueue, Unread

Item = Tuple[int, int]  # owner, position


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.floats(0, 40), st.floats(0.1, 5))
def test_owners_take_turns_and_each_keeps_its_order(counts: List[int], room: float, size: float) -> None:
    queue: FairQueue[Item] = FairQueue()
    for owner, count in enumerate(counts):
        queue.add([(owner, position) for position in range(count)])
    taken: List[Item] = []
    while queue:
        own = queue.take(room, lambda item: size)
        assert len(own) == 1 or len(own) * size <= room + 1e-6
        taken += own
    assert sorted(taken) == [(owner, i) for owner, count in enumerate(counts) for i in range(count)]
    # Round by round: the first of each owner, then the second of each that has one, ...
    assert taken == sorted(taken, key=lambda item: (item[1], item[0]))


def test_one_that_comes_later_waits_for_one_item_of_each_other() -> None:
    queue: FairQueue[Item] = FairQueue()
    for owner in range(3):
        queue.add([(owner, i) for i in range(100)])
    for _ in range(50):
        queue.take(1, lambda item: 1)
    queue.add([(3, 0)])
    assert [queue.take(1, lambda item: 1)[0][0] for _ in range(4)].count(3) == 1


def test_an_item_larger_than_the_room_is_taken_by_itself() -> None:
    queue: FairQueue[Item] = FairQueue()
    queue.add([(0, 0), (0, 1)])
    assert queue.take(1, lambda item: 5) == [(0, 0)]
    assert queue.take(-1, lambda item: 5) == [(0, 1)]
    assert not queue and queue.take(1, lambda item: 5) == []


def test_dropped_items_are_never_taken() -> None:
    queue: FairQueue[Item] = FairQueue()
    for owner in range(3):
        queue.add([(owner, i) for i in range(4)])
    assert queue.take(2, lambda item: 1) == [(0, 0), (1, 0)]
    assert sorted(queue.drop(lambda item: item[0] == 1)) == [(1, 1), (1, 2), (1, 3)]
    assert {item[0] for item in queue.take(math.inf, lambda item: 1)} == {0, 2} and not queue


ROOM = 100


@given(
    st.lists(st.one_of(st.integers(0, 10), st.integers(0, 300)), max_size=30),
    st.data(),
)
def test_what_is_read_at_once_is_bounded_and_all_is_read_in_order(sizes: List[int], data: st.DataObject) -> None:
    unread: Unread[int] = Unread(ROOM)
    for number, size in enumerate(sizes):
        unread.add(number, size)
    held: Dict[int, int] = {}
    order: List[int] = []
    while unread or held:
        for number in unread.take():
            held[number] = sizes[number]
            order.append(number)
        for of_line in ([s for s in held.values() if s <= 6], [s for s in held.values() if s > 6]):
            assert sum(of_line) <= ROOM or sum(s > 0 for s in of_line) == 1
        assert held  # something is always read
        done = data.draw(st.sampled_from(sorted(held)))
        unread.release(held.pop(done))
    assert sorted(order) == list(range(len(sizes)))
    for line in ([i for i in order if sizes[i] <= 6], [i for i in order if sizes[i] > 6]):
        assert line == sorted(line)


def test_short_texts_do_not_wait_for_the_room_of_long_ones() -> None:
    unread: Unread[str] = Unread(ROOM)
    for name, size in (("long", 90), ("longer", 95), ("short", 5)):
        unread.add(name, size)
    assert unread.take() == ["short", "long"]
    unread.add("another", 5)
    assert unread.take() == ["another"]
    unread.release(90)
    assert unread.take() == ["longer"] and not unread


def test_the_pace_is_that_of_the_last_runs() -> None:
    pace = Pace()
    assert 100 < pace.cost_within(0.1) < 10_000  # a guess, before anything was run
    assert pace.cost_within(math.inf) == math.inf
    for _ in range(30):
        pace.ran(500, 1.0)
    assert pace.cost_within(0.1) == pytest.approx(50)
    for _ in range(12):
        pace.ran(500, 0.1)
    assert 350 < pace.cost_within(0.1) < 500
    assert pace.cost_within(-0.1) < 0
