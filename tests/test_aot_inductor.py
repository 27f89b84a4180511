"""The save mode aot_inductor: compiled, equal to the original, and refused where it would end the process."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict

import pytest
import torch
from conftest import run_export
from traceserve import cli
from traceserve.building.checkpoints import loading, sources
from traceserve.building.config.parsing import parse_config
from traceserve.building.config.save_modes import Target
from traceserve.building.gate import verification
from traceserve.building.gate.texts import SENTENCES
from traceserve.building.writers import aot_inductor
from traceserve.errors import ConfigError, ExportError
from traceserve_runtime import processor
from traceserve_runtime.batching.batches import filled
from traceserve_runtime.engine import NO_GRADIENTS, Engine
from traceserve_runtime.errors import InvalidManifest, MissingPackage
from traceserve_runtime.manifest import Manifest, Shapes, sha256
from traceserve_runtime.runtimes import aot_inductor as reader
from traceserve_runtime.runtimes import team
from traceserve_runtime.runtimes.aot_inductor import INSTRUCTIONS, MACHINE, TORCH
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request

if not shutil.which("g++"):
    pytest.skip("there is no C++ compiler", allow_module_level=True)

LABELS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}


@pytest.fixture(scope="module")
def compiled(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a tiny one-layer classifier: compiling is slow."""
    folder = tmp_path_factory.mktemp("compiled") / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("traceserve.building.attempt.measure_speeds", lambda folders, *rest: dict.fromkeys(folders, 1.0))
        run_export(folder, content(checkpoint), gradients=True)
    return folder


def content(checkpoint: Callable[..., Path]) -> Dict[str, Any]:
    source = str(checkpoint("bert", **LABELS, num_hidden_layers=1))
    return {"model_name": source, "task": "sequence_classification", "max_length": 32, "save_mode": "aot_inductor"}


def test_it_answers_as_the_original(compiled: Path) -> None:
    """The gate compared every batch and length; together and alone the answers are equal."""
    engine = Engine.load(compiled, settings=Settings(threads=1))
    receipt = engine.manifest.receipt
    assert receipt["passed"] and not receipt["answers_changed"] and receipt["largest_difference"] < 1e-5
    assert engine.manifest.shapes.lengths is None and receipt["batches"] == [1, 2, 5]
    requests = [Request({"text": text}, {"top_k": None}) for text in SENTENCES[1:9]]
    for request, together in zip(requests, engine.answer(requests)):
        [alone] = engine.answer([request])
        assert isinstance(alone, Answer) and isinstance(together, Answer)
        assert engine.task.same(alone.value, together.value)


def test_it_tells_what_it_was_compiled_for(compiled: Path) -> None:
    runtime = Manifest.read(compiled).runtime
    assert runtime == {
        TORCH: torch.__version__,
        MACHINE: platform.machine(),
        INSTRUCTIONS: sorted(processor.instructions()),
        NO_GRADIENTS: "save mode aot_inductor has none",
    }
    assert {path.name for path in compiled.iterdir()} == {"traceserve.json", *Manifest.read(compiled).files}


@pytest.mark.parametrize("named", [True, False])
def test_nothing_of_it_stays_in_the_temporary_folder(
    named: bool, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is killed could not remove what torch unpacked; and it answers at other shapes without that."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if named:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
    else:
        monkeypatch.delenv("TMPDIR", raising=False)
    before = dict(os.environ), set(Path("/tmp").glob("aotinductor_*"))
    engine = Engine.load(compiled)
    assert not [*tmp_path.glob("aotinductor_*"), *tmp_path.glob("traceserve-*")]
    assert (os.environ.get("TMPDIR"), set(Path("/tmp").glob("aotinductor_*"))) == (before[0].get("TMPDIR"), before[1])
    for count in (1, 3, 7):
        answers = engine.answer([Request({"text": "boat " * count}) for _ in range(count)])
        assert all(isinstance(answer, Answer) for answer in answers)


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="the system does not say so")
def test_a_temporary_folder_where_no_code_may_run_is_named(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_flag=os.ST_NOEXEC))
    with pytest.raises(
        MissingPackage, match=re.escape(f"the temporary folder {tmp_path}, and no code may run")
    ) as found:
        Engine.load(compiled)
    assert "set TMPDIR to a folder" in found.value.message


def test_the_same_bytes_each_time(compiled: Path, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    config, _ = parse_config({"dtype": "float32", **content(checkpoint)})
    with loading.quiet_transformers():
        original = loading.load_original(config, sources.fetch_checkpoint(config, tmp_path), tmp_path)
    aot_inductor.write(original, TASKS[config.task], Shapes(), tmp_path, Target("cpu", {}))
    assert (tmp_path / "model.pt2").read_bytes() == (compiled / "model.pt2").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt2"}


def claim(patch: pytest.MonkeyPatch, folder: Path, features: str) -> None:
    (folder / "cpuinfo").write_text(f"flags\t\t: {features}\n")
    patch.setattr(processor, "CPUINFO", folder / "cpuinfo")


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbid loading: code with unknown instructions ends the process."""

    def load(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the code was loaded")

    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)


def changed(folder: Path, tmp_path: Path, **runtime: Any) -> Path:
    """Copy with a changed compile target in the manifest."""
    shutil.copytree(folder, tmp_path / "x")
    manifest = Manifest.read(folder)
    dataclasses.replace(manifest, runtime={**manifest.runtime, **runtime}).write(tmp_path / "x")
    return tmp_path / "x"


def test_a_processor_with_less_is_refused_before_anything_is_loaded(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unloaded: None
) -> None:
    claim(monkeypatch, tmp_path, "fpu sse2 avx2")
    folder = changed(compiled, tmp_path, **{INSTRUCTIONS: ["avx2", "avx512f", "sse2"]})
    with pytest.raises(MissingPackage, match="it lacks avx512f; build it on a machine like the one that serves"):
        Engine.load(folder)


def test_a_processor_with_more_is_not(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, tmp_path, " ".join(["fpu", "amx_new", *processor.features()]))
    Engine.load(compiled)


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ({MACHINE: "pdp11"}, f"for a pdp11 processor .* it is {platform.machine()}"),
        ({TORCH: "1.0.0+cpu"}, f"compiled for torch 1.0.0.cpu; this is {torch.__version__[:4]}"),
    ],
)
def test_another_machine_or_torch_is_refused(
    runtime: Dict[str, Any], words: str, compiled: Path, tmp_path: Path, unloaded: None
) -> None:
    with pytest.raises(MissingPackage, match=words):
        Engine.load(changed(compiled, tmp_path, **runtime))


def test_the_same_torch_of_another_build_is_not(compiled: Path) -> None:
    manifest = Manifest.read(compiled)
    reader._check(manifest, torch.__version__.split("+")[0] + "+other")


@pytest.mark.parametrize("runtime", [{TORCH: None}, {MACHINE: 1}, {INSTRUCTIONS: "avx2"}])
def test_a_manifest_that_no_writer_wrote(
    runtime: Dict[str, Any], compiled: Path, tmp_path: Path, unloaded: None
) -> None:
    with pytest.raises(InvalidManifest, match="which this was compiled for"):
        Engine.load(changed(compiled, tmp_path, **runtime))


def test_a_file_that_is_no_package(compiled: Path, tmp_path: Path) -> None:
    folder = changed(compiled, tmp_path)
    (folder / "model.pt2").write_bytes(b"nothing")
    manifest = Manifest.read(folder, verify=False)
    dataclasses.replace(manifest, files={**manifest.files, "model.pt2": sha256(folder / "model.pt2")}).write(folder)
    with pytest.raises(InvalidManifest, match="model.pt2 cannot be loaded by torch"):
        Engine.load(folder)


def test_what_waits_for_cores_runs_on_fewer(compiled: Path, two_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "enough", lambda cores: float("inf"))  # each run has waited
    engine = Engine.load(compiled)
    engine.runner.share_cores()
    inputs = filled(engine.manifest, 2, 9)
    first, *others = (engine.runner(inputs)["logits"] for _ in range(4))
    assert torch.get_num_threads() == 1
    for other in others:
        assert other == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads: int, compiled: Path) -> None:
    before = torch.get_num_threads()
    try:
        Engine.load(compiled, settings=Settings(threads=threads))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_missing_compiler_is_told_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(*arguments: Any) -> Any:
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr(sources, "fetch_checkpoint", fetch)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.chdir(tmp_path)
    Path("setup_config.json").write_text(json.dumps({"model_name": "nobody/nothing", "save_mode": "aot_inductor"}))
    assert cli.main(["export"]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "no-such-compiler is not on the PATH" in said and "CXX" in said


def test_an_old_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(ExportError, match="needs torch 2.6 or newer; this is 2.5.1"):
        aot_inductor.check("float32", Target("cpu", {}))


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_models_that_are_run_in_a_loop_are_refused(task: Any) -> None:
    config = {"model_name": "x/y", "save_mode": "aot_inductor", "task": task.name}
    if not task.loop:
        assert parse_config(config)
        return
    with pytest.raises(ConfigError, match=f"aot_inductor is for models that are run once, not for {task.name}; take"):
        parse_config(config)


def test_what_cannot_be_compiled_is_told(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise torch._dynamo.exc.UserError(torch._dynamo.exc.UserErrorType.DYNAMIC_CONTROL_FLOW, "a branch\non values")

    monkeypatch.setattr(torch.export, "export", refuse)
    monkeypatch.setattr(verification, "CORPUS", 0)
    with pytest.raises(
        ExportError,
        match="AOTInductor cannot compile BertForSequenceClassification: a branch; try save_mode torchscript",
    ):
        run_export(tmp_path / "x", content(checkpoint))
