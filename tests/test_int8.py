"""Dynamic int8: per token, with ever more layers left out, and a gate that refuses the naive one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple

import pytest
import torch
import transformers
from conftest import needs_native, run_export
from traceserve.building.checkpoints import loading, sources
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate.findings import LIMITS, DriftError
from traceserve.building.gate.texts import SENTENCES
from traceserve.building.writers.lowering import int8, precision, sensitivity
from traceserve.building.writers.lowering.int8 import KEPT_SHARES, Int8Linear, quantized
from traceserve.building.writers.lowering.sensitivity import linears, measure_layers
from traceserve.errors import ExportError
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks.contract import Answer, Request

if not hasattr(torch, "_int_mm"):
    pytest.skip("this torch does not multiply int8", allow_module_level=True)
native = needs_native("int8")

LABELS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}


def content(checkpoint: Callable[..., Path], architecture: str = "bert") -> Dict[str, Any]:
    source = str(checkpoint(architecture, **LABELS))
    content = {"model_name": source, "task": "sequence_classification", "dtype": "int8"}
    return {**content, "max_length": 32, "long_inputs": "truncate"}


def linear(outputs: int, inputs: int, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias=bias)


def lowered(module: torch.nn.Linear, tokens: torch.Tensor) -> Int8Linear:
    return Int8Linear(module, tokens.detach().abs().reshape(-1, tokens.shape[-1]).amax(0)).eval()


def bound(module: torch.nn.Linear, lower: Int8Linear, tokens: torch.Tensor) -> torch.Tensor:
    """Return each output's error bound, (tokens, outputs).

    Half a step of each token, plus its zero point's rounding, and half a step of each weight.
    """
    smoothed = tokens * lower.smoothing
    weight = module.weight.detach() / lower.smoothing
    span = smoothed.amax(-1).clamp(min=0) - smoothed.amin(-1).clamp(max=0)
    step = (span / 255)[:, None]
    of_tokens = step * (weight.abs() + lower.scale[:, None] / 2).sum(-1)
    of_weights = smoothed.abs().sum(-1)[:, None] * lower.scale / 2
    return of_tokens + of_weights + 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 32), (1, 32), (7, 32), (3, 5, 32)], ids=str)
def test_an_int8_layer_is_the_float_one_within_the_quantization(shape: Any, bias: bool) -> None:
    module = linear(24, 32, bias)
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + 1
    lower = lowered(module, tokens)
    with torch.no_grad():
        got, expected = lower(tokens), module(tokens)
    assert got.shape == expected.shape and got.dtype == torch.float32
    error = (got - expected).abs().reshape(-1, 24)
    assert (error <= bound(module, lower, tokens.reshape(-1, 32))).all()
    assert 0 < error.max() < 0.1 < expected.abs().max()


def test_large_channels_do_not_drown_the_others() -> None:
    """As in transformers' tokens: without smoothing the others would have one or two steps each."""
    module = linear(24, 32)
    tokens = torch.randn((200, 32), generator=torch.Generator().manual_seed(1))
    tokens[:, 3] *= 100
    with torch.no_grad():
        module.weight[:, 3] /= 100
        exact = module(tokens)
        smoothed = (lowered(module, tokens)(tokens) - exact).square().mean()
        plain = Int8Linear(module, module.weight.abs().amax(0))  # factors of 1
        assert torch.allclose(plain.smoothing, torch.ones(32))
        unsmoothed = (plain(tokens) - exact).square().mean()
    assert smoothed < unsmoothed / 20


@pytest.mark.parametrize("value", [0.0, 0.5, 2.0])
def test_a_channel_that_no_sample_excited(value: float) -> None:
    """A neuron behind a ReLU that only another text excites: its value is one of many, and no reason to lose the others."""
    torch.manual_seed(0)
    module = torch.nn.Linear(64, 32)
    samples = torch.relu(torch.randn(500, 64))
    samples[:, 7] = 0
    lower = lowered(module, samples)
    tokens = torch.relu(torch.randn(50, 64))
    tokens[:, 7] = value
    with torch.no_grad():
        error = (lower(tokens) - module(tokens)).std() / module(tokens).std()
    assert error < 0.05


@pytest.mark.parametrize("neighbours", [0, 1, 6, 63])
def test_no_row_depends_on_what_else_is_in_its_batch(neighbours: int) -> None:
    module = linear(24, 32)
    one = torch.randn((1, 9, 32), generator=torch.Generator().manual_seed(1))
    others = torch.randn((neighbours, 9, 32), generator=torch.Generator().manual_seed(2)) * 1000
    lower = lowered(module, one)
    together = torch.cat([others, one])
    assert torch.equal(lower(together)[-1:], lower(one))
    assert torch.equal(lower(one)[:, 4:5], lower(one[:, 4:5]))  # nor a token on the others


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(3, 32),
        torch.full((3, 32), 1e-30),
        torch.full((3, 32), 1e30),
        torch.randn(3, 32) * 1e20,
        -torch.rand(3, 32) - 5,
        torch.rand(3, 32) + 5,
        torch.full((3, 32), -7.0),
        torch.eye(32)[:3] * 1e6,
        torch.zeros(1, 32),
        torch.empty(0, 32),
    ],
    ids=["zeros", "tiny", "huge", "wide", "negative", "positive", "equal", "one-hot", "one-token", "none"],
)
def test_extreme_tokens_give_numbers(tokens: torch.Tensor, bias: bool) -> None:
    module = linear(24, 32, bias)
    lower = lowered(module, torch.ones(1, 32))  # measured on others
    with torch.no_grad():
        got, expected = lower(tokens), module(tokens)
    assert got.shape == expected.shape and torch.isfinite(got).all()
    slack = 1e-5 * expected.abs().amax() if tokens.numel() else 0.0
    assert ((got - expected).abs() <= bound(module, lower, tokens) + slack).all()


def test_layers_of_nothing_but_zeros() -> None:
    """In weights, or in measurements: no division by zero."""
    module = linear(8, 16)
    with torch.no_grad():
        module.weight[2] = 0
        module.weight[:, 5] = 0
    tokens = torch.randn((4, 16), generator=torch.Generator().manual_seed(1))
    tokens[:, 7] = 0
    got = lowered(module, tokens)(tokens)
    assert torch.isfinite(got).all()
    assert torch.allclose(got[:, 2], module.bias[2].expand(4), atol=1e-6)


def load(checkpoint: Callable[..., Path], folder: Path, architecture: str = "bert") -> Any:
    config, _ = parse_config(content(checkpoint, architecture))
    with loading.quiet_transformers():
        return loading.load_original(config, sources.fetch_checkpoint(config, folder), folder)


def batches(original: Any) -> List[Dict[str, torch.Tensor]]:
    return [
        dict(original.tokenizer(text, return_tensors="pt", truncation=True, max_length=32)) for text in SENTENCES[1:6]
    ]


def test_more_and_more_layers_stay_as_they_are(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    original = load(checkpoint, tmp_path)
    linears = [name for name, module in original.model.named_modules() if type(module) is torch.nn.Linear]
    inside = {name for name in linears if name.startswith("bert.")}
    assert set(linears) - inside == {"classifier"}
    kept: List[Set[str]] = []
    for made, names in quantized(original.model, batches(original)):
        modules = dict(made.named_modules())
        assert {name for name, m in modules.items() if isinstance(m, (Int8Linear, torch.nn.Linear))} == set(linears)
        assert type(modules["classifier"]) is torch.nn.Linear
        kept.append({name for name in inside if type(modules[name]) is torch.nn.Linear})
        assert set(names) == kept[-1] and len(names) == len(kept[-1])
        for name in kept[-1]:
            assert torch.equal(modules[name].weight, original.model.get_submodule(name).weight)
            assert modules[name].weight.dtype == torch.float32
        for name in inside - kept[-1]:
            assert modules[name].weight.dtype == torch.int8
    assert [len(names) for names in kept] == [round(share * len(inside)) for share in KEPT_SHARES]
    assert kept[0] == set() and all(fewer < more for fewer, more in zip(kept, kept[1:]))
    assert {name for name, module in original.model.named_modules() if type(module) is torch.nn.Linear} == set(linears)


def test_steps_that_leave_the_same_layers_are_one() -> None:
    """A model of two layers: 0.0, 0.1 and 0.2 of them are none."""
    moved = {"one": 1.0, "two": 2.0}
    measured = sensitivity.Measured({name: torch.ones(1) for name in moved}, lambda: moved)
    assert list(measured.steps((0.0, 0.1, 0.2, 0.3, 0.4, 1.0))) == [(), ("two",), ("two", "one")]


def test_what_stays_is_what_moves_the_output_most(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    original = load(checkpoint, tmp_path)
    model, inputs = original.model, batches(original)
    with torch.no_grad():
        exact = [model(**batch).logits for batch in inputs]

    def moved(made: Any) -> float:
        with torch.no_grad():
            return sum(float((made(**batch).logits - one).square().mean()) for batch, one in zip(inputs, exact))

    everything, *_, most = (made for made, _ in quantized(model, inputs))
    assert 0 < moved(most) < moved(everything)
    dearest = [name for name, m in most.named_modules() if type(m) is torch.nn.Linear and name != "classifier"]
    cheapest = [name for name, m in most.named_modules() if isinstance(m, Int8Linear)][: len(dearest)]
    alone = {}
    for names in (dearest, cheapest):
        other = copy.deepcopy(model)
        for name in names:
            parent, _, last = name.rpartition(".")
            setattr(other.get_submodule(parent), last, everything.get_submodule(name))
        alone[names is dearest] = moved(other)
    assert alone[True] > alone[False]


def test_a_layer_that_is_not_called_stays(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Such as Longformer's global attention, if no token has it."""
    original = load(checkpoint, tmp_path, "longformer")
    model = original.model
    inputs = [
        {name: tensor for name, tensor in batch.items() if name != "token_type_ids"} for batch in batches(original)
    ]
    found = measure_layers(model.longformer, linears(model.longformer), inputs, Int8Linear)
    idle = {name for name in linears(model.longformer) if name not in found.moved}
    assert idle and all(name.endswith("_global") for name in idle)
    made, kept = next(quantized(model.longformer, inputs))
    assert not kept and all(type(made.get_submodule(name)) is torch.nn.Linear for name in idle)
    assert all(isinstance(made.get_submodule(name), Int8Linear) for name in found.moved)


class Classifier(torch.nn.Module):
    """Two layers; if it `refuses`, like BART's classifier, at most one row at a time."""

    def __init__(self, refuses: bool) -> None:
        super().__init__()
        self.refuses = refuses
        self.embedding = torch.nn.Embedding(50, 8)
        self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 3)

    def forward(self, input_ids: torch.Tensor) -> Any:
        if self.refuses and len(input_ids) > 1:
            raise ValueError("all examples must have the same number of <eos> tokens")
        return (self.second(self.first(self.embedding(input_ids).mean(1))),)


@pytest.mark.parametrize("refuses", [False, True])
def test_texts_of_one_length_are_measured_together(refuses: bool) -> None:
    """With the same result as one at a time, however many have each length."""
    torch.manual_seed(0)
    model = Classifier(refuses).eval()
    sizes = [(5, 4), (1, 7), (3, 2)]
    together = [{"input_ids": torch.randint(0, 50, size)} for size in sizes]
    single = [
        {"input_ids": batch["input_ids"][i : i + 1]} for batch in together for i in range(len(batch["input_ids"]))
    ]
    layers = linears(model)
    got, expected = (measure_layers(model, layers, batches, Int8Linear) for batches in (together, single))
    assert got.moved == pytest.approx(expected.moved, rel=1e-3) and min(expected.moved.values()) > 0
    assert {name: pytest.approx(value.numpy()) for name, value in got.largest.items()} == {
        name: value.numpy() for name, value in expected.largest.items()
    }


def test_a_model_is_measured_on_few_batches(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """No padding: equal lengths form one batch."""
    original = load(checkpoint, tmp_path)
    batches = precision.inputs_of(original, ["a b", "c", "", "b a", "x", "a b c d"])
    assert sorted(tuple(batch["input_ids"].shape) for batch in batches) == [(1, 6), (2, 3), (2, 4)]
    for batch in batches:
        assert set(batch) == set(original.inputs) and bool(batch["attention_mask"].all())


def test_a_model_that_reads_no_text_by_itself_is_told(checkpoint: Callable[..., Path]) -> None:
    model = transformers.AutoModel.from_pretrained(checkpoint("t5", "AutoModelForSeq2SeqLM"))
    with pytest.raises(ExportError, match="T5Model does not read a text by itself: .*input_ids"):
        measure_layers(model, linears(model), [{"input_ids": torch.ones(1, 3, dtype=torch.long)}], Int8Linear)


@native
def test_a_model_without_linear_layers_is_told(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="GPT2ForSequenceClassification has no torch.nn.Linear"):
        run_export(tmp_path / "x", content(checkpoint, "gpt2"))


@native
def test_a_torch_that_cannot_is_told(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch, "_int_mm")
    with pytest.raises(ExportError, match=r"2\.4 or newer; this is"):
        run_export(tmp_path / "x", content(checkpoint))


@native
def test_an_export_in_int8_passes_the_gate(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    exported = run_export(tmp_path / "x", content(checkpoint))
    assert exported.manifest.dtype == "int8" and exported.manifest.receipt["passed"]
    assert exported.findings.answers > 512 and len(exported.findings.changed) <= 0.015 * exported.findings.answers
    assert 0 < exported.findings.largest_difference <= LIMITS["int8"].difference
    traced: Any = torch.jit.load(tmp_path / "x" / "traced_model.pt")  # type: ignore[no-untyped-call]
    integers = [name for name, value in traced.state_dict().items() if value.dtype == torch.int8]
    assert len(integers) >= 6
    engine = Engine.load(tmp_path / "x")
    requests = [Request({"text": text}, {"top_k": None}) for text in SENTENCES]
    for request, together in zip(requests, engine.answer(requests)):
        [alone] = engine.answer([request])
        assert isinstance(alone, Answer) and isinstance(together, Answer)
        assert {i["label"]: i["score"] for i in alone.value} == pytest.approx(
            {i["label"]: i["score"] for i in together.value}, abs=1e-5
        )


def naive(model: Any, batches: Any) -> Iterator[Tuple[Any, Tuple[str, ...]]]:
    """Convert every linear layer to int8 with torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize: Any = torch.ao.quantization.quantize_dynamic
        yield quantize(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8), ()


@native
def test_naive_int8_is_refused_by_the_same_gate(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "quantized", naive)
    with pytest.raises(DriftError, match=r"does not answer as the original does \(in int8") as error:
        run_export(tmp_path / "x", content(checkpoint))
    found = error.value.findings
    assert found.too_many_changed and not found.passed and found.failure is None
    assert len(found.changed) > 2 * LIMITS["int8"].changed_elsewhere * found.answers
