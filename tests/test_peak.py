"""The arithmetic of a model, and the machine's peak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Callable

import pytest
import torch
from conftest import needs_native
from test_loading import original
from traceserve.building.products import count_products
from traceserve.measuring.arithmetic import Arithmetic, arithmetic_of
from traceserve.measuring.peak import measure_peak
from traceserve_runtime.manifest import Manifest


@pytest.mark.parametrize(("kind", "task"), [("bert", "sequence_classification"), ("roberta", "token_classification")])
def test_the_products_of_a_transformer(checkpoint: Callable[..., Path], kind: str, task: str) -> None:
    """Two operations for each weight that a token is multiplied by, and four times the width for each pair of tokens in
    each layer: its scores, and its part of the weighted sum."""
    made = original(checkpoint(kind), task=task, allow_untrained_head=True)
    config = made.model.config
    counted = count_products(made, task)
    layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    head = len(made.labels) * config.hidden_size if "logits" in made.per_token else 0
    assert counted is not None
    assert counted["token"] == pytest.approx(2 * (config.num_hidden_layers * layer + head), rel=0.02)
    assert counted["pair"] == pytest.approx(4 * config.num_hidden_layers * config.hidden_size, rel=0.1)


def test_what_is_not_counted(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops, whose speed memory limits; models whose rows are too short to tell; and where torch cannot count."""
    made = original(checkpoint("bert"), task="sequence_classification")
    assert count_products(made, "text_generation") is None
    assert count_products(replace(made, max_length=1), "sequence_classification") is None
    monkeypatch.delattr(torch.nn.attention, "sdpa_kernel")
    assert count_products(made, "sequence_classification") is None


def test_an_archive_tells_its_arithmetic(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    told = arithmetic_of(manifest)
    assert told is not None and told.token > 1000 and told.dtype == manifest.dtype
    assert arithmetic_of(replace(manifest, hardware="inf1")) is None
    assert arithmetic_of(replace(manifest, receipt={})) is None


def test_the_arithmetic_of_a_request() -> None:
    """Two rows of 30 tokens have as many pairs as one of 30 has, twice."""
    arithmetic = Arithmetic("float32", "cpu", token=1000, pair=10)
    assert arithmetic.of_a_request(30, 1) == 30 * 1000 + 30 * 30 * 10
    assert arithmetic.of_a_request(60, 2) == 2 * arithmetic.of_a_request(30, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("int8", marks=needs_native("int8"))])
def test_the_peak_is_that_of_a_large_product(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traceserve.measuring.peak._SECONDS", 0.02)
    threads = torch.get_num_threads()
    peak = measure_peak(dtype, "cpu")
    assert peak is not None and 1e8 < peak < 1e14 and torch.get_num_threads() == threads
    assert measure_peak(dtype, "gpu") is None or torch.cuda.is_available()
