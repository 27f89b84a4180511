"""Replays a golden set against a live server, and compares its answers by the gate's own rules."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from traceserve_runtime.tasks.contract import Task

from traceserve.building.gate.drift import score_difference
from traceserve.building.gate.findings import LIMITS, Findings
from traceserve.building.gate.golden import GoldenSample
from traceserve.checking.dialects import NATIVE, SpokenAt, metadata_url, places
from traceserve.checking.proof import Proof, proof_of
from traceserve.errors import ServerError, shortened, some
from traceserve.serving import client
from traceserve.serving.instances import Instance

SECONDS = 8.0  # after which no more samples are asked, so that all ends within ten
_NOT_ALLOWED = (401, 403)
_WRONG_KEY = "InvalidKeyException"  # TorchServe's, with status 400
# What reading an answer of another form raises; and a task's comparison of one.
_OTHER_FORM = (LookupError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class AskedServer:
    """A server's address. `ours`: it is one of this machine's, whose version and contents must be the archive's."""

    label: str
    url: str
    key: Optional[str] = None
    certificate: Optional[str] = None
    ours: bool = False

    @classmethod
    def of(cls, instance: Instance, name: str) -> AskedServer:
        """Return a server of this machine, as the archive `name` is asked there."""
        url = instance.predictions_url(name)
        return cls(f"{name} on port {instance.port}", url, instance.key, instance.certificate, True)

    def ask(self, url: str, body: Any = None, timeout: float = 60.0) -> Tuple[int, Any]:
        """POST, or GET without a body; raises ServerError where nothing answers, or the key is refused."""
        address = client.Address(url, self.key, self.certificate, any_name=self.ours)
        status, answer = client.exchange(address, body, timeout)
        if status in _NOT_ALLOWED or (isinstance(answer, dict) and answer.get("type") == _WRONG_KEY):
            raise ServerError(
                f"{url} answers {status}: {client.error_words(answer)}; give its key: --key KEY or --key-file"
            )
        return status, answer


@dataclass(frozen=True)
class VerifiedSample:
    """One sample's outcome; `difference` of its scores is None where the answer changed or failed. `expected` is the
    original's answer, or the archive's own text at its build, with the `original`'s beside it."""

    number: int  # in the golden set, from 1
    own: bool
    same: bool
    difference: Optional[float]
    expected: Any
    answer: Any
    error: str
    milliseconds: float
    original: Any = None  # if another text than the expected one

    def is_over(self, limit: float) -> bool:
        """Return whether its scores differ by more than the limit, or by what is no number."""
        return self.difference is not None and not self.difference <= limit


@dataclass(frozen=True)
class Verification:
    """The outcome of a replay; `problems` are what fails it, `notes` what could not be compared."""

    server: AskedServer
    endpoint: SpokenAt
    of: int  # samples in the golden set
    samples: Tuple[VerifiedSample, ...]
    limit: float  # of a score's difference
    problems: Tuple[str, ...]
    notes: Tuple[str, ...]
    build_p50: Optional[float]
    by_own_texts: bool = False  # judged by what the archive wrote at its build, not by the original's answers

    @property
    def passed(self) -> bool:
        """Whether the server answers as the original does, from the archive that was proven."""
        return not self.problems

    @property
    def different(self) -> List[VerifiedSample]:
        """The samples that were answered otherwise, or with a score over the limit."""
        return [each for each in self.samples if not each.same or each.is_over(self.limit)]

    @property
    def largest_difference(self) -> float:
        """The largest of all scores that could be compared."""
        return max((each.difference for each in self.samples if each.difference is not None), default=0.0)

    @property
    def p50(self) -> float:
        """The median of a request, in milliseconds, one at a time."""
        return statistics.median(each.milliseconds for each in self.samples)

    def document(self, with_texts: bool) -> Dict[str, Any]:
        """Return it as JSON; the answers to the user's own samples only `with_texts`."""
        hidden = {"expected": None, "answer": None, "original": None}
        return {
            "server": self.server.label,
            "url": self.endpoint.url,
            "protocol": self.endpoint.dialect.name,
            "passed": self.passed,
            "asked": len(self.samples),
            "golden": self.of,
            "changed": sum(not each.same for each in self.samples),
            "largest_difference": self.largest_difference,
            "limit": self.limit,
            "p50_ms": self.p50,
            "build_p50_ms": self.build_p50,
            "expected": "the archive's own texts" if self.by_own_texts else "the original's answers",
            "problems": list(self.problems),
            "notes": list(self.notes),
            "different": [{**asdict(e), **(hidden if e.own and not with_texts else {})} for e in self.different],
        }


def verify_server(
    server: AskedServer, archive: Path, seconds: float = SECONDS, option: str = "--seconds"
) -> Verification:
    """Replay the golden set of `archive`; raises ServerError if the server could not be asked, ArchiveError without a set.

    After `seconds`, which `option` gives, no more samples are asked; a note says so.
    """
    with proof_of(archive) as proof:
        endpoint = _endpoint(server, proof)
        problems, notes = _identity(server, endpoint, proof)
        samples: List[VerifiedSample] = []
        deadline = time.monotonic() + seconds
        for number, sample in enumerate(proof.golden.samples, 1):
            if samples and time.monotonic() > deadline:
                notes.append(
                    f"the last {len(proof.golden.samples) - len(samples)} samples were not asked: {option} was over"
                )
                break
            samples.append(_verified(server, endpoint, proof.task, number, sample))
        limit = max(LIMITS[proof.manifest.dtype].difference, proof.golden.largest_difference or 0.0)
        problems += _differences(samples, proof, limit)
        return Verification(
            server,
            endpoint,
            len(proof.golden.samples),
            tuple(samples),
            limit,
            tuple(problems),
            tuple(notes),
            proof.p50,
            _by_own_texts(proof),
        )


def _by_own_texts(proof: Proof) -> bool:
    """Return whether a lower precision writes texts: the gate judged it along the original's, which a server does not show.
    So it has to write what the archive wrote; if it ran at its build."""
    ran = proof.golden.largest_difference is not None
    return bool(proof.task.loop and LIMITS[proof.manifest.dtype].changed and ran)


def _endpoint(server: AskedServer, proof: Proof) -> SpokenAt:
    """Return where the server answers the first sample in the task's form; this request warms it up, too."""
    sample = proof.golden.samples[0]
    tried: List[str] = []
    candidates = [SpokenAt(NATIVE, server.url)] if server.ours else places(server.url, proof.manifest)
    for endpoint in candidates:
        status, answer = server.ask(endpoint.url, endpoint.dialect.write(sample, proof.task))
        try:
            if status == 200:
                proof.task.same(endpoint.answer(answer, sample, proof.task), sample.expected)
                return endpoint
            tried.append(
                f"{endpoint.dialect.name} at {endpoint.url}: {status}, {shortened(client.error_words(answer), 120)}"
            )
        except _OTHER_FORM:
            tried.append(
                f"{endpoint.dialect.name} at {endpoint.url}: not the form of an answer to {proof.manifest.task}"
            )
    raise ServerError(f"{server.label} answers in no protocol that is known here:\n  " + "\n  ".join(tried))


def _identity(server: AskedServer, endpoint: SpokenAt, proof: Proof) -> Tuple[List[str], List[str]]:
    """Return what is wrong with the server's version and contents, and what it does not say."""
    manifest = proof.manifest
    status, told = server.ask(metadata_url(endpoint.url, manifest))
    if status == 200 and isinstance(told, dict) and isinstance(told.get("versions"), list):
        problems = []
        if manifest.version not in told["versions"]:
            versions = ", ".join(map(str, told["versions"]))
            problems.append(f"it serves version {versions}, and the golden set is that of version {manifest.version}")
        contents = dict(told.get("parameters") or {}).get("contents")
        if contents is None:
            return problems, ["the server does not say which archive it runs: its hash was not compared"]
        if contents != manifest.contents:
            problems.append(
                f"it runs another archive than the golden set's: its contents are {str(contents)[:12]}…, not "
                f"{manifest.contents[:12]}…"
            )
        return problems, []
    if server.ours:
        return [f"it does not serve version {manifest.version} of {manifest.name}, the golden set's ({status})"], []
    return [], ["the server describes no model as V2 does: version and hash were not compared"]


def _verified(server: AskedServer, endpoint: SpokenAt, task: Task, number: int, sample: GoldenSample) -> VerifiedSample:
    body = endpoint.dialect.write(sample, task)
    started = time.perf_counter()
    status, answer = server.ask(endpoint.url, body)
    milliseconds = 1000 * (time.perf_counter() - started)

    def outcome(same: bool, difference: Optional[float], answer: Any, error: str = "") -> VerifiedSample:
        original = sample.answer if sample.written is not None else None
        return VerifiedSample(
            number, sample.own, same, difference, sample.expected, answer, error, milliseconds, original
        )

    if status != 200:
        return outcome(False, None, None, f"{status}: {shortened(client.error_words(answer), 200)}")
    try:
        value = endpoint.answer(answer, sample, task)
        same = task.same(value, sample.expected)
    except _OTHER_FORM:
        return outcome(False, None, answer, "the answer has another form")
    return outcome(same, score_difference(value, sample.expected) if same else None, value)


def _differences(samples: List[VerifiedSample], proof: Proof, limit: float) -> List[str]:
    """Return which samples were not answered, and what the gate's rule for the dtype says of the answers to the others."""
    problems = []
    failed = [each for each in samples if each.error]
    if failed:
        reasons = some(list(dict.fromkeys(each.error for each in failed)))
        problems.append(f"{len(failed)} of {len(samples)} samples were not answered: {reasons}")
    samples = [each for each in samples if not each.error]
    changed = [each.number for each in samples if not each.same]
    if _by_own_texts(proof):
        wrote = f"what the archive wrote at its build ({proof.manifest.dtype})"
        return [*problems, f"{len(changed)} of {len(samples)} texts differ from {wrote}"] if changed else problems
    judged = Findings(
        LIMITS[proof.manifest.dtype],
        answers=len(samples),
        own_answers=sum(each.own for each in samples),
        changed=changed,
        own_changed=sum(each.own and not each.same for each in samples),
    )
    if judged.too_many_changed:
        ran = proof.golden.largest_difference is not None
        unknown = "" if ran else "; the archive did not run at its build, so its own answers are not known"
        problems.append(
            f"{len(changed)} of {len(samples)} answers differ from the original's ({proof.manifest.dtype}){unknown}"
        )
    over = [each for each in samples if each.is_over(limit)]
    if over:
        largest = max(each.difference or 0.0 for each in over)
        problems.append(f"the scores of {len(over)} answers are off by up to {largest:.1e} (limit {limit:.1e})")
    return problems
