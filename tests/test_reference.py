"""The original on rows of one length together, equal to each alone; and alone, if it differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, List

import numpy as np
import pytest
import torch
from conftest import ROOT, nothing, run_export
from models import ARCHITECTURES, UNEVEN
from traceserve.building.checkpoints import loading, sources
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate import reference, verification
from traceserve.building.gate.reference import Reference, Wanted
from traceserve.building.gate.texts import TEXTS
from traceserve_runtime.engine import Engine
from traceserve_runtime.texts.rows import Encoded, Row

ENCODERS = [name for name, family in ARCHITECTURES.items() if family.encodes] + ["fnet", "longformer", "convbert"]
assert {"fnet", "longformer", "convbert"} <= set(UNEVEN)


def original_of(source: Path) -> Any:
    config, _ = parse_config({"model_name": str(source), "max_length": 32, "task": "sequence_classification"})
    with loading.quiet_transformers():
        return loading.load_original(config, sources.fetch_checkpoint(config, ROOT), ROOT)


@pytest.fixture(scope="module")
def rows(artifact: Path) -> List[Row]:
    """Rows of several lengths, most of them repeated; every tiny model knows their ids."""
    task = Engine.load(artifact).task
    encoded = task.encode(task.from_texts([*TEXTS, *(f"{a} {b} {c}" for a in "abc" for b in "ab" for c in "xyz")]))
    return [item.rows[0] for item in encoded if isinstance(item, Encoded)]


def told(done: int, total: int) -> None:
    assert done <= total


def computed(made: Reference, rows: List[Row]) -> List[np.ndarray]:
    made.prepare((Wanted(i, row, dict) for i, row in enumerate(rows)), ["logits"], told)
    return [made.outputs(i, pytest.fail)["logits"] for i in range(len(rows))]


@pytest.mark.parametrize("architecture", ENCODERS)
def test_together_as_alone(architecture: str, checkpoint: Callable[..., Path], rows: List[Row]) -> None:
    original = original_of(checkpoint(architecture))
    made = Reference(original)
    for got, row in zip(computed(made, rows), rows):
        alone = reference.run_original(original, row, ["logits"])["logits"]
        assert np.allclose(got, alone, 2e-6, 2e-6)
    assert made.together


def test_few_runs_are_made_of_many_rows(
    checkpoint: Callable[..., Path], rows: List[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: List[int] = []
    own = reference.run_originals
    monkeypatch.setattr(
        reference,
        "run_originals",
        lambda original, rows, outputs: runs.append(len(rows)) or own(original, rows, outputs),
    )
    computed(Reference(original_of(checkpoint("bert"))), rows)
    batches = [size for size in runs if size > 1]
    assert len(runs) < len(rows) and max(batches) >= 18
    assert sum(runs) == len(rows) + len(batches)  # one of each batch also runs alone


class Interacting(torch.nn.Module):
    """A model whose rows see each other: alone each has another answer."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: Any = None) -> Any:
        numbers = input_ids.float().mean(1, keepdim=True)
        return {"logits": numbers - numbers.mean() + 0.01 * numbers}


class Refusing(torch.nn.Module):
    """Like BART's classifier, which refuses rows with different numbers of end tokens."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: Any = None) -> Any:
        if len(input_ids) > 1:
            raise ValueError("all examples must have the same number of <eos> tokens")
        return {"logits": input_ids.float().mean(1, keepdim=True)}


class Rounding(torch.nn.Module):
    """A model whose sums differ by 3e-5 between many rows and one, relative to a largest value."""

    def __init__(self, largest: float) -> None:
        super().__init__()
        self.largest = largest

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: Any = None) -> Any:
        small = input_ids.float().mean(1, keepdim=True) / 1e6 + (3e-5 if len(input_ids) > 1 else 0)
        return {"logits": torch.cat([torch.full_like(small, self.largest), small], 1)}


@pytest.mark.parametrize(("largest", "together"), [(30.0, True), (-30.0, True), (0.5, False)])
def test_last_digits_are_those_of_the_largest_value(
    largest: float, together: bool, checkpoint: Callable[..., Path], rows: List[Row]
) -> None:
    """As the gate measures: a sum of numbers around 30 has no more precision if it is small."""
    from dataclasses import replace

    made = Reference(replace(original_of(checkpoint("bert")), model=Rounding(largest)))
    computed(made, rows)
    assert made.together is together


@pytest.mark.parametrize(
    ("got", "alike"), [([np.nan, np.inf, 30.00001], True), ([0, np.inf, 30], False), ([np.nan, 0, 30], False)]
)
def test_what_is_no_number_stays_none(got: List[float], alike: bool) -> None:
    expected = {"logits": np.array([np.nan, np.inf, 30])}
    assert reference._equal({"logits": np.array(got)}, expected) is alike


@pytest.mark.parametrize("kind", [Interacting, Refusing])
def test_rows_that_are_something_else_together_are_run_alone(
    kind: Any, checkpoint: Callable[..., Path], rows: List[Row]
) -> None:
    from dataclasses import replace

    original = replace(original_of(checkpoint("bert")), model=kind())
    made = Reference(original)
    for got, row in zip(computed(made, rows), rows):
        assert np.array_equal(got, reference.run_original(original, row, ["logits"])["logits"])
    assert made.together is (kind is Refusing)


def test_what_is_found_late_is_computed_again(checkpoint: Callable[..., Path], rows: List[Row]) -> None:
    """Earlier results of rows together are not trusted either."""
    from dataclasses import replace

    model = Interacting()
    original = replace(original_of(checkpoint("bert")), model=model)
    made = Reference(original)
    checks = iter([True])
    equal = reference._equal
    patched = pytest.MonkeyPatch()
    patched.setattr(reference, "_equal", lambda got, expected: next(checks, False) or equal(got, expected))
    try:
        got = computed(made, rows)
    finally:
        patched.undo()
    assert not made.together
    for one, row in zip(got, rows):
        assert np.array_equal(one, reference.run_original(original, row, ["logits"])["logits"])


def test_an_answer_that_changed_is_compared_with_the_row_alone(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together a near tie may be decided differently: an answer is unchanged if the original alone gives it."""
    source = checkpoint("bert")
    run_export(tmp_path / "x", {"model_name": str(source), "max_length": 32})
    together = reference.run_originals
    spoiled: List[int] = []

    def run_originals(original: Any, rows: Any, outputs: Any) -> Any:
        results = together(original, rows, outputs)
        if len(rows) > 1:  # by less than the check would see with so wide a limit
            spoiled.append(len(rows))
            results = [{name: -array for name, array in result.items()} for result in results]
        return results

    monkeypatch.setattr(reference, "run_originals", run_originals)
    monkeypatch.setattr(reference, "_equal", lambda got, expected: True)
    monkeypatch.setattr(verification, "compare_outputs", lambda *arguments: None)
    findings = verification.verify(tmp_path / "x", Reference(original_of(source)), [], nothing)
    assert spoiled and findings.answers > 20 and not findings.changed
