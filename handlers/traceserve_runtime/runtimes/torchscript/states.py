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
    """States whose cache is made anew by each step."""

    def before(self, state: State, new: int, rows: Optional[torch.Tensor]) -> State:
        return state if rows is None else tuple(tensor.index_select(0, rows) for tensor in state)

    def after(self, state: State, cache: Sequence[torch.Tensor]) -> State:
        return (*cache, *state[len(cache) :])

    def join(self, states: Sequence[State], length: int) -> State:
        import torch

        return tuple(torch.cat([_of_length(tensor, length) for tensor in tensors]) for tensors in zip(*states))


class _Roomy(Tuple[Any, ...]):
    """A state whose cache is the used positions of tensors that have `capacity` of them."""

    capacity: int

    def __new__(cls, tensors: Iterable[torch.Tensor], capacity: int) -> _Roomy:
        made = super().__new__(cls, tensors)
        made.capacity = capacity
        return made


class InPlace:
    """States whose cache, `kept` in these dtypes, has room behind it. It is copied when that is full, or when rows change.

    Each is continued once: a second step from it would write over the first one's positions.
    """

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    def before(self, state: State, new: int, rows: Optional[torch.Tensor]) -> State:
        import torch

        cache, others = state[: len(self._kept)], state[len(self._kept) :]
        length = max(tensor.shape[AXIS] for tensor in cache)
        if rows is None and isinstance(state, _Roomy) and length + new <= state.capacity:
            return state
        capacity = length + new + _ROOM
        made = []
        for tensor, dtype in zip(cache, self._kept):
            tensor = tensor.to(dtype or tensor.dtype)
            used = _used(tensor, len(tensor) if rows is None else len(rows), tensor.shape[AXIS], capacity)
            made.append(used.copy_(tensor) if rows is None else torch.index_select(tensor, 0, rows, out=used))
        if rows is not None:
            others = tuple(tensor.index_select(0, rows) for tensor in others)
        return _Roomy((*made, *others), capacity)

    def after(self, state: State, cache: Sequence[torch.Tensor]) -> State:
        assert isinstance(state, _Roomy)
        return _Roomy((*cache, *state[len(cache) :]), state.capacity)

    def join(self, states: Sequence[State], length: int) -> State:
        import torch

        capacity = length + _ROOM
        made = []
        for tensors in zip(*states):
            used = _used(tensors[0], sum(map(len, tensors)), length, capacity)
            made.append(torch.cat([_of_length(tensor, length) for tensor in tensors], out=used))
        return _Roomy(made, capacity)


def _used(like: torch.Tensor, rows: int, length: int, capacity: int) -> torch.Tensor:
    """Return the first `length` positions of a new tensor that has `capacity` of them, for so many rows."""
    return like.new_empty((rows, like.shape[1], capacity, like.shape[3])).narrow(AXIS, 0, length)


def _of_length(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Return a state's tensor with its last `length` positions, or padded before them."""
    import torch

    axis = 1 if tensor.ndim == 2 else AXIS
    missing = length - tensor.shape[axis]
    if missing <= 0:
        return tensor.narrow(axis, -missing, length)
    padded: torch.Tensor = torch.nn.functional.pad(tensor, (*[0, 0] * (tensor.ndim - 1 - axis), missing, 0))
    return padded
