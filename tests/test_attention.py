"""bfloat16 graphs whose attention is computed in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, Optional

import pytest
import torch
from conftest import reread, run_export
from torch.nn.functional import scaled_dot_product_attention
from traceserve_runtime import processor
from traceserve_runtime.engine import Engine
from traceserve_runtime.runtimes.torchscript import attention, devices

WIDE, ATTENTION = "aten::type_as(", "aten::scaled_dot_product_attention("


@pytest.fixture(autouse=True)
def any_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to be x86 without AMX, on any machine."""
    torch.manual_seed(0)
    monkeypatch.setattr(processor, "is_x86", lambda: True)
    monkeypatch.setattr(processor, "features", frozenset)


def truths(rows: torch.Tensor) -> torch.Tensor:
    """Return a causal mask: each position sees itself and earlier ones; (batch, 1, positions, positions)."""
    places = rows.shape[2]
    return torch.ones(rows.shape[0], 1, places, places, dtype=torch.bool).tril()


def numbers(rows: torch.Tensor) -> torch.Tensor:
    """Return the same in the rows' dtype, to be added."""
    return torch.where(truths(rows), 0.0, torch.finfo(rows.dtype).min).to(rows.dtype)


MASKS: Dict[str, Callable[[torch.Tensor], Optional[torch.Tensor]]] = {
    "no mask": lambda rows: None,
    "truths": truths,
    "numbers": numbers,
    "float32": lambda rows: numbers(rows).float(),
}


class Layers(torch.nn.Module):
    """Several attentions with a common mask."""

    def __init__(self, mask: str, causal: bool = False) -> None:
        super().__init__()
        self.mask = mask
        self.causal = causal

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        mask = MASKS[self.mask](rows)
        for _ in range(3):
            rows = scaled_dot_product_attention(rows, rows, rows, mask, is_causal=self.causal)
        return rows


class Branch(torch.nn.Module):
    """One of two is in a branch, where the other one's inputs are not computed."""

    def forward(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if rows.size(0) > 1:
            rows = scaled_dot_product_attention(rows, rows, rows, mask)
        return scaled_dot_product_attention(rows, rows, rows, mask)


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the mean difference, relative to the mean value."""
    return float((got - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize(("mask", "causal"), [*((mask, False) for mask in MASKS), ("no mask", True)])
def test_it_gives_what_float32_gives(mask: str, causal: bool, tmp_path: Path) -> None:
    layers = Layers(mask, causal)
    rows = torch.randn(4, 3, 9, 8).to(torch.bfloat16)
    traced: Any = torch.jit.trace(layers, rows)  # type: ignore[no-untyped-call]
    module, plain = reread(traced, tmp_path), reread(traced, tmp_path)
    assert attention.widen(module) == 3
    graph = str(module.graph)
    assert graph.count(WIDE) == graph.count(ATTENTION) == 3
    assert graph.count("prim::dtype(") == (mask != "no mask")  # one mask is made for all
    for each in (rows, rows[:1]):
        exact, before, after = layers(each.float()), plain(each), module(each)
        assert after.dtype == before.dtype == torch.bfloat16
        assert error(after, exact) < min(
            0.005, 1.1 * error(before, exact)
        )  # the remaining error of rounding the results


@pytest.mark.parametrize("mask", ["truths", "numbers"])
def test_in_a_branch(mask: str, tmp_path: Path) -> None:
    rows = torch.randn(2, 3, 9, 8).to(torch.bfloat16)
    module = reread(torch.jit.script(Branch()), tmp_path)
    assert attention.widen(module) == 2
    for each in (rows, rows[:1]):
        own = MASKS[mask](each)
        assert own is not None
        exact = Branch()(each.float(), own if own.dtype == torch.bool else own.float())
        assert error(module(each, own), exact) < 0.005


def test_rows_without_anything_to_see_are_as_before(tmp_path: Path) -> None:
    rows, mask = torch.randn(2, 3, 5, 8).to(torch.bfloat16), torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1] = False
    module, plain = (reread(torch.jit.script(Branch()), tmp_path) for _ in range(2))
    assert attention.widen(module) == 2
    assert torch.equal(module(rows, mask).isfinite(), plain(rows, mask).isfinite())


@pytest.mark.parametrize("where", ["not x86", "with AMX"])
def test_where_nothing_is_gained_it_stays(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "not x86":
        monkeypatch.setattr(processor, "is_x86", lambda: False)
    else:
        monkeypatch.setattr(processor, "features", lambda: frozenset({"amx_bf16", "avx512_bf16"}))
    assert not attention.sooner_wide()


@pytest.mark.parametrize(
    ("architecture", "task", "auto_model"),
    [
        ("bert", "sequence_classification", "AutoModelForSequenceClassification"),
        ("llama", "text_generation", "AutoModelForCausalLM"),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_worker_in_bfloat16_has_it(
    checkpoint: Callable[..., Path], tmp_path: Path, architecture: str, task: str, auto_model: str, dtype: str
) -> None:
    content = {"model_name": str(checkpoint(architecture, auto_model)), "task": task, "max_length": 32, "dtype": dtype}
    run_export(tmp_path / "x", content, allow_drift=True)
    runner: Any = Engine.load(tmp_path / "x").runner
    graphs = "\n".join(str(graph) for graph in devices.graphs(runner._module))
    assert graphs.count(ATTENTION) >= 2
    assert graphs.count(WIDE) == (graphs.count(ATTENTION) if dtype == "bfloat16" else 0)
