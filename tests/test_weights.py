"""Weights outside of their graph: mapped from the model's file, they give the same outputs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import models
import numpy as np
import pytest
import torch
import transformers
from conftest import graphs_of, needs_halves, needs_native, run_export
from traceserve.building import attempt
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidManifest
from traceserve_runtime.manifest import Manifest, Shapes, sha256
from traceserve_runtime.runner import Padding
from traceserve_runtime.runtimes import torch_internals
from traceserve_runtime.runtimes.torchscript import devices, packing, reader
from traceserve_runtime.runtimes.torchscript.weights import GRAPH_FILE, WEIGHTS_FILE, assign, read_positions
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request

MODEL_FILE = "traced_model.pt"
CLASSIFIERS = [
    *(name for name, family in models.ARCHITECTURES.items() if family.encodes and name != "xlm-roberta"),
    "longformer",
]
WRITERS = {
    "gpt2": ("text_generation", "AutoModelForCausalLM"),
    "t5": ("text2text_generation", "AutoModelForSeq2SeqLM"),
}
SHARED = Settings(pack_weights=False)
ALL = [*CLASSIFIERS, *(f"{name}-loop" for name in WRITERS)]


@pytest.fixture(scope="module")
def made(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's artifact, made once."""
    known: Dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in known:
            name, _, loop = architecture.partition("-loop")
            loops = architecture.endswith("-loop")
            task, auto_model = WRITERS[name] if loops else ("sequence_classification", models_class)
            config: Dict[str, Any] = {"model_name": str(checkpoint(name, auto_model)), "task": task, "max_length": 24}
            config.update({"parameters": {"max_new_tokens": 3}} if loops else {"long_inputs": "truncate"})
            known[architecture] = tmp_path_factory.mktemp("weights") / "x"
            with pytest.MonkeyPatch.context() as patch:
                if architecture in models.UNEVEN:  # the gate's eventual result
                    shapes = Shapes((8, 24), (4,), graph_per_shape=True)
                    patch.setattr(attempt, "candidate_shapes", lambda config, most: [shapes])
                run_export(known[architecture], config)
        return known[architecture]

    return make


models_class = "AutoModelForSequenceClassification"


def plain(folder: Path, target: Path) -> Path:
    """A copy of the artifact without the separate graph."""
    shutil.copytree(folder, target)
    manifest = Manifest.read(folder)
    for name in (GRAPH_FILE, WEIGHTS_FILE):
        (target / name).unlink()
    files = {name: digest for name, digest in manifest.files.items() if name not in (GRAPH_FILE, WEIGHTS_FILE)}
    dataclasses.replace(manifest, files=files).write(target)
    return target


def outputs(engine: Engine) -> List[np.ndarray]:
    """Return all of the model's outputs for some inputs, including a loop's state."""
    manifest, random = engine.manifest, np.random.default_rng(0)
    arrays: List[np.ndarray] = []
    for batch, length in ((1, 5), (3, manifest.max_length)):
        batch, length = manifest.shapes.batch(batch), manifest.shapes.length(length)
        columns = {
            "input_ids": random.integers(5, 100, (batch, length)),
            "attention_mask": np.ones((batch, length), dtype=np.int64),
            "token_type_ids": np.zeros((batch, length), dtype=np.int64),
            "position_ids": np.arange(length)[None].repeat(batch, axis=0),
            "decoder_input_ids": np.ones((batch, 1), dtype=np.int64),
        }
        if not engine.task.loop:
            arrays += engine.runner({name: columns[name] for name in manifest.inputs}).values()
            continue
        state = engine.runner.start({name: columns[name] for name in manifest.inputs})
        given, grown = engine.runner.step({name: columns[name] for name in manifest.step_inputs}, state)
        arrays += [*given.values(), *(tensor.numpy() for tensor in (*state, *grown))]
    return arrays


@pytest.mark.parametrize("architecture", ALL)
def test_mapped_weights_give_the_same(
    made: Callable[[str], Path], architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(architecture)
    read: List[str] = []
    own: Any = torch.jit.load

    def load(path: str, **options: Any) -> Any:
        read.append(Path(path).name)
        return own(path, **options)

    monkeypatch.setattr(torch.jit, "load", load)
    mapped, loaded = Engine.load(folder, settings=SHARED), Engine.load(plain(folder, tmp_path / "x"))
    assert read == [GRAPH_FILE, MODEL_FILE]
    got, expected = outputs(mapped), outputs(loaded)
    assert len(got) == len(expected) >= 2
    # The separate graph may compute less than the whole model, in another order.
    limit = 5e-6 if Manifest.read(folder).runtime[reader.UNPADDED] else 0.0
    for one, other in zip(got, expected):
        assert one.dtype == other.dtype and np.allclose(one, other, rtol=0, atol=limit)
    assert any(np.ptp(array) > 0 for array in got if array.size)


def state_of(path: Path) -> Dict[str, torch.Tensor]:
    module: Any = torch.jit.load(path)  # type: ignore[no-untyped-call]
    return dict(module.state_dict(keep_vars=True))


@pytest.mark.parametrize("architecture", ALL)
def test_the_table_holds_every_parameter(made: Callable[[str], Path], architecture: str) -> None:
    folder = made(architecture)
    positions, whole, graph = read_positions(folder), state_of(folder / MODEL_FILE), state_of(folder / GRAPH_FILE)
    assert set(graph) == set(whole) >= set(positions)
    module: Any = torch.jit.load(folder / MODEL_FILE)  # type: ignore[no-untyped-call]
    assert {name for name, _ in module.named_parameters()} <= set(positions)
    content = (folder / MODEL_FILE).read_bytes()
    for name, position in positions.items():
        assert position.shape == tuple(whole[name].shape) and f"torch.{position.dtype}" == str(whole[name].dtype)
        values = whole[name].detach().contiguous().numpy().tobytes()
        assert content[position.offset : position.offset + len(values)] == values, name
        assert position.offset % whole[name].element_size() == 0
        assert graph[name].numel() == 0 and graph[name].dtype == whole[name].dtype
    for name in set(whole) - set(positions):
        assert torch.equal(graph[name], whole[name])
    manifest = Manifest.read(folder)
    assert {GRAPH_FILE, WEIGHTS_FILE} <= set(manifest.files)


def test_graphs_share_their_places(made: Callable[[str], Path]) -> None:
    """Both graphs of a loop, and all of a graph per shape: one copy of the weights, whatever reads them."""
    positions = read_positions(made("gpt2-loop"))
    embedded = {position.offset for name, position in positions.items() if name.endswith("wte.weight")}
    assert len(embedded) == 1
    graphs = Manifest.read(made("longformer")).shapes
    assert graphs.graph_per_shape
    positions = read_positions(made("longformer"))
    by_graph: Dict[str, Dict[str, int]] = {}
    for name, position in positions.items():
        graph, _, rest = name.partition(".")
        by_graph.setdefault(graph, {})[rest] = position.offset
    assert len(by_graph) >= 2 and len({json.dumps(offsets, sort_keys=True) for offsets in by_graph.values()}) == 1


@pytest.fixture(scope="module")
def large(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 34 MB of weights."""
    source = checkpoint("bert", models_class, hidden_size=256, intermediate_size=8192)
    folder = tmp_path_factory.mktemp("weights") / "large"
    config = {"model_name": str(source), "max_length": 16, "long_inputs": "truncate", "sequence_lengths": "fixed"}
    exported = run_export(folder, config)
    assert exported.parameters * 4 > 33_000_000
    return folder


def test_the_graph_is_small(large: Path) -> None:
    whole = (large / MODEL_FILE).stat().st_size
    assert whole > 33_000_000
    assert (large / GRAPH_FILE).stat().st_size < 400_000
    assert (large / WEIGHTS_FILE).stat().st_size < 10_000


def file_mappings(file: Path) -> List[Tuple[range, int]]:
    """Return the addresses at which this process has mapped the file, and the bytes that are private copies."""
    found: List[Tuple[range, int]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        addresses = re.match(r"([0-9a-f]+)-([0-9a-f]+) .*", line)
        if addresses:
            current = line.endswith(str(file))
            if current:
                found.append((range(int(addresses[1], 16), int(addresses[2], 16)), 0))
        elif current and line.startswith("Anonymous:"):
            found[-1] = found[-1][0], int(line.split()[1]) * 1024
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_the_weights_are_in_memory_once_for_all_workers(large: Path, tmp_path: Path) -> None:
    """Every weight is in the file's own pages, of which nobody has a private copy."""
    engine, whole = Engine.load(large, settings=SHARED), Engine.load(plain(large, tmp_path / "x"))
    engine.warm_up()
    request = Request({"text": "Yes."}, {"top_k": None})
    answers = [each.answer([request])[0] for each in (engine, whole)]
    assert isinstance(answers[0], Answer) and isinstance(answers[1], Answer)
    scores, expected = ([item["score"] for item in answer.value] for answer in answers)
    assert scores == pytest.approx(expected, abs=1e-5)
    [(addresses, copied)] = file_mappings(large / MODEL_FILE)
    assert len(addresses) >= (large / MODEL_FILE).stat().st_size and copied == 0
    runner: Any = engine.runner
    weights = [tensor for tensor in runner._module.state_dict().values() if tensor.numel() > 1]
    assert sum(tensor.nbytes for tensor in weights) > 33_000_000
    assert all(tensor.data_ptr() in addresses for tensor in weights)
    assert file_mappings(tmp_path / "x" / MODEL_FILE) == []


def test_what_a_worker_changes_stays_its_own(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("bert"), tmp_path / "x"))
    digest = sha256(folder / MODEL_FILE)
    first, second = (Engine.load(folder, settings=SHARED) for _ in range(2))
    before = outputs(second)
    runner: Any = first.runner
    with torch.no_grad():
        for parameter in runner._module.parameters():
            parameter.add_(1.0)
    assert not np.array_equal(outputs(first)[0], before[0])
    assert all(np.array_equal(one, other) for one, other in zip(outputs(second), before))
    assert sha256(folder / MODEL_FILE) == digest
    assert all(np.array_equal(one, other) for one, other in zip(outputs(Engine.load(folder, settings=SHARED)), before))


def test_the_mapping_outlives_its_file(made: Callable[[str], Path], tmp_path: Path) -> None:
    """An archive may be unpacked again, or its folder removed, while a worker runs."""
    folder = Path(shutil.copytree(made("bert"), tmp_path / "x"))
    engine = Engine.load(folder)
    before = outputs(engine)
    shutil.rmtree(folder)
    assert all(np.array_equal(one, other) for one, other in zip(outputs(engine), before))


def test_the_models_file_needs_nothing_beside_it(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("bert")
    shutil.copy(folder / MODEL_FILE, tmp_path / "alone.pt")
    module: Any = torch.jit.load(tmp_path / "alone.pt")  # type: ignore[no-untyped-call]
    engine = Engine.load(folder, settings=SHARED)
    ids = np.arange(5, 17)[None].repeat(2, axis=0)
    columns = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    inputs = {name: columns[name] for name in engine.manifest.inputs}
    with torch.no_grad():
        [logits] = module(*(torch.from_numpy(array) for array in inputs.values()))
    assert engine.runner(inputs)["logits"] == pytest.approx(logits.numpy(), abs=1e-6)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_without_values(tmp_path: Path) -> None:
    """MobileBERT's `dense` has as many rows as hidden states are larger than embeddings: here none."""
    options = {
        "hidden_size": 32,
        "embedding_size": 32,
        "intra_bottleneck_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    tokenizer = models.make_tokenizer("bert")
    config = transformers.MobileBertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **options)
    transformers.MobileBertForMaskedLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run_export(tmp_path / "x", {"model_name": str(tmp_path / "model"), "task": "fill_mask", "max_length": 24})
    empty = [position for position in read_positions(tmp_path / "x").values() if not math.prod(position.shape)]
    assert empty and all(len(position.shape) == 2 for position in empty)
    engine = Engine.load(tmp_path / "x", settings=SHARED)
    assert all(np.isfinite(array).all() and np.ptp(array) > 0 for array in outputs(engine))


def test_an_artifact_of_a_graph_elsewhere_than_the_cpu_is_loaded_plainly(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: List[Tuple[str, Any]] = []
    own: Any = torch.jit.load

    def load(path: str, map_location: Any = None) -> Any:
        read.append((Path(path).name, map_location))
        return own(path, map_location="cpu")

    monkeypatch.setattr(torch.jit, "load", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runner = reader.read(Manifest.read(made("bert")), made("bert"), "cuda:0")
    assert read == [(MODEL_FILE, "cuda:0")] and runner.padding == Padding()


# Packed: each worker's own copy of its linear layers' weights


LAYER, PACKED = "= aten::linear(", "= mkldnn::_linear_pointwise("
HALF = "= quantized::linear_dynamic_fp16("


@pytest.mark.parametrize("architecture", ALL)
def test_packed_weights_give_the_same(made: Callable[[str], Path], architecture: str) -> None:
    shared, packed = Engine.load(made(architecture), settings=SHARED), Engine.load(made(architecture))
    for one, other in zip(outputs(shared), outputs(packed)):
        assert one.dtype == other.dtype and other == pytest.approx(one, abs=1e-5)
    before, after = graphs_of(shared), graphs_of(packed)
    assert PACKED not in before and LAYER not in after
    layers = before.count(LAYER) + before.count("= aten::addmm(")  # GPT-2's layers are such
    fused = sum(line.count(" : Tensor") - 1 for line in after.splitlines() if "= prim::ListUnpack(" in line)
    assert after.count(PACKED) > 1 and layers - fused <= after.count(PACKED) <= layers


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Sums that nearly cancel would otherwise sometimes differ by more than allowed."""
    torch.manual_seed(0)


def reread(model: torch.nn.Module, inputs: torch.Tensor, folder: Path) -> Any:
    """Trace, write and read the model like a worker. To be packed before its first run, which fixes the graph."""
    torch.jit.trace(model, inputs).save(folder / "model.pt")  # type: ignore[no-untyped-call]
    return torch.jit.load(folder / "model.pt")  # type: ignore[no-untyped-call]


def packed_alike(
    model: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    folder: Path,
    layers: int,
    products: int,
    rtol: float = 1e-5,
    product: str = PACKED,
) -> Any:
    """Return the model with this many packed layers in this many products, after comparing it with the original."""
    module = reread(model, inputs[0], folder)
    expected = [model(each) for each in inputs]
    assert packing.pack(module) == layers and str(module.graph).count(product) == products
    with torch.inference_mode():  # like the runner
        for given, before in zip(inputs, expected):
            assert torch.allclose(module(given), before, rtol=rtol, atol=1e-6)
    return module


def packed_weights(module: Any) -> List[torch.Tensor]:
    names = (f"packed_{i}" for i in itertools.count())
    return [module._c.getattr(name) for name in itertools.takewhile(module._c.hasattr, names)]


def test_a_weight_of_several_graphs_is_packed_once(made: Callable[[str], Path]) -> None:
    runner: Any = Engine.load(made("longformer")).runner
    of_each = [packed_weights(entry) for entry in devices.entries(runner._module)]
    assert len(of_each) >= 2 and all(of_each)
    distinct = {id(weight) for weights in of_each for weight in weights}
    assert len(distinct) <= max(len(weights) for weights in of_each)


def test_equal_bytes_are_packed_for_each_shape(tmp_path: Path) -> None:
    """For example weights of zeros, which are stored once."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Linear(12, 6))
    for layer in model:
        torch.nn.init.zeros_(layer.weight)
    inputs = torch.rand(5, 6)
    module = reread(model, inputs, tmp_path)
    expected = model(inputs)
    one, other = (parameter for name, parameter in module.named_parameters() if name.endswith("weight"))
    other.data = one.data.view(6, 12)
    assert packing.pack(module) == 2 and torch.equal(module(inputs), expected)


@pytest.mark.parametrize("where", ["another machine", "no oneDNN", "a processor without bfloat16"])
def test_where_it_cannot_be_done_the_graph_stays(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(6, 6).to(torch.bfloat16)
    inputs = torch.rand(5, 6).to(torch.bfloat16)
    module, expected = reread(model, inputs, tmp_path), reread(model, inputs, tmp_path)(inputs)
    if where == "another machine":
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
    elif where == "no oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert packing.pack(module) == 0 and torch.equal(module(inputs), expected)


def test_what_is_no_layer_of_the_model_stays(tmp_path: Path) -> None:
    """A computed weight, a sum with a matrix or with factors, other dtypes."""

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 6)
            self.whole = torch.nn.Parameter(torch.rand(6, 6))
            self.exact = torch.nn.Linear(6, 6, dtype=torch.float64)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            rows = torch.nn.functional.linear(rows, self.layer.weight * 2, self.layer.bias)
            rows = torch.nn.functional.linear(rows, rows.t() @ rows)
            rows = torch.addmm(self.whole[:5], rows, self.whole)
            rows = torch.addmm(self.layer.bias, rows, self.whole, beta=2)
            return self.exact(rows.double())  # type: ignore[no-any-return]

    inputs = torch.rand(5, 6)
    model = Odd()
    module, expected = reread(model, inputs, tmp_path), reread(model, inputs, tmp_path)(inputs)
    assert packing.pack(module) == 0
    assert torch.allclose(module(inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_without_a_bias_and_one_called_twice(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 6, bias=False)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(rows[0, 0]) + rows)  # type: ignore[no-any-return]

    one, other = packed_weights(packed_alike(Twice(), [torch.rand(2, 5, 6)], tmp_path, layers=2, products=2))
    assert one is other and one.is_mkldnn


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_native("bfloat16"))])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_gelu_is_part_of_the_product(approximate: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 12), torch.nn.GELU(approximate), torch.nn.Linear(12, 6), torch.nn.ReLU()
    ).to(dtype)
    inputs = [3 * torch.randn(5, 6).to(dtype), torch.randn(1, 6).to(dtype)]
    rtol = 2e-2 if dtype is torch.bfloat16 else 1e-5
    module = packed_alike(model, inputs, tmp_path, layers=2, products=2, rtol=rtol)
    assert "aten::gelu" not in str(module.graph) and "aten::relu" in str(module.graph)


def test_a_gelu_of_what_others_read_too_stays(tmp_path: Path) -> None:
    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 6)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            product = self.layer(rows)
            return torch.nn.functional.gelu(product) * product

    module = packed_alike(Gated(), [torch.randn(5, 6)], tmp_path, layers=1, products=1)
    assert str(module.graph).count("aten::gelu(") == 1


class Attention(torch.nn.Module):
    """Three layers, and a fourth without a bias, that read the same rows; their outputs are reshaped in several
    ways."""

    def __init__(self, shaped: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(6, 6)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(6, width) for width in (8, 4, 12)])
        self.plain = torch.nn.Linear(6, 4, bias=False)
        self.shaped = shaped

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = self.embed(inputs)
        one, other, third = (layer(rows) for layer in self.layers)
        heads = one.view(rows.shape[0], -1, 2, 4).transpose(1, 2)
        total = heads.sum() + other.view(rows.shape[0], -1).sum() + third.sum() + self.plain(rows).sum()
        return total + self.shaped(other).sum()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_native("bfloat16"))])
def test_layers_that_read_the_same_rows_are_one_product(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Attention(lambda rows: rows.view(-1)).to(dtype)
    inputs = [torch.rand(3, 5, 6).to(dtype), torch.rand(2, 7, 6).to(dtype)]
    packed_alike(model, inputs, tmp_path, layers=5, products=3, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5)


class Normed(torch.nn.Module):
    """Its cast, as in a Llama's norms, returns the same tensor, which the trace returns beside the result, in a tuple."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.to(torch.float32).double() * 2


def test_rows_that_each_layer_casts_for_itself_are_cast_once(tmp_path: Path) -> None:
    class Casting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Normed()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(3)])

        def forward(self, inputs: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
            inputs = inputs * 2
            rows = self.norm(inputs)
            return sum((layer(rows.float()) for layer in self.layers), inputs), inputs

    model, inputs = Casting(), torch.rand(5, 6)
    module = reread(model, inputs, tmp_path)
    assert packing.pack(module) == 3 and str(module.graph).count(PACKED) == 1
    with torch.inference_mode():
        for got, expected in zip(module(inputs), model(inputs)):
            assert torch.allclose(got, expected, atol=1e-6)


def test_what_depends_on_how_rows_lie_keeps_its_layers_apart(tmp_path: Path) -> None:
    model = Attention(lambda rows: rows.as_strided((3, 4), (20, 1)))
    packed_alike(model, [torch.rand(3, 5, 6)], tmp_path, layers=5, products=5)


def test_what_changes_in_place_keeps_its_layers_apart(tmp_path: Path) -> None:
    class Changing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(5)])

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            rows = inputs * 2
            before = self.layers[0](rows)
            rows.view(-1).add_(1)
            after = self.layers[1](rows)
            one, other, third = (layer(inputs) for layer in self.layers[2:])
            other.view(-1).mul_(2)
            return torch.cat([before, after, one, other, third])

    packed_alike(Changing(), [torch.rand(5, 6)], tmp_path, layers=5, products=4)


@needs_halves()
@pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_kept_in_it(saved: torch.dtype, tmp_path: Path) -> None:
    """With and without a bias, of one layer and of several, with a GELU; also for a single vector, and for no rows."""
    model = Attention(lambda rows: rows.view(-1)).to(saved).float()
    inputs = [torch.rand(3, 5, 6), torch.rand(2, 7, 6), torch.rand(1, 1, 6)]
    packed_alike(model, inputs, tmp_path, layers=5, products=3, product=HALF)
    active = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.GELU(), torch.nn.Linear(12, 6)).to(saved).float()
    inputs = [torch.randn(5, 6), torch.randn(6), torch.randn(0, 6)]
    module = packed_alike(active, inputs, tmp_path, layers=2, products=2, product=HALF)
    assert str(module.graph).count("aten::gelu(") == 1


@needs_halves()
@pytest.mark.parametrize("architecture", ["bert", "llama", "t5"])
def test_a_checkpoint_of_half_precision_is_packed_in_it(
    architecture: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """All its layers, and the gate, which compares with the original in float32, lets it through."""
    task = {"bert": "sequence_classification", "llama": "text_generation", "t5": "text2text_generation"}[architecture]
    whole = checkpoint(architecture, TASKS[task].auto_model)
    half = shutil.copytree(whole, tmp_path / "half")
    kind = getattr(transformers, TASKS[task].auto_model)
    kind.from_pretrained(whole).to(torch.bfloat16).save_pretrained(half)
    run_export(tmp_path / "x", {"model_name": str(half), "task": task, "max_length": 48, "dtype": "float32"})
    graphs = graphs_of(Engine.load(tmp_path / "x"))
    assert graphs.count(HALF) > 4 and LAYER not in graphs and PACKED not in graphs


@pytest.mark.skipif(not packing.possible(), reason="nothing is packed here")
@pytest.mark.parametrize("missing", ["the type", "the operators"])
def test_without_its_names_halves_are_packed_in_float32(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "the type":
        monkeypatch.setattr(torch_internals, "HALF", "__torch__.torch.classes.quantized.Gone")
    else:
        monkeypatch.setattr(torch.ops, "quantized", None)
    packed_alike(torch.nn.Linear(6, 6).half().float(), [torch.rand(5, 6)], tmp_path, layers=1, products=1)


@needs_halves()
def test_a_computed_bias_is_added_to_a_product_of_halves(tmp_path: Path) -> None:
    class Shifted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 6).half().float()

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(rows, self.layer.weight, self.layer.bias + rows.mean())

    packed_alike(Shifted(), [torch.rand(5, 6)], tmp_path, layers=1, products=1)


@needs_halves()
def test_the_product_of_halves_is_float32s() -> None:
    """Only the order of sums differs: rows and sums are not rounded to float16."""
    weight, rows = torch.randn(64, 512).half().float(), torch.randn(16, 512)
    product = torch.ops.quantized.linear_dynamic_fp16(rows, torch_internals.pack_half(weight, None))
    exact = rows.double() @ weight.double().t()
    error, own = ((each.double() - exact).norm() for each in (product, rows @ weight.t()))
    assert error < 4 * own and (rows.half().double() @ weight.double().t() - exact).norm() > 100 * own


@pytest.mark.parametrize(
    "change, half",
    [
        (lambda weight: weight, True),
        (lambda weight: weight * (1 + 2**-12), False),  # one bit more than float16 has
        (lambda weight: weight.clamp(-1e-7, 1e-7), False),  # below its smallest number
        (lambda weight: weight * 2.0**17, False),  # above its largest one
        (lambda weight: torch.where(weight == weight.max(), 2.0**-30, weight), True),  # a single one below
        (lambda weight: weight * math.nan, False),
    ],
)
def test_weights_are_halves_if_rounding_is_below_float32s(change: Callable[..., torch.Tensor], half: bool) -> None:
    assert packing.is_half(change(torch.randn(64, 64).bfloat16().float())) is half


def test_equal_weights_with_other_biases_stay_apart(tmp_path: Path) -> None:
    class Parts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(4)])
            for part in self.parts:
                part.weight = self.parts[0].weight

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            one, other, third, fourth = self.parts
            return torch.cat([one(inputs), other(inputs), third(inputs * 2), fourth(inputs * 2)])

    packed_alike(Parts(), [torch.rand(5, 6)], tmp_path, layers=4, products=2)


# Changed files


@pytest.fixture
def copied(made: Callable[[str], Path], tmp_path: Path) -> Iterator[Path]:
    """An artifact to damage, whose manifest then matches its files."""
    yield Path(shutil.copytree(made("bert"), tmp_path / "x"))


def settle(folder: Path) -> Path:
    manifest = Manifest.read(folder, verify=False)
    dataclasses.replace(manifest, files={name: sha256(folder / name) for name in manifest.files}).write(folder)
    return folder


def table(folder: Path) -> Dict[str, Any]:
    content: Dict[str, Any] = json.loads((folder / WEIGHTS_FILE).read_text())
    return content


def test_a_weight_without_a_place_is_named(copied: Path) -> None:
    positions = table(copied)
    name = next(name for name in positions if name.endswith("classifier.weight"))
    del positions[name]
    (copied / WEIGHTS_FILE).write_text(json.dumps(positions))
    with pytest.raises(InvalidManifest, match=f"{WEIGHTS_FILE} does not tell where {name} stands"):
        Engine.load(settle(copied))


def test_a_place_without_a_weight_is_passed_over(copied: Path) -> None:
    (copied / WEIGHTS_FILE).write_text(json.dumps({**table(copied), "another": [64, "float32", [2]]}))
    assert Engine.load(settle(copied)).answer([Request({"text": "Yes."})])


@pytest.mark.parametrize(
    "position",
    [
        [10**9, "float32", [3, 4]],
        [-64, "float32", [3, 4]],
        [64, "float31", [3, 4]],
        [64, "cuda", [3, 4]],
        [64, "float32", [10**9, 10**9]],
        [64, "float32", [0]],
    ],
    ids=str,
)
def test_a_position_that_does_not_fit_is_told(copied: Path, position: Any) -> None:
    positions = table(copied)
    positions[next(name for name in positions if name.endswith("classifier.weight"))] = position
    (copied / WEIGHTS_FILE).write_text(json.dumps(positions))
    with pytest.raises(InvalidManifest, match=f"{WEIGHTS_FILE} does not fit {MODEL_FILE}"):
        Engine.load(settle(copied))


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_a_models_file_that_was_cut_is_told(copied: Path, share: float) -> None:
    content = (copied / MODEL_FILE).read_bytes()
    (copied / MODEL_FILE).write_bytes(content[: int(share * len(content))])
    with pytest.raises(InvalidManifest, match="is not the one that was verified"):
        Engine.load(copied)
    with pytest.raises(InvalidManifest, match=f"{WEIGHTS_FILE} does not fit {MODEL_FILE}"):
        Engine.load(settle(copied))


def test_a_models_file_that_is_empty_is_told(copied: Path) -> None:
    (copied / MODEL_FILE).write_bytes(b"")
    with pytest.raises(InvalidManifest, match=MODEL_FILE):
        Engine.load(settle(copied))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        "null",
        '{"a": 7}',
        '{"a": [1, "float32"]}',
        '{"a": [1, "float32", 5]}',
        '{"a": ["x", "float32", [5]]}',
        '{"a": [null, "float32", [5]]}',
        '{"a": [1, "float32", ["x"]]}',
        '{"a": [1, "float32", [2], 3]}',
        '{"a": [Infinity, "float32", [2]]}',
        "[" * 100_000,
        "\udcff",
    ],
    ids=lambda content: repr(content[:40]),
)
def test_garbage_in_the_table_is_told(copied: Path, content: str) -> None:
    (copied / WEIGHTS_FILE).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidManifest, match=f"{WEIGHTS_FILE} cannot be read"):
        Engine.load(settle(copied))


def test_a_table_that_is_not_there_is_told(copied: Path) -> None:
    (copied / WEIGHTS_FILE).unlink()
    with pytest.raises(InvalidManifest, match=f"{WEIGHTS_FILE}, which is missing"):
        Engine.load(copied)
    with pytest.raises(InvalidManifest, match=f"{WEIGHTS_FILE} cannot be read"):
        read_positions(copied)


def test_a_graph_that_is_no_torchscript_is_told(copied: Path) -> None:
    (copied / GRAPH_FILE).write_bytes(b"no archive")
    with pytest.raises(InvalidManifest, match=f"{GRAPH_FILE} cannot be loaded by torch"):
        Engine.load(settle(copied))


def test_nothing_is_assigned_that_is_no_weight(copied: Path) -> None:
    """If all of a module's tensors are in it, the table may be empty."""
    module: Any = torch.jit.load(copied / MODEL_FILE)  # type: ignore[no-untyped-call]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assign(module, copied / MODEL_FILE, {})
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
