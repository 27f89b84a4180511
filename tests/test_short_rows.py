"""Models that cannot read rows of a few tokens: such rows are padded to their minimum."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
import torch
import transformers
from conftest import run_export
from oracle import CASES, TEXTS, answers, assert_equal
from traceserve.building import attempt
from traceserve.building.checkpoints.short_rows import shortest
from traceserve.errors import ExportError
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidManifest
from traceserve_runtime.manifest import Manifest, Shapes
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Request

BERT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
FUNNEL = Shapes(padded=False, shortest=5)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs for a few lengths are not tried, since padding changes Funnel."""
    monkeypatch.setattr(attempt, "candidate_shapes", lambda config, most: [Shapes()])


@pytest.mark.parametrize(
    "architecture, options, expected",
    [
        ("bert", {}, 1),
        ("funnel", {}, 5),
        ("funnel", {"block_sizes": [1, 1]}, 3),
        ("funnel", {"block_sizes": [1, 1, 1, 1]}, 9),
        ("funnel", {"truncate_seq": False}, 7),  # 5 would work, 6 would not
        ("funnel", {"attention_type": "factorized"}, 1),
    ],
    ids=str,
)
def test_the_shortest_row_is_found(
    architecture: str, options: Dict[str, Any], expected: int, checkpoint: Callable[..., Path]
) -> None:
    source = checkpoint(architecture, **options)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    assert shortest(model, tokenizer, BERT_INPUTS, 64) == expected
    if expected > 1:
        with pytest.raises(
            ExportError, match=f"cannot be run on {expected - 1} tokens .* set it above {expected - 1}$"
        ):
            shortest(model, tokenizer, BERT_INPUTS, expected - 1)


def test_a_model_that_always_fails_is_told_of_by_what_writes_it(checkpoint: Callable[..., Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint("bert"))

    def fail(**inputs: Any) -> Any:
        raise RuntimeError("never")

    assert shortest(fail, tokenizer, BERT_INPUTS, 64) == 1


def test_a_model_that_counts_separators_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("longformer", "AutoModelForQuestionAnswering")
    config = {"model_name": str(source), "task": "question_answering", "max_length": 24}
    with pytest.raises(ExportError, match="LongformerForQuestionAnswering does not read every text .*three separator"):
        run_export(tmp_path / "x", config)


def expected_logits(source: Path, task: str, text: str) -> torch.Tensor:
    """Return the original's, padded to the minimum by transformers' own tokenizer, for the text's tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    count = len(tokenizer(text)["input_ids"])
    model = getattr(transformers, TASKS[task].auto_model).from_pretrained(source).eval()
    inputs = tokenizer(text, return_tensors="pt", padding="max_length", max_length=max(count, FUNNEL.shortest))
    with torch.no_grad():
        logits: torch.Tensor = model(**{name: inputs[name] for name in BERT_INPUTS}).logits[0]
    return logits[:count] if logits.ndim == 2 else logits


@pytest.mark.parametrize("save_mode", ["torchscript", "pretrained"])
def test_short_texts_are_answered_as_the_padded_original_does(
    save_mode: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Texts of 2 to 4 tokens beside longer ones."""
    source = checkpoint("funnel", **CASES["sequence_classification"].options)
    exported = run_export(tmp_path / "x", {"model_name": str(source), "max_length": 64, "save_mode": save_mode})
    assert exported.manifest.shapes == FUNNEL and exported.manifest.receipt["passed"]
    assert exported.note is not None and "fails on rows below 5 tokens" in exported.note
    requests = [Request({"text": text}, {"top_k": None}) for text in ("", "a", "a", "a a", "a the", *TEXTS[:3])]
    for request, answer in zip(requests, answers(Engine.load(tmp_path / "x"), requests)):
        scores = expected_logits(source, "sequence_classification", request.inputs["text"]).softmax(-1)
        expected = dict(zip(("red", "green", "blue"), scores.tolist()))
        assert {item["label"]: item["score"] for item in answer} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("save_mode", ["torchscript", "pretrained"])
@pytest.mark.parametrize("task", ["token_classification", "question_answering", "fill_mask"])
def test_every_head_of_funnel_is_exported(
    task: str, save_mode: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("funnel", TASKS[task].auto_model, **CASES[task].options if task in CASES else {})
    content = {"model_name": str(source), "task": task, "save_mode": save_mode, "max_length": 64}
    manifest = run_export(tmp_path / "x", content).manifest
    assert manifest.shapes == FUNNEL and manifest.receipt["passed"] and manifest.receipt["answers"] > 2
    if task == "token_classification":
        pipeline = transformers.pipeline("token-classification", model=str(source), device="cpu")
        texts = [text for text in TEXTS if 5 <= len(pipeline.tokenizer(text)["input_ids"]) <= 64][:6]
        for text, answer in zip(texts, answers(Engine.load(tmp_path / "x"), [Request({"text": t}) for t in texts])):
            assert_equal(answer, pipeline(text), 1e-4, 1e-4)


def test_a_model_that_padding_does_not_change_runs_short_rows_with_others(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("funnel", truncate_seq=False, block_sizes=[1, 1])
    manifest = run_export(tmp_path / "x", {"model_name": str(source), "max_length": 32}).manifest
    assert manifest.shapes == Shapes(shortest=3) and manifest.receipt["passed"]
    engine = Engine.load(tmp_path / "x")
    texts = ["", "a", "a the", TEXTS[0]]
    together = answers(engine, [Request({"text": text}) for text in texts])
    for text, answer in zip(texts, together):
        assert_equal(answer, answers(engine, [Request({"text": text})])[0], 1e-4, 1e-4)


def test_a_manifest_with_no_such_row_is_refused(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    for wrong in (0, manifest.max_length + 1):
        document = {"schema": 3, **dataclasses.asdict(manifest)}
        document["shapes"] = {**dataclasses.asdict(Shapes()), "shortest": wrong}
        with pytest.raises(InvalidManifest, match="shapes.shortest should be 1 to max_length"):
            Manifest.from_json(json.loads(json.dumps(document)))
