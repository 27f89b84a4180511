"""Compares a lower precision with the original along the original's own texts, token by token.

A greedy text changes completely after its first near tie, so the number of changed texts does not tell how good a lower
precision is. Here the archive's own loop reads the original's greedy text, whatever it would choose itself (teacher
forcing), and its choice at every position is compared with the original's token. Each step's scores are those that the
loop sees when it writes, in every save mode, with the keys and values of its own cache.
"""

from __future__ import annotations

from functools import partial
from typing import List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.generation.loop import Member
from traceserve_runtime.generation.scores import GenerationSettings, processed
from traceserve_runtime.generation.search import Moves
from traceserve_runtime.largest import largest
from traceserve_runtime.runner import Arrays
from traceserve_runtime.softmax import log_softmax
from traceserve_runtime.tasks.contract import Request
from traceserve_runtime.tasks.generating import Generating
from traceserve_runtime.texts.rows import Row

from traceserve.building.checkpoints.original import Original
from traceserve.building.gate.findings import NEAR_TIE, STEPS, Findings, TokenCounts
from traceserve.building.gate.loops import FORCED
from traceserve.building.gate.reference import Reference

_BEST = 16  # of the original's tokens at a position: a choice that is not among them is no near tie


class OwnText(NamedTuple):
    """A sample, its row, and the tokens that the archive wrote by itself; of beams with the sum of their logarithms by
    which these won."""

    number: int
    request: Request
    row: Row
    tokens: Sequence[int]
    is_own: bool
    claimed: Optional[float] = None


class Along:
    """A search that writes given tokens, and records at each what it would have chosen. `step` is that of its logits'
    dtype, relative to their size."""

    def __init__(
        self, prompt: Sequence[int], settings: GenerationSettings, given: Sequence[int], step: float = 0.0
    ) -> None:
        self._prompt = np.array(prompt, dtype=np.int64)
        self._settings = settings
        self._given = list(given)
        self._step = step
        self.choices: List[int] = []
        self.rivals: List[Sequence[int]] = []  # of each choice: what it leads by a near tie, and itself
        self.limits: List[float] = []  # of its near ties
        self.scores: List[float] = []  # the given tokens'
        self.logarithms: List[float] = []  # of the given tokens' probabilities

    @property
    def tokens(self) -> List[int]:
        """The given tokens that were read."""
        return self._given[: len(self.choices)]

    def advance(self, logits: np.ndarray) -> Optional[Moves]:
        position = len(self.choices)
        given = self._given[position]
        logarithms = log_softmax(logits[0])
        read = logarithms if self._settings.num_beams > 1 else logits[0]  # as each search does
        scores = processed(read, self._prompt, self._given[:position], self._settings)
        choice = int(scores.argmax())
        limit = max(NEAR_TIE, self._step * abs(float(logits[0][choice])))
        self.choices.append(choice)
        self.rivals.append(np.flatnonzero(scores >= scores[choice] - np.float32(limit)).tolist())
        self.limits.append(limit)
        self.scores.append(float(scores[given]))
        self.logarithms.append(float(logarithms[given]))
        return Moves([0], [given]) if position + 1 < len(self._given) else None

    def agrees(self, tokens: Sequence[int]) -> bool:
        """Return whether a text that the archive wrote by itself is what these choices give: the given tokens up to the
        first other choice, and that. Choices that are near ties may go either way: other rows in a batch round
        otherwise."""
        for token, given, rivals in zip(tokens, self._given, self.rivals):
            if token not in rivals:
                return False
            if token != given:
                return True  # from here on it is another text
        return len(tokens) == len(self._given) == len(self.choices)

    def bears_out(self, claimed: float) -> bool:
        """Return whether the given tokens, all read, have the sum of logarithms by which a beam of them won."""
        complete = len(self.choices) == len(self._given)
        return complete and abs(sum(self.scores) - claimed) <= sum(self.limits)


def compare_along(engine: Engine, reference: Reference, written: Sequence[OwnText], findings: Findings) -> None:
    """Let the archive read the original's text of each sample, and record how its choices differ."""
    task = engine.task
    assert isinstance(task, Generating)
    texts = [_original_text(reference, task, each.request, each.row) for each in written]
    searches = read_along(
        engine,
        [
            GivenText(each.row, _greedy_settings(task, each.request, each.row), text["tokens"].tolist())
            for each, text in zip(written, texts)
        ],
    )
    for each, text, search in zip(written, texts, searches):
        # A step may fail, or give no numbers.
        complete = search is not None and len(search.choices) == len(text["tokens"])
        if search is None or not complete:
            findings.astray.append(each.number)
            continue
        if _is_greedy(task, each.request) and not search.agrees(each.tokens):
            findings.astray.append(each.number)
        counts = _counted(text, search)
        findings.along = counts if findings.along is None else findings.along + counts
        if each.is_own:
            findings.own_along = counts if findings.own_along is None else findings.own_along + counts
    _compare_beams(engine, task, written, findings)


def _compare_beams(engine: Engine, task: Generating, written: Sequence[OwnText], findings: Findings) -> None:
    """Let the archive read what its own beams wrote: beams that were mixed up would claim what no single row gives."""
    claims = [(each, each.claimed) for each in written if each.claimed is not None]
    texts = [
        GivenText(each.row, task.settings(each.request, each.row, task.prompt(each.row)), each.tokens)
        for each, _ in claims
    ]
    for (each, claimed), search in zip(claims, read_along(engine, texts)):
        if (search is None or not search.bears_out(claimed)) and each.number not in findings.astray:
            findings.astray.append(each.number)


class GivenText(NamedTuple):
    """Tokens to be read behind a row, by a request's settings."""

    row: Row
    settings: GenerationSettings
    tokens: Sequence[int]


def read_along(engine: Engine, texts: Sequence[GivenText]) -> List[Optional[Along]]:
    """Let the archive's own loop read these texts; None of one that it could not begin."""
    task = engine.task
    assert isinstance(task, Generating)
    loop = task.open_loop(engine.runner, Stats())
    assert loop is not None
    step = STEPS.get(engine.manifest.dtype, 0.0)
    # A row whose step failed is begun again, by itself, with a new search.
    members = [Member(row, partial(Along, task.prompt(row), settings, tokens, step)) for row, settings, tokens in texts]
    for member in members:
        loop.join(member)
    while loop.busy:
        loop.turn()
    return [member.search if isinstance(member.search, Along) else None for member in members]


def _is_greedy(task: Generating, request: Request) -> bool:
    return bool(task.parameter(request, "num_beams") == 1)


def _greedy(task: Generating, request: Request) -> Request:
    """Return the request, or one for a greedy text: beams have no single text to go along."""
    if _is_greedy(task, request):
        return request
    return Request(request.inputs, {**request.parameters, "num_beams": 1})


def _greedy_settings(task: Generating, request: Request, row: Row) -> GenerationSettings:
    return task.settings(_greedy(task, request), row, task.prompt(row))


def _original_text(reference: Reference, task: Generating, request: Request, row: Row) -> Arrays:
    """Return the original's greedy text, its scores along it (only the best at each position), and the logarithms of
    its tokens' probabilities."""
    asked = _greedy(task, request)
    tokens = reference.text(task.loop, row, asked)["tokens"]
    settings = _greedy_settings(task, request, row)
    compute = partial(_scored, reference.original, task, row, tokens, settings)
    return reference.outputs(("along", *reference.key_of_text(row, asked)), compute)


def _scored(original: Original, task: Generating, row: Row, tokens: np.ndarray, settings: GenerationSettings) -> Arrays:
    given, prompt = tokens.tolist(), np.array(task.prompt(row), dtype=np.int64)
    with torch.no_grad():
        logits = FORCED[task.loop](original, row, given[:-1]).float().numpy()
    ids, scores, logarithms = [], [], []
    for position, (token, each) in enumerate(zip(given, logits)):
        own = processed(each, prompt, given[:position], settings)
        best = largest(own, _BEST)
        ids.append(best)
        scores.append(own[best] - own[token])
        logarithms.append(log_softmax(each)[token])
    return {
        "tokens": tokens,
        "ids": np.array(ids),
        "scores": np.array(scores),  # less than the written token's
        "logarithms": np.array(logarithms),
    }


def _counted(text: Arrays, search: Along) -> TokenCounts:
    """Count the choices along one text; where its settings force a token there are none.

    The original's own scores must lead to the original's own text: where they do not, its `generate` has other settings
    than these, and no choice is judged by them.
    """
    counts = TokenCounts(texts=1)
    for position, token in enumerate(text["tokens"].tolist()):
        scores, choice = text["scores"][position], search.choices[position]
        if scores[0] == 0 and scores[1] == -np.inf:
            continue
        led = bool(scores[0] <= NEAR_TIE)  # neither infinite nor NaN, as where the settings forbid the token
        near = led and bool((np.abs(scores[text["ids"][position] == choice]) <= NEAR_TIE).any())
        counts += TokenCounts(
            tokens=1,
            changed=int(not led or (choice != token and not near)),
            near_ties=int(choice != token and near),
            drift=float(text["logarithms"][position]) - search.logarithms[position],
        )
    return counts
