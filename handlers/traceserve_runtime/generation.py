"""Token by token: how the next tokens are chosen, for several rows in one batch, each by its own settings.

A search owns one row and what has become of it: one sequence (greedy or sampled), or several beams. `generate` feeds the
model with the tokens that all searches ask for, and those that are done leave the batch. Everything here is as
transformers' `generate` does it, to the token; the arrays are numpy's, and the model is behind a feed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, List, NamedTuple, Optional, Protocol, Sequence, Tuple, Union

import numpy as np

from traceserve_runtime.tasks.scores import softmax

NEVER = np.float32(-np.inf)
_BAD = np.float32(-1e9)  # a beam's score that nothing real is below


@dataclass(frozen=True)
class Settings:
    """How one row is continued. Names and meanings are those of transformers' GenerationConfig."""

    max_new_tokens: int
    min_new_tokens: int = 0
    min_length: int = 0  # of the whole sequence, the prompt included
    eos_ids: Tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
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
    renormalize: bool = False  # whether a beam's probabilities add up to 1 again after what was forbidden
    source: Tuple[int, ...] = ()  # the tokens that the model was given, for the two that follow
    source_ngram_size: int = 0  # no sequence of so many of them is written; 0: any may
    source_penalty: float = 1.0  # above 1 they become likelier


class Moves(NamedTuple):
    """What a search asks of the model: each token is appended to the search's own row with the number beside it."""

    rows: List[int]
    tokens: List[int]


class Feed(Protocol):
    """The model, with the rows of all searches: the logits, (rows, vocabulary), after the prompts and after each step."""

    def first(self) -> np.ndarray:
        """After the prompts."""
        ...

    def next(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """After `tokens`, each of which continues the row of the last call with the number in `rows`."""
        ...


class Search(Protocol):
    """One row's way through the loop."""

    @property
    def tokens(self) -> List[int]:
        """The best sequence so far, new tokens only."""
        ...

    def advance(self, logits: np.ndarray) -> Optional[Moves]:
        """From the logits of its rows, (rows, vocabulary), to its next rows; None when it is done."""
        ...


def generate(feed: Feed, searches: Sequence[Search]) -> List[bool]:
    """Run the searches together until each is done; tells for each whether the model gave it numbers to the end."""
    logits = feed.first()
    sound = [True] * len(searches)
    live = [(i, 1) for i in range(len(searches))]
    while live:
        rows: List[int] = []
        tokens: List[int] = []
        kept = []
        offset = 0
        for i, width in live:
            own = logits[offset : offset + width]
            sound[i] = not np.isnan(own).any()
            moves = searches[i].advance(own) if sound[i] else None
            if moves is not None:
                rows += [offset + row for row in moves.rows]
                tokens += moves.tokens
                kept.append((i, len(moves.tokens)))
            offset += width
        live = kept
        if live:
            logits = feed.next(np.array(rows, dtype=np.int64), np.array(tokens, dtype=np.int64))
    return sound


class Sampling:
    """One sequence: the best token each time, or one drawn by its probability."""

    def __init__(
        self,
        prompt: Sequence[int],
        settings: Settings,
        ends: Optional[Callable[[List[int]], bool]] = None,
        told: Optional[Callable[[List[int]], None]] = None,
    ) -> None:
        self._tokens: List[int] = []
        self._prompt = list(prompt)
        self._settings = settings
        self._ends = ends
        self._told = told
        self._random = np.random.default_rng(settings.seed)

    @property
    def tokens(self) -> List[int]:
        """The sequence, new tokens only."""
        return self._tokens

    def advance(self, logits: np.ndarray) -> Optional[Moves]:
        settings = self._settings
        scores = processed(logits[0], self._prompt, self._tokens, settings)
        if settings.do_sample:
            cumulated = np.cumsum(probabilities(scores, settings), dtype=np.float64)
            drawn = self._random.random() * cumulated[-1]
            token = min(int(np.searchsorted(cumulated, drawn, side="right")), len(cumulated) - 1)
        else:
            token = int(scores.argmax())
        self._tokens.append(token)
        if self._told is not None:
            self._told(self._tokens)
        stopped = self._ends is not None and self._ends(self._tokens)
        if stopped or token in settings.eos_ids or len(self._tokens) >= settings.max_new_tokens:
            return None
        return Moves([0], [token])


class _Finished(NamedTuple):
    score: np.float32
    tokens: List[int]
    complete: bool


class Beams:
    """Several sequences beside each other, of which the best one by its length-weighted score is told.

    As `_beam_search` of transformers, for one row: candidates are the best continuations of all beams; of the best
    `num_beams` of them those that end are kept aside, the others go on.
    """

    def __init__(
        self, prompt: Sequence[int], settings: Settings, ends: Optional[Callable[[List[int]], bool]] = None
    ) -> None:
        self._prompt = list(prompt)
        self._settings = settings
        self._ends = ends
        self._running: List[List[int]] = [[]]
        self._scores = np.zeros(1, dtype=np.float32)
        self._finished = [_Finished(_BAD, [], False)] * settings.num_beams
        self._improvable = True

    @property
    def tokens(self) -> List[int]:
        """The best finished sequence, or while there is none the best running one."""
        best = self._finished[0]
        return best.tokens if best.complete else self._running[0]

    def advance(self, logits: np.ndarray) -> Optional[Moves]:
        settings = self._settings
        beams = settings.num_beams
        length = len(self._running[0]) + 1  # with the token that is chosen now
        scores = np.stack(
            [
                processed(log_softmax(row), self._prompt, tokens, settings) + score
                for row, tokens, score in zip(logits, self._running, self._scores)
            ]
        )
        keep = max(2, 1 + len(settings.eos_ids)) * beams
        best = _largest(scores.ravel(), keep)
        rows, tokens = np.divmod(best, scores.shape[1])
        scores = scores.ravel()[best]
        sequences = [[*self._running[row], int(token)] for row, token in zip(rows, tokens)]
        ends = np.isin(tokens, settings.eos_ids) | (length >= settings.max_new_tokens)
        if self._ends is not None:
            ends = ends | np.array([self._ends(sequence) for sequence in sequences])
        going = _largest(scores + np.where(ends, _BAD, np.float32(0)), beams)
        self._finish(sequences, scores, ends)
        self._running = [sequences[i] for i in going]
        self._scores = (scores + np.where(ends, _BAD, np.float32(0)))[going]
        self._judge(length)
        full = settings.early_stopping is True and all(item.complete for item in self._finished)
        if not self._improvable or full or ends.all():
            return None
        return Moves([int(rows[i]) for i in going], [int(tokens[i]) for i in going])

    def _finish(self, sequences: List[List[int]], scores: np.ndarray, ends: np.ndarray) -> None:
        """Take those of the best candidates that end among the finished ones, and keep the best of these."""
        settings = self._settings
        weighted = scores / np.float32(len(sequences[0]) ** settings.length_penalty)
        ended = ends & (np.arange(len(ends)) < settings.num_beams)
        if settings.early_stopping is True and all(item.complete for item in self._finished):
            weighted = weighted + _BAD
        if not self._improvable:
            weighted = weighted + _BAD
        weighted = weighted + np.where(ended, np.float32(0), _BAD)
        candidates = self._finished + [
            _Finished(score, tokens, bool(end)) for score, tokens, end in zip(weighted, sequences, ended)
        ]
        best = _largest(np.array([item.score for item in candidates], dtype=np.float32), settings.num_beams)
        self._finished = [candidates[i] for i in best]

    def _judge(self, length: int) -> None:
        """Whether a running beam may still become better than the worst finished one."""
        settings = self._settings
        never = settings.early_stopping == "never" and settings.length_penalty > 0.0
        possible = self._scores[0] / np.float32(
            (settings.max_new_tokens if never else length) ** settings.length_penalty
        )
        worst = min(item.score for item in self._finished)
        self._improvable &= any(possible > (worst if item.complete else _BAD) for item in self._finished)


def search(
    prompt: Sequence[int],
    settings: Settings,
    ends: Optional[Callable[[List[int]], bool]] = None,
    told: Optional[Callable[[List[int]], None]] = None,
) -> Search:
    """The search that the settings ask for. `ends` tells whether new tokens are enough; `told` is called with those of a
    single sequence, each time that there is one more."""
    if settings.num_beams > 1:
        return Beams(prompt, settings, ends)
    return Sampling(prompt, settings, ends, told)


def processed(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: Settings) -> np.ndarray:
    """The scores of the next token, (vocabulary), after what the settings forbid, force or make less likely."""
    changes = (_source_repetition, _repetition, _ngrams, _source_ngrams, _bad_words, _minimum, _forced, _suppressed)
    scores = scores.copy()
    for change in changes:
        change(scores, prompt, tokens, settings)
    return log_softmax(scores) if settings.renormalize else scores


def _source_repetition(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: Settings) -> None:
    if settings.source_penalty == 1.0:
        return
    seen = np.unique(settings.source)
    penalty = np.float32(1 / settings.source_penalty)
    scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)


def _repetition(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: Settings) -> None:
    if settings.repetition_penalty == 1.0:
        return
    seen = np.unique([*prompt, *tokens])
    penalty = np.float32(settings.repetition_penalty)
    scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)


def _ngrams(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: Settings) -> None:
    size = settings.no_repeat_ngram_size
    whole = [*prompt, *tokens]
    if not 0 < size <= len(whole) + 1:
        return
    last = tuple(whole[len(whole) - size + 1 :])
    for i in range(len(whole) - size + 1):
        if tuple(whole[i : i + size - 1]) == last:
            scores[whole[i + size - 1]] = NEVER


def _source_ngrams(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: Settings) -> None:
    size = settings.source_ngram_size
    whole = [*prompt, *tokens]
    if not 0 < size <= len(whole) + 1:
        return
    last = tuple(whole[len(whole) - size + 1 :])
    for i in range(len(settings.source) - size + 1):
        if settings.source[i : i + size - 1] == last:
            scores[settings.source[i + size - 1]] = NEVER


def _bad_words(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: Settings) -> None:
    whole = [*prompt, *tokens]
    for word in settings.bad_words_ids:
        if len(word) == 1 or whole[len(whole) - len(word) + 1 :] == list(word[:-1]):
            scores[word[-1]] = NEVER


def _minimum(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: Settings) -> None:
    if len(tokens) < settings.min_new_tokens or len(prompt) + len(tokens) < settings.min_length:
        scores[list(settings.eos_ids)] = NEVER


def _forced(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: Settings) -> None:
    forced: Sequence[int] = ()
    if settings.forced_bos_id is not None and len(prompt) + len(tokens) == 1:
        forced = (settings.forced_bos_id,)
    elif len(tokens) == settings.max_new_tokens - 1:
        forced = settings.forced_eos_ids
    if forced:
        scores[:] = NEVER
        scores[list(forced)] = 0


def _suppressed(scores: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], settings: Settings) -> None:
    scores[list(settings.suppress_ids)] = NEVER
    if len(tokens) == (1 if settings.forced_bos_id is not None and len(prompt) == 1 else 0):
        scores[list(settings.begin_suppress_ids)] = NEVER


def probabilities(scores: np.ndarray, settings: Settings) -> np.ndarray:
    """The probability of each token, (vocabulary), by temperature, then top_k, top_p and min_p."""
    scores = scores / np.float32(settings.temperature)
    if 0 < settings.top_k < len(scores):
        threshold = np.partition(scores, -settings.top_k)[-settings.top_k]
        scores = np.where(scores < threshold, NEVER, scores)
    if settings.top_p < 1.0:
        order = np.argsort(scores, kind="stable")  # the least likely first
        dropped = np.cumsum(softmax(scores[order])) <= np.float32(1 - settings.top_p)
        dropped[-1] = False
        scores[order[dropped]] = NEVER
    if settings.min_p > 0.0:
        likely = softmax(scores)
        scores[likely < np.float32(settings.min_p) * likely.max()] = NEVER
    return softmax(scores)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the largest values, largest first."""
    if count < len(values):
        some = np.argpartition(-values, count - 1)[:count]
        return some[np.argsort(-values[some], kind="stable")]
    return np.argsort(-values, kind="stable")
