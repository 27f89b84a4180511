"""Recurrences that a trace holds: equal to transformers' own, at any number of positions and from any state."""

from __future__ import annotations

import importlib
from typing import Any, Dict, Optional

import pytest
import torch
import transformers
from traceserve.building.writers.tracing.recurrences import recurrences_of_any_length

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 5 has them as functions of their own"
)
BATCH, HEADS, SIZE, STATES = 2, 4, 6, 5
LENGTHS = (1, 2, 15, 16, 17, 64, 65, 200)  # in chunks of 16


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _gated_delta(length: int, initial: bool) -> Dict[str, Any]:
    return {
        "query": _random(BATCH, length, 2, STATES, seed=1),
        "key": _random(BATCH, length, 2, STATES, seed=2),
        "value": _random(BATCH, length, HEADS, SIZE, seed=3),
        "g": -_random(BATCH, length, HEADS, seed=4).abs(),
        "beta": _random(BATCH, length, HEADS, seed=5).sigmoid(),
        "chunk_size": 16,
        "initial_state": _random(BATCH, HEADS, STATES, SIZE, seed=6) if initial else None,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }


def _state_space(length: int, initial: bool) -> Dict[str, Any]:
    return {
        "hidden_states": _random(BATCH, length, HEADS, SIZE, seed=1),
        "dt": _random(BATCH, length, HEADS, seed=2),
        "A": -_random(HEADS, seed=3).abs(),
        "B": _random(BATCH, length, 2, STATES, seed=4),
        "C": _random(BATCH, length, 2, STATES, seed=5),
        "chunk_size": 16,
        "D": _random(HEADS, seed=6),
        "dt_bias": _random(HEADS, seed=7),
        "dt_softplus": True,
        "dt_limit": (0.1, 2.0),
        "initial_states": _random(BATCH, HEADS, SIZE, STATES, seed=8) if initial else None,
        "return_final_states": True,
    }


def _selective_scan(length: int, initial: bool) -> Dict[str, Any]:
    return {
        "hidden_states": _random(BATCH, SIZE, length, seed=1),
        "dt": _random(BATCH, SIZE, length, seed=2),
        "A": -_random(SIZE, STATES, seed=3).abs(),
        "B": _random(BATCH, STATES, length, seed=4),
        "C": _random(BATCH, STATES, length, seed=5),
        "D": _random(SIZE, seed=6),
        "z": _random(BATCH, SIZE, length, seed=7),
        "delta_bias": _random(SIZE, seed=8),
        "delta_softplus": True,
        "return_last_state": True,
    }


# The family whose file has it, its name there, arguments, and whether it can begin from a state.
FUNCTIONS = {
    "torch_chunk_gated_delta_rule": ("qwen3_5", _gated_delta, True),
    "mamba2_chunk_scan": ("falcon_h1", _state_space, True),
    "mamba_selective_scan": ("mamba", _selective_scan, False),
}


class _Of(torch.nn.Module):
    """A part of a model, as defined in this file of transformers."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        kind = type("Part", (torch.nn.Module,), {"__module__": module.__name__})
        self.part = kind()


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equal_transformers_at_any_length(name: str, initial: bool) -> None:
    family, arguments, begins = FUNCTIONS[name]
    module: Any = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    own = getattr(module, name)
    for length in LENGTHS:
        given = arguments(length, initial and begins)
        expected = own(**given)
        with recurrences_of_any_length(_Of(module)):
            assert getattr(module, name) is not own
            found = getattr(module, name)(**given)
        for one, other in zip(found, expected):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-4), length
    assert getattr(module, name) is own


@pytest.mark.parametrize("name", [name for name, (_, _, begins) in FUNCTIONS.items() if begins])
def test_parts_equal_the_whole(name: str) -> None:
    """A trace made of one length reads a text in any parts, each from the state of the one before."""
    family, arguments, _ = FUNCTIONS[name]
    module: Any = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    whole = arguments(40, True)
    state = "initial_state" if "initial_state" in whole else "initial_states"
    along = [key for key, value in whole.items() if isinstance(value, torch.Tensor) and value.shape[1:2] == (40,)]

    class Part(torch.nn.Module):
        def forward(self, initial: torch.Tensor, *columns: torch.Tensor) -> Any:
            return getattr(module, name)(**{**whole, **dict(zip(along, columns)), state: initial})

    def columns(first: int, last: int) -> Any:
        return [whole[key][:, first:last] for key in along]

    with recurrences_of_any_length(_Of(module)):
        expected, _ = Part()(whole[state], *columns(0, 40))
        traced = torch.jit.trace(Part(), (whole[state], *columns(0, 5)), check_trace=False)
    reached: Optional[torch.Tensor] = whole[state]
    outputs = []
    for first, last in ((0, 1), (1, 2), (2, 20), (20, 37), (37, 38), (38, 40)):
        output, reached = traced(reached, *columns(first, last))
        outputs.append(output)
    assert torch.allclose(torch.cat(outputs, dim=1), expected, rtol=1e-4, atol=1e-4)
