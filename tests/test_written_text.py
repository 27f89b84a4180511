"""Texts of growing tokens: the same as those of all tokens, without decoding all of them each time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import models
import pytest
import tokenizers
from conftest import run_export
from tokenizers import decoders, normalizers, pre_tokenizers, trainers
from traceserve.building.gate import verification
from traceserve.building.gate.texts import SENTENCES
from traceserve_runtime.engine import Engine
from traceserve_runtime.manifest import TokenizerFacts
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Job, Request
from traceserve_runtime.tasks.generating import Generating
from traceserve_runtime.texts.tokenization import TextTokenizer
from traceserve_runtime.texts.written_text import WrittenText

TEXTS = [
    *SENTENCES,
    "  spaces   before,  between\n\n and after  ",
    "日本語の文章です。絵文字👩‍👩‍👧‍👦も🏳️‍🌈ある。" * 5,
    "Ünïcödé ﬁne – “quotes” … ½ ℵ₀ \u200d é é",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4,
]


def byte_level() -> tokenizers.Tokenizer:
    """As of GPT-2 and most decoders: each byte is a letter."""
    return tokenizers.Tokenizer.from_str(models.make_tokenizer("gpt").backend_tokenizer.to_str())


def llama() -> tokenizers.Tokenizer:
    """As of Llama 2: unknown letters are spelled in bytes, and the first space is left out."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([text for text in TEXTS if text.isascii()], trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    state["model"].update(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    assert tokenizer.encode("日").tokens[-1] == "<0xA5>" and tokenizer.decode(tokenizer.encode("日 x").ids) == "日 x"
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    """As of T5: words begin with a mark."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


KINDS: Dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte-level": byte_level,
    "llama": llama,
    "sentencepiece": sentencepiece,
}


def read(tokenizer: tokenizers.Tokenizer, folder: Path, clean_up: bool = False) -> TextTokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = TokenizerFacts("tokenizer.json", 0, 0, "right", "right", clean_up, None, None)
    return TextTokenizer(folder, facts, 512, 16)


class Counting:
    """Decodes, and counts the tokens."""

    def __init__(self, tokenizer: TextTokenizer, skip_special: bool = True) -> None:
        self.tokens = 0
        self._decode = lambda ids: tokenizer.decode(ids, skip_special)

    def __call__(self, ids: Sequence[int]) -> str:
        self.tokens += len(ids)
        return self._decode(ids)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("skip_special", [True, False])
def test_each_text_is_that_of_all_tokens(kind: str, skip_special: bool, tmp_path: Path) -> None:
    """As far as it is complete; with special tokens between words too."""
    tokenizer = read(KINDS[kind](), tmp_path)
    assert tokenizer.decodes_locally
    chosen = random.Random(1)
    for text in [*TEXTS, *(" ".join(chosen.sample(TEXTS, 3)) for _ in range(10))]:
        ids = tokenizer.token_ids(text)[:250]
        between = [i for i in range(len(ids) + 1) if not tokenizer.decode(ids[:i], False).endswith("\ufffd")]
        for place in sorted(chosen.sample(between, len(between) // 40), reverse=True):
            ids.insert(place, 1)
        decode = Counting(tokenizer, skip_special)
        written = WrittenText(decode, tokenizer.decodes_locally)
        for count in range(1, len(ids) + 1):
            whole = tokenizer.decode(ids[:count], skip_special)
            if not whole.endswith("\ufffd"):
                assert written.of(ids[:count]) == whole, (text, count)
            assert whole.startswith(written.of(ids[:count]).rstrip("\ufffd")) or "\ufffd" in whole
        assert decode.tokens <= 60 * len(ids)


@pytest.mark.parametrize("kind", list(KINDS))
def test_any_tokens_have_their_text(kind: str, tmp_path: Path) -> None:
    """A model may write anything, but for bytes that are no text."""
    own = KINDS[kind]()
    tokenizer = read(own, tmp_path)
    valid = [i for i in range(own.get_vocab_size()) if "\ufffd" not in tokenizer.decode([i], False)]
    valid = [i for i in valid if not str(own.id_to_token(i)).startswith("<0x")]
    assert len(valid) > 200
    chosen = random.Random(2)
    for _ in range(8):
        ids = chosen.choices(valid, k=150)
        written = WrittenText(lambda some: tokenizer.decode(some, True), tokenizer.decodes_locally)
        for count in range(1, len(ids) + 1):
            other = [*ids[: count - 1], chosen.choice(valid)]
            assert written.possible(other) == tokenizer.decode(other, True)
            assert written.of(ids[:count]) == tokenizer.decode(ids[:count], True)


def test_the_time_for_a_token_does_not_grow(tmp_path: Path) -> None:
    tokenizer = read(byte_level(), tmp_path)
    ids = (tokenizer.token_ids(" ".join(TEXTS)) * 5)[:3000]
    decode = Counting(tokenizer)
    written = WrittenText(decode, True)
    for count in range(1, len(ids) + 1):
        written.of(ids[:count])
        written.of(ids[:count])  # a stream, and stop strings
    assert len(ids) == 3000 and decode.tokens < 30 * len(ids)


def test_others_are_decoded_whole(tmp_path: Path) -> None:
    """Where more than the neighbours decides, as what is cleaned up; and where it turns out to."""
    (tmp_path / "a").mkdir()
    assert not read(byte_level(), tmp_path / "a", clean_up=True).decodes_locally
    words = tokenizers.Tokenizer.from_str(models.make_tokenizer("bert").backend_tokenizer.to_str())
    tokenizer = read(words, tmp_path)
    assert not tokenizer.decodes_locally
    words.decoder = None
    assert not read(words, tmp_path).decodes_locally

    def numbered(ids: Sequence[int]) -> str:
        return "".join(f"{len(ids)}" for _ in ids)

    ids: List[int] = list(range(100))
    written = WrittenText(numbered, True)
    assert [written.of(ids[:count]) for count in range(1, 101)] == [numbered(ids[:count]) for count in range(1, 101)]


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_streams_and_details_are_those_of_the_whole_text(
    architecture: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens than are decoded at a time, with a stop string, streamed and whole."""
    task = {"llama": "text_generation", "t5": "text2text_generation"}[architecture]
    monkeypatch.setattr(verification, "TEXTS", SENTENCES[1:3])
    content = {"model_name": str(checkpoint(architecture, TASKS[task].auto_model)), "task": task, "max_length": 128}
    run_export(tmp_path / "x", content)
    engine = Engine.load(tmp_path / "x")
    sampled = {"max_new_tokens": 80, "min_new_tokens": 80, "do_sample": True, "temperature": 3.0, "seed": 1}
    asked = [Request({"text": SENTENCES[1]}, {**sampled, "details": True, "top_n_tokens": 2, "stop": ["\x00"]})]
    if architecture == "llama":
        asked.append(Request({"text": SENTENCES[2]}, {**sampled, "stream": True, "stop": ["\x00"]}))

    def told() -> Tuple[List[Any], List[Any]]:
        pieces: List[Any] = []
        answers = engine.answer(asked, emit=lambda *piece: pieces.append(piece))
        return [each.value for each in answers if isinstance(each, Answer)], pieces

    assert isinstance(engine.task, Generating) and engine.task.tokenizer.decodes_locally
    answers, pieces = told()
    monkeypatch.setattr(engine.task.tokenizer, "decodes_locally", False)
    assert told() == (answers, pieces) and len(answers) == len(asked)
    assert len(pieces) == 80 * (len(asked) - 1)


@pytest.mark.parametrize("special", [False, True])
def test_bytes_are_sent_once_none_of_them_can_change(special: bool, tmp_path: Path, artifact: Path) -> None:
    """A wrong byte spoils the text of all that stand before it, and special tokens part none."""
    tokenizer = read(KINDS["llama"](), tmp_path)
    assert not read(KINDS["byte-level"](), tmp_path).ends_in_bytes([100])
    task = TASKS["text_generation"](Engine.load(artifact).manifest, tokenizer)
    assert isinstance(task, Generating)
    first = tokenizer.token_id("<0x00>")
    assert first is not None
    chosen = random.Random(3)
    words = [tokenizer.token_ids(text) for text in ("train", "é", "日本", "a train")]
    for _ in range(60):
        ids: List[int] = []
        while len(ids) < 100:
            ids += chosen.choice([*words, [first + chosen.randrange(128, 256)], *([[1]] if special else [])])
        pieces: List[str] = []
        job = Job(None, Request({"text": "a"}, {"stream": True}), pieces.append)  # type: ignore[arg-type]
        written = WrittenText(task.text, tokenizer.decodes_locally)
        tell = task._told(job, written.of)
        assert tell is not None
        for count in range(1, len(ids) + 1):
            tell(ids[:count], ())
            if not tokenizer.ends_in_bytes(ids[:count]):
                assert written.of(ids[:count]) == task.text(ids[:count])
        assert len(pieces) > 10 and all(task.text(ids).startswith(piece) for piece in pieces)
