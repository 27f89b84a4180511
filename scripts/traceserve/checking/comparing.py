"""Compares two archives: what they say of themselves, their labels and tokenizers, and their answers to the same requests."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from traceserve_runtime import processor
from traceserve_runtime.engine import load_task
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.tasks.contract import Request, Task

from traceserve.archives import staging
from traceserve.archives.contents import unpack
from traceserve.building.gate.corpus import sentences
from traceserve.building.gate.drift import score_difference
from traceserve.building.gate.findings import LIMITS
from traceserve.building.gate.texts import TEXTS
from traceserve.building.progress import Progress
from traceserve.building.samples import OwnSamples
from traceserve.checking.answering import Answered, Told, ask_in_a_process
from traceserve.checking.free_form import check_free_form
from traceserve.errors import ArchiveError, some
from traceserve.machine import space

_SENTENCES = 64  # besides the gate's texts, if there are no samples of the user's
_WRITTEN = 12  # requests to a task that writes text
_LISTED = ("type", "vocab", "merges")  # of a tokenizer's model, compared by themselves
# What of a manifest is compared by itself, or says nothing of the model.
_APART = ("files", "receipt", "labels", "tokenizer", "name", "runtime")


@dataclass(frozen=True)
class FieldChange:
    """A value of both sides, as text; empty where there is none."""

    what: str
    one: str
    other: str


@dataclass(frozen=True)
class AnswerChange:
    """A request that the two answer otherwise."""

    number: int
    inputs: Mapping[str, Any]
    one: Any
    other: Any


@dataclass(frozen=True)
class Side:
    """What running one archive took."""

    path: str
    size: int
    p50_ms: float
    requests_per_second: float
    memory_mib: float


@dataclass(frozen=True)
class ArchiveComparison:
    """The differences of two archives; `drift` are those of scores where the answer is the same."""

    sides: Tuple[Side, Side]
    task: str
    threads: int
    own: bool  # whether the user's samples were asked
    fields: Tuple[FieldChange, ...]
    labels: Tuple[FieldChange, ...]
    tokenizer: Tuple[FieldChange, ...]
    asked: int
    changed: Tuple[AnswerChange, ...]
    moves: Tuple[Tuple[str, str, int], ...]  # from what to what, how often
    drift_mean: float
    drift_max: float
    limit: float
    refused: int = 0  # requests that both refused, which compare nothing

    @property
    def equal(self) -> bool:
        """Whether labels, tokenizers and answers are the same, and scores within the limit of their dtypes."""
        return not (self.labels or self.tokenizer or self.changed or not self.drift_max <= self.limit)

    @property
    def drift_in_words(self) -> str:
        """How far the scores of equal answers drift; or that there are none."""
        if self.asked <= len(self.changed) + self.refused:
            return "no scores are comparable"
        average, limit = f"{self.drift_mean:.1e} on average", f"limit {self.limit:.1e}"
        return f"scores of the others drift by {average}, {self.drift_max:.1e} at most ({limit})"

    def document(self) -> Dict[str, Any]:
        """Return it as JSON, with the texts of the changed answers."""
        return {**asdict(self), "equal": self.equal}


def compare_archives(
    one: Path, other: Path, samples: Optional[OwnSamples], threads: Optional[int], progress: Progress
) -> ArchiveComparison:
    """Compare two archives or artifacts, each run in a process of its own; raises ArchiveError for two of different tasks,
    and if no request was answered by both."""
    with staging.scratch() as scratch:
        folders = [_unpacked(path, scratch / side / path.stem) for side, path in (("a", one), ("b", other))]
        manifests = [Manifest.read(folder) for folder in folders]
        for manifest in manifests:
            check_free_form(manifest)
        if manifests[0].task != manifests[1].task:
            raise ArchiveError(
                f"{one} is a {manifests[0].task}, and {other} a {manifests[1].task}: they cannot be asked the same"
            )
        task = load_task(folders[0], manifests[0])
        requests = _requests(task, samples)
        count = threads or processor.cores()
        answered: List[Answered] = []
        for number, folder in enumerate(folders):
            progress(f"asking {(one, other)[number].name}", number, 2)
            answered.append(ask_in_a_process(folder, requests, count, scratch))
        refused = _refused_by_both(answered[0].answers, answered[1].answers)
        sides = [_side(path, each) for path, each in zip((one, other), answered)]
        changed, drift = _compared(task, requests, answered[0].answers, answered[1].answers)
        return ArchiveComparison(
            (sides[0], sides[1]),
            manifests[0].task,
            count,
            samples is not None,
            tuple(_fields(*manifests)),
            tuple(_labels(*manifests)),
            tuple(_tokenizers(folders, manifests)),
            len(requests),
            tuple(changed),
            moves_of(changed),
            sum(drift) / max(1, len(drift)),
            max(drift, default=0.0),
            max(LIMITS[manifest.dtype].difference for manifest in manifests),
            refused,
        )


def _unpacked(path: Path, folder: Path) -> Path:
    if path.is_dir():
        return path
    folder.parent.mkdir(parents=True)
    unpack(path, folder)
    return folder


def _requests(task: Task, samples: Optional[OwnSamples]) -> Sequence[Request]:
    """Return the user's requests, or built-in ones; only those with one right answer."""
    if samples is not None:
        found: Sequence[Request] = samples.requests(type(task))
    else:
        found = task.from_texts((*TEXTS, *sentences(_SENTENCES)))[: _WRITTEN if task.loop else None]
    found = [request for request in found if task.repeatable(request) and not task.streams(request)]
    if not found:
        raise ArchiveError("every sample asks for sampled or streamed text, which has no answer to compare")
    return found


def _refused_by_both(one: Sequence[Told], other: Sequence[Told]) -> int:
    """Return how many requests neither answered; raises ArchiveError if none was answered by both."""
    if all(first.error or second.error for first, second in zip(one, other)):
        errors = "; ".join(some(sorted({told.error for told in side if told.error})) or "none" for side in (one, other))
        raise ArchiveError(
            f"none of the {len(one)} requests was answered by both archives, so there is nothing to compare (their "
            f"errors: {errors}); ask others with --samples FILE"
        )
    return sum(bool(first.error and second.error) for first, second in zip(one, other))


def _side(path: Path, answered: Answered) -> Side:
    count = sum(not told.error for told in answered.answers)
    return Side(str(path), space.size([path]), answered.p50_ms, count / answered.seconds, answered.memory_mib)


def _compared(
    task: Task, requests: Sequence[Request], one: Sequence[Told], other: Sequence[Told]
) -> Tuple[List[AnswerChange], List[float]]:
    """Return the changed answers, and the differences of the scores of all others."""
    changed, drift = [], []
    for number, (request, first, second) in enumerate(zip(requests, one, other), 1):
        if first.error or second.error:
            if first.error != second.error:
                values = [told.error or told.value for told in (first, second)]
                changed.append(AnswerChange(number, dict(request.inputs), *values))
        elif same_meaning(task, first.value, second.value):
            drift.append(score_difference(second.value, first.value))
        else:
            changed.append(AnswerChange(number, dict(request.inputs), first.value, second.value))
    return changed, drift


def same_meaning(task: Task, one: Any, other: Any) -> bool:
    """Return whether the answers mean the same; other labels may not even be comparable."""
    try:
        return task.same(one, other)
    except (LookupError, ValueError):
        return False


def _fields(one: Manifest, other: Manifest) -> Iterator[FieldChange]:
    """Yield what differs in the manifests; names of files and hashes are not shown."""
    documents = [_flat(asdict(manifest)) for manifest in (one, other)]
    for key in dict.fromkeys([*documents[0], *documents[1]]):
        values = [json.dumps(document[key]) if key in document else "" for document in documents]
        if values[0] != values[1] and key.split(".")[0] not in _APART and not key.startswith("source.files"):
            yield FieldChange(key, *values)
    along = [_along(manifest) for manifest in (one, other)]
    if any(along):
        yield FieldChange("tokens changed along the original's texts", along[0], along[1])
    weights = [manifest.files[manifest.model_file][:12] for manifest in (one, other)]
    if weights[0] != weights[1]:
        yield FieldChange("model file's SHA-256", *weights)


def _along(manifest: Manifest) -> str:
    """Return how a lower precision's texts were judged at the build, since a changed text does not tell how near it is."""
    told = manifest.receipt.get("along_texts")
    return f"{told['tokens_changed']} of {told['tokens']}, {told['near_ties']} near ties" if told else ""


def _flat(value: Mapping[str, Any], before: str = "") -> Dict[str, Any]:
    found: Dict[str, Any] = {}
    for key, item in value.items():
        found.update(_flat(item, f"{before}{key}.") if isinstance(item, dict) and item else {f"{before}{key}": item})
    return found


def _labels(one: Manifest, other: Manifest) -> Iterator[FieldChange]:
    counts = Counter(one.labels), Counter(other.labels)  # a label may stand there several times
    gone, new = (list((a - b).elements()) for a, b in (counts, counts[::-1]))
    if gone or new:
        yield FieldChange("only in one", ", ".join(gone), ", ".join(new))
    elif one.labels != other.labels:
        position = next(i for i, (a, b) in enumerate(zip(one.labels, other.labels)) if a != b)
        yield FieldChange(f"order, from position {position}", one.labels[position], other.labels[position])


def _tokenizers(folders: Sequence[Path], manifests: Sequence[Manifest]) -> Iterator[FieldChange]:
    """Yield what differs in the tokenizers, by content."""
    facts = [_tokenizer_facts(folder, manifest) for folder, manifest in zip(folders, manifests)]
    for key in dict.fromkeys([*facts[0], *facts[1]]):
        values = [facts[i].get(key, "") for i in (0, 1)]
        if values[0] != values[1]:
            yield FieldChange(key, *values)
    words = [_vocabulary(folder, manifest) for folder, manifest in zip(folders, manifests)]
    if words[0] != words[1]:
        yield FieldChange("tokens only in one", *(some(sorted(words[i] - words[1 - i]), 5) for i in (0, 1)))


def _tokenizer_facts(folder: Path, manifest: Manifest) -> Dict[str, str]:
    document = json.loads((folder / manifest.tokenizer.file).read_text(encoding="utf-8"))
    model = document.get("model") or {}
    facts = {name: value for name, value in asdict(manifest.tokenizer).items() if name not in ("file", "pieces")}
    parts = {name: document.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    counts = {
        "kind": model.get("type"),
        "vocabulary": len(model.get("vocab") or ()),
        "merges": _counted([m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or ()]),
        "added tokens": _counted(document.get("added_tokens") or ()),
    }
    # An older version of tokenizers leaves out what a newer one writes as null, false or "".
    rest = {
        f"model's {key}": value for key, value in model.items() if key not in _LISTED and (value or type(value) is int)
    }
    found = {**counts, **rest, **parts, **facts}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in found.items()}


def _counted(items: Sequence[Any]) -> str:
    """Return the number of items, and the beginning of a hash of them in this order."""
    return f"{len(items)}, SHA-256 {hashlib.sha256(json.dumps(items).encode()).hexdigest()[:12]}"


def _vocabulary(folder: Path, manifest: Manifest) -> Set[str]:
    """Return each token with its id, so that an exchange counts too, and with its score if it has one."""
    model = json.loads((folder / manifest.tokenizer.file).read_text(encoding="utf-8")).get("model") or {}
    vocab = model.get("vocab") or {}
    pairs = (
        vocab.items()
        if isinstance(vocab, dict)
        else ((item[0], f"{i}, score {item[1]}") for i, item in enumerate(vocab))
    )
    return {f"{token}={number}" for token, number in pairs}


def moves_of(changed: Sequence[AnswerChange]) -> Tuple[Tuple[str, str, int], ...]:
    """Count what moved to what: labels, and entities or spans that only one side finds."""
    counted: Counter[Tuple[str, str]] = Counter()
    for each in changed:
        one, other = _things(each.one), _things(each.other)
        gone, new = [x for x in one if x not in other], [x for x in other if x not in one]
        for i in range(max(len(gone), len(new))):
            counted[gone[i] if i < len(gone) else "nothing", new[i] if i < len(new) else "nothing"] += 1
    return tuple((one, other, count) for (one, other), count in counted.most_common())


def _things(answer: Any) -> List[str]:
    """Return what an answer says, without its numbers and texts: a label, or its entities; empty for texts and vectors."""
    if isinstance(answer, str):
        return [answer]  # an error's kind
    if isinstance(answer, dict) and "labels" in answer:
        return [str(answer["labels"][0])]
    if isinstance(answer, list) and answer and all(isinstance(item, dict) for item in answer):
        if "start" in answer[0]:
            names = [item.get("entity_group", item.get("entity", "answer")) for item in answer]
            return [f"{name} {item['start']}–{item['end']}" for name, item in zip(names, answer)]
        return [str(answer[0][key]) for key in ("label", "token_str") if key in answer[0]][:1]
    return []
