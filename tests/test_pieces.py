"""sentencepiece models with a separate vocabulary, as in Marian and M2M100: equal to transformers' tokenizers."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import models
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from conftest import run_export
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import answers, generated
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from traceserve.building.checkpoints import conversion
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.loading import load_original, quiet_transformers
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate.corpus import sentences
from traceserve.building.gate.texts import SENTENCES
from traceserve.errors import ExportError
from traceserve_runtime.engine import Engine, load_task
from traceserve_runtime.manifest import Manifest, TokenizerFacts
from traceserve_runtime.tasks.contract import Answer, Request
from traceserve_runtime.tasks.token_details import token_details
from traceserve_runtime.texts.pieces import PieceTokenizer
from traceserve_runtime.texts.rows import Encoded, Segments
from traceserve_runtime.texts.tokenization import TextTokenizer

CORPUS = [*SENTENCES, *sentences(400), "aa aaa baa 77 777 5577 ...", "x x  x"] * 2
MARIAN, M2M100 = "MarianTokenizer", "M2M100Tokenizer"
# How the models are trained.
TRAININGS: Dict[str, Dict[str, Any]] = {
    "unigram": {},
    "bpe": {"model_type": "bpe"},
    "own symbols": {"user_defined_symbols": ["<sep>", "é!", "leaves at"]},
    "bpe with own symbols": {"model_type": "bpe", "user_defined_symbols": ["<sep>", "é!"]},
    "as it is": {"normalization_rule_name": "identity", "character_coverage": 0.98},
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
    "spaces kept": {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
}


def train(path: Path, texts: List[str], **options: Any) -> None:
    model = io.BytesIO()
    told = {"vocab_size": 400, "hard_vocab_limit": False, "bos_id": -1, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **told)
    path.write_bytes(model.getvalue())


def write(folder: Path, kind: str, **training: Any) -> Path:
    """Write a tokenizer's files. A tenth of the pieces is missing from the vocabulary, and some of its own are in no
    model."""
    folder.mkdir(parents=True)
    names = ("source.spm", "target.spm") if kind == MARIAN else ("sentencepiece.bpe.model",)
    chance = random.Random(1)
    special = ["</s>", "<unk>"] if kind == MARIAN else ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = dict.fromkeys(special)
    for i, name in enumerate(names):
        train(folder / name, CORPUS[i * 100 :], **training)
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / name))
        every = [model.id_to_piece(number) for number in range(model.get_piece_size())]
        pieces.update(dict.fromkeys(piece for piece in every if chance.random() < 0.9))
    pieces.update(dict.fromkeys(["世界", "☃☄", "▁☃"]))  # with letters unknown to the models
    if kind == MARIAN:
        pieces.update(dict.fromkeys([">>fr<<", ">>de<<", "<pad>"]))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "source_lang": "en"}))
    return folder


class Both(NamedTuple):
    """A transformers tokenizer, and its conversion."""

    slow: Any
    converted: PieceTokenizer
    folder: Path


def convert(source: Path, folder: Path) -> Both:
    with quiet_transformers():
        slow = getattr(transformers, json.loads((source / "tokenizer_config.json").read_text())["tokenizer_class"])
        tokenizer = slow.from_pretrained(source)
    made = conversion.convert(tokenizer)
    folder.mkdir()
    made.tokenizer.save(str(folder / "tokenizer.json"))
    made.write(folder)
    return Both(tokenizer, PieceTokenizer(made.tokenizer, folder / conversion.PIECES_FILE), folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Both]:
    made: Dict[Tuple[str, str], Both] = {}

    def make(kind: str, training: str) -> Both:
        if (kind, training) not in made:
            folder = tmp_path_factory.mktemp("pieces")
            made[kind, training] = convert(write(folder / "source", kind, **TRAININGS[training]), folder / "converted")
        return made[kind, training]

    return make


def assert_alike(both: Both, text: str) -> None:
    with quiet_transformers():
        assert both.converted.encode(text).ids == both.slow(text)["input_ids"], text


def segmented(letters: str, folder: Path) -> PieceTokenizer:
    """A tokenizer that knows these letters."""
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}, "<unk>"))
    facts = {
        "kind": "unigram",
        "pieces": [[letter, -1.0] for letter in letters],
        "charsmap": base64.b64encode(bytes(4)).decode(),
        **dict.fromkeys(("user_defined", "tokens", "not_written", "as_they_are"), []),
        **dict.fromkeys(("add_prefix", "collapse", "language_codes"), False),
        "unknown_id": 0,
        "beyond": "",
    }
    (folder / "pieces.json").write_text(json.dumps(facts))
    return PieceTokenizer(tokenizer, folder / "pieces.json")


@pytest.mark.parametrize(
    "text, parts",
    [("☃☄", ["☃☄"]), ("a☃☄b☄", ["a", "☃☄", "b", "☄"]), ("☃ab☄☃☄a", ["☃", "a", "b", "☄☃☄", "a"]), ("", [])],
)
def test_unknown_neighbours_form_one_piece(text: str, parts: List[str], tmp_path: Path) -> None:
    found = segmented("ab", tmp_path).pieces(text)
    assert [piece.text for piece in found] == parts == [text[piece.start : piece.end] for piece in found]


def test_many_unknown_letters_take_no_more_time_than_known_ones(tmp_path: Path) -> None:
    """They are one token, so no limit on tokens refuses them."""
    tokenizer = segmented("ab", tmp_path)
    tokenizer._normalizer.normalize = lambda text: (text, [(i, i + 1) for i in range(len(text))])  # type: ignore[method-assign]
    tokenizer._segment = lambda text: [(letter, False) for letter in text]
    began = time.process_time()
    [piece] = tokenizer.pieces("☃" * 400_000)
    assert time.process_time() - began < 2  # it was 6
    assert (piece.start, piece.end) == (0, 400_000)


KINDS = pytest.mark.parametrize("kind", [MARIAN, M2M100])


@KINDS
@pytest.mark.parametrize("training", TRAININGS)
def test_real_texts_have_the_same_tokens(kind: str, training: str, both: Callable[[str, str], Both]) -> None:
    found = both(kind, training)
    for text in {*CORPUS, " ".join(SENTENCES)}:
        assert_alike(found, text)


LETTERS = [
    *"abt ABT.,!?<>0157", "é", "ü", "ß", "ﬁ", "½", "①", "ｆ", "ｕ", "\u0301", "\u0308", "\u0323", "\u200d", "\u200b", "\ufeff",
    *"\u00ad\u00a0\u3000\u2028\x85\x00\x01\x07\x0b\x1f\x7f\t\n\r", "👩", "🚀", "🏽", "\ufe0f", "ש", "ع", "\u202e", "世", "界",
    *"한한▁☃☄ำÅ\ue000\U0010ffff",
]  # fmt: skip
PARTS = [
    *LETTERS, ">>fr<<", ">>zz<<", ">>", "<<", "</s>", "<unk>", "<pad>", "＜/s＞", "<s>", "<sep>", "é!", "e\u0301", "the ",
    "leaves", "__en__", " __fr__ ", "7777777", "aaaaa", "ababa", "...",
]  # fmt: skip
hostile = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=40).map("".join),
    st.text(max_size=60),
    st.tuples(st.sampled_from(PARTS), st.integers(1, 300), st.sampled_from(PARTS)).map(lambda t: t[0] * t[1] + t[2]),
    st.tuples(st.sampled_from([">>fr<<", ">>de<< ", ">>zz<<", ">><<", " >>fr<<"]), st.sampled_from(SENTENCES)).map(
        "".join
    ),
)


@KINDS
@pytest.mark.parametrize("training", TRAININGS)
def test_hostile_texts_have_the_same_tokens(kind: str, training: str, both: Callable[[str, str], Both]) -> None:
    found = both(kind, training)

    @settings(max_examples=120, deadline=None, database=None)
    @given(text=hostile)
    @example(text="")
    @example(text=" ")
    @example(text="\x01")
    @example(text="\u2581 a \u2581")
    @example(text="ddddddddddddddddddddddddddddd")  # ties
    @example(text="☃☄ and ☃☄☃ and 世界")
    @example(text=">>fr<< a </s> >>de<< b >>fr<<")
    @example(text="＜/s＞ ｆ\u0301 ᄒ\u1161\u11ab e\u0323\u0301\u0308")
    def check(text: str) -> None:
        assert_alike(found, text)

    check()


@KINDS
@pytest.mark.parametrize("training", TRAININGS)
def test_tokens_have_the_same_text(kind: str, training: str, both: Callable[[str, str], Both]) -> None:
    found = both(kind, training)
    chance = random.Random(2)
    # A model may have more tokens than the vocabulary; MarianTokenizer fails on most such ids.
    last = max([*found.slow.encoder.values(), *getattr(found.slow, "lang_code_to_id", {"": 0}).values()])
    numbers = range(last + (9 if kind == M2M100 else 1))
    for _ in range(400):
        ids = [chance.choice(numbers) for _ in range(chance.randrange(12))]
        expected = found.slow.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert found.converted.decode(ids) == expected, found.slow.convert_ids_to_tokens(ids)
        assert found.converted.decode_batch([ids]) == [expected]
        expected = found.slow.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        written = found.converted.decode(ids, skip_special_tokens=False)
        assert found.converted.decode_batch([ids], skip_special_tokens=False) == [written]
        if kind == MARIAN:  # some pieces are in one of its two models alone
            expected, written = (re.sub("> +", "> ", text) for text in (expected, written))
        assert written == expected, found.slow.convert_ids_to_tokens(ids)


@KINDS
def test_details_name_special_tokens(kind: str, both: Callable[[str, str], Both]) -> None:
    found = both(kind, "unigram")
    facts = TokenizerFacts("tokenizer.json", 0, 0, "right", "right", pieces=conversion.PIECES_FILE)
    tokenizer = TextTokenizer(found.folder, facts, 12, 4, windows=False)
    ids = [*found.slow("The train", add_special_tokens=False)["input_ids"], found.slow.eos_token_id]
    details: Any = token_details(tokenizer, {"tokens": np.array(ids), "logarithms": np.zeros(len(ids))})
    last = details["tokens"][-1]
    assert (last["text"], last["special"]) == ("</s>", True)
    assert not any(token["special"] for token in details["tokens"][:-1])
    assert "".join(token["text"] for token in details["tokens"]).replace("</s>", "") == "The train"


def test_what_is_cut_is_told_in_characters_of_the_text(both: Callable[[str, str], Both]) -> None:
    """Whatever sentencepiece's normalization did to them."""
    found = both(MARIAN, "unigram")
    facts = TokenizerFacts("tokenizer.json", 0, 0, "right", "right", pieces=conversion.PIECES_FILE)
    tokenizer = TextTokenizer(found.folder, facts, 12, 4, windows=False)
    text = ">>fr<<  ﬁ\u0301ve   ½ " + "the train leaves " * 8
    [encoded] = tokenizer.encode([Segments(text)], ["truncate"])
    assert isinstance(encoded, Encoded)
    [row] = encoded.rows
    start, end = encoded.unseen["text"]
    assert end == len(text) and row.length == 12
    kept = found.slow(text[:start])["input_ids"]
    assert row.encoding.ids == found.slow(text)["input_ids"][:11] + [0]
    assert kept[:10] == row.encoding.ids[:10]
    assert tokenizer.encode([Segments(text)], ["reject"])[0].args  # type: ignore[union-attr]  # an error


# Tokenizers that cannot be converted exactly.


@pytest.mark.parametrize(
    "training, settings, reason",
    [
        ({"byte_fallback": True, "vocab_size": 700}, {}, "source.spm has byte_fallback"),
        ({"treat_whitespace_as_suffix": True}, {}, "source.spm has treat_whitespace_as_suffix"),
        ({"model_type": "char"}, {}, "source.spm is neither an unigram nor a bpe model"),
        ({}, {"sp_model_kwargs": {"enable_sampling": True}}, "has sp_model_kwargs"),
        ({}, {"split_special_tokens": True}, "split_special_tokens"),
    ],
)
def test_what_cannot_be_converted_exactly_is_refused_by_name(
    training: Dict[str, Any], settings: Dict[str, Any], reason: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", MARIAN, **training)
    told = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**told, **settings}))
    with pytest.raises(ExportError) as raised:
        convert(source, tmp_path / "converted")
    assert reason in raised.value.message and "cannot be converted exactly" in raised.value.message


# End to end.


@pytest.fixture(scope="module")
def opus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random translator in the layout of published checkpoints."""
    folder = write(tmp_path_factory.mktemp("opus") / "checkpoint", MARIAN)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    pad, count = vocabulary["<pad>"], len(vocabulary)
    config = transformers.MarianConfig(
        vocab_size=count,
        pad_token_id=pad,
        eos_token_id=0,
        decoder_start_token_id=pad,
        forced_eos_token_id=0,
        bos_token_id=0,
        **models.SIZE_OF_BOTH,
    )
    model = transformers.MarianMTModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(models.weights(name, parameter.shape))
    model.generation_config.update(bad_words_ids=[[pad]], max_length=160, num_beams=3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("save_mode", ["torchscript", "pretrained", "onnx"])
def test_a_translator_answers_as_transformers(save_mode: str, opus: Path, tmp_path: Path) -> None:
    config = {"model_name": str(opus), "task": "text2text_generation", "max_length": 96, "save_mode": save_mode}
    exported = run_export(tmp_path / "x", config)
    assert exported.findings.passed and not exported.findings.tokenized_otherwise
    assert {"source.spm", "target.spm", "vocab.json"} <= set(exported.manifest.source.files)
    parsed, _ = parse_config(config)
    with quiet_transformers():
        original = load_original(parsed, Checkpoint(opus, "folder"), opus)
    engine = Engine.load(tmp_path / "x")
    texts = [*SENTENCES[:4], ">>fr<< The train leaves.", ">>zz<< é 世界 ☃☄ ｆ\u0301", "aaaaaaa </s> b"]
    for beams in (1, 3):
        parameters = {"max_new_tokens": 12, "num_beams": beams}
        found = answers(engine, [Request({"text": text}, parameters) for text in texts])
        with quiet_transformers():
            expected = [generated(original.model, original.tokenizer, text, **parameters) for text in texts]
        assert [answer["generated_text"] for answer in found] == expected
        assert len({*expected}) > 3


def test_an_archive_without_the_pieces_is_refused(opus: Path, tmp_path: Path) -> None:
    config = {"model_name": str(opus), "task": "text2text_generation", "max_length": 32, "save_mode": "pretrained"}
    run_export(tmp_path / "x", config)
    manifest = Manifest.read(tmp_path / "x")
    assert manifest.tokenizer.pieces in manifest.files
    task = load_task(tmp_path / "x", manifest)
    assert isinstance(task.encode([Request({"text": "The train"})])[0], Encoded)
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    (tmp_path / "y" / "pieces.json").unlink()
    with pytest.raises(RuntimeError, match="pieces.json, which is missing"):
        Engine.load(tmp_path / "y")
    assert isinstance(Engine.load(tmp_path / "x").answer([Request({"text": "a"}, {"max_new_tokens": 2})])[0], Answer)


@pytest.mark.parametrize("task", ["sequence_classification", "question_answering"])
def test_a_task_that_reads_pairs_is_refused(task: str, opus: Path) -> None:
    parsed, _ = parse_config({"model_name": str(opus), "task": task})
    with pytest.raises(
        ExportError, match="has no fast tokenizer .MarianTokenizer runs in Python only"
    ), quiet_transformers():
        load_original(parsed, Checkpoint(opus, "folder"), opus)
