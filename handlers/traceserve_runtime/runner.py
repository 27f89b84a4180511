"""A read model, as batching, tasks and engine know it: named arrays to named arrays."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any, Dict, NamedTuple, Optional, Protocol, Sequence, Tuple

import numpy as np

Arrays = Dict[str, np.ndarray]
State = Tuple[Any, ...]  # what a runner keeps between the steps of a loop, on its own device


class Padding(NamedTuple):
    """What padding is to a runner: the `cost` of a place of it, of a token's, and of what number lengths are best a
    `multiple`, those of several rows and that of a row `alone`."""

    cost: float = 1.0
    multiple: int = 1
    alone: int = 1


# Where nothing but attention computes it. Of MiniLM's float32 and bfloat16 on one core a place's attention takes 0.09 and
# 0.11 of what its linear layers take; torch's attention goes by blocks of 16, so that 12 places take longer than 16.
IN_ATTENTION = Padding(cost=0.1, multiple=16)


class Runner(Protocol):
    """A read model. One that is run once is called; one that is run in a loop is started, and then takes steps."""

    padding: Padding

    def __call__(self, inputs: Arrays) -> Arrays:
        """Named arrays to named arrays, in one pass."""
        ...

    def start(self, inputs: Arrays) -> State:
        """The state that a loop over these inputs begins with."""
        ...

    def step(self, inputs: Arrays, state: State, rows: Optional[np.ndarray] = None) -> Tuple[Arrays, State]:
        """The outputs of the next tokens, and the state with them; `rows`, int64, chooses and orders the state's rows."""
        ...

    def open_lanes(self) -> Sequence[Executor]:
        """Threads from which runs go side by side, on one core each; none where they cannot."""
        ...

    def share_cores(self) -> None:
        """From now on run on fewer cores while other processes hold them, where that can be; see `runtimes.team`."""
        ...
