"""Checkpoints' tokenizers: more tokens than the model knows, layouts without a tokenizer.json."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional

import pytest
import sentencepiece
import torch
import transformers
from conftest import run_export
from tokenizers import Tokenizer, models, processors
from traceserve.building.checkpoints import lookups
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.loading import load_original, quiet_transformers
from traceserve.building.checkpoints.original import Original
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate import outputs
from traceserve.building.gate.texts import SENTENCES, VERY_LONG
from traceserve.errors import ExportError
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidRequest, TraceserveError
from traceserve_runtime.tasks.contract import Answer, Request
from traceserve_runtime.texts.tokenization import TextTokenizer

Make = Callable[..., Path]


def original(folder: Path, **content: Any) -> Original:
    config, _ = parse_config({"model_name": str(folder), "task": "sequence_classification", **content})
    with quiet_transformers():
        return load_original(config, Checkpoint(folder, "folder"), folder)


# Layouts without a tokenizer.json: only sentencepiece's file.


def train(path: Path, **options: Any) -> Path:
    """Train a real, small sentencepiece model on the samples."""
    model = io.BytesIO()
    told = {"vocab_size": 300, "character_coverage": 0.98, "hard_vocab_limit": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SENTENCES, *VERY_LONG.split(". ")] * 3), model_writer=model, **told
    )
    path.write_bytes(model.getvalue())
    return path


class Layout(NamedTuple):
    """A family's tokenizer: the file, its training, the tokenizer's class, the model's configuration."""

    file: str
    training: Dict[str, Any]
    tokenizer: str
    architecture: str  # in models.make
    auto_model: str = "AutoModelForSequenceClassification"
    task: str = "sequence_classification"


_CLS_FIRST = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]", "bos_piece": "[CLS]"}
LAYOUTS = {
    "albert": Layout(
        "spiece.model",
        {
            "pad_id": 0,
            "unk_id": 1,
            "bos_id": -1,
            "eos_id": -1,
            "control_symbols": ["[CLS]", "[SEP]"],
            "user_defined_symbols": ["[MASK]"],
        },
        "AlbertTokenizer",
        "albert",
    ),
    "xlm-roberta": Layout("sentencepiece.bpe.model", {}, "XLMRobertaTokenizer", "xlm-roberta"),
    "deberta-v2": Layout(
        "spm.model", {**_CLS_FIRST, "eos_piece": "[SEP]", "unk_piece": "[UNK]"}, "DebertaV2Tokenizer", "deberta-v2"
    ),
    "t5": Layout(
        "spiece.model",
        {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        "T5Tokenizer",
        "t5",
        "AutoModelForSeq2SeqLM",
        "text2text_generation",
    ),
    "llama": Layout(
        "tokenizer.model",
        {
            "model_type": "bpe",
            "byte_fallback": True,
            "vocab_size": 700,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
        },
        "LlamaTokenizer",
        "llama",
        "AutoModelForCausalLM",
        "text_generation",
    ),
}
HOSTILE = [
    "",
    "ﬁ ½ ｆｕｌｌ  two  spaces ",
    "e\u0301 a\u0308\u0301",
    "a\tb\nc",
    "👩\u200d🚀 ok",
    "שלום \u202eabc",
    "x" * 300,
    "[SEP] </s>",
]


@pytest.fixture(scope="session")
def spm(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints whose tokenizer is only a sentencepiece file; each once."""
    made: Dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            layout = LAYOUTS[name]
            source = checkpoint(layout.architecture, layout.auto_model, vocab_size=800)
            folder = tmp_path_factory.mktemp("spm") / name
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*token*"))
            train(folder / layout.file, **layout.training)
            (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": layout.tokenizer}))
            made[name] = folder
        return made[name]

    return make


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tokenizer_that_is_a_file_of_sentencepiece(name: str, spm: Callable[[str], Path], tmp_path: Path) -> None:
    """End to end: the worker's ids equal those of transformers' tokenizer."""
    layout, folder = LAYOUTS[name], spm(name)
    config = {"model_name": str(folder), "task": layout.task, "max_length": 64, "long_inputs": "truncate"}
    exported = run_export(tmp_path / "x", config)
    assert exported.findings.passed and not exported.findings.tokenized_otherwise
    assert layout.file in exported.manifest.source.files
    expected = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(tmp_path / "x" / "tokenizer.json"))
    for text in [*SENTENCES, *HOSTILE]:
        assert tokenizer.encode(text).ids == expected(text)["input_ids"], text


@pytest.mark.parametrize("package, module", [("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_reads_a_file_of_sentencepiece_is_named(
    name: str, package: str, module: str, spm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    with pytest.raises(ExportError) as raised:
        original(spm(name), task=LAYOUTS[name].task)
    assert raised.value.message.endswith(
        f"is a file of sentencepiece ({LAYOUTS[name].file}), and to read it {package} must be installed: "
        "pip install sentencepiece protobuf"
    )


def test_a_checkpoint_with_a_tokenizer_json_needs_neither(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sentencepiece", "google.protobuf"):
        monkeypatch.setitem(sys.modules, module, None)
    assert original(checkpoint("bert")).tokenizer.is_fast


def test_a_vocabulary_of_tiktoken_is_no_file_of_sentencepiece(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    folder = Path(shutil.copytree(checkpoint("bert"), tmp_path / "x", ignore=shutil.ignore_patterns("tokenizer.json")))
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(TraceserveError) as raised:
        original(folder)
    assert "a file of sentencepiece" not in raised.value.message


# More tokens than embeddings.


def with_more(source: Path, folder: Path, *tokens: str, **special: str) -> Path:
    """Copy a checkpoint, adding tokens to the tokenizer without embeddings in the model."""
    shutil.copytree(source, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_gates_rows_need_no_end_token(checkpoint: Make) -> None:
    """Of a tokenizer without one, and without an unknown token, "" has no number to compare with the model's."""
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1})))
    assert plain.convert_tokens_to_ids("") is None
    changed = replace(original(checkpoint("bert")), tokenizer=plain, known_tokens=1)
    rows = outputs.GridRows(Path(), None, changed)  # which it would read from there
    assert rows._end == ""


def test_a_special_token_without_a_number_is_named(checkpoint: Make) -> None:
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    assert lookups.id_of_token(plain, "a") == 0
    with pytest.raises(ExportError, match="names the token </s>, but has no number for it"):
        lookups.id_of_token(plain, "</s>")


def test_all_notes_on_a_tokenizer_are_told(checkpoint: Make) -> None:
    noted = replace(original(checkpoint("bert")), known_tokens=5, case_note="it keeps capitals").note
    assert "it keeps capitals" in str(noted) and "that the model has no embedding for" in str(noted)


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


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_special_tokens_in_a_text_are_read_as_the_checkpoint_says(
    architecture: str, split: bool, checkpoint: Make, tmp_path: Path
) -> None:
    """With `split_special_tokens` no client can end a text, or mask a part of it: tokenizer.json does not say so."""
    folder = Path(shutil.copytree(checkpoint(architecture), tmp_path / "copy"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "split_special_tokens": split}))
    exported = run_export(tmp_path / "x", {"model_name": str(folder), "max_length": 64})
    facts = exported.manifest.tokenizer
    own, tokenizer = TextTokenizer(tmp_path / "x", facts, 64, 4), original(folder).tokenizer
    assert facts.splits_special is split
    for token in tokenizer.all_special_tokens:
        for text in (f"is {token} late", f"{token}{token}", f"I{token}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert own.token_ids(text) == ids
            if token != tokenizer.unk_token:
                assert (tokenizer.convert_tokens_to_ids(token) in ids) is not split


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="older versions read its vocabulary elsewhere"
)
def test_a_place_to_fill_is_refused_where_the_original_would_fill_it(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>", *"▁abcdefghijklmnopqrstuvwxyz():\n_."]
    tokenizer = transformers.CodeLlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    tokenizer.save_pretrained(tmp_path / "code")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "code")
    exported = run_export(
        tmp_path / "x", {"model_name": str(tmp_path / "code"), "task": "text_generation", "max_length": 64}
    )
    assert exported.note is not None and "a text with <FILL_ME> is refused (400)" in exported.note
    texts = ["def f(a):", "def f(a):<FILL_ME> return b"]
    written, refused = Engine.load(tmp_path / "x").answer([Request({"text": t}, {"max_new_tokens": 2}) for t in texts])
    assert isinstance(written, Answer)
    assert isinstance(refused, InvalidRequest) and refused.field == "text"
    assert refused.message == "<FILL_ME> is not filled here; leave it out"


@pytest.mark.parametrize(("architecture", "cleaned"), [("bert", True), ("gpt2", None), ("roberta", None)])
def test_spaces_are_cleaned_up_where_the_original_does(
    architecture: str, cleaned: Optional[bool], checkpoint: Make, tmp_path: Path
) -> None:
    """WordPiece's decoder cleans up some of them by itself; and some tokenizers ignore the setting."""
    for wanted in (False, True):
        source = tmp_path / str(wanted)
        shutil.copytree(checkpoint(architecture), source)
        path = source / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "clean_up_tokenization_spaces": wanted}))
        made = original(source)
        ids = made.tokenizer("a . b, don't", add_special_tokens=False)["input_ids"]
        own = made.tokenizer.decode(ids) != made.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert made.tokenizer_facts.clean_up is (wanted if cleaned else own)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="older versions have no such setting")
def test_a_template_of_responses_is_told(checkpoint: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("gpt2", "AutoModelForCausalLM"), tmp_path / "copy"))
    assert original(folder, task="text_generation").note is None
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = {"defaults": {"role": "assistant"}, "fields": {"content": {"close": "<end>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "response_template": template}))
    assert "response_template is not used" in str(original(folder, task="text_generation").note)


def test_a_tokenizer_with_as_many_tokens_as_embeddings_costs_no_check(artifact: Path) -> None:
    facts = Engine.load(artifact).manifest.tokenizer
    assert facts.embeddings is None and facts.types is None


@pytest.mark.parametrize("architecture", ["yoso", "bert"])
def test_a_pair_whose_token_type_the_model_lacks_is_refused_alone(
    architecture: str, checkpoint: Make, tmp_path: Path
) -> None:
    """On such a pair transformers' own model fails, too."""
    source = checkpoint(architecture, type_vocab_size=1)
    exported = run_export(tmp_path / "x", {"model_name": str(source), "max_length": 64}, all_texts=True)
    assert exported.manifest.tokenizer.types == 1 and exported.manifest.receipt["answers"] > 20
    assert exported.note is not None and "a pair of texts is refused (400)" in exported.note
    inputs = {"text": SENTENCES[3], "text_pair": SENTENCES[1]}
    engine = Engine.load(tmp_path / "x")
    single, pair, other = engine.answer([Request({"text": SENTENCES[3]}), Request(inputs), Request({"text": "Yes."})])
    assert isinstance(single, Answer) and isinstance(other, Answer)
    assert isinstance(pair, InvalidRequest) and pair.status == 400 and pair.field == "text_pair"
    made = original(source)
    with pytest.raises(IndexError, match="index out of range"):
        made.model(**made.tokenizer(*inputs.values(), return_tensors="pt"))


@pytest.mark.parametrize("architecture", ["roberta", "distilbert", "deberta-v2"])
def test_models_without_token_types_read_pairs(architecture: str, checkpoint: Make) -> None:
    assert original(checkpoint(architecture)).known_types is None


def test_padding_that_the_model_lacks_is_another_token(checkpoint: Make, tmp_path: Path) -> None:
    """As in many saved GPT-2 classifiers: a padding token without an embedding."""
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
    if "cls_token" in special:  # also in the tokenizer's template
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        number = tokenizer.convert_tokens_to_ids(token)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A [SEP]", special_tokens=[(token, number), ("[SEP]", tokenizer.sep_token_id)]
        )
        tokenizer.save_pretrained(folder)
    with pytest.raises(ExportError, match="was added to it, but the model has only .* embeddings") as raised:
        original(folder, task=task)
    assert f"the tokenizer's {token}" in raised.value.message


def test_a_tokenizer_that_fails_at_unknown_words_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    """Transformers fails at such a text, and so would a worker."""
    folder = Path(shutil.copytree(checkpoint("bert"), tmp_path / "closed"))
    closed = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)]))
    transformers.PreTrainedTokenizerFast(tokenizer_object=closed, pad_token="b").save_pretrained(folder)
    said = (
        "closed has no unknown token, and fails at texts with words that .*unk_id. is missing.*; give it an unk_token"
    )
    with pytest.raises(ExportError, match=said):
        original(folder)


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
