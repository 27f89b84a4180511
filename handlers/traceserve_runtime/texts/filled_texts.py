"""Texts that differ in one token: only the tokens near it are decoded for each."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence

from traceserve_runtime.texts.tokenization import TextTokenizer

_NEAR = 8  # tokens on each side of the replaced one, on which its text may depend
_FARTHER = 8  # where the text before them cannot be told apart, so many more


class _Around(NamedTuple):
    """The tokens near a position, and the texts before and behind theirs."""

    start: int
    end: int
    before: str
    behind: str


class FilledTexts:
    """The texts of a sequence of tokens with others at one of its positions, equal to `decode` of each sequence."""

    def __init__(self, tokenizer: TextTokenizer, ids: List[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._ids = ids
        self._skip = skip_special_tokens
        self._whole = self._decode([ids])[0] if len(ids) > 4 * _NEAR and tokenizer.decodes_words_locally else None

    def at(self, position: int, tokens: Sequence[Optional[int]]) -> List[str]:
        """Return the text with each of the tokens at the position; None: without one."""
        around = self._around(position)
        if around is None:
            texts = self._decode([self._with(position, token, 0, len(self._ids)) for token in tokens])
        else:
            near = self._decode([self._with(position, token, around.start, around.end) for token in tokens])
            texts = [around.before + text + around.behind for text in near]
        return [self._tokenizer.cleaned(text) for text in texts]

    def _with(self, position: int, token: Optional[int], start: int, end: int) -> List[int]:
        new = [] if token is None else [token]
        return [*self._ids[start:position], *new, *self._ids[position + 1 : end]]

    def _around(self, position: int) -> Optional[_Around]:
        """Find the tokens near a position whose text is a part of the whole one; None if it cannot be told which."""
        if self._whole is None:
            return None
        end = min(len(self._ids), position + 1 + _NEAR)
        for start in range(position - _NEAR, position - _NEAR - _FARTHER, -1):
            if start <= 0:
                start, before = 0, ""
            else:
                before = self._decode([self._ids[:start]])[0]
            text, left, right = self._decode(
                [self._ids[start:end], self._ids[start:position], self._ids[position + 1 : end]]
            )
            # Decoders leave out the space before the first word of a text, so there has to be one that is always the first,
            # or the word that would be is here.
            gap = next((gap for gap in ("", " ") if self._whole.startswith(before + gap + text)), None)
            if gap is not None and (left.strip() or (start == 0 and right.strip())):
                return _Around(start, end, before + gap, self._whole[len(before + gap + text) :])
            if start == 0:
                break
        return None

    def _decode(self, sequences: Sequence[Sequence[int]]) -> List[str]:
        return self._tokenizer.decode_each(sequences, self._skip)
