"""The shapes that a writer tries, widest first."""

from __future__ import annotations

from typing import Iterator, Tuple

from traceserve_runtime.manifest import Shapes
from traceserve_runtime.tasks import TASKS

from traceserve.building.config.hardware import FIXED_SHAPES
from traceserve.building.config.lengths import few_lengths
from traceserve.building.config.setup_config import SetupConfig
from traceserve.building.writers.neuron import writer as neuron


def one_graph(config: SetupConfig, max_length: int) -> Iterator[Shapes]:
    """Yield any length; or the configured ones."""
    lengths = config.sequence_lengths
    yield Shapes() if lengths == "auto" else Shapes(_few(config, max_length))


def with_graphs(config: SetupConfig, max_length: int) -> Iterator[Shapes]:
    """Yield one graph for every shape, then one per length for a few lengths, then also per batch; for a loop, the
    first.

    Compiled graphs: one per length and batch.
    """
    if config.hardware in FIXED_SHAPES:
        yield from neuron.shapes(config, max_length)
        return
    yield from one_graph(config, max_length)
    if TASKS[config.task].loop:
        return
    few = _few(config, max_length)
    yield Shapes(few, graph_per_shape=True)
    yield Shapes(few, (1, 4, 16), graph_per_shape=True)


def without_padding(config: SetupConfig) -> Iterator[Shapes]:
    """Yield any length without padding, for models whose answers change with padding: none for configured or fixed
    shapes."""
    open_lengths = config.sequence_lengths == "auto" and config.hardware not in FIXED_SHAPES
    if open_lengths and not TASKS[config.task].loop:
        yield Shapes(padded=False)


def _few(config: SetupConfig, max_length: int) -> Tuple[int, ...]:
    lengths = config.sequence_lengths
    if isinstance(lengths, list):
        return tuple(lengths)
    return few_lengths(max_length) if lengths == "auto" else (max_length,)
