"""Builds archives for a GPU through the gate, and compares their answers there with the CPU's."""

from __future__ import annotations

import time
import traceback
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import models
from oracle import CASES
from traceserve.building.config import formats
from traceserve.building.config.parsing import LoadedConfig, parse_config
from traceserve.building.export import export
from traceserve.building.exported import Exported
from traceserve.building.gate import verification
from traceserve.building.gate.texts import SENTENCES
from traceserve.building.gate_options import GateOptions
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer

# Each task at least once; the families differ in their masks and positions.
ASKED = (
    ("bert", "sequence_classification"),
    ("distilbert", "question_answering"),
    ("roberta", "fill_mask"),
    ("deberta-v2", "token_classification"),
    ("modernbert", "zero_shot_classification"),
    ("mpnet", "feature_extraction"),
    ("xlm-roberta", "text_ranking"),
    ("gpt2", "text_generation"),
    ("llama", "text_generation"),
    ("bart", "text2text_generation"),
    ("t5", "text2text_generation"),
)
TEXTS = [text for text in SENTENCES if text][:24]


class Job(NamedTuple):
    """The archives of one process."""

    architecture: str
    task: str
    save_mode: str
    device: str
    folder: str


class Outcome(NamedTuple):
    """One archive: the gate's measurements, and how many of its answers on the device differ from float32's on the
    CPU."""

    what: str
    dtype: str
    gate: Dict[str, Any]
    asked: int
    changed: int
    seconds: float
    error: str = ""

    @property
    def passed(self) -> bool:
        """In float32 no answer changes. In a lower precision the outputs are within the gate's limits: many answers of
        random
        models are near ties."""
        if self.error or (self.dtype == "float32" and self.changed):
            return False
        return bool(self.gate["largest_difference"] <= self.gate["limits"]["difference"])


def jobs(device: str, folder: Path, few: bool) -> List[Job]:
    """Return all of them, or one run and one loop for a rehearsal."""
    asked = [ASKED[0], ASKED[8]] if few else ASKED
    torchscript = [Job(*each, "torchscript", device, str(folder)) for each in asked]
    return torchscript if few else [*torchscript, *(Job(*ASKED[i], "pretrained", device, str(folder)) for i in (0, 8))]


def run(job: Job) -> Tuple[Job, List[Outcome]]:
    """Build the archive in each of its task's dtypes on a GPU, and query it."""
    source = _checkpoint(job)
    expected: List[Any] = []
    outcomes: List[Outcome] = []
    what = f"{job.architecture} {job.task} {job.save_mode}"
    for dtype in formats.dtypes(job.save_mode, "gpu", TASKS[job.task])[1:]:
        began = time.perf_counter()
        try:
            folder = Path(job.folder, "artifacts", f"{what} {dtype}".replace(" ", "-"))
            exported = build(source, job.task, job.save_mode, dtype, folder, max_length=96)
            if not expected:  # float32 comes first
                expected = _answers(Engine.load(folder, "cpu"))
            engine = Engine.load(folder, job.device)
            got = _answers(engine)
            changed = sum(not engine.task.same(one, other) for one, other in zip(got, expected))
            gate = exported.manifest.receipt
            outcomes.append(Outcome(what, dtype, gate, len(got), changed, time.perf_counter() - began))
        except Exception:  # each failure is a row of the report
            reason = traceback.format_exc(limit=-3)
            outcomes.append(Outcome(what, dtype, {}, 0, 0, time.perf_counter() - began, reason))
    return job, outcomes


@contextmanager
def few_samples() -> Iterator[None]:
    """Give the gate few sentences: for models that are only timed."""
    texts, corpus = verification.TEXTS, verification.CORPUS
    verification.TEXTS, verification.CORPUS = texts[:6], 0  # type: ignore[misc]
    try:
        yield
    finally:
        verification.TEXTS, verification.CORPUS = texts, corpus  # type: ignore[misc]


def build(source: Path, task: str, save_mode: str, dtype: str, folder: Path, max_length: int) -> Exported:
    """An artifact for a GPU."""
    content = {"model_name": str(source), "task": task, "save_mode": save_mode, "dtype": dtype, "hardware": "gpu"}
    config, notes = parse_config({**content, "max_length": max_length})
    folder.mkdir(parents=True)
    gate = GateOptions(allow_drift=dtype != "float32")  # the models are random
    return export(LoadedConfig(config, folder, notes), folder.name, folder, lambda *_: None, gate)


def _checkpoint(job: Job) -> Path:
    own = dict(CASES[job.task].options) if job.task in CASES else {}
    folder = Path(job.folder, "checkpoints", f"{job.architecture}-{job.task}-{job.save_mode}")
    return models.make(folder, job.architecture, TASKS[job.task].auto_model, **own)


def _answers(engine: Engine) -> List[Any]:
    engine.warm_up()
    requests = engine.task.from_texts(TEXTS)
    answers = engine.answer([replace(r, parameters={**r.parameters, "long_inputs": "truncate"}) for r in requests])
    wrong = [answer for answer in answers if not isinstance(answer, Answer)]
    if wrong:
        raise wrong[0]  # type: ignore[misc]
    return [answer.value for answer in answers if isinstance(answer, Answer)]


def failures(outcomes: Sequence[Outcome]) -> List[str]:
    """Return each failure in one line."""
    return [f"{o.what} {o.dtype}: {o.error or f'{o.changed} of {o.asked} changed'}" for o in outcomes if not o.passed]
