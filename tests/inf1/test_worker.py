"""The worker's reader: one core, every graph warm, rows padded and split; and every way in which loading fails."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
import torch
from neuron_double import cores, operator
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidManifest, MissingPackage
from traceserve_runtime.manifest import Manifest, sha256
from traceserve_runtime.tasks.contract import Answer, Request
from transformers import pipeline

from inf1.conftest import LABELS

TEXTS = ["late", "Where is my parcel?", "The train to the coast leaves at nine. " * 2] * 3
HOLD = "import sys; from neuron_double import cores; cores.initialize(); print('held', flush=True); sys.stdin.read()"


def values(engine: Engine, texts: List[str], **parameters: Any) -> List[Any]:
    answers = engine.answer([Request({"text": text}, parameters) for text in texts])
    assert all(isinstance(answer, Answer) for answer in answers), answers
    return [answer.value for answer in answers if isinstance(answer, Answer)]


def test_answers_are_the_pipelines(classifier: Path, checkpoint: Callable[..., Path]) -> None:
    """Nine texts in graphs of one row and of four, each padded to the next length."""
    engine = Engine.load(classifier)
    model = pipeline("text-classification", str(checkpoint("bert", **LABELS)), device=-1)
    for text, answer in zip(TEXTS, values(engine, TEXTS)):
        expected = model(text)[0]
        assert answer["label"] == expected["label"]
        assert answer["score"] == pytest.approx(expected["score"], abs=1e-4)


def test_batches_are_filled_and_split(classifier: Path) -> None:
    engine = Engine.load(classifier)
    stats = Stats()
    engine.answer([Request({"text": text}) for text in TEXTS], stats)
    assert stats.micro_batches >= 3 and stats.rows == 9
    assert stats.padded_tokens > stats.tokens


def test_every_graph_is_warm_when_it_is_loaded(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "_loaded", {})
    Engine.load(classifier)
    assert len(operator._loaded) == 4


def test_a_worker_takes_one_core(classifier: Path) -> None:
    Engine.load(classifier)
    assert cores.owners() == [os.getpid()] and os.environ["NEURON_RT_NUM_CORES"] == "1"


def test_a_worker_takes_the_cores_that_it_is_told(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "1-2")
    Engine.load(classifier)
    assert len(cores.owners()) == 2 and "NEURON_RT_NUM_CORES" not in os.environ


@pytest.fixture
def all_taken() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield
    process.communicate("", timeout=60)


def test_no_free_core(classifier: Path, all_taken: None) -> None:
    with pytest.raises(
        MissingPackage, match=r"no NeuronCore for this worker \(NEURON_RT_NUM_CORES=1\): .*other processes"
    ):
        Engine.load(classifier)


def test_no_chip(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_DOUBLE_CORES", "0")
    with pytest.raises(MissingPackage, match="this machine is no Inf1, or its driver is not loaded"):
        Engine.load(classifier)


def test_no_package(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_neuron", None)
    with pytest.raises(
        MissingPackage, match=r"compiled for Inf1 and needs torch_neuron.* made with torch_neuron 1\.13"
    ):
        Engine.load(classifier)


def test_another_torch(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_DOUBLE_TORCH", "1.9.")
    monkeypatch.delitem(sys.modules, "torch_neuron")
    with pytest.raises(MissingPackage, match="cannot be imported beside torch .*undefined symbol"):
        Engine.load(classifier)


def changed(artifact: Path, folder: Path, module: torch.nn.Module) -> Path:
    """Copy an artifact with another model in it."""
    shutil.copytree(str(artifact), str(folder))
    torch.jit.save(module, str(folder / "traced_model.pt"))
    manifest = Manifest.read(folder, verify=False)
    files = {**manifest.files, "traced_model.pt": sha256(folder / "traced_model.pt")}
    dataclasses.replace(manifest, files=files).write(folder)
    return folder


def test_nothing_for_the_chip(classifier: Path, tmp_path: Path) -> None:
    plain = torch.jit.trace(torch.nn.Identity(), torch.ones(1))
    together = torch.jit.script(torch.nn.ModuleDict({"batch_1_length_16": plain}))
    with pytest.raises(InvalidManifest, match="its graph batch_1_length_16 holds nothing for Inf1"):
        Engine.load(changed(classifier, tmp_path / "plain", together))


def test_a_file_that_is_none(classifier: Path, tmp_path: Path) -> None:
    folder = changed(classifier, tmp_path / "none", torch.jit.trace(torch.nn.Identity(), torch.ones(1)))
    (folder / "traced_model.pt").write_bytes(b"nothing")
    manifest = Manifest.read(folder, verify=False)
    dataclasses.replace(
        manifest, files={**manifest.files, "traced_model.pt": sha256(folder / "traced_model.pt")}
    ).write(folder)
    with pytest.raises(InvalidManifest, match="traced_model.pt cannot be loaded by torch"):
        Engine.load(folder)
