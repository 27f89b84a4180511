"""The library curated_transformers: answers equal to transformers', its own generator, and refusals."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest
import torch
import transformers
from conftest import run_export
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.loading import load_original, quiet_transformers
from traceserve.building.checkpoints.original import Original
from traceserve.building.config.parsing import parse_config
from traceserve.building.config.save_modes import Target
from traceserve.building.gate.texts import SENTENCES
from traceserve.building.writers.torchscript import writer
from traceserve.building.writers.tracing.graphs import MODEL_FILE
from traceserve.errors import ConfigError, ExportError, SourceError
from traceserve_runtime.engine import Engine
from traceserve_runtime.manifest import Shapes
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request

pytest.importorskip("curated_transformers", reason="pip install 'traceserve[curated]'")

ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "albert", "electra")
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Decoders by family, and their configuration.
DECODERS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt-neox": ("gpt-neox", {}),
    "falcon-multi-query": ("falcon", {**LAYERS, "multi_query": True}),
    "falcon-grouped": ("falcon", {**LAYERS, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "mpt": ("mpt", {}),
}
OPTIONS: List[Dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    {"num_beams": 3, "length_penalty": 2.0},
]
CURATED = {"library": "curated_transformers", "max_length": 64}
TEXTS = [text for text in SENTENCES if text]


def values(engine: Engine, requests: List[Request]) -> List[Any]:
    results = engine.answer(requests)
    assert all(isinstance(result, Answer) for result in results), results
    return [result.value for result in results if isinstance(result, Answer)]


@pytest.fixture(scope="module")
def decoder(checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    """The checkpoint of a decoder in DECODERS."""

    def make(name: str) -> Path:
        family, options = DECODERS[name]
        return checkpoint(family, "AutoModelForCausalLM", **options)

    return make


@pytest.fixture(scope="module")
def exported(
    decoder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Tuple[Engine, Path]]:
    """The engine of a decoder's artifact, and its checkpoint."""
    made: Dict[str, Engine] = {}

    def make(name: str) -> Tuple[Engine, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("curated") / name
            run_export(folder, {"model_name": str(decoder(name)), "task": "text_generation", **CURATED})
            made[name] = Engine.load(folder)
        return made[name], decoder(name)

    return make


@pytest.mark.parametrize("architecture", ENCODERS)
def test_vectors_as_by_transformers(architecture: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """All texts together, of many lengths, against transformers' model on each alone."""
    source = checkpoint(architecture, "AutoModel")
    run_export(
        tmp_path / "made", {"model_name": str(source), "task": "feature_extraction", **CURATED, "max_length": 150}
    )
    model = transformers.AutoModel.from_pretrained(source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    got = values(Engine.load(tmp_path / "made"), [Request({"text": text}, {"pooling": "none"}) for text in TEXTS])
    for text, vectors in zip(TEXTS, got):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-5)


def test_pairs_and_a_lower_precision(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Types are passed on, and the conversion to bfloat16 works as for transformers' models."""
    source = checkpoint("bert", "AutoModel")
    content = {"model_name": str(source), "task": "feature_extraction", "dtype": "bfloat16", **CURATED}
    run_export(tmp_path / "made", content)
    engine = Engine.load(tmp_path / "made")
    model = transformers.AutoModel.from_pretrained(source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    inputs = tokenizer("A first text.", "And a second.", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state.numpy()
        otherwise = model(**{**inputs, "token_type_ids": 0 * inputs["token_type_ids"]}).last_hidden_state.numpy()
    [got] = values(engine, [Request({"text": "A first text.", "text_pair": "And a second."}, {"pooling": "none"})])
    assert np.abs(np.array(got) - expected).max() < 0.1 < np.abs(otherwise - expected).max()
    assert {engine.manifest.dtype, engine.manifest.source.library} == {"bfloat16", "curated_transformers"}
    assert "curated-transformers" in engine.manifest.versions


@pytest.mark.parametrize("name", DECODERS)
def test_writes_as_transformers_does(name: str, exported: Callable[[str], Tuple[Engine, Path]]) -> None:
    """Prompts of many lengths and settings in one batch, against transformers' `generate` for each alone."""
    engine, source = exported(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    prompts = [tokenizer.decode(tokenizer(text)["input_ids"][: 3 + 3 * i]) for i, text in enumerate(TEXTS[:12])]
    requests, expected = [], []
    for i, text in enumerate(prompts):
        options = {"max_new_tokens": 12, **OPTIONS[i % len(OPTIONS)]}
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, do_sample=False, **options)[0, inputs["input_ids"].shape[1] :]
        expected.append([{"generated_text": text + tokenizer.decode(ids, skip_special_tokens=True)}])
        requests.append(Request({"text": text}, options))
    assert values(engine, requests) == expected
    assert len({len(tokenizer(text)["input_ids"]) for text in prompts}) > 8


@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_writes_as_the_library_itself(
    name: str, exported: Callable[[str], Tuple[Engine, Path]], tmp_path: Path
) -> None:
    """With its own loading, rereading the sequence for each token. (Its own loop needs huggingface_hub below 1.0.)"""
    from curated_transformers.layers import AttentionMask
    from curated_transformers.models import AutoCausalLM
    from fsspec.implementations.local import LocalFileSystem

    engine, source = exported(name)
    folder = shutil.copytree(source, tmp_path / "copy")
    # It reads the dtype only by its old name.
    change_json(folder / "config.json", torch_dtype="float32")
    model: Any = AutoCausalLM.from_fsspec(fs=LocalFileSystem(), model_path=str(folder)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    for text in TEXTS[1:4]:
        prompt = tokenizer(text)["input_ids"]
        ids = list(prompt)
        while len(ids) < len(prompt) + 10:
            with torch.no_grad():
                row = torch.tensor([ids])
                ids.append(int(model(row, AttentionMask(torch.ones_like(row).bool())).logits[0, -1].argmax()))
        written = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert values(engine, [Request({"text": text}, {"max_new_tokens": 10})]) == [
            [{"generated_text": text + written}]
        ]


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def original(folder: Path, **content: Any) -> Original:
    config, _ = parse_config({"model_name": str(folder), **CURATED, **content})
    with quiet_transformers():
        return load_original(config, Checkpoint(folder, "folder"), folder)


def test_a_trace_has_the_positions_of_its_longest_row(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The library's table of rotary embeddings starts with 512 positions, and a trace keeps the table it saw."""
    source = checkpoint("llama", "AutoModelForCausalLM", max_position_embeddings=700)
    folder = shutil.copytree(source, tmp_path / "copy")
    change_json(folder / "tokenizer_config.json", model_max_length=700)
    made = original(folder, task="text_generation", max_length=640)
    writer.write(made, TASKS["text_generation"], Shapes(), tmp_path, Target("cpu", {}))
    graphs: Any = torch.jit.load(str(tmp_path / MODEL_FILE))
    ids = torch.arange(640)[None] % made.model.config.vocab_size
    mask = torch.ones_like(ids)
    with torch.no_grad():
        logits, *_ = graphs.step(ids, mask, torch.arange(640)[None], *graphs.start(ids, mask))
        expected = transformers.AutoModelForCausalLM.from_pretrained(source).eval()(ids).logits[:, -1]
    assert torch.allclose(logits, expected, atol=1e-4)


def test_one_table_and_one_tied_weight(decoder: Callable[[str], Path], checkpoint: Callable[..., Path]) -> None:
    tied = checkpoint("llama", "AutoModelForCausalLM", tie_word_embeddings=True)
    model = original(tied, task="text_generation").model.model
    assert model.output_embeddings.weight is model.decoder.embeddings.piece_embeddings.weight
    tables = {id(layer.mha.rotary_embeds.rotary_embeds) for layer in model.decoder.layers}
    assert len(tables) == 1 < len(model.decoder.layers)
    model = original(decoder("llama"), task="text_generation").model.model
    assert model.output_embeddings.weight is not model.decoder.embeddings.piece_embeddings.weight


def test_positions_that_are_numbered_from_the_padding_on(checkpoint: Callable[..., Path]) -> None:
    """RoBERTa's table of 160 has room for 158; its tokenizer recommends 150."""
    source = checkpoint("roberta", "AutoModel")
    assert original(source, task="feature_extraction", max_length=None).max_length == 150
    assert original(source, task="feature_extraction", max_length=158).max_length == 158
    with pytest.raises(ConfigError, match="max_length is 159"):
        original(source, task="feature_extraction", max_length=159)


def test_a_row_as_long_as_the_model_reads(decoder: Callable[[str], Path]) -> None:
    """MPT has its own name for its limit."""
    assert original(decoder("mpt"), task="text_generation", max_length=None).max_length == 160


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {"rope_theta": 500_000.0}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("llama", {"attention_bias": True}),
        ("gpt-neox", {"use_parallel_residual": False}),
        ("falcon", {**LAYERS, "alibi": True, "multi_query": False, "parallel_attn": False}),
    ],
    ids=["base", "scaling", "bias", "serial", "alibi"],
)
def test_what_the_library_does_not_read_is_refused(
    family: str, options: Dict[str, Any], checkpoint: Callable[..., Path]
) -> None:
    """It would silently load these, and write other texts than the trained model."""
    source = checkpoint(family, "AutoModelForCausalLM", **options)
    with pytest.raises(
        ExportError, match="curated_transformers computes something else from .* take library transform"
    ):
        original(source, task="text_generation")


@pytest.mark.parametrize(
    "architecture, auto_model, task, kinds",
    [
        ("distilbert", "AutoModel", "feature_extraction", "ALBERTEncoder, BERTEncoder"),
        ("llama", "AutoModel", "feature_extraction", "ALBERTEncoder, BERTEncoder"),
        ("gpt2", "AutoModelForCausalLM", "text_generation", "FalconCausalLM, GPTNeoXCausalLM"),
    ],
)
def test_an_architecture_that_it_lacks(
    architecture: str, auto_model: str, task: str, kinds: str, checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(
        ExportError, match=f"of the type {architecture}, of which curated_transformers has no .*{kinds}"
    ):
        original(checkpoint(architecture, auto_model), task=task)


def test_a_checkpoint_without_the_head(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(SourceError, match="holds no trained weights for the task text_generation"):
        original(checkpoint("llama", "AutoModel"), task="text_generation")


LACKING = [name for name, task in TASKS.items() if task.auto_model not in ("AutoModel", "AutoModelForCausalLM")]


@pytest.mark.parametrize("task", LACKING)
def test_other_tasks_are_refused_at_once(task: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config({"model_name": "x", "task": task, "library": "curated_transformers"})
    assert raised.value.message == (
        f"library curated_transformers has no models for the task {task}, but for feature_extraction, text_generation; "
        "take transformers"
    )


def test_a_library_that_is_not_installed(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "curated_transformers", None)
    with pytest.raises(ExportError, match=r"is not installed .*; pip install 'traceserve\[curated\]', with Python 3.9"):
        original(checkpoint("bert", "AutoModel"), task="feature_extraction")
