"""sentence-transformers checkpoints: vectors equal to its own `encode`; unsupported settings are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import pytest
import torch
from conftest import run_export
from oracle import answers
from safetensors.torch import save_file
from traceserve.building.checkpoints import sources
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate.texts import SENTENCES
from traceserve.errors import SourceError
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidRequest, Unsupported
from traceserve_runtime.tasks.contract import Answer, Request

Make = Callable[..., Path]
TEXTS = [text for text in SENTENCES if 0 < len(text) < 120][:6]
TYPE = "sentence_transformers.models."
Module = Tuple[str, Dict[str, Any]]


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def encoder(
    source: Path,
    folder: Path,
    modules: List[Module],
    settings: Optional[Dict[str, Any]] = None,
    inside: str = "",
) -> Path:
    """A checkpoint in sentence-transformers' layout; layers with random weights."""
    shutil.copytree(source, folder / inside)
    document = [{"idx": 0, "name": "0", "path": inside, "type": TYPE + "Transformer"}]
    for number, (kind, config) in enumerate(modules, 1):
        path = f"{number}_{kind}"
        document.append({"idx": number, "name": str(number), "path": path, "type": TYPE + kind})
        write(folder / path / "config.json", config)
        random = torch.Generator().manual_seed(number)
        if kind == "Dense":
            shape = (config["out_features"], config["in_features"])
            tensors = {"linear.weight": torch.randn(shape, generator=random) * 0.2}
            if config.get("bias", True):
                tensors["linear.bias"] = torch.randn(shape[0], generator=random)
            if config.get("use_residual") and shape[0] != shape[1]:
                tensors["residual.weight"] = torch.randn(shape, generator=random) * 0.2
            if number % 2:
                torch.save(tensors, folder / path / "pytorch_model.bin")
            else:
                save_file(tensors, folder / path / "model.safetensors")
        elif kind == "LayerNorm":
            size = config["dimension"]
            save_file(
                {"norm.weight": torch.rand(size, generator=random), "norm.bias": torch.randn(size, generator=random)},
                folder / path / "model.safetensors",
            )
    write(folder / "modules.json", document)
    if settings is not None:
        write(folder / "config_sentence_transformers.json", settings)
    return folder


def pooling(*modes: str, **more: Any) -> Module:
    known = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    config = {f"pooling_mode_{mode}": mode in modes for mode in known}
    return "Pooling", {"word_embedding_dimension": 32, **config, **more}


def dense(given: int, made: int, activation: str = "activation.Tanh", **more: Any) -> Module:
    function = f"torch.nn.modules.{activation}"
    return "Dense", {"in_features": given, "out_features": made, "bias": True, "activation_function": function, **more}


def exported(folder: Path, source: Path, **more: Any) -> Engine:
    run_export(folder, {"model_name": str(source), "task": "feature_extraction", "max_length": 140, **more})
    return Engine.load(folder)


def vectors(engine: Engine, **parameters: Any) -> np.ndarray:
    return np.array(answers(engine, [Request({"text": text}, parameters) for text in TEXTS]))


def assert_equal(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-5)


NORMALIZE: Module = ("Normalize", {})
PROMPTS = {"query": "Find the parcel: ", "passage": "the town, ", "plain": ""}
# The encoder, its modules, its settings; their meaning.
LAYOUTS: Dict[str, Tuple[str, List[Module], Dict[str, Any]]] = {
    "max": ("bert", [pooling("max_tokens")], {}),
    "mean of the square root": ("bert", [pooling("mean_sqrt_len_tokens"), NORMALIZE], {}),
    "weighted mean of a decoder, as SGPT": ("gpt2", [pooling("weightedmean_tokens")], {}),
    "several": ("bert", [pooling("max_tokens", "cls_token", "mean_tokens"), dense(96, 8)], {}),
    "LaBSE": ("bert", [pooling("cls_token"), dense(32, 32), NORMALIZE], {}),
    "GTR": ("roberta", [pooling("mean_tokens"), dense(32, 24, "linear.Identity", bias=False), NORMALIZE], {}),
    "layers": (
        "bert",
        [
            pooling("mean_tokens"),
            NORMALIZE,
            dense(32, 16, "activation.SiLU", use_residual=True),
            ("LayerNorm", {"dimension": 16}),
            dense(16, 16, "activation.ReLU", use_residual=True),
            ("Dropout", {"dropout": 0.5}),
        ],
        {"truncate_dim": 10},
    ),
    "Qwen3-Embedding": (
        "llama",
        [("Pooling", {"embedding_dimension": 32, "pooling_mode": "lasttoken", "include_prompt": True}), NORMALIZE],
        {"prompts": PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine", "truncate_dim": 12},
    ),
    "E5 with a default prompt": (
        "bert",
        [pooling("mean_tokens"), NORMALIZE],
        {"prompts": PROMPTS, "default_prompt_name": "query", "__version__": {"sentence_transformers": "2.7.0"}},
    ),
    "INSTRUCTOR, whose prompt is not pooled": (
        "bert",
        [pooling("mean_tokens", "weightedmean_tokens", "cls_token", include_prompt=False)],
        {"prompts": PROMPTS, "default_prompt_name": "passage"},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_equal_to_encode(name: str, checkpoint: Make, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    architecture, modules, settings = LAYOUTS[name]
    source = encoder(checkpoint(architecture, "AutoModel"), tmp_path / "mine", modules, settings)
    if name == "Qwen3-Embedding":
        path = source / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    original = SentenceTransformer(str(source), device="cpu")
    engine = exported(tmp_path / "out", source)
    got = vectors(engine)
    assert_equal(got, original.encode(TEXTS))
    for prompt in PROMPTS if settings.get("prompts") else ():
        assert_equal(vectors(engine, prompt_name=prompt), original.encode(TEXTS, prompt_name=prompt))
    assert_equal(vectors(engine, prompt="the coast "), original.encode(TEXTS, prompt="the coast "))
    assert_equal(
        vectors(engine, prompt="", normalize=True), original.encode(TEXTS, prompt="", normalize_embeddings=True)
    )
    if settings.get("default_prompt_name"):
        assert np.abs(got - vectors(engine, prompt="")).max() > 0.01  # it matters


def test_nothing_behind_a_prompt_that_is_not_pooled(checkpoint: Make, tmp_path: Path) -> None:
    """Of an empty text a tokenizer without special tokens leaves nothing."""
    from sentence_transformers import SentenceTransformer

    modes = ("mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken", "cls_token")
    source = encoder(
        checkpoint("gpt2", "AutoModel"),
        tmp_path / "mine",
        [pooling(*modes, include_prompt=False)],
        {"prompts": PROMPTS, "default_prompt_name": "query"},
    )
    engine = exported(tmp_path / "out", source)
    [empty, filled] = answers(engine, [Request({"text": text}, {}) for text in ("", "A parcel")])
    expected = SentenceTransformer(str(source), device="cpu").encode(["", "A parcel"])
    assert expected[0, :32].any() and not expected[0, 32:].any()  # the first token's, which comes first
    assert_equal(np.array([empty, filled]), expected)
    assert engine.task.same(empty[32:], empty[32:]) and not engine.task.same(empty[32:], filled[32:])
    [refused] = engine.answer([Request({"text": ""}, {"pooling": "max"})])
    assert isinstance(refused, InvalidRequest) and "no token of its own behind the prompt" in refused.message


def test_the_layout_with_a_folder_for_the_model(checkpoint: Make, tmp_path: Path) -> None:
    """As written by sentence-transformers before version 1."""
    from sentence_transformers import SentenceTransformer

    source = encoder(
        checkpoint("bert", "AutoModel"),
        tmp_path / "mine",
        [pooling("mean_tokens"), dense(32, 8)],
        {"prompts": PROMPTS, "default_prompt_name": "query"},
        inside="0_Transformer",
    )
    write(source / "0_Transformer" / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": True})
    run_export(tmp_path / "out", {"model_name": str(source)})  # the task is detected
    engine = Engine.load(tmp_path / "out")
    assert engine.manifest.max_length == 48 and engine.manifest.task == "feature_extraction"
    assert {"modules.json", "0_Transformer/model.safetensors", "2_Dense/model.safetensors"} <= {
        *engine.manifest.source.files
    }
    assert_equal(vectors(engine, long_inputs="truncate"), SentenceTransformer(str(source), device="cpu").encode(TEXTS))


def test_texts_are_put_into_lower_case_first(checkpoint: Make, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    source = encoder(checkpoint("roberta", "AutoModel"), tmp_path / "mine", [pooling("mean_tokens")])
    write(source / "sentence_bert_config.json", {"max_seq_length": 140, "do_lower_case": True})
    expected = SentenceTransformer(str(source), device="cpu").encode(TEXTS)
    assert_equal(vectors(exported(tmp_path / "out", source)), expected)
    write(source / "sentence_bert_config.json", {"max_seq_length": 140})
    assert np.abs(expected - SentenceTransformer(str(source), device="cpu").encode(TEXTS)).max() > 0.01


def test_settings_under_the_name_of_another_model_are_followed(checkpoint: Make, tmp_path: Path) -> None:
    """sentence-transformers reads the first of several names, whatever the model is."""
    from sentence_transformers import SentenceTransformer

    source = encoder(checkpoint("roberta", "AutoModel"), tmp_path / "mine", [pooling("mean_tokens")])
    write(source / "sentence_albert_config.json", {"max_seq_length": 99})
    write(source / "sentence_roberta_config.json", {"max_seq_length": 8, "do_lower_case": True})
    write(source / "sentence_bert_config.json", {})
    engine = exported(tmp_path / "out", source, max_length=None)
    assert engine.manifest.max_length == 8
    expected = SentenceTransformer(str(source), device="cpu").encode(TEXTS)
    assert_equal(vectors(engine, long_inputs="truncate"), expected)


def test_prompts_of_requests(checkpoint: Make, tmp_path: Path) -> None:
    settings = {"prompts": PROMPTS, "default_prompt_name": "query"}
    modules = [pooling("mean_tokens"), dense(32, 8)]
    source = encoder(checkpoint("bert", "AutoModel"), tmp_path / "mine", modules, settings)
    engine = exported(tmp_path / "out", source, parameters={"prompt_name": "passage"})
    text = "A word and another one"
    asked: List[Dict[str, Any]] = [{}, {"prompt_name": "passage"}, {"prompt": "the town, "}, {"prompt_name": "query"}]
    got = answers(engine, [Request({"text": text}, parameters) for parameters in asked])
    assert got[0] == pytest.approx(got[1]) and got[0] == pytest.approx(got[2]) and got[0] != pytest.approx(got[3])
    [unknown] = engine.answer([Request({"text": text}, {"prompt_name": "passages"})])
    assert isinstance(unknown, InvalidRequest) and unknown.field == "parameters.prompt_name"
    assert "no prompt passages; it has: query, document, passage, plain" in unknown.message
    [unknown] = engine.answer([Request({"text": text}, {"prompt_name": "passages", "prompt": "the town, "})])
    assert isinstance(unknown, InvalidRequest) and unknown.field == "parameters.prompt_name"
    [other] = engine.answer([Request({"text": text}, {"pooling": "mean+max"})])
    assert not isinstance(other, Answer)
    long = "word " * 190
    [cut] = engine.answer([Request({"text": long}, {"long_inputs": "truncate"})])
    assert isinstance(cut, Answer)
    start, end = cut.unseen["text"]
    assert end == len(long) and long[start:].strip().startswith(("word", "ord", "rd", "d"))
    [windows] = engine.answer([Request({"text": long})])
    assert isinstance(windows, Answer) and len(windows.value) == 8


def test_dimensions_of_the_configuration(checkpoint: Make, tmp_path: Path) -> None:
    """As many numbers as it says, scaled to length 1 again; not more than the model has."""
    source = encoder(checkpoint("bert", "AutoModel"), tmp_path / "mine", [pooling("mean_tokens"), NORMALIZE])
    whole = vectors(exported(tmp_path / "whole", source))
    short = exported(tmp_path / "short", source, parameters={"dimensions": 5, "normalize": True})
    expected = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(vectors(short), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(vectors(short, dimensions=32), whole, rtol=1e-4, atol=1e-6)
    [refused] = short.answer([Request({"text": "a"}, {"dimensions": 4, "pooling": "none"})])
    assert isinstance(refused, InvalidRequest) and refused.field == "parameters.dimensions"
    with pytest.raises(Unsupported, match="dimensions is 33, but this model's vectors have 32 numbers"):
        exported(tmp_path / "long", source, parameters={"dimensions": 33})
    narrow = encoder(checkpoint("bert", "AutoModel"), tmp_path / "narrow", [pooling("mean_tokens"), dense(32, 8)])
    with pytest.raises(Unsupported, match="dimensions is 9, but this model's vectors have 8 numbers"):
        exported(tmp_path / "narrower", narrow, parameters={"dimensions": 9})


STANDARD = [pooling("mean_tokens")]
REFUSED: List[Tuple[str, Any, str]] = [
    ("modules.json", [{"type": "my_code.models.Transformer", "path": ""}], "has a module my_code.models.Transformer"),
    ("modules.json", [{"type": TYPE + "Transformer", "path": "../other"}], "which is not inside the checkpoint"),
    ("modules.json", [{"type": TYPE + "Pooling", "path": "1_Pooling"}], "should begin with Transformer"),
    ("modules.json", {"0": 1}, "should hold a list of modules"),
    ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "attention": 2}, "config.json has the key attention"),
    ("config_sentence_transformers.json", {"prompts": {"a": 3}}, "prompts should be texts by their names"),
    (
        "config_sentence_transformers.json",
        {"default_prompt_name": "b"},
        "default_prompt_name is 'b', but the prompts are",
    ),
    ("config_sentence_transformers.json", {"scale": 3}, "has the key scale, which is not known here"),
    ("sentence_bert_config.json", {"max_seq_length": 9, "pad": 1}, "sentence_bert_config.json has the key pad"),
    ("sentence_bert_config.json", {"model_args": {"rope": 2}}, "sets model_args to"),
    ("sentence_xlnet_config.json", {"pad": 1}, "sentence_xlnet_config.json has the key pad"),
    (
        "sentence_bert_config.json",
        {"modality_config": {"text": {"method": "get_text_features"}}},
        "reads a text otherwise",
    ),
    (
        "2_Dense/config.json",
        {"in_features": 32, "out_features": 8, "activation_function": "torch.nn.modules.activation.PReLU"},
        "activation_function is torch.nn.modules.activation.PReLU",
    ),
    ("2_Dense/config.json", {"in_features": 32, "module_input_name": "token_embeddings"}, "sets module_input_name"),
]


@pytest.mark.parametrize("file, content, words", REFUSED, ids=[words for _, _, words in REFUSED])
def test_refused_by_name(file: str, content: Any, words: str, checkpoint: Make, tmp_path: Path) -> None:
    source = encoder(checkpoint("bert", "AutoModel"), tmp_path / "mine", [*STANDARD, dense(32, 8)])
    write(source / file, content)
    config, _ = parse_config({"model_name": str(source), "task": "feature_extraction"})
    with pytest.raises(SourceError, match=words):
        sources.fetch_checkpoint(config, tmp_path)


def test_of_two_copies_of_a_modules_weights_one_is_read_and_recorded(checkpoint: Make, tmp_path: Path) -> None:
    source = encoder(checkpoint("bert", "AutoModel"), tmp_path / "mine", [*STANDARD, dense(32, 8)])
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"another")
    config, _ = parse_config({"model_name": str(source), "task": "feature_extraction"})
    files = sources.fetch_checkpoint(config, tmp_path).source(config).files
    assert {name for name in files if name.startswith("2_Dense")} == {
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    }


@pytest.mark.parametrize("missing", [False, True])
def test_a_modules_weights_that_are_not_whole_are_refused(missing: bool, checkpoint: Make, tmp_path: Path) -> None:
    source = encoder(checkpoint("bert", "AutoModel"), tmp_path / "mine", [*STANDARD, dense(32, 8)])
    weights = source / "2_Dense" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    if missing:
        shutil.rmtree(weights.parent)
    config, _ = parse_config({"model_name": str(source), "task": "feature_extraction"})
    with pytest.raises(SourceError, match="has no weights" if missing else "2_Dense: model.safetensors is not whole"):
        sources.fetch_checkpoint(config, tmp_path)


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("modules.json", [{"type": TYPE + "Transformer"}, {"type": TYPE + "Dense"}], "modules.json has .*Dense"),
        (
            "config_sentence_transformers.json",
            {"model_type": "CrossEncoder", "prompts": {"q": "Rank: "}, "default_prompt_name": "q"},
            "the prompt q is written before each text",
        ),
    ],
)
def test_a_cross_encoder_with_more_than_a_model(
    file: str, content: Any, words: str, checkpoint: Make, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint("bert", num_labels=1), tmp_path / "mine"))
    write(source / file, content)
    config, _ = parse_config({"model_name": str(source), "task": "text_ranking"})
    with pytest.raises(SourceError, match=words):
        sources.fetch_checkpoint(config, tmp_path)
