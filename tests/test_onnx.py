"""The save mode onnx: every task through ONNX Runtime, its options, and a worker without torch."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, run_export
from traceserve import cli
from traceserve.building.checkpoints import sources
from traceserve.building.config.parsing import parse_config
from traceserve.building.config.save_modes import Target
from traceserve.building.exported import Exported
from traceserve.building.gate import verification
from traceserve.building.gate.findings import LIMITS, Limit
from traceserve.building.gate.texts import SENTENCES
from traceserve.building.writers.onnx import weights, writer
from traceserve.building.writers.onnx.int8 import BLOCK, RoundedLinear, SmoothedLinear, quantize
from traceserve.errors import ConfigError, ExportError
from traceserve_runtime import processor
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidManifest, MissingPackage
from traceserve_runtime.manifest import Manifest, sha256
from traceserve_runtime.runtimes.onnx import LEVEL
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

LABELS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
ENTAILMENT = {"id2label": {0: "entailment", 1: "neutral", 2: "contradiction"}}


class Kind(NamedTuple):
    """A family's model for a task, its checkpoint's and its configuration's values."""

    task: str
    architecture: str
    options: Dict[str, Any] = {}
    config: Dict[str, Any] = {}


KINDS = {
    "classification": Kind("sequence_classification", "bert", LABELS),
    "deberta": Kind("sequence_classification", "deberta-v2", LABELS),
    "modernbert": Kind("sequence_classification", "modernbert", LABELS),
    "bart-classification": Kind("sequence_classification", "bart", LABELS),
    "tokens": Kind("token_classification", "distilbert", LABELS),
    "question": Kind("question_answering", "roberta"),
    "mask": Kind("fill_mask", "albert"),
    "zero-shot": Kind("zero_shot_classification", "mpnet", ENTAILMENT),
    "ranking": Kind("text_ranking", "electra", {"num_labels": 1}),
    "vectors": Kind("feature_extraction", "bert"),
    "gpt2": Kind("text_generation", "gpt2"),
    "llama": Kind("text_generation", "llama"),
    "t5": Kind("text2text_generation", "t5"),
    "bart": Kind("text2text_generation", "bart"),
    "marian": Kind("text2text_generation", "marian"),
    "fixed": Kind("token_classification", "bert", LABELS, {"sequence_lengths": [16, 32]}),
}

Maker = Callable[..., Exported]


@pytest.fixture(scope="module")
def made(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A kind's artifact, exported once; the gate compared it with the original."""
    known: Dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in known:
            kind = KINDS[name]
            source = checkpoint(kind.architecture, TASKS[kind.task].auto_model, **kind.options)
            config = {
                "model_name": str(source),
                "task": kind.task,
                "max_length": 32,
                "save_mode": "onnx",
                **kind.config,
            }
            if TASKS[kind.task].loop:
                config["parameters"] = {"max_new_tokens": 8}
            folder = tmp_path_factory.mktemp("onnx") / "x"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(verification, "TEXTS", SENTENCES[1:10])
                # Speeds of tiny models are meaningless; one kind shows that they are measured.
                if name != "classification":
                    patch.setattr(
                        "traceserve.building.attempt.measure_speeds", lambda folders, *rest: dict.fromkeys(folders, 1.0)
                    )
                exported = run_export(folder, config)
            assert exported.manifest.receipt["passed"] and not exported.manifest.receipt["answers_changed"]
            known[name] = folder
        return known[name]

    return make


def content(checkpoint: Callable[..., Path], **more: Any) -> Dict[str, Any]:
    source = str(checkpoint("bert", **LABELS))
    return {"model_name": source, "max_length": 32, "long_inputs": "truncate", "save_mode": "onnx", **more}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip measuring, and let the gate use fewer sentences."""
    monkeypatch.setattr(
        "traceserve.building.attempt.measure_speeds", lambda folders, *rest: dict.fromkeys(folders, 1.0)
    )
    monkeypatch.setattr(verification, "CORPUS", 32)
    monkeypatch.setattr(verification, "TEXTS", SENTENCES[1:10])


def values(engine: Engine, together: bool) -> List[Any]:
    """Return the answers to a few texts and pairs of texts, except those that this task refuses."""
    texts = ["Where is it?", "No.", "Call me on Monday.", "A red car.", "Who paid?", "We did.", "Yes.", "At nine."]
    requests = list(engine.task.from_texts(texts))
    groups = [requests] if together else [[request] for request in requests]
    answers = [answer for group in groups for answer in engine.answer(group)]
    found = [answer.value for answer in answers if isinstance(answer, Answer)]
    assert len(found) > 1
    return found


# Every task


@pytest.mark.parametrize("name", KINDS)
def test_every_task_answers_as_the_original(made: Callable[[str], Path], name: str) -> None:
    """The gate compared outputs and answers; together and alone they are equal."""
    engine = Engine.load(made(name))
    receipt = engine.manifest.receipt
    assert receipt["largest_difference"] < 1e-5 and receipt["answers"] > 1 and receipt["cells"] > 8
    for one, other in zip(values(engine, True), values(engine, False)):
        assert engine.task.same(one, other)


def test_every_task_is_tried() -> None:
    assert {kind.task for kind in KINDS.values()} == set(TASKS)


def test_shapes(made: Callable[[str], Path]) -> None:
    assert Manifest.read(made("classification")).shapes.lengths is None
    fixed = Manifest.read(made("fixed"))
    assert fixed.shapes.lengths == (16, 32) and len(fixed.runtime["graphs"]) == 1


def test_graphs_share_their_weights(made: Callable[[str], Path]) -> None:
    """The embeddings and the source's keys and values, which both read."""
    folder = made("t5")
    files = Manifest.read(folder).runtime["graphs"].values()
    graphs = [onnx.load(folder / file, load_external_data=False) for file in files]
    one, other = (
        {entry.value for tensor in graph.graph.initializer for entry in tensor.external_data if entry.key == "offset"}
        for graph in graphs
    )
    assert len(one) > 5 and len(other) > 5 and one & other


def test_the_state_of_a_loop_stays_in_onnx_runtime(made: Callable[[str], Path]) -> None:
    engine = Engine.load(made("llama"))
    ids = np.ones((2, 5), dtype=np.int64)
    columns = {"input_ids": ids, "attention_mask": ids, "position_ids": np.arange(5)[None].repeat(2, axis=0)}
    state = engine.runner.start({name: columns[name] for name in engine.manifest.inputs})
    assert [kept.shape[2] for kept in state] == [0] * 4
    outputs, state = engine.runner.step(columns, state)
    assert outputs["logits"].shape[0] == 2 and outputs["logits"].dtype == np.float32
    assert all(isinstance(kept.value, onnxruntime.OrtValue) and kept.shape[:3] == (2, 2, 5) for kept in state)
    more = {"input_ids": ids[:, :1], "attention_mask": np.ones((2, 6), np.int64), "position_ids": np.full((2, 1), 5)}
    both, _ = engine.runner.step(more, state)
    turned, _ = engine.runner.step(more, state, np.array([1, 0]))
    assert np.array_equal(turned["logits"], both["logits"][::-1])
    one, after = engine.runner.step({k: v[:1] for k, v in more.items()}, state, np.array([1]))
    assert one["logits"] == pytest.approx(both["logits"][1:], abs=1e-5) and after[0].shape[:3] == (1, 2, 6)


WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "safetensors", "onnx", "traceserve", "huggingface_hub"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
from pathlib import Path
from traceserve_runtime.engine import Answer, Engine
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks.contract import Request
for folder in sys.argv[1:]:
    engine = Engine.load(Path(folder), settings=Settings(threads=1))
    engine.warm_up()
    key = next(iter(engine.task.from_texts(["Yes."])[0].inputs))
    answers = engine.answer([Request({key: "Where is my parcel?"}), Request({key: "No."})])
    assert all(isinstance(answer, Answer) and answer.value for answer in answers), answers
    assert not {"torch", "transformers", "onnx"} & set(sys.modules)
print("answered")
"""


def test_a_worker_needs_onnxruntime_tokenizers_and_numpy(made: Callable[[str], Path], tmp_path: Path) -> None:
    """And reports nothing to anybody: ONNX Runtime's telemetry sends at import, and makes files in the user's home."""
    folders = [str(made(name)) for name in ("classification", "gpt2", "t5")]
    command = [sys.executable, "-c", WITHOUT_TORCH, *folders]
    environment = {"PYTHONPATH": str(ROOT / "handlers"), "HOME": str(tmp_path)}  # not CI, which turns it off too
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0 and result.stdout == "answered\n", result.stderr
    assert not result.stderr and not list(tmp_path.iterdir())


# Options


def test_the_same_bytes_each_time(
    checkpoint: Callable[..., Path], made: Callable[[str], Path], tmp_path: Path, quick: None
) -> None:
    run_export(tmp_path / "x", {**content(checkpoint), "long_inputs": None})
    first, again = made("classification"), tmp_path / "x"
    assert Manifest.read(first).files == Manifest.read(again).files
    assert sha256(first / "traceserve.json") == sha256(again / "traceserve.json")


def test_the_opset(checkpoint: Callable[..., Path], made: Callable[[str], Path], tmp_path: Path, quick: None) -> None:
    run_export(tmp_path / "x", content(checkpoint, options={"opset": 20}))
    for folder, opset in ((made("classification"), 17), (tmp_path / "x", 20)):
        graph = onnx.load(folder / "model.onnx", load_external_data=False)
        assert [item.version for item in graph.opset_import if item.domain in ("", "ai.onnx")] == [opset]
        assert Manifest.read(folder).runtime["opset"] == opset


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"opset": 13}, "opset should be a whole number from 14 to 20, not 13"),
        ({"opset": "new"}, "opset should be a whole number from 14 to 20"),
        ({"optimization": "O3"}, '"none", "basic", "extended", "transformers", "fast_gelu"'),
        ({"keep_float32": 1}, "keep_float32 should be true or false"),
        ({"opsets": 17}, "has no option opsets"),
    ],
)
def test_options_are_checked(options: Dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        parse_config({"model_name": "x/y", "save_mode": "onnx", "options": options})


@pytest.mark.parametrize("level", ["none", "basic", "transformers", "fast_gelu"])
def test_the_optimization(
    level: str, checkpoint: Callable[..., Path], tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LIMITS, "float32", Limit(1e-4 if level != "fast_gelu" else 1e-2, 0.0, 0.0))
    exported = run_export(tmp_path / "x", content(checkpoint, options={"optimization": level}))
    runtime = exported.manifest.runtime
    assert runtime["optimization"] == level
    kinds = [node.op_type for node in onnx.load(tmp_path / "x" / "model.onnx", load_external_data=False).graph.node]
    fused = {"transformers": {"Attention": 2, "BiasGelu": 2}, "fast_gelu": {"Attention": 2, "FastGelu": 2}}.get(
        level, {}
    )
    assert {kind: kinds.count(kind) for kind in fused} == fused
    assert bool(runtime["fused"]) is bool(fused) and all(kinds.count(kind) == n for kind, n in runtime["fused"].items())
    session = {"none": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC"}.get(level, "ORT_ENABLE_EXTENDED")
    assert runtime[LEVEL] == session
    if level == "fast_gelu":
        assert exported.findings.largest_difference > 1e-5


def test_a_loop_is_fused_as_far_as_its_state_stays(
    checkpoint: Callable[..., Path], tmp_path: Path, quick: None
) -> None:
    kind = KINDS["marian"]
    source = str(checkpoint(kind.architecture, TASKS[kind.task].auto_model))
    config = {"model_name": source, "task": kind.task, "max_length": 32, "save_mode": "onnx"}
    config["options"] = {"optimization": "transformers"}
    exported = run_export(tmp_path / "x", {**config, "parameters": {"max_new_tokens": 4}})
    assert exported.manifest.receipt["passed"] and exported.manifest.runtime["fused"]


def test_fusions_of_all_graphs_are_counted(
    checkpoint: Callable[..., Path], tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([{"LayerNormalization": 5, "Attention": 2}, {"LayerNormalization": 3, "Gelu": 1}])
    monkeypatch.setattr(writer.onnx_optimization, "fuse", lambda model, *_: (model, next(counts)))
    kind = KINDS["marian"]
    source = str(checkpoint(kind.architecture, TASKS[kind.task].auto_model))
    config = {"model_name": source, "task": kind.task, "max_length": 32, "save_mode": "onnx"}
    exported = run_export(tmp_path / "x", {**config, "parameters": {"max_new_tokens": 4}})
    assert list(exported.manifest.runtime["fused"].items()) == [
        ("Attention", 2),
        ("Gelu", 1),
        ("LayerNormalization", 8),
    ]


def test_speed_and_size_are_told_beside_the_float32_trace(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("setup_config.json").write_text(json.dumps(content(checkpoint)))
    assert cli.main(["build", "--output", "artifacts/x", "--store", "store"]) == 0
    said = capsys.readouterr().out
    for shown in ("requests/s", "ratio", "torchscri", "taken"):
        assert shown in " ".join(said.split()), said
    report = json.loads(Path("store", "x.report.json").read_text())
    [candidate] = report["candidates"]
    assert candidate["requests_per_second"] > 0 and candidate["bytes"] > 10_000
    compared = report["compared_with"]
    assert compared["save_mode"] == "torchscript" and compared["requests_per_second"] > 0 and compared["bytes"] > 10_000
    assert {p.name for p in Path("artifacts/x").iterdir()} == {
        "traceserve.json",
        *Manifest.read(Path("artifacts/x")).files,
    }


# int8


@pytest.fixture(scope="module")
def int8(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 model, with the float32 model beside it."""
    folder = tmp_path_factory.mktemp("onnx") / "x"
    config = content(checkpoint, dtype="int8", options={"keep_float32": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("traceserve.building.attempt.measure_speeds", lambda folders, *rest: dict.fromkeys(folders, 1.0))
        run_export(folder, config, allow_drift=True)
    return folder


def test_int8(int8: Path, made: Callable[[str], Path]) -> None:
    assert Manifest.read(int8).dtype == "int8"
    graph = onnx.load(int8 / "model.onnx").graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    assert 6 <= len(products) <= 13 and all(node.name for node in products)
    for node in products:
        facts = {attribute.name: attribute.i for attribute in node.attribute}
        assert facts["bits"] == 8 and facts["accuracy_level"] == 4  # int8 by int8
        blocks = -(-facts["K"] // BLOCK)
        assert list(tensors[node.input[1]].dims) == [facts["N"], blocks, BLOCK]
        assert list(tensors[node.input[2]].dims) == [facts["N"], blocks]
    read = {name for node in graph.node for name in node.input}
    assert set(tensors) <= read  # no converted weight also stays in float32
    exact = np.array(scores(Engine.load(made("classification"))))
    assert 0 < np.abs(np.array(scores(Engine.load(int8))) - exact).max() < 0.1 < np.ptp(exact)


def test_no_answer_in_int8_depends_on_its_batch(int8: Path) -> None:
    engine = Engine.load(int8)
    rows = np.random.default_rng(0).integers(5, 90, (6, 9))
    inputs = {"input_ids": rows, "attention_mask": np.ones_like(rows), "token_type_ids": np.zeros_like(rows)}
    together = engine.runner(inputs)["logits"]
    for i in range(len(rows)):
        [alone] = engine.runner({name: array[i : i + 1] for name, array in inputs.items()})["logits"]
        assert together[i] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("channels", [BLOCK, 3 * BLOCK, BLOCK + 5, 7])
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_products_in_blocks(channels: int, rows: int, bias: bool) -> None:
    """ONNX Runtime multiplies as measured for choosing the layers; and the largest values do not overflow."""
    torch.manual_seed(channels + rows)
    plain = torch.nn.Linear(channels, 24, bias=bias)
    inputs = torch.randn(rows, channels) * torch.linspace(0.1, 9, channels)
    for weight in (plain.weight.detach().clone(), torch.full((24, channels), -1.0), torch.zeros(24, channels)):
        plain.weight.data = weight
        largest = inputs.abs().amax(0)
        found = run_quantized(SmoothedLinear(plain, largest), inputs)
        expected = RoundedLinear(plain, largest)(inputs).detach().numpy()
        exact = plain(inputs).detach().numpy()
        assert found == pytest.approx(expected, abs=2e-4 * max(1.0, float(np.abs(expected).max())))
        summed = (inputs.abs() @ weight.abs().t()).numpy()
        assert np.abs(found - exact).max() <= 0.01 * max(1.0, summed.max())


def run_quantized(layer: SmoothedLinear, inputs: torch.Tensor) -> np.ndarray:
    """Return ONNX Runtime's result for a layer in int8."""
    file = io.BytesIO()
    axes = {"x": {0: "rows"}, "y": {0: "rows"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            layer.eval(), (inputs,), file, input_names=["x"], output_names=["y"], dynamic_axes=axes, dynamo=False
        )
    model = onnx.load_from_string(file.getvalue())
    quantize(model, torch.nn.Sequential(layer))
    [result] = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": inputs.numpy()})
    return np.asarray(result)


def scores(engine: Engine) -> List[List[float]]:
    answers = engine.answer([Request({"text": text}, {"top_k": None}) for text in SENTENCES[1:9]])
    found = [{item["label"]: item["score"] for item in answer.value} for answer in answers]  # type: ignore[union-attr]
    return [[one[label] for label in engine.manifest.labels] for one in found]


def test_float32_is_kept_where_asked(int8: Path, made: Callable[[str], Path]) -> None:
    assert {"model.float32.onnx", "model.float32.onnx.data"} <= set(Manifest.read(int8).files)
    assert "model.float32.onnx" not in Manifest.read(made("classification")).files
    inputs = {name: np.ones((2, 7), dtype=np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    [kept] = onnxruntime.InferenceSession(str(int8 / "model.float32.onnx")).run(None, inputs)
    exact = Engine.load(made("classification")).runner(inputs)["logits"]
    assert kept == pytest.approx(exact, abs=1e-5)


def claim(patch: pytest.MonkeyPatch, folder: Path, features: str) -> None:
    (folder / "cpuinfo").write_text(f"flags\t\t: fpu sse2 {features}\n")
    patch.setattr(processor, "CPUINFO", folder / "cpuinfo")


def test_int8_is_right_on_every_processor(
    int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = Target("cpu", {"opset": 17, "optimization": "extended", "keep_float32": False})
    for features, slow in (("avx2", True), ("avx2 avx_vnni", False)):
        claim(monkeypatch, tmp_path, features)
        caplog.clear()
        writer.check("int8", target)
        Engine.load(int8)
        assert ("int8 needs a processor with one of" in caplog.text) == slow


@pytest.mark.parametrize(
    ("version", "known"), [("1.21.1", False), ("1.9.0", False), ("1.22.0", True), ("1.22rc1", True), ("2.0.0rc1", True)]
)
def test_int8_needs_what_knows_its_products(
    int8: Path, version: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    target = Target("cpu", {"opset": 17, "optimization": "extended", "keep_float32": False})
    if known:
        writer.check("int8", target)
        Engine.load(int8)
        return
    writer.check("float32", target)
    with pytest.raises(ExportError, match=f"int8 needs onnxruntime 1.22 or newer, .*{version}"):
        writer.check("int8", target)
    with pytest.raises(MissingPackage, match=f"int8 needs onnxruntime 1.22 or newer; this is {version}"):
        Engine.load(int8)


# Large models


def test_weights_beyond_what_a_message_holds(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """As from 2 GB on, where torch's exporter writes a file per weight."""
    seen: List[int] = []
    own = onnx.load

    def load(file: str) -> Any:
        model = own(file)
        onnx.save(model, file, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=64)
        seen.append(len(list(Path(file).parent.iterdir())))
        return own(file)

    monkeypatch.setattr(weights, "SMALLEST", 64)
    with monkeypatch.context() as patch:
        patch.setattr(onnx, "load", load)
        exported = run_export(tmp_path / "x", content(checkpoint))
    assert seen and seen[0] > 20
    assert exported.manifest.receipt["passed"]
    graph = onnx.load(tmp_path / "x" / "model.onnx", load_external_data=False).graph
    assert all(tensor.external_data for tensor in graph.initializer if np.prod(tensor.dims) > 32)
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"traceserve.json", *exported.manifest.files}


# Refusals


def test_the_exporter_is_asked_for_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(*arguments: Any) -> Any:
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr(sources, "fetch_checkpoint", fetch)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.chdir(tmp_path)
    Path("setup_config.json").write_text(json.dumps({"model_name": "nobody/nothing", "save_mode": "onnx"}))
    assert cli.main(["export"]) != 0
    assert "pip install 'traceserve[onnx]'" in capsys.readouterr().err


def test_a_model_that_cannot_be_exported_is_told(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise torch.onnx.errors.UnsupportedOperatorError("aten::x", 17, None)

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ExportError, match="torch.onnx.export cannot export BertForSequenceClassification: .*aten::x"):
        run_export(tmp_path / "x", content(checkpoint))


def test_the_exporter_writes_no_graph_to_standard_output(
    checkpoint: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch writes all of it where it fails, and half a kilobyte of it into its error."""
    model = checkpoint("longformer", num_hidden_layers=1)
    settings = {"model_name": str(model), "task": "sequence_classification", "save_mode": "onnx", "max_length": 32}
    capfd.readouterr()
    with pytest.raises(ExportError, match="cannot export LongformerForSequenceClassification: ") as caught:
        run_export(tmp_path / "x", settings)
    assert "graph(" not in capfd.readouterr().out and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ({}, "runtime.graphs"),
        ({"graphs": {"model": "other.onnx"}}, "runtime.graphs"),
        ({LEVEL: "ORT_ENABLE_EVERYTHING"}, f"runtime.{LEVEL} should be one of ORT_DISABLE_ALL"),
    ],
)
def test_a_manifest_that_no_writer_wrote(
    runtime: Dict[str, Any], words: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(made("classification"), tmp_path / "x")
    manifest = Manifest.read(tmp_path / "x")
    changed = {**manifest.runtime, **runtime} if runtime else {}
    dataclasses.replace(manifest, runtime=changed).write(tmp_path / "x")
    with pytest.raises(InvalidManifest, match=words):
        Engine.load(tmp_path / "x")


def test_a_file_that_is_no_model(made: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(made("classification"), tmp_path / "x")
    (tmp_path / "x" / "model.onnx").write_bytes(b"nothing")
    manifest = Manifest.read(tmp_path / "x", verify=False)
    files = {**manifest.files, "model.onnx": sha256(tmp_path / "x" / "model.onnx")}
    dataclasses.replace(manifest, files=files).write(tmp_path / "x")
    with pytest.raises(InvalidManifest, match="model.onnx cannot be loaded by onnxruntime"):
        Engine.load(tmp_path / "x")


def test_a_worker_without_onnxruntime(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made("classification")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackage, match="needs onnxruntime"):
        Engine.load(folder)


def test_inputs_that_fail_are_a_runtime_error(made: Callable[[str], Path]) -> None:
    """The engine expects this of a model: it then runs each row alone."""
    engine = Engine.load(made("classification"))
    inputs = {name: np.full((1, 4), 10**6, dtype=np.int64) for name in engine.manifest.inputs}
    with pytest.raises(RuntimeError, match="ONNX Runtime"):
        engine.runner(inputs)


@pytest.mark.parametrize("threads", [1, 2, None])
def test_threads(threads: Any, made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: List[Any] = []
    own = onnxruntime.InferenceSession

    def session(file: str, options: Any, **more: Any) -> Any:
        seen.append(options)
        return own(file, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    Engine.load(made("classification"), settings=Settings(threads=threads))
    assert [item.intra_op_num_threads for item in seen] == [threads or processor.cores()]
    assert seen[0].get_session_config_entry("session.intra_op.allow_spinning") == "0"
