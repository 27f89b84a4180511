"""Chooses a row's next tokens by its own settings.

A search owns one row and its continuation: one sequence (greedy or sampled), or several beams. The loop gives it the
logits of its rows, and feeds the model with the tokens that it asks for. Everything matches transformers' `generate` to
the token; the arrays are numpy's.
"""

from __future__ import annotations

from typing import Callable, List, NamedTuple, Optional, Protocol, Sequence

import numpy as np

from traceserve_runtime.generation.scores import GenerationSettings, drawable, processed
from traceserve_runtime.largest import largest
from traceserve_runtime.softmax import log_softmax

_LEAST_LOGARITHM = np.float32(-9999)  # JSON has no infinity
_BAD = np.float32(-1e9)  # a beam's score below all real ones


class Moves(NamedTuple):
    """A search's request to the model: each token is appended to the search's own row with the index beside it."""

    rows: List[int]
    tokens: List[int]


class Likelihood(NamedTuple):
    """The model's log-probability of a chosen token, and of the top ones at its position."""

    taken: float
    ids: np.ndarray  # (alternatives), likeliest first
    values: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, token: int, alternatives: int) -> Likelihood:
        """Make one from the logits, (vocabulary). A probability of zero becomes a very small one."""
        logarithms = np.maximum(log_softmax(logits), _LEAST_LOGARITHM)
        ids = largest(logarithms, alternatives) if alternatives else np.zeros(0, dtype=np.int64)
        return cls(float(logarithms[token]), ids, logarithms[ids])


OnToken = Callable[[List[int], Sequence[Likelihood]], None]


class Search(Protocol):
    """The search of one row."""

    @property
    def tokens(self) -> List[int]:
        """The best sequence so far, only new tokens."""
        ...

    def advance(self, logits: np.ndarray) -> Optional[Moves]:
        """Turn the logits of its rows, (rows, vocabulary), into its next rows; None when done."""
        ...


class Sampling:
    """One sequence: always the best token, or a sampled one."""

    def __init__(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        ends: Optional[Callable[[List[int]], bool]] = None,
        on_token: Optional[OnToken] = None,
    ) -> None:
        self._tokens: List[int] = []
        self._prompt = np.array(prompt, dtype=np.int64)
        self._settings = settings
        self._ends = ends
        self._on_token = on_token
        self._random = np.random.default_rng(settings.seed)
        self.likelihoods: List[Likelihood] = []  # of each token, if kept

    @property
    def tokens(self) -> List[int]:
        """The sequence, only new tokens."""
        return self._tokens

    def advance(self, logits: np.ndarray) -> Optional[Moves]:
        settings = self._settings
        scores = processed(logits[0], self._prompt, self._tokens, settings)
        if settings.do_sample:
            ids, probabilities = drawable(scores, settings)
            cumulated = np.cumsum(probabilities, dtype=np.float64)
            drawn = self._random.random() * cumulated[-1]
            token = int(ids[min(int(np.searchsorted(cumulated, drawn, side="right")), len(ids) - 1)])
        else:
            token = int(scores.argmax())
        if settings.alternatives is not None:
            self.likelihoods.append(Likelihood.of(logits[0], token, settings.alternatives))
        self._tokens.append(token)
        if self._on_token is not None:
            self._on_token(self._tokens, self.likelihoods)
        stopped = self._ends is not None and self._ends(self._tokens)
        if stopped or token in settings.eos_ids or len(self._tokens) >= settings.max_new_tokens:
            return None
        return Moves([0], [token])


class _Finished(NamedTuple):
    score: np.float32
    tokens: List[int]
    complete: bool


class Beams:
    """Several parallel sequences; the answer is the one with the best length-weighted score.

    Like `_beam_search` of transformers, for one row: candidates are the best continuations of all beams; of the best
    `num_beams`, those that end are set aside, the others continue.
    """

    def __init__(
        self, prompt: Sequence[int], settings: GenerationSettings, ends: Optional[Callable[[List[int]], bool]] = None
    ) -> None:
        self._prompt = np.array(prompt, dtype=np.int64)
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

    @property
    def logarithm(self) -> float:
        """The sum of its logarithms of probabilities, after restrictions and penalties."""
        best = self._finished[0]
        if not best.complete:
            return float(self._scores[0])
        return float(best.score) * float(len(best.tokens) ** self._settings.length_penalty)

    def advance(self, logits: np.ndarray) -> Optional[Moves]:
        settings = self._settings
        beams = settings.num_beams
        length = len(self._running[0]) + 1  # including the token chosen now
        scores = np.stack(
            [
                processed(log_softmax(row), self._prompt, tokens, settings) + score
                for row, tokens, score in zip(logits, self._running, self._scores)
            ]
        )
        keep = max(2, 1 + len(settings.eos_ids)) * beams
        best = largest(scores.ravel(), keep)
        rows, tokens = np.divmod(best, scores.shape[1])
        scores = scores.ravel()[best]
        sequences = [[*self._running[row], int(token)] for row, token in zip(rows, tokens)]
        ends = np.isin(tokens, settings.eos_ids) | (length >= settings.max_new_tokens)
        if self._ends is not None:
            ends = ends | np.array([self._ends(sequence) for sequence in sequences])
        going = largest(scores + np.where(ends, _BAD, np.float32(0)), beams)
        self._finish(sequences, scores, ends)
        self._running = [sequences[i] for i in going]
        self._scores = (scores + np.where(ends, _BAD, np.float32(0)))[going]
        self._judge(length)
        full = settings.early_stopping is True and all(item.complete for item in self._finished)
        if not self._improvable or full or ends.all():
            return None
        return Moves([int(rows[i]) for i in going], [int(tokens[i]) for i in going])

    def _finish(self, sequences: List[List[int]], scores: np.ndarray, ends: np.ndarray) -> None:
        """Add the best candidates that end to the finished ones, and keep the best of these."""
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
        best = largest(np.array([item.score for item in candidates], dtype=np.float32), settings.num_beams)
        self._finished = [candidates[i] for i in best]

    def _judge(self, length: int) -> None:
        """Decide whether a running beam may still beat the worst finished one."""
        settings = self._settings
        never = settings.early_stopping == "never" and settings.length_penalty > 0.0
        possible = self._scores[0] / np.float32(
            (settings.max_new_tokens if never else length) ** settings.length_penalty
        )
        worst = min(item.score for item in self._finished)
        self._improvable &= any(possible > (worst if item.complete else _BAD) for item in self._finished)


def search_for(
    prompt: Sequence[int],
    settings: GenerationSettings,
    ends: Optional[Callable[[List[int]], bool]] = None,
    on_token: Optional[OnToken] = None,
) -> Search:
    """Return the search for the settings. `ends` decides whether new tokens are enough; `on_token` is called after each
    token with those of a single sequence, and their likelihoods if kept."""
    if settings.num_beams > 1:
        return Beams(prompt, settings, ends)
    return Sampling(prompt, settings, ends, on_token)
