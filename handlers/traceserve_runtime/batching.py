"""Which rows run together; pad, run, unpad."""

from __future__ import annotations

import time
from bisect import bisect_left
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple, TypeVar

import numpy as np

from traceserve_runtime.manifest import Manifest, Shapes
from traceserve_runtime.tokenization import Row

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


Number = TypeVar("Number", float, np.ndarray)

# More rows or tokens in one run gain nothing on any processor measured, and memory grows with them.
MOST_ROWS = 64
MOST_TOKENS = 16384


@dataclass(frozen=True)
class CostModel:
    """The cost of one run, in units of one token's linear layers: a + b * tokens + c * places * length.

    A place of padding counts as so much of a token.
    """

    run: float = 30.0
    token: float = 1.0
    attention: float = 0.002
    padding: Padding = Padding()

    def __call__(self, batch: Number, length: int, tokens: Optional[Number] = None) -> Number:
        """Of a batch of this length, that has so many `tokens`; if they are not given, no padding."""
        places = batch * length
        share = self.padding.cost
        computed = places if tokens is None else share * places + (1 - share) * tokens
        return self.run + self.token * computed + self.attention * places * length

    def scaled(self, factor: float) -> CostModel:
        """So many times the cost."""
        return replace(self, run=self.run * factor, token=self.token * factor, attention=self.attention * factor)


class Timing(NamedTuple):
    """How long one run of a shape took."""

    batch: int
    length: int
    seconds: float


# Beyond these a fit has followed noise: of another process on the machine while this one started, say.
_LEAST_RUN, _MOST_RUN, _MOST_ATTENTION = 5.0, 128.0, 0.05


def fit(timings: Sequence[Timing], padding: Padding = Padding()) -> Optional[CostModel]:
    """The cost model that explains runs of at least three shapes, without padding, best, or None where none does.

    Least squares of the relative errors with no coefficient below 0: every choice of terms is solved, and the best one
    without a negative coefficient taken. Where tokens cost nothing beside the run, a run is as dear as can be.
    """
    timings = [timing for timing in timings if timing.seconds > 0]
    if len(timings) < 3:
        return None
    tokens = np.array([timing.batch * timing.length for timing in timings], dtype=float)
    lengths = np.array([timing.length for timing in timings], dtype=float)
    seconds = np.array([timing.seconds for timing in timings])
    terms = np.stack([tokens, np.ones_like(tokens), tokens * lengths], axis=1) / seconds[:, None]
    best: Optional[Tuple[float, np.ndarray]] = None
    for columns in (list(chosen) for count in (3, 2, 1) for chosen in combinations((0, 1, 2), count)):
        solution = np.zeros(3)
        solution[columns] = np.linalg.lstsq(terms[:, columns], np.ones(len(timings)), rcond=None)[0]
        error = float(np.square(terms @ solution - 1).sum())
        if (solution >= 0).all() and (best is None or error < best[0]):
            best = error, solution
    if best is None:
        return None
    token, run, attention = map(float, best[1])
    if not token:
        return CostModel(_MOST_RUN, padding=padding) if run else None
    return CostModel(
        min(max(run / token, _LEAST_RUN), _MOST_RUN), 1.0, min(attention / token, _MOST_ATTENTION), padding
    )


def seconds_per_cost(timings: Sequence[Timing], cost: CostModel) -> float:
    """What a unit of `cost` took, the median over these runs."""
    return float(np.median([timing.seconds / cost(timing.batch, timing.length) for timing in timings]))


@dataclass
class Stats:
    """What was computed for a list of requests."""

    requests: int = 0
    rows: int = 0
    tokens: int = 0  # real ones, special tokens included
    padded_tokens: int = 0  # what the model computed: real ones, and padding by what it costs
    micro_batches: int = 0
    model_seconds: float = 0.0

    def add(self, *lanes: Stats) -> None:
        """Add what was computed side by side: the time is that of the one that took longest."""
        for lane in lanes:
            self.rows += lane.rows
            self.tokens += lane.tokens
            self.padded_tokens += lane.padded_tokens
            self.micro_batches += lane.micro_batches
        self.model_seconds += max(lane.model_seconds for lane in lanes)

    @property
    def padding_share(self) -> float:
        """The share of the computed tokens that were padding, 0 to 1."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0


def plan(
    lengths: Sequence[int], shapes: Shapes, cost: CostModel = CostModel(), most_tokens: int = MOST_TOKENS
) -> List[List[int]]:
    """The cheapest cut of rows, sorted by length, into contiguous micro-batches, as lists of indices into `lengths`.

    Each has rows of one length where they are not padded. Dynamic programming over the cost model: best(i) = min over j < i of
    best(j) + cost of the rows j..i-1.
    """
    if len(lengths) == 1:
        return [[0]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ordered = [lengths[i] for i in order]
    most_rows = min(len(order), MOST_ROWS if shapes.batches is None else max(shapes.batches))
    batches_of = np.array([shapes.batch(n) for n in range(1, most_rows + 1)], dtype=float)
    tokens_before = np.concatenate([[0.0], np.cumsum(ordered)])
    best = np.zeros(len(order) + 1)
    cut = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        length = shapes.length(ordered[end - 1])
        rows = max(1, min(end, most_rows, most_tokens // length))
        if not shapes.padded:
            rows = min(rows, end - bisect_left(ordered, ordered[end - 1], 0, end))  # of this length
        # Of 1, 2, ... rows up to `end`.
        tokens = tokens_before[end] - tokens_before[end - rows : end][::-1]
        costs = best[end - rows : end][::-1] + cost(batches_of[:rows], length, tokens)
        cheapest = int(costs.argmin())
        best[end] = costs[cheapest]
        cut[end] = end - cheapest - 1
    batches = []
    end = len(order)
    while end:
        batches.append(order[cut[end] : end])
        end = cut[end]
    return batches[::-1]


def common_length(lengths: Sequence[int], shapes: Shapes, most: int, padding: Padding = Padding()) -> int:
    """What rows of these lengths are padded to when they run together.

    Where any length is allowed, to a multiple that the runner likes, or to the longest there may be.
    """
    length = shapes.length(max(lengths))
    if shapes.lengths is None and shapes.padded:
        multiple = padding.multiple if len(lengths) > 1 else padding.alone
        length = max(length, min(length + -length % multiple, most))
    return length


def pad(rows: Sequence[Row], manifest: Manifest, padding: Padding = Padding()) -> Tuple[Arrays, List[slice]]:
    """The model's inputs, int64 of shape (batch, length), for rows that run together, and where each row lies in them.

    For `padding` see `common_length`.
    Where the shapes fix the batch, it is filled by repeating the last row: a row that is all padding has no token to
    attend to, and divides zero by zero in some models.
    """
    length = common_length([row.length for row in rows], manifest.shapes, manifest.max_length, padding)
    batch = manifest.shapes.batch(len(rows))
    facts = manifest.tokenizer
    columns: Dict[str, Tuple[int, Callable[[Row], Sequence[int]]]] = {
        "input_ids": (facts.pad_id, lambda row: row.encoding.ids),
        "attention_mask": (0, lambda row: row.encoding.attention_mask),
        "token_type_ids": (facts.pad_type_id, lambda row: row.encoding.type_ids),
    }
    places = [
        slice(0, row.length) if facts.padding_side == "right" else slice(length - row.length, length) for row in rows
    ]
    arrays = {}
    for name in manifest.inputs:
        filler, values = columns[name]
        array = np.full((batch, length), filler, dtype=np.int64)
        for i, (row, place) in enumerate(zip(rows, places)):
            array[i, place] = values(row)
        array[len(rows) :] = array[len(rows) - 1]
        arrays[name] = array
    return arrays, places


def filled(manifest: Manifest, batch: int, length: int) -> Arrays:
    """The model's inputs, int64 of shape (batch, length), for rows without meaning or padding: to take the time."""
    values = {"input_ids": manifest.tokenizer.pad_id, "attention_mask": 1, "token_type_ids": 0}
    return {name: np.full((batch, length), values[name], dtype=np.int64) for name in manifest.inputs}


def unpad(outputs: Arrays, places: Sequence[slice], per_token: Sequence[str]) -> List[Arrays]:
    """Each row's part of the outputs; what is given per token is cut to the row's own tokens."""
    return [
        {name: array[i, place] if name in per_token else array[i] for name, array in outputs.items()}
        for i, place in enumerate(places)
    ]


def run(
    runner: Runner, rows: Sequence[Row], manifest: Manifest, per_token: Sequence[str], stats: Stats
) -> List[Arrays]:
    """The outputs of rows that run together: pad, run, unpad; adds to `stats`."""
    arrays, places = pad(rows, manifest, runner.padding)
    started = time.perf_counter()
    outputs = runner(arrays)
    stats.model_seconds += time.perf_counter() - started
    stats.micro_batches += 1
    stats.rows += len(rows)
    tokens = sum(row.length for row in rows)
    stats.tokens += tokens
    stats.padded_tokens += tokens + round(runner.padding.cost * (arrays[manifest.inputs[0]].size - tokens))
    return unpad(outputs, places, per_token)
