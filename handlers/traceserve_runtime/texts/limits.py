"""What one HTTP request may ask at most, and how much of a batch is tokenized at once.

A limit that is checked after the work protects nobody: characters and texts are counted before anything is tokenized,
which takes seconds for a megabyte of punctuation, in which a worker answers nobody else.
"""

from __future__ import annotations

from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from traceserve_runtime.errors import InputTooLong

# Of `max_rows`, so many may be as long as can be: a list of texts has many short rows, and a row's cost is its tokens.
_FULL_ROWS, _SHARE_OF_FULL_ROWS = 64, 4
# Prose has 4 to 6. A text of more is mostly spaces, or what no vocabulary holds.
_CHARACTERS_PER_TOKEN = 8


class Limits(NamedTuple):
    """The most of each that one HTTP request may have, and the most characters that are tokenized at once."""

    rows: int
    tokens: int  # of all rows, as the model reads them
    characters: int  # of all texts, as they are tokenized: one that is paired with ten others counts ten times

    @classmethod
    def of(cls, max_length: int, max_rows: int) -> Limits:
        """The limits of a model."""
        tokens = max_length * max(_FULL_ROWS, max_rows // _SHARE_OF_FULL_ROWS)
        return cls(max_rows, tokens, tokens * _CHARACTERS_PER_TOKEN)

    def of_text(self, text: str, field: Optional[str]) -> Optional[InputTooLong]:
        """Why a text is not tokenized, if it is not."""
        if len(text) <= self.characters:
            return None
        return InputTooLong(
            f"the text has {len(text):,} characters; one request may have {self.characters:,}; split it", field
        )

    def of_texts(self, count: int, characters: int) -> Optional[InputTooLong]:
        """Why the texts of one request are not tokenized, if they are not."""
        if count > self.rows:
            return InputTooLong(
                f"the request has {count:,} texts, each of one row or more; one request may have {self.rows:,} rows; "
                "send several"
            )
        if characters > self.characters:
            whose = "the text has" if count == 1 else "the texts together have"
            return InputTooLong(
                f"{whose} {characters:,} characters; one request may have {self.characters:,}; send several"
            )
        return None

    def of_rows(self, rows: int, tokens: int) -> Optional[InputTooLong]:
        """Why the rows of one request are not run, if they are not."""
        if rows > self.rows:
            return InputTooLong(
                f"the texts have {rows:,} windows of this model together; one request may have {self.rows:,}; send several"
            )
        if tokens > self.tokens:
            return InputTooLong(
                f"the texts have {tokens:,} tokens in the windows of this model; one request may have {self.tokens:,}; send "
                'several, or ask for "parameters": {"long_inputs": "truncate"}'
            )
        return None

    def of_more_tokens(self) -> InputTooLong:
        """Why texts are not tokenized whose beginning has more tokens than all of them may have."""
        return InputTooLong(
            f"the texts have more tokens than the {self.tokens:,} that one request may have; send several, or ask for "
            '"parameters": {"long_inputs": "truncate"}'
        )


Judge = Callable[[int, int], Optional[InputTooLong]]


def refused(measured: Iterable[Tuple[Optional[int], int, int]], judge: Judge) -> Dict[Optional[int], InputTooLong]:
    """The groups that are refused: `measured` has the group of each text, what it counts for, and its size.

    What has no group shares no limit.
    """
    sums: Dict[int, Tuple[int, int]] = {}
    for group, count, size in measured:
        if group is not None:
            counts, sizes = sums.get(group, (0, 0))
            sums[group] = counts + count, sizes + size
    judged = {group: judge(*own) for group, own in sums.items()}
    return {group: error for group, error in judged.items() if error is not None}


def slices(groups: Sequence[Optional[int]], characters: Sequence[int], most: int) -> List[slice]:
    """Neighbours with at most so many characters together, no group divided: what is tokenized, run and let go at once.

    All of a batch of the longest requests would take a gigabyte before the first row is run.
    """
    cuts, total = [0], 0
    for i, (group, count) in enumerate(zip(groups, characters)):
        begins = i > 0 and (group is None or group != groups[i - 1])
        if begins and total + count > most:
            cuts.append(i)
            total = 0
        total += count
    return [slice(start, end) for start, end in zip(cuts, [*cuts[1:], len(groups)])] if characters else []
