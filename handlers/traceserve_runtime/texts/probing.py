"""Finds out from the beginning of texts whether they have too many tokens, which avoids tokenizing all of them."""

from __future__ import annotations

from typing import Callable, List, NamedTuple, Sequence

# A text cut within a word may gain tokens: WordPiece makes at most this many of a 100-character word.
_OF_A_CUT = 256
# Beyond this share of the texts, tokenizing all of them is as fast.
_NEARLY_ALL = 0.8


class Sized(NamedTuple):
    """A text, and how many of its tokens count at most: a truncated one runs no more."""

    text: str
    most: float = float("inf")


def worth_it(characters: int, most: int) -> bool:
    """Return whether texts are long enough to exceed `most` tokens, and probing would save time."""
    return characters > 2 * (most + _OF_A_CUT)


def surely_more(texts: Sequence[Sized], most: int, count: Callable[[Sequence[str]], List[int]]) -> bool:
    """Return whether the first characters show that the texts have more than `most` tokens; `count` counts each text's.

    The first probe takes as many characters as tokens are allowed, enough for punctuation and ideographs; the second
    as many as these tokens have in prose. False proves nothing.
    """
    whole, wanted = sum(len(each.text) for each in texts), most + _OF_A_CUT
    reach = wanted * 9 // 8
    for _ in range(2):
        if reach > _NEARLY_ALL * whole:
            return False
        own = _beginning(texts, reach)
        tokens = sum(min(found, each.most) for found, each in zip(count([each.text for each in own]), own))
        if tokens > wanted:
            return True
        reach = int(1.1 * reach * wanted / max(1, tokens))
    return False


def _beginning(texts: Sequence[Sized], characters: int) -> List[Sized]:
    own: List[Sized] = []
    for each in texts:
        if characters <= 0:
            break
        own.append(each._replace(text=each.text[:characters]))
        characters -= len(each.text)
    return own
