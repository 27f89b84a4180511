"""Windows of a long text: they cover it, know their position in it, and merge into the equivalent of one row."""

from __future__ import annotations

import math
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_tokenization import ALL_KINDS, LONG, Written, encode, refusal, texts, words, write_tokenizer
from tokenizers import Encoding
from traceserve_runtime.texts.rows import Encoded, Row, Segments
from traceserve_runtime.texts.windows import TokenPosition, merge_windows

quick = settings(deadline=None, max_examples=100, database=None)

# Their post-processors trim spaces off a token's offsets, but not off a row's first one.
TRIMMING = ("roberta", "gpt2", "llama")
kinds = st.sampled_from(ALL_KINDS)
# Any Unicode, and enough of it for several windows; natural text; and natural text in ASCII.
any_text = st.text(max_size=80) | st.lists(st.text(max_size=6), max_size=30).map(" ".join) | texts
ascii_text = st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("\t\n"), max_size=120)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Written]:
    """A folder for each kind of tokenizer."""
    return {kind: write_tokenizer(kind, tmp_path_factory.mktemp(kind)) for kind in ALL_KINDS}


def bare(written: Written, text: str) -> Encoding:
    """Return a text's tokens alone."""
    return written.own.encode(text, add_special_tokens=False)


# Cutting.


@quick
@given(
    kind=kinds,
    text=any_text,
    max_length=st.integers(4, 24),
    stride=st.integers(0, 24),
    full=st.booleans(),
)
@example(kind="bert", text=LONG, max_length=24, stride=6, full=False)
@example(kind="roberta", text=LONG, max_length=4, stride=1, full=False)
def test_windows_cover_every_token_of_any_text(
    written: Dict[str, Written], kind: str, text: str, max_length: int, stride: int, full: bool
) -> None:
    whole = bare(written[kind], text)
    special = written[kind].own.num_special_tokens_to_add(False)
    assume(len(whole) + special)
    rows = encode(written[kind].open(max_length), text, stride=stride, full=full).rows
    check_cover(rows, whole, max_length, special, stride, full, segment=0)


@quick
@given(
    kind=kinds,
    long=any_text,
    short=st.text(max_size=5) | st.sampled_from(["Yes, at nine.", "?"]),
    room=st.integers(1, 24),
    stride=st.integers(0, 24),
    full=st.booleans(),
    cut=st.integers(0, 1),
)
@example(kind="bert", long=LONG, short="Yes, at nine.", room=20, stride=6, full=False, cut=1)
@example(kind="roberta", long=LONG, short="?", room=1, stride=6, full=False, cut=0)
def test_windows_cover_every_token_of_one_of_two_texts(
    written: Dict[str, Written], kind: str, long: str, short: str, room: int, stride: int, full: bool, cut: int
) -> None:
    pair = (short, long) if cut else (long, short)
    whole, standing = bare(written[kind], long), bare(written[kind], short)
    special = written[kind].own.num_special_tokens_to_add(bool(pair[1]))
    assume(len(whole) + len(standing) + special)
    assume(pair[1] or not cut)
    max_length = room + len(standing) + special
    rows = encode(written[kind].open(max_length), *pair, cut=cut, stride=stride, full=full).rows
    check_cover(rows, whole, max_length, special + len(standing), stride, full, segment=cut)
    for row in rows:
        assert [row.encoding.ids[place] for place in row.positions(1 - cut)] == standing.ids


def check_cover(
    rows: List[Row], whole: Encoding, max_length: int, others: int, stride: int, full: bool, segment: int
) -> None:
    """As many windows as needed; each has the tokens from its start on, and `others` beside them."""
    room = max_length - others
    shared = stride if stride < room else room // 2
    windows = [row.positions(segment) for row in rows]
    sizes = [len(places) for places in windows]
    for row, places in zip(rows, windows):
        ids = [row.encoding.ids[place] for place in places]
        assert ids == whole.ids[row.start : row.start + len(places)]
        assert row.length == len(row.encoding.ids) == len(places) + others <= max_length
    assert rows[0].start == 0 and rows[-1].start + sizes[-1] == len(whole)
    assert len(rows) == max(1, math.ceil((len(whole) - shared) / (room - shared)))
    if len(rows) == 1:
        return
    for before, row, size in zip(rows, rows[1:], sizes):
        assert before.start + size - row.start == shared
    assert len(set(sizes[:-1])) == 1 and shared < sizes[-1] <= sizes[0]
    if full:
        assert sizes[0] == room
    else:  # shorter ones would be more
        assert len(whole) - shared > len(rows) * (sizes[0] - 1 - shared)


@pytest.mark.parametrize(
    ("tokens", "stride", "full", "expected"),
    [
        (14, 4, False, [(0, 14)]),
        (15, 0, False, [(0, 8), (8, 7)]),
        (15, 4, False, [(0, 10), (6, 9)]),
        (24, 4, False, [(0, 14), (10, 14)]),
        (25, 4, False, [(0, 11), (7, 11), (14, 11)]),
        (25, 4, True, [(0, 14), (10, 14), (20, 5)]),
        (25, 0, True, [(0, 14), (14, 11)]),
        (30, 99, False, [(0, 13), (6, 13), (12, 13), (18, 12)]),
    ],
)
def test_windows_by_hand(
    written: Dict[str, Written], tokens: int, stride: int, full: bool, expected: List[Tuple[int, int]]
) -> None:
    """Two of a row's 16 tokens are special; the windows' starts and sizes."""
    rows = encode(written["bert"].open(16), words(tokens), stride=stride, full=full).rows
    assert [(row.start, row.tokens) for row in rows] == expected


def test_overlapping_windows_count_to_the_limit(written: Dict[str, Written]) -> None:
    tokenizer = written["bert"].open(16, max_rows=3)
    assert len(encode(tokenizer, words(34), stride=4).rows) == 3
    assert "4 windows" in refusal(tokenizer, words(35), stride=4).message
    assert len(encode(tokenizer, words(35)).rows) == 3


# Offsets.


@quick
@given(
    kind=kinds,
    text=any_text,
    pair=st.none() | any_text,
    max_length=st.integers(8, 40),
    stride=st.integers(0, 8),
    how=st.sampled_from(["window", "truncate"]),
)
def test_offsets_lie_in_their_text_in_order(
    written: Dict[str, Written],
    kind: str,
    text: str,
    pair: Optional[str],
    max_length: int,
    stride: int,
    how: str,
) -> None:
    (encoded,) = written[kind].open(max_length).encode([Segments(text, pair, stride=stride)], [how])
    assume(isinstance(encoded, Encoded))
    for row in getattr(encoded, "rows", ()):
        for segment, content in enumerate((text, pair or "")):
            spans = [row.encoding.offsets[place] for place in row.positions(segment)]
            assert all(0 <= start <= end <= len(content) for start, end in spans)
            assert spans == sorted(spans)
            assert [end for _, end in spans] == sorted(end for _, end in spans)


@quick
@given(text=ascii_text, stride=st.integers(0, 6))
@example(text="Love it!! [best] (purchase) of the-year: a_b ##x", stride=2)
def test_offsets_say_what_a_token_of_wordpiece_says(written: Dict[str, Written], text: str, stride: int) -> None:
    rows = encode(written["bert"].open(12), text, stride=stride).rows
    for row in rows:
        for place in row.positions():
            token, (start, end) = row.encoding.tokens[place], row.encoding.offsets[place]
            piece = token[2:] if token.startswith("##") and len(token) > 2 else token
            assert token == "[UNK]" or piece.lower() == text[start:end].lower()


@quick
@given(kind=st.sampled_from(["roberta", "gpt", "gpt2", "llama", "t5"]), text=ascii_text, stride=st.integers(0, 6))
@example(kind="roberta", text=LONG, stride=2)
@example(kind="gpt2", text="  two  spaces  ", stride=2)
def test_offsets_say_what_a_token_of_bytes_says(written: Dict[str, Written], kind: str, text: str, stride: int) -> None:
    assume(len(bare(written[kind], text)))
    rows = encode(written[kind].open(12), text, stride=stride).rows
    for row in rows:
        for place in row.positions():
            token, (start, end) = row.encoding.tokens[place], row.encoding.offsets[place]
            says = token.replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t")
            if kind in TRIMMING:
                assert text[start:end].strip() == says.strip()
            else:
                assert text[start:end] == says


# Merging.


def merged(rows: List[Row], places: List[TokenPosition]) -> List[Any]:
    return [(rows[w].encoding.ids[i], rows[w].encoding.offsets[i], special) for w, i, special in places]


@quick
@given(
    kind=kinds,
    text=any_text,
    max_length=st.integers(5, 24),
    stride=st.integers(0, 24),
    full=st.booleans(),
)
@example(kind="bert", text=LONG, max_length=16, stride=4, full=False)
@example(kind="bert", text=LONG, max_length=16, stride=13, full=True)
@example(kind="roberta", text=LONG, max_length=5, stride=1, full=False)
@example(kind="roberta", text=LONG, max_length=24, stride=6, full=True)
@example(kind="bert", text="", max_length=5, stride=1, full=False)
def test_merged_windows_are_the_text_tokenized_whole(
    written: Dict[str, Written], kind: str, text: str, max_length: int, stride: int, full: bool
) -> None:
    whole = written[kind].own.encode(text)
    assume(len(whole))
    rows = encode(written[kind].open(max_length), text, stride=stride, full=full).rows
    got = merged(rows, merge_windows(rows))
    expected: List[Any] = list(zip(whole.ids, whole.offsets, map(bool, whole.special_tokens_mask)))
    if stride == 0 and kind in TRIMMING:
        # Nothing is shared, so each window's first token comes from that window, and may keep its space.
        got, expected = ([(i, special) for i, _, special in tokens] for tokens in (got, expected))
    assert got == expected


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("max_length", range(4, 20))
def test_merged_windows_of_a_quarter_each(written: Dict[str, Written], kind: str, max_length: int) -> None:
    """As in the token-labelling tasks, down to the shortest configurable rows."""
    whole = written[kind].own.encode(LONG)
    rows = encode(written[kind].open(max_length), LONG, stride=max_length // 4).rows
    assert len(rows) > 3
    assert merged(rows, merge_windows(rows)) == list(
        zip(whole.ids, whole.offsets, map(bool, whole.special_tokens_mask))
    )


class Placed(NamedTuple):
    """A token's window, and the number of text tokens before and after it there."""

    window: int
    before: int
    behind: int


@quick
@given(
    text=st.integers(10, 120).map(words),
    max_length=st.integers(4, 24),
    stride=st.integers(0, 24),
    full=st.booleans(),
)
@example(text=words(40), max_length=16, stride=4, full=False)
@example(text=words(40), max_length=16, stride=5, full=False)
@example(text=words(40), max_length=16, stride=13, full=True)
def test_a_shared_token_is_taken_from_where_it_has_more_neighbours(
    written: Dict[str, Written], text: str, max_length: int, stride: int, full: bool
) -> None:
    rows = encode(written["bert"].open(max_length), text, stride=stride, full=full).rows
    places = [place for place in merge_windows(rows) if not place.special]
    size = rows[0].tokens
    for token, place in enumerate(places):
        # The last window may be short: its text ends there, and no neighbour is missing.
        held = [
            Placed(number, token - row.start, row.start + size - 1 - token)
            for number, row in enumerate(rows)
            if row.start <= token < row.start + row.tokens
        ]
        best = max(min(one.before, one.behind) for one in held)
        (taken,) = [one for one in held if one.window == place.window]
        assert min(taken.before, taken.behind) == best
        assert rows[place.window].positions()[taken.before] == place.position


@pytest.mark.parametrize(("stride", "windows"), [(0, [7, 7]), (2, [7, 7]), (3, [8, 7]), (4, [7, 7]), (5, [8, 7])])
def test_merging_by_hand(written: Dict[str, Written], stride: int, windows: List[int]) -> None:
    """The number of tokens from each of two windows: half of the shared ones."""
    tokens = sum(windows)
    tokenizer = written["bert"].open(2 + math.ceil((tokens + stride) / 2))
    rows = encode(tokenizer, words(tokens), stride=stride).rows
    assert len(rows) == 2
    places = merge_windows(rows)
    assert places[0] == (0, 0, True) and places[-1] == (1, rows[1].length - 1, True)
    assert [sum(place.window == number for place in places[1:-1]) for number in (0, 1)] == windows
    assert not any(place.special for place in places[1:-1])


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_one_row_is_itself(written: Dict[str, Written], kind: str) -> None:
    (row,) = encode(written[kind].open(64), "The train leaves.").rows
    mask = row.encoding.special_tokens_mask
    assert merge_windows([row]) == [(0, i, bool(special)) for i, special in enumerate(mask)]


def test_a_text_without_tokens_is_its_special_ones(written: Dict[str, Written]) -> None:
    (row,) = encode(written["bert"].open(64), "").rows
    assert merge_windows([row]) == [(0, 0, True), (0, 1, True)]
