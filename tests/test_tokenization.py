"""Text to rows: windows lose nothing, truncation is the tokenizers package's own, and what is cut is named."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Type

import models
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from traceserve_runtime.errors import InputTooLong, InvalidManifest, InvalidRequest, TraceserveError
from traceserve_runtime.manifest import TokenizerFacts
from traceserve_runtime.tokenization import Encoded, Row, Segments, TextTokenizer, longest_first

quick = settings(deadline=None, max_examples=50, database=None)

KINDS = ["bert", "roberta", "gpt"]
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

    def open(self, max_length: int = 16, max_rows: int = 1000, side: str = "right") -> TextTokenizer:
        facts = TokenizerFacts("tokenizer.json", 0, 0, "right", side)
        return TextTokenizer(self.folder, facts, max_length, max_rows)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Written]:
    """A folder for each kind of tokenizer."""
    folders = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        content = models.make_tokenizer(kind).backend_tokenizer.to_str()
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        own = Tokenizer.from_str(content)
        own.no_padding()
        own.no_truncation()
        folders[kind] = Written(folder, own)
    return folders


def encode(tokenizer: TextTokenizer, text: str, pair: Optional[str] = None, how: str = "window") -> Encoded:
    """The rows of one text, or of a pair."""
    (encoded,) = tokenizer.encode([Segments(text, pair)], [how])
    assert isinstance(encoded, Encoded), encoded
    return encoded


def refusal(tokenizer: TextTokenizer, text: str, pair: Optional[str] = None, how: str = "window") -> TraceserveError:
    """Why a text, or a pair, has no rows."""
    (error,) = tokenizer.encode([Segments(text, pair)], [how])
    assert isinstance(error, TraceserveError)
    return error


def own_tokens(row: Row) -> List[Tuple[int, Tuple[int, int], int]]:
    """The id, offsets and type of each token of a row, but the special ones around and between its segments.

    Not by `sequence_ids`: the tokenizers package loses those of the first segment when it templates a window of a pair.
    """
    encoding = row.encoding
    rows = zip(encoding.ids, encoding.offsets, encoding.type_ids, encoding.tokens)
    typed = "[CLS]" in encoding.tokens  # only the models of such tokenizers read types
    special = ("[CLS]", "[SEP]", "<s>", "</s>")
    return [(i, offsets, kind if typed else 0) for i, offsets, kind, token in rows if token not in special]


def ids_of(row: Row) -> List[int]:
    return [i for i, _, _ in own_tokens(row)]


def words(tokens: int) -> str:
    """A text of so many tokens: for each kind of tokenizer a full stop in a row of them is one each."""
    return " ".join(["."] * tokens)


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
            row[at] = whole[position] = (row[at][0], None, row[at][2]) if row[at][0] == whole[position][0] else row[at]
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


# Tokens of a text, and the room of a row beside its two special tokens.
@pytest.mark.parametrize(
    ("tokens", "room"),
    [(31, 30), (59, 30), (60, 30), (61, 30), (91, 30), (300, 30), (301, 30), (501, 500)],
)
def test_windows_are_of_nearly_equal_size(written: Dict[str, Written], tokens: int, room: int) -> None:
    sizes = [row.tokens for row in encode(written["bert"].open(room + 2), words(tokens)).rows]
    assert sum(sizes) == tokens
    assert len(sizes) == math.ceil(tokens / room)
    assert 2 * min(sizes) >= max(sizes)  # else a few tokens would be judged without their neighbours


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
def test_truncation_is_the_packages_own(
    written: Dict[str, Written], kind: str, text: str, pair: Optional[str], max_length: int, side: str
) -> None:
    reference = Tokenizer.from_str(written[kind].own.to_str())
    reference.enable_truncation(max_length, strategy="longest_first", direction=side)
    (row,) = encode(written[kind].open(max_length, side=side), text, pair, "truncate").rows
    expected = reference.encode(text, pair)
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
        assert mine == whole or mine >= other - 1  # what was cut is not shorter than the other


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
        # A byte-level token has the space before its word; trimmed offsets leave it out, the unseen characters do not.
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
    count = len(written["bert"].own.encode(LONG, pair).ids)
    assert isinstance(error, InputTooLong)
    assert (error.status, error.field) == (413, "text")
    assert f"{count:,} tokens" in error.message and "16" in error.message


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
    assert error.field == "text"  # the shorter one, which has to fit


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
    """setup_config.json allows a max_length of 4, which is as many special tokens as a pair of RoBERTa has."""
    (answer,) = written[kind].open(4).encode([Segments(words(9), pair)], [how])
    if isinstance(answer, Encoded):
        assert all(row.length <= 4 for row in answer.rows)
    else:
        assert isinstance(answer, InputTooLong)


def test_the_limit_on_windows(written: Dict[str, Written]) -> None:
    tokenizer = written["bert"].open(max_length=12, max_rows=3)
    assert len(encode(tokenizer, words(30)).rows) == 3
    error = refusal(tokenizer, words(31))
    assert isinstance(error, InputTooLong)
    assert (error.status, error.field) == (413, "text")
    assert "31 tokens" in error.message and "4 windows" in error.message
    assert refusal(tokenizer, ".", words(31)).field == "text_pair"
    assert len(encode(tokenizer, words(31), how="truncate").rows) == 1


@pytest.mark.parametrize("how", ["window", "truncate", "reject"])
def test_the_limit_on_characters(written: Dict[str, Written], how: str) -> None:
    tokenizer = written["bert"].open(max_length=12, max_rows=3)
    most = 3 * 12 * 32
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
