"""The dtypes: the traced model in each, the gate's verdict, and `auto`'s choice."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Set, Tuple

import conftest
import models
import numpy as np
import pytest
import torch
from conftest import needs_native, nothing
from traceserve import cli
from traceserve.building import speeds
from traceserve.building.checkpoints import loading, sources
from traceserve.building.config import dtypes, formats
from traceserve.building.config.parsing import parse_config
from traceserve.building.exported import Exported
from traceserve.building.gate import answers, verification
from traceserve.building.gate import reference as references
from traceserve.building.gate.corpus import sentences
from traceserve.building.gate.findings import LIMITS, DriftError, Findings, Limit
from traceserve.building.gate.golden import GOLDEN_FILE
from traceserve.building.gate.texts import SENTENCES, calibration
from traceserve.building.writers import WRITERS
from traceserve.building.writers.lowering import precision
from traceserve.building.writers.torchscript import writer
from traceserve.errors import ConfigError, ExportError
from traceserve_runtime import processor
from traceserve_runtime.batching import costs, measuring
from traceserve_runtime.batching.costs import CostModel
from traceserve_runtime.engine import Engine
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes.pretrained import is_linear
from traceserve_runtime.runtimes.torchscript import attention
from traceserve_runtime.runtimes.torchscript.reader import TorchScriptRunner
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request

run_export = partial(conftest.run_export, all_texts=True)  # what the gate compares is tested here

LABELS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
# XLM-RoBERTa is RoBERTa under another name.
FAMILIES = [name for name, family in models.ARCHITECTURES.items() if family.encodes and name != "xlm-roberta"]
QUICK = ("roberta", "electra", "albert", "deberta-v2", "bart")
LOOPS = {
    "gpt2": ("text_generation", "AutoModelForCausalLM"),
    "llama": ("text_generation", "AutoModelForCausalLM"),
    "t5": ("text2text_generation", "AutoModelForSeq2SeqLM"),
    "bart": ("text2text_generation", "AutoModelForSeq2SeqLM"),
}
# For a score, 0 to 1: bfloat16 has 8 significant bits, and a tiny random model's logits are some tenths apart.
CLOSE = 0.05


def of_native(names: Iterable[str]) -> List[Any]:
    """Return these architectures, all but the first one for a processor with bfloat16: others emulate it, slowly."""
    first, *others = names
    return [first, *(pytest.param(name, marks=needs_native("bfloat16")) for name in others)]


Maker = Callable[..., Tuple[Path, Exported]]


@pytest.fixture(scope="module")
def made(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Export a family's tiny classifier in a dtype, each once."""
    known: Dict[Tuple[str, str], Tuple[Path, Exported]] = {}

    def make(architecture: str, dtype: str) -> Tuple[Path, Exported]:
        if (architecture, dtype) not in known:
            folder = tmp_path_factory.mktemp("precision") / "x"
            with pytest.MonkeyPatch.context() as patch:
                if architecture in QUICK:
                    patch.setattr(verification, "CORPUS", 160)  # no answer to them changes
                known[architecture, dtype] = folder, run_export(folder, content(checkpoint, architecture, dtype=dtype))
        return known[architecture, dtype]

    return make


def content(checkpoint: Callable[..., Path], architecture: str = "bert", **more: Any) -> Dict[str, Any]:
    source = str(checkpoint(architecture, **LABELS))
    content = {"model_name": source, "task": "sequence_classification", "max_length": 32, "long_inputs": "truncate"}
    return {**content, **more}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gate use fewer built-in sentences, in tests of something else."""
    monkeypatch.setattr(verification, "CORPUS", 16)


def claim(patch: pytest.MonkeyPatch, folder: Path, *features: str) -> None:
    """Let the processor have exactly these features."""
    (folder / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu sse2 {' '.join(features)}\n")
    patch.setattr(processor, "CPUINFO", folder / "cpuinfo")


def scores(engine: Engine) -> np.ndarray:
    """Return for each text the scores of all labels, in the labels' order."""
    answers = engine.answer([Request({"text": text}, {"top_k": None}) for text in SENTENCES[1:]])
    assert all(isinstance(answer, Answer) for answer in answers)
    by_label = [{item["label"]: item["score"] for item in answer.value} for answer in answers]  # type: ignore[union-attr]
    return np.array([[found[label] for label in engine.manifest.labels] for found in by_label])


# bfloat16


@pytest.mark.parametrize("architecture", of_native(FAMILIES))
def test_bfloat16_of_every_family_passes_the_gate(made: Maker, architecture: str) -> None:
    folder, exported = made(architecture, "bfloat16")
    manifest = Manifest.read(folder)
    receipt = manifest.receipt
    assert manifest == exported.manifest and manifest.dtype == "bfloat16"
    assert receipt["passed"] and not receipt["drift_allowed"]
    assert receipt["limits"] == {"difference": 0.1, "changed": 0.003, "changed_elsewhere": 0.015}
    assert receipt["answers"] > (160 if architecture in QUICK else 512)
    assert 0 < receipt["largest_difference"] <= 0.1 and receipt["own_answers"] == 0
    assert receipt["answers_changed"] <= 0.015 * receipt["answers"]


@pytest.mark.parametrize("architecture", of_native(FAMILIES))
def test_matrices_are_bfloat16_and_all_else_float32(made: Maker, architecture: str) -> None:
    """Except for the layers that the gate left in float32."""
    folder, _ = made(architecture, "bfloat16")
    kept = {f"model.{name}" for name in Manifest.read(folder).receipt["in_float32"]}
    traced: Any = torch.jit.load(folder / "traced_model.pt")  # type: ignore[no-untyped-call]
    lower: Set[str] = set()
    same: Set[str] = set()
    for path, module in traced.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            matrix = module.original_name in ("Linear", "Conv1D") or module.original_name.endswith("Embedding")
            matrix = matrix and path not in kept
            (lower if matrix else same).add(module.original_name)
            assert parameter.dtype == (torch.bfloat16 if matrix else torch.float32), f"{path}.{name}"
    assert lower & {"Linear", "Conv1D"} and any(name.endswith("Embedding") for name in lower)
    assert any("Norm" in name for name in same)


@pytest.mark.parametrize("architecture", of_native(FAMILIES))
def test_answers_in_bfloat16_are_those_of_float32(made: Maker, architecture: str) -> None:
    lower, exact = (Engine.load(made(architecture, dtype)[0]) for dtype in ("bfloat16", "float32"))
    outputs = lower.runner({name: np.ones((2, 7), dtype=np.int64) for name in lower.manifest.inputs})
    assert all(array.dtype == np.float32 for array in outputs.values())
    got, expected = scores(lower), scores(exact)
    assert 0 < np.abs(got - expected).max() < CLOSE
    assert np.ptp(expected, axis=0).max() > 2 * CLOSE  # else all answers would be close to each other


def test_what_runs_beside_the_layers_is_float32(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """An embedding's rows are read in bfloat16, and added in float32."""
    original = load(checkpoint, tmp_path)
    lowered, *_ = precision.lowered(original, "bfloat16", SENTENCES, "cpu")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        words = lowered.model.get_input_embeddings()
        assert words.weight.dtype == torch.bfloat16 and words(ids).dtype == torch.float32
        assert torch.equal(words(ids), words.weight[ids].float())
        with precision.tracing("bfloat16"):
            hidden = lowered.model.bert(ids, output_hidden_states=True).hidden_states
    assert {tensor.dtype for tensor in hidden} == {torch.float32}


@pytest.mark.parametrize("auto_model", ["AutoModelForSequenceClassification", "AutoModelForMaskedLM"])
def test_the_layers_that_matter_most_can_stay_in_float32(
    checkpoint: Callable[..., Path], tmp_path: Path, auto_model: str
) -> None:
    task = next(name for name, task in TASKS.items() if task.auto_model == auto_model)
    source = str(checkpoint("bert", auto_model))
    parsed, _ = parse_config({"model_name": source, "task": task, "max_length": 32, "long_inputs": "truncate"})
    with loading.quiet_transformers():
        original = loading.load_original(parsed, sources.fetch_checkpoint(parsed, tmp_path), tmp_path)
    before = {name: tensor.clone() for name, tensor in original.model.state_dict().items()}
    tried = list(precision.lowered(original, "bfloat16", SENTENCES[:6], "cpu"))
    layers = {n for n, module in original.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert [len(item.kept) for item in tried] == [0, *(round(share * len(layers)) for share in precision.KEPT_SHARES)]
    batches = [original.tokenizer(text, return_tensors="pt") for text in SENTENCES[1:6]]
    with torch.no_grad():
        exact = [original.model(**batch)[0] for batch in batches]
        moved = []
        for item in tried:
            with precision.tracing("bfloat16"):
                outputs = [item.model(**batch)[0] for batch in batches]
            moved.append(sum(float((got - one).square().mean()) for got, one in zip(outputs, exact)))
    assert moved[0] > moved[-1] > 0
    for item in tried:
        for name in layers:
            weight = item.model.get_submodule(name).weight
            tied = name not in item.kept and any(
                weight is item.model.get_submodule(other).weight for other in item.kept
            )
            assert weight.dtype == (torch.float32 if name in item.kept or tied else torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.model.state_dict().items())


@pytest.mark.parametrize("save_mode", ["torchscript", "pretrained"])
def test_layers_are_left_until_the_gate_passes(
    checkpoint: Callable[..., Path], tmp_path: Path, save_mode: str, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as needed: they are reported, and computed in float32 by the worker."""
    seen = []

    def verify(folder: Path, reference: Any, *rest: Any) -> Findings:
        found = verification.verify(folder, reference, *rest)
        seen.append(sum(cell.difference for cell in found.cells) / len(found.cells))
        if len(seen) == 1:
            found.changed = list(range(found.answers))
        return found

    monkeypatch.setattr("traceserve.building.attempt.verify", verify)
    folder = tmp_path / "x"
    exported = run_export(folder, {**content(checkpoint), "dtype": "bfloat16", "save_mode": save_mode})
    kept = exported.manifest.receipt["in_float32"]
    assert len(seen) == 2 and kept
    assert Manifest.read(folder).receipt["in_float32"] == kept
    model: Any = Engine.load(folder).runner
    if save_mode == "pretrained":
        assert Manifest.read(folder).runtime["in_float32"] == kept
        layers = [(path, module) for path, module in model.calls.model.named_modules() if is_linear(module)]
        assert {path for path, module in layers if module.weight.dtype == torch.float32} == set(kept)
        assert {module.weight.dtype for path, module in layers if path not in kept} == {torch.bfloat16}
        return
    assert isinstance(model, TorchScriptRunner) and 0 < seen[1] < seen[0]
    traced: Any = torch.jit.load(folder / "traced_model.pt")  # type: ignore[no-untyped-call]
    exact = {
        path
        for path, module in traced.named_modules()
        if module.original_name == "Linear" and module.weight.dtype == torch.float32
    }
    assert {path.split(".", 1)[1] for path in exact} == set(kept)


def test_a_bfloat16_artifact_is_smaller(made: Maker) -> None:
    sizes = {dtype: (made("bert", dtype)[0] / "traced_model.pt").stat().st_size for dtype in ("float32", "bfloat16")}
    _, exported = made("bert", "float32")
    assert sizes["float32"] - sizes["bfloat16"] > 1.5 * exported.parameters


def test_the_original_stays_as_it_was(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    original = load(checkpoint, tmp_path)
    before = {name: value.clone() for name, value in original.model.state_dict().items()}
    for dtype in ("bfloat16", "float16", "int8"):
        for hardware in ("cpu", "gpu"):
            lowered = list(precision.lowered(original, dtype, SENTENCES[1:3], hardware))
            assert lowered and all(item.dtype == dtype and item.model is not original.model for item in lowered)
    after = original.model.state_dict()
    assert list(after) == list(before) and original.dtype == "float32"
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in original.model.modules())
    assert list(precision.lowered(original, "float32", SENTENCES, "cpu")) == [original]


def load(checkpoint: Callable[..., Path], folder: Path) -> Any:
    from traceserve.building.checkpoints import loading

    config, _ = parse_config(content(checkpoint))
    with loading.quiet_transformers():
        return loading.load_original(config, sources.fetch_checkpoint(config, folder), folder)


@pytest.fixture(scope="module")
def loop(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Export a family's tiny writer in bfloat16, each once."""
    known: Dict[str, Tuple[Path, Exported]] = {}

    def make(architecture: str) -> Tuple[Path, Exported]:
        if architecture not in known:
            task, auto_model = LOOPS[architecture]
            source = str(checkpoint(architecture, auto_model))
            config = {"model_name": source, "task": task, "max_length": 32, "parameters": {"max_new_tokens": 6}}
            folder = tmp_path_factory.mktemp("precision") / "x"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(verification, "TEXTS", SENTENCES[1:10])
                exported = run_export(folder, {**config, "dtype": "bfloat16"}, allow_drift=True)
            known[architecture] = folder, exported
        return known[architecture]

    return make


@pytest.mark.parametrize("architecture", of_native(LOOPS))
def test_written_texts_in_bfloat16(loop: Maker, architecture: str) -> None:
    """Some tokens of a random model change: many are near ties, and more than the gate's 15 in 1,000 are no longer."""
    folder, exported = loop(architecture)
    manifest, found = exported.manifest, exported.findings
    assert manifest.dtype == "bfloat16" and found.cells and not found.failed and found.failure is None
    assert manifest.receipt["drift_allowed"] is not manifest.receipt["passed"]
    assert found.along is not None and 0 <= found.along.changed < 0.2 * found.along.tokens and not found.astray
    engine = Engine.load(folder)
    key = next(iter(engine.task.from_texts(["Yes."])[0].inputs))
    answers = engine.answer([Request({key: text}) for text in SENTENCES[1:3]])
    assert all(isinstance(answer, Answer) and answer.value for answer in answers)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5", "bart"])
def test_the_state_between_steps_is_in_bfloat16(
    loop: Maker, architecture: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "sooner_wide", lambda: wide)
    folder, _ = loop(architecture)
    engine = Engine.load(folder)
    columns = {name: np.ones((2, 5), dtype=np.int64) for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    columns["position_ids"] = np.arange(5)[None].repeat(2, axis=0)
    state = engine.runner.start({name: columns[name] for name in engine.manifest.inputs})
    for step in range(2):
        outputs, state = engine.runner.step({name: columns[name] for name in engine.manifest.step_inputs}, state)
        assert outputs["logits"].dtype == np.float32
        written, read = state[:4], state[4:]  # keys and values of two layers; those of an encoder's output
        assert {tensor.dtype for tensor in written} == {torch.bfloat16}, f"step {step}"
        assert {tensor.dtype for tensor in read} <= {torch.bfloat16}
        columns["attention_mask"] = (
            np.ones((2, 10), dtype=np.int64)
            if LOOPS[architecture][0] == "text_generation"
            else (columns["attention_mask"])
        )


# auto


BUILD = """
import sys
from pathlib import Path
from traceserve import cli
from traceserve_runtime import processor

processor.CPUINFO = Path("cpuinfo")
sys.exit(cli.main(["build", "--output", "artifacts/x", "--store", "store"]))
"""


class Built(NamedTuple):
    """The result of `traceserve build`, and its output."""

    artifact: Path
    store: Path
    said: str

    @property
    def manifest(self) -> Manifest:
        return Manifest.read(self.artifact)

    @property
    def report(self) -> Any:
        return json.loads((self.store / "x.report.json").read_text())


@pytest.fixture(scope="module")
def builds(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> List[Built]:
    """`auto`'s results on a processor with bfloat16: two builds, in separate processes."""
    config = json.dumps(content(checkpoint, "distilbert", dtype="auto"))
    running = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("automatic")
        (folder / "setup_config.json").write_text(config)
        (folder / "cpuinfo").write_text("flags\t\t: fpu sse2 avx512_bf16\n")
        command = [sys.executable, "-c", BUILD]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        running.append((folder, subprocess.Popen(command, cwd=folder, text=True, **output)))  # type: ignore[call-overload]
    built = []
    for folder, process in running:
        said, _ = process.communicate()
        assert process.returncode == 0, said
        built.append(Built(folder / "artifacts" / "x", folder / "store", said))
    return built


def test_auto_tries_what_the_processor_does_and_takes_the_first_that_passes(builds: List[Built]) -> None:
    manifest = builds[0].manifest
    assert manifest.dtype == "bfloat16" and manifest.receipt["passed"]
    [only] = manifest.receipt["candidates"]
    keys = "dtype passed answers answers_changed own_answers own_answers_changed largest_difference refused"
    assert set(only) == set(keys.split())
    assert only["dtype"] == "bfloat16" and only["passed"] and only["refused"] == ""
    assert only["answers"] > 512 and only["answers_changed"] == manifest.receipt["answers_changed"]
    assert only["largest_difference"] > 1e-3


def test_auto_builds_the_same_bytes_each_time(builds: List[Built]) -> None:
    one, other = builds
    assert {path.name for path in one.artifact.iterdir()} == {path.name for path in other.artifact.iterdir()}
    for path in [*one.artifact.iterdir(), one.store / "x.mar"]:
        again = (other.store if path.suffix == ".mar" else other.artifact) / path.name
        assert path.read_bytes() == again.read_bytes(), path.name


def test_auto_leaves_nothing_but_what_the_manifest_names(builds: List[Built]) -> None:
    built = builds[0]
    assert {path.name for path in built.artifact.iterdir()} == {"traceserve.json", *built.manifest.files}
    assert {path.name for path in built.artifact.parent.iterdir()} == {"x", "x.report.json"}
    assert {path.name for path in built.store.iterdir()} == {"x.mar", "x.report.json"}


def test_the_report_beside_the_archive_tells_what_was_measured(builds: List[Built]) -> None:
    built = builds[0]
    report = built.report
    assert report["chosen"] == "bfloat16" and report["name"] == "x"
    [lower] = report["candidates"]
    assert lower["dtype"] == "bfloat16" and lower["requests_per_second"] is None
    files = set(built.manifest.files) - {GOLDEN_FILE}  # written after the candidates were compared
    named = sum((built.artifact / name).stat().st_size for name in files)
    assert named < lower["bytes"] < named + 20_000  # including its manifest
    told = json.loads((built.artifact / "traceserve.json").read_text())
    del told["receipt"]["golden"]  # the same in each build
    assert not {"requests_per_second", "date", "bytes", "threads"} & set(walk(told))


def walk(document: Any) -> Iterator[str]:
    """Yield every key in it."""
    for key, value in document.items() if isinstance(document, dict) else ():
        yield key
        yield from walk(value)
    for value in document if isinstance(document, list) else ():
        yield from walk(value)


def test_a_build_shows_what_it_took(builds: List[Built]) -> None:
    said = " ".join(builds[0].said.replace("\n", " ").split())
    for shown in ("bfloat16", "--samples FILE with 334 or more of your own", "x.report.json"):
        assert shown in said, said


def test_auto_takes_float32_where_the_processor_has_nothing_else(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(monkeypatch, tmp_path, "sse2", "avx")
    exported = run_export(tmp_path / "x", content(checkpoint, dtype="auto"))
    assert exported.manifest.dtype == "float32"
    assert [item["dtype"] for item in exported.manifest.receipt["candidates"]] == ["float32"]


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_what_auto_tries(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only float32 for generated texts: they change at the first near tie. Weights in float16 where that is faster."""

    def tried(save_mode: str, *features: str) -> Tuple[str, ...]:
        claim(monkeypatch, tmp_path, *features)
        return formats.candidates(save_mode, "cpu", dtypes.AUTO, task)

    x86 = processor.is_x86()
    for save_mode in ("torchscript", "pretrained"):
        lower = ("float32",) if task.loop else ("bfloat16", "float32")
        assert tried(save_mode, "avx2", "avx512_bf16", "amx_int8") == lower
        packed = save_mode == "torchscript" and x86 and not task.loop
        for features in (["avx2"], ["avx2", "avx512f", "amx_int8"]):
            assert tried(save_mode, *features) == (("float16", "float32") if packed else ("float32",))
        assert formats.candidates(save_mode, "gpu", dtypes.AUTO, task) == ("float32",)
    assert tried("torchscript") == ("float32",)


@pytest.mark.parametrize(
    ("limit", "wrong"),
    [(Limit(1e-9, 1.0, 1.0), "difference"), (Limit(1e9, 1e-9, 0.0), "answers")],
    ids=["differences", "answers"],
)
def test_a_bfloat16_that_fails_falls_back_and_says_why(
    limit: Limit,
    wrong: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claim(monkeypatch, tmp_path, "bf16")
    monkeypatch.setitem(LIMITS, "bfloat16", limit)
    if wrong == "difference":
        monkeypatch.setattr(verification, "CORPUS", 0)
    tried: List[Tuple[str, Any]] = []
    monkeypatch.setitem(WRITERS, "torchscript", failing((), tried))
    config = content(checkpoint, dtype="auto", sequence_lengths="fixed")
    run_export(tmp_path / "x", config)
    # Narrower shapes are not tried if answers change.
    lowered = 1 + len(precision.KEPT_SHARES)
    assert [dtype for dtype, _ in tried] == ["bfloat16"] * lowered * (1 if wrong == "answers" else 3) + ["float32"]
    manifest = Manifest.read(tmp_path / "x")
    assert manifest.dtype == "float32" and manifest.receipt["passed"]
    lower, exact = manifest.receipt["candidates"]
    assert (lower["dtype"], lower["passed"], exact["passed"]) == ("bfloat16", False, True)
    assert "does not answer as the original does (in bfloat16" in lower["refused"] and exact["refused"] == ""
    assert lower["answers"] > 0 and lower["largest_difference"] > 1e-3
    if wrong == "answers":
        assert lower["answers_changed"] > 0
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"traceserve.json", *manifest.files}
    traced: Any = torch.jit.load(tmp_path / "x" / "traced_model.pt")  # type: ignore[no-untyped-call]
    assert {parameter.dtype for parameter in traced.parameters()} == {torch.float32}
    assert Engine.load(tmp_path / "x").answer([Request({"text": "hello"})])


def failing(dtypes: Tuple[str, ...], tried: List[Tuple[str, Any]]) -> Any:
    """A writer that cannot write these dtypes, and records requests."""

    def write(original: Any, task: Any, shapes: Any, folder: Path, target: Any) -> Any:
        tried.append((original.dtype, shapes))
        if original.dtype in dtypes:
            raise ExportError(f"no {original.dtype} kernel")
        return writer.write(original, task, shapes, folder, target)

    return WRITERS["torchscript"]._replace(write=write)


def test_a_dtype_that_cannot_be_written_is_passed_over(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And a build shows both."""
    claim(monkeypatch, tmp_path, "bf16")
    tried: List[Tuple[str, Any]] = []
    monkeypatch.setitem(WRITERS, "torchscript", failing(("bfloat16",), tried))
    monkeypatch.chdir(tmp_path)
    Path("setup_config.json").write_text(json.dumps(content(checkpoint, dtype="auto")))
    assert cli.main(["export", "--output", "x"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"bfloat16 .* refused", said) and re.search(r"float32 .* taken", said), said
    manifest = Manifest.read(tmp_path / "x")
    assert manifest.dtype == "float32"
    lower, exact = manifest.receipt["candidates"]
    assert (lower["passed"], lower["answers"], lower["largest_difference"]) == (False, 0, None)
    assert lower["refused"] == "no bfloat16 kernel" and exact["passed"]
    assert [dtype for dtype, _ in tried][-1:] == ["float32"]


def test_where_no_dtype_can_be_written_the_last_ones_reason_is_told(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(monkeypatch, tmp_path, "bf16")
    monkeypatch.setitem(WRITERS, "torchscript", failing(("bfloat16", "float32"), []))
    with pytest.raises(ExportError, match="no float32 kernel"):
        run_export(tmp_path / "x", content(checkpoint, dtype="auto"), allow_drift=True)


def test_only_the_last_dtype_may_drift(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: None
) -> None:
    claim(monkeypatch, tmp_path, "bf16")
    for dtype in ("bfloat16", "float32"):
        monkeypatch.setitem(LIMITS, dtype, Limit(-1.0, 0.0, 0.0))
    config = content(checkpoint, dtype="auto", sequence_lengths="fixed", max_length=8)
    manifest = run_export(tmp_path / "x", config, allow_drift=True).manifest
    assert manifest.dtype == "float32" and manifest.receipt["drift_allowed"] and not manifest.receipt["passed"]


def test_speeds_are_of_every_artifact(made: Maker) -> None:
    told: List[Tuple[int, int]] = []
    folders = {dtype: made("bert", dtype)[0] for dtype in ("float32", "bfloat16")}
    requests = [Request({"text": text}) for text in SENTENCES]
    measured = speeds.measure_speeds(folders, requests, lambda what, done, total: told.append((done, total)))
    assert set(measured) == set(folders) and all(value > 0 for value in measured.values())
    assert told[-1] == (speeds.ROUNDS, speeds.ROUNDS)


def test_a_slow_model_is_asked_less(made: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round has one call's requests at least, where there are so many."""
    engine = Engine.load(made("bert", "float32")[0])
    requests = 3 * [Request({"text": text}) for text in SENTENCES]
    assert speeds.in_a_round(engine, requests) == speeds.MOST
    monkeypatch.setattr(speeds, "SECONDS", 0)
    assert speeds.in_a_round(engine, requests) == speeds.AT_ONCE and speeds.in_a_round(engine, requests[:3]) == 3
    asked: List[int] = []
    own = speeds.answer_round
    monkeypatch.setattr(speeds, "answer_round", lambda one, those: (asked.append(len(those)), own(one, those))[1])
    speeds.measure_speeds({"": made("bert", "float32")[0]}, requests, lambda *_: None)
    assert asked == [speeds.AT_ONCE] * (1 + speeds.ROUNDS)


# Legal configurations


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"dtype": "float16", "save_mode": "pretrained"},
            'dtype is "float16": it is for save_mode torchscript on cpu; take auto, float32, bfloat16',
        ),
        (
            {"dtype": "float16", "hardware": "neuron"},
            'dtype is "float16": it runs on cpu, gpu, not on neuron; take auto, bfloat16',
        ),
        (
            {"dtype": "int8", "task": "text_generation"},
            'dtype is "int8": it is for models that are run once, not for text_generation; take auto, float32, bfloat16, '
            "float16",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_downloaded(
    config: Dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fetch(*arguments: Any) -> Any:
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr(sources, "fetch_checkpoint", fetch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup_config.json").write_text(json.dumps({"model_name": "nobody/nothing", **config}))
    assert cli.main(["export"]) != 0
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_int8_is_for_models_that_are_run_once(task: Any) -> None:
    legal = formats.dtypes("torchscript", "cpu", task)
    for dtype in precision.PRECISIONS:
        config = {"model_name": "x/y", "task": task.name, "dtype": dtype}
        if dtype in legal:
            assert parse_config(config)[0].dtype == dtype
        else:
            with pytest.raises(ConfigError, match=dtype):
                parse_config(config)
    assert ("int8" in legal) is not bool(task.loop)
    assert {"auto", "float32", "bfloat16"} <= set(legal)


# Whose samples decide


def findings(own: int, own_changed: int, others: int = 0, changed: int = 0, dtype: str = "bfloat16") -> Findings:
    """Of the user's `own` samples `own_changed` changed, of `others` `changed`."""
    found = Findings(LIMITS[dtype], answers=own + others, own_answers=own, own_changed=own_changed)
    found.changed = list(range(changed + own_changed))
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize(
    ("own", "decide"), [(0, False), (1, False), (333, False), (334, True), (335, True), (3080, True)]
)
def test_own_samples_decide_where_they_are_enough_to_tell(own: int, decide: bool, dtype: str) -> None:
    assert findings(own, 0, 500, dtype=dtype).own_decide is decide


@pytest.mark.parametrize(
    ("found", "too_many"),
    [
        (findings(334, 1), False),
        (findings(334, 2), True),
        (findings(1000, 3), False),
        (findings(1000, 4), True),
        (findings(3080, 9), False),
        (findings(3080, 10), True),
        (findings(334, 1, 1000, 1000), False),  # the built-in ones do not count then
        (findings(334, 2, 100_000), True),  # nor do they outvote
        (findings(333, 9, 267), False),  # 9 of 600
        (findings(333, 10, 267), True),
        (findings(333, 0, 267, 9), False),
        (findings(333, 0, 267, 10), True),
        (findings(333, 5, 267, 5), True),
        (findings(0, 0, 600, 9), False),
        (findings(0, 0, 600, 10), True),
        (findings(0, 0), False),
    ],
)
def test_how_many_answers_may_change(found: Findings, too_many: bool) -> None:
    assert found.too_many_changed is too_many
    assert found.passed is not too_many


@pytest.mark.parametrize(("own", "others"), [(0, 30), (333, 30), (334, 30), (100_000, 0)])
def test_in_float32_none_may_change(own: int, others: int) -> None:
    assert findings(own, 0, others, 0, "float32").passed
    assert not findings(own, 0, others + 1, 1, "float32").passed
    assert not findings(own + 1, 1, others, 0, "float32").passed


def test_the_users_samples_are_counted_apart(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And decide if there are enough: few enough built-in ones changed for all together."""
    monkeypatch.setattr(verification, "CORPUS", 0)
    monkeypatch.setattr(precision, "KEPT_SHARES", ())
    monkeypatch.setitem(LIMITS, "bfloat16", Limit(0.1, 0.003, 1.0))
    (tmp_path / "mine.txt").write_text("".join(f"{text}\n" for text in sentences(512)))
    exported = run_export(
        tmp_path / "x", content(checkpoint, dtype="bfloat16"), samples_file=tmp_path / "mine.txt", allow_drift=True
    )
    found, receipt = exported.findings, exported.manifest.receipt
    assert found.own_answers == receipt["own_answers"] == 512 and found.answers > 530
    assert found.own_changed == receipt["own_answers_changed"] == sum(i >= found.answers - 512 for i in found.changed)
    assert found.own_decide and found.own_changed > 1 and not found.passed


def test_a_try_that_fails_is_compared_no_further(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once more of the user's answers have changed than of all of them may; the report says how many were compared."""
    monkeypatch.setattr(precision, "KEPT_SHARES", ())
    monkeypatch.setitem(LIMITS, "bfloat16", Limit(10.0, 0.003, 1.0))
    monkeypatch.setattr(answers, "_AT_ONCE", 16)
    monkeypatch.setattr(answers, "_changed", lambda engine, reference, encoded, *_: encoded.rows[0].length % 2 == 1)
    (tmp_path / "mine.txt").write_text("".join(f"{text}\n" for text in sentences(512)))
    with pytest.raises(DriftError) as caught:
        run_export(tmp_path / "x", content(checkpoint, dtype="bfloat16"), samples_file=tmp_path / "mine.txt")
    found = caught.value.findings
    assert found.own_answers == found.answers == 16
    assert found.too_many_changed and 1 < found.own_changed <= 16
    assert found.changed == sorted(found.changed)


@pytest.mark.parametrize("by_chance", [False, True])
def test_other_variants_answer_some_of_the_users_samples(
    by_chance: bool, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all of them if too many of these changed, which is by chance: the default variant answered all."""
    monkeypatch.setattr(verification, "CORPUS", 0)
    monkeypatch.setattr(verification, "OWN_OF_OTHERS_LOWER", 8)
    monkeypatch.setitem(LIMITS, "bfloat16", Limit(0.1, 0.9, 1.0))
    compare = verification._Gate.compare

    def unlucky(gate: Any, engine: Any, findings: Findings) -> Findings:
        found = compare(gate, engine, findings)
        if by_chance and len(gate.own) == 8:
            found.own_changed = 8
        return found

    monkeypatch.setattr(verification._Gate, "compare", unlucky)
    (tmp_path / "mine.txt").write_text("".join(f"{text}\n" for text in sentences(15)))
    exported = run_export(
        tmp_path / "x", content(checkpoint, dtype="bfloat16"), samples_file=tmp_path / "mine.txt", allow_drift=True
    )
    found = exported.findings
    assert found.own_answers == 15 and found.others
    assert {other.own_answers for other in found.others} == {15 if by_chance else 8}


@pytest.mark.parametrize(("count", "most", "spread"), [(3, 4, [0, 1, 2]), (4, 4, [0, 1, 2, 3]), (7, 4, [0, 1, 3, 5])])
def test_the_users_samples_are_spread(count: int, most: int, spread: List[int]) -> None:
    """As many as requested, if there are enough: below 334 they would not decide."""
    samples = [Request({"text": str(i)}, {}) for i in range(count)]
    assert [request.inputs["text"] for request in verification._spread(samples, most)] == [str(i) for i in spread]


# The sentences


def test_the_corpus_is_of_different_sentences() -> None:
    everything = sentences(10_000)
    assert len(everything) == len(set(everything)) == verification.CORPUS
    assert sentences(5) == everything[:5]
    assert all(text == text.strip() and "{" not in text and 15 < len(text) < 300 for text in everything)


def test_what_a_model_reads_is_shown_by_the_users_own_texts() -> None:
    kind = TASKS["sequence_classification"]
    own = [Request({"text": f"text {i}", "text_pair": f"pair {i}"}) for i in range(1000)]
    shown = calibration(kind, own, 64)
    assert len(shown) == len(calibration(kind, [], 64)) == 64 and len(calibration(kind, [], 256)) == 256
    pairs = [text for text in shown if isinstance(text, tuple)]
    assert len(pairs) > 30 and {(one[:5], other[:5]) for one, other in pairs} == {("text ", "pair ")}
    one = Request({"text": "a text"})
    assert set(calibration(kind, [one], 64)) == {*SENTENCES, "a text"}
    assert set(calibration(TASKS["token_classification"], [], 64)) < {*SENTENCES, *sentences(64)}


@pytest.mark.parametrize(
    "task, inputs, parameters, expected",
    [
        ("question_answering", {"context": "C", "question": "Q"}, {}, [("Q", "C")]),
        ("text_ranking", {"query": "Q", "documents": ["A", "B"]}, {}, [("Q", "A"), ("Q", "B")]),
        (
            "zero_shot_classification",
            {"text": "T"},
            {"candidate_labels": "a, b"},
            [("T", "This example is a."), ("T", "This example is b.")],
        ),
        (
            "zero_shot_classification",
            {"text": "T"},
            {"candidate_labels": ["a"], "hypothesis_template": "Of {}."},
            [("T", "Of a.")],
        ),
        ("text_generation", {"messages": [{"role": "user", "content": "hello"}]}, {}, []),
    ],
)
def test_what_a_model_reads_in_pairs_is_shown_in_pairs(
    task: str, inputs: Dict[str, Any], parameters: Dict[str, Any], expected: List[Any]
) -> None:
    shown = calibration(TASKS[task], [Request(inputs, parameters)], 64)
    if expected:
        assert shown[-len(expected) :] == expected and all(isinstance(text, tuple) for text in shown)
    built_in = calibration(TASKS[task], [], 64)
    assert len(built_in) == 64 and {type(text) for text in built_in} == {tuple if expected else str}


def test_some_of_a_classifiers_texts_are_pairs_where_they_fix_ranges() -> None:
    kind = TASKS["sequence_classification"]
    built_in = calibration(kind, [], 256, all_kinds=True)
    assert len(built_in) == 256 and 40 < sum(isinstance(text, tuple) for text in built_in) < 64
    assert all(isinstance(text, str) for text in calibration(kind, [], 256))


def test_the_users_own_texts_are_shown_from_the_first_to_the_last() -> None:
    own = [Request({"text": f"text {i}"}) for i in range(1000)]
    shown = calibration(TASKS["sequence_classification"], own, 64)
    numbers = [int(text[5:]) for text in shown if isinstance(text, str) and "text " in text]
    assert min(numbers) < 50 and max(numbers) > 900


def test_each_of_the_originals_outputs_is_computed_once(
    made: Maker, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many artifacts are compared with it; and a lower precision is asked more."""
    exact, lower = made("bert", "float32")[0], made("bert", "bfloat16")[0]
    reference = references.Reference(load(checkpoint, tmp_path))
    computed: List[Any] = []
    own = references.run_originals

    def run_originals(original: Any, rows: Any, outputs: Any) -> Any:
        computed.append([(tuple(row.encoding.ids), tuple(row.encoding.type_ids)) for row in rows])
        return own(original, rows, outputs)

    monkeypatch.setattr(references, "run_originals", run_originals)
    first = verification.verify(exact, reference, [], nothing)
    assert first.passed and 25 < first.answers < 100 and computed
    asked = list(computed)
    assert verification.verify(exact, reference, [], nothing) == first
    assert computed == asked
    more = verification.verify(lower, reference, [], nothing)
    later = computed[len(asked) :]
    alone, together = [rows for rows in later if len(rows) == 1], [rows for rows in later if len(rows) > 1]
    assert more.answers > first.answers + 512 and len(later) < 128  # runs
    once = [row for rows in (*alone, *together) for row in rows]
    # One row of each batch is checked, and one whose answer changed is rerun alone.
    again = len(together) + sum(len(found.changed) for found in more.every)
    assert len(set(once)) > 256 and len(once) <= len(set(once)) + again
    assert all(len({len(ids) for ids, _ in rows}) == 1 for rows in computed)


def test_what_the_gate_finds_does_not_depend_on_this_machines_clock(
    made: Maker, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: None
) -> None:
    folder, _ = made("bert", "bfloat16")
    reference = references.Reference(load(checkpoint, tmp_path))
    runs: List[List[Any]] = []
    own = TorchScriptRunner.__call__

    def recording(self: Any, inputs: Any) -> Any:
        runs[-1].append(inputs["input_ids"].tolist())
        return own(self, inputs)

    monkeypatch.setattr(TorchScriptRunner, "__call__", recording)
    monkeypatch.setattr(measuring, "time_runs", lambda run, manifest: [])
    for cost in (CostModel(run=0.0, attention=0.1), CostModel(run=2000.0, attention=0.0)):
        monkeypatch.setattr(costs, "fit_costs", lambda timings, cost=cost: cost)
        runs.append([])
        verification.verify(folder, reference, [], nothing)
    assert runs[0] == runs[1]
