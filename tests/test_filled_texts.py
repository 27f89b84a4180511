"""Texts that differ in one token: the same as those of all tokens, without decoding all of them each time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import models
import pytest
import tokenizers
from test_written_text import KINDS, TEXTS, read
from traceserve_runtime.texts.filled_texts import FilledTexts


def backend(kind: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(models.make_tokenizer(kind).backend_tokenizer.to_str())


ALL_KINDS: Dict[str, Callable[[], tokenizers.Tokenizer]] = {
    **KINDS,
    "bert": lambda: backend("bert"),
    "without a decoder": lambda: backend("wordpiece"),
}


class Counting:
    """A tokenizer that counts the tokens which it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.tokens = 0

    def decode_each(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool) -> List[str]:
        self.tokens += sum(map(len, sequences))
        found: List[str] = self._tokenizer.decode_each(sequences, skip_special_tokens)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("clean_up", [False, True])
@pytest.mark.parametrize("skip_special", [True, False])
def test_each_text_is_that_of_all_tokens(kind: str, clean_up: bool, skip_special: bool, tmp_path: Path) -> None:
    """With any token between any two characters, or with none; special ones and parts of characters too."""
    own = ALL_KINDS[kind]()
    tokenizer = read(own, tmp_path, clean_up)
    chosen = random.Random(1)
    others: List[Optional[int]] = [None, *range(own.get_vocab_size())]
    for text in [*TEXTS, " ".join(chosen.sample(TEXTS, 4)), "a ' ' ' ' ' . . . n't 'm ? ? " * 8]:
        ids = tokenizer.token_ids(text)[:300]
        between = [i for i in range(len(ids) + 1) if not tokenizer.decode(ids[:i], False).endswith("\ufffd")]
        for place in sorted(chosen.sample(between, len(between) // 12), reverse=True):
            ids[place:place] = [1] * chosen.choice([1, 12])  # a special token
        between = [i for i in range(len(ids) + 1) if not tokenizer.decode(ids[:i], False).endswith("\ufffd")]
        for position in chosen.sample(between, min(8, len(between))):
            before, after, tokens = ids[:position], ids[position:], chosen.sample(others, 40)
            filled = FilledTexts(tokenizer, [*before, 1, *after], skip_special)
            new = [[] if token is None else [token] for token in tokens]
            expected = [tokenizer.decode([*before, *own, *after], skip_special) for own in new]
            assert filled.at(position, tokens) == expected, (text, position)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "bert"])
def test_the_time_for_a_token_is_not_that_of_the_text(kind: str, tmp_path: Path) -> None:
    own = ALL_KINDS[kind]()
    tokenizer = Counting(read(own, tmp_path))
    ids = (tokenizer.token_ids("The train to the coast leaves at a quarter past nine. ") * 40)[:500]
    tokens = tokenizer.token_ids("The boat in the old harbour is small") * 20
    assert len(ids) == 500 and len(tokens) > 100
    filled = FilledTexts(tokenizer, ids, True)  # type: ignore[arg-type]
    assert len(set(filled.at(250, list(tokens)))) > 5
    assert tokenizer.tokens < 20 * len(tokens) + 4 * len(ids)
