"""The Python API: an archive built and asked in this process answers as a server does."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import torch
import traceserve
from safetensors.torch import load_file, save_file
from traceserve.archives.reports import report_file
from traceserve.building.writers.tracing.wrapping import as_traced
from traceserve.checking.explaining import explain_archive
from traceserve.errors import ConfigError, ExportError
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InputTooLong, InvalidRequest, MissingPackage, TraceserveError
from traceserve_runtime.runtimes import torch_internals

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def archive(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> traceserve.BuiltArchive:
    folder = tmp_path_factory.mktemp("api")
    labels = {0: "red", 1: "green", 2: "blue"}
    told: List[str] = []
    (folder / "store").mkdir()
    (folder / "store" / "colours.report.json").write_text('{"golden_p50_ms": 12.5}')
    made = traceserve.build(
        str(checkpoint("bert", id2label=labels)),
        task="text-classification",
        max_length=32,
        dtype="float32",
        output=folder / "colours",
        store=folder / "store",
        samples=["A red flower.", "A green leaf."],
        keep_samples=True,
        version="2.0",
        progress=lambda what, done, total: told.append(what),
    )
    assert made.path == folder / "store" / "colours.mar" and made.path.is_file()
    assert "packing" in told
    return made


def test_what_was_built(archive: traceserve.BuiltArchive) -> None:
    assert archive.manifest.task == "sequence_classification" and archive.manifest.labels == ("red", "green", "blue")
    assert archive.manifest.receipt["answers"] >= 2
    assert archive.manifest.receipt["golden"]["own_samples"] == 2
    assert archive.report["name"] == "colours"
    assert archive.note is None and archive.report["note"] is None
    for made in (archive.path, archive.path.parent.parent / "colours"):  # beside both, in place of an earlier build's
        assert json.loads(report_file(made).read_text()) == archive.report


def test_the_notes_on_a_checkpoint(checkpoint: Make, tmp_path: Path) -> None:
    """Weights that the model does not read are in the receipt too."""
    source = shutil.copytree(checkpoint("bert"), tmp_path / "copy")
    weights = load_file(source / "model.safetensors")
    save_file({**weights, "crf.transitions": torch.zeros(2)}, source / "model.safetensors", {"format": "pt"})
    made = traceserve.build(
        source, store=tmp_path, output=tmp_path / "x", task="sequence_classification", max_length=24
    )
    told = made.manifest.receipt["unread_weights"]
    assert "does not read: crf.transitions;" in told and told in (made.note or "") and made.report["note"] == made.note


def test_it_answers_as_a_server(archive: traceserve.BuiltArchive) -> None:
    model = traceserve.load(archive)
    one = model("A red flower.")
    assert set(one) == {"label", "score"}
    assert model({"text": "A red flower."}) == one
    assert [each["label"] for each in model(["A red flower."] * 2)] == [one["label"]] * 2
    assert len(model("A red flower.", top_k=3)) == 3
    from_path = traceserve.load(str(archive.path))
    assert from_path("A red flower.") == one and from_path.manifest.version == archive.manifest.version


def test_a_wrong_input_says_what_is_wrong(archive: traceserve.BuiltArchive) -> None:
    model = traceserve.load(archive)
    with pytest.raises(InvalidRequest, match='did you mean "text"') as error:
        model({"txt": "A red flower."})
    assert error.value.field
    with pytest.raises(InvalidRequest, match="top_k"):
        model("A red flower.", top_k="three")
    with pytest.raises(InputTooLong):
        model("red " * 100_000)


def test_it_explains_as_a_server(archive: traceserve.BuiltArchive) -> None:
    model = traceserve.load(archive)
    one = model.explain("A red flower.", label="green", steps=4)
    assert one["target"] == {"label": "green"} and [word["word"] for word in one["words"]][:2] == ["A", "red"]
    assert one == explain_archive(
        archive.path, {"inputs": "A red flower.", "parameters": {"label": "green", "steps": 4}}
    )
    assert len(model.explain(["A red flower.", {"text": "A green leaf."}], steps=2)) == 2
    with pytest.raises(InvalidRequest, match="no such label"):
        model.explain("A red flower.", label="grey")


def test_threads_are_chosen(archive: traceserve.BuiltArchive, monkeypatch: pytest.MonkeyPatch) -> None:
    given: List[Any] = []
    own = Engine.load

    def load(folder: Path, device: str, settings: Any) -> Engine:
        given.append(settings.threads)
        return own(folder, device)

    monkeypatch.setattr(Engine, "load", load)
    traceserve.load(archive)
    traceserve.load(archive, threads=2)
    assert given == [None, 2]
    for wrong in (0, -1, True, "2"):
        with pytest.raises(ConfigError, match="^threads is .*; it should be 1 or more"):
            traceserve.load(archive, threads=wrong)  # type: ignore[arg-type]


def test_documented_errors_are_exported() -> None:
    assert dir(traceserve) == sorted(traceserve.__all__)
    assert all(getattr(traceserve, name) for name in traceserve.__all__)
    assert traceserve.TraceserveError is TraceserveError and traceserve.ConfigError is ConfigError
    assert issubclass(traceserve.SignatureError, traceserve.ArchiveError)


def test_only_given_samples_can_be_kept(checkpoint: Make, tmp_path: Path) -> None:
    words = "^keep_samples=True keeps your own samples, and none are given; give samples, or leave both out$"
    with pytest.raises(ConfigError, match=words):
        traceserve.build(str(checkpoint("bert")), store=tmp_path, output=tmp_path / "x", keep_samples=True)
    assert list(tmp_path.iterdir()) == []


AMBIENT: Dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("mode", AMBIENT)
def test_a_programs_modes_change_neither_answers_nor_explanations(mode: str, archive: traceserve.BuiltArchive) -> None:
    before = traceserve.load(archive)
    one, words = before("A red flower."), before.explain("A red flower.", method="integrated_gradients")["words"]
    with AMBIENT[mode]():
        for model in (before, traceserve.load(archive)):
            assert model("A red flower.") == one
            found = model.explain("A red flower.", method="integrated_gradients")["words"]
            attributions = [each["attribution"] for each in words]
            assert [each["attribution"] for each in found] == pytest.approx(attributions, abs=1e-6)


@pytest.mark.parametrize("mode", AMBIENT)
def test_a_programs_modes_do_not_change_what_is_built(
    mode: str, archive: traceserve.BuiltArchive, checkpoint: Make, tmp_path: Path
) -> None:
    name = str(checkpoint("bert", id2label={0: "red", 1: "green", 2: "blue"}))
    with AMBIENT[mode]():
        made = traceserve.build(
            name, task="text-classification", max_length=32, dtype="float32", output=tmp_path / "x", store=tmp_path
        )
    expected = traceserve.load(archive)("A red flower.")
    assert traceserve.load(made)("A red flower.") == {**expected, "score": pytest.approx(expected["score"], abs=1e-6)}


def test_one_thread_builds_at_a_time(checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    building: List[int] = []
    most: List[int] = []

    def fails(*_: object) -> None:
        building.append(1)
        most.append(len(building))
        time.sleep(0.2)
        building.pop()
        raise ExportError("not today")

    monkeypatch.setattr("traceserve.building.export._export", fails)
    name = str(checkpoint("bert"))

    def build(number: int) -> None:
        with pytest.raises(ExportError, match="not today"):
            traceserve.build(name, task="text-classification", output=tmp_path / f"{number}", store=tmp_path)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, range(2)))
    assert most == [1, 1]


def test_other_threads_train_while_one_traces() -> None:
    """torch's functions are replaced for the tracer in the thread that traces alone."""

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0]

    def gradient() -> List[float]:
        x = torch.full((2,), 1.3, requires_grad=True)
        with torch.enable_grad():
            Rounded.apply(x).sum().backward()
        return [] if x.grad is None else x.grad.tolist()

    own = (torch.Tensor.as_strided, torch.Tensor.scatter, torch.cat, torch.autograd.Function.__dict__["apply"])
    with ThreadPoolExecutor(1) as pool, as_traced(torch.nn.Linear(2, 2)):
        assert pool.submit(gradient).result() == [1.0, 1.0]
        traced = torch.jit.trace(lambda x: Rounded.apply(x), torch.ones(2))
    assert "aten::round" in str(traced.graph) and "PythonOp" not in str(traced.graph)
    assert own == (torch.Tensor.as_strided, torch.Tensor.scatter, torch.cat, torch.autograd.Function.__dict__["apply"])


def test_a_build_leaves_the_callers_random_numbers_and_environment(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    limit = sys.getrecursionlimit()
    torch_internals.set_profiling(True)  # its default

    def drawn() -> List[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed() -> None:
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)

    seed()
    expected = drawn()
    seed()
    name = str(checkpoint("bert"))
    traceserve.build(name, task="text-classification", max_length=32, output=tmp_path / "x", store=tmp_path)
    assert drawn() == expected
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    assert sys.getrecursionlimit() == limit and torch_internals.set_profiling(True)


def test_nothing_stays_of_what_was_unpacked(
    archive: traceserve.BuiltArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = traceserve.load(archive)
    [folder] = tmp_path.iterdir()
    assert (folder / "traceserve.json").is_file()
    del model
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    damaged = tmp_path / "damaged.mar"
    damaged.write_bytes(archive.path.read_bytes()[:3000])
    with pytest.raises(TraceserveError, match="damaged.mar"):
        traceserve.load(damaged)
    assert list(tmp_path.iterdir()) == [damaged]


LOADED = """
import sys, tempfile, traceserve

tempfile.tempdir = sys.argv[2]
model = traceserve.load(sys.argv[1])
print("loaded", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_leaves_nothing_for_ever(archive: traceserve.BuiltArchive, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADED, str(archive.path), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "loaded\n"
        [left] = tmp_path.iterdir()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.stdout == "loaded\n" and list(tmp_path.iterdir()) == [left]  # in use
        process.kill()
    assert (left / "traceserve.json").is_file()
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True, capture_output=True)
    assert list(tmp_path.iterdir()) == []


FORKED = """
import os, sys, tempfile, torch, traceserve

tempfile.tempdir = sys.argv[2]
torch.set_num_threads(2)
parents, alone = traceserve.load(sys.argv[1]), traceserve.load(sys.argv[1], threads=int(sys.argv[3]))
expected = alone("A red flower.")
child = os.fork()
if child == 0:
    for model in (parents, alone):
        try:
            print(model("A red flower.") == expected)
        except traceserve.TraceserveError as error:
            print(str(error)[:60])
    sys.exit(0)
os.waitpid(child, 0)
print(len(os.listdir(sys.argv[2])), bool(parents.explain("A red flower.")["words"]))
"""
REFUSED = "this archive was loaded before the process was forked, and torch would wait"


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="torch has no threads to wait for")
@pytest.mark.parametrize("threads, told", [(1, "True"), (2, REFUSED[:60])])
def test_a_forked_child_neither_hangs_nor_takes_its_parents_folder(
    threads: int, told: str, archive: traceserve.BuiltArchive, tmp_path: Path
) -> None:
    """As a worker of gunicorn --preload, or of multiprocessing."""
    command = [sys.executable, "-c", FORKED, str(archive.path), str(tmp_path), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [REFUSED[:60], told, "2 True"], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_errors_speak_of_arguments(archive: traceserve.BuiltArchive, checkpoint: Make, tmp_path: Path) -> None:
    name = str(checkpoint("bert"))
    with pytest.raises(ConfigError) as empty:
        traceserve.build(name, output=tmp_path / "x", store=tmp_path, samples=[])
    assert empty.value.message == str(empty.value) == "samples holds no text"
    bodies: List[Any] = ["A red flower.", {"txt": "A green leaf."}]
    with pytest.raises(ConfigError, match=r"^samples\[1\]: ") as wrong:
        traceserve.build(name, task="feature_extraction", output=tmp_path / "x", store=tmp_path, samples=bodies)
    with pytest.raises(ExportError, match="exists already; force=True replaces it, output writes") as taken:
        traceserve.build(name, output=archive.path.parents[1] / "colours")
    with pytest.raises(MissingPackage, match="the caller asks for the device meta") as device:
        traceserve.load(archive, device="meta")
    for raised in (empty, wrong, taken, device):
        assert not set(re.findall(r"--\w+|TorchServe|samples.jsonl", raised.value.message))
    assert list(tmp_path.iterdir()) == []


def test_what_only_looks_like_an_option_is_left_in_an_error(checkpoint: Make, tmp_path: Path) -> None:
    target = tmp_path / "--force-download" / "x"
    target.mkdir(parents=True)
    (target / "data").write_text("mine")
    with pytest.raises(ExportError) as taken:
        traceserve.build(str(checkpoint("bert")), output=target, store=tmp_path)
    assert taken.value.message.startswith(f"{target} is no artifact of traceserve")
    assert taken.value.message.endswith("choose another folder, as output artifacts/NAME")


def test_any_sequence_and_mapping_is_an_input(archive: traceserve.BuiltArchive) -> None:
    model = traceserve.load(archive)
    expected = model(["A red flower.", {"text": "A green leaf."}])
    assert model(("A red flower.", MappingProxyType({"text": "A green leaf."}))) == expected


def test_iterables_and_numbers_of_numpy_are_inputs(archive: traceserve.BuiltArchive) -> None:
    model = traceserve.load(archive)
    texts = ["A red flower.", "A green leaf."]
    expected = model(texts)
    series = SimpleNamespace(tolist=lambda: texts)  # as pandas has it
    assert model(np.array(texts)) == model(text for text in texts) == model(series) == expected  # type: ignore[arg-type]
    assert model({texts[0]}) == expected[:1]
    assert model(texts[0], top_k=np.int64(2)) == model(texts[0], top_k=2)


def test_what_is_no_json_is_named(archive: traceserve.BuiltArchive) -> None:
    model = traceserve.load(archive)
    for wrong in (Path("x"), ["a", Path("x")], {"text": Path("x")}):
        with pytest.raises(InvalidRequest, match=f"lists and objects, and no {type(Path()).__name__}$"):
            model(wrong)  # type: ignore[arg-type]


def test_a_stream_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    name = str(checkpoint("llama", "AutoModelForCausalLM"))
    options = {"output": tmp_path / "x", "store": tmp_path, "max_length": 48}
    model = traceserve.load(traceserve.build(name, task="text_generation", **options))  # type: ignore[arg-type]
    assert model("a", max_new_tokens=2, stream=False) == model("a", max_new_tokens=2)
    with pytest.raises(InvalidRequest, match="leave stream out") as refused:
        model("a", max_new_tokens=2, stream=True)
    assert refused.value.field == "stream"


def test_a_version_and_a_path(checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='version should be a string, such as "2", not int'):
        traceserve.build(str(tmp_path), version=2)  # type: ignore[arg-type]
    with pytest.raises(TraceserveError, match="nothing-here"):
        traceserve.build(tmp_path / "nothing-here")


def test_labels_are_read_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="^index_to_name: .*typo.json cannot be read: No such file"):
        traceserve.build("org/nothing", task="sequence_classification", index_to_name="typo.json")


def test_a_configuration_file_or_keys(
    archive: traceserve.BuiltArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong: List[Dict[str, Any]] = [{}, {"model_name": "a", "config": "b"}, {"config": "b", "task": "fill_mask"}]
    for given in wrong:
        with pytest.raises(ConfigError):
            traceserve.build(**given)
    with pytest.raises(ConfigError, match="max_lenght"):
        traceserve.build("a", max_lenght=3)
    with pytest.raises(ExportError, match="exists"):
        traceserve.build("nowhere", output=archive.path.parents[1] / "colours")


def test_the_package_itself_starts_fast() -> None:
    code = "import sys, traceserve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        traceserve.biuld  # type: ignore[attr-defined]  # noqa: B018
