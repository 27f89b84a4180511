"""Graphs that compute padding only in attention, and only the needed part of the last layer."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import pytest
import torch
from conftest import Called, run_export
from hypothesis import example, given, settings
from hypothesis import strategies as st
from traceserve.building.checkpoints import loading, sources
from traceserve.building.checkpoints.original import Original
from traceserve.building.config import parsing
from traceserve.building.writers.torchscript import axes, unpadding, writer
from traceserve.building.writers.tracing.wrapping import masks_without_vmap
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.manifest import Manifest, Shapes
from traceserve_runtime.runner import IN_ATTENTION, Arrays, Padding
from traceserve_runtime.runtimes.torchscript.reader import UNPADDED
from traceserve_runtime.tasks import TASKS

CLASSES, TOKENS = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
ENCODERS = ["bert", "distilbert", "roberta", "electra", "albert", "mpnet", "deberta-v2", "modernbert"]
READ_FIRST = ["bert", "distilbert", "roberta", "electra", "albert", "mpnet"]
CASES = [
    *((name, CLASSES) for name in [*ENCODERS, "bart", "llama"]),
    *((name, TOKENS) for name in ENCODERS),
]
KINDS = {CLASSES: "sequence_classification", TOKENS: "token_classification"}


class Traced(NamedTuple):
    """A traced model, and its rewritten graph."""

    original: Original
    file: Path
    rewritten: Any

    def inputs(self, lengths: Sequence[int], padding: int = 0, left: bool = False) -> Tuple[torch.Tensor, ...]:
        """Return rows of these lengths; `padding` more padded positions; their ids are not special to the model."""
        longest = max(lengths) + padding
        torch.manual_seed(sum(lengths))
        ids = torch.randint(5, 60, (len(lengths), longest))
        mask = torch.zeros_like(ids)
        for row, length in zip(mask, lengths):
            row[longest - length if left else 0 : longest if left else length] = 1
        if (
            self.original.model.config.model_type == "llama"
        ):  # its classifier searches for the last token that is not padding
            ids[mask == 0] = self.original.tokenizer_facts.pad_id
        columns = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return tuple(columns[name] for name in self.original.inputs)

    def assert_same(self, inputs: Tuple[torch.Tensor, ...]) -> None:
        traced = torch.jit.load(str(self.file))  # type: ignore[no-untyped-call]
        mask = inputs[self.original.inputs.index("attention_mask")]
        with torch.no_grad():
            assert unpadding._same(self.rewritten(*inputs), traced(*inputs), mask, 1e-5)

    def read_by_layers(self, inputs: Tuple[torch.Tensor, ...]) -> List[int]:
        """Return how many positions each linear layer reads."""
        graph = self.rewritten.graph
        rows = [node.inputsAt(0) for node in graph.findAllNodes("aten::linear", False)]
        names = [value.debugName() for value in axes.tensors(graph)]
        shapes = dict(zip(names, axes.sizes_of(self.rewritten, graph, inputs)))
        return [int(torch.Size(shapes[value.debugName()][:-1]).numel()) for value in rows]


@pytest.fixture(scope="module")
def traced(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Traced]:
    """A family's model, traced and rewritten once."""
    known: Dict[Tuple[str, str], Traced] = {}

    def make(architecture: str, auto_model: str = CLASSES) -> Traced:
        key = architecture, auto_model
        if key not in known:
            folder = tmp_path_factory.mktemp("traced")
            content = {
                "model_name": str(checkpoint(architecture, auto_model)),
                "task": KINDS[auto_model],
                "max_length": 64,
            }
            (folder / "setup_config.json").write_text(json.dumps(content))
            loaded = parsing.load_config(folder / "setup_config.json")
            original = loading.load_original(loaded.config, sources.fetch_checkpoint(loaded.config, folder), folder)
            with warnings.catch_warnings(), masks_without_vmap(), torch.no_grad():
                warnings.simplefilter("ignore")
                module = writer._single(original, TASKS[KINDS[auto_model]], Shapes())
            torch.jit.save(module, str(folder / "model.pt"))
            rewritten = writer._unpadded(original, folder / "model.pt")
            assert rewritten is not None and rewritten.filled == 16
            known[key] = Traced(original, folder / "model.pt", rewritten.module)
        return known[key]

    return make


@pytest.mark.parametrize(("architecture", "auto_model"), CASES)
@pytest.mark.combinations
def test_the_outputs_are_the_same(traced: Callable[..., Traced], architecture: str, auto_model: str) -> None:
    made = traced(architecture, auto_model)
    for lengths, padding in (([7], 0), ([7], 9), ([9, 9, 9], 0), ([4, 17, 9, 30], 2), ([64, 3], 0), ([3] * 20, 1)):
        made.assert_same(made.inputs(lengths, padding))


@settings(deadline=None, max_examples=40, database=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(0, 5), st.sampled_from([CLASSES, TOKENS]))
@example([5], 0, CLASSES)
@example([2, 40], 3, TOKENS)
def test_they_are_the_same_for_any_lengths(
    traced: Callable[..., Traced], lengths: List[int], padding: int, auto_model: str
) -> None:
    made = traced("bert", auto_model)
    made.assert_same(made.inputs(lengths, padding))


@pytest.mark.parametrize(("architecture", "auto_model"), CASES)
def test_layers_read_no_padding(traced: Callable[..., Traced], architecture: str, auto_model: str) -> None:
    made, lengths = traced(architecture, auto_model), [5, 23, 11, 8]
    read = made.read_by_layers(made.inputs(lengths, padding=6))
    of_tokens = [count for count in read if count in (filled(sum(lengths)), filled(len(lengths)))]
    # Not rows of tokens: for example relative positions.
    assert len(of_tokens) > 0.5 * len(read) and len(lengths) * (max(lengths) + 6) not in read
    assert set(made.read_by_layers(made.inputs([9, 9]))) >= {18}  # without padding none is added


def filled(rows: int) -> int:
    """Return the number rounded up, so that oneDNN may have prepared a product for it."""
    return rows + -rows % 16


@pytest.mark.parametrize(
    ("lengths", "padding", "expected"),
    [
        ([7], 0, 7),
        ([7], 9, 16),  # a single row, with the worker's padding, is not unpadded
        ([9, 7, 30], 0, 48),  # 46
        ([16, 9, 7], 0, 32),
        ([20, 14, 13], 0, 48),  # 47
        ([30] * 17, 2, 512),  # 510
        ([30] * 18, 2, 544),  # 540, rounded up to a multiple of 32
        ([60] * 18, 2, 1088),  # 1080, and of 64
    ],
)
def test_tokens_are_filled_up(traced: Callable[..., Traced], lengths: List[int], padding: int, expected: int) -> None:
    made = traced("bert", TOKENS)
    assert set(made.read_by_layers(made.inputs(lengths, padding))) == {expected}


@pytest.mark.parametrize(
    ("width", "dtype", "expected"),
    [(64, torch.float32, 16), (3500, torch.float32, 8), (3500, torch.bfloat16, 16), (5000, torch.float32, 1)],
)
def test_a_large_model_fills_up_fewer(width: int, dtype: torch.dtype, expected: int) -> None:
    """If a token is slow, preparing a product hardly matters."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(width, width, dtype=dtype) for _ in range(3)))
    module: Any = torch.jit.trace(layers, torch.ones(2, width, dtype=dtype))  # type: ignore[no-untyped-call]
    torch._C._jit_pass_inline(module.graph)
    assert unpadding._filled(module) == expected


@pytest.mark.parametrize("architecture", READ_FIRST)
def test_of_the_last_layer_only_what_the_first_place_needs(traced: Callable[..., Traced], architecture: str) -> None:
    lengths = [5, 23, 11, 8]
    one, all_of_them = (traced(architecture, auto_model) for auto_model in (CLASSES, TOKENS))
    read = one.read_by_layers(one.inputs(lengths))
    # Its query, the projection after attention, and both layers of the following network; and the classifier's own.
    assert read.count(filled(len(lengths))) >= 5 and read.count(filled(sum(lengths))) >= 8
    assert filled(len(lengths)) not in all_of_them.read_by_layers(all_of_them.inputs(lengths))


def test_rows_padded_on_the_left(traced: Callable[..., Traced]) -> None:
    """There the first position is padding: nothing is known of what reads it."""
    made = traced("bert")
    examples = [made.inputs([n - i % 2 for i in range(b)], 1, left=True) for b, n in ((3, 10), (2, 6), (1, 9))]
    own = unpadding.unpadded(made.file, made.original.inputs, examples, "float32", reads_first=False)
    assert own is None  # this classifier reads the output for padding
    tokens = traced("bert", TOKENS)
    own = unpadding.unpadded(tokens.file, tokens.original.inputs, examples, "float32", reads_first=False)
    assert own is not None
    left = tokens._replace(rewritten=own.module)
    left.assert_same(left.inputs([4, 17, 9], left=True))
    assert set(left.read_by_layers(left.inputs([4, 17, 9], left=True))) == {filled(30)}


class Encoder(torch.nn.Module):
    """Rows of tokens, to be read in its own way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(100, 16)
        self.first, self.second, self.third = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.read(self.third(self.second(self.first(self.words(input_ids)).relu()).tanh()), attention_mask)

    def read(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class ReadsTokens(Encoder):
    def read(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (rows * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


class Normalizes(Encoder):
    """Normalizes each token to length 1, with an unknown operator."""

    def read(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(rows, dim=-1) * mask[:, :, None]


class NormalizesGroups(Encoder):
    def read(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.group_norm(rows, 1)


class ReadsPadding(Encoder):
    def read(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return rows.mean(1)


class ReadsNeighbours(Encoder):
    def read(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return rows + rows.roll(-1, 1)


class WritesRows(Encoder):
    def read(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        before = rows * 2
        rows[:, 0] += 1.0
        return (rows + before) * mask[:, :, None]


class MultipliesElsewhere(Encoder):
    """More products of its own than per-token layers."""

    def read(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            rows = torch.matmul(rows, rows.transpose(1, 2).softmax(-1) @ rows)
        return rows


def rewritten(model: torch.nn.Module, folder: Path, inputs: Sequence[str] = ("input_ids", "attention_mask")) -> Any:
    examples = []
    for batch, length in (*axes.SHAPES, (1, 5), (4, 19)):
        mask = torch.ones((batch, length), dtype=torch.int64)
        mask[-1, length // 2 :] = 0
        examples.append((torch.randint(1, 100, (batch, length)), mask))
    with torch.no_grad():
        torch.jit.trace(model, examples[0], check_trace=False).save(str(folder / "m.pt"))  # type: ignore[no-untyped-call]
    return unpadding.unpadded(folder / "m.pt", inputs, examples, "float32", reads_first=True)


@pytest.mark.parametrize("kind", [ReadsTokens, Normalizes])
def test_what_reads_tokens_alone_is_rewritten(kind: Callable[[], torch.nn.Module], tmp_path: Path) -> None:
    assert "aten::nonzero" in str(rewritten(kind(), tmp_path).module.graph)


@pytest.mark.parametrize("kind", [NormalizesGroups, ReadsPadding, ReadsNeighbours, WritesRows, MultipliesElsewhere])
def test_what_it_cannot_do_stays_as_it_is(kind: Callable[[], torch.nn.Module], tmp_path: Path) -> None:
    assert rewritten(kind(), tmp_path) is None


def test_without_a_mask_nothing_is_padding(tmp_path: Path) -> None:
    assert rewritten(ReadsTokens(), tmp_path, ("input_ids", "token_type_ids")) is None


def exported(model: Path, folder: Path, **more: Any) -> Path:
    content = {"model_name": str(model), "task": "sequence_classification", "max_length": 24, "long_inputs": "truncate"}
    run_export(folder, {**content, **more})
    return folder


@pytest.mark.parametrize(
    ("architecture", "content", "expected"),
    [
        ("bert", {}, True),
        ("bert", {"dtype": "bfloat16"}, True),
        ("bert", {"sequence_lengths": [12, 24]}, True),
        ("gpt2", {}, False),  # its layers are not `linear`
    ],
)
def test_a_worker_knows_what_padding_costs(
    checkpoint: Callable[..., Path], tmp_path: Path, architecture: str, content: Dict[str, Any], expected: bool
) -> None:
    folder = exported(checkpoint(architecture, CLASSES), tmp_path / "x", **{"dtype": "float32", **content})
    engine = Engine.load(folder)
    assert Manifest.read(folder).runtime[UNPADDED] is expected
    assert engine.runner.padding == (IN_ATTENTION._replace(alone=16) if expected else Padding())
    assert engine.scheduler.cost.padding == engine.runner.padding


def test_its_lengths_are_such_as_attention_is_quick_with(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """None exceeds the model's maximum, and a single one is hardly longer than needed."""
    engine = Engine.load(exported(checkpoint("bert", CLASSES), tmp_path / "x", dtype="float32"))
    engine.scheduler.cost = replace(engine.scheduler.cost, run=1e6)  # all rows in one
    seen: List[Tuple[int, ...]] = []
    own = engine.runner

    def watched(inputs: Arrays) -> Arrays:
        seen.append(inputs["input_ids"].shape)
        return own(inputs)

    engine.runner = Called(watched, own.padding)  # type: ignore[assignment]  # is run once only
    engine.answer(engine.task.from_texts(["a cat"]))
    engine.answer(engine.task.from_texts(["a cat", "a dog"])[:2])
    stats = Stats()
    engine.answer(engine.task.from_texts(["a cat", " ".join(["dog"] * 19)])[:2], stats)
    engine.answer(engine.task.from_texts(["dog " * 90, "cat " * 90])[:2])
    alone, short, mixed, longest = seen
    assert alone == (1, 16) and short == (2, 16) and longest == (2, 24)
    assert mixed == (2, 24) and stats.tokens < stats.padded_tokens < 2 * 24
