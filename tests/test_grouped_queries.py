"""Graphs whose attention reads the keys and values of a group of queries without copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
from conftest import reread, run_export
from torch.nn.functional import scaled_dot_product_attention
from traceserve.building.writers.tracing import graphs
from traceserve_runtime.engine import Engine
from traceserve_runtime.runtimes import torch_internals
from traceserve_runtime.runtimes.graph import ATTENTION
from traceserve_runtime.runtimes.torchscript import grouped_queries

GROUPS, HEADS = 3, 2
COPY = "aten::expand("


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def repeated(rows: torch.Tensor, times: int = GROUPS) -> torch.Tensor:
    batch, heads, length, size = rows.shape
    return rows[:, :, None, :, :].expand(batch, heads, times, length, size).reshape(batch, heads * times, length, size)


def without_slices(rows: torch.Tensor) -> torch.Tensor:
    batch, heads, length, size = rows.shape
    return rows.unsqueeze(2).expand(batch, heads, GROUPS, length, size).reshape(batch, heads * GROUPS, length, size)


def tiled(rows: torch.Tensor) -> torch.Tensor:
    """Repeat all heads in turn: another order."""
    batch, heads, length, size = rows.shape
    return rows[:, None].expand(batch, GROUPS, heads, length, size).reshape(batch, heads * GROUPS, length, size)


def without_last(rows: torch.Tensor) -> torch.Tensor:
    """Repeat all positions but the last, by a computed bound."""
    batch, heads, length, size = rows[:, :, :-1].shape
    kept = rows[:, :, None, : rows.shape[2] - 1]
    return kept.expand(batch, heads, GROUPS, length, size).reshape(batch, heads * GROUPS, length, size)


def shortened(rows: torch.Tensor) -> torch.Tensor:
    """Repeat only a part of each head's size."""
    batch, heads, length, size = rows[:, :, :, 1:].shape
    half = rows[:, :, None, :, 1:]
    return half.expand(batch, heads, GROUPS, length, size).reshape(batch, heads * GROUPS, length, size)


def positions_merged(rows: torch.Tensor) -> torch.Tensor:
    """Merge the repetitions with positions, and not with heads."""
    batch, heads, length, size = rows.shape
    copies = rows[:, :, None].expand(batch, heads, GROUPS, length, size)
    return copies.reshape(batch, heads, GROUPS * length, size)


class Attention(torch.nn.Module):
    def __init__(self, keys: Callable[[torch.Tensor], torch.Tensor], values: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.keys, self.values = keys, values

    def forward(self, queries: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        keys, values = self.keys(rows), self.values(rows)
        attended = scaled_dot_product_attention(queries, keys, values, mask)
        # transformers reads a size of the repeated values.
        return attended.reshape(attended.shape[0], -1, queries.shape[2], values.shape[-1]).transpose(1, 2)


def traced(module: torch.nn.Module, example: Any, folder: Path) -> Any:
    return reread(graphs.trace(module, example), folder)


def inputs(batch: int, new: int, length: int, groups: int = GROUPS) -> Any:
    mask = torch.ones(batch, 1, new, length, dtype=torch.bool)
    mask[0, :, :, : length // 2] = False
    return torch.randn(batch, HEADS * groups, new, 8), torch.randn(batch, HEADS, length, 8), mask


@pytest.mark.parametrize("repeat", [repeated, without_slices])
def test_equal_bit_for_bit_without_copies(repeat: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    own = Attention(repeat, repeat)
    module = traced(own, inputs(2, 3, 5), tmp_path)
    assert str(module.graph).count(COPY) == 2
    assert grouped_queries.group(module) == 1
    assert COPY not in str(module.graph)
    for sizes in ((2, 3, 5), (1, 2, 9), (16, 4, 40), (3, 7, 7)):
        given = inputs(*sizes)
        assert torch.equal(module(*given), own(*given))


class Unmasked(torch.nn.Module):
    def forward(self, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(queries, repeated(rows), repeated(rows * 2))


class Causal(torch.nn.Module):
    def forward(self, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(queries, repeated(rows), repeated(rows * 2), is_causal=True)


def query_shapes(module: Any, given: Any) -> List[List[int]]:
    """Return the shapes of the queries that attention gets."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiled:
        module(*given)
    return [event.input_shapes[0] for event in profiled.events() if event.name == ATTENTION]


@pytest.mark.parametrize("masked", [True, False])
def test_single_positions_of_a_group_are_positions_of_one_query(masked: bool, tmp_path: Path) -> None:
    own = Attention(repeated, repeated) if masked else Unmasked()
    example = inputs(2, 3, 5)
    module = traced(own, example if masked else example[:2], tmp_path)
    assert grouped_queries.group(module) == 1
    for batch, length in ((1, 9), (16, 40), (3, 1)):
        given = inputs(batch, 1, length) if masked else inputs(batch, 1, length)[:2]
        torch.testing.assert_close(module(*given), own(*given))
        assert query_shapes(module, given) == [[batch, HEADS, GROUPS, 8]]
    given = inputs(2, 4, 5) if masked else inputs(2, 4, 5)[:2]
    assert query_shapes(module, given) == [[2, HEADS * GROUPS, 4, 8]]


def test_queries_with_masks_of_their_own_stay_apart(tmp_path: Path) -> None:
    own = Attention(repeated, repeated)
    module = traced(own, inputs(2, 3, 5), tmp_path)
    assert grouped_queries.group(module) == 1
    queries, rows, _ = inputs(4, 1, 6)
    for shape in ((4, HEADS * GROUPS, 1, 6), (1, HEADS * GROUPS, 1, 6), (HEADS * GROUPS, 1, 6)):
        given = queries, rows, torch.randn(shape)
        assert torch.equal(module(*given), own(*given))


def test_causal_queries_stay_apart(tmp_path: Path) -> None:
    module = traced(Causal(), inputs(2, 3, 5)[:2], tmp_path)
    assert grouped_queries.group(module) == 1
    given = inputs(4, 1, 6)[:2]
    assert torch.equal(module(*given), Causal()(*given))


@pytest.mark.parametrize(
    ("keys", "values"),
    [(tiled, tiled), (tiled, repeated), (repeated, tiled), (lambda rows: repeated(rows) + 0, repeated)],
)
def test_anything_else_stays(keys: Any, values: Any, tmp_path: Path) -> None:
    own = Attention(keys, values)
    module = traced(own, inputs(2, 3, 5), tmp_path)
    assert grouped_queries.group(module) == 0
    given = inputs(3, 2, 9)
    assert torch.equal(module(*given), own(*given))


def test_other_parts_of_the_rows_stay(tmp_path: Path) -> None:
    module = traced(Attention(shortened, shortened), (torch.randn(2, 6, 3, 7), *inputs(2, 3, 5)[1:]), tmp_path)
    assert grouped_queries.group(module) == 0


def test_other_positions_stay(tmp_path: Path) -> None:
    own = Attention(without_last, without_last)
    queries, rows, _ = inputs(2, 3, 5)
    example = queries, rows, torch.ones(2, 1, 3, 4, dtype=torch.bool)
    module = traced(own, example, tmp_path)
    assert grouped_queries.group(module) == 0
    assert torch.equal(module(*example), own(*example))


def test_repeated_positions_stay(tmp_path: Path) -> None:
    own = Attention(positions_merged, positions_merged)
    example = torch.randn(2, HEADS, 3, 8), torch.randn(2, HEADS, 5, 8), torch.ones(2, 1, 3, 15, dtype=torch.bool)
    module = traced(own, example, tmp_path)
    assert grouped_queries.group(module) == 0
    assert torch.equal(module(*example), own(*example))


class TwoReaders(torch.nn.Module):
    """One reads the repeated keys too."""

    def forward(self, queries: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        keys = repeated(rows)
        return scaled_dot_product_attention(queries, keys, repeated(rows * 2), mask) + keys.sum()


def test_whoever_else_reads_the_copies_still_has_them(tmp_path: Path) -> None:
    module = traced(TwoReaders(), inputs(2, 3, 5), tmp_path)
    assert grouped_queries.group(module) == 1
    assert str(module.graph).count(COPY) == 1
    given = inputs(4, 2, 6)
    assert torch.equal(module(*given), TwoReaders()(*given))


def test_where_torch_makes_the_copies_itself_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = traced(Attention(repeated, repeated), inputs(2, 3, 5), tmp_path)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: 0)
    assert not torch_internals.attends_in_groups()
    assert grouped_queries.group(module) == 0
    assert str(module.graph).count(COPY) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_worker_has_it(checkpoint: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    source = checkpoint("llama", "AutoModelForCausalLM")
    content: Dict[str, Any] = {"model_name": str(source), "task": "text_generation", "max_length": 48, "dtype": dtype}
    run_export(tmp_path / "x", content, allow_drift=True)
    runner: Any = Engine.load(tmp_path / "x").runner
    attentions = runner._module.step.graph.findAllNodes(ATTENTION, True)
    assert len(attentions) == 2
    assert all(list(node.inputs())[-1].toIValue() is True for node in attentions)
