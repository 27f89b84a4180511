"""The gate: what it passes, what it stops, and the shapes that it proves."""

from __future__ import annotations

import copy
import datetime
import json
import math
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Set, Tuple, cast

import conftest
import numpy as np
import pytest
import torch
import transformers
from conftest import Called, nothing
from safetensors.torch import load_file, save_file
from traceserve.building import attempt
from traceserve.building.attempt import AcceptedArtifact, Attempt, candidate_shapes
from traceserve.building.checkpoints import loading, sources
from traceserve.building.checkpoints.original import Original
from traceserve.building.config.parsing import parse_config
from traceserve.building.exported import Candidate, Exported
from traceserve.building.gate import verification
from traceserve.building.gate.findings import LIMITS, Cell, DriftError, Findings, TokenCounts
from traceserve.building.gate.outputs import GridRows, unexplained_variance
from traceserve.building.gate.reference import Reference
from traceserve.building.gate.texts import TEXTS, VERY_LONG
from traceserve.building.writers import WRITERS
from traceserve.building.writers.contract import Writer, Written
from traceserve.building.writers.torchscript import writer
from traceserve.commands import build, printing
from traceserve.errors import ExportError, UnaskableError
from traceserve_runtime.engine import Engine
from traceserve_runtime.manifest import Manifest, Shapes, sha256
from traceserve_runtime.protocols.requests import parse_value
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request
from traceserve_runtime.texts.rows import Encoded

run_export = partial(conftest.run_export, all_texts=True)  # what the gate compares is tested here

CLASSIFIER = {"task": "sequence_classification"}
LABELS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}


def test_the_receipt(artifact: Path) -> None:
    receipt = Manifest.read(artifact).receipt
    assert receipt["passed"] and not receipt["drift_allowed"] and receipt["answers_changed"] == 0
    assert receipt["answers"] > 25 and receipt["cells"] > 10
    assert receipt["largest_difference"] < 1e-5 < receipt["limits"]["difference"]
    assert receipt["lengths"][-1] == 32 and 1 in receipt["batches"]


@pytest.mark.parametrize("zone", ["Etc/GMT+12", "Etc/GMT-14"])  # one of them has another date now
def test_the_reports_date_is_utc(zone: str, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = Exported(Manifest.read(artifact), Findings(LIMITS["float32"]), 0, None, "", ())
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        before = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        told = exported.report()["date"]
        after = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    time.tzset()
    assert told in (before, after)


@pytest.mark.parametrize(
    "sequence_lengths, expected",
    [("auto", Shapes()), ("fixed", Shapes((48,))), ([16, 48], Shapes((16, 48)))],
    ids=["auto", "fixed", "list"],
)
def test_sequence_lengths(
    sequence_lengths: Any, expected: Shapes, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    content = {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 48, "sequence_lengths": sequence_lengths}
    exported = run_export(tmp_path / "x", content)
    assert exported.manifest.shapes == expected
    engine = Engine.load(tmp_path / "x")
    seen = spy(engine)
    engine.answer([Request({"text": text}) for text in ("short", "a somewhat longer sentence than the others " * 3)])
    lengths = {length for _, length in seen}
    assert lengths <= set(expected.lengths) if expected.lengths else max(lengths) < 48


def spy(engine: Engine) -> Set[Tuple[int, ...]]:
    """Record the shapes that the engine's model runs with."""
    seen = set()
    runner = engine.runner

    def watched(inputs: Any) -> Any:
        seen.add(inputs["input_ids"].shape)
        return runner(inputs)

    engine.runner = Called(watched)  # type: ignore[assignment]  # is run once only
    return seen


def test_a_model_that_holds_lengths_fast_gets_a_graph_for_each(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """With one copy of the weights, in a file that plain torch.jit.load reads; and drift that is allowed is not taken, since
    narrower shapes pass."""
    source = checkpoint("longformer", num_hidden_layers=1, **LABELS)
    exported = run_export(tmp_path / "x", {"model_name": str(source), "max_length": 64}, allow_drift=True)
    shapes, receipt = exported.manifest.shapes, exported.manifest.receipt
    assert shapes.graph_per_shape and shapes.lengths == (16, 32, 64)
    assert receipt["passed"] and not receipt["drift_allowed"]
    engine = Engine.load(tmp_path / "x")
    seen = spy(engine)
    texts = ["one", "two words", "a longer sentence, " * 3, "the longest of them all, " * 5]
    alone = [engine.answer([Request({"text": text}, {"top_k": None})])[0] for text in texts]
    together = engine.answer([Request({"text": text}, {"top_k": None}) for text in texts])
    for one, other in zip(alone, together):
        assert isinstance(one, Answer) and isinstance(other, Answer)
        assert engine.task.same(one.value, other.value)
    assert all(shapes.length(length) == length and shapes.batch(batch) == batch for batch, length in seen)
    traced: Any = torch.jit.load(tmp_path / "x" / "traced_model.pt")  # type: ignore[no-untyped-call]
    weights = sum(p.numel() * 4 for p in {p.data_ptr(): p for p in traced.parameters()}.values())
    graphs = len(shapes.lengths or ()) * len(shapes.batches or (1,))
    assert graphs >= 3 and weights < 2 * exported.parameters * 4


def test_tied_weights_are_held_once(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """ALBERT's layers are one layer, run repeatedly."""
    source = checkpoint("albert", "AutoModelForSequenceClassification", num_hidden_layers=6, intermediate_size=2048)
    exported = run_export(tmp_path / "x", {"model_name": str(source), "max_length": 32})
    size = (tmp_path / "x" / "traced_model.pt").stat().st_size
    assert exported.parameters * 4 < size < exported.parameters * 4 + 400_000


def test_a_difference_that_is_no_number_is_over_the_limit() -> None:
    findings = Findings(LIMITS["float32"], answers=1)
    findings.cells += [Cell(1, 8, False, "logits", d) for d in (0.0, float("nan"), 0.0)]
    assert (
        not findings.passed and len(findings.failed) == 1 and findings.largest_difference != findings.largest_difference
    )


def spoiled(amount: float) -> Writer:
    """A writer whose traced model is wrong by `amount` at one logit."""

    def write(original: Any, task: Any, shapes: Any, folder: Path, target: Any) -> Written:
        bias = original.model.classifier.bias
        with torch.no_grad():
            before = bias[0].clone()
            bias[0] += amount
            written = writer.write(original, task, shapes, folder, target)
            bias[0] = before
        return written

    return WRITERS["torchscript"]._replace(write=write)


@pytest.mark.parametrize("amount, caught", [(0.0, False), (1e-3, True), (50.0, True), (float("nan"), True)])
def test_a_spoiled_model_is_caught(
    amount: float, caught: bool, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WRITERS, "torchscript", spoiled(amount))
    content = {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 32, "sequence_lengths": "fixed"}
    if not caught:
        run_export(tmp_path / "x", content)
        return
    with pytest.raises(DriftError) as error:
        run_export(tmp_path / "x", content)
    findings = error.value.findings
    assert not findings.passed and (findings.failed or findings.failure)
    assert len(findings.changed) > 10 if amount > 1 else True


def changed_for_the_writer(change: Callable[[Any], None]) -> Writer:
    """A writer that writes a model after `change`, which the original does not see."""

    def write(original: Any, *arguments: Any) -> Written:
        model = copy.deepcopy(original.model)
        with torch.no_grad():
            change(model)
        return writer.write(replace(original, model=model), *arguments)

    return WRITERS["torchscript"]._replace(write=write)


@pytest.fixture(scope="session")
def sceptic(checkpoint: Callable[..., Path]) -> Path:
    """A cross-encoder whose scores are all near 0."""
    folder = checkpoint("bert", num_labels=1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.weight *= 0.1
        model.classifier.bias -= 12
    model.save_pretrained(folder)
    return folder


RANKER = {"task": "text_ranking", "max_length": 32, "sequence_lengths": "fixed"}


def test_lost_token_types_of_pairs_are_caught(sceptic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores near 0 cannot show it."""

    def lose(model: Any) -> None:
        types = model.bert.embeddings.token_type_embeddings.weight
        types[1] = types[0]

    monkeypatch.setitem(WRITERS, "torchscript", changed_for_the_writer(lose))
    with pytest.raises(DriftError) as error:
        run_export(tmp_path / "x", {"model_name": str(sceptic), **RANKER})
    assert {cell.output for cell in error.value.findings.failed} == {"logits"}


def refused_as_indistinct(
    content: Dict[str, Any], folder: Path, forget: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> Findings:
    """Return the findings on a model that forgot something, in which nothing but its texts' likeness is wrong."""
    monkeypatch.setitem(WRITERS, "torchscript", changed_for_the_writer(forget))
    with pytest.raises(DriftError) as error:
        run_export(folder / "x", content)
    findings = error.value.findings
    assert not findings.failed and not findings.too_many_changed
    return findings


def test_an_output_that_tells_no_texts_apart_is_caught(
    sceptic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A constant is within a lower precision's difference of all scores."""
    content = {"model_name": str(sceptic), **RANKER, "dtype": "float16"}
    run_export(tmp_path / "right", content)
    for row in Manifest.read(tmp_path / "right").receipt["variants"]:
        assert 0 < row["unexplained_variance"]["logits"] < 0.2

    def forget(model: Any) -> None:
        model.classifier.weight[:] = 0

    findings = refused_as_indistinct(content, tmp_path, forget, monkeypatch)
    assert findings.indistinct == {"logits": pytest.approx(1, abs=0.01)}
    printing.print_findings(findings)
    assert "logits does not tell texts apart as the original does" in capsys.readouterr().err


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_one_values_loss_does_not_hide_behind_anothers_variance(
    problem_type: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"problem_type": problem_type, "num_labels": 3}
    folder = Path(shutil.copytree(checkpoint("bert", **options), tmp_path / "model"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.weight[0] *= 100
        model.classifier.weight[2] = 0  # the same for all texts
        model.classifier.bias[:] = torch.tensor([5000.0, 500, -7])
    model.save_pretrained(folder)
    content = {"model_name": str(folder), **CLASSIFIER, "max_length": 32, "sequence_lengths": "fixed"}
    content["dtype"] = "float16"
    run_export(tmp_path / "right", content)
    for row in Manifest.read(tmp_path / "right").receipt["variants"]:
        assert 0 < row["unexplained_variance"]["logits"] < 0.2

    def forget(model: Any) -> None:
        model.classifier.weight[1] = 0

    findings = refused_as_indistinct(content, tmp_path, forget, monkeypatch)
    assert findings.indistinct == {"logits": pytest.approx(1, abs=0.01)}


def test_an_embedding_that_tells_no_texts_apart_is_caught(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All vectors share a large constant part, so that it alone has nearly the cosine of each."""

    def last_norm(model: Any) -> Any:
        return model.encoder.layer[-1].output.LayerNorm

    folder = Path(shutil.copytree(checkpoint("bert", "AutoModel"), tmp_path / "model"))
    model = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        last_norm(model).weight *= 0.05
        last_norm(model).bias += 10
    model.save_pretrained(folder)
    content = {"model_name": str(folder), "task": "feature_extraction", "max_length": 32, "sequence_lengths": "fixed"}
    content.update(dtype="float16", parameters={"pooling": "mean"})
    run_export(tmp_path / "right", content)
    for row in Manifest.read(tmp_path / "right").receipt["variants"]:
        assert 0 < row["unexplained_variance"]["vector"] < 0.2

    def forget(model: Any) -> None:
        last_norm(model).weight[:] = 0

    findings = refused_as_indistinct(content, tmp_path, forget, monkeypatch)
    assert findings.indistinct == {"vector": pytest.approx(1, abs=0.01)}
    printing.print_findings(findings)
    assert "vector does not tell texts apart as the original does" in capsys.readouterr().err


def test_vectors_that_a_sample_asks_otherwise_are_not_compared_so(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """They have other sizes; and token vectors are not one vector of the text."""
    content = {"model_name": str(checkpoint("bert", "AutoModel")), "task": "feature_extraction", "max_length": 32}
    samples = tmp_path / "mine.jsonl"
    samples.write_text(json.dumps({"text": "mine", "parameters": {"dimensions": 2}}) + "\n")
    pooled = {**content, "dtype": "float16", "parameters": {"pooling": "mean"}}
    found = run_export(tmp_path / "pooled", pooled, samples_file=samples).findings
    assert list(found.unexplained) == ["vector"] and found.unexplained["vector"] < 0.2
    assert not run_export(tmp_path / "tokens", {**content, "dtype": "float16"}).findings.unexplained


def test_the_variance_that_is_lost() -> None:
    expected = [np.array([value, 1.0], np.float32) for value in (-12.1, -12.0, -11.9)]
    shifted = [each + 0.3 for each in expected]
    assert unexplained_variance(list(zip(shifted, expected))) == pytest.approx(0, abs=1e-6)
    assert unexplained_variance([(expected[1], each) for each in expected]) == pytest.approx(1)
    assert unexplained_variance([(shifted[0], expected[0])] * 3) == 0  # nothing varies
    wide = [np.array([1000 * value, value, 1.0]) for value in (-1.0, 0.0, 1.0)]
    narrowed = [np.array([each[0], 0, each[2]]) for each in wide]
    assert unexplained_variance(list(zip(narrowed, wide))) < 1e-5
    assert unexplained_variance(list(zip(narrowed, wide)), by_column=True) == pytest.approx(1)
    assert unexplained_variance(list(zip(wide, wide)), by_column=True) == 0  # also where a column is constant
    assert unexplained_variance([(each[:1], each) for each in expected]) == math.inf
    for name, share, alike in (("logits", 0.4, True), ("vector", 0.03, False), ("vector", 0.015, True)):
        assert Findings(LIMITS["bfloat16"], answers=1, unexplained={name: share}).passed is alike
    wrong = [(np.array([math.nan, 1.0]), each) for each in expected]
    found = Findings(LIMITS["int8"], answers=1, unexplained={"logits": unexplained_variance(wrong)})
    assert list(found.indistinct) == ["logits"] and not found.passed
    assert not replace(found, limit=LIMITS["float32"]).indistinct  # its other limits see more


def test_a_record_has_only_finite_numbers() -> None:
    findings = Findings(LIMITS["int8"], answers=1, cells=[Cell(1, 8, False, "logits", math.inf)])
    findings.unexplained["logits"] = math.nan
    findings.along = TokenCounts(texts=1, tokens=1, drift=math.inf)
    receipts = [findings.receipt(), Candidate("int8", findings).receipt()]
    json.dumps(receipts, allow_nan=False)
    assert [each["largest_difference"] for each in receipts] == [None, None]


def test_what_padding_changes_is_that_of_the_artifacts_own_model(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of another one that was tried before, nor of shapes in which nothing could run."""
    original = load_original(checkpoint, tmp_path)
    models = [original, replace(original, kept=("a layer",))]
    limit = LIMITS["float32"]

    def proven(own: Attempt, lowered: Original, shapes: Shapes, folder: Path) -> Tuple[Any, Findings]:
        if not shapes.padded:
            return None, Findings(limit, failure=None if lowered.kept else "it cannot run")
        if not lowered.kept:
            return None, Findings(limit, cells=[Cell(1, 8, True, "logits", 0.1)])
        if shapes.lengths is None:
            return None, Findings(limit, failure="it cannot run")
        return None, Findings(limit, cells=[Cell(1, 8, True, "logits", 0.5)])

    def finished(own: Attempt, manifest: Any, findings: Findings, *others: Any) -> AcceptedArtifact:
        return AcceptedArtifact(tmp_path, manifest, findings)

    monkeypatch.setattr(attempt, "_lowered", lambda *arguments: models)
    monkeypatch.setattr(Attempt, "_proven", proven)
    monkeypatch.setattr(Attempt, "_finish", finished)
    config, _ = parse_config({"model_name": "x/y", **CLASSIFIER})
    made = Attempt(config, cast(Any, None), Reference(original), "x", (), nothing).make("float32", tmp_path)
    assert made.findings.compared[attempt.PADDING_CHANGES] == 0.5


@pytest.mark.parametrize("difference", [2e-4, math.inf, math.nan, None], ids=str)
def test_prompts_are_read_in_parts_only_where_every_variant_may(difference: Optional[float]) -> None:
    """None: it was not compared. The artifact passes all the same."""
    cell = Cell(2, 32, False, "logits", 1e-6)
    good = Findings(LIMITS["float32"], in_parts=[cell])
    assert replace(good, others=[good]).prompts_in_parts
    wrong = replace(good, in_parts=[] if difference is None else [cell, replace(cell, difference=difference)])
    for found in (wrong, replace(wrong, others=[good]), replace(good, others=[good, wrong])):
        assert not found.prompts_in_parts and found.passed


def test_rows_of_pairs(artifact: Path, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Every other one, where there is room for one; of exact length."""
    manifest = Manifest.read(artifact)
    original = load_original(checkpoint, tmp_path)
    rows = GridRows(artifact, manifest.tokenizer, original, pairs=True)
    for length in (3, 6, 32):
        made = [rows.get(length, i) for i in range(5)]
        assert [row.length for row in made] == [length] * 5
        types = [set(row.encoding.type_ids) for row in made]
        assert types == ([{0}] * 5 if length == 3 else [{0, 1}, {0}, {0, 1}, {0}, {0, 1}])


def test_allowed_drift_is_recorded(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WRITERS, "torchscript", spoiled(50.0))
    content = {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 32}
    run_export(tmp_path / "x", content, allow_drift=True)
    receipt = Manifest.read(tmp_path / "x").receipt
    assert receipt["drift_allowed"] and not receipt["passed"] and receipt["answers_changed"] > 10
    assert Engine.load(tmp_path / "x").answer([Request({"text": "hello"})])


def test_what_cannot_be_run_is_not_exported_even_so(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WRITERS, "torchscript", spoiled(float("nan")))
    content = {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 32}
    with pytest.raises(DriftError) as error:
        run_export(tmp_path / "x", content, allow_drift=True)
    assert error.value.findings.failure


def test_another_tokenizer_is_caught(artifact: Path, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The engine's own tokens are compared with transformers'."""
    shutil.copytree(artifact, tmp_path / "x")
    tokenizer = tmp_path / "x" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"lowercase":true', '"lowercase":false'))
    manifest = Manifest.read(artifact)
    replace(manifest, files={**manifest.files, "tokenizer.json": sha256(tokenizer)}).write(tmp_path / "x")
    findings = verification.verify(tmp_path / "x", Reference(load_original(checkpoint, tmp_path)), [], nothing)
    assert findings.tokenized_otherwise and not findings.passed


@pytest.mark.parametrize(("architecture", "task"), [("bert", "fill_mask"), ("llama", "text_generation")])
def test_another_clean_up_is_caught(
    architecture: str, task: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are decoded by our own tokenizer, the original's too."""
    content = {"model_name": str(checkpoint(architecture, TASKS[task].auto_model)), "task": task, "max_length": 48}
    monkeypatch.setattr("traceserve.building.checkpoints.original._cleans_up", lambda tokenizer: True)
    monkeypatch.setattr(verification, "TEXTS", ["The train , it ' s said , doesn ' t leave ."])
    with pytest.raises(DriftError) as error:
        run_export(tmp_path / "x", content)
    assert error.value.findings.changed


def test_what_the_task_asks_is_compared_and_the_users_own(
    artifact: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    original = Reference(load_original(checkpoint, tmp_path))
    task = Engine.load(artifact).task
    # Some pairs that share 32 tokens are refused.
    asked = sum(isinstance(item, Encoded) for item in task.encode(task.from_texts(TEXTS)))
    assert asked > len(TEXTS)
    plain = verification.verify(artifact, original, [], nothing)
    assert plain.passed and plain.answers == asked
    mine = [{"text": "mine"}, {"text": "mine", "text_pair": ""}, {"text": "", "text_pair": "mine"}]
    more = verification.verify(artifact, original, [Request(inputs, {"top_k": None}) for inputs in mine], nothing)
    assert more.passed and more.answers == asked + 3
    own = [Request({"text": VERY_LONG}, {"top_k": None, "long_inputs": how}) for how in ("reject", "truncate")]
    refused = verification.verify(artifact, original, own, nothing)
    assert refused.passed and refused.answers == asked + 1


def load_original(checkpoint: Callable[..., Path], folder: Path) -> Original:
    """Return the source of the fixture `artifact`."""
    config, _ = parse_config({"model_name": str(checkpoint("bert", **LABELS)), **CLASSIFIER, "max_length": 32})
    with loading.quiet_transformers():
        return loading.load_original(config, sources.fetch_checkpoint(config, folder), folder)


def test_the_users_samples_are_compared_too(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("one of mine\nanother\n")
    content = {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 32}
    plain = run_export(tmp_path / "a", content)
    more = run_export(tmp_path / "b", content, samples_file=tmp_path / "mine.txt")
    assert more.findings.answers == plain.findings.answers + 2


REJECTS = {"max_length": 16, "long_inputs": "reject"}


@pytest.mark.parametrize(
    ("architecture", "task", "options"),
    [
        ("bert", "sequence_classification", {"max_length": 4}),
        ("bert", "fill_mask", {"max_length": 4}),
        ("llama", "text_generation", {"max_length": 8}),
        ("t5", "text2text_generation", {"max_length": 4}),
    ],
)
def test_a_short_max_length_can_be_served(
    architecture: str, task: str, options: Dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint(architecture, TASKS[task].auto_model)
    content = {"model_name": str(source), "task": task, "long_inputs": "reject", **options}
    assert run_export(tmp_path / "tiny", content).findings.answers > 0
    engine = Engine.load(tmp_path / "tiny")
    engine.warm_up()
    body = engine.task.canary_body(engine.manifest)
    [answer] = engine.answer(parse_value(body, type(engine.task), 0, engine.manifest.max_rows).requests)
    assert isinstance(answer, Answer), answer


def test_a_max_length_too_short_for_the_sample_is_told(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("bert", "AutoModelForQuestionAnswering")
    content = {"model_name": str(source), "task": "question_answering", "max_length": 8, "long_inputs": "reject"}
    with pytest.raises(UnaskableError, match="max_length 8 is too short for question_answering: the built-in sample"):
        run_export(tmp_path / "tiny", content)


def test_own_samples_that_are_refused_are_counted(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("short\n" + 2 * ("a long text " * 30 + "\n"))
    content = {"model_name": str(checkpoint("bert", **LABELS)), **REJECTS}
    made = run_export(tmp_path / "a", content, samples_file=tmp_path / "mine.txt")
    refused = made.manifest.receipt["own_refused"]
    assert refused["samples"] == 2 and "this model reads 16" in refused["because"]
    assert made.findings.own_answers == 1 and made.report()["candidates"][0]["own_refused"] == 2  # type: ignore[index]
    build._print_samples(made.findings)
    assert "2 of your 3 samples were not compared: the text has " in capsys.readouterr().err


def test_own_samples_that_are_all_refused_end_the_build(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(2 * ("a long text " * 30 + "\n"))
    content = {"model_name": str(checkpoint("bert", **LABELS)), **REJECTS}
    with pytest.raises(UnaskableError, match="none of your samples can be compared: .* this model reads 16"):
        run_export(tmp_path / "a", content, samples_file=tmp_path / "mine.txt")


def test_nothing_compared_is_no_pass(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "TEXTS", (VERY_LONG,))
    content = {"model_name": str(checkpoint("bert", **LABELS)), **REJECTS}
    with pytest.raises(UnaskableError, match="no built-in text fits into max_length"):
        run_export(tmp_path / "a", content)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_original_that_gives_no_numbers_is_told(
    value: float, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint("bert", **LABELS), tmp_path / "model"))
    weights = load_file(source / "model.safetensors")
    weights["classifier.bias"][0] = value
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnaskableError, match="the original model itself gives NaN"):
        run_export(tmp_path / "a", {"model_name": str(source), "max_length": 32})


def test_an_untraceable_model_is_told(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: Any) -> Tuple[str, ...]:
        raise ExportError("torch.jit.trace cannot trace this")

    monkeypatch.setitem(WRITERS, "torchscript", WRITERS["torchscript"]._replace(write=write))
    with pytest.raises(ExportError, match="cannot trace this"):
        run_export(tmp_path / "x", {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 32})


def test_candidate_shapes_go_from_wide_to_narrow() -> None:
    config, _ = parse_config({"model_name": "x/y", **CLASSIFIER})
    shapes = list(candidate_shapes(config, 100))
    assert shapes[0] == Shapes() and shapes[1].lengths == (16, 32, 64, 100) and shapes[-1].batches is not None
