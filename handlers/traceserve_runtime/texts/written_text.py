"""The text of tokens that are written one after another: only the last ones are decoded each time."""

from __future__ import annotations

from typing import Callable, List, NamedTuple, Sequence, Tuple

_BYTES = 4  # the most of a character: each may be a token
_INCOMPLETE = "\ufffd"  # decoders write it for bytes that are no character yet


class Near(NamedTuple):
    """How many tokens before the new ones are decoded `again` with them, since some are spelled by those beside them; and
    the `most` that are decoded at a time, unless a character is incomplete for longer."""

    again: int
    most: int


NEIGHBOURS = Near(8, 24)
WORDS = Near(2, 6)  # where it is enough that there is a word: see `TextTokenizer.decodes_words_locally`


class WrittenText:
    """The text of one growing sequence of tokens, equal to `decode` of all of them.

    Decoding all of them for every token would take longer, the longer the text is. `locally`: whether a token's text
    depends on its neighbours alone (`TextTokenizer.decodes_locally`); other texts are decoded whole.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], locally: bool, near: Near = NEIGHBOURS) -> None:
        self._decode = decode
        self._locally = locally
        self._near = near
        self._begin = 0  # of the tokens that are decoded again
        self._before = ""  # their text, when all before them was complete
        self._complete = ""  # the text at that time
        self._length, self._text = 0, ""  # the last call's

    def of(self, tokens: List[int]) -> str:
        """Return the text of these tokens, of which the last call's are the first."""
        if len(tokens) != self._length:
            self._length, self._text = len(tokens), self._read(tokens)
        return self._text

    def possible(self, tokens: List[int]) -> str:
        """Return the text of these tokens, of which the last one may not be one of the next call's."""
        recent = self._decode(tokens[self._begin :])
        if not recent.startswith(self._before) and not recent.endswith(_INCOMPLETE):
            # Not so local after all, or a wrong byte has spoiled those before it.
            self._locally = self._locally and _INCOMPLETE in recent
            self._begin, self._before, self._complete = 0, "", ""
            return self._decode(tokens)
        return self._complete + recent[len(self._before) :]

    def added(self, tokens: List[int], others: Sequence[int], length: int) -> List[str]:
        """Return what each of `others` would add behind the first characters, so many, of the text of these tokens, which are
        the last call's."""
        context = tokens[self._begin :]
        known = len(self._before) + length - len(self._complete)
        added = []
        for other in others:
            recent = self._decode([*context, other])
            if recent.startswith(self._before) or _INCOMPLETE in recent:
                added.append(recent[known:])
            else:
                added.append(self._decode([*tokens, other])[length:])
        return added

    def _read(self, tokens: List[int]) -> str:
        text = self.possible(tokens)
        if self._locally and len(tokens) - self._begin > self._near.most and not text.endswith(_INCOMPLETE):
            self._forget(tokens, text)
        return text

    def _forget(self, tokens: List[int], text: str) -> None:
        """Decode the earlier tokens no more, if the last ones have the same text without them."""
        for begin in range(len(tokens) - self._near.again, len(tokens) - self._near.again - _BYTES, -1):
            before = self._decode(tokens[begin:])
            # The space before a first word is left out, so there has to be a word.
            if before.strip() and _INCOMPLETE not in before and text.endswith(before):
                self._begin, self._before, self._complete = begin, before, text
                return


def added_texts(
    decode: Callable[[Sequence[int]], str],
    locally: bool,
    tokens: Sequence[int],
    others: Sequence[Sequence[int]],
    near: Near = NEIGHBOURS,
) -> Tuple[List[str], List[List[str]]]:
    """Return the text that each token adds, without partial characters, and the text that each of `others`, tokens at the
    same positions, would add. The other arguments are WrittenText's."""
    written = WrittenText(decode, locally, near)
    so_far: List[int] = []
    texts: List[str] = []
    of_others: List[List[str]] = []
    length = 0
    for token, instead in zip(tokens, others):
        of_others.append(written.added(so_far, instead, length))
        so_far.append(token)
        text = written.of(so_far)
        texts.append((text if len(so_far) == len(tokens) else text.rstrip(_INCOMPLETE))[length:])
        length += len(texts[-1])
    return texts, of_others
