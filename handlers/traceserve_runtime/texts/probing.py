"""Whether texts have more tokens than may be, found out from their beginning: tokenizing all of them is what is to be avoided."""

from __future__ import annotations

from typing import Callable, List, NamedTuple, Sequence

# A text that is cut within a word may have more tokens there: of a word of 100 characters WordPiece makes so many at most.
_OF_A_CUT = 256
# Where that much of the texts would have to be tokenized, all of it is as quickly.
_NEARLY_ALL = 0.8


class Sized(NamedTuple):
    """A text, and the most tokens of it that count: where it is truncated, so many are run."""

    text: str
    most: float = float("inf")


def worth_it(characters: int, most: int) -> bool:
    """Whether texts have enough characters that they may have more than `most` tokens, and time is saved by a look."""
    return characters > 2 * (most + _OF_A_CUT)


def surely_more(texts: Sequence[Sized], most: int, count: Callable[[Sequence[str]], List[int]]) -> bool:
    """Whether the texts have more than `most` tokens, as their first characters show; `count` gives the tokens of each.

    The first look takes as many characters as tokens may be, which is enough for punctuation and ideographs; the second
    as many as these tokens should have then. False says nothing.
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
