"""How a loop's state is kept between the steps of a traced graph, whose cache grows by each step's positions.

By default every step returns a copy of the cache with the new positions behind. A step that `growing` has rewritten
writes them into the room behind the used ones instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterable, Optional, Protocol, Sequence, Tuple

from traceserve_runtime.runner import State
from traceserve_runtime.runtimes.torchscript.growing import AXIS, Kept

if TYPE_CHECKING:
    import torch

_ROOM = 64  # positions that a cache gets beyond what it needs: copied once in as many steps, for their memory


class States(Protocol):
    """Makes the states that a step reads, and those that it leaves. Their first tensors are the cache."""

    def before(self, state: State, new: int, rows: Optional[torch.Tensor]) -> State:
        """Return what a step with `new` positions reads: `rows` of a state, by default all, in order."""
        ...

    def after(self, state: State, cache: Sequence[torch.Tensor]) -> State:
        """Return the state after a step that read `state`, and returned this cache."""
        ...

    def join(self, states: Sequence[State], length: int) -> State:
        """Return one state with all rows; see Runner."""
        ...


class Copied:
    """States whose cache is made anew by each step; the last `fixed` tensors of a decoder's do not grow."""

    def __init__(self, fixed: int = 0) -> None:
        self._fixed = fixed

    def before(self, state: State, new: int, rows: Optional[torch.Tensor]) -> State:
        return state if rows is None else tuple(tensor.index_select(0, rows) for tensor in state)

    def after(self, state: State, cache: Sequence[torch.Tensor]) -> State:
        return (*cache, *state[len(cache) :])

    def join(self, states: Sequence[State], length: int) -> State:
        import torch

        growing = len(states[0]) - self._fixed
        return tuple(
            torch.cat([_of_length(tensor, length) if i < growing else tensor for tensor in tensors])
            for i, tensors in enumerate(zip(*states))
        )


class _Roomy(Tuple[Any, ...]):
    """A state whose cache is a part of `rooms`: of their first rows, the positions that begin at `first`."""

    rooms: Tuple[torch.Tensor, ...]
    first: int

    def __new__(cls, tensors: Iterable[torch.Tensor], rooms: Iterable[torch.Tensor], first: int) -> _Roomy:
        made = super().__new__(cls, tensors)
        made.rooms, made.first = tuple(rooms), first
        return made

    @property
    def end(self) -> int:
        """Where the used positions end."""
        return self.first + int(self[0].shape[AXIS])


class InPlace:
    """States whose cache, `kept` in these dtypes, has room behind it. It is copied when that is full, or when many rows
    move; a few rows that leave, move or join are written among the others. A decoder's further tensors do not grow.

    Each is continued once: a second step from it would write over the first one's positions.
    """

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    def before(self, state: State, new: int, rows: Optional[torch.Tensor]) -> State:
        import torch

        if isinstance(state, _Roomy) and state.end + new <= state.rooms[0].shape[AXIS]:
            if rows is None:
                return state
            moved = _moved(rows, len(state[0]))
            if moved is not None:
                return self._settled(state, rows, moved)
        cache, others = state[: len(self._kept)], state[len(self._kept) :]
        capacity = max(tensor.shape[AXIS] for tensor in cache) + new + _ROOM
        rooms, made = [], []
        for tensor, dtype in zip(cache, self._kept):
            tensor = tensor.to(dtype or tensor.dtype)
            rooms.append(_room(tensor, len(tensor) if rows is None else len(rows), capacity))
            used = rooms[-1].narrow(AXIS, 0, tensor.shape[AXIS])
            made.append(used.copy_(tensor) if rows is None else torch.index_select(tensor, 0, rows, out=used))
        if rows is not None:
            others = tuple(tensor.index_select(0, rows) for tensor in others)
        return _Roomy((*made, *others), rooms, 0)

    def _settled(self, state: _Roomy, rows: torch.Tensor, moved: torch.Tensor) -> State:
        """Return `rows` of a state, of which those at `moved` are not in order yet."""
        cache, others = state[: len(self._kept)], state[len(self._kept) :]
        if len(moved):
            sources = rows[moved]
            for tensor in cache:
                tensor.index_copy_(0, moved, tensor.index_select(0, sources))
            others = tuple(tensor.index_select(0, rows) for tensor in others)
        tensors = (tensor.narrow(0, 0, len(rows)) for tensor in (*cache, *others))
        return _Roomy(tensors, state.rooms, state.first)

    def after(self, state: State, cache: Sequence[torch.Tensor]) -> State:
        assert isinstance(state, _Roomy)
        return _Roomy((*cache, *state[len(cache) :]), state.rooms, state.first)

    def join(self, states: Sequence[State], length: int) -> State:
        import torch

        rows = sum(len(state[0]) for state in states)
        state = states[0]
        caches = [each[: len(self._kept)] for each in states]
        others = tuple(torch.cat(tensors) for tensors in zip(*(each[len(self._kept) :] for each in states)))
        if isinstance(state, _Roomy) and rows <= len(state.rooms[0]) and length <= state.end:
            first = state.end - length
            for room, *tensors in zip(state.rooms, *caches):
                room[: len(tensors[0]), :, first : state.first] = 0
                _write_rows(room[len(tensors[0]) :, :, first : state.end], tensors[1:])
            rooms = state.rooms
        else:
            first = 0
            rooms = tuple(_room(tensor, rows, length + _ROOM) for tensor in caches[0])
            for room, *tensors in zip(rooms, *caches):
                _write_rows(room[:, :, :length], tensors)
        return _Roomy((*(room[:rows, :, first : first + length] for room in rooms), *others), rooms, first)


def _moved(rows: torch.Tensor, held: int) -> Optional[torch.Tensor]:
    """Return which of `rows` is not yet where it is to be, among so many; None if a copy of all is sooner made."""
    import torch

    if len(rows) > held:
        return None
    moved = (rows != torch.arange(len(rows))).nonzero().flatten()
    return moved if 2 * len(moved) <= len(rows) else None


def _room(like: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
    """Return a new tensor for so many rows and positions."""
    return like.new_empty((rows, like.shape[1], capacity, like.shape[3]))


def _write_rows(room: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Write rows, one tensor's behind another's: each with its last positions, or padded before them."""
    begin = 0
    for tensor in tensors:
        room[begin : begin + len(tensor)] = _of_length(tensor, room.shape[AXIS])
        begin += len(tensor)


def _of_length(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Return a state's tensor with its last `length` positions, or padded before them."""
    import torch

    axis = 1 if tensor.ndim == 2 else AXIS
    missing = length - tensor.shape[axis]
    if missing <= 0:
        return tensor.narrow(axis, -missing, length)
    padded: torch.Tensor = torch.nn.functional.pad(tensor, (*[0, 0] * (tensor.ndim - 1 - axis), missing, 0))
    return padded
