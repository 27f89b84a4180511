"""Tokenizers as checkpoints have them: more tokens than the model knows, layouts without a tokenizer.json."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
import torch
import transformers
from conftest import run_export
from tokenizers import processors
from traceserve.config import parse
from traceserve.errors import ExportError
from traceserve.loading import Original, load, quiet
from traceserve.sources import Checkpoint
from traceserve_runtime.engine import Answer, Engine
from traceserve_runtime.errors import InvalidRequest
from traceserve_runtime.tasks.contract import Request

Make = Callable[..., Path]


def original(folder: Path, **content: Any) -> Original:
    config, _ = parse({"model_name": str(folder), **content})
    with quiet():
        return load(config, Checkpoint(folder, "folder"), folder)


# More tokens than embeddings.


def with_more(source: Path, folder: Path, *tokens: str, **special: str) -> Path:
    """A copy of a checkpoint whose tokenizer was given further tokens, and the model no embeddings for them."""
    shutil.copytree(source, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_text_with_a_token_that_the_model_lacks_is_refused_alone(checkpoint: Make, tmp_path: Path) -> None:
    folder = with_more(checkpoint("bert"), tmp_path / "more", "zyzzyva", "quokka")
    exported = run_export(tmp_path / "x", {"model_name": str(folder), "max_length": 32})
    known = original(folder).model.get_input_embeddings().num_embeddings
    assert exported.manifest.tokenizer.embeddings == known
    assert exported.note is not None and "2 added tokens that the model has no embedding for" in exported.note
    engine = Engine.load(tmp_path / "x")
    word = "the train leaves "
    requests: Dict[str, Request] = {
        "plain": Request({"text": "The train"}),
        "text": Request({"text": "a zyzzyva"}),
        "pair": Request({"text": "The train", "text_pair": "the quokka"}),
        "window": Request({"text": word * 30 + "quokka"}, {"long_inputs": "window"}),
        "cut": Request({"text": word * 30 + "quokka"}, {"long_inputs": "truncate"}),
    }
    results = dict(zip(requests, engine.answer(list(requests.values()))))
    assert isinstance(results["plain"], Answer) and isinstance(results["cut"], Answer)
    fields = {
        "text": ("text", known, 2, 9),
        "pair": ("text_pair", known + 1, 4, 10),
        "window": ("text", known + 1, 510, 516),
    }
    for name, (field, number, start, end) in fields.items():
        error = results[name]
        assert isinstance(error, InvalidRequest) and error.status == 400, name
        assert (
            error.field == field and f"its number is {number}, and the model knows those below {known}" in error.message
        )
        assert f"(characters {start} to {end})" in error.message
        assert "quokka" not in error.message and "zyzzyva" not in error.message


def test_a_tokenizer_with_as_many_tokens_as_embeddings_costs_no_check(artifact: Path) -> None:
    assert Engine.load(artifact).manifest.tokenizer.embeddings is None


def test_padding_that_the_model_lacks_is_another_token(checkpoint: Make, tmp_path: Path) -> None:
    """As GPT-2's classifiers are often saved: a token for padding, and no embedding for it."""
    folder = with_more(checkpoint("gpt2", "AutoModelForCausalLM"), tmp_path / "more", pad_token="[PAD]")
    config = {"model_name": str(folder), "task": "text_generation", "max_length": 48}
    exported = run_export(tmp_path / "x", config)
    assert exported.manifest.tokenizer.pad_id == 0
    assert original(folder, task="text_generation").tokenizer.pad_token_id == exported.manifest.tokenizer.embeddings
    texts = ["The train", "Once upon a time there was a little"]
    engine = Engine.load(tmp_path / "x")
    requests = [Request({"text": text}, {"max_new_tokens": 4}) for text in texts]
    alone = [engine.answer([request])[0] for request in requests]
    assert engine.answer(requests) == alone


@pytest.mark.parametrize(
    "task, auto_model, special",
    [
        ("sequence_classification", "AutoModelForSequenceClassification", {"cls_token": "[START]"}),
        ("fill_mask", "AutoModelForMaskedLM", {"mask_token": "[HOLE]"}),
    ],
)
def test_a_token_of_every_text_that_the_model_lacks_is_refused(
    task: str, auto_model: str, special: Dict[str, str], checkpoint: Make, tmp_path: Path
) -> None:
    folder = with_more(checkpoint("bert", auto_model), tmp_path / "more", **special)
    [token] = special.values()
    if "cls_token" in special:  # in the tokenizer's template, too
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        number = tokenizer.convert_tokens_to_ids(token)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A [SEP]", special_tokens=[(token, number), ("[SEP]", tokenizer.sep_token_id)]
        )
        tokenizer.save_pretrained(folder)
    with pytest.raises(ExportError, match="was added to it, but the model has only .* embeddings") as raised:
        original(folder, task=task)
    assert f"the tokenizer's {token}" in raised.value.message


def test_another_models_tokenizer_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("bert"), tmp_path / "other"))
    for file in checkpoint("roberta").glob("tokenizer*"):
        shutil.copy(file, folder)
    with pytest.raises(ExportError, match="is not this model's: .* of its pieces have numbers of"):
        original(folder)


def test_a_target_that_the_model_lacks_is_no_target(checkpoint: Make, tmp_path: Path) -> None:
    folder = with_more(checkpoint("bert", "AutoModelForMaskedLM"), tmp_path / "more", "zyzzyva")
    run_export(tmp_path / "x", {"model_name": str(folder), "task": "fill_mask", "max_length": 32})
    engine = Engine.load(tmp_path / "x")
    text = {"text": "The [MASK] leaves."}
    targets = [["zyzzyva"], ["zyzzyva", "train"], ["train"]]
    refused, both, one = engine.answer([Request(text, {"targets": words}) for words in targets])
    assert isinstance(refused, InvalidRequest) and refused.field == "parameters.targets"
    assert both == one and isinstance(one, Answer)
    assert torch.isfinite(torch.tensor(one.value[0]["score"]))
