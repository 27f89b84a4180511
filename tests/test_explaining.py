"""Explanations: attributions equal captum's on the original; targets, occlusion, budgets, and archives without gradients."""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import numpy as np
import pytest
import torch
import transformers
from conftest import needs_native, run_export
from traceserve import cli
from traceserve.archives import staging
from traceserve.archives.archive import pack_archive
from traceserve.building import explaining
from traceserve.building.gate import gradients as gate
from traceserve.building.writers import WRITERS
from traceserve.commands.explain import _print
from traceserve.errors import ConfigError, ExportError
from traceserve_runtime import settings
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import NO_GRADIENTS, Engine, Work
from traceserve_runtime.errors import InvalidManifest, OutOfTime, TraceserveError
from traceserve_runtime.explaining import integrated_gradients
from traceserve_runtime.explaining.integrated_gradients import completeness_error, rule
from traceserve_runtime.explaining.occlusion import grouped
from traceserve_runtime.explaining.pacing import Pacing
from traceserve_runtime.explaining.words import Word, words_of
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.runtimes.torchscript.gradients import GRADIENTS_FILE, POSITIONS_FILE, read_gradients
from traceserve_runtime.service import Call, Service
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Request
from traceserve_runtime.texts.rows import Encoded, Row, Segments

LABELS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
TEXT = "The old harbour was quiet, and the boats lay still in the water."
CONTEXT = "The train to the coast leaves at a quarter past nine from platform four."


class Kind(NamedTuple):
    """A family's model for a task, and a request."""

    task: str
    architecture: str
    inputs: Dict[str, Any]
    options: Dict[str, Any] = LABELS


KINDS = {
    "classification": Kind("sequence_classification", "bert", {"text": TEXT}),
    "pair": Kind("sequence_classification", "deberta-v2", {"text": TEXT, "text_pair": "The boats lay still."}),
    "decoder": Kind("sequence_classification", "gpt2", {"text": TEXT}),
    "tokens": Kind("token_classification", "distilbert", {"text": TEXT}),
    "answers": Kind("question_answering", "roberta", {"question": "When does it leave?", "context": CONTEXT}, {}),
    "ranking": Kind("text_ranking", "electra", {"query": "a train", "documents": [TEXT, CONTEXT]}, {"num_labels": 1}),
}


class Made(NamedTuple):
    """An artifact and its checkpoint."""

    folder: Path
    checkpoint: Path
    kind: Kind


@pytest.fixture(scope="session")
def make(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Export one of KINDS; each once."""
    made: Dict[str, Made] = {}

    def export(name: str, **config: Any) -> Made:
        key = f"{name} {config}"
        if key not in made:
            kind = KINDS[name]
            original = checkpoint(kind.architecture, TASKS[kind.task].auto_model, **kind.options)
            folder = tmp_path_factory.mktemp("explained") / "model"
            run_export(
                folder, {"model_name": str(original), "task": kind.task, "max_length": 64, **config}, gradients=True
            )
            made[key] = Made(folder, original, kind)
        return made[key]

    return export


def explain(engine: Engine, body: Any, status: int = 200, **headers: Any) -> Any:
    """Ask as a host does."""
    content = json.dumps(body).encode()
    [reply] = Service(engine, "small").answer(
        [Call({"body": content}, Headers("application/json", explain=True, **headers))]
    )
    assert reply.status == status, reply.body
    return json.loads(reply.body)


def encoded(engine: Engine, request: Request) -> Encoded:
    [found] = engine.encode([request], engine.task.parts([request]))
    assert isinstance(found, Encoded)
    return found


def by_captum(made: Made, engine: Engine, request: Request, steps: int) -> Dict[Any, float]:
    """Return each word's attribution by captum's own layer integrated gradients on the original model."""
    captum = pytest.importorskip("captum.attr")
    model = getattr(transformers, TASKS[made.kind.task].auto_model).from_pretrained(made.checkpoint).eval()
    rows = encoded(engine, request).rows
    jobs = engine.task.predict(engine.runner, [_job(row, request) for row in rows], Stats())
    [aim] = engine.task.target(request, rows, jobs).aims
    row = rows[aim.row]
    ids = torch.tensor([row.encoding.ids])
    special = torch.tensor([row.encoding.special_tokens_mask]).bool()
    baselines = torch.where(special, ids, torch.full_like(ids, engine.manifest.tokenizer.pad_id))
    given = {"attention_mask": [row.encoding.attention_mask], "token_type_ids": [row.encoding.type_ids]}
    names = [name for name in engine.manifest.inputs if name != "input_ids"]

    def forward(ids: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        # A decoder's classifier finds the last token by its id: with one row at a time it has no padding to look for.
        outputs = model(input_ids=ids, **dict(zip(names, others)))
        return torch.stack([outputs[cell.output][cell.everywhere] for cell in aim.cells]).sum(0)

    layer = captum.LayerIntegratedGradients(forward, model.get_input_embeddings())
    others = tuple(torch.tensor(given[name]) for name in names)
    found = layer.attribute(ids, baselines, additional_forward_args=others, n_steps=steps, internal_batch_size=1)
    amounts = found.sum(-1)[0].detach().numpy()
    words = words_of(row, engine.task.segments(request)[row.part])
    return {(word.field, word.start, word.end): float(amounts[list(word.positions)].sum()) for word in words}


def _job(row: Row, request: Request) -> Any:
    from traceserve_runtime.tasks.contract import Job

    return Job(row, request)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_attributions_equal_captums_on_the_original(name: str, make: Callable[..., Made]) -> None:
    made = make(name)
    engine = Engine.load(made.folder)
    assert engine.manifest.runtime[NO_GRADIENTS] == ""
    found = explain(engine, {**made.kind.inputs, "parameters": {"steps": 50}})
    assert found["method"] == "integrated_gradients" and found["steps"] == 50
    expected = by_captum(made, engine, Request(made.kind.inputs), 50)
    own = {(word["field"], word["start"], word["end"]): word["attribution"] for word in found["words"]}
    assert own.keys() == expected.keys() and len(own) > 8
    largest = max(map(abs, expected.values()))
    assert largest > 1e-3
    for word, amount in own.items():
        assert amount == pytest.approx(expected[word], abs=1e-3 * largest), word


@pytest.mark.parametrize("name", sorted(KINDS))
def test_words_are_the_texts_own_and_add_up(name: str, make: Callable[..., Made]) -> None:
    made = make(name)
    found = explain(Engine.load(made.folder), {**made.kind.inputs, "parameters": {"steps": 200}})
    for word in found["words"]:
        field, _, number = word["field"].partition("[")
        text = made.kind.inputs[field][int(number[:-1])] if number else made.kind.inputs[field]
        assert text[word["start"] : word["end"]] == word["word"] and word["word"].strip()
    total = sum(word["attribution"] for word in found["words"])
    difference = found["value"] - found["baseline_value"]
    size = sum(abs(word["attribution"]) for word in found["words"])
    assert found["completeness_error"] < 0.01 and abs(total - difference) < 0.02 * size


def test_the_target_is_the_answers_own_or_chosen(make: Callable[..., Made]) -> None:
    engine = Engine.load(make("classification").folder)
    own = explain(engine, TEXT)
    [answer] = engine.answer([Request({"text": TEXT}, {"top_k": None})])
    ranked = answer.value  # type: ignore[union-attr]
    assert own["answer"]["label"] == own["target"]["label"] == ranked[0]["label"]  # type: ignore[index,call-overload]
    other = ranked[1]["label"]  # type: ignore[index,call-overload]
    chosen = explain(engine, {"text": TEXT, "parameters": {"label": other}})
    assert chosen["target"] == {"label": other} and chosen["answer"] == own["answer"]
    assert chosen["value"] < own["value"] and chosen["words"] != own["words"]
    refused = explain(engine, {"text": TEXT, "parameters": {"label": "grey"}}, 400)["error"]
    assert refused["field"] == "parameters.label" and "red, green, blue" in refused["message"]


def test_targets_of_tokens_answers_and_documents(make: Callable[..., Made]) -> None:
    tokens = Engine.load(make("tokens").folder)
    at = TEXT.index("boats")
    found = explain(tokens, {"text": TEXT, "parameters": {"start": at, "end": at + 5, "label": "blue"}})
    assert found["target"] == {"label": "blue", "word": "boats", "start": at, "end": at + 5}
    assert explain(tokens, {"text": TEXT, "parameters": {"start": 500}}, 400)["error"]["field"] == "parameters.start"

    answers = Engine.load(make("answers").folder)
    body = {"question": "When?", "context": CONTEXT}
    own = explain(answers, body)
    assert own["target"]["answer"] == own["answer"]["answer"] and own["quantity"] == "start logit + end logit"
    start = CONTEXT.index("nine")
    chosen = explain(answers, {**body, "parameters": {"start": start, "end": start + 4}})
    assert chosen["target"]["answer"] == "nine" and chosen["value"] <= own["value"]

    ranking = Engine.load(make("ranking").folder)
    body = {"query": "a train", "documents": [TEXT, CONTEXT]}
    best = max(explain(ranking, body)["answer"], key=lambda each: each["score"])["index"]
    assert explain(ranking, body)["target"] == {"document": best}
    other = explain(ranking, {**body, "parameters": {"document": 1 - best}})
    assert {word["field"] for word in other["words"]} == {"query", f"documents[{1 - best}]"}
    assert explain(ranking, {**body, "parameters": {"document": 2}}, 400)["error"]["field"] == "parameters.document"


def test_windows_add_up_to_the_averaged_answer(make: Callable[..., Made]) -> None:
    engine = Engine.load(make("classification").folder)
    long = " ".join([TEXT] * 9)
    found = explain(engine, {"text": long, "parameters": {"steps": 100}})
    count = found["windows"]["of"]
    assert count > 1 and found["windows"]["explained"] == list(range(count))
    assert found["words"][-1]["end"] == len(long) and found["completeness_error"] < 0.01
    rows = encoded(engine, Request({"text": long})).rows
    outputs = engine.task.predict(engine.runner, [_job(row, Request({"text": long})) for row in rows], Stats())
    number = engine.manifest.labels.index(found["target"]["label"])
    wanted = np.average([output["logits"][number] for output in outputs], weights=[row.tokens for row in rows])
    assert found["value"] == pytest.approx(float(wanted), abs=1e-3)


@pytest.mark.parametrize("name", ["classification", "answers"])
def test_without_gradients_words_are_hidden(name: str, make: Callable[..., Made]) -> None:
    made = make(name, save_mode="onnx")
    engine = Engine.load(made.folder)
    found = explain(engine, made.kind.inputs)
    assert found["method"] == "occlusion" and found["because"] == "save mode onnx has none"
    assert set(found) - {"because"} == set(explain(Engine.load(make(name).folder), made.kind.inputs))
    assert len(found["words"]) > 8 and any(word["attribution"] for word in found["words"])
    refused = explain(engine, {**made.kind.inputs, "parameters": {"method": "integrated_gradients"}}, 400)["error"]
    assert refused["field"] == "parameters.method" and "onnx" in refused["message"]
    few = explain(engine, {**made.kind.inputs, "parameters": {"steps": 4}})
    assert 2 <= len(few["words"]) <= 5 and few["words"][-1]["end"] == found["words"][-1]["end"]
    asked = explain(Engine.load(make(name).folder), {**made.kind.inputs, "parameters": {"method": "occlusion"}})
    for one, other in zip(asked["words"], found["words"]):  # both hide the same words of the same model
        assert one["attribution"] == pytest.approx(other["attribution"], abs=1e-3)


@pytest.mark.parametrize(
    "name, dtype",
    [
        *((name, "float32") for name in ("classification", "decoder", "answers")),
        pytest.param("classification", "bfloat16", marks=needs_native("bfloat16")),
    ],
)
def test_a_pretrained_model_has_gradients_of_its_own(name: str, dtype: str, make: Callable[..., Made]) -> None:
    made, other_mode = make(name, save_mode="pretrained", dtype=dtype), make(name, dtype=dtype)
    assert Manifest.read(made.folder).runtime[NO_GRADIENTS] == ""
    engine, traced = Engine.load(made.folder), Engine.load(other_mode.folder)
    model: Any = engine.runner
    hooks = [list(part._forward_hooks) for part in model.calls.model.modules()]
    found, expected = explain(engine, made.kind.inputs), explain(traced, made.kind.inputs)
    assert found["method"] == "integrated_gradients" and len(found["words"]) > 8
    for one, other in zip(found["words"], expected["words"]):
        assert one["attribution"] == pytest.approx(other["attribution"], abs=1e-4)
    assert not any(parameter.grad is not None for parameter in model.calls.model.parameters())
    assert [list(part._forward_hooks) for part in model.calls.model.modules()] == hooks
    before = engine.answer([Request(made.kind.inputs)])
    explain(engine, made.kind.inputs)
    assert engine.answer([Request(made.kind.inputs)]) == before


@pytest.mark.parametrize("save_mode", ["torchscript", "pretrained"])
def test_a_model_that_looks_embeddings_up_twice_is_explained_by_occlusion(
    save_mode: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    own = {"model_name": str(checkpoint("bart", **LABELS)), "captum_explanation": True, "max_length": 32}
    exported = run_export(tmp_path / "bart", {**own, "save_mode": save_mode}, gradients=True)
    why = exported.manifest.runtime[NO_GRADIENTS]
    assert "looks its word embeddings up 2 times" in why and exported.note is not None and why in exported.note
    assert not (tmp_path / "bart" / GRADIENTS_FILE).exists()
    assert explain(Engine.load(tmp_path / "bart"), TEXT)["because"] == why


def tensors_of(file: Path) -> int:
    """The bytes of a module's tensors."""
    with zipfile.ZipFile(file) as archive:
        folders = ("data", "constants")
        return sum(each.file_size for each in archive.infolist() if Path(each.filename).parts[1] in folders)


def test_the_graphs_have_no_weights_of_their_own(make: Callable[..., Made]) -> None:
    folder = make("classification").folder
    # By the tensors, and not by the file: names in a graph grow with what the process traced before.
    model, small = (tensors_of(folder / file) for file in ("traced_model.pt", GRADIENTS_FILE))
    positions = json.loads((folder / POSITIONS_FILE).read_text())
    assert small < 1_000 < 100_000 < model and any("word_embeddings" in name for name in positions)
    engine = Engine.load(folder)
    assert engine._explainer is None  # loaded when it is first asked for
    explain(engine, TEXT)
    assert engine._explainer is not None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda positions: {}, "gradients.json does not tell where"),
        (
            lambda positions: {name: [1 << 40, *rest] for name, (_, *rest) in positions.items()},
            "gradients.json does not fit",
        ),
    ],
)
def test_a_damaged_table_of_the_graphs_is_named(
    damage: Callable[[Any], Any], words: str, make: Callable[..., Made], tmp_path: Path
) -> None:
    folder = shutil.copytree(make("classification").folder, tmp_path / "copied")
    file = folder / POSITIONS_FILE
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(InvalidManifest, match=words):
        read_gradients(
            Manifest.read(folder, verify=False), folder, "cpu", Engine.load(make("classification").folder).runner
        )


def test_an_archive_built_without_says_so(make: Callable[..., Made]) -> None:
    made = make("classification", captum_explanation=False)
    assert GRADIENTS_FILE not in Manifest.read(made.folder).files
    assert explain(Engine.load(made.folder), TEXT)["because"] == "it was built with captum_explanation false"


def test_graphs_that_give_other_outputs_are_refused(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: here the graphs are those of another checkpoint."""
    other = tmp_path / "other"
    exported = run_export(
        other, {"model_name": str(checkpoint("bert", hidden_act="relu", **LABELS)), "max_length": 32}, gradients=True
    )
    assert exported.manifest.runtime[NO_GRADIENTS] == ""
    write = WRITERS["torchscript"].gradients

    def writing(original: Any, manifest: Manifest, folder: Path) -> Sequence[str]:
        files = write(original, manifest, folder)
        (folder / GRADIENTS_FILE).write_bytes((other / GRADIENTS_FILE).read_bytes())
        return files

    monkeypatch.setitem(WRITERS, "torchscript", WRITERS["torchscript"]._replace(gradients=writing))  # type: ignore[arg-type]
    exported = run_export(
        tmp_path / "x", {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 32}, gradients=True
    )
    assert "gives other outputs: logits" in exported.manifest.runtime[NO_GRADIENTS]
    assert not (tmp_path / "x" / GRADIENTS_FILE).exists() and not (tmp_path / "x" / POSITIONS_FILE).exists()
    assert gate.differs(other) is None


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_the_shortest_and_the_longest_text_are_compared(
    count: int, make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: List[int] = []

    def repeated(inputs: Any, times: int) -> Any:
        compared.append(inputs["input_ids"].shape[1])
        return integrated_gradients.repeated(inputs, times)

    folder, texts = make("classification").folder, ["red " * (1 + number) for number in range(count)]
    monkeypatch.setattr(gate, "repeated", repeated)
    monkeypatch.setattr(gate, "TEXTS", texts)
    assert gate.differs(folder) is None
    task: Any = Engine.load(folder).task
    lengths = [row.length for each in task.encode(task.from_texts(texts)) for row in each.rows]
    assert compared == sorted(set(compared)) and len(compared) == min(len(set(lengths)), 5)
    assert (compared[0], compared[-1]) == (min(lengths), max(lengths))


def test_graphs_that_no_text_could_compare_are_refused(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("classification").folder
    monkeypatch.setattr(gate, "_LONGEST", 1)
    assert "could be compared" in str(gate.differs(folder))


def test_an_answer_that_the_graphs_do_not_give_is_not_explained_by_them(make: Callable[..., Made]) -> None:
    engine = Engine.load(make("classification").folder)
    explainer = engine.explainer()
    model: Any = explainer.gradients
    embed = model.embed
    model.embed = lambda ids: -embed(ids)
    found = explain(engine, TEXT)
    assert found["method"] == "occlusion" and "does not give the served answer" in found["because"]


def test_without_readable_gradients_words_are_hidden(make: Callable[..., Made], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(make("classification").folder, folder)
    engine = Engine.load(folder)
    (folder / GRADIENTS_FILE).write_bytes(b"not a graph")
    body = json.dumps({"text": TEXT}).encode()
    explained, predicted = Service(engine, "small").answer(
        [Call({"body": body}, Headers("application/json", explain=explain)) for explain in (True, False)]
    )
    found = json.loads(explained.body)
    assert found["method"] == "occlusion" and f"{GRADIENTS_FILE} cannot be loaded" in found["because"]
    assert predicted.status == 200


def test_gradients_that_could_not_be_loaded_are_tried_again(
    make: Callable[..., Made], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the server's failure, not the request's, and may pass: a file is restored, or memory is free again."""
    folder = tmp_path / "copy"
    shutil.copytree(make("classification").folder, folder)
    engine = Engine.load(folder)
    (folder / GRADIENTS_FILE).rename(folder / "away")
    by_gradients = {"text": TEXT, "parameters": {"method": "integrated_gradients"}}
    error = explain(engine, by_gradients, 500)["error"]
    assert error["type"] == "ModelFailure" and "the gradients cannot be loaded" in error["message"]
    assert "traceserve: " in caplog.text and "read_gradients" in caplog.text and TEXT not in caplog.text
    assert explain(engine, {"text": TEXT})["method"] == "occlusion"
    (folder / "away").rename(folder / GRADIENTS_FILE)
    for body in ({"text": TEXT}, by_gradients):
        found = explain(engine, body)
        assert found["method"] == "integrated_gradients" and "because" not in found


def test_embedding_name_is_checked_against_the_model(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    config = {"model_name": str(checkpoint("bert", **LABELS)), "task": "sequence_classification", "max_length": 32}
    with pytest.raises(
        ExportError, match=r"embedding_name is classifier, but .* are bert.embeddings.word_embeddings; "
    ):
        run_export(tmp_path / "x", {**config, "embedding_name": "classifier", "captum_explanation": True})
    exported = run_export(tmp_path / "x", {**config, "embedding_name": "bert", "captum_explanation": "true"})
    assert exported.manifest.runtime[NO_GRADIENTS] == "" and exported.note is None
    unread = run_export(tmp_path / "z", {**config, "embedding_name": "roberta", "captum_explanation": False})
    assert "captum_explanation false" in unread.manifest.runtime[NO_GRADIENTS]  # it means nothing there
    with pytest.raises(ConfigError, match="captum_explanation"):
        run_export(tmp_path / "y", {**config, "captum_explanation": 3})


def test_other_tasks_are_not_explained(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = checkpoint("bert", "AutoModelForMaskedLM")
    exported = run_export(tmp_path / "x", {"model_name": str(model), "max_length": 32, "captum_explanation": True})
    assert NO_GRADIENTS not in exported.manifest.runtime and "fill_mask are not explained" in str(exported.note)
    refused = explain(Engine.load(tmp_path / "x"), "a [MASK]", 501)["error"]
    assert refused["type"] == "NotOffered" and "fill_mask" in refused["message"]
    assert explaining.note_on_gradients is not None


def test_lists_and_kserves_forms(make: Callable[..., Made]) -> None:
    engine = Engine.load(make("classification").folder)
    one = explain(engine, TEXT)
    two = explain(engine, [TEXT, CONTEXT])
    assert [each["target"] for each in two][0] == one["target"] and len(two) == 2
    assert two[0]["words"][3]["attribution"] == pytest.approx(one["words"][3]["attribution"], abs=1e-4)
    v1 = explain(engine, {"instances": [TEXT, {"text": CONTEXT}]})
    assert v1["predictions"] == [each["answer"] for each in v1["explanations"]] and len(v1["explanations"]) == 2
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [TEXT]}
    v2 = explain(engine, {"inputs": [tensor]})
    assert json.loads(v2["outputs"][0]["data"][0])["target"] == one["target"]
    assert explain(engine, TEXT, 404, path="v1/embeddings")["error"]["type"] == "NotFound"
    unknown = explain(engine, {"text": TEXT, "parameters": {"step": 3}}, 400)["error"]
    assert 'did you mean "steps"' in unknown["message"]
    predicted = Service(engine, "small").answer(
        [Call({"body": json.dumps({"text": TEXT, "parameters": {"steps": 3}}).encode()}, Headers("application/json"))]
    )
    assert predicted[0].status == 400  # they are no parameters of predictions


def test_the_examples_target_is_the_label_of_that_number(make: Callable[..., Made]) -> None:
    engine = Engine.load(make("classification").folder)
    for number, label in enumerate(("red", "green", "blue")):
        assert explain(engine, {"text": TEXT, "target": number})["target"] == {"label": label}
    assert explain(engine, {"text": TEXT, "target": 0, "parameters": {"label": "blue"}})["target"] == {"label": "blue"}
    assert explain(engine, {"text": TEXT, "target": 3}, 400)["error"]["field"] == "target"
    tokens = Engine.load(make("tokens").folder)
    assert explain(tokens, {"text": TEXT, "target": 1})["target"] == explain(tokens, TEXT)["target"]


@pytest.mark.usefixtures("two_cores")
def test_explanations_get_all_cores_back_that_others_held_when_they_began(make: Callable[..., Made]) -> None:
    engine = Engine.load(make("classification").folder)
    runner: Any = engine.runner
    runner.share_cores()
    runner._team._take(1)  # as beside another process
    model: Any = engine.explainer().gradients
    assert model._team is not None and model._team.most == 2


def test_predictions_go_first(make: Callable[..., Made]) -> None:
    """In a session others join between two runs, and the explanation waits."""
    engine = Engine.load(make("classification").folder)
    model: Any = engine.explainer().gradients
    own, runs = model.gradients, []
    model.gradients = lambda *given: runs.append(len(given[0])) or own(*given)  # type: ignore[func-returns-value]
    service = Service(engine, "small")
    session = service.session(Stats())
    body = json.dumps({"text": TEXT}).encode()
    ask = Call({"body": body}, Headers("application/json"))
    [explanation] = session.join([Call({"body": body}, Headers("application/json", explain=True))], [None])
    session.turn()
    for _ in range(20):
        [prediction] = session.join([ask], [None])
        done = session.turn()
        assert list(done) == [prediction] and prediction.reply is not None
        session.turn()  # nobody else waits
    assert len(runs) <= 2 and set(runs) <= {1} and session.rest > 0
    before = time.perf_counter()
    while explanation.reply is None:
        session.turn()
        time.sleep(min(session.rest, 0.05))
    assert time.perf_counter() - before > 0.1  # a fifth of a second after the last prediction, it takes all the time
    assert explanation.reply.status == 200 and sum(runs) == 24 and max(runs) > 4


def test_runs_beside_predictions_are_short_and_rare() -> None:
    pacing = Pacing()
    now = time.perf_counter()
    assert 8 < pacing.rows(16, 50) <= 50 and pacing.rows(16, 3) == 3 and pacing.wait(now) == 0
    pacing.ran(now, now + 0.01)
    pacing.predicted(now + 0.01)
    assert pacing.rows(16, 24) == 1 and pacing.rows(16, 24, polite=False) == 24
    assert 0.15 < pacing.wait(now + 0.02) <= 0.2  # until it is quiet, at the latest
    pacing.predicted(now + 1.2)
    assert 0.03 < pacing.wait(now + 1.2) < 0.07  # 0.01 s are less than a hundredth of 1.26 s
    assert pacing.rows(512, 512, polite=False) == 2  # for memory


def test_loading_the_gradients_is_no_time_of_a_run(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside predictions the next run would wait for more than a hundred times of it."""
    engine = Engine.load(make("classification").folder)
    load, ran, runs = engine.explainer, engine.pacing.ran, []

    def load_slowly() -> Any:
        if not runs:
            time.sleep(0.5)
        return load()

    def remember(began: float, ended: float) -> None:
        runs.append(ended - began)
        ran(began, ended)

    load()
    monkeypatch.setattr(engine, "explainer", load_slowly)
    monkeypatch.setattr(engine.pacing, "ran", remember)
    explain(engine, TEXT)
    assert runs and max(runs) < 0.4


def test_a_time_budget_is_kept(make: Callable[..., Made]) -> None:
    engine = Engine.load(make("classification").folder)
    error = explain(engine, {"text": " ".join([TEXT] * 30), "parameters": {"seconds": 0.01, "steps": 512}}, 503)[
        "error"
    ]
    assert error["type"] == "OutOfTime" and error["field"] == "parameters.seconds"


def test_its_time_runs_out_beside_rows_that_wait(make: Callable[..., Made]) -> None:
    """And whoever has left is forgotten, however long the queue."""
    engine = Engine.load(make("classification").folder)
    work = Work(engine, Stats(), seconds=0.0)  # a row in each turn
    asked = [Request({"text": TEXT}, {"seconds": seconds, "steps": 512}, explain=True) for seconds in (0.1, 20)]
    [late], [gone] = (work.join([request], [None]) for request in asked)
    rows = [pending for _ in range(400) for pending in work.join([Request({"text": TEXT})], [None])]
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:
        work.turn()
    work.leave(gone)
    work.turn()
    assert isinstance(late.result, OutOfTime) and not rows[-1].done
    while not rows[-1].done:
        work.turn()
    assert not work.busy and gone.result is None


def test_explanations_do_not_wait_for_their_own_predictions(make: Callable[..., Made]) -> None:
    engine = Engine.load(make("classification").folder)
    predicted: List[float] = []
    engine.pacing.predicted = predicted.append  # type: ignore[method-assign]
    explain(engine, TEXT)
    assert not predicted
    engine.answer([Request({"text": TEXT})])
    assert len(predicted) == 1


def test_few_calls_are_explained_at_a_time(make: Callable[..., Made]) -> None:
    """They take turns, so that a list does not hold up a text; what comes beyond them is refused at once."""
    engine = Engine.load(make("classification").folder)
    session = Service(engine, "small").session(Stats())
    headers = Headers("application/json", explain=True)
    bodies: List[Any] = [[TEXT] * 6, *[TEXT] * 5]
    calls = [Call({"body": json.dumps(body).encode()}, headers) for body in bodies]
    exchanges = session.join(calls, [None] * len(calls))
    done: List[Any] = []
    while session.busy:
        done += session.turn()
        time.sleep(min(session.rest, 0.05))
    statuses = [each.reply.status for each in exchanges if each.reply is not None]
    assert sorted(statuses) == [200, 200, 200, 200, 503, 503]
    assert statuses[0] == 200 and done[-1] is exchanges[0]
    refused = json.loads(done[0].reply.body)["error"]
    assert refused["type"] == "OutOfTime" and "4 calls" in refused["message"]


def test_gradients_that_are_no_numbers_explain_nothing(make: Callable[..., Made]) -> None:
    engine = Engine.load(make("classification").folder)
    model: Any = engine.explainer().gradients
    model.gradients = lambda points, *others: np.full_like(points, np.nan)
    found = explain(engine, TEXT)
    assert found["method"] == "occlusion" and "no number" in found["because"]
    assert all(np.isfinite(word["attribution"]) for word in found["words"])


@pytest.mark.parametrize("name", ["tokens", "answers"])
@pytest.mark.parametrize("chosen", [{"end": 4}, {"start": 4, "end": 4}, {"start": 9, "end": 4}])
def test_characters_without_a_meaning_are_refused(name: str, chosen: Dict[str, int], make: Callable[..., Made]) -> None:
    made = make(name)
    body = {**made.kind.inputs, "parameters": chosen}
    assert explain(Engine.load(made.folder), body, 400)["error"]["field"] == "parameters.end"


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("hello 😀", [(0, 5, 0), (5, 6, 1), (6, 7, 1)], [("hello", (0,)), ("😀", (1, 2))]),
        ("hello ", [(0, 5, 0), (5, 6, 1)], [("hello", (0, 1))]),
        ("  hello", [(0, 1, 0), (1, 7, 0)], [("hello", (0, 1))]),
        ("\n\nhello world", [(0, 1, 0), (1, 7, 0), (7, 13, 1)], [("hello", (0, 1)), ("world", (2,))]),
        ("a  b", [(0, 1, None), (1, 2, None), (2, 4, None)], [("a", (0,)), ("b", (1, 2))]),
        ("  ", [(0, 2, 0)], []),
    ],
)
def test_spaces_change_no_words(text: str, tokens: List[Any], expected: List[Any]) -> None:
    """Tokens without characters of their own belong to a neighbour, and move no border."""
    encoding = SimpleNamespace(offsets=[token[:2] for token in tokens], word_ids=[token[2] for token in tokens])
    row: Any = SimpleNamespace(encoding=encoding, positions=lambda number: range(len(tokens)))
    found = words_of(row, Segments(text, None, ("text", "text_pair")))
    assert [(word.text, word.positions) for word in found] == expected
    assert all(text[word.start : word.end] == word.text for word in found)


def test_a_server_waits_longer_than_its_explanations() -> None:
    """Else TorchServe would end the worker, with all that it answers."""
    assert settings.read({"responseTimeout": 20}).explain_seconds == 10
    assert settings.read({"responseTimeout": 300}).explain_seconds == 30
    assert settings.read({"responseTimeout": 300, "handler": {"explain_seconds": 290}}).explain_seconds == 150


def test_words_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever rich would read of them."""
    word = {"word": "[/b]", "field": "text", "start": 4, "end": 8, "attribution": 1.0}
    found = {"words": [word], "target": {"label": "[red]"}, "quantity": "logit", "value": 1.0, "baseline_value": 0.0}
    _print("see [/b] now", {**found, "method": "occlusion", "steps": 2, "completeness_error": 0.0, "because": "[/x]"})
    shown = capsys.readouterr().out
    assert "see [/b] now" in shown and "explains label [red]" in shown and "no gradients: [/x]" in shown


def test_the_rule_is_captums() -> None:
    positions, weights = rule(20)
    assert weights.sum() == pytest.approx(1) and (positions[0] > 0) and (positions[-1] < 1)
    assert (weights * positions**9).sum() == pytest.approx(0.1)
    assert completeness_error([1.0, -0.5], 0.6) == pytest.approx(0.1 / 1.5)
    assert completeness_error([], 0.0) == 0


def test_groups_of_words_cover_all_of_them() -> None:
    words = [Word("text", i * 2, i * 2 + 1, "x", (i,)) for i in range(50)] + [Word("pair", 0, 1, "y", (60,))]
    found = grouped(words, 8)
    assert len(found) <= 9 and [p for word in found for p in word.positions] == [*range(50), 60]
    assert grouped(words, 100) == words and found[-1].field == "pair"


def unwritable(path: Path, text: str) -> None:
    raise TraceserveError("it filled up")


def test_the_command_explains_an_archive(
    make: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = pack_archive(make("classification").folder, "small", tmp_path)
    page = tmp_path / "page.html"
    page.write_text("earlier")
    os.link(page, tmp_path / "earlier.html")
    assert cli.main(["explain", str(archive), TEXT, "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert TEXT in printed and "completeness error" in printed and "harbour" in printed
    assert page.read_text().count("<span") > 8
    assert (tmp_path / "earlier.html").read_text() == "earlier"  # replaced, not overwritten
    assert cli.main(["explain", str(archive), TEXT, CONTEXT, "--json", "--parameters", '{"label": "red"}']) == 0
    lines: List[Any] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["target"] for line in lines] == [{"label": "red"}] * 2
    assert cli.main(["explain", str(archive), TEXT, "--parameters", '{"label": "grey"}']) == 1
    assert "no such label" in capsys.readouterr().err
    assert cli.main(["explain", str(archive)]) == 1
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(staging, "write_whole", unwritable)
        assert cli.main(["explain", str(archive), TEXT, "--html", str(page)]) == 1
        said = capsys.readouterr()
        assert TEXT in said.out and "it filled up" in said.err  # minutes may have been computed
    for body, file, words in (
        (json.dumps({"instances": [TEXT]}), tmp_path / "other.html", "--html shows explanations of our own protocol"),
        (json.dumps(TEXT), tmp_path, f"{tmp_path} is a folder"),
        (json.dumps(TEXT), tmp_path / "none" / "page.html", "there is no folder"),
    ):
        assert cli.main(["explain", str(archive), "--body", body, "--html", str(file)]) == 1
        said = capsys.readouterr()
        assert words in said.err and not said.out and not (tmp_path / "other.html").exists()
