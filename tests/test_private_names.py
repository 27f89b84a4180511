"""Without any one of the used private names of torch, archives still answer and models are still built."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import numpy as np
import private_names
import pytest
import torch
import transformers
from conftest import run_export
from test_architecture import OWN, ROOT, TORCH_INTERNALS
from traceserve.building.gate import verification
from traceserve.building.gate.texts import SENTENCES
from traceserve.building.writers.torchscript import other_device
from traceserve.building.writers.tracing.torch_internals import quiet_onnx_export
from traceserve.errors import ExportError
from traceserve_runtime import processor
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import MissingPackage
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes import calling, torch_internals
from traceserve_runtime.runtimes import graph as graphs
from traceserve_runtime.runtimes.torchscript import attention, devices, packing
from traceserve_runtime.runtimes.torchscript.reader import UNPADDED
from traceserve_runtime.tasks.contract import Request

TEXTS = SENTENCES[1:5]
# Parts of other names, and namespaces that torch itself needs.
_WHOLE = {"torch._C", "torch._C.ScriptModule", "torch._inductor", "script._c"}
# Needed only by the reader or writer of another save mode or dtype, with its error.
REFUSED = {
    "torch._inductor.aoti_load_package": "cannot load it",
    "torch._inductor.aoti_compile_and_package": "needs torch 2.6 or newer",
    "torch._int_mm": "2.4 or newer",
}


def used_by(file: str) -> List[str]:
    """Return the names that a file uses, starting with torch."""
    found = private_names.of_others(ROOT / file, OWN) - _WHOLE
    return sorted(name.replace("script._c.", "torch._C.ScriptModule.") for name in found)


WORKER, BUILDER = (set(used_by(file)) for file in sorted(TORCH_INTERNALS))
MEMBERS = [
    f"torch._C.{kind.__name__}.{name}"
    for kind in torch_internals.GRAPH_CLASSES
    for name in torch_internals.named_members(kind)
]


class Without:
    """A namespace of operators without one of them; torch creates operators on request."""

    def __init__(self, namespace: Any, missing: str) -> None:
        self._namespace, self._missing = namespace, missing

    def __getattr__(self, name: str) -> Any:
        if name == self._missing:
            raise AttributeError(name)
        return getattr(self._namespace, name)


def remove(patch: pytest.MonkeyPatch, name: str) -> None:
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path[1:], torch)
    if name.endswith(".config"):
        patch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    elif "torch.ops." in name:
        patch.setattr(torch.ops, path[-1], Without(owner, last))
    else:
        patch.delattr(owner, last)


@pytest.fixture(autouse=True)
def as_on_x86_without_amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers there pack weights and widen attention; the executor has torch's defaults."""
    monkeypatch.setattr(processor, "is_x86", lambda: True)
    monkeypatch.setattr(attention, "sooner_wide", lambda: True)
    monkeypatch.setattr(verification, "TEXTS", SENTENCES[1:3])
    monkeypatch.setattr(verification, "CORPUS", 0)
    before = torch_internals.set_profiling(True)
    yield
    torch_internals.set_profiling(before)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def made(
    request: pytest.FixtureRequest, checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An artifact for GPUs, which also runs on a CPU."""
    folder: Path = tmp_path_factory.mktemp("private") / "x"
    content = {"model_name": str(checkpoint("bert")), "hardware": "gpu", "max_length": 32, "dtype": request.param}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "TEXTS", SENTENCES[1:3])
        patch.setattr(verification, "CORPUS", 0)
        run_export(folder, content, allow_drift=True)
    return folder


def outputs(folder: Path) -> Dict[str, np.ndarray]:
    """Return a worker's model's outputs, with padding."""
    engine = Engine.load(folder)
    ids = np.arange(5, 21).reshape(2, 8)
    mask = np.ones_like(ids)
    mask[1, 5:] = 0
    columns = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    assert len(engine.answer([Request({"text": text}) for text in TEXTS])) == len(TEXTS)
    found = [engine.runner({name: columns[name] for name in engine.manifest.inputs}) for _ in range(3)]
    return {f"{name} {i}": values for i, each in enumerate(found) for name, values in each.items()}


def test_the_names_are_found() -> None:
    assert {"torch._C._jit_pass_inline", "torch.ops.mkldnn._linear_pointwise", "torch._dynamo.config"} <= WORKER
    assert {"torch._C.ScriptModule._register_attribute", "torch._C.parse_ir", "torch._C._jit_pass_dce"} <= WORKER
    assert {"torch._C._create_function_from_graph", "torch._int_mm"} <= BUILDER and set(REFUSED) <= WORKER | BUILDER
    assert len(MEMBERS) > 30 and "torch._C.Node.inputs" in MEMBERS and "torch._C.Use.user" in MEMBERS


@pytest.mark.parametrize("name", sorted(WORKER - set(REFUSED)) + MEMBERS)
def test_a_worker_answers_without(name: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outputs(made)
    torch_internals.set_profiling(True)
    remove(monkeypatch, name)
    got = outputs(made)
    tolerance = 1e-5 if Manifest.read(made).dtype == "float32" else 0.02
    for key, values in expected.items():
        np.testing.assert_allclose(got[key], values, atol=tolerance)


def test_without_what_rewrites_nothing_is_rewritten(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the test above can fail."""

    def graph() -> str:
        runner: Any = Engine.load(made).runner
        return str(runner._module.graph)

    if packing.possible() and processor.native(Manifest.read(made).dtype):
        assert torch_internals.PRODUCT in graph()
    remove(monkeypatch, "torch._C._jit_pass_cse")
    assert torch_internals.PRODUCT not in graph() and "aten::type_as" not in graph()


@pytest.mark.skipif(not packing.possible(), reason="nothing is packed here")
@pytest.mark.parametrize("error", [RuntimeError("expected at most 5 arguments"), TypeError("an argument too many")])
def test_an_operator_that_takes_something_else_is_not_called(
    error: Exception, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own compiler calls it, and has changed with it."""
    expected = outputs(made)

    def changed(*arguments: Any) -> Any:
        raise error

    namespace = Without(torch.ops.mkldnn, "_linear_pointwise")
    monkeypatch.setattr(torch.ops, "mkldnn", namespace)
    namespace.__dict__["_linear_pointwise"] = changed
    assert not packing.possible()
    for key, values in outputs(made).items():
        np.testing.assert_allclose(values, expected[key], atol=0.02)


# Other devices


class Places(torch.nn.Module):
    """Adds its position to each."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows + torch.arange(rows.shape[1], device=rows.device)


class Twice(torch.nn.Module):
    """Calls a part twice, which is therefore traced twice."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Places()

    def forward(self, rows: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (self.part(self.part(rows) + 1),)


@torch.jit.script
def scripted(rows: torch.Tensor) -> torch.Tensor:
    return torch.arange(rows.size(1), device=torch.device("cpu"))


class Calls(torch.nn.Module):
    def forward(self, rows: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (rows + scripted(rows),)


def written(module: torch.nn.Module, folder: Path) -> Path:
    torch.jit.trace(module, torch.ones(2, 5)).save(folder / "x.pt")  # type: ignore[no-untyped-call]
    return folder / "x.pt"


def test_a_graph_that_cannot_be_inlined_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With each graph that it calls; and it runs on another device."""
    file = written(Twice(), tmp_path)
    remove(monkeypatch, "torch._C._jit_pass_inline")
    module = graphs.load_module(file)
    assert len(devices.reached(module)) == 3
    devices.rewrite(module, "cpu")
    assert torch.equal(module(torch.ones(2, 5))[0], Twice()(torch.ones(2, 5))[0])
    assert other_device.prove(file, {"": (torch.ones(3, 4),)})
    with monkeypatch.context() as patch:
        patch.setattr(devices, "constants", lambda graph: [])  # or nothing was proven
        with pytest.raises(ExportError, match="cannot be moved to a GPU"):
            other_device.prove(file, {"": (torch.ones(3, 4),)})


def test_functions_that_cannot_be_inlined_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(Calls(), tmp_path)
    assert other_device.prove(file, {"": (torch.ones(3, 4),)})
    remove(monkeypatch, "torch._C._jit_pass_inline")
    with pytest.raises(MissingPackage, match="cannot inline what the graph calls; serve the archive on the CPU"):
        devices.rewrite(graphs.load_module(file), "cuda:0")
    with pytest.raises(ExportError, match='cannot inline what the graph calls.*or take "hardware": "cpu"'):
        other_device.prove(file, {"": (torch.ones(3, 4),)})


@pytest.mark.parametrize("member", ["torch._C.Graph.findAllNodes", "torch._C.Node.replaceInput"])
def test_graphs_of_another_kind_are_not_moved(member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = graphs.load_module(written(Twice(), tmp_path))
    remove(monkeypatch, member)
    with pytest.raises(MissingPackage, match=f"its graphs have no {member[9:]}; serve the archive on the CPU"):
        devices.rewrite(module, "cuda:0")


def test_what_an_operator_takes_is_read_as_torch_reads_it() -> None:
    every = torch._C._jit_get_all_schemas()
    assert len(every) > 3000
    for schema in every:
        declared = [(str(argument.type), argument.name) for argument in schema.arguments]
        got = [(argument.type, argument.name) for argument in devices.arguments(str(schema))]
        assert [name for _, name in got] == [name for _, name in declared], schema
        assert [kind == "Tensor" for kind, _ in got] == [kind == "Tensor" for kind, _ in declared], schema


# The builder

PASSES = ["torch._C._jit_pass_inline", "torch._C._jit_pass_cse", "torch._C.parse_ir", "torch._C.Graph.copy"]


OF_ONNX = "torch._C._jit_onnx_log"  # no graph is rewritten with it


@pytest.mark.parametrize("name", sorted(BUILDER - {*REFUSED, OF_ONNX}) + PASSES)
def test_a_model_is_built_without(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing is rewritten, and the build says so."""
    hardware = "cpu" if name in MEMBERS else "gpu"  # with graphs of another kind, see above
    content = {"model_name": str(checkpoint("bert")), "hardware": hardware, "max_length": 32}
    remove(monkeypatch, name)
    exported = run_export(tmp_path / "x", content)
    assert exported.manifest.runtime[UNPADDED] is False and exported.manifest.receipt["passed"]
    assert "cannot rewrite graphs" in str(exported.note) and "the same answers" in str(exported.note)
    assert outputs(tmp_path / "x")


def test_an_onnx_export_needs_no_name_to_be_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet_onnx_export():
        assert torch._C._jit_onnx_log("unheard") is None
    remove(monkeypatch, OF_ONNX)
    with quiet_onnx_export():
        assert not hasattr(torch._C, "_jit_onnx_log")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("torch._inductor.aoti_compile_and_package", {"save_mode": "aot_inductor"}),
        ("torch._int_mm", {"dtype": "int8"}),
    ],
)
def test_what_nothing_else_can_do_is_refused_before_a_download(
    name: str, more: Dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "ONLY_NATIVE", frozenset())
    remove(monkeypatch, name)
    with pytest.raises(ExportError, match=REFUSED[name]):
        run_export(tmp_path / "x", {"model_name": "nobody/nothing", **more})


def test_machine_code_that_cannot_be_loaded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    remove(monkeypatch, "torch._inductor.aoti_load_package")
    with pytest.raises(MissingPackage, match=REFUSED["torch._inductor.aoti_load_package"]):
        torch_internals.load_compiled("model.pt2")


# transformers


def test_a_t5_is_read_without_its_own_shift(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    auto: Any = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(checkpoint("t5", "AutoModelForSequenceClassification")).eval()
    ids = torch.tensor([[7, 8, 9, model.config.eos_token_id]])
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = calling._by_last_end_token(model, columns, {})["logits"]
        monkeypatch.delattr(transformers.T5PreTrainedModel, "_shift_right")
        own = calling._by_last_end_token(model, columns, {})["logits"]
    assert torch.equal(own, expected) and torch.equal(calling._shifted_right(model, ids)[0, 1:], ids[0, :-1])
