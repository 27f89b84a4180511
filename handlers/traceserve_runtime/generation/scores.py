"""The next token's scores: what the settings forbid, force or penalize, and the sampling probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Callable, Optional, Sequence, Tuple, Union

import numpy as np

from traceserve_runtime.softmax import log_softmax, softmax

NEVER = np.float32(-np.inf)
# Changes a row's scores, (vocabulary), in place, by its prompt and its tokens so far.
Change = Callable[[np.ndarray, Sequence[int], Sequence[int], "GenerationSettings"], None]


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
    repetition_penalty: float = 1.0
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
        """The restrictions and penalties that these settings ask for, in transformers' order."""
        wanted = {
            _source_repetition: self.source_penalty != 1.0,
            _repetition: self.repetition_penalty != 1.0,
            _ngrams: self.no_repeat_ngram_size > 0,
            _source_ngrams: self.source_ngram_size > 0,
            _bad_words: bool(self.bad_words_ids),
            _minimum: bool(self.eos_ids) and max(self.min_new_tokens, self.min_length) > 0,
            _forced: self.forced_bos_id is not None or bool(self.forced_eos_ids),
            _suppressed: bool(self.suppress_ids or self.begin_suppress_ids),
        }
        return [change for change, asked in wanted.items() if asked]


def processed(
    scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: GenerationSettings
) -> np.ndarray:
    """Return the next token's scores, (vocabulary), after restrictions and penalties; `scores` itself without any."""
    if settings.changes:
        scores = scores.copy()
        for change in settings.changes:
            change(scores, prompt, tokens, settings)
    return log_softmax(scores) if settings.renormalize else scores


def _source_repetition(
    scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: GenerationSettings
) -> None:
    seen = np.unique(settings.source)
    penalty = np.float32(1 / settings.source_penalty)
    scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)


def _repetition(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: GenerationSettings) -> None:
    seen = np.unique([*prompt, *tokens])
    penalty = np.float32(settings.repetition_penalty)
    scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)


def _ngrams(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: GenerationSettings) -> None:
    size = settings.no_repeat_ngram_size
    if size > len(prompt) + len(tokens) + 1:
        return
    whole = [*prompt, *tokens]
    last = tuple(whole[len(whole) - size + 1 :])
    for i in range(len(whole) - size + 1):
        if tuple(whole[i : i + size - 1]) == last:
            scores[whole[i + size - 1]] = NEVER


def _source_ngrams(
    scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: GenerationSettings
) -> None:
    size = settings.source_ngram_size
    if size > len(prompt) + len(tokens) + 1:
        return
    whole = [*prompt, *tokens]
    last = tuple(whole[len(whole) - size + 1 :])
    for i in range(len(settings.source) - size + 1):
        if settings.source[i : i + size - 1] == last:
            scores[settings.source[i + size - 1]] = NEVER


def _bad_words(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: GenerationSettings) -> None:
    whole = [*prompt, *tokens]
    for word in settings.bad_words_ids:
        if len(word) == 1 or whole[len(whole) - len(word) + 1 :] == list(word[:-1]):
            scores[word[-1]] = NEVER


def _minimum(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: GenerationSettings) -> None:
    if len(tokens) < settings.min_new_tokens or len(prompt) + len(tokens) < settings.min_length:
        scores[list(settings.eos_ids)] = NEVER


def _forced(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: GenerationSettings) -> None:
    forced: Sequence[int] = ()
    if settings.forced_bos_id is not None and len(prompt) + len(tokens) == 1:
        forced = (settings.forced_bos_id,)
    if len(tokens) == settings.max_new_tokens - 1:
        forced = settings.forced_eos_ids or forced
    if forced:
        scores[:] = NEVER
        scores[list(forced)] = 0


def _suppressed(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: GenerationSettings) -> None:
    scores[list(settings.suppress_ids)] = NEVER
    if len(tokens) == (1 if settings.forced_bos_id is not None and len(prompt) == 1 else 0):
        scores[list(settings.begin_suppress_ids)] = NEVER


def probabilities(scores: np.ndarray, settings: GenerationSettings) -> np.ndarray:
    """Return each token's probability, (vocabulary), by temperature, then top_k, top_p, min_p and typical_p."""
    scores = scores / np.float32(settings.temperature)
    if 0 < settings.top_k < len(scores):
        threshold = np.partition(scores, -settings.top_k)[-settings.top_k]
        scores = np.where(scores < threshold, NEVER, scores)
    if settings.top_p < 1.0:
        order = np.argsort(scores, kind="stable")  # ascending
        dropped = np.cumsum(softmax(scores[order])) <= np.float32(1 - settings.top_p)
        dropped[-1] = False
        scores[order[dropped]] = NEVER
    if settings.min_p > 0.0:
        likely = softmax(scores)
        scores[likely < np.float32(settings.min_p) * likely.max()] = NEVER
    if settings.typical_p < 1.0:
        scores[_untypical(scores, settings.typical_p)] = NEVER
    return softmax(scores)


def _untypical(scores: np.ndarray, mass: float) -> np.ndarray:
    """Return the tokens that typical sampling excludes (Meister et al., "Locally Typical Sampling", 2022).

    It keeps those whose log-probability is nearest to its expectation, up to a total probability of `mass`.
    """
    logarithms = log_softmax(scores)
    likely = np.exp(logarithms)
    possible = likely > 0
    entropy = -(logarithms[possible] * likely[possible]).sum()
    order = np.argsort(np.abs(-logarithms - entropy), kind="stable")
    last = min(int((np.cumsum(likely[order]) < np.float32(mass)).sum()), len(order) - 1)
    return np.asarray(order[last + 1 :])
