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
    """A state whose cache is the used positions of tensors with this many `places`."""

    places: int

    def __new__(cls, tensors: Iterable[torch.Tensor], places: int) -> _Roomy:
        made = super().__new__(cls, tensors)
        made.places = places
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
        if rows is None and isinstance(state, _Roomy) and length + new <= state.places:
            return state
        places = length + new + _ROOM
        made = []
        for tensor, dtype in zip(cache, self._kept):
            whole = _empty(tensor, dtype, len(tensor) if rows is None else len(rows), places)
            used = whole.narrow(AXIS, 0, tensor.shape[AXIS])
            if rows is not None and tensor.dtype == used.dtype:
                torch.index_select(tensor, 0, rows, out=used)
            else:
                used.copy_(tensor if rows is None else tensor.index_select(0, rows))
            made.append(used)
        if rows is not None:
            others = tuple(tensor.index_select(0, rows) for tensor in others)
        return _Roomy((*made, *others), places)

    def after(self, state: State, cache: Sequence[torch.Tensor]) -> State:
        assert isinstance(state, _Roomy)
        return _Roomy((*cache, *state[len(cache) :]), state.places)

    def join(self, states: Sequence[State], length: int) -> State:
        places = length + _ROOM
        made = []
        for tensors in zip(*states):
            whole = _empty(tensors[0], None, sum(map(len, tensors)), places).narrow(AXIS, 0, length)
            row = 0
            for tensor in tensors:
                rows, missing = whole[row : row + len(tensor)], max(0, length - tensor.shape[AXIS])
                rows[:, :, :missing] = 0  # whatever was there would be multiplied, if by zero
                rows[:, :, missing:] = tensor[:, :, tensor.shape[AXIS] - length + missing :]
                row += len(tensor)
            made.append(whole)
        return _Roomy(made, places)


def _empty(like: torch.Tensor, dtype: Optional[torch.dtype], rows: int, places: int) -> torch.Tensor:
    return like.new_empty((rows, like.shape[1], places, like.shape[3]), dtype=dtype or like.dtype)


def _of_length(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Return a state's tensor with its last `length` positions, or padded before them."""
    import torch

    axis = 1 if tensor.ndim == 2 else AXIS
    missing = length - tensor.shape[axis]
    if missing <= 0:
        return tensor.narrow(axis, -missing, length)
    padded: torch.Tensor = torch.nn.functional.pad(tensor, (*[0, 0] * (tensor.ndim - 1 - axis), missing, 0))
    return padded
