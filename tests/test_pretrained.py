"""The save mode pretrained: every task, dtypes, torch.compile, a worker without a network, and refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import torch
from conftest import ROOT, run_export
from traceserve.building.checkpoints import sources
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate import verification
from traceserve.building.gate.texts import SENTENCES
from traceserve.errors import ConfigError, ExportError
from traceserve_runtime.batching import batches
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidManifest, MissingPackage
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes import team
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request

# A family per task: encoders and a classifier that reads end tokens, both kinds of loop.
FAMILIES: Dict[str, str] = {
    **dict.fromkeys(TASKS, "bert"),
    "text_ranking": "bart",
    "feature_extraction": "modernbert",
    "text_generation": "llama",
    "text2text_generation": "marian",
}
LABELS: Dict[str, Dict[str, Any]] = {
    "text_ranking": {"num_labels": 1},
    "zero_shot_classification": {"id2label": {0: "contradiction", 1: "entailment"}},
}

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def made(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A task's artifact, with few texts in the gate; each made once."""
    known: Dict[str, Path] = {}

    def make(task: str, **content: Any) -> Path:
        key = repr((task, content))
        if key not in known:
            known[key] = tmp_path_factory.mktemp("pretrained") / "x"
            source = checkpoint(FAMILIES[task], TASKS[task].auto_model, **LABELS.get(task, {}))
            config = {"model_name": str(source), "task": task, "save_mode": "pretrained", "max_length": 48, **content}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(verification, "CORPUS", 0)
                run_export(known[key], config, gradients=True)
        return known[key]

    return make


@pytest.fixture()
def copy(made: Make, tmp_path: Path) -> Path:
    """Copy a classifier's artifact that a test may change."""
    return Path(shutil.copytree(made("sequence_classification"), tmp_path / "copy"))


def change(folder: Path, **fields: Any) -> Manifest:
    """Write other fields into an artifact's manifest."""
    manifest = dataclasses.replace(Manifest.read(folder), **fields)
    manifest.write(folder)
    return manifest


def answers(engine: Engine, requests: List[Request]) -> List[Any]:
    results = engine.answer(requests)
    for result in results:
        assert isinstance(result, Answer), result
    return [result.value for result in results if isinstance(result, Answer)]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_passes_the_gate(task: str, made: Make) -> None:
    manifest = Manifest.read(made(task))
    receipt = manifest.receipt
    assert receipt["passed"] and receipt["answers"] > 0 and receipt["answers_changed"] == 0
    assert receipt["largest_difference"] < 1e-4
    shared = {"tokenizer.json", "golden.json", "model-config.yaml"}
    assert set(manifest.files) == {"model.safetensors", "config.json", *shared}
    assert manifest.runtime == {
        "auto_model": TASKS[task].auto_model,
        "loop": TASKS[task].loop,
        "in_float32": [],
        **({"keeps_past": True} if TASKS[task].loop else {}),
        "torch_compile": False,
        **({"prompts_in_parts": True} if TASKS[task].loop == "decoder" else {}),
        **({"no_gradients": _without_gradients(task)} if TASKS[task].explains is not None else {}),
    }
    assert bool(manifest.step_inputs) is bool(TASKS[task].loop)


def _without_gradients(task: str) -> str:
    """Return the reason, or "" if it has them."""
    twice = "BartForSequenceClassification looks its word embeddings up 2 times, and gradients need one"
    return twice if FAMILIES[task] == "bart" else ""


def test_two_builds_are_equal(made: Make, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("bert", TASKS["sequence_classification"].auto_model)
    config = {"model_name": str(source), "save_mode": "pretrained", "max_length": 48}
    first, second = (run_export(tmp_path / name / "x", config).manifest for name in "ab")
    assert first.files == second.files and first == second


@pytest.mark.parametrize("dtype, size", [("float32", 1.0), ("bfloat16", 0.7)])
def test_a_lower_precision_is_smaller(dtype: str, size: float, made: Make) -> None:
    from safetensors.torch import load_file

    whole = made("sequence_classification")
    folder = made("sequence_classification", dtype=dtype)
    file = "model.safetensors"
    assert (folder / file).stat().st_size <= size * (whole / file).stat().st_size
    matrix = load_file(folder / file)["bert.encoder.layer.0.attention.self.query.weight"]
    assert str(matrix.dtype) == f"torch.{dtype}"
    [exact], [lowered] = (
        answers(Engine.load(place), [Request({"text": "Where is it?"}, {"top_k": None})]) for place in (whole, folder)
    )
    scores = [{item["label"]: item["score"] for item in answer} for answer in (exact, lowered)]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)
    assert (scores[0] == scores[1]) is (dtype == "float32")


def test_what_cannot_be_traced_is_served(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal names other save modes, and the first of them works."""

    def trace(*inputs: Any, **named: Any) -> Any:
        raise RuntimeError("unordered_map::at")

    monkeypatch.setattr(torch.jit, "trace", trace)
    content = {"model_name": str(checkpoint("reformer")), "max_length": 48}
    advised = "cannot trace ReformerForSequenceClassification: .*; try save_mode pretrained or aot_inductor$"
    with pytest.raises(ExportError, match=advised):
        run_export(tmp_path / "traced", content)
    manifest = run_export(
        tmp_path / "x", {**content, "save_mode": "pretrained"}, all_texts=True, gradients=True
    ).manifest
    assert manifest.receipt["passed"] and manifest.receipt["answers"] > 20
    assert "If you want to train `ReformerModel`" in manifest.runtime["no_gradients"]


def test_saving_leaves_the_original_as_it_was(made: Make) -> None:
    """transformers 4.57 removes entries of a configuration when saving; the gate's model still has them."""
    assert not list(made("text2text_generation").glob(".saving.*"))
    written = json.loads((made("text2text_generation") / "config.json").read_text())
    assert written["model_type"] == "marian" and not (made("text2text_generation") / "generation_config.json").exists()


# The worker.

WORKER = """
import json, socket, sys
def refuse(*arguments, **options):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
sys.modules["traceserve"] = None
from pathlib import Path
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks.contract import Request
engine = Engine.load(Path(sys.argv[1]))
engine.warm_up()
print(json.dumps([answer.value for answer in engine.answer([Request({"text": "Where is it?"}), Request({"text": "a"})])]))
"""


def test_the_worker_needs_neither_builder_nor_network(made: Make) -> None:
    task = "text_generation"
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
    environment.update(PYTHONPATH=str(ROOT / "handlers"), HF_HOME="/nonexistent")
    command = [sys.executable, "-c", WORKER, str(made(task))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Loading weights" not in result.stderr  # no progress bars in a server's log
    requests = [Request({"text": "Where is it?"}), Request({"text": "a"})]
    assert json.loads(result.stdout) == json.loads(json.dumps(answers(Engine.load(made(task)), requests)))


def test_a_worker_without_transformers_says_so(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made("sequence_classification")
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackage, match=r"needs transformers \(it was made with \d"):
        Engine.load(folder)


def test_an_old_transformers_is_refused_on_both_sides(
    made: Make, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.__version__", "4.26.1")
    with pytest.raises(MissingPackage, match=r"needs transformers 4.41 or newer, this is 4.26.1"):
        Engine.load(made("sequence_classification"))
    with pytest.raises(ExportError, match=r"needs transformers 4.41 or newer, this is 4.26.1"):
        run_export(tmp_path / "x", {"model_name": str(checkpoint("bert")), "save_mode": "pretrained"})


def test_another_transformers_is_noted(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    Engine.load(copy)
    assert "where the answers were compared" not in caplog.text
    change(copy, versions={**Manifest.read(copy).versions, "transformers": "3.0.2"})
    Engine.load(copy)
    assert "and was 3.0.2 where the answers were compared" in caplog.text


def rehashed(folder: Path) -> None:
    """Return the artifact with its files' current hashes."""
    from traceserve_runtime.manifest import sha256

    manifest = Manifest.read(folder, verify=False)
    dataclasses.replace(manifest, files={name: sha256(folder / name) for name in manifest.files}).write(folder)


def test_files_that_are_no_checkpoint_are_told(copy: Path) -> None:
    (copy / "config.json").write_text("{}")
    rehashed(copy)
    with pytest.raises(InvalidManifest, match="model.safetensors cannot be loaded by transformers"):
        Engine.load(copy)


def test_missing_weights_are_told(copy: Path) -> None:
    """transformers would initialize them randomly."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    rehashed(copy)
    with pytest.raises(InvalidManifest, match="lacks weights that transformers .* looks for: classifier.weight"):
        Engine.load(copy)


def test_layers_that_this_transformers_does_not_have(copy: Path) -> None:
    runtime = {**Manifest.read(copy).runtime, "in_float32": ["classifier", "bert.old_name"]}
    change(copy, dtype="bfloat16", runtime=runtime)
    with pytest.raises(InvalidManifest, match="does not have: bert.old_name; the archive was made with transformers"):
        Engine.load(copy)


# torch.compile.


def compiling(folder: Path) -> Manifest:
    return change(folder, runtime={**Manifest.read(folder).runtime, "torch_compile": True})


@pytest.fixture()
def small(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that compiles quickly: one layer."""
    monkeypatch.setattr(verification, "TEXTS", SENTENCES[1:3])
    source = checkpoint("distilbert", n_layers=1)
    run_export(tmp_path / "x", {"model_name": str(source), "save_mode": "pretrained", "max_length": 48})
    return tmp_path / "x"


def test_a_compiled_model_answers_alike_at_any_shape(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled once for all shapes, and for one number of threads. (A batch of one row would be compiled
    separately.)"""
    monkeypatch.setattr(team, "enough", lambda cores: float("inf"))  # each run has waited for cores
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    exact = Engine.load(small).runner
    manifest = compiling(small)
    engine = Engine.load(small)
    assert list((tmp_path / "compiled").rglob("*.so"))
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    engine.runner.share_cores()
    for batch, length in ((2, 9), (7, 30), (64, 48), (3, 3)):
        inputs = batches.filled(manifest, batch, length)
        inputs["input_ids"][:, 1:] = np.arange(length - 1) + 5
        inputs["attention_mask"][1, length // 2 :] = 0
        assert engine.runner(inputs)["logits"] == pytest.approx(exact(inputs)["logits"], abs=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted


def test_without_a_compiler_it_is_refused(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiling(small)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    nowhere = {
        "cpp.cxx": (str(tmp_path / "none"),)
    }  # with torch's own patch: pytest's would restore the setting only afterwards
    with torch._inductor.config.patch(nowhere), pytest.raises(MissingPackage) as raised:
        Engine.load(small)
    assert raised.value.message.startswith("this archive asks for torch.compile, which cannot work here: ")
    assert raised.value.message.endswith('install a C++ compiler (g++), or build the archive without "torch_compile"')


# Refusals, before anything is fetched.


@pytest.mark.parametrize(
    "content, words",
    [
        ({"trust_remote_code": True}, "carries no code of a checkpoint into the worker"),
        ({"dtype": "int8"}, 'dtype is "int8": save_mode pretrained has none; take auto, float32, bfloat16'),
        ({"options": {"torch_compile": 1}}, "torch_compile should be true or false, not 1"),
        ({"options": {"opset": 17}}, "save_mode pretrained on cpu has no option opset, but torch_compile"),
        ({"save_mode": "torchscript", "options": {"torch_compile": True}}, "it belongs to pretrained"),
    ],
)
def test_what_is_refused(content: Dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*arguments: Any) -> Any:
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr(sources, "fetch_checkpoint", fetch)
    with pytest.raises(ConfigError) as raised:
        parse_config({"model_name": "nobody/nothing", "save_mode": "pretrained", **content})
    assert words in raised.value.message
