"""The interface of a loaded model for batching, tasks and engine: named arrays in, named arrays out."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any, Dict, NamedTuple, Optional, Protocol, Sequence, Tuple

import numpy as np

Arrays = Dict[str, np.ndarray]
State = Tuple[Any, ...]  # what a runner keeps between the steps of a loop, on its own device


class Padding(NamedTuple):
    """Padding for a runner: the `cost` of a padded position, relative to a token's, and the `multiple` to which lengths
    are best rounded up, for several rows and for a row `alone`."""

    cost: float = 1.0
    multiple: int = 1
    alone: int = 1


# For padding that only attention computes. With MiniLM in float32 and bfloat16 on one core, a position's attention takes 0.09
# and 0.11 of its linear layers' time; torch's attention works in blocks of 16, so 12 positions take longer than 16.
IN_ATTENTION = Padding(cost=0.1, multiple=16)


class Runner(Protocol):
    """A loaded model. A single pass is a call; a loop is started, then steps."""

    padding: Padding

    def __call__(self, inputs: Arrays) -> Arrays:
        """Map named arrays to named arrays in one pass."""
        ...

    def start(self, inputs: Arrays) -> State:
        """Return the initial state of a loop over these inputs."""
        ...

    def step(self, inputs: Arrays, state: State, rows: Optional[np.ndarray] = None) -> Tuple[Arrays, State]:
        """Return the next tokens' outputs and state; `rows`, int64, selects and orders the state's rows."""
        ...

    def join(self, states: Sequence[State], length: int) -> State:
        """Return one state with a decoder's rows of all these, each with its last `length` positions, or padded before
        them. Positions are the second dimension of a tensor with two, else the third. No other step begins from these."""
        ...

    def open_lanes(self) -> Sequence[Executor]:
        """Return threads for parallel runs, on one core each; none if unsupported."""
        ...

    def share_cores(self) -> None:
        """From now on use fewer cores while other processes hold them, if supported; see `runtimes.team`."""
        ...


class RunsOnce:
    """The base of runners whose models do not run in a loop; see Runner."""

    def start(self, inputs: Arrays) -> State:
        raise NotImplementedError("a model that runs once does not run in a loop")

    def step(self, inputs: Arrays, state: State, rows: Optional[np.ndarray] = None) -> Tuple[Arrays, State]:
        raise NotImplementedError("a model that runs once does not run in a loop")

    def join(self, states: Sequence[State], length: int) -> State:
        raise NotImplementedError("a model that runs once does not run in a loop")
