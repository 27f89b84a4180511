"""Padding: its side, and models whose answers it changes, which run in batches of one length, never padded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, List

import pytest
import transformers
from conftest import run_export
from hypothesis import given, settings
from hypothesis import strategies as st
from test_verification import spy
from traceserve.building.attempt import _without_padding
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate.findings import LIMITS, Cell, DriftError, Findings
from traceserve.building.gate.texts import SENTENCES
from traceserve.building.writers.shapes import without_padding
from traceserve.commands.build import _print_exported
from traceserve_runtime.batching.costs import CostModel
from traceserve_runtime.batching.lanes import Lanes, schedule
from traceserve_runtime.batching.plan import plan_batches
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidManifest
from traceserve_runtime.manifest import OLDEST, Manifest, Shapes
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks.contract import Answer, Request

LABELS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
TEXTS = [text for text in SENTENCES if text] + ["Yes.", "No.", "Oh no!", "Oh dear!"]
NEVER = Shapes(padded=False)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traceserve.building.gate.verification.TEXTS", tuple(SENTENCES[:12]))


def assert_as_the_pipeline(folder: Path, source: Path, texts: List[str] = TEXTS) -> Engine:
    """All texts together, of many lengths; the pipeline answers one at a time."""
    engine = Engine.load(folder)
    answers = engine.answer([Request({"text": text}, {"top_k": None, "long_inputs": "truncate"}) for text in texts])
    oracle = transformers.pipeline("text-classification", model=str(source), tokenizer=str(source), top_k=None)
    for text, answer in zip(texts, answers):
        assert isinstance(answer, Answer)
        [scores] = oracle([text], truncation=True, max_length=64)  # type: ignore[call-overload]
        expected = {item["label"]: item["score"] for item in scores}
        assert {item["label"]: item["score"] for item in answer.value} == pytest.approx(expected, abs=1e-4)
    return engine


@pytest.mark.parametrize("architecture", ["fnet", "convbert"])
def test_a_model_that_padding_changes_is_never_padded(
    architecture: str, checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = checkpoint(architecture, **LABELS), tmp_path / "x"
    exported = run_export(folder, {"model_name": str(source), "max_length": 64})
    manifest = Manifest.read(folder)
    assert manifest.shapes == NEVER and manifest.receipt["passed"]
    assert manifest.receipt["padding_changes_outputs_by"] > 1e-3
    engine = assert_as_the_pipeline(folder, source)
    seen = spy(engine)
    engine.answer([Request({"text": text}) for text in ("Yes.", "No.", "Yes, of course.", "Yes.")])
    assert max(batch for batch, _ in seen) > 1  # equal lengths do run together
    _print_exported(exported, folder, 1.0)
    assert "only rows of one length run together" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(InvalidManifest, match="length_step pads rows"):
        Engine.load(folder, settings=Settings(length_step=8))


@pytest.mark.parametrize("save_mode", ["pretrained"])
def test_in_another_save_mode_too(save_mode: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, folder = checkpoint("fnet", **LABELS), tmp_path / "x"
    run_export(folder, {"model_name": str(source), "max_length": 64, "save_mode": save_mode})
    assert Manifest.read(folder).shapes == NEVER
    assert_as_the_pipeline(folder, source)


def test_a_lower_precision_does_not_hide_what_padding_changes(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """By a thirtieth here, which is within the limit of bfloat16: a document's score would depend on its neighbours."""
    source, folder = checkpoint("nystromformer", num_labels=1), tmp_path / "x"
    content = {"model_name": str(source), "task": "text_ranking", "save_mode": "pretrained", "dtype": "bfloat16"}
    run_export(folder, {**content, "max_length": 64})
    manifest = Manifest.read(folder)
    assert manifest.shapes == NEVER
    assert 1e-2 < manifest.receipt["padding_changes_outputs_by"] < LIMITS["bfloat16"].difference
    with pytest.raises(DriftError, match="padding changes the answers of this model") as error:
        run_export(tmp_path / "y", {**content, "max_length": 64, "sequence_lengths": "fixed"})
    assert error.value.findings.changed_by_padding and not error.value.findings.failed


def test_where_padding_changes_too_much_for_the_dtype_too_it_is_left_out(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("nystromformer", num_labels=1)
    content = {"model_name": str(source), "task": "text_ranking", "dtype": "float16", "max_length": 64}
    run_export(tmp_path / "x", content)
    assert Manifest.read(tmp_path / "x").shapes == NEVER


def test_where_lengths_are_fixed_it_is_refused_with_what_to_do(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    content = {"model_name": str(checkpoint("fnet", **LABELS)), "max_length": 64, "sequence_lengths": "fixed"}
    with pytest.raises(DriftError, match='with "sequence_lengths": "auto" it is run without any') as error:
        run_export(tmp_path / "x", content)
    assert error.value.findings.failed and all(cell.padded for cell in error.value.findings.failed)


def test_on_hardware_of_fixed_shapes_it_is_refused_in_a_sentence() -> None:
    config, _ = parse_config({"model_name": "x/y", "hardware": "neuron"})
    assert not list(without_padding(config))
    padded_alone = Findings(
        LIMITS["float32"], cells=[Cell(2, 8, False, "logits", 0.0), Cell(2, 8, True, "logits", 1.0)]
    )
    assert 'neuron has fixed shapes, to which rows must be padded: take "hardware": "cpu"' in _without_padding(
        config, padded_alone
    )
    wrong = Findings(LIMITS["float32"], cells=[Cell(2, 8, False, "logits", 1.0), Cell(2, 8, True, "logits", 1.0)])
    assert not _without_padding(config, wrong)


def left_padding(source: Path, folder: Path) -> Path:
    """The same checkpoint with a tokenizer that pads on the left."""
    shutil.copytree(source, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left"}))
    return folder


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_a_tokenizer_that_pads_on_the_left_is_padded_on_the_right(
    architecture: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = left_padding(checkpoint(architecture, **LABELS), tmp_path / "source")
    run_export(tmp_path / "x", {"model_name": str(source), "max_length": 64})
    manifest = Manifest.read(tmp_path / "x")
    assert manifest.tokenizer.padding_side == "right" and manifest.shapes == Shapes()
    assert_as_the_pipeline(tmp_path / "x", source)


def test_a_model_that_reads_the_last_position_is_padded_on_the_left(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("xlnet", **LABELS)
    run_export(tmp_path / "x", {"model_name": str(source), "max_length": 64})
    manifest = Manifest.read(tmp_path / "x")
    assert (manifest.tokenizer.padding_side, manifest.shapes) == ("left", Shapes())
    assert_as_the_pipeline(tmp_path / "x", source)


def test_questions_keep_the_order_of_the_pipeline(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """It puts the context first if the tokenizer pads on the left, whatever side rows are padded on."""
    source = left_padding(checkpoint("bert", "AutoModelForQuestionAnswering"), tmp_path / "source")
    exported = run_export(tmp_path / "x", {"model_name": str(source), "task": "question_answering", "max_length": 64})
    assert exported.manifest.facts["question_first"] is False
    assert exported.manifest.tokenizer.padding_side == "right"
    task = Engine.load(tmp_path / "x").task
    [segments] = task.segments(Request({"question": "Who?", "context": "Anna was here."}))
    assert segments[:2] == ("Anna was here.", "Who?")


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=40)


class _Thread:
    """Stands for a lane in a plan that is not run."""


@settings(deadline=None, max_examples=60, database=None)
@given(LENGTHS, st.floats(0, 200), st.integers(1, 3), st.sampled_from([NEVER, replace(NEVER, shortest=5)]))
def test_a_plan_joins_rows_of_one_length_alone(lengths: List[int], run: float, threads: int, never: Shapes) -> None:
    cost = CostModel(run=run)
    lanes = Lanes([_Thread()] * threads, cost)  # type: ignore[list-item]
    for batches in (plan_batches(lengths, never, cost), *schedule(lengths, never, cost, lanes)):
        assert all(len({lengths[i] for i in batch}) == 1 for batch in batches)
    for planned in ([plan_batches(lengths, never, cost)], schedule(lengths, never, cost, lanes)):
        assert sorted(i for batches in planned for batch in batches for i in batch) == list(range(len(lengths)))
    if run > 100:
        assert len(plan_batches(lengths, never, cost)) == len(set(lengths))  # and all of them


def test_a_manifest_from_before_there_was_such_a_thing_is_padded(artifact: Path) -> None:
    document: Any = json.loads((artifact / "traceserve.json").read_text())
    assert document["shapes"].pop("padded") is True and document["shapes"].pop("shortest") == 1
    del document["digest"]
    document["schema"] = OLDEST
    assert Manifest.from_json(document).shapes == Shapes()
    document["shapes"].update(padded=False, lengths=[32])
    with pytest.raises(InvalidManifest, match="should be null where rows are not padded"):
        Manifest.from_json(document)
