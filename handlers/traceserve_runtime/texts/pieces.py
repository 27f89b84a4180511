"""Tokenizers that combine a sentencepiece model with a separate vocabulary, such as Marian's and M2M100's.

sentencepiece finds a text's pieces; the vocabulary (a WordLevel model in tokenizer.json) has their ids. Both of
sentencepiece's steps are reproduced here exactly: the tokenizers package normalizes by graphemes, which loses
marks after a replaced letter, and adds scores in another precision, which breaks ties differently ("ddddd").
"""

from __future__ import annotations

import base64
import heapq
import json
import re
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, TypedDict

from tokenizers import Encoding, Tokenizer

if TYPE_CHECKING:
    from tokenizers.processors import PostProcessor

SPACE = "\u2581"  # sentencepiece's space
UNIGRAM, BPE = "unigram", "bpe"
_UNKNOWN_PENALTY = 10.0  # for a letter in no piece of a Unigram, below the lowest score


class TextPiece(NamedTuple):
    """A part of a text as looked up in the vocabulary, and its offsets: [start, end)."""

    text: str
    start: int
    end: int


class Charsmap:
    """sentencepiece's table of replacements: a trie's size, the trie (a double array of darts-clone), the strings.

    Each string ends with a zero byte; a leaf of the trie holds its string's offset.
    """

    def __init__(self, content: bytes) -> None:
        size = int.from_bytes(content[:4], "little")
        self._units = array("I", content[4 : 4 + size])
        self._strings = content[4 + size :]

    def longest(self, text: bytes, start: int) -> Tuple[int, str]:
        """Return how many bytes from `start` on are replaced (0 for none), and by what."""
        units = self._units
        if not units:
            return 0, ""
        node, found, string = _children(0, units[0]), 0, 0
        for position in range(start, len(text)):
            letter = text[position]
            node ^= letter
            # A zero byte ends keys and is in none.
            if not letter or node >= len(units) or units[node] & 0x800000FF != letter:
                break
            unit = units[node]
            node = _children(node, unit)
            if unit & 0x100:
                found, string = position + 1 - start, units[node] & 0x7FFFFFFF
        return found, self._strings[string : self._strings.index(b"\0", string)].decode("utf-8") if found else ""


def _children(node: int, unit: int) -> int:
    return node ^ ((unit >> 10) << ((unit & 0x200) >> 6))


class PiecesFacts(TypedDict):
    """The file beside tokenizer.json: sentencepiece's model, and how its vocabulary is used."""

    kind: str  # of SEGMENTATIONS
    pieces: List[Tuple[str, float]]  # with their scores
    user_defined: List[str]
    charsmap: str  # base64
    add_prefix: bool  # whether a text is prefixed with a space
    collapse: bool  # whether spaces are trimmed and collapsed
    language_codes: bool  # whether a text may begin with one, such as >>fr<<
    tokens: List[str]  # split off a text before sentencepiece sees it
    unknown_id: int
    not_written: List[int]  # the ids of special tokens
    beyond: str  # the text of an id beyond the vocabulary
    as_they_are: List[str]  # pieces missing from the model: written unchanged, even a ▁ in them, except for Marian's


class Normalizer:
    """sentencepiece's normalizer: replaces by its table, and turns the remaining spaces into ▁."""

    def __init__(self, facts: PiecesFacts) -> None:
        self._charsmap = Charsmap(base64.b64decode(facts["charsmap"]))
        self._add_prefix = facts["add_prefix"]
        self._collapse = facts["collapse"]
        self._own = [piece.encode("utf-8") for piece in sorted(facts["user_defined"], key=len, reverse=True)]

    def normalize(self, text: str) -> Tuple[str, List[Tuple[int, int]]]:
        """Return the normalized text, and each character's original offsets."""
        letters: List[str] = []
        spans: List[Tuple[int, int]] = []
        after_space = self._collapse
        for letter, start, end in self._replaced(text):
            if after_space:
                letter = letter.lstrip(" ")
            if letter:
                letters.append(letter.replace(" ", SPACE))
                spans += [(start, end)] * len(letter)
                after_space = self._collapse and letter.endswith(" ")
        if self._add_prefix and text:
            letters.insert(0, SPACE)
            spans.insert(0, (0, 0))
        whole = "".join(letters)
        if self._collapse:
            whole = whole.rstrip(SPACE)
        return whole, spans[: len(whole)]

    def begun(self, text: str) -> str:
        """Strip from a generated text the leading spaces that normalization would have added or removed."""
        if self._collapse:
            return text.lstrip(" ")
        return text[1:] if self._add_prefix and text.startswith(" ") else text

    def _replaced(self, text: str) -> Iterator[Tuple[str, int, int]]:
        """Yield replaced parts of the text with their offsets: from the left, the longest with a rule."""
        content = text.encode("utf-8")
        position = start = 0
        while position < len(content):
            own = next((piece for piece in self._own if content.startswith(piece, position)), None)
            size, by = (len(own), own.decode("utf-8")) if own is not None else self._charsmap.longest(content, position)
            if size:
                end = start + len(content[position : position + size].decode("utf-8"))
            else:
                by, end = text[start], start + 1
                size = len(by.encode("utf-8"))
            yield by, start, end
            position, start = position + size, end


# From a normalized text to its pieces, in order, each with whether the model knows it.
Segmentation = Callable[[str], List[Tuple[str, bool]]]


def unigram(facts: PiecesFacts) -> Segmentation:
    """Return the likeliest pieces, like `Model::EncodeOptimized` of sentencepiece's unigram model.

    Path scores are kept in 32 bits, as there, since this decides ties.
    """
    scores: Dict[str, float] = dict(facts["pieces"])
    highest, lowest = max(scores.values()), min(scores.values())
    for piece in facts["user_defined"]:
        scores[piece] = len(piece.encode("utf-8")) * highest - 0.1
    unknown = array("f", [array("f", [lowest])[0] - _UNKNOWN_PENALTY])[0]
    longest = max(map(len, scores))

    def segment(text: str) -> List[Tuple[str, bool]]:
        count = len(text)
        best = array("f", bytes(4 * (count + 1)))
        begins = [-1] * (count + 1)
        known = [True] * (count + 1)
        rounded = array("f", [0.0])
        for start in range(count):
            here = best[start]
            for end in range(start + 1, min(start + longest, count) + 1):
                score = scores.get(text[start:end])
                if score is not None:
                    rounded[0] = score + here
                    if begins[end] < 0 or rounded[0] > best[end]:
                        best[end], begins[end], known[end] = rounded[0], start, True
            if text[start] not in scores:
                rounded[0] = unknown + here
                if begins[start + 1] < 0 or rounded[0] > best[start + 1]:
                    best[start + 1], begins[start + 1], known[start + 1] = rounded[0], start, False
        found: List[Tuple[str, bool]] = []
        end = count
        while end > 0:
            found.append((text[begins[end] : end], known[end]))
            end = begins[end]
        return found[::-1]

    return segment


def bpe(facts: PiecesFacts) -> Segmentation:
    """Join neighbours, the pair with the best score first, like sentencepiece's bpe model."""
    scores: Dict[str, float] = dict(facts["pieces"])
    own = sorted(facts["user_defined"], key=len, reverse=True)
    whole = re.compile("|".join([*map(re.escape, own), "."]), re.DOTALL)
    frozen = frozenset(own)

    def segment(text: str) -> List[Tuple[str, bool]]:
        symbols = whole.findall(text)
        stuck = [symbol in frozen for symbol in symbols]
        before = list(range(-1, len(symbols) - 1))
        after = [*range(1, len(symbols)), -1]
        agenda: List[Tuple[float, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right >= 0 and not stuck[left] and not stuck[right]:
                piece = symbols[left] + symbols[right]
                if piece in scores:
                    heapq.heappush(agenda, (-scores[piece], left, right, len(piece)))

        for left in range(len(symbols) - 1):
            consider(left, left + 1)
        while agenda:
            _, left, right, size = heapq.heappop(agenda)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != size:
                continue  # one of them has grown since
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [(symbol, symbol in scores or symbol in frozen) for symbol in symbols if symbol]

    return segment


SEGMENTATIONS: Dict[str, Callable[[PiecesFacts], Segmentation]] = {UNIGRAM: unigram, BPE: bpe}


class PieceTokenizer:
    """A substitute for the tokenizers package's Tokenizer, for single texts: a vocabulary behind sentencepiece."""

    def __init__(self, tokenizer: Tokenizer, path: Path) -> None:
        facts: PiecesFacts = json.loads(path.read_text(encoding="utf-8"))
        self._tokenizer = tokenizer
        self._normalizer = Normalizer(facts)
        self._segment = SEGMENTATIONS[facts["kind"]](facts)
        self._codes = facts["language_codes"]
        self._vocabulary: Dict[str, int] = tokenizer.get_vocab()
        self._unknown = facts["unknown_id"]
        self._not_written = frozenset(facts["not_written"])
        self._as_they_are = frozenset(facts["as_they_are"])
        self._beyond = facts["beyond"]
        self._special = frozenset(facts["tokens"])  # of those that are not written
        self._behind_special = " " if self._codes else ""  # Marian's
        tokens = sorted(facts["tokens"], key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def __getattr__(self, name: str) -> Any:  # whatever the Tokenizer has
        return getattr(self._tokenizer, name)

    @property
    def post_processor(self) -> Optional[PostProcessor]:
        """The part that adds special tokens."""
        own: Optional[PostProcessor] = self._tokenizer.post_processor
        return own

    @post_processor.setter
    def post_processor(self, value: Optional[PostProcessor]) -> None:
        self._tokenizer.post_processor = value

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> List[Encoding]:
        """Encode like the Tokenizer."""
        return [self.encode(text, add_special_tokens) for text in texts]

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
        """Encode like the Tokenizer."""
        encoding = self._encoding(self.pieces(text))
        return self._tokenizer.post_process(encoding, None, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode pieces like transformers' `decode`; special tokens stand between texts that are decoded apart.

        (transformers keeps one more space behind a special token where Marian's model for writing lacks the next piece.)
        """
        written, part = "", ""
        for number in ids:
            token = self._tokenizer.id_to_token(number)
            if number in self._not_written:
                if not skip_special_tokens and token in self._special:  # others are sentencepiece's own, without a text
                    written, part = written + self._normalizer.begun(part) + token + self._behind_special, ""
                continue
            if token is None:  # the model has more tokens than the vocabulary
                written, part = written + self._normalizer.begun(part) + self._beyond, ""
            else:
                part += token if token in self._as_they_are else token.replace(SPACE, " ")
        return (written + self._normalizer.begun(part)).strip()

    def decode_batch(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> List[str]:
        """Decode each."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def pieces(self, text: str) -> List[TextPiece]:
        """Return a text's special tokens, and the pieces between them."""
        found: List[TextPiece] = []
        start = 0
        for match in self._tokens.finditer(text):
            found += self._section(text[start : match.start()], start)
            found.append(TextPiece(match.group(), *match.span()))
            start = match.end()
        return found + self._section(text[start:], start)

    def _section(self, text: str, offset: int) -> List[TextPiece]:
        found: List[TextPiece] = []
        if self._codes and text.startswith(">>") and "<<" in text:
            end = text.find("<<") + 2
            found.append(TextPiece(text[:end], offset, offset + end))
            text, offset = text[end:], offset + end
        normalized, spans = self._normalizer.normalize(text)

        def add(start: int, end: int) -> None:
            if start < end:
                found.append(TextPiece(normalized[start:end], offset + spans[start][0], offset + spans[end - 1][1]))

        position = unknown = 0  # unknown neighbours, which form one piece, begin at `unknown`
        for piece, known in self._segment(normalized):
            end = position + len(piece)
            if known:
                add(unknown, position)
                add(position, end)
                unknown = end
            position = end
        add(unknown, position)
        return found

    def _encoding(self, pieces: Sequence[TextPiece]) -> Encoding:
        count = len(pieces)
        state: Dict[str, object] = {
            "ids": [self._vocabulary.get(piece.text, self._unknown) for piece in pieces],
            "type_ids": [0] * count,
            "tokens": [piece.text for piece in pieces],
            "words": [None] * count,
            "offsets": [(piece.start, piece.end) for piece in pieces],
            "special_tokens_mask": [0] * count,
            "attention_mask": [1] * count,
            "overflowing": [],
            "sequence_ranges": {},
        }
        return _encoding(state)


def renumbered(encoding: Encoding, ids: Sequence[int]) -> Encoding:
    """Return the encoding with other token ids."""
    return _encoding({**json.loads(encoding.__getstate__()), "ids": list(ids)})


def without_overflow(encoding: Encoding) -> Encoding:
    """Return a truncated encoding without what was cut off, which `post_process` would join with all of a second one's."""
    return _encoding({**json.loads(encoding.__getstate__()), "overflowing": []})


def _encoding(state: Dict[str, object]) -> Encoding:
    """Make an Encoding from its pickled state, which is JSON; there is no other way to make or change one."""
    encoding = Encoding()
    encoding.__setstate__(json.dumps(state).encode("utf-8"))
    return encoding
