"""Archives for GPUs, without one: graphs are moved to torch's device meta and run there; immovable ones are refused.

tests/gpu covers a real GPU's results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple, Type

import pytest
import torch
from conftest import run_export
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate import verification
from traceserve.building.gate.texts import SENTENCES
from traceserve.building.writers.torchscript import other_device
from traceserve.errors import ConfigError, ExportError
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import MissingPackage
from traceserve_runtime.manifest import Manifest, Shapes
from traceserve_runtime.runtimes.torchscript import devices as moving
from traceserve_runtime.runtimes.torchscript import reader
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request
from transformer_handler import TransformerHandler, _device

GPU: Dict[str, Any] = {"hardware": "gpu", "max_length": 48}
# One for each way of making masks and positions, and both kinds of loop.
MODELS = {
    "bert": "sequence_classification",
    "deberta-v2": "sequence_classification",
    "modernbert": "sequence_classification",
    "llama": "text_generation",
    "t5": "text2text_generation",
}

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def made(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A family's artifact for GPUs; each made once."""
    known: Dict[str, Path] = {}

    def make(architecture: str, **content: Any) -> Path:
        key = repr((architecture, content))
        if key not in known:
            known[key] = tmp_path_factory.mktemp("devices") / "x"
            task = MODELS[architecture]
            source = checkpoint(architecture, TASKS[task].auto_model)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(verification, "CORPUS", 0)
                run_export(known[key], {"model_name": str(source), "task": task, **GPU, **content})
        return known[key]

    return make


def loaded(path: Path) -> Any:
    return torch.jit.load(str(path))  # type: ignore[no-untyped-call]


def named(module: Any) -> List[str]:
    """Return the devices named by constants in a module's graphs."""
    for graph in moving.graphs(module):
        torch._C._jit_pass_inline(graph)
    return [node.s("value") for graph in moving.graphs(module) for node in moving.constants(graph)]


@pytest.mark.parametrize("architecture", MODELS)
def test_a_trace_names_devices_and_is_moved(architecture: str, made: Make) -> None:
    manifest = Manifest.read(made(architecture))
    assert manifest.hardware == "gpu" and manifest.runtime["ran_on_meta"] is True and manifest.receipt["passed"]
    module = loaded(made(architecture) / manifest.model_file)
    assert set(named(module)) == {"cpu"}
    moving.rewrite(module, "cuda:3")
    assert set(named(module)) == {"cuda:3"}
    assert not [what for graph in moving.graphs(module) for what in moving.left(graph)]


def test_without_the_rewriting_it_would_not_run_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the proof would prove nothing."""
    path, inputs = traced(positions, tmp_path), {"": (torch.ones(2, 8, dtype=torch.long),)}
    assert other_device.prove(path, inputs)
    monkeypatch.setattr(moving, "rewrite", lambda module, device: named(module))
    with pytest.raises(ExportError, match="Adds cannot be moved to a GPU: .*cpu"):
        other_device.prove(path, inputs)


def test_the_same_archive_answers_on_a_cpu_as_one_that_was_made_for_it(made: Make) -> None:
    requests = [Request({"text": text}, {"top_k": None}) for text in SENTENCES[1:5]]
    first, second = (Engine.load(made("bert", hardware=name)).answer(requests) for name in ("gpu", "cpu"))
    assert first == second and all(isinstance(answer, Answer) for answer in first)


def test_graphs_of_several_shapes_are_all_moved(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "TEXTS", SENTENCES[1:3])
    monkeypatch.setattr(
        "traceserve.building.attempt.candidate_shapes", lambda *_: [Shapes((8, 48), (2, 5), graph_per_shape=True)]
    )
    run_export(tmp_path / "x", {"model_name": str(checkpoint("bert")), **GPU, "long_inputs": "truncate"})
    assert Manifest.read(tmp_path / "x").runtime["ran_on_meta"] is True
    module = loaded(tmp_path / "x" / "traced_model.pt")
    assert len(moving.graphs(module)) == 4
    moving.rewrite(module, "meta")
    assert set(named(module)) == {"meta"} and len(named(module)) >= 4


# The worker's part.


def test_where_it_runs(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Observed when it is loaded."""
    asked: List[str] = []
    own = torch.jit.load

    def load(path: str, map_location: str) -> Any:
        asked.append(map_location)
        return own(path)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(torch.jit, "load", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = made("bert")
    runner = reader.read(Manifest.read(folder), folder, "cuda:2")
    assert asked == ["cuda:2"] and set(named(runner._module)) == {"cuda:2"}
    runner = reader.read(Manifest.read(folder), folder, "cpu")
    assert asked == ["cuda:2", "cpu"] and set(named(runner._module)) == {"cpu"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("save_mode", ["torchscript", "pretrained"])
def test_without_a_gpu_the_worker_says_so(save_mode: str, made: Make) -> None:
    folder = made("bert", save_mode=save_mode)
    with pytest.raises(MissingPackage, match="asks for the device cuda:0, but this torch .* sees no GPU"):
        Engine.load(folder, "cuda:0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("architecture", MODELS)
def test_a_gpu_answers_as_the_cpu_does(architecture: str, made: Make) -> None:
    requests = [Request({"text": text}) for text in SENTENCES[1:6]]
    for one, other in zip(*(Engine.load(made(architecture), name).answer(requests) for name in ("cuda:0", "cpu"))):
        assert isinstance(one, Answer) and isinstance(other, Answer)
        assert str(one.value)[:20] == str(other.value)[:20]


@pytest.mark.parametrize(
    "properties, device",
    [
        ({}, "cpu"),
        ({"gpu_id": None}, "cpu"),
        ({"gpu_id": -1}, "cpu"),
        ({"gpu_id": 0}, "cuda:0"),
        ({"gpu_id": "3"}, "cuda:3"),
    ],
)
def test_the_handler_takes_the_gpu_that_torchserve_assigns(properties: Dict[str, Any], device: str, made: Make) -> None:
    class Context:
        system_properties = properties

    assert _device(Context(), made("bert")) == device
    assert _device(Context(), made("bert", hardware="cpu")) == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_handler_refuses_a_missing_gpu(made: Make) -> None:
    class Context:
        system_properties = {"model_dir": str(made("bert")), "gpu_id": 1}

    with pytest.raises(RuntimeError, match="asks for the device cuda:1"):
        TransformerHandler().initialize(Context())


def test_float16_passes_the_gate(made: Make) -> None:
    half = made("bert", dtype="float16") / "traced_model.pt"
    manifest = Manifest.read(half.parent)
    assert manifest.dtype == "float16" and manifest.runtime["ran_on_meta"] is True
    assert 0 < manifest.receipt["largest_difference"] < 0.02
    weights = {tensor.dtype for tensor in loaded(half).parameters()}
    assert weights == {torch.float16}


def test_auto_is_float32_on_a_gpu(made: Make) -> None:
    """This machine cannot know another GPU's best dtype."""
    assert [item["dtype"] for item in Manifest.read(made("bert", dtype="auto")).receipt["candidates"]] == ["float32"]


@pytest.mark.parametrize("dtype, hardware", [("int8", "gpu"), ("float16", "neuron")])
def test_dtypes_of_other_hardware_are_refused(dtype: str, hardware: str) -> None:
    with pytest.raises(ConfigError, match=f"not on {hardware}"):
        parse_config({"model_name": "x", "dtype": dtype, "hardware": hardware})


# Immovable graphs.


class Adds(torch.nn.Module):
    """Adds to the inputs something made on a device."""

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.make = make

    def forward(self, ids: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (ids + self.make(ids),)


@torch.jit.script
def scripted(ids: torch.Tensor) -> torch.Tensor:
    if ids.size(0) > 1:
        return torch.arange(ids.size(1), device=torch.device("cpu"))
    return torch.zeros(1, dtype=torch.long, device=torch.device("cpu"))


@torch.jit.script
def computed(ids: torch.Tensor) -> torch.Tensor:
    name = "c" + ("pu" if ids.size(0) > 1 else "uda")
    return torch.arange(ids.size(1), device=torch.device(name))


def on_the_cpu(ids: torch.Tensor) -> torch.Tensor:
    return ids.cpu()


def positions(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1], device=ids.device)


def several(ids: torch.Tensor) -> torch.Tensor:
    return torch.tensor([1] * ids.shape[1])


@torch.jit.script
def by_default(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.size(1))


@torch.jit.script
def of_a_scalar(ids: torch.Tensor) -> torch.Tensor:
    return torch.tensor(float(ids.size(1))).sqrt()


def data_dependent(ids: torch.Tensor) -> torch.Tensor:
    return ids.nonzero().sum()


def traced(make: Callable[[torch.Tensor], torch.Tensor], folder: Path) -> Path:
    ids = torch.arange(12).reshape(3, 4)
    with pytest.warns() if make is several else torch.no_grad():
        module: Any = torch.jit.trace(Adds(make), (ids,), check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(module, str(folder / "x.pt"))
    return folder / "x.pt"


@pytest.mark.parametrize(
    "make, ran",
    [
        (positions, True),
        (on_the_cpu, True),
        (scripted, True),
        (by_default, True),
        (several, True),
        (of_a_scalar, True),
        (data_dependent, False),
    ],
    ids=["positions", "on_the_cpu", "scripted", "by_default", "several", "of_a_scalar", "data_dependent"],
)
def test_what_is_moved(make: Any, ran: bool, tmp_path: Path) -> None:
    """Also scripted functions, branches and constant tensors."""
    path = traced(make, tmp_path)
    assert other_device.prove(path, {"": (torch.ones(3, 4, dtype=torch.long),)}) is ran


@pytest.mark.parametrize("make, what", [(computed, "text that is computed")])
def test_what_cannot_be_moved_is_refused(make: Any, what: str, tmp_path: Path) -> None:
    path = traced(make, tmp_path)
    with pytest.raises(ExportError, match=f'Adds cannot be moved to a GPU: .*{what}.*; take "hardware": "cpu"'):
        other_device.prove(path, {"": (torch.ones(3, 4, dtype=torch.long),)})


def test_a_model_that_cannot_be_moved_is_not_exported(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    own: Type[Any] = transformers.BertForSequenceClassification
    forward = own.forward

    def elsewhere(self: Any, input_ids: Any, attention_mask: Any, token_type_ids: Any, **named: Any) -> Any:
        result = forward(self, input_ids, attention_mask, token_type_ids, **named)
        result.logits = result.logits + 0 * computed(result.logits)
        return result

    monkeypatch.setattr(own, "forward", elsewhere)
    content = {"model_name": str(checkpoint("bert")), **GPU}
    with pytest.raises(ExportError, match="cannot be moved to a GPU: .*text that is computed"):
        run_export(tmp_path / "x", content)
    assert not (tmp_path / "x" / "traceserve.json").exists()
