"""Inputs and outputs of tokenization: segments of text, and rows for the model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Dict, List, NamedTuple, Optional, Tuple

from tokenizers import Encoding


class Segments(NamedTuple):
    """The source of a row: a text, or a text and its pair; `fields` are their names in the request.

    The rest says how they are shortened: `limit` is the longest row if it is less than max_length; `cut` is the
    segment to shorten (0 or 1; None: the longer one, or both); adjacent windows share `stride` tokens, and
    have one size or, with `full`, are as long as possible except for the last. `special`: whether special tokens are
    added.
    """

    text: str
    pair: Optional[str] = None
    fields: Tuple[str, str] = ("text", "text_pair")
    limit: Optional[int] = None
    cut: Optional[int] = None
    stride: int = 0
    full: bool = False
    special: bool = True


@dataclass(frozen=True)
class Row:
    """One sequence for the model: `encoding` holds each token's id, type id and character offsets."""

    encoding: Encoding
    length: int  # in tokens, including special ones
    tokens: int  # of the text alone
    first: int = 0  # how many of these are in the first segment
    start: int = 0  # this window's offset in the shortened segment, in tokens
    part: int = 0  # index of the request's segments

    def numbered(self, part: int) -> Row:
        """Return the row with another part number."""
        return replace(self, part=part)

    def positions(self, segment: int = 0) -> List[int]:
        """Return the positions in the row of a segment's tokens, without special ones.

        The encoding's `sequence_ids` are not used: some post-processors lose them for windows of a pair.
        """
        own = [i for i, special in enumerate(self.encoding.special_tokens_mask) if not special]
        return own[self.first :] if segment else own[: self.first]


@dataclass(frozen=True)
class Encoded:
    """A request's rows, one or several windows, and the characters in no row."""

    rows: List[Row]
    unseen: Dict[str, Tuple[int, int]] = field(default_factory=dict)  # field -> [start, end)
