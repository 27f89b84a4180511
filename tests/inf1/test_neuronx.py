"""Inf2 and Trn1: the same, with torch_neuronx."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
from neuron_double import cores
from traceserve.building.attempt import BEFORE_COMPILING
from traceserve.building.exported import Exported
from traceserve.errors import ConfigError, ExportError
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import MissingPackage
from traceserve_runtime.tasks.contract import Answer, Request

CONTENT: Dict[str, Any] = {"hardware": "neuronx", "sequence_lengths": [16, 32], "max_length": 32}


def test_built_and_answered(build: Callable[..., Exported], classifier: Path, tmp_path: Path) -> None:
    manifest = build(CONTENT).manifest
    assert manifest.hardware == "neuronx" and manifest.versions["torch_neuronx"] == "1.13.1.0+double"
    cores.release()
    question = [Request({"text": "Where is my parcel?"})] * 5
    got = Engine.load(tmp_path / "out").answer(question)
    expected = Engine.load(classifier).answer(question)
    for one, other in zip(got, expected):
        assert isinstance(one, Answer) and isinstance(other, Answer)
        assert one.value["label"] == other.value["label"]
        assert one.value["score"] == pytest.approx(other.value["score"], abs=1e-2)


def test_without_a_chip_the_compiler_is_told_of_one(
    build: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEURON_DOUBLE_CORES", "0")
    with pytest.raises(ExportError, match="must be told which one to compile for.*--target"):
        build(CONTENT)
    manifest = build({**CONTENT, "options": {"compiler_args": ["--target", "inf2"]}}).manifest
    assert manifest.receipt["compared"] == BEFORE_COMPILING
    assert manifest.runtime["compiler"]["arguments"] == ["--target", "inf2"]


def test_compile_failure(build: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_DOUBLE_COMPILER", "fails")
    with pytest.raises(ExportError, match="torch_neuronx cannot compile the graph .* neuronx-cc failed"):
        build(CONTENT)


@pytest.mark.parametrize("name", ["compiler_timeout", "least_share"])
def test_what_its_compiler_does_not_have(name: str, build: Callable[..., Exported]) -> None:
    with pytest.raises(ConfigError, match=f"on neuronx has no option {name}"):
        build({**CONTENT, "options": {name: 1}})


def test_without_the_package(build: Callable[..., Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(CONTENT)
    monkeypatch.setitem(sys.modules, "torch_neuronx", None)
    with pytest.raises(MissingPackage, match="compiled for Inf2 and Trn1 and needs torch_neuronx"):
        Engine.load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "traceserve.json").read_text())["hardware"] == "neuronx"
