"""`"dtype": "float16"` on a CPU: the builder rounds weights to float16's numbers, and a worker packs them in it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Set

import pytest
import torch
import transformers
from conftest import graphs_of, needs_halves, run_export
from traceserve.building.checkpoints import loading, sources
from traceserve.building.checkpoints.original import Original
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate import verification
from traceserve.building.gate.findings import Findings
from traceserve.building.gate.reference import Reference
from traceserve.building.gate.texts import SENTENCES
from traceserve.building.writers.lowering import precision
from traceserve.errors import ConfigError
from traceserve.measuring.arithmetic import arithmetic_of
from traceserve_runtime import processor
from traceserve_runtime.engine import Engine
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes import torch_internals
from traceserve_runtime.runtimes.pretrained import is_linear
from traceserve_runtime.runtimes.torchscript.reader import FILLED, UNPADDED
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request

TASK_OF = {
    "bert": "sequence_classification",
    "gpt2": "text_generation",  # its linear layers are of another class
    "llama": "text_generation",
    "t5": "text2text_generation",
}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gate use fewer built-in sentences."""
    monkeypatch.setattr(verification, "CORPUS", 16)


def configured(checkpoint: Callable[..., Path], architecture: str = "bert", **more: Any) -> Dict[str, Any]:
    task = TASK_OF[architecture]
    source = str(checkpoint(architecture, TASKS[task].auto_model))
    return {"model_name": source, "task": task, "max_length": 48, "dtype": "float16", **more}


def load(content: Dict[str, Any], folder: Path) -> Original:
    config, _ = parse_config(content)
    with loading.quiet_transformers():
        return loading.load_original(config, sources.fetch_checkpoint(config, folder), folder)


def is_rounded(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.float32 and torch.equal(weight, weight.half().float())


@pytest.mark.parametrize("architecture", list(TASK_OF))
def test_weights_are_rounded_and_stay_in_float32(
    architecture: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """All else stays: biases, norms, and embeddings that no linear layer shares."""
    original = load(configured(checkpoint, architecture), tmp_path)
    model = next(iter(precision.lowered(original, "float16", SENTENCES, "cpu"))).model
    before = dict(original.model.named_parameters(remove_duplicate=False))
    weights: Set[int] = {id(module.weight) for module in model.modules() if is_linear(module)}
    assert len(weights) > 4
    changed = 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in weights:
            assert is_rounded(parameter.data) and not is_rounded(before[name].data), name
            changed += 1
        else:
            assert torch.equal(parameter, before[name]), name
    assert changed >= len(weights)


def test_more_and_more_layers_are_left(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    original = load(configured(checkpoint), tmp_path)
    tried = list(precision.lowered(original, "float16", SENTENCES[:6], "cpu"))
    names = [name for name, module in original.model.named_modules() if is_linear(module)]
    assert [len(item.kept) for item in tried] == [0, *(round(share * len(names)) for share in precision.KEPT_SHARES)]
    for item in tried:
        for name in names:
            assert is_rounded(item.model.get_submodule(name).weight.data) is (name not in item.kept)


@pytest.mark.parametrize("factor", [1e8, 1e-7], ids=["too large", "too small"])
def test_weights_beyond_the_range_of_float16_are_left(
    factor: float, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    original = load(configured(checkpoint), tmp_path)
    name = "bert.encoder.layer.0.output.dense"
    original.model.get_submodule(name).weight.data *= factor
    before = original.model.get_submodule(name).weight.clone()
    for item in precision.lowered(original, "float16", SENTENCES[:6], "cpu"):
        assert item.kept.count(name) == 1
        assert torch.equal(item.model.get_submodule(name).weight, before)


@needs_halves()
@pytest.mark.parametrize("architecture", list(TASK_OF))
def test_what_is_served_reads_weights_in_float16(
    architecture: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Through the gate; the same answers whether the weights are packed or not."""
    manifest = run_export(tmp_path / "x", configured(checkpoint, architecture)).manifest
    assert manifest == Manifest.read(tmp_path / "x") and manifest.dtype == "float16"
    receipt = manifest.receipt
    assert receipt["passed"] and receipt["limits"]["difference"] == 0.02 and receipt["in_float32"] == []
    assert [row["variant"].split(", ")[-1] for row in receipt["variants"]] == [
        "weights packed",
        "weights mapped",
        "by plain torch.jit.load",
    ]
    assert 0 < receipt["largest_difference"] < 0.02
    # FBGEMM prepares no products: no tokens are added that nobody reads.
    assert manifest.runtime.get(FILLED) == (1 if manifest.runtime[UNPADDED] else None)
    engine = Engine.load(tmp_path / "x")
    graphs = graphs_of(engine)
    assert graphs.count(torch_internals.HALF_PRODUCT) > 4 and torch_internals.PRODUCT not in graphs
    assert "aten::linear(" not in graphs and "aten::addmm(" not in graphs
    mapped = Engine.load(tmp_path / "x", settings=Settings(pack_weights=False))
    asked = [Request({"text": text}, {}) for text in SENTENCES[1:4]]
    for one, other in zip(engine.answer(asked), mapped.answer(asked)):
        assert isinstance(one, Answer) and isinstance(other, Answer)
        assert words(one.value) == words(other.value)


def words(value: Any) -> Any:
    """Return an answer without its numbers."""
    if isinstance(value, dict):
        return {key: words(item) for key, item in value.items() if not isinstance(item, float)}
    return [words(item) for item in value] if isinstance(value, list) else value


def test_a_layer_that_changes_answers_is_left(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reported, and the worker has it as it was."""
    seen = []

    def verify(folder: Path, reference: Reference, *rest: Any) -> Findings:
        found = verification.verify(folder, reference, *rest)
        seen.append(found)
        if len(seen) == 1:
            found.changed = list(range(found.answers))
        return found

    monkeypatch.setattr("traceserve.building.attempt.verify", verify)
    content = configured(checkpoint)
    kept = set(run_export(tmp_path / "x", content).manifest.receipt["in_float32"])
    assert len(seen) == 2 and kept
    original = load(content, tmp_path)
    traced: Any = torch.jit.load(tmp_path / "x/traced_model.pt")  # type: ignore[no-untyped-call]
    layers = {path.split(".", 1)[1]: part for path, part in traced.named_modules() if part.original_name == "Linear"}
    for name, layer in layers.items():
        exact = torch.equal(layer.weight, original.model.get_submodule(name).weight)
        assert (exact, is_rounded(layer.weight.data)) == (name in kept, name not in kept), name


@pytest.mark.parametrize("save_mode", ["pretrained", "onnx", "openvino", "aot_inductor"])
def test_other_save_modes_have_no_weights_of_their_own(save_mode: str) -> None:
    with pytest.raises(ConfigError, match='"float16": it is for save_mode torchscript on cpu; take auto, float32'):
        parse_config({"model_name": "x", "dtype": "float16", "save_mode": save_mode})
    content = {"model_name": "x", "dtype": "float16", "hardware": "gpu", "save_mode": "pretrained"}
    assert parse_config(content)[0].dtype == "float16"


def test_its_products_are_float32s(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """So the machine's peak is measured in float32, where torch would emulate float16."""
    manifest = run_export(tmp_path / "x", configured(checkpoint)).manifest
    told = arithmetic_of(manifest)
    assert told is not None and told.dtype == "float32" and told.token > 0


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processor be one on which `auto` tries it."""
    monkeypatch.setattr(processor, "native", lambda dtype: dtype not in processor.NATIVE)
    monkeypatch.setattr(processor, "halves_are_faster", lambda: True)


def test_auto_takes_it_where_it_is_faster(checkpoint: Callable[..., Path], tmp_path: Path, faster: None) -> None:
    exported = run_export(tmp_path / "x", configured(checkpoint, dtype="auto"))
    assert exported.manifest.dtype == "float16"
    assert [item["dtype"] for item in exported.manifest.receipt["candidates"]] == ["float16"]


def test_auto_leaves_weights_that_are_so_already(checkpoint: Callable[..., Path], tmp_path: Path, faster: None) -> None:
    """They are packed in float16 in a float32 archive too, whose gate is strict."""
    content = configured(checkpoint, dtype="auto")
    half = shutil.copytree(content["model_name"], tmp_path / "half")
    kind = getattr(transformers, TASKS["sequence_classification"].auto_model)
    kind.from_pretrained(half).half().save_pretrained(half)
    exported = run_export(tmp_path / "x", {**content, "model_name": str(half)})
    assert exported.manifest.dtype == "float32"
    assert [item["dtype"] for item in exported.manifest.receipt["candidates"]] == ["float32"]
    assert (
        run_export(tmp_path / "y", {**content, "model_name": str(half), "dtype": "float16"}).manifest.dtype == "float16"
    )
