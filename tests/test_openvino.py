"""The save mode openvino: every task that runs once through OpenVINO, and a worker without torch."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Set

import numpy as np
import pytest
from conftest import ROOT, needs_native, run_export
from test_onnx import KINDS, LABELS, WITHOUT_TORCH, values
from traceserve import cli
from traceserve.building import attempt
from traceserve.building.checkpoints import loading, sources
from traceserve.building.config import formats
from traceserve.building.config.parsing import parse_config
from traceserve.building.config.save_modes import Target
from traceserve.building.gate import verification
from traceserve.building.gate.findings import LIMITS, DriftError
from traceserve.building.gate.texts import SENTENCES, calibration
from traceserve.building.writers import WRITERS
from traceserve.building.writers.lowering import int8 as lowering
from traceserve.building.writers.lowering import precision
from traceserve.building.writers.lowering.int8 import KEPT_SHARES, ladder
from traceserve.building.writers.lowering.sensitivity import linears
from traceserve.building.writers.openvino import int8, writer
from traceserve.building.writers.openvino.weights import save_models
from traceserve.errors import ExportError, UnwritableError
from traceserve_runtime import processor
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidManifest, MissingPackage
from traceserve_runtime.manifest import Manifest, Shapes
from traceserve_runtime.runtimes import openvino
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Request

FAMILIES = ("classification", "modernbert", "deberta", "fixed")  # tests/test_matrix.py has every task
Maker = Callable[[str], Path]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip measuring, and let the gate use fewer sentences."""
    monkeypatch.setattr(
        "traceserve.building.attempt.measure_speeds", lambda folders, *rest: dict.fromkeys(folders, 1.0)
    )
    monkeypatch.setattr(verification, "CORPUS", 32)
    monkeypatch.setattr(verification, "TEXTS", SENTENCES[1:10])


@pytest.fixture(scope="module")
def made(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """A kind's artifact, exported once; the gate compared it with the original."""
    known: Dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in known:
            kind = KINDS[name]
            source = checkpoint(kind.architecture, TASKS[kind.task].auto_model, **kind.options)
            content = {"model_name": str(source), "task": kind.task, "max_length": 32, "save_mode": "openvino"}
            folder = tmp_path_factory.mktemp("openvino") / "x"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(verification, "TEXTS", SENTENCES[1:10])
                patch.setattr(
                    "traceserve.building.attempt.measure_speeds", lambda folders, *rest: dict.fromkeys(folders, 1.0)
                )
                run_export(folder, {**content, **kind.config})
            known[name] = folder
        return known[name]

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_it_answers_as_the_original(made: Maker, name: str) -> None:
    """The gate compared outputs and answers; together and alone they are equal."""
    engine = Engine.load(made(name))
    receipt = engine.manifest.receipt
    assert receipt["passed"] and not receipt["answers_changed"]
    assert receipt["largest_difference"] < 1e-5 and receipt["answers"] > 1 and receipt["cells"] > 8
    for one, other in zip(values(engine, True), values(engine, False)):
        assert engine.task.same(one, other)


def test_any_shape_and_fixed_lengths(made: Maker) -> None:
    assert Manifest.read(made("classification")).shapes.lengths is None
    assert Manifest.read(made("fixed")).shapes.lengths == (16, 32)


def test_a_worker_needs_openvino_tokenizers_and_numpy(made: Maker, tmp_path: Path) -> None:
    """And reports nothing to anybody: OpenVINO's telemetry sends at import, and marks the user's home."""
    code = WITHOUT_TORCH.replace(
        'print("answered")',
        'assert "openvino" in sys.modules and sys.modules["openvino_telemetry"] is None; print("answered")',
    )
    command = [sys.executable, "-c", code, *(str(made(name)) for name in ("classification", "fixed"))]
    environment = {"PYTHONPATH": str(ROOT / "handlers"), "HOME": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0 and result.stdout == "answered\n", result.stderr
    assert not result.stderr and not list(tmp_path.iterdir())


def test_the_builder_reports_nothing_either(made: Maker) -> None:
    """Conversion would too."""
    made("classification")
    assert "openvino.tools.ovc" in sys.modules and sys.modules["openvino_telemetry"] is None


def test_threads_and_precision(made: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 is not lowered on a processor with bfloat16; a worker's threads are its setting's, else its cores."""
    seen: List[Dict[str, Any]] = []
    own = openvino._properties

    def keep(dtype: str, threads: Any, loops: bool) -> Dict[str, Any]:
        seen.append(own(dtype, threads, loops))
        return seen[-1]

    monkeypatch.setattr(openvino, "_properties", keep)
    folder = made("classification")
    manifest = Manifest.read(folder)
    library = openvino.library()
    core = openvino.core(library)
    for threads, expected in ((1, 1), (None, processor.cores())):
        openvino.read(manifest, folder, "cpu", Settings(threads=threads))
        compiled = core.compile_model(core.read_model(str(folder / "model.xml")), "CPU", seen[-1])
        assert compiled.get_property("INFERENCE_NUM_THREADS") == expected
        assert compiled.get_property("INFERENCE_PRECISION_HINT") == library.Type.f32
        assert not compiled.get_property("ENABLE_CPU_PINNING") and compiled.get_property("NUM_STREAMS") == 1


@pytest.mark.parametrize("loops", [False, True])
def test_what_is_kept_for_each_shape_is_limited(loops: bool) -> None:
    """By OpenVINO's default a worker grows for as long as batches and lengths are new."""
    assert openvino._properties("bfloat16", 1, loops)["CPU_RUNTIME_CACHE_CAPACITY"] == 256


def test_threads_of_one_process_take_turns(made: Maker) -> None:
    """OpenVINO refuses a second run of a request that runs."""
    from concurrent.futures import ThreadPoolExecutor

    engine = Engine.load(made("classification"))
    ids = np.ones((16, 32), dtype=np.int64)
    columns = dict.fromkeys(engine.manifest.inputs, ids)
    expected = engine.runner(columns)["logits"]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(engine.runner, [columns] * 64):
            assert np.array_equal(found["logits"], expected)


def test_outputs_are_not_overwritten(made: Maker) -> None:
    """By the next run, whose outputs OpenVINO puts into the same memory."""
    engine = Engine.load(made("classification"))
    rows = [np.full((1, 8), number, dtype=np.int64) for number in (1, 2)]
    first, second = (
        engine.runner({"input_ids": ids, "attention_mask": rows[0], "token_type_ids": 0 * ids})["logits"]
        for ids in rows
    )
    assert not np.array_equal(first, second)


@needs_native("bfloat16")
def test_bfloat16(checkpoint: Callable[..., Path], tmp_path: Path, quick: None) -> None:
    """Its weights take two bytes; it is not float32 under another name."""
    source = str(checkpoint("bert", **LABELS))
    for dtype in ("float32", "bfloat16"):
        content = {"model_name": source, "max_length": 32, "save_mode": "openvino", "dtype": dtype}
        run_export(tmp_path / dtype, content, allow_drift=True)
    exact, lower = (Manifest.read(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    assert 1e-4 < lower.receipt["largest_difference"] < 0.1 and exact.receipt["largest_difference"] < 1e-5
    sizes = [(tmp_path / dtype / "model.bin").stat().st_size for dtype in ("float32", "bfloat16")]
    assert 0.45 < sizes[1] / sizes[0] < 0.6


def test_what_openvino_cannot_compute_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "supported", lambda library, dtype: False)
    with pytest.raises(ExportError, match="does not compute in bfloat16 on this processor"):
        writer.check("bfloat16", Target("cpu", {}))


def test_a_missing_package_is_named(made: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made("classification")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingPackage, match="pip install openvino$"):
        Engine.load(folder)
    with pytest.raises(ExportError, match=r"pip install 'traceserve\[openvino\]'"):
        writer.check("float32", Target("cpu", {}))


def test_another_device_is_refused(made: Maker) -> None:
    with pytest.raises(MissingPackage, match="device cuda:0.*runs on the CPU"):
        Engine.load(made("classification"), "cuda:0")


def test_an_invalid_file_is_named(made: Maker) -> None:
    folder = made("classification")
    manifest = Manifest.read(folder)
    from dataclasses import replace

    with pytest.raises(InvalidManifest, match="tokenizer.json cannot be loaded by openvino 20"):
        openvino.read(replace(manifest, model_file="tokenizer.json"), folder, "cpu")
    with pytest.raises(InvalidManifest, match="does not have the inputs and outputs"):
        openvino.read(replace(manifest, inputs=("input_ids",)), folder, "cpu")


def test_a_model_that_cannot_be_converted(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An operator that OpenVINO does not know."""
    import torch
    from transformers.models.bert import modeling_bert

    own = modeling_bert.BertPooler.forward

    def forward(self: Any, states: Any) -> Any:
        return own(self, torch.special.bessel_j0(states))

    monkeypatch.setattr(modeling_bert.BertPooler, "forward", forward)
    config = tmp_path / "setup_config.json"
    source = checkpoint("bert", **LABELS)
    config.write_text(f'{{"model_name": "{source}", "max_length": 16, "save_mode": "openvino", "dtype": "float32"}}')
    root = logging.getLogger()
    before = root.level, list(root.filters)
    assert cli.main(["export", "--config", str(config), "--output", str(tmp_path / "x")]) == 1
    assert (root.level, root.filters) == before
    told = capsys.readouterr().err
    assert "OpenVINO cannot convert BertForSequenceClassification: " in told and "bessel" in told
    assert "try save_mode torchscript or pretrained or onnx or aot_inductor" in told


def test_matrices_alone_are_halved(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The frequencies of rotary embeddings stay in float32: their error grows with the position."""
    library = openvino.library()
    task = TASKS["sequence_classification"]
    model = writer.converted(library, loaded(checkpoint("modernbert", **LABELS), tmp_path / "original"), task, Shapes())
    save_models(library, {"model.xml": model, "again.xml": model}, tmp_path, halved=True)
    for file in ("model.xml", "again.xml"):
        read = openvino.core(library).read_model(str(tmp_path / file), str(tmp_path / "model.bin"))
        constants = [node for node in read.get_ordered_ops() if node.get_type_name() == "Constant"]
        kinds = {"f16": 0, "f32": 0}
        for node in constants:
            kind = node.get_element_type().get_type_name()
            if kind in kinds:
                kinds[kind] += 1
                assert (kind == "f16") is (len([size for size in node.shape if size > 1]) > 1), node
        assert min(kinds.values()) > 4
        values = {node.data.tobytes() for node in constants if node.get_element_type() == library.Type.f32}
        originals = [node.data for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
        vectors = {each.tobytes() for each in originals if each.dtype == np.float32 and each.size in each.shape}
        assert vectors and vectors <= values


# int8


def loaded(checkpoint: Path, folder: Path) -> Any:
    config, _ = parse_config({"model_name": str(checkpoint), "task": "sequence_classification"})
    with loading.quiet_transformers():
        return loading.load_original(config, sources.fetch_checkpoint(config, folder), folder)


@pytest.fixture(scope="module")
def original(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loaded(checkpoint("bert", **LABELS), tmp_path_factory.mktemp("original"))


def in_int8(model: Any) -> Set[str]:
    """Return the linear layers of an OpenVINO model whose weights are int8."""

    def constant(node: Any) -> Any:
        return node if node.get_type_name() == "Constant" else constant(node.input_value(0).get_node())

    products = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    int8_products = [
        node.get_friendly_name()
        for node in products
        if "FakeQuantize" in node.input_value(0).get_node().get_type_name()
        and constant(node.input_value(1).get_node()).get_element_type().get_type_name() == "i8"
    ]
    return {name[len("__module.model.") :].split("/")[0] for name in int8_products}


def test_more_and_more_layers_are_left_by_the_common_ladder(original: Any) -> None:
    inside = {name for name in linears(original.model) if name.startswith("bert.")}
    steps = list(int8.to_calibrate(original, SENTENCES[1:10]))
    assert [len(step.kept) for step in steps] == [round(share * len(inside)) for share in KEPT_SHARES]
    for step in (steps[0], steps[-1]):
        assert step.model is original.model and step.dtype == "int8"
        model = writer.converted(openvino.library(), original, TASKS["sequence_classification"], Shapes())
        assert in_int8(int8.quantize_statically(model, step)) == inside - {*step.kept}  # and never the head


def test_only_linear_layers_are_quantized(original: Any) -> None:
    """Attention is computed in float32: its queries and keys are not rounded, as NNCF would."""
    model = writer.converted(openvino.library(), original, TASKS["sequence_classification"], Shapes())
    assert "ScaledDotProductAttention" in {node.get_type_name() for node in model.get_ordered_ops()}
    [first, *_] = int8.to_calibrate(original, SENTENCES[1:10])
    model = int8.quantize_statically(model, first)
    rounded = [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]
    readers = {port.get_node().get_type_name() for node in rounded for port in node.output(0).get_target_inputs()}
    assert rounded and readers == {"MatMul"}


def test_ranges_come_from_more_texts_than_the_measured_change(original: Any) -> None:
    """Channels that are large in few texts only would be clipped; the change is measured on a spread of them."""
    kind = TASKS["sequence_classification"]
    texts = calibration(kind, [Request({"text": f"number {i}"}) for i in range(1000)], WRITERS["openvino"].most_texts)
    measured: List[int] = []
    with pytest.MonkeyPatch.context() as patch:
        own = int8.ladder

        def ladder(model: Any, batches: Any, layer: Any) -> Any:
            measured.append(sum(len(batch["input_ids"]) for batch in batches))
            return own(model, batches, layer)

        patch.setattr(int8, "ladder", ladder)
        [first, *_] = int8.to_calibrate(original, texts)
    seen = sum(len(batch["input_ids"]) for batch in first.calibration)
    assert 200 < seen <= 256 and 32 <= measured[0] <= 64


def test_a_step_without_layers_left_measures_none(original: Any) -> None:
    """Which takes longer than quantizing."""
    measured: List[str] = []

    def layer(linear: Any, largest: Any) -> Any:
        measured.append("")
        return linear

    steps = ladder(original.model, precision.inputs_of(original, SENTENCES[1:4]), layer)
    assert next(steps)[1] == () and not measured
    assert next(steps)[1] and measured


def test_a_graph_that_does_not_name_its_layers_is_refused(original: Any) -> None:
    model = writer.converted(openvino.library(), original, TASKS["sequence_classification"], Shapes())
    for node in model.get_ordered_ops():
        node.set_friendly_name(node.get_friendly_name().replace("__module", "other"))
    [first, *_] = int8.to_calibrate(original, SENTENCES[1:4])
    with pytest.raises(ExportError, match="does not name its linear layers"):
        int8.quantize_statically(model, first)


def test_what_the_reader_refuses_is_for_another_save_mode(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(*arguments: Any) -> Any:
        raise InvalidManifest("model.xml cannot be loaded by openvino: no such operator")

    monkeypatch.setattr(attempt, "verify", verify)
    content = {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 32, "save_mode": "openvino"}
    with pytest.raises(UnwritableError, match="no such operator; try save_mode torchscript or "):
        run_export(tmp_path / "x", {**content, "dtype": "float32"})


def test_a_classifier_of_mbart_is_written(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """It looks for its first token by a squeeze without an axis."""
    content = {"model_name": str(checkpoint("mbart", **LABELS)), "max_length": 32, "save_mode": "openvino"}
    run_export(tmp_path / "x", {**content, "dtype": "float32"})


@needs_native("int8")
def test_the_closest_of_all_steps_is_reported(
    checkpoint: Callable[..., Path], tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the same model: only the layers that they leave differ."""
    found: List[Any] = []
    own = attempt.verify

    def verify(*arguments: Any) -> Any:
        found.append(own(*arguments))
        found[-1].cells, found[-1].changed = [], [0] * (9 - len(found))  # fewer with each step
        return found[-1]

    monkeypatch.setattr(attempt, "verify", verify)
    monkeypatch.setattr(lowering, "KEPT_SHARES", (0.0, 0.4))
    content = {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 32, "save_mode": "openvino"}
    with pytest.raises(DriftError) as raised:
        run_export(tmp_path / "x", {**content, "dtype": "int8"})
    assert len(found) == 2 and raised.value.findings is found[-1]


def test_int8_is_refused_before_it_is_calibrated(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx2"}))
    content = {"model_name": str(checkpoint("bert", **LABELS)), "save_mode": "openvino", "dtype": "int8"}
    with pytest.raises(ExportError, match="int8 needs a processor with one of .*this one has none"):
        run_export(tmp_path / "x", content)


@needs_native("int8")
def test_int8_answers(
    checkpoint: Callable[..., Path], tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by a processor on which its sums overflow."""
    monkeypatch.setattr(lowering, "KEPT_SHARES", (0.0,))
    content = {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 32, "save_mode": "openvino"}
    run_export(tmp_path / "x", {**content, "dtype": "int8"}, allow_drift=True)
    manifest = Manifest.read(tmp_path / "x")
    assert manifest.dtype == "int8" and {"openvino", "nncf"} <= set(manifest.versions)
    assert 1e-5 < manifest.receipt["largest_difference"] < LIMITS["int8"].difference
    assert len(values(Engine.load(tmp_path / "x"), True)) > 1
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx2"}))
    with pytest.raises(
        MissingPackage, match='int8 needs a processor with one of .*build the archive with "dtype": "float32"'
    ):
        Engine.load(tmp_path / "x")


@pytest.mark.parametrize(
    "features, installed, expected",
    [
        ({"avx512_bf16", "avx512_vnni"}, True, ("bfloat16", "float32")),
        ({"avx512_vnni"}, True, ("int8", "float32")),
        ({"avx512_vnni"}, False, ("float32",)),
        ({"avx2"}, True, ("float32",)),
    ],
)
def test_auto_follows_processor_and_packages(
    features: Set[str], installed: bool, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "features", lambda: frozenset(features))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    assert formats.candidates("openvino", "cpu", "auto", TASKS["fill_mask"]) == expected


DROPPED = """
import gc, signal, sys, threading
from pathlib import Path
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes import openvino

def load():
    folder = Path(sys.argv[1])
    return openvino.read(Manifest.read(folder), folder, "cpu")

first, second = load(), load()
del first
gc.collect()
del second
gc.collect()
kept = [load()]
thread = threading.Thread(target=kept.clear)
thread.start()
thread.join()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="OpenVINO gives signals another stack on Linux alone")
def test_a_signal_after_models_that_are_gone(made: Maker) -> None:
    """OpenVINO leaves the thread a stack for signals that it has unmapped: an interrupt would end the process."""
    command = [sys.executable, "-c", DROPPED, str(made("classification"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "handlers")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout) == (0, "interrupted\n"), result.stderr


def test_a_missing_nncf_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ExportError, match=r"pip install 'traceserve\[openvino\]'.*nncf"):
        writer.check("int8", Target("cpu", {}))
