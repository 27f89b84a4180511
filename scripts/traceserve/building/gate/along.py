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
from traceserve_runtime.runner import Arrays
from traceserve_runtime.softmax import log_softmax
from traceserve_runtime.tasks.contract import Request
from traceserve_runtime.tasks.generating import Generating
from traceserve_runtime.texts.rows import Row

from traceserve.building.checkpoints.original import Original
from traceserve.building.gate.findings import NEAR_TIE, Findings, TokenCounts
from traceserve.building.gate.loops import FORCED
from traceserve.building.gate.reference import Reference

_BEST = 16  # of the original's tokens at a position: a choice that is not among them is no near tie


class OwnText(NamedTuple):
    """A sample, its row, and the tokens that the archive wrote by itself."""

    number: int
    request: Request
    row: Row
    tokens: Sequence[int]
    is_own: bool


class Along:
    """A search that writes given tokens, and records at each what it would have chosen."""

    def __init__(self, prompt: Sequence[int], settings: GenerationSettings, given: Sequence[int]) -> None:
        self._prompt = list(prompt)
        self._settings = settings
        self._given = list(given)
        self.choices: List[int] = []
        self.leads: List[float] = []  # of each choice before the next best token
        self.logarithms: List[float] = []  # of the given tokens' probabilities

    @property
    def tokens(self) -> List[int]:
        """The given tokens that were read."""
        return self._given[: len(self.choices)]

    def advance(self, logits: np.ndarray) -> Optional[Moves]:
        position = len(self.choices)
        given = self._given[position]
        scores = processed(logits[0], self._prompt, self._given[:position], self._settings)
        second, best = np.partition(scores, -2)[-2:]
        self.choices.append(int(scores.argmax()))
        self.leads.append(float(best - second))
        self.logarithms.append(float(log_softmax(logits[0])[given]))
        return Moves([0], [given]) if position + 1 < len(self._given) else None

    def agrees(self, tokens: Sequence[int]) -> bool:
        """Return whether a text that the archive wrote by itself is what these choices give: the given tokens up to the
        first other choice, and that. Choices that are near ties may go either way: other rows in a batch round
        otherwise."""
        for token, given, choice, lead in zip(tokens, self._given, self.choices, self.leads):
            if token != choice and lead > NEAR_TIE:
                return False
            if token != given:
                return True  # from here on it is another text
        return len(tokens) == len(self._given) == len(self.choices)


def compare_along(engine: Engine, reference: Reference, written: Sequence[OwnText], findings: Findings) -> None:
    """Let the archive read the original's text of each sample, and record how its choices differ."""
    task = engine.task
    assert isinstance(task, Generating)
    loop = task.open_loop(engine.runner, Stats())
    assert loop is not None
    members = []
    for each in written:
        text = _original_text(reference, task, each.request, each.row)
        search = Along(task.prompt(each.row), _greedy_settings(task, each.request, each.row), text["tokens"].tolist())
        member = Member(each.row, partial(_itself, search))
        members.append((each, text, search, member))
        loop.join(member)
    while loop.busy:
        loop.turn()
    for each, text, search, _ in members:
        complete = len(search.choices) == len(text["tokens"])  # a step may fail, or give no numbers
        if not complete or (_is_greedy(task, each.request) and not search.agrees(each.tokens)):
            findings.astray.append(each.number)
        if complete:
            counts = _counted(text, search)
            findings.along = counts if findings.along is None else findings.along + counts
            if each.is_own:
                findings.own_along = counts if findings.own_along is None else findings.own_along + counts


def _is_greedy(task: Generating, request: Request) -> bool:
    return bool(task.parameter(request, "num_beams") == 1)


def _greedy(task: Generating, request: Request) -> Request:
    """Return the request, or one for a greedy text: beams have no single text to go along."""
    if _is_greedy(task, request):
        return request
    return Request(request.inputs, {**request.parameters, "num_beams": 1})


def _itself(search: Along) -> Along:
    return search


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
    given, prompt = tokens.tolist(), task.prompt(row)
    with torch.no_grad():
        logits = FORCED[task.loop](original, row, given[:-1]).float().numpy()
    ids, scores, logarithms = [], [], []
    for position, (token, each) in enumerate(zip(given, logits)):
        own = processed(each, prompt, given[:position], settings)
        best = np.argsort(-own, kind="stable")[:_BEST]
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
    """Count the choices along one text; where its settings force a token there are none."""
    counts = TokenCounts(texts=1)
    for position, token in enumerate(text["tokens"].tolist()):
        scores, choice = text["scores"][position], search.choices[position]
        if not np.isfinite(scores[1]):
            continue
        near = bool((-scores[text["ids"][position] == choice] <= NEAR_TIE).any())
        counts += TokenCounts(
            tokens=1,
            changed=int(choice != token and not near),
            near_ties=int(choice != token and near),
            drift=float(text["logarithms"][position]) - search.logarithms[position],
        )
    return counts
