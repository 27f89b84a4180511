"""The text of new tokens as it continues their prompt's, with the space before a first word."""

from __future__ import annotations

from functools import cached_property
from typing import Callable, Dict, NamedTuple, Optional, Sequence, Tuple

_LEAST = 4  # of the prompt's tokens that are decoded with the new ones
_MOST = 24  # new tokens until their text begins: bytes of a character, and special tokens
_INCOMPLETE = "\ufffd"  # decoders write it for bytes that are no character yet

Decode = Callable[[Sequence[int]], str]


class _Beginning(NamedTuple):
    """The text of some first tokens, after the prompt and by itself."""

    text: str
    alone: str


class Continuation:
    """What tokens add to the text of the prompt that they follow.

    Decoders of sentencepiece leave out the space before a text's first word, and transformers' pipeline decodes the new
    tokens by themselves. vLLM and text-generation-inference decode them together with the last ones of the prompt, and
    so is their beginning here; the rest of a text is the same.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self._decode = decode
        self._prompt = prompt
        self._known: Dict[Tuple[int, ...], Optional[_Beginning]] = {}

    @cached_property
    def _context(self) -> Sequence[int]:
        """The last tokens of the prompt, a few that have a text and begin with a whole character; none if it has no such.
        Most texts need none of it, so it is found when it is asked for."""
        for count in range(min(_LEAST, len(self._prompt)), len(self._prompt) + 1):
            context = self._prompt[len(self._prompt) - count :]
            text = self._decode(context)
            if text and _INCOMPLETE not in text:
                return context
        return ()

    @cached_property
    def before(self) -> str:
        """The end of the prompt's text; empty if it has none."""
        return self._decode(self._context)

    def of(self, tokens: Sequence[int], alone: str) -> str:
        """Return what the tokens add; `alone` is their text by itself."""
        for count in range(1, min(len(tokens), _MOST) + 1 if self.before else 0):
            begun = self._beginning(tuple(tokens[:count]))
            if begun is not None:
                return begun.text + alone[len(begun.alone) :] if alone.startswith(begun.alone) else alone
        return alone

    def _beginning(self, tokens: Tuple[int, ...]) -> Optional[_Beginning]:
        """Return the text of these first tokens, None while they have none."""
        if tokens not in self._known:
            whole = self._decode([*self._context, *tokens])
            text = whole[len(self.before) :] if whole.startswith(self.before) and _INCOMPLETE not in whole else ""
            self._known[tokens] = _Beginning(text, self._decode(tokens)) if text else None
        return self._known[tokens]
