"""Whether a new version's answers hold: the same requests, asked of both versions through the server's own door."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

from traceserve_runtime.tasks.contract import Task

from traceserve.building.gate.drift import score_difference
from traceserve.building.gate.golden import GoldenSample
from traceserve.building.samples import OwnSamples
from traceserve.checking.comparing import AnswerChange, same_meaning
from traceserve.checking.dialects import NATIVE, SpokenAt
from traceserve.checking.proof import Proof
from traceserve.checking.verifying import AskedServer
from traceserve.errors import ConfigError, shortened
from traceserve.serving import client


@dataclass(frozen=True)
class Replay:
    """What both versions were asked.

    `moved`: what they answer otherwise; an answer may be an error's message. `drift`: the largest difference of the
    scores of equal answers.
    """

    asked: int
    moved: Tuple[AnswerChange, ...]
    drift: float


def requests_of(proofs: Sequence[Proof], samples: Optional[OwnSamples]) -> List[GoldenSample]:
    """Return the requests in all golden sets and in the user's samples, each once; raises ConfigError."""
    found: Dict[str, GoldenSample] = {}
    for proof in proofs:
        for sample in proof.golden.samples:
            found.setdefault(what_is_asked(sample), sample)
    if samples is not None:
        task = proofs[0].task
        own = [r for r in samples.requests(type(task)) if task.repeatable(r) and not task.streams(r)]
        if not own:
            raise ConfigError(f"{samples.name} asks only for sampled or streamed text, which has no answer to compare")
        for request in own:
            sample = GoldenSample(dict(request.inputs), dict(request.parameters), None, own=True)
            found[what_is_asked(sample)] = sample
    return list(found.values())


def what_is_asked(sample: GoldenSample) -> str:
    """Return a text that two samples have in common only if they ask the same."""
    return json.dumps([sample.inputs, sample.parameters], sort_keys=True)


def replay(old: AskedServer, new: AskedServer, task: Task, requests: Sequence[GoldenSample]) -> Replay:
    """Ask both versions each request, and compare; raises ServerError if one does not answer at all."""
    moved: List[AnswerChange] = []
    drift = 0.0
    for number, request in enumerate(requests, 1):
        (before, failed_before), (after, failed_after) = asked(old, task, request), asked(new, task, request)
        if failed_before or failed_after:
            same = failed_before == failed_after
        else:
            same = same_meaning(task, after, before)
            drift = max(drift, score_difference(after, before)) if same else drift
        if not same:
            moved.append(AnswerChange(number, request.inputs, before, after))
    return Replay(len(requests), tuple(moved), drift)


def asked(server: AskedServer, task: Task, request: GoldenSample) -> Tuple[Any, bool]:
    """Return the answer, and whether it is a refusal."""
    status, answer = server.ask(server.url, NATIVE.write(request, task))
    if status != 200:
        return f"{status}: {shortened(client.error_words(answer), 200)}", True
    return SpokenAt(NATIVE, server.url).answer(answer, request, task), False
