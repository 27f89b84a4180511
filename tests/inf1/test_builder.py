"""From a configuration to an artifact for a chip; and every way in which that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
from conftest import ROOT
from traceserve.building.attempt import BEFORE_COMPILING, COMPILED
from traceserve.building.exported import Exported
from traceserve.building.gate.findings import DriftError
from traceserve.building.writers.neuron.compilers import COMPILERS
from traceserve.errors import ExportError
from traceserve_runtime.manifest import Shapes, sha256

Build = Callable[..., Exported]


def test_what_is_built(build: Build, tmp_path: Path) -> None:
    manifest = build({"options": {"compiler_args": ["-O2"], "compiler_workdir": str(tmp_path / "work")}}).manifest
    assert (manifest.hardware, manifest.dtype, manifest.save_mode) == ("neuron", "bfloat16", "torchscript")
    assert manifest.shapes == Shapes((16, 64), (1, 4), graph_per_shape=True)
    graphs = [manifest.shapes.graph_name(batch, length) for batch in (1, 4) for length in (16, 64)]
    assert manifest.runtime == {"compiler": {"arguments": ["-O2"], "shares": dict.fromkeys(graphs, 1.0)}}
    assert manifest.versions["torch_neuron"] == "1.13.1.0+double"
    assert sorted(os.listdir(tmp_path / "work")) == sorted(graphs)
    shared = ["golden.json", "model-config.yaml", "tokenizer.json"]
    assert sorted(manifest.files) == [*shared, "traced_model.pt"]  # no mapped weights


def test_it_is_compared_before_and_after_compiling(build: Build) -> None:
    receipt = build().manifest.receipt
    assert receipt["compared"] == COMPILED and 1e-4 < receipt["largest_difference"] < 0.1
    before = receipt["before_compiling"]
    assert before["compared"] == BEFORE_COMPILING and before["passed"] and before["largest_difference"] < 1e-4
    assert before["answers_changed"] == 0 and receipt["lengths"] == [16, 64]


def test_without_a_core_it_is_compared_before_compiling(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_DOUBLE_CORES", "0")
    receipt = build().manifest.receipt
    assert receipt["compared"] == BEFORE_COMPILING and "before_compiling" not in receipt


@pytest.mark.parametrize(
    "switches, options, words",
    [
        (
            {"COMPILER": "fails"},
            {},
            "No operations were successfully partitioned.*its log ends with: Compiler status ERROR",
        ),
        ({"COMPILER": "places nothing"}, {}, "gave the graph batch_1_length_64 back with nothing in it for Inf1"),
        ({"COMPILER": "share=0.8"}, {}, "placed 80% of the graph .* and 20% of its operators would run on the CPU"),
        ({"COMPILER": "share=0.8"}, {"least_share": 0.81}, "least_share asks for 81%"),
        ({"SECONDS": "20"}, {"compiler_timeout": 1}, "did not compile the graph .* within 1 s; .* compiler_timeout"),
    ],
)
def test_what_the_compiler_does_not_do(
    switches: Dict[str, str], options: Dict[str, Any], words: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in switches.items():
        monkeypatch.setenv(f"NEURON_DOUBLE_{name}", value)
    with pytest.raises(ExportError, match=words):
        build({"sequence_lengths": "fixed", "options": options})


def test_a_lower_share_may_be_allowed(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_DOUBLE_COMPILER", "share=0.8")
    manifest = build({"sequence_lengths": "fixed", "options": {"least_share": 0.75, "batch_sizes": [2]}}).manifest
    assert manifest.runtime["compiler"]["shares"] == {"batch_2_length_64": pytest.approx(0.8, abs=0.01)}


def test_what_differs_on_the_chip_is_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_DOUBLE_NOISE", "0.3")
    with pytest.raises(DriftError) as raised:
        build({"sequence_lengths": "fixed"})
    assert raised.value.findings.compared["compared"] == COMPILED and raised.value.findings.failed


def test_without_the_package(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_neuron", None)
    with pytest.raises(ExportError, match='"hardware": "neuron" is compiled by the package torch_neuron, which cannot'):
        build({"model_name": "not/there"})  # before anything is downloaded


def test_with_another_torch(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_DOUBLE_TORCH", "1.9.")
    monkeypatch.delitem(sys.modules, "torch_neuron")
    with pytest.raises(ExportError, match="cannot be imported beside torch .*undefined symbol.*inferentia.md"):
        build()


def test_lengths_are_left_out_until_the_graphs_fit(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = build({"sequence_lengths": "fixed"}).parameters
    monkeypatch.setitem(COMPILERS, "neuron", COMPILERS["neuron"]._replace(weights=3 * parameters))
    assert build().manifest.shapes.lengths == (64,)
    with pytest.raises(ExportError, match="4 graphs .batch 1, 4, length 16, 64. .* which has memory for 3; set fewer"):
        build({"sequence_lengths": [16, 64]})


def test_the_command_tells_what_was_compared(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes, so that two builds are seen to be equal too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEURON_DOUBLE_CORES", "0")
    monkeypatch.setenv("COLUMNS", "200")
    content = {"model_name": str(checkpoint("bert")), "hardware": "neuron", "max_length": 16, "sequence_lengths": [16]}
    Path("setup_config.json").write_text(json.dumps(content))
    command = [sys.executable, "-m", "traceserve", "build", "--output", "artifacts/one", "--force"]
    built = [
        (
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout,
            sha256(tmp_path / "model_store/one.mar"),
        )
        for _ in range(2)
    ]
    printed = built[0][0]
    assert "100.0% of each graph or more" in printed
    assert f"the {BEFORE_COMPILING}: no chip is at hand here, so these were never run" in printed
    assert built[0][1] == built[1][1]


def test_the_documentation_has_every_option() -> None:
    page = (ROOT / "docs" / "inferentia.md").read_text(encoding="utf-8")
    from traceserve.building.config.formats import options

    assert all(f"`{name}`" in page for name in options("torchscript", "neuron"))
