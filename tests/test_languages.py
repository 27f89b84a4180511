"""Multilingual translators: the input and output languages, by default and by request."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Tuple

import models
import pytest
import test_pieces
import torch
import transformers
from conftest import run_export
from oracle import answers
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.loading import load_original, quiet_transformers
from traceserve.building.checkpoints.original import Original
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate.texts import SENTENCES
from traceserve.errors import ConfigError, ExportError
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidRequest
from traceserve_runtime.tasks.contract import Request
from traceserve_runtime.tasks.text2text_generation import nearest_code
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES


class Family(NamedTuple):
    """Its tokenizer's class and options, its model's, and three of its codes: the default first."""

    tokenizer: str
    options: Dict[str, Any]
    model: str
    codes: Tuple[str, str, str]


NLLB_CODES = ["eng_Latn", "fra_Latn", "deu_Latn", "fur_Latn", "zho_Hans"]
FAMILIES = {
    "mbart": Family("MBartTokenizer", {"src_lang": "en_XX"}, "MBart", ("en_XX", "fr_XX", "de_DE")),
    "mbart50": Family("MBart50Tokenizer", {"src_lang": "en_XX"}, "MBart", ("en_XX", "fr_XX", "de_DE")),
    "nllb": Family("NllbTokenizer", {"additional_special_tokens": NLLB_CODES}, "M2M100", tuple(NLLB_CODES[:3])),  # type: ignore[arg-type]
    "m2m100": Family("M2M100Tokenizer", {}, "M2M100", ("en", "fr", "de")),
    "m2m100 as it is stored": Family(
        "M2M100Tokenizer",
        {"additional_special_tokens": [f"__{code}__" for code in FAIRSEQ_LANGUAGE_CODES["m2m100"]]},
        "M2M100",
        ("en", "fr", "de"),
    ),
}


def make(folder: Path, family: Family) -> Path:
    """Make a tiny random translator with its tokenizer in the family's format."""
    test_pieces.write(folder, test_pieces.M2M100)
    (folder / "tokenizer_config.json").unlink()
    kind = getattr(transformers, family.tokenizer + "Fast", None) or getattr(transformers, family.tokenizer)
    with quiet_transformers():
        tokenizer = kind.from_pretrained(folder, **family.options)
    for file in folder.iterdir():
        file.unlink()
    tokenizer.save_pretrained(folder)
    codes = getattr(tokenizer, "lang_code_to_id", None) or {"": 0}
    config = getattr(transformers, f"{family.model}Config")(
        vocab_size=max(len(tokenizer), *codes.values()) + 8,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        **models.SIZE_OF_BOTH,
    )
    model = getattr(transformers, f"{family.model}ForConditionalGeneration")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Widely spread, so that the output depends on each token read.
            parameter.copy_(models.weights(name, parameter.shape) * (4 if "encoder_attn" in name else 1))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: Dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make(tmp_path_factory.mktemp("translator") / "checkpoint", FAMILIES[name])
        return made[name]

    return get


def original(folder: Path, **parameters: str) -> Original:
    config, _ = parse_config({"model_name": str(folder), "task": "text2text_generation", "parameters": parameters})
    with quiet_transformers():
        return load_original(config, Checkpoint(folder, "folder"), folder)


def translated(loaded: Original, text: str, source: str, target: str, **options: Any) -> str:
    """Ask transformers' translation pipeline."""
    tokenizer = loaded.tokenizer
    before = tokenizer.src_lang
    inputs = tokenizer._build_translation_inputs(text, return_tensors="pt", src_lang=source, tgt_lang=target)
    tokenizer.src_lang = before
    ids = loaded.model.generate(**inputs, do_sample=False, **options)[0]
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("name", FAMILIES)
def test_languages_by_default_and_by_request(name: str, translator: Callable[[str], Path], tmp_path: Path) -> None:
    folder, (usual, other, third) = translator(name), FAMILIES[name].codes
    config = {
        "model_name": str(folder),
        "task": "text2text_generation",
        "max_length": 96,
        "save_mode": "pretrained",
        "parameters": {"src_lang": other, "tgt_lang": third},
    }
    exported = run_export(tmp_path / "x", config)  # the gate uses many languages
    assert exported.findings.passed and not exported.findings.tokenized_otherwise
    loaded = original(folder)
    assert str(loaded.tokenizer.src_lang).strip("_") == usual  # not the archive's
    engine = Engine.load(tmp_path / "x")
    text = f"{SENTENCES[2]} {other} __fr__ é"
    asked = {
        (other, third): {},
        (usual, third): {"src_lang": usual},
        (other, usual): {"tgt_lang": usual},
        (third, other): {"src_lang": third, "tgt_lang": other},
    }
    fixed: Dict[str, Any] = {"max_new_tokens": 12, "num_beams": 2, "no_repeat_ngram_size": 1}
    requests = [Request({"text": text}, {**fixed, **languages}) for languages in asked.values()]
    with quiet_transformers():
        expected = [translated(loaded, text, source, target, **fixed) for source, target in asked]
    assert [answer["generated_text"] for answer in answers(engine, requests)] == expected
    assert len({*expected}) == len(expected)


@pytest.mark.parametrize("name", ["mbart", "nllb", "m2m100"])
def test_an_unknown_code_is_refused_with_the_nearest_one(
    name: str, translator: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, code = translator(name), FAMILIES[name].codes[1]
    wrong = code + "x"
    with pytest.raises(ConfigError, match=f"src_lang is {wrong}, .* did you mean {code}"):
        original(folder, src_lang=wrong)
    config = {"model_name": str(folder), "task": "text2text_generation", "max_length": 32, "save_mode": "pretrained"}
    run_export(tmp_path / "x", config)
    engine = Engine.load(tmp_path / "x")
    requests = [
        Request({"text": "The train"}, {"max_new_tokens": 2, language: wrong}) for language in ("src_lang", "tgt_lang")
    ]
    for request, language in zip(requests, ("src_lang", "tgt_lang")):
        [error] = engine.answer([request])
        assert isinstance(error, InvalidRequest) and error.field == f"parameters.{language}"
        assert f"did you mean {code}?" in error.message and wrong not in error.message


def test_a_tokenizer_without_languages_says_so(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("t5", "AutoModelForSeq2SeqLM")
    with pytest.raises(ConfigError, match="tgt_lang is fr, but the tokenizer of .* has no languages"):
        original(folder, tgt_lang="fr")
    config = {"model_name": str(folder), "task": "text2text_generation", "max_length": 32, "save_mode": "pretrained"}
    run_export(tmp_path / "x", config)
    [error] = Engine.load(tmp_path / "x").answer([Request({"text": "The train"}, {"src_lang": "en"})])
    assert isinstance(error, InvalidRequest) and "has no languages; leave src_lang out" in error.message


def test_a_long_code_is_compared_by_its_beginning() -> None:
    began = time.process_time()
    assert nearest_code("fra_Latn" * 100_000, NLLB_CODES) == "fra_Latn"
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    "code, meant",
    [("fr", "fra_Latn"), ("fra", "fra_Latn"), ("FRA_LATN", "fra_Latn"), ("zh", "zho_Hans"), ("de_DE", "deu_Latn")],
)
def test_the_nearest_code(code: str, meant: str) -> None:
    assert nearest_code(code, NLLB_CODES) == meant


def test_the_codes_stand_in_the_manifest(translator: Callable[[str], Path]) -> None:
    facts = original(translator("m2m100"), src_lang="fr").facts
    assert len(facts["languages"]) == 100 and facts["source_id"] == facts["languages"]["fr"]
    assert json.loads(json.dumps(facts)) == facts


def test_a_language_with_two_numbers_is_refused(tmp_path: Path) -> None:
    """One as a special token, one as a language: output and input could not be distinguished."""
    special = {"additional_special_tokens": ["__fr__", "__en__"]}
    folder = make(tmp_path / "x", FAMILIES["m2m100"]._replace(options=special))
    with pytest.raises(ExportError, match="two numbers for __.*__, .* cannot be converted exactly"):
        original(folder)
