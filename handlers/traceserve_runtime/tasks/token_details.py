"""The tokens of a generated text, and the likeliest ones at their positions, in text-generation-inference's format."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Callable, NamedTuple, Optional, Sequence

from traceserve_runtime.errors import InputTooLong
from traceserve_runtime.json_types import JsonObject
from traceserve_runtime.runner import Arrays
from traceserve_runtime.texts.tokenization import TextTokenizer
from traceserve_runtime.texts.written_text import NEIGHBOURS, WORDS, Near, added_texts

# Log-probabilities that one HTTP request is answered with: the last of its texts to end makes all of them at once, while
# everybody else's tokens wait.
_MOST = 1 << 16
_WHOLE = 64  # tokens that are decoded in the time that the rest of a log-probability takes


def token_details(tokenizer: TextTokenizer, output: Arrays) -> JsonObject:
    """Return "tokens" and, if kept, "top_tokens": lists of `{"id", "text", "logprob", "special"}`."""
    ids = output["tokens"].tolist()
    top_ids = output["top_ids"].tolist() if "top_ids" in output else [[] for _ in ids]
    spell, locally, near = spelling(tokenizer)
    texts, top_texts = added_texts(spell, locally, ids, top_ids, near)
    special = tokenizer.special_of({*ids, *chain.from_iterable(top_ids)})

    def token(number: int, logarithm: float, text: str) -> JsonObject:
        return {"id": number, "text": text, "logprob": logarithm, "special": number in special}

    tokens = list(map(token, ids, output["logarithms"].tolist(), texts))
    if "top_ids" not in output:
        return {"tokens": tokens}
    tops = zip(top_ids, output["top_logarithms"].tolist(), top_texts)
    return {"tokens": tokens, "top_tokens": [list(map(token, *top)) for top in tops]}


class Spelling(NamedTuple):
    """How tokens are decoded as they are written, special ones too, without the clean-up; and `WrittenText`'s arguments
    for it."""

    decode: Callable[[Sequence[int]], str]
    locally: bool
    near: Near


def spelling(tokenizer: TextTokenizer) -> Spelling:
    """Return how this tokenizer's tokens are spelled."""
    decode = partial(tokenizer.decode, skip_special_tokens=False, raw=True)
    return Spelling(decode, tokenizer.spells_locally, WORDS if tokenizer.decodes_words_locally else NEIGHBOURS)


def time_of(tokenizer: TextTokenizer, length: int, count: int) -> int:
    """Return how many log-probabilities take as long as `count` in a text of `length` tokens."""
    return count if tokenizer.spells_locally else count * (1 + length // _WHOLE)


def check_time(count: int, time: int) -> Optional[InputTooLong]:
    """Return why a request is refused that may be answered with so many log-probabilities, or None."""
    if time <= _MOST:
        return None
    return InputTooLong(
        f"the answer may have {count:,} log-probabilities; one request may have about {count * _MOST // time:,} with texts of "
        "this length; ask for shorter texts, for fewer of them, or for fewer of the likeliest tokens",
        "parameters.top_n_tokens",
    )
