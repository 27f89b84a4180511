"""Turns texts into rows of token ids, and longer texts into windows.

All tokenizer facts are in `tokenizer.json` and the tokenizers package. The file's own padding
and truncation are disabled: the caller does both.
"""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, List, Optional, Sequence, Set, Tuple, Union

from tokenizers import Encoding, Tokenizer
from tokenizers.processors import ByteLevel

from traceserve_runtime.errors import InputTooLong, InvalidManifest, InvalidRequest, TraceserveError
from traceserve_runtime.manifest import TokenizerFacts
from traceserve_runtime.texts import probing
from traceserve_runtime.texts.limits import RequestLimits
from traceserve_runtime.texts.pieces import PieceTokenizer, without_overflow
from traceserve_runtime.texts.probing import Sized
from traceserve_runtime.texts.rows import Encoded, Row, Segments

if TYPE_CHECKING:
    from tokenizers.decoders import Decoder

LONG_INPUTS = ("window", "truncate", "reject")
_SPACES_TO_CLEAN = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_TOKEN_IDS = 2**32  # that the tokenizers package takes
_CHARACTERS_OF_PROSE = 4  # per token
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # sentencepiece's, of a character that it does not know
_LOCAL_FOR_ANY_TOKENS = (("ByteLevel",), ("Metaspace",), ("WordPiece",))
_LOCAL_DECODERS = (
    ("ByteLevel",),
    ("Metaspace",),
    ("Replace", "ByteFallback", "Fuse"),
    ("Replace", "ByteFallback", "Fuse", "Strip"),
)

Bare = Tuple[Encoding, Optional[Encoding]]  # a text and its pair, without special tokens


class TextTokenizer:
    """Turns segments into rows of at most `max_length` tokens, at most `max_rows` per request."""

    def __init__(
        self, folder: Path, facts: TokenizerFacts, max_length: int, max_rows: int, windows: bool = True
    ) -> None:
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(folder / facts.file))
            if facts.pieces is not None:
                self._tokenizer = PieceTokenizer(self._tokenizer, folder / facts.pieces)
        except Exception as error:  # tokenizers raises plain Exception for a file that it cannot read
            raise InvalidManifest(f"{facts.file} cannot be read by the tokenizers package: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if facts.splits_special:
            _split_special(self._tokenizer)
        self._infilling = facts.infilling
        self._side = facts.truncation_side
        self._clean_up = facts.clean_up
        # Whether a token's text depends on the tokens beside it alone; False where that is not known.
        decoder = _names_of(self._tokenizer.decoder)
        self.decodes_locally = not facts.clean_up and decoder in _LOCAL_DECODERS
        # The same before the clean-up; and for any tokens: not of bytes that spoil those beside them.
        self.decodes_words_locally = decoder in _LOCAL_FOR_ANY_TOKENS
        self.spells_locally = self.decodes_words_locally or decoder in _LOCAL_DECODERS
        self._reads_bytes = not decoder or "ByteFallback" in decoder
        self._embeddings = facts.embeddings
        self._types = facts.types
        self._max_length = max_length
        self._max_rows = max_rows
        self.limits = RequestLimits.of(max_length, max_rows)
        self._windows = windows  # whether to suggest windows
        self._special_tokens = [self._tokenizer.num_special_tokens_to_add(is_pair) for is_pair in (False, True)]

    def encode(self, requests: Sequence[Segments], long_inputs: Sequence[str]) -> List[Union[Encoded, TraceserveError]]:
        """Return an Encoded, or the error, for each request; `long_inputs` says how each is shortened."""
        # Like transformers, an empty pair counts as none.
        requests = [request if request.pair else request._replace(pair=None, cut=None) for request in requests]
        answers: List[Union[Encoded, TraceserveError, None]] = [self._refuse(request) for request in requests]
        accepted = [i for i, answer in enumerate(answers) if answer is None]
        # Those to be shortened are tokenized once, without special tokens; most of the others are whole rows already.
        long = {i for i in accepted if self._is_long(requests[i])}
        for special in (True, False):
            short = [i for i in accepted if i not in long and requests[i].special == special]
            texts = [requests[i].text if requests[i].pair is None else requests[i][:2] for i in short]
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=special) if texts else []
            for i, encoding in zip(short, encodings):
                answers[i] = self._checked(requests[i], partial(self._whole, encoding=encoding, how=long_inputs[i]))
        for i, bare in zip(sorted(long), self._encode_bare([requests[i] for i in sorted(long)])):
            answers[i] = self._checked(requests[i], partial(self._parted, bare=bare, how=long_inputs[i]))
        return answers  # type: ignore[return-value]  # every None was replaced above

    def _checked(self, segments: Segments, act: Callable[[Segments], Encoded]) -> Union[Encoded, TraceserveError]:
        """Return the rows that `act` makes of the segments if the model has all their tokens, or why there are none."""
        try:
            encoded = act(segments)
            if self._embeddings is not None:
                _check_known(encoded.rows, segments, self._embeddings)
            if self._types is not None:
                _check_types(encoded.rows, segments, self._types)
            return encoded
        except TraceserveError as error:
            return error.with_traceback(None)  # its frames hold the refused text's tokens

    def surely_more(self, segments: Sequence[Tuple[Segments, str]]) -> bool:
        """Return whether these, each with how it is shortened, surely exceed the tokens of one HTTP request; see
        `probing`."""
        texts = [
            Sized(text, self._limit(each) if how == "truncate" else math.inf)
            for each, how in segments
            for text in each[:2]
            if text
        ]
        return probing.worth_it(sum(len(each.text) for each in texts), self.limits.tokens) and probing.surely_more(
            texts, self.limits.tokens, self._count
        )

    def _count(self, texts: Sequence[str]) -> List[int]:
        kind = type(self._tokenizer)
        encode = getattr(kind, "encode_batch_fast", kind.encode_batch)  # since 0.20; finds no offsets
        return [len(encoding) for encoding in encode(self._tokenizer, list(texts), add_special_tokens=False)]

    def token_ids(self, text: str) -> List[int]:
        """Return the ids of a text alone, without special tokens."""
        ids: List[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def token_id(self, token: str) -> Optional[int]:
        """Return the id of one token, None if it is not in the vocabulary."""
        known: Optional[int] = self._tokenizer.token_to_id(token)
        return known

    def has_token(self, token_id: int) -> bool:
        """Return whether the tokenizer and the model have a token; decoding leaves out others."""
        if self._embeddings is not None and token_id >= self._embeddings:
            return False
        return 0 <= token_id < _TOKEN_IDS and self._tokenizer.id_to_token(token_id) is not None

    def special_of(self, ids: Iterable[int]) -> Set[int]:
        """Return those of the tokens that are special. Others may have no text by themselves either, as a lone space."""
        own = list(ids)
        whole, left = (self.decode_each([[number] for number in own], skip) for skip in (False, True))
        return {number for number, text, kept in zip(own, whole, left) if text and not kept}

    def ends_in_bytes(self, ids: Sequence[int]) -> bool:
        """Return whether the last token that is not special is one byte of a character, and decoding reads all bytes that
        stand together at once: another one that is wrong leaves none of their text."""
        if not self._reads_bytes:
            return False
        last = next((number for number in reversed(ids) if not self.special_of([number])), None)
        return last is not None and _BYTE.fullmatch(self.token(last)) is not None

    def token(self, token_id: int) -> str:
        """Return the token with this id."""
        return str(self._tokenizer.id_to_token(token_id))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool, raw: bool = False) -> str:
        """Decode token ids like transformers' `decode`; `raw` skips the clean-up."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text if raw else self.cleaned(text)

    def decode_each(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool) -> List[str]:
        """Decode many sequences, without the clean-up."""
        texts: List[str] = self._tokenizer.decode_batch(list(map(list, sequences)), skip_special_tokens)
        return texts

    def cleaned(self, text: str) -> str:
        """Return a decoded text cleaned up, if transformers' tokenizer does that."""
        return clean_up(text) if self._clean_up else text

    def join(self, tokens: Sequence[str]) -> str:
        """Join tokens like transformers' `convert_tokens_to_string`."""
        decoder = self._tokenizer.decoder
        return decoder.decode(list(tokens)) if decoder is not None else " ".join(tokens)

    @property
    def marks_subwords(self) -> bool:
        """Whether tokens that continue a word have a prefix, such as WordPiece's ##."""
        return bool(getattr(self._tokenizer.model, "continuing_subword_prefix", None))

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens, including added ones."""
        size: int = self._tokenizer.get_vocab_size()
        return size

    def _whole(self, segments: Segments, encoding: Encoding, how: str) -> Encoded:
        """Make rows of segments tokenized with special tokens."""
        length = len(encoding)
        self._check_any(segments, length)
        if length > self._limit(segments):
            return self._shorten(segments, self._encode_bare([segments])[0], length, how)
        tokens = length - self._special(segments)
        first = tokens if segments.pair is None else sum(number == 0 for number in encoding.sequence_ids)
        return Encoded([Row(encoding, length, tokens, first)])

    def _parted(self, segments: Segments, bare: Bare, how: str) -> Encoded:
        """Make rows of segments tokenized separately, without special tokens."""
        length = sum(len(each) for each in bare if each is not None) + self._special(segments)
        self._check_any(segments, length)
        if length > self._limit(segments):
            return self._shorten(segments, bare, length, how)
        return Encoded([self._row(segments, *bare)])

    def _check_any(self, segments: Segments, length: int) -> None:
        if not length:  # no special tokens, and none of the text's own
            raise InvalidRequest("the text has no tokens", segments.fields[0])

    def _is_long(self, segments: Segments) -> bool:
        """Return whether the segments have more characters than a row of prose."""
        characters = len(segments.text) + (len(segments.pair) if segments.pair else 0)
        return characters > _CHARACTERS_OF_PROSE * self._limit(segments)

    def _limit(self, segments: Segments) -> int:
        return self._max_length if segments.limit is None else min(segments.limit, self._max_length)

    def _special(self, segments: Segments) -> int:
        return self._special_tokens[segments.pair is not None] if segments.special else 0

    def _refuse(self, segments: Segments) -> Optional[TraceserveError]:
        """Return why segments are not tokenized: they are too long, or have a place to fill."""
        texts = [(name, text) for name, text in zip(segments.fields, segments[:2]) if text is not None]
        refusals = (self.limits.of_text(text, name) for name, text in texts)
        huge = next((refusal for refusal in refusals if refusal is not None), None)
        if huge is not None or self._infilling is None:
            return huge
        named = next((name for name, text in texts if self._infilling in text), None)
        return None if named is None else InvalidRequest(f"{self._infilling} is not filled here; leave it out", named)

    def _shorten(self, segments: Segments, bare: Bare, length: int, how: str) -> Encoded:
        """Make rows of segments with so many tokens, special ones included, which are more than a row may have."""
        limit = self._limit(segments)
        room = limit - self._special(segments)
        if how == "reject":
            raise self._rejection(segments, bare, length, room)
        if room < 1:
            name = segments.fields[segments.cut or 0]
            message = f"this model reads {limit} tokens, which special ones fill alone"
            raise InputTooLong(message, name, exceeds_context=True)
        if not _leaves_room(segments, bare, room, how):
            raise self._no_room(segments, *bare, room)
        return (self._truncate if how == "truncate" else self._window)(segments, *bare, room)

    def _rejection(self, segments: Segments, bare: Bare, length: int, room: int) -> InputTooLong:
        """Return the error for a request that wants nothing shortened, with the ways that would help."""
        first, second = bare
        if second is None:
            have, shorten = f"the text has {length:,} tokens, special ones included", "shorten it"
        else:
            names = " and ".join(segments.fields[:2])
            have = f"{names} have {len(first):,} and {len(second):,} tokens, {length:,} with special ones"
            shorten = "shorten them"
        ways: Tuple[str, ...] = ()
        if _leaves_room(segments, bare, room, "truncate"):
            windows = self._windows and _leaves_room(segments, bare, room, "window")
            ways = ("truncate", "window") if windows else ("truncate",)
        limit = self._limit(segments)
        return InputTooLong(
            f"{have}; this model reads {limit:,}{'' if limit == self._max_length else ' here'}; {shorten}",
            segments.fields[segments.cut or 0],
            ways,
            exceeds_context=True,
        )

    def _encode_bare(self, requests: Sequence[Segments]) -> List[Bare]:
        """Encode each request's segments without special tokens or post-processing, which follow for each row.

        The post-processors of byte-level tokenizers move offsets past a leading space on every run, so the
        tokenizer's own is removed meanwhile. (An engine is for one thread.)
        """
        texts = [text for request in requests for text in request[:2] if text is not None]
        if not texts:
            return []
        own = self._tokenizer.post_processor
        if own is not None:
            self._tokenizer.post_processor = ByteLevel(trim_offsets=False)
        try:
            encodings = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        finally:
            if own is not None:
                self._tokenizer.post_processor = own
        return [(next(encodings), None if request.pair is None else next(encodings)) for request in requests]

    def _truncate(self, segments: Segments, first: Encoding, second: Optional[Encoding], room: int) -> Encoded:
        if second is None:
            kept = (room, 0)
        elif segments.cut is None:
            kept = longest_first(len(first), len(second), room)
        elif segments.cut == 0:
            kept = (room - len(second), len(second))
        else:
            kept = (len(first), room - len(first))
        unseen = {}
        cut: List[Optional[Encoding]] = [first, second]
        for i, (name, text, encoding, keep) in enumerate(zip(segments.fields, segments[:2], (first, second), kept)):
            if text is None or encoding is None or keep >= len(encoding):
                continue
            offsets = encoding.offsets
            if self._side == "right":
                unseen[name] = (offsets[keep][0], len(text))
            else:
                unseen[name] = (0, offsets[len(encoding) - keep - 1][1])
            encoding.truncate(keep, direction=self._side)
            cut[i] = encoding if second is None else without_overflow(encoding)
        return Encoded([self._row(segments, cut[0], cut[1])], unseen)

    def _window(self, segments: Segments, first: Encoding, second: Optional[Encoding], room: int) -> Encoded:
        """Make windows over one segment, by default the longer; the other is in each window."""
        cut = _cut_of(segments, (first, second))
        longer, shorter = (second, first) if cut else (first, second)
        assert longer is not None
        if shorter is not None:
            room -= len(shorter)
        # A short window advances by half, not by the token or two that a long stride would leave.
        stride = segments.stride if segments.stride < room else room // 2
        count = math.ceil(max(1, len(longer) - stride) / (room - stride))
        if count > self._max_rows:
            raise InputTooLong(
                f"the text has {len(longer):,} tokens, which are {count:,} windows of this model; one request may have "
                f"{self._max_rows:,}; split it",
                segments.fields[cut],
                ways=("truncate",),
                exceeds_context=True,
            )
        size = room if segments.full else math.ceil((len(longer) + (count - 1) * stride) / count)
        longer.truncate(size, stride=stride)
        windows = [longer] + longer.overflowing
        return Encoded(
            [
                self._row(segments, shorter if cut else window, window if cut else shorter, i * (size - stride))
                for i, window in enumerate(windows)
            ]
        )

    def _no_room(self, segments: Segments, first: Encoding, second: Optional[Encoding], room: int) -> InputTooLong:
        """Return the error for a whole segment that leaves too little room for the truncated one."""
        cut, most = _cut_of(segments, (first, second)), _most_of_the_other(segments, room)
        return InputTooLong(
            f"{segments.fields[0]} and {segments.fields[1]} have {len(first):,} and {len(second or ()):,} tokens; one of "
            f"them may be cut, but the other must then fit in {most}; shorten it",
            segments.fields[1 - cut],
            ways=("truncate",) if segments.cut is None else (),
            exceeds_context=True,
        )

    def _row(self, segments: Segments, first: Optional[Encoding], second: Optional[Encoding], start: int = 0) -> Row:
        assert first is not None
        encoding = self._tokenizer.post_process(first, second, segments.special)
        return Row(encoding, len(encoding), len(first) + (0 if second is None else len(second)), len(first), start)


def _cut_of(segments: Segments, bare: Bare) -> int:
    """Return which of the segments is shortened, by default the longer."""
    first, second = bare
    return int(second is not None and len(second) > len(first)) if segments.cut is None else segments.cut


def _most_of_the_other(segments: Segments, room: int) -> int:
    """Return how many tokens the segment that is not shortened may have."""
    return room // 2 if segments.cut is None else room - 1


def _leaves_room(segments: Segments, bare: Bare, room: int, how: str) -> bool:
    """Return whether the segments can be shortened so: where one of them stays whole, it must leave room for the other."""
    first, second = bare
    if second is None or (segments.cut is None and how == "truncate"):
        return room > 0
    other = first if _cut_of(segments, bare) else second
    return len(other) <= _most_of_the_other(segments, room)


def _check_known(rows: Sequence[Row], segments: Segments, embeddings: int) -> None:
    """Refuse a text with a token that is in the tokenizer but not in the model, which would end its run."""
    for row in rows:
        if max(row.encoding.ids) < embeddings:
            continue
        position = next(i for i, token_id in enumerate(row.encoding.ids) if token_id >= embeddings)
        start, end = row.encoding.offsets[position]
        raise InvalidRequest(
            f"token {position + 1} of the text (characters {start:,} to {end:,}) was added to the tokenizer, but not to the "
            f"model: its number is {row.encoding.ids[position]:,}, and the model knows those below {embeddings:,}; leave it out",
            segments.fields[position not in row.positions()],
        )


def _check_types(rows: Sequence[Row], segments: Segments, types: int) -> None:
    """Refuse a pair of texts if the model has no token type for the second one, which would end its run."""
    if any(max(row.encoding.type_ids) >= types for row in rows):
        raise InvalidRequest(
            "this model reads single texts: its tokenizer marks a second one with a token type that the model does not "
            "know; leave the second text out",
            segments.fields[1],
        )


def longest_first(first: int, second: int, room: int) -> Tuple[int, int]:
    """Return how many tokens of two segments are kept if both must fit in `room`.

    The longer one is truncated until both are equal, then both: the tokenizers package's `longest_first`,
    which transformers uses for `truncation=True`.
    """
    shorter, longer = sorted((first, second))
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return (longer, shorter) if first > second else (shorter, longer)


def _split_special(tokenizer: Tokenizer) -> None:
    """Let special tokens in a text be read as text; raises InvalidManifest where the tokenizers package cannot."""
    if not hasattr(tokenizer, "encode_special_tokens"):
        raise InvalidManifest(
            "this archive's tokenizer reads special tokens as text (split_special_tokens), which this version of "
            "the tokenizers package cannot; install a newer one"
        )
    tokenizer.encode_special_tokens = True


def clean_up(text: str) -> str:
    """Remove spaces before punctuation and English contractions, like transformers' `clean_up_tokenization`."""
    for written in _SPACES_TO_CLEAN:
        text = text.replace(written, written.strip())
    return text


def _names_of(decoder: Optional[Decoder]) -> Tuple[str, ...]:
    """Return the names of the parts of a decoder, in order; none if this version of tokenizers does not tell them."""
    try:
        told: Any = decoder.__getstate__()
        state = json.loads(told)
    except (AttributeError, TypeError, ValueError):
        return ()
    return tuple(part["type"] for part in state.get("decoders", [state]))
