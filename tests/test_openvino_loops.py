"""The save mode openvino for tasks that write text: variables inside the graph, int8 weights, a worker without torch.

tests/test_loop.py lets texts join and leave, tests/test_matrix.py compares with transformers' generate.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Set

import numpy as np
import pytest
from conftest import ROOT, needs_native, run_export
from safetensors.numpy import load_file
from test_onnx import WITHOUT_TORCH
from traceserve.building import attempt
from traceserve.building.checkpoints import loading, sources
from traceserve.building.config import formats
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate import verification
from traceserve.building.gate.findings import LIMITS, DriftError, TokenCounts
from traceserve.building.gate.texts import SENTENCES
from traceserve.building.writers.lowering import int8 as lowering
from traceserve.building.writers.lowering.int8 import KEPT_SHARES
from traceserve.building.writers.openvino import int8_weights
from traceserve.building.writers.openvino.loops import LoopModels, loop_models
from traceserve.building.writers.openvino.quantizer import layer_of
from traceserve_runtime import processor
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidManifest
from traceserve_runtime.generation.steps import IN_PARTS
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes import openvino
from traceserve_runtime.runtimes.positions import joined_rows
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.generating import Generating

TASK = {"gpt2": "text_generation", "llama": "text_generation", "t5": "text2text_generation"}
Made = Callable[..., Path]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip measuring, and let the gate use few and short texts: a random model's have many near ties."""
    monkeypatch.setattr(Generating, "gate_parameters", {**Generating.gate_parameters, "max_new_tokens": 4})
    monkeypatch.setattr(attempt, "measure_speeds", lambda folders, *rest: dict.fromkeys(folders, 1.0))
    monkeypatch.setattr(verification, "TEXTS", SENTENCES[1:5])


def content(checkpoint: Made, architecture: str, **more: Any) -> Dict[str, Any]:
    task = TASK[architecture]
    source = checkpoint(architecture, TASKS[task].auto_model)
    return {"model_name": str(source), "task": task, "save_mode": "openvino", "max_length": 64, **more}


@pytest.fixture(scope="module")
def folders(checkpoint: Made, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: Dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("openvino") / architecture
            run_export(made[architecture], content(checkpoint, architecture))
        return made[architecture]

    return make


def test_a_worker_that_writes_needs_no_torch(folders: Callable[[str], Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, *(str(folders(name)) for name in ("llama", "t5"))]
    environment = {"PYTHONPATH": str(ROOT / "handlers"), "HOME": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0 and result.stdout == "answered\n", result.stderr
    assert not result.stderr and not list(tmp_path.iterdir())


def test_keys_and_values_stay_in_the_graph(folders: Callable[[str], Path]) -> None:
    """A decoder is one graph, so its weights are there once; only a source's keys and values are handed in."""
    manifest = Manifest.read(folders("llama"))
    assert manifest.runtime == {IN_PARTS: True} and {"model.xml", "model.bin"} <= set(manifest.files)
    core = openvino.core(openvino.library())
    step = core.read_model(str(folders("llama") / "model.xml"))
    assert {port.get_any_name() for port in step.inputs} == {*manifest.step_inputs, "beam_idx"}
    assert [port.get_any_name() for port in step.outputs] == ["logits"] and len(step.get_variables()) == 4
    manifest = Manifest.read(folders("t5"))
    assert manifest.runtime == {"start": "start.xml"} and "start.xml" in manifest.files
    step = core.read_model(str(folders("t5") / "model.xml"))
    names = {port.get_any_name() for port in step.inputs}
    assert names == {*manifest.step_inputs, "beam_idx", "past_4", "past_5", "past_6", "past_7"}


def test_graphs_share_their_weights(checkpoint: Made, folders: Callable[[str], Path]) -> None:
    """The encoder's embeddings are the decoder's, and the head's."""
    manifest = Manifest.read(folders("t5"))
    assert [name for name in manifest.files if name.endswith(".bin")] == ["model.bin"]
    weights = (folders("t5") / "model.bin").read_bytes()
    tensors = load_file(checkpoint("t5", "AutoModelForSeq2SeqLM") / "model.safetensors")
    large = {name: tensor.tobytes() for name, tensor in tensors.items() if tensor.nbytes > 2048}
    assert len(large) > 20 and {name: weights.count(each) for name, each in large.items()} == dict.fromkeys(large, 1)


def test_attention_keeps_them_in_place(folders: Callable[[str], Path]) -> None:
    """OpenVINO joins the variables to attention; otherwise each step would copy all of them."""
    core = openvino.core(openvino.library())
    model = core.read_model(str(folders("llama") / "model.xml"))
    compiled = core.compile_model(model, "CPU", openvino._properties("float32", 2, True))
    nodes = compiled.get_runtime_model().get_ordered_ops()
    kinds = [node.get_rt_info()["layerType"].value for node in nodes if "layerType" in node.get_rt_info()]
    assert kinds.count("ScaledDotProductAttention") == 2 and "MatMul" not in kinds
    [first] = {len(node.inputs()) for node in nodes if "ScaledDotProductAttention" in node.get_friendly_name()}
    assert first >= 7  # query, key, value, mask, rows, and both variables


def test_keys_and_values_have_the_models_precision(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default OpenVINO rounds them to 8 bits."""
    for dtype, expected in (("float32", "f32"), ("bfloat16", "bf16"), ("int8", "f32")):
        assert openvino._properties(dtype, 1, True)["KV_CACHE_PRECISION"] == expected
    engine = Engine.load(folders("llama"))
    ids = np.arange(3, 15)[None].repeat(3, 0)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids - 3}
    _, [kept] = engine.runner.step(inputs, engine.runner.start(inputs))
    assert {each.state.data.dtype for each in kept.take().query_state()} == {np.dtype(np.float32)}


def test_a_state_is_continued_once(folders: Callable[[str], Path]) -> None:
    """A step changes it in place."""
    runner = Engine.load(folders("llama")).runner
    ids = np.arange(3, 9)[None]
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids - 3}
    state = runner.start(inputs)
    runner.step(inputs, state)
    with pytest.raises(RuntimeError, match="continued before"):
        runner.step(inputs, state)


@pytest.mark.parametrize("length", [2, 3, 4, 6])
@pytest.mark.parametrize("shape", [(1, 2, 1, 3), (1, 1)])
def test_rows_are_joined_at_their_ends(length: int, shape: Any) -> None:
    axis = 1 if len(shape) == 2 else 2
    arrays = []
    for rows, positions in ((2, 4), (1, 3)):
        sizes = [rows, *shape[1:]]
        sizes[axis] = positions
        arrays.append(np.random.default_rng(rows).random(sizes))
    joined = joined_rows(arrays, length)
    assert joined.shape[0] == 3 and joined.shape[axis] == length
    for array, own in zip(arrays, (joined[:2], joined[2:])):
        positions = min(length, array.shape[axis])
        end = [slice(None)] * axis
        assert np.array_equal(own[(*end, slice(length - positions, None))], array[(*end, slice(-positions, None))])
        assert not own[(*end, slice(0, length - positions))].any()


def test_an_invalid_archive_is_named(folders: Callable[[str], Path]) -> None:
    folder = folders("t5")
    manifest = Manifest.read(folder)
    with pytest.raises(InvalidManifest, match="runtime.start should name a file"):
        openvino.read(replace(manifest, runtime={"start": "other.xml"}), folder, "cpu")
    with pytest.raises(InvalidManifest, match="does not have the inputs and outputs"):
        openvino.read(replace(manifest, step_inputs=("input_ids",)), folder, "cpu")


# Lower precisions


def test_inputs_are_rounded_where_the_gate_saw_it(
    checkpoint: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on a processor that does not multiply int8, nor of an archive that was built on one."""
    asked: List[int] = []
    compiled = openvino._compiled

    def keep(library: Any, file: Path, weights: Path, properties: Dict[str, Any]) -> Any:
        asked.append(properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        return compiled(library, file, weights, {**properties, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})

    monkeypatch.setattr(openvino, "_compiled", keep)
    for built in ("avx2", "avx512_vnni"):
        monkeypatch.setattr(processor, "features", lambda built=built: frozenset({built}))
        run_export(tmp_path / built, content(checkpoint, "llama", dtype="int8"), allow_drift=True)
        for served in ("avx2", "avx512_vnni"):
            monkeypatch.setattr(processor, "features", lambda served=served: frozenset({served}))
            asked.clear()
            Engine.load(tmp_path / built)
            assert asked == [32 if built == served == "avx512_vnni" else 0], (built, served)


@needs_native("bfloat16")
def test_bfloat16(checkpoint: Made, tmp_path: Path) -> None:
    """Keys and values of groups that join are bfloat16 too."""
    exported = run_export(tmp_path / "x", content(checkpoint, "llama", dtype="bfloat16"), allow_drift=True)
    assert 1e-4 < exported.findings.largest_difference < LIMITS["bfloat16"].difference


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_int8_weights_pass_the_gate(
    architecture: str,
    checkpoint: Made,
    folders: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verification, "TEXTS", SENTENCES[2:3])
    exported = run_export(tmp_path / "x", content(checkpoint, architecture, dtype="int8"))
    manifest = Manifest.read(tmp_path / "x")
    assert manifest.dtype == "int8" and manifest.receipt["passed"] and {"openvino", "nncf"} <= set(manifest.versions)
    assert 1e-5 < exported.findings.largest_difference < LIMITS["int8"].difference
    sizes = [(folder / "model.bin").stat().st_size for folder in (tmp_path / "x", folders(architecture))]
    assert sizes[0] < 0.75 * sizes[1]


def original_of(checkpoint: Made, architecture: str, folder: Path) -> Any:
    config, _ = parse_config(content(checkpoint, architecture))
    with loading.quiet_transformers():
        return loading.load_original(config, sources.fetch_checkpoint(config, folder), folder)


def in_int8(models: LoopModels) -> Set[str]:
    """Return the products and embeddings whose weights are 8 bits."""

    def constant(node: Any) -> Any:
        return node if not node.get_input_size() else constant(node.input_value(0).get_node())

    nodes = [node for model in models[:2] if model is not None for node in model.get_ordered_ops()]
    weights = {"MatMul": 1, "Gather": 0}
    found = [node for node in nodes if node.get_type_name() in weights]
    bits = {
        node.get_friendly_name(): constant(
            node.input_value(weights[node.get_type_name()]).get_node()
        ).get_element_type()
        for node in found
    }
    return {layer_of(name) for name, kind in bits.items() if kind.get_type_name() in ("u8", "i8")}


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_more_and_more_layers_are_left(architecture: str, checkpoint: Made, tmp_path: Path) -> None:
    """All are rounded at first, the embeddings and the head too; a head that is left leaves the embeddings tied to it."""
    original = original_of(checkpoint, architecture, tmp_path)
    steps = list(int8_weights.to_round(original, SENTENCES[1:9]))
    layers = set(int8_weights._layers(original.model))
    assert [len(step.kept) for step in steps] == [round(share * len(layers)) for share in KEPT_SHARES]
    embeddings = {"gpt2": "transformer.wte", "t5": "decoder.embed_tokens"}[architecture]
    for step in (steps[0], replace(steps[-1], kept=(*steps[-1].kept, "lm_head"))):
        models = loop_models(openvino.library(), original, ["logits"])
        rounded = [model and int8_weights.round_weights(model, step) for model in models[:2]]
        found = in_int8(LoopModels(*rounded, models.inputs))
        assert found & layers == layers - {*step.kept}
        assert (embeddings in found) is ("lm_head" not in step.kept)


def test_layers_are_compared_on_a_spread_of_the_texts(
    checkpoint: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own come after the built-in ones."""
    original = original_of(checkpoint, "gpt2", tmp_path)
    lengths: List[int] = []

    def ladder(model: Any, batches: Any, *_: Any) -> Any:
        lengths.extend(batch["input_ids"].shape[1] for batch in batches for _ in batch["input_ids"])
        return iter(())

    monkeypatch.setattr(int8_weights, "ladder", ladder)
    assert not list(int8_weights.to_round(original, ["a"] * 100 + ["a a a a a a a a"] * 156))
    assert len(lengths) == 64 and lengths.count(max(lengths)) == 39


def test_what_changes_too_many_tokens_is_refused(
    checkpoint: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: List[Any] = []
    own = attempt.verify

    def verify(*arguments: Any) -> Any:
        tried.append(own(*arguments))
        tried[-1].along = TokenCounts(texts=4, tokens=100, changed=2)
        return tried[-1]

    monkeypatch.setattr(attempt, "verify", verify)
    monkeypatch.setattr(lowering, "KEPT_SHARES", (0.0, 0.4))
    with pytest.raises(DriftError):
        run_export(tmp_path / "x", content(checkpoint, "llama", dtype="int8"))
    assert len(tried) == 2


def test_auto_writes_in_float32() -> None:
    """Texts change with the first near tie."""
    assert formats.candidates("openvino", "cpu", "auto", TASKS["text_generation"]) == ("float32",)
