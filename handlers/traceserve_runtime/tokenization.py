"""Text to rows of token ids, and what is longer than a row to windows.

Everything that is needed of a tokenizer lies in `tokenizer.json` and the package tokenizers. The file's own padding
and truncation are switched off: both belong to the caller here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from tokenizers import Encoding, Tokenizer
from tokenizers.processors import ByteLevel

from traceserve_runtime.errors import InputTooLong, InvalidManifest, InvalidRequest, TraceserveError
from traceserve_runtime.manifest import TokenizerFacts

LONG_INPUTS = ("window", "truncate", "reject")
# A text with more characters than this for each token that may be asked for is refused before it is tokenized, which
# takes seconds for megabytes. Prose has 4 to 6.
_CHARACTERS_PER_TOKEN = 32


class Segments(NamedTuple):
    """What a row is made of: a text, or a text and its pair; `fields` are their names in the request."""

    text: str
    pair: Optional[str] = None
    fields: Tuple[str, str] = ("text", "text_pair")


@dataclass(frozen=True)
class Row:
    """One sequence for the model: `encoding` holds ids, type ids and character offsets of each token."""

    encoding: Encoding
    length: int  # in tokens, special ones included
    tokens: int  # of the text itself


@dataclass(frozen=True)
class Encoded:
    """The rows of one request, one or several windows; and the characters that no row holds."""

    rows: List[Row]
    unseen: Dict[str, Tuple[int, int]] = field(default_factory=dict)  # field -> [start, end)


class TextTokenizer:
    """Segments to rows of at most `max_length` tokens; at most `max_rows` for one request."""

    def __init__(self, folder: Path, facts: TokenizerFacts, max_length: int, max_rows: int) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / facts.file))
        except Exception as error:  # tokenizers raises Exception itself for a file that it cannot read
            raise InvalidManifest(f"{facts.file} cannot be read by the tokenizers package: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._side = facts.truncation_side
        self._max_length = max_length
        self._max_rows = max_rows
        self._special_tokens = [self._tokenizer.num_special_tokens_to_add(is_pair) for is_pair in (False, True)]

    def encode(self, requests: Sequence[Segments], long_inputs: Sequence[str]) -> List[Union[Encoded, TraceserveError]]:
        """One Encoded, or the reason why there is none, for each request; `long_inputs` names how each is shortened."""
        answers: List[Union[Encoded, TraceserveError, None]] = [self._refuse_huge(request) for request in requests]
        accepted = [i for i, refused in enumerate(answers) if refused is None]
        texts = [requests[i].text if requests[i].pair is None else requests[i][:2] for i in accepted]
        for i, encoding in zip(accepted, self._tokenizer.encode_batch(texts)):
            length = len(encoding)
            if not length:  # a tokenizer without special tokens, and a text without any of its own
                answers[i] = InvalidRequest("the text has no tokens", requests[i].fields[0])
            elif length <= self._max_length:
                answers[i] = Encoded([Row(encoding, length, length - self._special(requests[i]))])
            else:
                try:
                    answers[i] = self._shorten(requests[i], length, long_inputs[i])
                except InputTooLong as error:
                    answers[i] = error
        return answers  # type: ignore[return-value]  # every None was replaced above

    def _special(self, segments: Segments) -> int:
        return self._special_tokens[segments.pair is not None]

    def _refuse_huge(self, segments: Segments) -> Optional[InputTooLong]:
        most = self._max_rows * self._max_length * _CHARACTERS_PER_TOKEN
        for name, text in zip(segments.fields, segments[:2]):
            if text is not None and len(text) > most:
                return InputTooLong(f"the text has {len(text):,} characters; at most {most:,} are read", name)
        return None

    def _shorten(self, segments: Segments, length: int, how: str) -> Encoded:
        if how == "reject":
            raise InputTooLong(
                f"the text has {length:,} tokens, special ones included; this model reads {self._max_length:,}; shorten "
                'it, or ask for "parameters": {"long_inputs": "truncate"} or "window"',
                segments.fields[0],
            )
        room = self._max_length - self._special(segments)
        if room < 1:
            raise InputTooLong(
                f"this model reads {self._max_length} tokens, which special ones fill alone", segments.fields[0]
            )
        first, second = self._encode_bare(segments)
        return (self._truncate if how == "truncate" else self._window)(segments, first, second, room)

    def _encode_bare(self, segments: Segments) -> Tuple[Encoding, Optional[Encoding]]:
        """The segments without special tokens, and not post-processed: that follows for each row.

        The post-processors of byte-level tokenizers move offsets past a leading space, each time that they run; so the
        tokenizer's own is put aside for a moment. (An engine is for one thread.)
        """
        own = self._tokenizer.post_processor
        if own is not None:
            self._tokenizer.post_processor = ByteLevel(trim_offsets=False)
        try:
            first = self._tokenizer.encode(segments.text, add_special_tokens=False)
            second = None if segments.pair is None else self._tokenizer.encode(segments.pair, add_special_tokens=False)
        finally:
            if own is not None:
                self._tokenizer.post_processor = own
        return first, second

    def _truncate(self, segments: Segments, first: Encoding, second: Optional[Encoding], room: int) -> Encoded:
        kept = (room, 0) if second is None else longest_first(len(first), len(second), room)
        unseen = {}
        for name, text, encoding, keep in zip(segments.fields, segments[:2], (first, second), kept):
            if text is None or encoding is None or keep >= len(encoding):
                continue
            offsets = encoding.offsets
            if self._side == "right":
                unseen[name] = (offsets[keep][0], len(text))
            else:
                unseen[name] = (0, offsets[len(encoding) - keep - 1][1])
            encoding.truncate(keep, direction=self._side)
        return Encoded([self._row(first, second)], unseen)

    def _window(self, segments: Segments, first: Encoding, second: Optional[Encoding], room: int) -> Encoded:
        """Windows side by side over the longer segment, of one size but for the last; the shorter one stands in each."""
        swapped = second is not None and len(second) > len(first)
        longer, shorter = (second, first) if swapped else (first, second)
        assert longer is not None
        if shorter is not None:
            if len(shorter) > room // 2:
                raise InputTooLong(
                    f"text and text_pair have {len(first):,} and {len(second or ()):,} tokens; one of them may be cut "
                    f'into windows, but the other must then fit in {room // 2}; shorten it, or ask for "parameters": '
                    '{"long_inputs": "truncate"}',
                    segments.fields[0 if swapped else 1],
                )
            room -= len(shorter)
        count = math.ceil(len(longer) / room)
        if count > self._max_rows:
            raise InputTooLong(
                f"the text has {len(longer):,} tokens, which are {count:,} windows of this model; one request may have "
                f"{self._max_rows:,}; split it, or ask for "
                '"parameters": {"long_inputs": "truncate"}',
                segments.fields[1 if swapped else 0],
            )
        longer.truncate(math.ceil(len(longer) / count))
        windows = [longer] + longer.overflowing
        return Encoded([self._row(*((shorter, w) if swapped else (w, shorter))) for w in windows])

    def _row(self, first: Optional[Encoding], second: Optional[Encoding]) -> Row:
        assert first is not None
        encoding = self._tokenizer.post_process(first, second)
        return Row(encoding, len(encoding), len(first) + (0 if second is None else len(second)))


def longest_first(first: int, second: int, room: int) -> Tuple[int, int]:
    """How many tokens of each of two segments are kept when both must fit in `room`.

    The longer one is cut until both are equal, then both: the strategy `longest_first` of the package tokenizers,
    which transformers uses for `truncation=True`.
    """
    shorter, longer = sorted((first, second))
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return (longer, shorter) if first > second else (shorter, longer)
