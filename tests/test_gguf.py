"""Checkpoints in a GGUF file: generated texts, downloads, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, List, Optional

import pytest
import torch
import transformers
from conftest import run_export
from traceserve.building.checkpoints import gguf as gguf_checkpoint
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.gguf import tokenizer_options
from traceserve.building.checkpoints.loading import load_original, quiet_transformers
from traceserve.building.checkpoints.sources import fetch_checkpoint
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate.texts import SENTENCES
from traceserve.errors import ConfigError, ExportError, SourceError
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request

gguf = pytest.importorskip("gguf", reason="pip install 'traceserve[gguf]'")
pytest.importorskip("accelerate", reason="pip install 'traceserve[gguf]'")
write_gguf = pytest.importorskip("gguf_files").write_gguf  # it imports gguf

NEW = int(transformers.__version__.split(".")[0]) >= 5
QUANTIZED = gguf.GGMLQuantizationType.Q8_0
TEXTS = [text for text in SENTENCES if text][:12]


@pytest.fixture(scope="module")
def llama(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama", "AutoModelForCausalLM")


@pytest.fixture(scope="module", params=[None, QUANTIZED], ids=["float32", "Q8_0"])
def quantization(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def exported(quantization: Any, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a GGUF file beside files of another model."""
    if not NEW:
        pytest.skip("transformers 4 reads byte-level tokenizers of GGUF files wrongly, see below")
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "sub").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / "sub" / name).write_text('{"model_type": "bert"}')
    write_gguf(folder / "sub" / "tiny.gguf", llama, quantization)
    content = {"model_name": str(folder), "gguf_file": "sub/tiny.gguf", "task": "text_generation", "max_length": 96}
    run_export(folder / "artifact", content)
    return folder / "artifact"


def dequantized(source: Path, quantization: Any) -> Any:
    """The GGUF file's source model, with weights dequantized from its blocks."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    for weight in model.parameters():
        if quantization is not None and weight.ndim > 1:
            blocks = gguf.quantize(weight.detach().numpy(), quantization)
            weight.data = torch.from_numpy(gguf.dequantize(blocks, quantization))
    return model


def test_writes_what_the_dequantized_model_writes(exported: Path, quantization: Any, llama: Path) -> None:
    engine, model = Engine.load(exported), dequantized(llama, quantization)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    expected = []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
        expected.append(text + tokenizer.decode(ids, skip_special_tokens=True))
    results = engine.answer([Request({"text": text}, {"max_new_tokens": 16}) for text in TEXTS])
    assert [r.value[0]["generated_text"] for r in results if isinstance(r, Answer)] == expected
    assert len(set(expected)) == len(TEXTS)


def test_the_manifest_tells_the_file(exported: Path) -> None:
    manifest = Engine.load(exported).manifest
    assert list(manifest.source.files) == ["sub/tiny.gguf"]
    assert manifest.facts["eos_ids"] == [
        json.loads((exported / "tokenizer.json").read_text())["model"]["vocab"]["<end>"]
    ]
    assert {"gguf", "transformers"} <= set(manifest.versions)


def read(folder: Path, **content: Any) -> Any:
    named = {"model_name": str(folder), "task": "text_generation", "gguf_file": "x.gguf", **content}
    config, _ = parse_config(named)
    with quiet_transformers():
        return load_original(config, fetch_checkpoint(config, folder), folder)


@pytest.mark.parametrize("scaled, word", [("tensor", "rope_freqs.weight"), ("metadata", "rope.scaling.type linear")])
def test_scaled_positions_are_refused(scaled: str, word: str, llama: Path, tmp_path: Path) -> None:
    """transformers reads such a file, and writes other texts."""
    write_gguf(tmp_path / "x.gguf", llama, scaled=scaled)
    with pytest.raises(ExportError, match=f"scales its rotary embeddings .{word}., which transformers does not read"):
        read(tmp_path)


def test_a_file_is_parsed_once(llama: Path, tmp_path: Path) -> None:
    """Unless it has changed."""
    for begins in (True, False):
        path = write_gguf(tmp_path / "x.gguf", llama, begins=begins)
        checkpoint = Checkpoint(tmp_path, "folder", gguf_file=path.name)
        parsed = gguf_checkpoint._read.cache_info().misses
        gguf_checkpoint.check_gguf(checkpoint)
        assert tokenizer_options(checkpoint) == {"add_bos_token": begins}
        assert gguf_checkpoint._read.cache_info().misses == parsed + 1


@pytest.mark.skipif(NEW, reason="transformers 5 reads it rightly")
def test_a_tokenizer_that_is_read_wrongly(llama: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", llama)
    with pytest.raises(ExportError, match="loses spaces; take transformers 5"):
        read(tmp_path)


@pytest.mark.parametrize("begins", [True, False])
def test_whether_a_text_begins_with_a_token_of_its_own(begins: bool, llama: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", llama, begins=begins)
    assert tokenizer_options(Checkpoint(tmp_path, "folder", gguf_file=path.name)) == {"add_bos_token": begins}
    if NEW:
        assert (read(tmp_path).tokenizer("a")["input_ids"][0] == 1) is begins


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not at all a GGUF file" * 9])
def test_what_is_no_gguf_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(SourceError, match="x.gguf cannot be read as a GGUF file"):
        read(tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "q4").mkdir()
    (tmp_path / "q4" / "y.gguf").write_bytes(b"")
    with pytest.raises(SourceError, match=r"has no file x.gguf; GGUF files in it: q4/y.gguf$"):
        read(tmp_path)


def test_nothing_else_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the one file of a repository with every size of a model, even if its name looks like a pattern."""
    import huggingface_hub

    asked: List[Any] = []

    def download(name: str, revision: Optional[str], allow_patterns: List[str], ignore_patterns: List[str]) -> str:
        asked.append((name, revision, allow_patterns))
        (tmp_path / "abc").mkdir()
        (tmp_path / "abc" / "x (1).gguf").write_bytes(b"")
        return str(tmp_path / "abc")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    content = {"model_name": "org/name", "revision": "v1", "task": "text_generation", "gguf_file": "x (1).gguf"}
    config, _ = parse_config(content)
    expected = Checkpoint(tmp_path / "abc", "hub", "abc", gguf_file="x (1).gguf", task="text_generation")
    assert fetch_checkpoint(config, tmp_path) == expected
    assert asked == [("org/name", "v1", ["x (1).gguf"])]


@pytest.mark.parametrize("task", [name for name in TASKS if TASKS[name].auto_model != "AutoModelForCausalLM"])
def test_other_tasks_are_refused_at_once(task: str) -> None:
    with pytest.raises(ConfigError, match=f"gguf_file is for text generators, and not for the task {task}"):
        parse_config({"model_name": "x", "task": task, "gguf_file": "x.gguf"})


def test_another_library_is_refused_at_once() -> None:
    content = {"model_name": "x", "task": "text_generation", "gguf_file": "x.gguf", "library": "curated_transformers"}
    with pytest.raises(ConfigError, match="curated_transformers reads no GGUF files; with gguf_file take transformers"):
        parse_config(content)


def test_a_part_of_a_file_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="is a part of a file that was split"):
        parse_config({"model_name": "x", "task": "text_generation", "gguf_file": "x-00001-of-00002.gguf"})


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_package_that_is_missing(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ExportError, match=r"not installed .* pip install 'traceserve\[gguf\]'"):
        read(tmp_path)
