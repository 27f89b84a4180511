"""The limits of one HTTP request, and how much of a batch is tokenized at once.

Limits must hold before the work: characters and texts are counted before tokenization,
which takes seconds for a megabyte of punctuation and blocks the worker.
"""

from __future__ import annotations

from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from traceserve_runtime.errors import InputTooLong

# This many of `max_rows` may be full: a list of texts has many short rows, and a row costs its tokens.
_FULL_ROWS, _SHARE_OF_FULL_ROWS = 64, 4
# Prose has 4 to 6. A text with more is mostly spaces, or not in the vocabulary.
_CHARACTERS_PER_TOKEN = 8
# In JSON, as two escapes of UTF-16; and what a request may have beside its texts.
_BYTES_PER_CHARACTER, _BYTES_BESIDE = 12, 2 << 20


class RequestLimits(NamedTuple):
    """The limits of one HTTP request, and on the characters tokenized at once."""

    rows: int
    tokens: int  # in all rows, as the model reads them
    characters: int  # in all texts, as tokenized: one that is paired with ten others counts ten times

    @classmethod
    def of(cls, max_length: int, max_rows: int) -> RequestLimits:
        """Return the limits of a model."""
        tokens = max_length * max(_FULL_ROWS, max_rows // _SHARE_OF_FULL_ROWS)
        return cls(max_rows, tokens, tokens * _CHARACTERS_PER_TOKEN)

    @property
    def largest_body(self) -> int:
        """The bytes that a request within these limits has at most, however it is written; a larger one need not be read."""
        return self.characters * _BYTES_PER_CHARACTER + _BYTES_BESIDE

    def of_text(self, text: str, field: Optional[str]) -> Optional[InputTooLong]:
        """Return why a text is not tokenized, or None."""
        if len(text) <= self.characters:
            return None
        return InputTooLong(
            f"the text has {len(text):,} characters; one request may have {self.characters:,}; split it",
            field,
            exceeds_context=True,
        )

    def of_texts(self, count: int, characters: int) -> Optional[InputTooLong]:
        """Return why the texts of one request are not tokenized, or None. Of several, `characters` may count the first ones."""
        if count > self.rows:
            return InputTooLong(
                f"the request has {count:,} texts, each of one row or more; one request may have {self.rows:,} rows; "
                "send several"
            )
        if characters > self.characters:
            if count == 1:
                message = f"the text has {characters:,} characters; one request may have {self.characters:,}"
            else:
                message = (
                    f"the texts together have more than the {self.characters:,} characters that one request may have"
                )
            return InputTooLong(f"{message}; send several", exceeds_context=count == 1)
        return None

    def of_rows(self, rows: int, tokens: int) -> Optional[InputTooLong]:
        """Return why the rows of one request are not run, or None."""
        if rows > self.rows:
            return InputTooLong(
                f"the texts have {rows:,} windows of this model together; one request may have {self.rows:,}; send several"
            )
        if tokens > self.tokens:
            return InputTooLong(
                f"the texts have {tokens:,} tokens in the windows of this model; one request may have {self.tokens:,}; send "
                "several",
                ways=("truncate",),
            )
        return None

    def of_more_tokens(self, count: int) -> InputTooLong:
        """Return why so many texts are not tokenized, whose beginnings already exceed the limit on tokens."""
        return InputTooLong(
            f"the texts have more tokens than the {self.tokens:,} that one request may have; send several",
            ways=("truncate",),
            exceeds_context=count == 1,
        )


def most_of_a_row(max_length: int) -> int:
    """Return the most characters that a row is expected to hold, for a text that is repeated in all rows."""
    return max_length * _CHARACTERS_PER_TOKEN


Judge = Callable[[int, int], Optional[InputTooLong]]


def refused_groups(
    measured: Iterable[Tuple[Optional[int], int, int]], judge: Judge
) -> Dict[Optional[int], InputTooLong]:
    """Return the refused groups: `measured` has each text's group, count and size.

    Texts without a group share no limit.
    """
    sums = GroupSums()
    for each in measured:
        sums.add(*each)
    return sums.refused(judge)


class GroupSums:
    """The counts and sizes of each group's texts; texts without a group share no limit, and are not counted."""

    def __init__(self) -> None:
        self._sums: Dict[int, Tuple[int, int]] = {}

    def add(self, group: Optional[int], count: int, size: int) -> None:
        """Count a text, or several."""
        if group is not None:
            counts, sizes = self._sums.get(group, (0, 0))
            self._sums[group] = counts + count, sizes + size

    def size(self, group: Optional[int]) -> int:
        """Return the size of the group's texts so far."""
        return 0 if group is None else self._sums.get(group, (0, 0))[1]

    def refused(self, judge: Judge) -> Dict[Optional[int], InputTooLong]:
        """Return the refused groups, each with the reason."""
        judged = {group: judge(*own) for group, own in self._sums.items()}
        return {group: error for group, error in judged.items() if error is not None}


def groups_of(groups: Sequence[Optional[int]]) -> List[slice]:
    """Return the slices of neighbours that are of one group; those without a group are by themselves."""
    cuts = [i for i, group in enumerate(groups) if i == 0 or group is None or group != groups[i - 1]]
    return [slice(start, end) for start, end in zip(cuts, [*cuts[1:], len(groups)])]
