"""Every save mode × every task that it can write × any and fixed lengths: in float32 the answers equal the pipeline's.

A lower precision changes few answers of a real model; the run's summary reports how many. tests/equality.py counts them
on more models and texts, and for int8.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest
import transformers
from conftest import SUMMARY, needs_native, run_export
from oracle import ANSWERS, ASKED, CASES, TEXTS, answers, assert_equal, generated, written
from traceserve.building.checkpoints import demo
from traceserve.building.config import formats
from traceserve.building.config.save_modes import SAVE_MODES
from traceserve.building.gate import verification
from traceserve.building.gate.findings import LIMITS
from traceserve.building.samples import OwnSamples
from traceserve.building.writers import WRITERS, aot_inductor
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Request

WRITING = {"text_generation": "llama", "text2text_generation": "t5"}


def combinations() -> List[Any]:
    """Return the possible combinations: loops have no fixed lengths."""
    found: List[Tuple[str, str, str]] = []
    for save_mode in WRITERS:
        for name, task in TASKS.items():
            if formats.refusal(save_mode, "cpu", "float32", task) is None:
                found.append((save_mode, name, "auto"))
                if not task.loop and (save_mode != "aot_inductor" or name == "question_answering"):
                    found.append((save_mode, name, "fixed"))  # a compiler takes ten seconds, and two outputs say it all
    return [pytest.param(*each, id="-".join(each)) for each in found]


@pytest.fixture(scope="module")
def original(checkpoint: Callable[..., Path]) -> Callable[[str], Tuple[Path, Any]]:
    """A task's tiny checkpoint, and transformers' answers to its requests, each made once."""

    @lru_cache(maxsize=None)
    def make(task: str) -> Tuple[Path, Any]:
        kind = TASKS[task]
        options = {**CASES[task].options, "num_hidden_layers": 1} if task in CASES else {}  # compilers are slow
        source = checkpoint(WRITING.get(task, "bert"), kind.auto_model, **options)
        if kind.loop:
            model = getattr(transformers, kind.auto_model).from_pretrained(source).eval()
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            return source, lambda request: generated(model, tokenizer, request.inputs["text"], **request.parameters)
        if task not in CASES:
            return source, None
        pipeline = transformers.pipeline(kind.pipeline, model=str(source), device="cpu")
        return source, lambda request: CASES[task].ask(pipeline, request)

    return make


@pytest.mark.parametrize("save_mode, task, lengths", combinations())
@pytest.mark.combinations
def test_equals_the_pipeline(
    save_mode: str,
    task: str,
    lengths: str,
    original: Callable[[str], Tuple[Path, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, ask = original(task)
    monkeypatch.setattr(verification, "TEXTS", verification.TEXTS[:4])  # the gate has its own tests
    monkeypatch.setitem(aot_inductor._CONFIGS, "aot_inductor.compile_wrapper_opt_level", "O0")  # half the time
    config = {"model_name": str(source), "task": task, "save_mode": save_mode, "sequence_lengths": lengths}
    run_export(tmp_path / "x", config)
    engine = Engine.load(tmp_path / "x")
    assert (engine.manifest.save_mode, engine.manifest.shapes.lengths) == (
        save_mode,
        None if lengths == "auto" else (engine.manifest.max_length,),
    )
    if task in WRITING:
        requests = [
            Request({"text": text}, {"max_new_tokens": 12, "num_beams": n}) for text in TEXTS[:6] for n in (1, 3)
        ]
        assert [written(value) for value in answers(engine, requests)] == [ask(request) for request in requests]
    elif ask is not None:
        requests = CASES[task].requests(engine)[::2]
        for got, request in zip(answers(engine, requests), requests):
            assert_equal(got, ask(request), 1e-4, 1e-4)
    else:  # transformers 5 has no pipeline for it: use that of transformers 4
        listed = list(ANSWERS["answers"]["bert"])[::4]
        for number, got in zip(listed, answers(engine, [ASKED[int(number)] for number in listed])):
            expected = [
                dict(zip(("score", "start", "end", "answer"), span)) for span in ANSWERS["answers"]["bert"][number]
            ]
            assert_equal(got, expected if len(expected) > 1 else expected[0], 1e-4, 1e-5)


def lower_precisions() -> List[Any]:
    """Return each save mode's dtypes below float32; not int8, whose search for layers takes minutes (see test_int8)."""
    kind = TASKS["sequence_classification"]
    found = [(mode, dtype) for mode in WRITERS for dtype in LIMITS if dtype not in ("float32", "int8")]
    found = [(mode, dtype) for mode, dtype in found if formats.refusal(mode, "cpu", dtype, kind) is None]
    return [pytest.param(mode, dtype, id=f"{mode}-{dtype}", marks=needs_native(dtype)) for mode, dtype in found]


@pytest.fixture(scope="module")
def fitted() -> Tuple[Path, List[str], List[str]]:
    """The demo's classifier, its sentences, and the pipeline's labels for them."""
    source = demo.train_demo(demo.NAME).folder
    texts = [text for _, text in OwnSamples.read(demo.DATA).lines]
    pipeline = transformers.pipeline("text-classification", model=str(source), device="cpu")
    return source, texts, [answer["label"] for answer in pipeline(texts)]


@pytest.mark.parametrize("save_mode, dtype", lower_precisions())
def test_a_lower_precision_changes_few_answers(
    save_mode: str,
    dtype: str,
    fitted: Tuple[Path, List[str], List[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    source, texts, labels = fitted
    monkeypatch.setattr(verification, "CORPUS", 32)  # texts of another kind than the model's
    config = {"model_name": str(source), "task": "sequence_classification", "save_mode": save_mode, "dtype": dtype}
    run_export(tmp_path / "x", {**config, "max_length": 64}, samples_file=demo.DATA, allow_drift=True)
    found = [answer["label"] for answer in answers(Engine.load(tmp_path / "x"), [Request({"text": t}) for t in texts])]
    changed = sum(got != label for got, label in zip(found, labels))
    record_property(SUMMARY, f"{save_mode} {dtype}: {changed} of {len(texts)} answers changed")
    assert changed <= LIMITS[dtype].changed_elsewhere * len(texts)


def test_every_save_mode_has_every_length(tmp_path: Path) -> None:
    """Otherwise the matrix would have unnoticed holes."""
    modes = {param.values[0] for param in combinations()}
    assert modes == {name for name, kind in SAVE_MODES.items() if "cpu" in kind.hardware}
    for mode in modes:
        assert {param.values[2] for param in combinations() if param.values[0] == mode} == {"auto", "fixed"}
