"""The next token's scores: what the settings forbid, force or penalize, and the sampling probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Callable, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from traceserve_runtime.largest import largest
from traceserve_runtime.softmax import log_softmax, softmax

NEVER = np.float32(-np.inf)
_LEAST = np.finfo(np.float32).min
_FEW = 256  # tokens that are looked at first; in most texts these have nearly all of the probability
# Changes a row's scores, (vocabulary), in place, by its prompt, int64 of shape (tokens), and its tokens so far.
Change = Callable[[np.ndarray, np.ndarray, Sequence[int], "GenerationSettings"], None]


@dataclass(frozen=True)
class GenerationSettings:
    """How one row is continued, with the names and meanings of transformers' GenerationConfig."""

    max_new_tokens: int
    min_new_tokens: int = 0
    min_length: int = 0  # of the whole sequence, including the prompt
    eos_ids: Tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: Optional[int] = None
    bias: Tuple[Tuple[int, float], ...] = ()  # tokens, and what is added to their scores
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: Union[bool, str] = False  # or "never"
    bad_words_ids: Tuple[Tuple[int, ...], ...] = ()
    forced_bos_id: Optional[int] = None
    forced_eos_ids: Tuple[int, ...] = ()
    suppress_ids: Tuple[int, ...] = ()
    begin_suppress_ids: Tuple[int, ...] = ()
    renormalize: bool = False  # whether a beam's probabilities are normalized again after the restrictions
    source: Tuple[int, ...] = ()  # the tokens of the model's input, for the next two
    source_ngram_size: int = 0  # no sequence of this many of them is written; 0: off
    source_penalty: float = 1.0  # above 1 they become likelier
    alternatives: Optional[int] = None  # keep log-probabilities, with this many top tokens; None: none

    @cached_property
    def changes(self) -> Sequence[Change]:
        """The restrictions and penalties that these settings ask for, in transformers' order, and then those that it lacks."""
        wanted = {
            _biased: bool(self.bias),
            _source_repetition: self.source_penalty != 1.0,
            _repetition: self.repetition_penalty != 1.0,
            _ngrams: self.no_repeat_ngram_size > 0,
            _source_ngrams: self.source_ngram_size > 0,
            _bad_words: bool(self.bad_words_ids),
            _minimum: bool(self.eos_ids) and max(self.min_new_tokens, self.min_length) > 0,
            _forced: self.forced_bos_id is not None or bool(self.forced_eos_ids),
            _suppressed: bool(self.suppress_ids or self.begin_suppress_ids),
            _written: self.presence_penalty != 0.0 or self.frequency_penalty != 0.0,
        }
        return [change for change, asked in wanted.items() if asked]

    @cached_property
    def biases(self) -> Tuple[np.ndarray, np.ndarray]:
        """`bias` as arrays: the tokens, and what is added; both (tokens)."""
        tokens, added = zip(*self.bias)
        return np.array(tokens, dtype=np.int64), np.array(added, dtype=np.float32)

    @cached_property
    def source_ids(self) -> np.ndarray:
        """`source` as an array, int64."""
        return np.array(self.source, dtype=np.int64)


def processed(
    scores: np.ndarray, prompt: np.ndarray, tokens: Sequence[int], settings: GenerationSettings
) -> np.ndarray:
    """Return the next token's scores, (vocabulary), after restrictions and penalties; `scores` itself without any.
    `prompt` is int64."""
    if settings.changes:
        scores = scores.copy()
        for change in settings.changes:
            change(scores, prompt, tokens, settings)
    return log_softmax(scores) if settings.renormalize else scores


def _biased(scores: np.ndarray, prompt: np.ndarray, tokens: Sequence[int], settings: GenerationSettings) -> None:
    biased, added = settings.biases
    scores[biased] += added


def _source_repetition(
    scores: np.ndarray, prompt: np.ndarray, tokens: Sequence[int], settings: GenerationSettings
) -> None:
    _penalize(scores, settings.source_ids, 1 / settings.source_penalty)


def _repetition(scores: np.ndarray, prompt: np.ndarray, tokens: Sequence[int], settings: GenerationSettings) -> None:
    _penalize(scores, _whole(prompt, tokens), settings.repetition_penalty)


def _whole(prompt: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    return np.concatenate((prompt, np.array(tokens, dtype=np.int64)))


def _penalize(scores: np.ndarray, seen: np.ndarray, factor: float) -> None:
    own, penalty = scores[seen], np.float32(factor)
    scores[seen] = np.where(own < 0, own * penalty, own / penalty)  # the same for a token that is seen twice


def _ngrams(scores: np.ndarray, prompt: np.ndarray, tokens: Sequence[int], settings: GenerationSettings) -> None:
    whole = _whole(prompt, tokens)
    _exclude_ngrams(scores, whole, whole, settings.no_repeat_ngram_size)


def _source_ngrams(scores: np.ndarray, prompt: np.ndarray, tokens: Sequence[int], settings: GenerationSettings) -> None:
    _exclude_ngrams(scores, _whole(prompt, tokens), settings.source_ids, settings.source_ngram_size)


def _exclude_ngrams(scores: np.ndarray, whole: np.ndarray, source: np.ndarray, size: int) -> None:
    """Exclude the tokens with which the text would end in `size` tokens of the source."""
    if size > len(whole) + 1:
        return
    begins = np.arange(len(source) - size + 1)
    for i, token in enumerate(whole[len(whole) - size + 1 :]):
        begins = begins[source[begins + i] == token]
    scores[source[begins + size - 1]] = NEVER


def _bad_words(scores: np.ndarray, prompt: np.ndarray, tokens: Sequence[int], settings: GenerationSettings) -> None:
    longest = max(map(len, settings.bad_words_ids))
    last = [*prompt[-longest:].tolist(), *tokens[-longest:]]
    for word in settings.bad_words_ids:
        if len(word) == 1 or last[len(last) - len(word) + 1 :] == list(word[:-1]):
            scores[word[-1]] = NEVER


def _minimum(scores: np.ndarray, prompt: np.ndarray, tokens: Sequence[int], settings: GenerationSettings) -> None:
    if len(tokens) < settings.min_new_tokens or len(prompt) + len(tokens) < settings.min_length:
        scores[list(settings.eos_ids)] = NEVER


def _forced(scores: np.ndarray, prompt: np.ndarray, tokens: Sequence[int], settings: GenerationSettings) -> None:
    forced: Sequence[int] = ()
    if settings.forced_bos_id is not None and len(prompt) + len(tokens) == 1:
        forced = (settings.forced_bos_id,)
    if len(tokens) == settings.max_new_tokens - 1:
        forced = settings.forced_eos_ids or forced
    if forced:
        scores[:] = NEVER
        scores[list(forced)] = 0


def _suppressed(scores: np.ndarray, prompt: np.ndarray, tokens: Sequence[int], settings: GenerationSettings) -> None:
    scores[list(settings.suppress_ids)] = NEVER
    if len(tokens) == (1 if settings.forced_bos_id is not None and len(prompt) == 1 else 0):
        scores[list(settings.begin_suppress_ids)] = NEVER


def _written(scores: np.ndarray, prompt: np.ndarray, tokens: Sequence[int], settings: GenerationSettings) -> None:
    if tokens:
        seen, times = np.unique(tokens, return_counts=True)
        penalties = settings.presence_penalty + settings.frequency_penalty * times
        scores[seen] -= penalties.astype(np.float32)


class Drawable(NamedTuple):
    """The tokens that may be drawn, ascending, and their probabilities; both (tokens)."""

    ids: np.ndarray
    probabilities: np.ndarray


def drawable(scores: np.ndarray, settings: GenerationSettings) -> Drawable:
    """Return what may be drawn, by temperature, then top_k, top_p, min_p and typical_p; `scores` is (vocabulary).

    Each leaves fewer for the next, and none sorts a whole vocabulary, which may take longer than the model.
    """
    scores = scores / np.float32(settings.temperature)
    least = _LEAST
    if 0 < settings.top_k < len(scores):
        least = max(least, np.partition(scores, -settings.top_k)[-settings.top_k])
    ids = np.flatnonzero(scores >= least)
    if not len(ids):  # the settings forbid every token, as no_repeat_ngram_size 1 does in the end
        ids = np.array([len(scores) - 1])
        return Drawable(ids, np.ones(1, dtype=np.float32))
    scores = scores[ids]
    if settings.top_p < 1.0:
        kept = _fewest(scores, softmax(scores), settings.top_p)
        ids, scores = ids[kept], scores[kept]
    if settings.min_p > 0.0:
        likely = softmax(scores)
        kept = np.flatnonzero(likely >= np.float32(settings.min_p) * likely.max())
        ids, scores = ids[kept], scores[kept]
    if settings.typical_p < 1.0:
        kept = _typical(scores, settings.typical_p)
        ids, scores = ids[kept], scores[kept]
    return Drawable(ids, softmax(scores))


def _typical(scores: np.ndarray, mass: float) -> np.ndarray:
    """Return the tokens that typical sampling keeps (Meister et al., "Locally Typical Sampling", 2022): those whose
    log-probability is nearest to its expectation, up to a total probability of `mass`."""
    logarithms = log_softmax(scores)
    likely = np.exp(logarithms)
    entropy = -(logarithms * likely).sum()
    return _fewest(-np.abs(-logarithms - entropy), likely, mass)


def _fewest(keys: np.ndarray, likely: np.ndarray, mass: float) -> np.ndarray:
    """Return the fewest tokens with the largest keys whose probability is `mass` together, ascending."""
    count = _FEW
    while True:
        order = largest(keys, count)
        cumulated = np.cumsum(likely[order], dtype=np.float64)
        if count >= len(keys) or cumulated[-1] >= mass:
            return np.sort(order[: int((cumulated < mass).sum()) + 1])
        count *= 8
