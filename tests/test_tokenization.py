"""Text to rows: windows lose nothing, truncation equals transformers', and removed text is named."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Type

import models
import pytest
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, processors
from traceserve_runtime.errors import InputTooLong, InvalidManifest, InvalidRequest, TraceserveError
from traceserve_runtime.manifest import TokenizerFacts
from traceserve_runtime.texts.rows import Encoded, Row, Segments
from traceserve_runtime.texts.tokenization import TextTokenizer, clean_up, longest_first

quick = settings(deadline=None, max_examples=50, database=None)

KINDS = ["bert", "roberta", "gpt"]
# And with other families' post-processors: GPT-2's trims offsets, Llama's begins each segment, T5's ends it.
ALL_KINDS = [*KINDS, "gpt2", "llama", "t5"]
WORDS = [
    "the",
    "train",
    "leaves",
    "at",
    "nine",
    "!",
    "Größe",
    "e\u0301",
    "👍🏽",
    "👩‍👩‍👧",
    "Поезд",
    "请问",
    "antidisestablishmentarianism",
    "  ",
    "\n",
    "ﬁ",
]
texts = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)
long_texts = st.lists(st.sampled_from(WORDS), min_size=10, max_size=120).map(" ".join)
LONG = "The train to the coast leaves at a quarter past nine from platform four. " * 6


@dataclass(frozen=True, repr=False)
class Written:
    """A tokenizer's folder, and the same tokenizer read by the tokenizers package."""

    folder: Path
    own: Tokenizer

    def open(
        self,
        max_length: int = 16,
        max_rows: int = 1000,
        side: str = "right",
        windows: bool = True,
        clean_up: bool = False,
    ) -> TextTokenizer:
        facts = TokenizerFacts("tokenizer.json", 0, 0, "right", side, clean_up)
        return TextTokenizer(self.folder, facts, max_length, max_rows, windows)

    def hugging(self, side: str = "right") -> Any:
        """The same tokenizer in transformers."""
        content = Tokenizer.from_str(self.own.to_str())
        kind: Any = transformers.PreTrainedTokenizerFast
        return kind(tokenizer_object=content, truncation_side=side, clean_up_tokenization_spaces=False)


def write_tokenizer(kind: str, folder: Path) -> Written:
    """A tokenizer.json of this kind."""
    made = models.make_tokenizer("gpt" if kind in ("gpt2", "llama") else kind)
    own = Tokenizer.from_str(made.backend_tokenizer.to_str())
    end = ("<end>", own.token_to_id("<end>") or 0)
    begun = processors.TemplateProcessing(single="<end> $A", pair="<end> $A <end>:1 $B:1", special_tokens=[end])
    trimmed = processors.ByteLevel(trim_offsets=True)
    if kind == "gpt2":
        own.post_processor = trimmed
    elif kind == "llama":
        own.post_processor = processors.Sequence([trimmed, begun])
    own.no_padding()
    own.no_truncation()
    own.save(str(folder / "tokenizer.json"))
    return Written(folder, own)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Written]:
    """A folder for each kind of tokenizer."""
    return {kind: write_tokenizer(kind, tmp_path_factory.mktemp(kind)) for kind in ALL_KINDS}


def encode(
    tokenizer: TextTokenizer, text: str, pair: Optional[str] = None, how: str = "window", **shortened: Any
) -> Encoded:
    """Return the rows of one text, or of a pair; `shortened` has the options of Segments."""
    (encoded,) = tokenizer.encode([Segments(text, pair, **shortened)], [how])
    assert isinstance(encoded, Encoded), encoded
    return encoded


def refusal(
    tokenizer: TextTokenizer, text: str, pair: Optional[str] = None, how: str = "window", **shortened: Any
) -> TraceserveError:
    """Return why a text, or a pair, has no rows."""
    (error,) = tokenizer.encode([Segments(text, pair, **shortened)], [how])
    assert isinstance(error, TraceserveError)
    return error


def own_tokens(row: Row) -> List[Tuple[int, Tuple[int, int], int]]:
    """Return the id, offsets and type of each token of a row, except the special ones around and between its segments.

    `sequence_ids` are not used: the tokenizers package loses those of the first segment when it templates a window of a
    pair.
    """
    encoding = row.encoding
    rows = zip(encoding.ids, encoding.offsets, encoding.type_ids, encoding.tokens)
    typed = "[CLS]" in encoding.tokens  # only these tokenizers' models read types
    special = ("[CLS]", "[SEP]", "<s>", "</s>")
    return [(i, offsets, kind if typed else 0) for i, offsets, kind, token in rows if token not in special]


def ids_of(row: Row) -> List[int]:
    return [i for i, _, _ in own_tokens(row)]


def words(tokens: int) -> str:
    """Return a text of this many tokens: every kind of tokenizer makes a token of each full stop."""
    return " ".join(["."] * tokens)


def columns(encodings: Sequence[Any], typed: bool = True) -> List[Any]:
    """Return the compared parts of encodings: ids, offsets, mask, types."""
    return [(e.ids, e.offsets, e.attention_mask, e.type_ids if typed else ()) for e in encodings]


def rows_of(encoded: Encoded, typed: bool = True) -> List[Any]:
    return columns([row.encoding for row in encoded.rows], typed)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("stride", [0, 1, 5, 9])
@pytest.mark.parametrize("max_length", [24, 40])
@pytest.mark.parametrize("cut", [0, 1])
def test_full_windows_over_one_segment_are_those_of_transformers(
    written: Dict[str, Written], kind: str, stride: int, max_length: int, cut: int
) -> None:
    pair = ("Yes, at nine.", LONG) if cut else (LONG, "Yes, at nine.")
    strategy = ("only_first", "only_second")[cut]
    expected = written[kind].hugging()(
        *pair, truncation=strategy, max_length=max_length, stride=stride, return_overflowing_tokens=True
    )
    encoded = encode(written[kind].open(max_length), *pair, cut=cut, stride=stride, full=True)
    assert len(encoded.rows) > 2
    # If a template gives the pair no types, the package's later windows have other ones.
    typed = kind != "t5"
    assert rows_of(encoded, typed) == columns(expected.encodings, typed)
    assert encoded.unseen == {}
    for row, encoding in zip(encoded.rows, expected.encodings):
        for segment in (0, 1):
            assert row.positions(segment) == [i for i, own in enumerate(encoding.sequence_ids) if own == segment]


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("stride", [0, 1, 5, 9])
def test_full_windows_of_a_text_are_those_of_transformers(written: Dict[str, Written], kind: str, stride: int) -> None:
    expected = written[kind].hugging()(
        LONG, truncation=True, max_length=24, stride=stride, return_overflowing_tokens=True
    )
    encoded = encode(written[kind].open(24), LONG, stride=stride, full=True)
    assert len(encoded.rows) > 3
    assert rows_of(encoded) == columns(expected.encodings)


@quick
@given(
    kind=st.sampled_from(ALL_KINDS),
    long=long_texts,
    short=texts,
    max_length=st.integers(12, 40),
    stride=st.integers(0, 20),
    cut=st.integers(0, 1),
)
def test_windows_over_one_segment_of_any_pair_are_those_of_transformers(
    written: Dict[str, Written], kind: str, long: str, short: str, max_length: int, stride: int, cut: int
) -> None:
    own = written[kind].own
    pair = (short, long) if cut else (long, short)
    standing = len(own.encode(short, add_special_tokens=False))
    room = max_length - own.num_special_tokens_to_add(bool(pair[1])) - standing
    assume(room > stride)
    encoded = encode(written[kind].open(max_length), *pair, cut=cut, stride=stride, full=True)
    expected = written[kind].hugging()(
        *pair,
        truncation=("only_first", "only_second")[cut],
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
    )
    typed = kind != "t5"
    assert rows_of(encoded, typed) == columns(expected.encodings, typed)
    for row, encoding in zip(encoded.rows, expected.encodings):
        assert row.positions(cut) == [i for i, sequence in enumerate(encoding.sequence_ids) if sequence == cut]


@quick
@given(
    kind=st.sampled_from(ALL_KINDS),
    long=long_texts,
    short=texts,
    max_length=st.integers(12, 40),
    cut=st.integers(0, 1),
    side=st.sampled_from(["right", "left"]),
)
def test_truncation_of_one_segment_is_that_of_transformers(
    written: Dict[str, Written], kind: str, long: str, short: str, max_length: int, cut: int, side: str
) -> None:
    own = written[kind].own
    pair = (short, long) if cut else (long, short)
    wholes = [own.encode(text, add_special_tokens=False) for text in pair]
    room = max_length - own.num_special_tokens_to_add(bool(pair[1])) - len(wholes[1 - cut])
    assume(0 < room < len(wholes[cut]))
    encoded = encode(written[kind].open(max_length, side=side), *pair, "truncate", cut=cut)
    expected = written[kind].hugging(side)(*pair, truncation=("only_first", "only_second")[cut], max_length=max_length)
    assert rows_of(encoded) == columns(expected.encodings)
    (name,) = encoded.unseen
    assert name == ("text", "text_pair")[cut]
    start, end = encoded.unseen[name]
    offsets = wholes[cut].offsets
    if side == "right":
        assert end == len(long) and start <= offsets[room][0]
        assert not long[start : offsets[room][0]].strip()
    else:
        assert start == 0 and end == offsets[len(offsets) - room - 1][1]


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize(
    "pair", [("One text.", "Another, longer text."), ("", "Only one."), ("Only one.", ""), ("?", None)]
)
def test_the_places_of_segments_in_whole_rows(
    written: Dict[str, Written], kind: str, pair: Tuple[str, Optional[str]]
) -> None:
    (row,) = encode(written[kind].open(64), *pair).rows
    (expected,) = written[kind].hugging()(*pair).encodings
    assert columns([row.encoding]) == columns([expected])
    for segment in (0, 1):
        assert row.positions(segment) == [i for i, own in enumerate(expected.sequence_ids) if own == segment]
    assert (row.start, row.part) == (0, 0)


@pytest.mark.parametrize(
    ("kind", "marks"), [("bert", "[SEP] [MASK] [CLS]"), ("roberta", "</s><mask> <s>"), ("llama", "<end>")]
)
def test_special_tokens_that_a_text_holds_are_its_own(written: Dict[str, Written], kind: str, marks: str) -> None:
    """They have positions, so that a masked token can be found."""
    text = f"one {marks} two"
    (row,) = encode(written[kind].open(64), text, marks).rows
    own = written[kind].own
    for segment, content in enumerate((text, marks)):
        ids = [row.encoding.ids[place] for place in row.positions(segment)]
        assert ids == own.encode(content, add_special_tokens=False).ids
        assert own.token_to_id(marks.split()[0].split(">")[0] + (">" if "<" in marks else "")) in ids


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_what_is_cut_of_two_texts_is_not_kept(kind: str, written: Any) -> None:
    """The tokenizers package joins each piece that was cut off the first with each of the second."""
    encoded = encode(written[kind].open(24), "a " * 300, "b " * 300, "truncate")
    assert len(encoded.rows[0].encoding) == 24 and encoded.rows[0].encoding.overflowing == []


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("how", ["window", "truncate"])
@pytest.mark.parametrize("cut", [None, 0, 1])
def test_an_empty_pair_is_none(written: Dict[str, Written], kind: str, how: str, cut: Optional[int]) -> None:
    """As in transformers, which answers such a pair like a single text."""
    tokenizer = written[kind].open(24)
    for text in ("One text.", LONG):
        encoded, alone = encode(tokenizer, text, "", how, cut=cut), encode(tokenizer, text, None, how)
        assert rows_of(encoded) == rows_of(alone)
        assert encoded.unseen == alone.unseen
        assert [row.first for row in encoded.rows] == [row.tokens for row in encoded.rows]
    assert rows_of(encode(tokenizer, "One text.", "")) == columns(written[kind].hugging()("One text.", "").encodings)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("pair", [None, "Yes, at nine."])
@pytest.mark.parametrize("how", ["window", "truncate"])
def test_without_special_tokens(written: Dict[str, Written], kind: str, pair: Optional[str], how: str) -> None:
    tokenizer, hugging = written[kind].open(24), written[kind].hugging()
    (row,) = encode(tokenizer, "The train leaves.", None if pair is None else "?", special=False).rows
    expected = hugging("The train leaves.", None if pair is None else "?", add_special_tokens=False)
    assert columns([row.encoding]) == columns(expected.encodings)
    assert row.tokens == row.length
    encoded = encode(tokenizer, LONG, pair, how, special=False, full=True, cut=0)
    options = {"truncation": "only_first", "max_length": 24, "return_overflowing_tokens": how == "window"}
    expected = hugging(LONG, pair, add_special_tokens=False, **options)
    assert rows_of(encoded) == columns(expected.encodings)
    assert encoded.rows[0].length == 24 == encoded.rows[0].tokens


def test_with_and_without_special_tokens_in_one_call(written: Dict[str, Written]) -> None:
    texts = ["one", "two words", LONG, "four", "", "six"]
    requests = [Segments(text, special=i % 2 == 0) for i, text in enumerate(texts)]
    answers = written["bert"].open(1000).encode(requests, ["window"] * len(texts))
    for i, (text, answer) in enumerate(zip(texts, answers)):
        assert isinstance(answer, Encoded)
        assert answer.rows[0].encoding.ids == written["bert"].own.encode(text, add_special_tokens=i % 2 == 0).ids


@quick
@given(
    kind=st.sampled_from(ALL_KINDS),
    text=long_texts,
    limit=st.integers(6, 40),
    max_length=st.integers(6, 40),
    stride=st.integers(0, 4),
    full=st.booleans(),
    how=st.sampled_from(["window", "truncate"]),
)
def test_a_limit_is_a_shorter_max_length(
    written: Dict[str, Written],
    kind: str,
    text: str,
    limit: int,
    max_length: int,
    stride: int,
    full: bool,
    how: str,
) -> None:
    """And never a longer one."""
    assume(len(written[kind].own.encode(text)))
    limited = encode(written[kind].open(max_length), text, None, how, limit=limit, stride=stride, full=full)
    shorter = encode(written[kind].open(min(limit, max_length)), text, None, how, stride=stride, full=full)
    assert rows_of(limited) == rows_of(shorter)
    assert limited.unseen == shorter.unseen
    assert [row.start for row in limited.rows] == [row.start for row in shorter.rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", [None, "Yes, at nine."])
def test_what_fits_is_one_row_as_the_package_encodes_it(
    written: Dict[str, Written], kind: str, pair: Optional[str]
) -> None:
    text = "The train leaves."
    encoded = encode(written[kind].open(max_length=64), text, pair)
    expected = written[kind].own.encode(text, pair)
    (row,) = encoded.rows
    assert row.encoding.ids == expected.ids
    assert row.encoding.type_ids == expected.type_ids
    assert row.length == len(expected.ids)
    assert row.tokens == sum(s is not None for s in expected.sequence_ids)
    assert encoded.unseen == {}


@pytest.mark.parametrize("how", ["window", "truncate", "reject"])
def test_what_fits_exactly_is_left_whole(written: Dict[str, Written], how: str) -> None:
    encoded = encode(written["bert"].open(max_length=16), words(14), how=how)
    assert [row.length for row in encoded.rows] == [16]
    assert encoded.unseen == {}


@quick
@given(kind=st.sampled_from(KINDS), text=long_texts, max_length=st.integers(4, 24))
def test_windows_cover_each_token_once_in_order(
    written: Dict[str, Written], kind: str, text: str, max_length: int
) -> None:
    encoded = encode(written[kind].open(max_length), text)
    whole = written[kind].own.encode(text, add_special_tokens=False)
    assert [i for row in encoded.rows for i in ids_of(row)] == whole.ids
    assert encoded.unseen == {}
    for row in encoded.rows:
        assert row.length == len(row.encoding.ids) <= max_length
        assert row.tokens == len(ids_of(row)) > 0
        assert row.length == row.tokens + written[kind].own.num_special_tokens_to_add(False)
    room = max_length - written[kind].own.num_special_tokens_to_add(False)
    assert len(encoded.rows) == math.ceil(len(whole) / room)


@quick
@given(kind=st.sampled_from(KINDS), long=long_texts, short=texts, long_first=st.booleans())
def test_each_window_of_a_pair_holds_the_shorter_one_whole(
    written: Dict[str, Written], kind: str, long: str, short: str, long_first: bool
) -> None:
    own = written[kind].own
    whole, other = own.encode(long, add_special_tokens=False), own.encode(short, add_special_tokens=False)
    max_length = 2 * len(other) + 8
    assume(len(whole) + len(other) + own.num_special_tokens_to_add(True) > max_length)
    encoded = encode(written[kind].open(max_length), *((long, short) if long_first else (short, long)))
    covered = []
    for row in encoded.rows:
        ids = ids_of(row)
        split = len(ids) - len(other) if long_first else len(other)
        window, standing = (ids[:split], ids[split:]) if long_first else (ids[split:], ids[:split])
        assert standing == other.ids
        covered += window
        assert row.length == len(row.encoding.ids) <= max_length
        assert row.tokens == len(ids)
    assert covered == whole.ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "pair"), [(LONG, None), (LONG, "Yes, at nine."), ("Yes, at nine.", LONG)])
def test_windows_keep_offsets_and_types_of_the_whole(
    written: Dict[str, Written], kind: str, text: str, pair: Optional[str]
) -> None:
    rows = [own_tokens(row) for row in encode(written[kind].open(24), text, pair).rows]
    whole = own_tokens(Row(written[kind].own.encode(text, pair), 0, 0))
    standing = 0 if pair is None else len(written[kind].own.encode("Yes, at nine.", add_special_tokens=False))
    if kind == "roberta":  # its post-processor leaves a row's first token its leading space: not compared
        at = 0 if text == LONG else standing
        position = at
        for row in rows:
            assert row[at][0] == whole[position][0]
            row[at] = whole[position] = (row[at][0], (-1, -1), row[at][2])
            position += len(row) - standing
    if text == LONG:
        end = len(whole) - standing
        assert [token for row in rows for token in row[: len(row) - standing]] == whole[:end]
        assert all(row[len(row) - standing :] == whole[end:] for row in rows)
    else:
        assert [token for row in rows for token in row[standing:]] == whole[standing:]
        assert all(row[:standing] == whole[:standing] for row in rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "pair"), [(LONG, None), (LONG, "Yes, at nine."), ("Yes, at nine.", LONG)])
def test_truncation_keeps_offsets_and_types_of_the_whole(
    written: Dict[str, Written], kind: str, text: str, pair: Optional[str]
) -> None:
    (row,) = encode(written[kind].open(24), text, pair, "truncate").rows
    kept, whole = own_tokens(row), own_tokens(Row(written[kind].own.encode(text, pair), 0, 0))
    standing = 0 if pair is None or text != LONG else len(written[kind].own.encode(pair, add_special_tokens=False))
    first = len(kept) - standing
    assert kept[:first] == whole[:first]
    assert kept[first:] == whole[len(whole) - standing :]


@pytest.mark.parametrize("long_first", [True, False])
def test_types_and_special_tokens_stand_in_each_window_of_a_pair(written: Dict[str, Written], long_first: bool) -> None:
    pair = (LONG, "Yes.") if long_first else ("Yes.", LONG)
    encoded = encode(written["bert"].open(16), *pair)
    assert len(encoded.rows) > 2
    for row in encoded.rows:
        tokens, types = row.encoding.tokens, row.encoding.type_ids
        middle = tokens.index("[SEP]")
        assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and tokens.count("[SEP]") == 2
        assert types == [0] * (middle + 1) + [1] * (len(tokens) - middle - 1)


# A text's tokens, and a row's room beside its two special tokens.
@pytest.mark.parametrize(
    ("tokens", "room"),
    [(31, 30), (59, 30), (60, 30), (61, 30), (91, 30), (300, 30), (301, 30), (501, 500)],
)
def test_windows_are_of_nearly_equal_size(written: Dict[str, Written], tokens: int, room: int) -> None:
    sizes = [row.tokens for row in encode(written["bert"].open(room + 2), words(tokens)).rows]
    assert sum(sizes) == tokens
    assert len(sizes) == math.ceil(tokens / room)
    assert 2 * min(sizes) >= max(sizes)  # else a few tokens would lack their neighbours


@quick
@given(
    kind=st.sampled_from(KINDS),
    text=long_texts,
    pair=st.none() | texts | long_texts,
    max_length=st.integers(5, 40),
    side=st.sampled_from(["right", "left"]),
)
@example(kind="bert", text="a b c d e f g h", pair="a b c d e f g h", max_length=10, side="right")
@example(kind="bert", text="a b c d e f g h", pair="a b c d e f g h", max_length=9, side="left")
@example(kind="roberta", text="", pair=LONG, max_length=12, side="right")
@example(kind="bert", text=LONG, pair="", max_length=12, side="right")
def test_truncation_is_the_packages_own(
    written: Dict[str, Written], kind: str, text: str, pair: Optional[str], max_length: int, side: str
) -> None:
    reference = Tokenizer.from_str(written[kind].own.to_str())
    reference.enable_truncation(max_length, strategy="longest_first", direction=side)
    (row,) = encode(written[kind].open(max_length, side=side), text, pair, "truncate").rows
    expected = reference.encode(text, pair or None)
    assert row.encoding.ids == expected.ids
    assert row.encoding.attention_mask == expected.attention_mask
    assert row.length == len(expected.ids)


@quick
@given(first=st.integers(0, 60), second=st.integers(0, 60), room=st.integers(0, 60))
@example(first=5, second=5, room=5)
@example(first=40, second=39, room=60)
def test_longest_first_cuts_the_longer_one_until_both_are_equal(first: int, second: int, room: int) -> None:
    assume(first + second > room)
    kept = longest_first(first, second, room)
    assert sum(kept) == room
    assert 0 <= kept[0] <= first and 0 <= kept[1] <= second
    for mine, whole, other in ((kept[0], first, kept[1]), (kept[1], second, kept[0])):
        assert mine == whole or mine >= other - 1  # the truncated one is not shorter than the other


@pytest.mark.parametrize(
    ("first", "second", "room", "kept"),
    [
        (10, 2, 6, (4, 2)),
        (2, 10, 6, (2, 4)),
        (10, 10, 6, (3, 3)),
        (10, 10, 7, (3, 4)),
        (11, 10, 7, (4, 3)),
        (9, 4, 4, (2, 2)),
    ],
)
def test_longest_first_by_hand(first: int, second: int, room: int, kept: Tuple[int, int]) -> None:
    assert longest_first(first, second, room) == kept


@quick
@given(
    kind=st.sampled_from(KINDS),
    text=long_texts,
    pair=st.none() | long_texts,
    max_length=st.integers(6, 20),
    side=st.sampled_from(["right", "left"]),
)
def test_unseen_are_the_characters_of_the_cut_tokens(
    written: Dict[str, Written], kind: str, text: str, pair: Optional[str], max_length: int, side: str
) -> None:
    encoded = encode(written[kind].open(max_length, side=side), text, pair, "truncate")
    own = written[kind].own
    wholes = [own.encode(content, add_special_tokens=False) for content in (text, pair) if content is not None]
    room = max_length - own.num_special_tokens_to_add(pair is not None)
    if sum(map(len, wholes)) <= room:
        kept = tuple(map(len, wholes))
    else:
        kept = (room,) if pair is None else longest_first(len(wholes[0]), len(wholes[1]), room)
    expected = {}
    for name, content, whole, keep in zip(("text", "text_pair"), (text, pair), wholes, kept):
        cut = len(whole) - keep
        if cut > 0:
            expected[name] = (
                (whole.offsets[keep][0], len(content or "")) if side == "right" else (0, whole.offsets[cut - 1][1])
            )
    texts = {"text": text, "text_pair": pair or ""}
    assert set(encoded.unseen) == set(expected)
    for name, (start, end) in expected.items():
        # A byte-level token includes the preceding space; trimmed offsets exclude it, the unseen characters do not.
        got = texts[name][slice(*encoded.unseen[name])]
        assert got.strip() == texts[name][start:end].strip()


@pytest.mark.parametrize(
    ("text", "side", "cut"),
    [
        ("one two three four five", "right", "four five"),
        ("one two three four five", "left", "one two"),
        ("Ä Ö Ü ß é è", "right", "ß é è"),
        ("👍🏽 请 问 ! ? .", "left", "👍🏽 请 问"),
        (". . . 👩‍👩‍👧 nine", "right", "👩‍👩‍👧 nine"),
        ("   one\n two\t three  four  ", "right", "four  "),
    ],
)
def test_unseen_points_into_the_original_text(tmp_path: Path, text: str, side: str, cut: str) -> None:
    """With a tokenizer whose tokens are the words, three of which are read."""
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    encoded = encode(
        Written(tmp_path, Tokenizer.from_str(json.dumps(content))).open(3, side=side), text, how="truncate"
    )
    start, end = encoded.unseen["text"]
    assert text[start:end] == cut


@pytest.mark.parametrize("pair", [None, LONG])
def test_reject_refuses_and_tells_the_counts(written: Dict[str, Written], pair: Optional[str]) -> None:
    error = refusal(written["bert"].open(16), LONG, pair, "reject")
    own = written["bert"].own
    count = len(own.encode(LONG, pair).ids)
    assert isinstance(error, InputTooLong)
    assert (error.status, error.field) == (413, "text")
    each = len(own.encode(LONG, add_special_tokens=False).ids)
    told = f"have {each:,} and {each:,} tokens, {count:,} with" if pair else f"has {count:,} tokens"
    assert told in error.message and "this model reads 16" in error.message


def test_each_request_is_shortened_as_it_asks_and_fails_alone(written: Dict[str, Written]) -> None:
    how = ["window", "truncate", "reject", "reject"]
    windows, cut, rejected, short = written["bert"].open(16).encode([Segments(LONG)] * 3 + [Segments("Yes.")], how)
    assert isinstance(windows, Encoded) and len(windows.rows) > 1 and not windows.unseen
    assert isinstance(cut, Encoded) and len(cut.rows) == 1 and cut.unseen
    assert isinstance(rejected, InputTooLong)
    assert isinstance(short, Encoded) and len(short.rows) == 1


def test_the_fields_names_are_the_requests_own(written: Dict[str, Written]) -> None:
    tokenizer = written["bert"].open(16)
    segments = Segments(LONG, LONG, ("question", "context"))
    cut, rejected = tokenizer.encode([segments] * 2, ["truncate", "reject"])
    assert isinstance(cut, Encoded) and set(cut.unseen) == {"question", "context"}
    assert isinstance(rejected, InputTooLong) and rejected.field == "question"


@pytest.mark.parametrize("kind", KINDS)
def test_two_long_texts_cannot_both_be_cut_into_windows(written: Dict[str, Written], kind: str) -> None:
    error = refusal(written[kind].open(16), LONG, LONG + "More.")
    assert isinstance(error, InputTooLong)
    assert error.field == "text"  # the shorter one, which must fit


def test_the_longest_pair_of_a_windowed_text(written: Dict[str, Written]) -> None:
    tokenizer = written["bert"].open(13)  # 3 special tokens, so there is room for 10
    assert len(encode(tokenizer, words(20), words(5)).rows) == 4
    assert refusal(tokenizer, words(20), words(6)).field == "text_pair"
    assert refusal(tokenizer, words(6), words(20)).field == "text"


def test_an_empty_text_beside_a_long_one(written: Dict[str, Written]) -> None:
    for pair in (("", words(20)), (words(20), "")):
        assert len(encode(written["bert"].open(13), *pair).rows) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", ["", "."])
@pytest.mark.parametrize("how", ["window", "truncate"])
def test_the_shortest_max_length_is_no_accident(written: Dict[str, Written], kind: str, pair: str, how: str) -> None:
    """setup_config.json allows a max_length of 4, the number of special tokens in a pair of RoBERTa."""
    (answer,) = written[kind].open(4).encode([Segments(words(9), pair)], [how])
    if isinstance(answer, Encoded):
        assert all(row.length <= 4 for row in answer.rows)
    else:
        assert isinstance(answer, InputTooLong)


# The other segment's tokens, and whether they leave room for one token of the truncated segment: a row of 16 has 3
# special ones.
@pytest.mark.parametrize(("standing", "fits"), [(11, True), (12, True), (13, False), (20, False)])
@pytest.mark.parametrize("how", ["window", "truncate"])
@pytest.mark.parametrize("cut", [0, 1])
def test_the_segment_that_stays_whole_leaves_room_or_is_named(
    written: Dict[str, Written], cut: int, how: str, standing: int, fits: bool
) -> None:
    tokenizer = written["bert"].open(16)
    pair = (words(standing), words(30)) if cut else (words(30), words(standing))
    shortened: Any = {"fields": ("question", "context"), "cut": cut, "stride": 5}
    if fits:
        encoded = encode(tokenizer, *pair, how, **shortened)
        assert all(len(row.positions(1 - cut)) == standing and row.length <= 16 for row in encoded.rows)
        assert len(encoded.rows) > 1 or how == "truncate"
        return
    error = refusal(tokenizer, *pair, how, **shortened)
    assert isinstance(error, InputTooLong)
    assert (error.status, error.field) == (413, ("context", "question")[cut])
    counts = (standing, 30) if cut else (30, standing)
    assert error.message.startswith("question and context have {} and {} tokens; ".format(*counts))
    assert "must then fit in 12" in error.message
    assert "truncate" not in error.message and "window" not in error.message  # neither would help


def test_where_either_may_be_cut_truncation_is_advised(written: Dict[str, Written]) -> None:
    error = refusal(written["bert"].open(16), words(30), words(7))
    assert isinstance(error, InputTooLong) and error.field == "text_pair"
    assert "must then fit in 6" in error.message
    assert '"long_inputs": "truncate"' in error.message
    assert len(encode(written["bert"].open(16), words(30), words(7), "truncate").rows) == 1


@pytest.mark.parametrize("cut", [None, 0, 1])
@pytest.mark.parametrize(("limit", "here"), [(None, False), (16, False), (40, False), (12, True)])
def test_what_is_rejected_is_the_segment_that_is_cut(
    written: Dict[str, Written], cut: Optional[int], limit: Optional[int], here: bool
) -> None:
    error = refusal(written["bert"].open(16), words(9), words(8), "reject", cut=cut, limit=limit)
    assert isinstance(error, InputTooLong)
    assert (error.status, error.field) == (413, ("text", "text_pair")[cut or 0])
    assert "text and text_pair have 9 and 8 tokens, 20 with special ones; " in error.message
    assert f"; this model reads {12 if here else 16}" in error.message
    assert ("here;" in error.message) is here


@pytest.mark.parametrize("cut", [0, 1])
def test_special_tokens_that_fill_a_row_are_told(written: Dict[str, Written], cut: int) -> None:
    error = refusal(written["bert"].open(16), words(9), words(8), limit=3, cut=cut)
    assert isinstance(error, InputTooLong)
    assert (error.status, error.field) == (413, ("text", "text_pair")[cut])
    assert "this model reads 3 tokens, which special ones fill alone" in error.message


@pytest.mark.parametrize("windows", [True, False])
def test_windows_are_advised_only_where_they_can_be_had(written: Dict[str, Written], windows: bool) -> None:
    tokenizer = written["bert"].open(16, 10, windows=windows)
    rejected = [
        refusal(tokenizer, LONG, how="reject"),
        refusal(tokenizer, LONG, how="reject", limit=10),
        refusal(tokenizer, LONG, words(6), "reject"),
        refusal(tokenizer, LONG, words(12), "reject", cut=0),
        refusal(tokenizer, words(12), LONG, "reject", cut=1),
    ]
    for error in rejected:
        assert error.message.endswith('"long_inputs": "truncate"}' + (' or "window"' if windows else ""))
    others = [
        refusal(tokenizer, words(20_000), how="truncate"),
        refusal(tokenizer, LONG, how="truncate", limit=2),
        *(refusal(tokenizer, LONG, LONG, "truncate", cut=cut) for cut in (0, 1)),
    ]
    assert not any("window" in error.message for error in others)


@pytest.mark.parametrize(
    ("segments", "cut", "helps"),
    [
        ((words(12), words(12)), None, {"truncate"}),
        ((words(30), words(13)), 0, set()),
        ((words(13), words(30)), 1, set()),
        ((words(13), words(2)), 1, set()),
    ],
)
def test_only_ways_that_help_are_advised(
    written: Dict[str, Written], segments: Tuple[str, str], cut: Optional[int], helps: Set[str]
) -> None:
    tokenizer = written["bert"].open(16)
    rejected = refusal(tokenizer, *segments, "reject", cut=cut)
    for how in ("truncate", "window"):
        [answer] = tokenizer.encode([Segments(*segments, cut=cut)], [how])
        assert isinstance(answer, Encoded) == (how in helps) == (f'"{how}"' in rejected.message)


def test_the_limit_on_windows(written: Dict[str, Written]) -> None:
    tokenizer = written["bert"].open(max_length=12, max_rows=3)
    assert len(encode(tokenizer, words(30)).rows) == 3
    error = refusal(tokenizer, words(31))
    assert isinstance(error, InputTooLong)
    assert (error.status, error.field) == (413, "text")
    assert "31 tokens" in error.message and "4 windows" in error.message
    assert refusal(tokenizer, ".", words(31)).field == "text_pair"
    assert len(encode(tokenizer, words(31), how="truncate").rows) == 1


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("special", [True, False])
@given(text=texts, pair=st.none() | texts)
@settings(deadline=None, max_examples=25, database=None)
def test_long_texts_are_tokenized_as_short_ones(
    written: Dict[str, Written], kind: str, special: bool, text: str, pair: Optional[str]
) -> None:
    """Once, without special tokens, which are added if everything fits in one row."""
    tokenizer = written[kind].open(max_length=400)
    segments = Segments(text, pair, special=special)
    (short,) = tokenizer.encode([segments], ["window"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("traceserve_runtime.texts.tokenization._CHARACTERS_OF_PROSE", -1)
        long, again = tokenizer.encode([segments, segments], ["window"] * 2)
    if isinstance(short, TraceserveError):
        assert isinstance(long, TraceserveError) and str(long) == str(short)
        return
    assert isinstance(long, Encoded) and isinstance(again, Encoded)
    for other in (long, again):
        assert columns([row.encoding for row in other.rows]) == columns([row.encoding for row in short.rows])
        assert [row.positions(n) for row in other.rows for n in (0, 1)] == [
            row.positions(n) for row in short.rows for n in (0, 1)
        ]
        fields = [(row.length, row.tokens, row.first, row.start) for row in other.rows]
        assert fields == [(row.length, row.tokens, row.first, row.start) for row in short.rows]
        masks = [row.encoding.special_tokens_mask for row in other.rows]
        assert masks == [row.encoding.special_tokens_mask for row in short.rows]
        assert [r.encoding.word_ids for r in other.rows] == [r.encoding.word_ids for r in short.rows]


@pytest.mark.parametrize("how", ["window", "truncate", "reject"])
def test_the_limit_on_characters(written: Dict[str, Written], how: str) -> None:
    tokenizer = written["bert"].open(max_length=12, max_rows=3)
    most = 12 * 64 * 8  # of 64 full rows, or of a quarter of max_rows if that is more
    encode(tokenizer, " " * most, how=how)
    error = refusal(tokenizer, " " * (most + 1), how=how)
    assert isinstance(error, InputTooLong)
    assert error.field == "text" and f"{most + 1:,} characters" in error.message
    assert refusal(tokenizer, "", " " * (most + 1), how=how).field == "text_pair"


def test_what_is_refused_for_its_characters_leaves_the_others_in_place(written: Dict[str, Written]) -> None:
    huge = " " * 100_000
    texts = ["Yes.", huge, "No.", huge, ""]
    answers = written["bert"].open(12, 3).encode([Segments(text) for text in texts], ["window"] * 5)
    assert [isinstance(answer, Encoded) for answer in answers] == [True, False, True, False, True]
    for text, answer in zip(texts, answers):
        if isinstance(answer, Encoded):
            assert answer.rows[0].encoding.ids == written["bert"].own.encode(text).ids


@pytest.mark.parametrize(
    ("kind", "pair", "refused"), [("gpt", None, True), ("gpt", "", True), ("gpt", "a", False), ("bert", None, False)]
)
def test_a_text_without_tokens_is_refused(
    written: Dict[str, Written], kind: str, pair: Optional[str], refused: bool
) -> None:
    (answer,) = written[kind].open().encode([Segments("", pair)], ["window"])
    expected: Type[Any] = InvalidRequest if refused else Encoded
    assert isinstance(answer, expected)
    if isinstance(answer, InvalidRequest):
        assert (answer.status, answer.field) == (400, "text")


def test_no_request_has_no_rows(written: Dict[str, Written]) -> None:
    assert written["bert"].open().encode([], []) == []


def decoding(folder: Path, kind: str) -> Written:
    """A tokenizer of this kind; "wordpiece" is BERT's with its decoder, which the tiny one lacks."""
    if kind != "wordpiece":
        return write_tokenizer(kind, folder)
    own = write_tokenizer("bert", folder).own
    own.decoder = decoders.WordPiece(cleanup=False)
    own.save(str(folder / "tokenizer.json"))
    return Written(folder, own)


@pytest.fixture(scope="module", params=["bert", "wordpiece", "roberta", "gpt"])
def decoded(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A tokenizer of each kind of decoder, or without one."""
    return decoding(tmp_path_factory.mktemp("decoding"), request.param)


@quick
@given(
    ids=st.lists(st.integers(0, 250), max_size=20) | texts | st.just("it is n't , so : I 'm ' re ' s ! ?"),
    skip=st.booleans(),
    cleans=st.booleans(),
)
def test_decoding_is_that_of_transformers(decoded: Written, ids: Any, skip: bool, cleans: bool) -> None:
    if isinstance(ids, str):
        ids = decoded.own.encode(ids).ids
    own, hugging = decoded.open(clean_up=cleans), decoded.hugging()
    raw = hugging.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    cleaned = hugging.clean_up_tokenization(raw)
    assert own.decode(ids, skip) == (cleaned if cleans else raw)
    assert own.decode(ids, skip, raw=True) == raw
    if own.marks_subwords:  # transformers cleans up after no others, whatever the setting
        assert cleaned == hugging.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=True)


@quick
@given(ids=st.lists(st.integers(0, 250), max_size=20), cleans=st.booleans())
def test_joining_is_that_of_transformers(decoded: Written, ids: List[int], cleans: bool) -> None:
    tokens = [decoded.own.id_to_token(i) or "" for i in ids]
    assert decoded.open(clean_up=cleans).join(tokens) == decoded.hugging().convert_tokens_to_string(tokens)


@quick
@given(text=st.lists(st.sampled_from([*" .?!,'abn", "n't", "'m", "'s", "'ve", "'re", " '", "n '"])).map("".join))
@example(text="I 'm here , are n't you ? They 've 's 're done . ' so '")
def test_cleaning_up_is_that_of_transformers(written: Dict[str, Written], text: str) -> None:
    assert clean_up(text) == written["bert"].hugging().clean_up_tokenization(text)


@quick
@given(kind=st.sampled_from(ALL_KINDS), text=texts | st.text(max_size=20))
def test_the_ids_of_a_text_by_itself(written: Dict[str, Written], kind: str, text: str) -> None:
    expected = written[kind].hugging()(text, add_special_tokens=False)["input_ids"]
    assert written[kind].open().token_ids(text) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_has_an_id(written: Dict[str, Written], kind: str) -> None:
    tokenizer, hugging = written[kind].open(), written[kind].hugging()
    assert tokenizer.vocabulary_size == len(hugging) > 200
    for token, token_id in hugging.get_vocab().items():
        assert tokenizer.token_id(token) == token_id
        assert tokenizer.token(token_id) == token
    assert tokenizer.token_id("no token at all") is None


def test_added_tokens_count(written: Dict[str, Written], tmp_path: Path) -> None:
    own = Tokenizer.from_str(written["bert"].own.to_str())
    own.add_special_tokens(["[NEW]"])
    own.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Written(tmp_path, own).open()
    assert tokenizer.vocabulary_size == written["bert"].open().vocabulary_size + 1
    assert tokenizer.token_id("[NEW]") == tokenizer.vocabulary_size - 1


@pytest.mark.parametrize(("kind", "marks"), [("bert", True), ("roberta", False), ("gpt", False), ("t5", False)])
def test_wordpiece_marks_what_continues_a_word(written: Dict[str, Written], kind: str, marks: bool) -> None:
    assert written[kind].open().marks_subwords is marks


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_own_padding_and_truncation_are_ignored(
    written: Dict[str, Written], kind: str, tmp_path: Path
) -> None:
    marked = Tokenizer.from_str(written[kind].own.to_str())
    marked.enable_padding(length=50)
    marked.enable_truncation(6, stride=2)
    marked.save(str(tmp_path / "tokenizer.json"))
    own = written[kind].own.encode(LONG).ids
    (row,) = encode(Written(tmp_path, marked).open(max_length=500), LONG).rows
    assert row.encoding.ids == own
    (row,) = encode(Written(tmp_path, marked).open(max_length=20), "Yes.").rows
    assert row.encoding.ids == written[kind].own.encode("Yes.").ids
    marked_rows = encode(Written(tmp_path, marked).open(max_length=20), LONG).rows
    plain_rows = encode(written[kind].open(max_length=20), LONG).rows
    assert [row.encoding.ids for row in marked_rows] == [row.encoding.ids for row in plain_rows]


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"not json", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "Unknown"}}']
)
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path, content: Optional[bytes]) -> None:
    if content is not None:
        (tmp_path / "words.json").write_bytes(content)
    with pytest.raises(InvalidManifest, match="words.json cannot be read by the tokenizers package"):
        TextTokenizer(tmp_path, TokenizerFacts("words.json", 0, 0, "right", "right"), 16, 4)
