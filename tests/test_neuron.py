"""AWS Neuron on a machine without any of it: refusals, and the graphs before compilation.

Tests that need the doubles of torch_neuron are in tests/inf1.
"""

from __future__ import annotations

import json
import stat
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
from conftest import ROOT, nothing
from traceserve.building.checkpoints import loading, sources
from traceserve.building.checkpoints.original import Original
from traceserve.building.config import parsing
from traceserve.building.config.formats import options, target
from traceserve.building.config.hardware import HARDWARE
from traceserve.building.config.setup_config import SetupConfig
from traceserve.building.gate.loops import generate_original
from traceserve.building.writers import WRITERS
from traceserve.building.writers.neuron import compilers
from traceserve.errors import ConfigError, ExportError, ServerError
from traceserve.machine import neuron_cores
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import MissingPackage
from traceserve_runtime.generation.loop import Member, WritingLoop
from traceserve_runtime.generation.scores import GenerationSettings
from traceserve_runtime.generation.search import search_for
from traceserve_runtime.manifest import Manifest, Shapes, sealed
from traceserve_runtime.runtimes.torchscript.neuron import CHIPS, operators
from traceserve_runtime.tasks import TASKS

CHIP = pytest.mark.parametrize("hardware", list(CHIPS))


def parsed(**content: Any) -> SetupConfig:
    return parsing.parse_config(
        {"model_name": "x", "task": "sequence_classification", "hardware": "neuron", **content}
    )[0]


@CHIP
def test_a_growing_past_has_no_fixed_shape(hardware: str) -> None:
    with pytest.raises(ConfigError, match=f"torchscript has fixed shapes on {hardware}, where text_generation cannot"):
        parsed(hardware=hardware, task="text_generation")


def test_the_chip_computes_in_bfloat16() -> None:
    with pytest.raises(
        ConfigError, match='dtype is "float32": it runs on cpu, gpu, not on neuron; take auto, bfloat16'
    ):
        parsed(dtype="float32")


def test_options_belong_to_their_hardware() -> None:
    with pytest.raises(ConfigError, match="save_mode torchscript on cpu has no option batch_sizes"):
        parsed(hardware="cpu", options={"batch_sizes": [1]})
    with pytest.raises(ConfigError, match="batch_sizes should be a list of whole numbers of 1 or more, not 4"):
        parsed(options={"batch_sizes": 4})


def test_lengths_and_batches_that_are_compiled() -> None:
    shapes = WRITERS["torchscript"].shapes
    assert [each.lengths for each in shapes(parsed(), 512)] == [(32, 128, 512), (128, 512), (512,)]
    assert [each.batches for each in shapes(parsed(options={"batch_sizes": [8, 2]}), 64)] == [(2, 8)] * 2
    [own] = shapes(parsed(sequence_lengths=[16, 40]), 40)
    assert own == Shapes((16, 40), (1, 4), graph_per_shape=True)


@CHIP
def test_without_its_package_nothing_is_fetched(hardware: str) -> None:
    asked = target("torchscript", hardware, {})
    with pytest.raises(ExportError, match=f'"{hardware}" is compiled by the package {CHIPS[hardware].package}, which'):
        WRITERS["torchscript"].check("bfloat16", asked)


@CHIP
def test_without_its_package_nothing_is_served(hardware: str, artifact: Path, tmp_path: Path) -> None:
    for file in artifact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    document = json.loads((tmp_path / "traceserve.json").read_text(encoding="utf-8"))
    versions = {**document["versions"], CHIPS[hardware].package: "1.2.3"}
    Manifest.from_json(sealed({**document, "hardware": hardware, "versions": versions})).write(tmp_path)
    with pytest.raises(MissingPackage, match=f"needs {CHIPS[hardware].package}, .* made with .* 1.2.3"):
        Engine.load(tmp_path)


# A machine's cores.

DEVICES = [{"neuron_device": 0, "nc_count": 4}, {"neuron_device": 1, "nc_count": 4}]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Put a `neuron-ls` on the PATH with this output and exit code."""

    def make(words: str, code: int) -> None:
        path = tmp_path / neuron_cores.TOOL
        path.write_text(f"#!/bin/sh\necho '{words}'\nexit {code}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))

    return make


def test_cores_are_those_that_the_tool_tells(tool: Callable[[str, int], None]) -> None:
    tool(json.dumps(DEVICES), 0)
    assert neuron_cores.count("neuron") == 8


@pytest.mark.parametrize("words", ["", "level=fatal", "{}", '[{"neuron_device": 0}]', "null"])
def test_a_tool_without_a_driver_tells_of_none(words: str, tool: Callable[[str, int], None]) -> None:
    tool(words, 1)
    assert neuron_cores.count("neuron") == 0


def test_without_the_tool_devices_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(neuron_cores, "TOOLS", tmp_path)
    monkeypatch.setattr(neuron_cores, "DEVICE_FOLDER", tmp_path)
    assert neuron_cores.count("neuron") == 0
    for name in ("neuron0", "neuron1", "neuron_monitor"):
        (tmp_path / name).touch()
    assert (neuron_cores.count("neuron"), neuron_cores.count("neuronx")) == (8, 4)


def test_workers_have_a_core_each(tool: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURON_RT_VISIBLE_CORES", raising=False)
    tool(json.dumps(DEVICES[:1]), 0)
    kinds = {"a": "neuron", "b": "neuron", "c": "cpu"}
    assert neuron_cores.for_workers(kinds, {"a": 2, "b": 2, "c": 9}) == {"NEURON_RT_NUM_CORES": "1"}
    assert neuron_cores.for_workers({"c": "cpu"}, {"c": 9}) == {}
    with pytest.raises(ServerError, match="a, b would have 5 workers, but this machine has 4 NeuronCores"):
        neuron_cores.for_workers(kinds, {"a": 2, "b": 3, "c": 1})
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "2")
    assert neuron_cores.for_workers({"a": "neuron"}, {"a": 1}) == {}
    with pytest.raises(ServerError, match="NEURON_RT_VISIBLE_CORES is 2, which all of 2 workers would take"):
        neuron_cores.for_workers({"a": "neuron"}, {"a": 2})
    tool("", 1)
    with pytest.raises(ServerError, match="a runs on Inf1, but this machine has no NeuronCore"):
        neuron_cores.for_workers({"a": "neuron"}, {"a": 1})


# The graphs, before compilation.


def test_operators_are_counted_in_what_a_module_calls() -> None:
    class Chooses(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                x = self.linear(x)
            return x * 2

    assert operators(torch.jit.script(Chooses())) == (0, 5)  # sum, gt, Bool, linear, mul


def original(model: Path, content: Dict[str, Any]) -> Original:
    own = parsed(model_name=str(model), **content)
    return loading.load_original(own, sources.fetch_checkpoint(own, ROOT), ROOT)


@pytest.mark.parametrize("architecture", ["marian", "t5", "bart"])
def test_a_padded_decoder_writes_as_generate_does(
    architecture: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Three rows in one batch of four, and nine beams in portions; across the short target length."""
    from traceserve.building import artifact

    content = {"task": "text2text_generation", "sequence_lengths": [12, 24], "options": {"target_length": 36}}
    model = checkpoint(architecture, "AutoModelForSeq2SeqLM")
    own = parsed(model_name=str(model), **content)
    with loading.quiet_transformers():
        source = sources.fetch_checkpoint(own, ROOT)
        whole = loading.load_original(own, source, ROOT)
        shapes = next(iter(WRITERS["torchscript"].shapes(own, whole.max_length)))
        manifest = artifact.write_artifact(
            own, source.source(own), whole, shapes, "x", tmp_path, nothing, rehearsal=True
        )
    assert manifest.runtime == {"targets": [32, 36]} and manifest.hardware == "cpu"
    engine = Engine.load(tmp_path)
    requests = engine.task.from_texts(["Where is it?", "The train leaves at nine.", "It is late."])
    rows = [item.rows[0] for item in engine.task.encode(requests)]  # type: ignore[union-attr]
    for beams, most in ((1, 36), (3, 8)):
        asked = [each.__class__(each.inputs, {"max_new_tokens": most, "num_beams": beams}) for each in requests]
        expected = [generate_original(whole, "encoder_decoder", row, each) for row, each in zip(rows, asked)]
        assert written(engine, rows, asked) == expected


def written(engine: Engine, rows: List[Any], asked: List[Any]) -> List[List[int]]:
    """Return the tokens that the loop writes for all rows together."""
    task: Any = engine.task
    settings: List[GenerationSettings] = [task.settings(each, row, task.prompt(row)) for row, each in zip(rows, asked)]
    members = [Member(row, partial(search_for, task.prompt(row), own)) for row, own in zip(rows, settings)]
    loop = WritingLoop(engine.runner, engine.manifest, task.loop, Stats())
    for member in members:
        loop.join(member)
    while loop.busy:
        loop.turn()
    assert all(member.error is None for member in members)
    return [member.search.tokens for member in members if member.search is not None]


def test_every_chip_has_a_compiler() -> None:
    assert set(compilers.COMPILERS) == set(CHIPS)
    assert all(loop in {task.loop for task in TASKS.values()} for c in HARDWARE.values() for loop in c.loops or ())
    assert set(options("torchscript", "neuronx")) < set(options("torchscript", "neuron"))
