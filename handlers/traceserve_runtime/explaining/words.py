"""The words of a row, each with its characters in the user's text and its tokens."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence, Tuple

from traceserve_runtime.texts.rows import Row, Segments

_LONGEST = 40  # characters; what is longer, as an address or a hash, is read by its tokens
# Scripts without spaces between words: there a tokenizer's "word" may be a whole sentence.
_WITHOUT_SPACES = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0xA4CF), (0xF900, 0xFAFF))


class Word(NamedTuple):
    """A word: `field` and characters [start, end) of the request, and the positions of its tokens in the row."""

    field: str
    start: int
    end: int
    text: str
    positions: Tuple[int, ...]


def words_of(row: Row, segments: Segments) -> List[Word]:
    """Return a row's words in order, of both its texts; special tokens are in none."""
    found: List[Word] = []
    for number, text in enumerate(segments[:2]):
        if text is not None:
            found += _of_segment(row, text, segments.fields[number], row.positions(number))
    return found


def _of_segment(row: Row, text: str, field: str, positions: Sequence[int]) -> List[Word]:
    groups: List[Tuple[Optional[int], List[int], int, int]] = []  # the tokenizer's word, its tokens, characters
    ids, offsets = row.encoding.word_ids, row.encoding.offsets
    held: List[int] = []  # tokens without characters of their own, such as a space: they belong to the next token
    for position in positions:
        start, end = _stripped(text, *offsets[position])
        if start == end:
            held.append(position)
            continue
        if groups:  # or to the one before, of the same word
            behind = [p for p in held if ids[p] is not None and ids[p] == groups[-1][0] and ids[p] != ids[position]]
            groups[-1][1].extend(behind)
            held = [p for p in held if p not in behind]
        own, held = [*held, position], []
        if groups and (_continues(text, groups[-1], ids[position], start, end) or start < groups[-1][3]):
            word, before, first, last = groups[-1]
            groups[-1] = (word, [*before, *own], min(first, start), max(last, end))
        else:
            groups.append((ids[position], own, start, end))
    if groups:
        groups[-1][1].extend(held)
    return [Word(field, start, end, text[start:end], tuple(own)) for _, own, start, end in groups]


def _continues(
    text: str, group: Tuple[Optional[int], List[int], int, int], word: Optional[int], start: int, end: int
) -> bool:
    """Return whether a token belongs to the word before it."""
    own, _, first, last = group
    if own is None or word is None:
        joined = start == last and not text[start - 1 : start + 1].count(" ")
    else:
        joined = word == own
    return joined and max(last, end) - first <= _LONGEST and not _spaceless(text[first:end])


def _stripped(text: str, start: int, end: int) -> Tuple[int, int]:
    """Leave out the spaces around a token, which some tokenizers count to it."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _spaceless(text: str) -> bool:
    return any(least <= ord(character) <= most for character in text for least, most in _WITHOUT_SPACES)
