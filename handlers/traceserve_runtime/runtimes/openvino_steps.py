"""Models that run token by token in OpenVINO.

Keys and values of earlier tokens are variables inside the graph `step`, and so are kept in a request of its own for
each group of rows: its attention adds a step's to them in place, and reads them in the order of `beam_idx`, without a
copy. What else is kept between steps, such as the keys and values of an encoder's source, are inputs and outputs.
"""

from __future__ import annotations

import threading
from concurrent.futures import Executor
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from traceserve_runtime.runner import Arrays, Padding, State
from traceserve_runtime.runtimes.positions import PAST, PRESENT, joined_rows

START_FILE_KEY = (
    "start"  # in `Manifest.runtime`: the file of the graph that makes the first state, if not all is variables
)
ROWS = "beam_idx"  # the input with the rows of the variables that a step continues


class KeptRows:
    """A loop's state: a request with variables, if the model has some; and arrays, by their inputs' names.

    `sources`: for each row, the index of the row of `start` that it continues. A step changes the variables in place, so
    it takes the request away: a state is continued once.
    """

    def __init__(self, request: Any, sources: np.ndarray, arrays: Arrays) -> None:
        self._request = request
        self.sources = sources
        self.arrays = arrays

    @property
    def shape(self) -> Tuple[int, ...]:
        """How many rows it has."""
        return self.sources.shape

    def take(self) -> Any:
        """Return the request, which nobody else will have."""
        if self._request is None:
            raise RuntimeError("this state was continued before")
        request, self._request = self._request, None
        return request


class SteppingRunner:
    """A loop's graphs in OpenVINO on the CPU; see Runner. `tensor` makes an OpenVINO tensor of an array."""

    padding = Padding()

    def __init__(self, step: Any, start: Optional[Any], tensor: Callable[[np.ndarray], Any]) -> None:
        self._step = step
        self._start = start
        self._tensor = tensor
        self._inputs = _names(step.inputs)
        self._outputs = _names(step.outputs)
        self._one_at_a_time = threading.Lock()

    def __call__(self, inputs: Arrays) -> Arrays:
        raise NotImplementedError("a model that runs in a loop does not run once")

    def start(self, inputs: Arrays) -> State:
        arrays: Arrays = {}
        if self._start is not None:
            found = self._infer(self._start.create_infer_request(), inputs, _names(self._start.inputs))
            arrays = dict(zip(_names(self._start.outputs), found))
        return (KeptRows(self._step.create_infer_request(), np.arange(len(inputs["attention_mask"])), arrays),)

    def step(self, inputs: Arrays, state: State, rows: Optional[np.ndarray] = None) -> Tuple[Arrays, State]:
        [kept] = state
        request, sources, arrays = kept.take(), kept.sources, kept.arrays
        if rows is None:
            rows = np.arange(len(sources))
        else:
            sources = sources[rows]
            # Beams of one text that change places leave what they have of its source where it is.
            moved = not np.array_equal(sources, kept.sources)
            arrays = {
                name: array.take(rows, axis=0) if moved or self._grows(name) else array
                for name, array in arrays.items()
            }
        found = self._infer(request, {**inputs, **arrays, ROWS: rows.astype(np.int32)}, self._inputs)
        outputs = dict(zip(self._outputs, found))
        grown = {PAST + name[len(PRESENT) :]: outputs.pop(name) for name in list(outputs) if name.startswith(PRESENT)}
        return outputs, (KeptRows(request, sources, {**arrays, **grown}),)

    def join(self, states: Sequence[State], length: int) -> State:
        kept: List[KeptRows] = [state[0] for state in states]
        request = self._step.create_infer_request()
        variables = [{each.name: each for each in one.take().query_state()} for one in kept]
        for variable in request.query_state():
            past = [each[variable.name].state.data for each in variables]
            variable.state = self._tensor(joined_rows(past, length))
        arrays = {name: joined_rows([one.arrays[name] for one in kept], length) for name in kept[0].arrays}
        return (KeptRows(request, np.arange(sum(len(one.sources) for one in kept)), arrays),)

    def open_lanes(self) -> Sequence[Executor]:
        return []

    def share_cores(self) -> None:
        pass  # its threads take pieces of an operator when free, and do not wait for the slowest

    def _grows(self, name: str) -> bool:
        return PRESENT + name[len(PAST) :] in self._outputs

    def _infer(self, request: Any, inputs: Arrays, names: Sequence[str]) -> Sequence[np.ndarray]:
        arrays: Dict[str, np.ndarray] = {name: np.ascontiguousarray(inputs[name]) for name in names}
        with self._one_at_a_time:
            results: Sequence[np.ndarray] = request.infer(arrays, share_inputs=True).to_tuple()
        return results


def _names(ports: Sequence[Any]) -> Tuple[str, ...]:
    return tuple(port.get_any_name() for port in ports)
