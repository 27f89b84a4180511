"""Each task's test requests, the equivalent pipeline calls, and the comparison of answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import numpy as np
import pytest
from traceserve.building.gate.texts import SENTENCES
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks.contract import Answer, Request

TEXTS = [text for text in SENTENCES if text]


def names(*labels: str) -> Dict[str, Any]:
    """Return the part of a configuration that names labels."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


COLORS = names("red", "green", "blue")


def rounded(value: Any, absolute: float) -> Any:
    """Return an answer whose numbers leave out what padding changes of their last digits."""
    if isinstance(value, float):
        return pytest.approx(value, abs=absolute)
    if isinstance(value, dict):
        return {key: rounded(item, absolute) for key, item in value.items()}
    return [rounded(item, absolute) for item in value] if isinstance(value, list) else value


# Each task's requests, and the equivalent pipeline calls.


def ask_classifier(pipeline: Any, request: Request) -> Any:
    return pipeline([dict(request.inputs)], **request.parameters)[0]


def ask_for_features(pipeline: Any, request: Request) -> Any:
    return pipeline(request.inputs["text"])


def ask_with_parameters(pipeline: Any, request: Request) -> Any:
    return pipeline(request.inputs["text"], **request.parameters)


def ask_ranker(pipeline: Any, request: Request) -> Any:
    """Score with the pipeline; the parameters decide the rest."""
    query, documents, parameters = request.inputs["query"], request.inputs["documents"], request.parameters
    function = {key: value for key, value in parameters.items() if key == "function_to_apply"}
    scores = [pipeline({"text": query, "text_pair": document}, **function)["score"] for document in documents]
    ranked = list(range(len(scores)))
    if parameters.get("sort") or "top_k" in parameters:
        ranked.sort(key=lambda i: -scores[i])
    told = {"text": documents} if parameters.get("return_documents") else {}
    return [
        {"index": i, "score": scores[i], **{key: values[i] for key, values in told.items()}}
        for i in ranked[: parameters.get("top_k")]
    ]


def each_text(*parameters: Dict[str, Any]) -> Callable[[Engine], List[Request]]:
    return lambda engine: [Request({"text": text}, own) for text in TEXTS for own in parameters]


def classified(engine: Engine) -> List[Request]:
    pairs = [{"text": one, "text_pair": two} for one, two in zip(TEXTS[::3], TEXTS[1::3])]
    return [Request({"text": text}) for text in TEXTS] + [Request(pair, {"top_k": 2}) for pair in pairs]


def masked(engine: Engine) -> List[Request]:
    """Mask one word per text, in every third one another too; all parameters in turn."""
    parameters: List[Dict[str, Any]] = [
        {},
        {"top_k": 1},
        {"top_k": 12},
        {"targets": "train"},
        {"targets": ["the", "Train", "antidisestablishmentarianism", "꧁"]},
        {"targets": ["the", "a", "coast", "the"], "top_k": 2},
    ]
    requests = engine.task.from_texts(TEXTS)
    return [Request(r.inputs, parameters[(i + k) % 6]) for i, r in enumerate(requests) for k in (0, 1)]


def judged(engine: Engine) -> List[Request]:
    labels = ["a question", "travel", "shopping"]
    parameters: List[Dict[str, Any]] = [
        {"candidate_labels": labels},
        {"candidate_labels": labels, "multi_label": True},
        {"candidate_labels": "travel"},
        {"candidate_labels": ["travel"], "multi_label": True},
        {"candidate_labels": "travel , shopping,, Größe 👍🏽,", "hypothesis_template": "Das ist {}!"},
        {"candidate_labels": [" travel ", "shopping", " "], "hypothesis_template": "{}"},
    ]
    return [Request({"text": text}, parameters[(i + k) % 6]) for i, text in enumerate(TEXTS) for k in (0, 1)]


def ranked(engine: Engine) -> List[Request]:
    parameters: List[Dict[str, Any]] = [
        {},
        {"sort": True},
        {"top_k": 2},
        {"return_documents": True, "function_to_apply": "none"},
        {"function_to_apply": "sigmoid", "top_k": 50, "return_documents": True},
    ]
    return [
        Request({"query": text, "documents": [*TEXTS[i + 1 : i + 5], ""]}, parameters[i % 5])
        for i, text in enumerate(TEXTS)
    ]


class Case(NamedTuple):
    """A task's comparison with its pipeline."""

    options: Dict[str, Any]  # for its checkpoints' configuration
    requests: Callable[[Engine], List[Request]]
    ask: Callable[[Any, Request], Any]  # returns the pipeline's answer


STRATEGIES = ("none", "simple", "first", "average", "max")
CASES: Dict[str, Case] = {
    "sequence_classification": Case(COLORS, classified, ask_classifier),
    "token_classification": Case(
        names("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
        each_text(
            *({"aggregation_strategy": strategy} for strategy in STRATEGIES),
            {"ignore_labels": []},
            {"aggregation_strategy": "simple", "ignore_labels": ["PER"]},
            {"aggregation_strategy": "max", "ignore_labels": ["O", "LOC"]},
        ),
        ask_with_parameters,
    ),
    "fill_mask": Case({}, masked, ask_with_parameters),
    "zero_shot_classification": Case(names("contradiction", "neutral", "entailment"), judged, ask_with_parameters),
    "text_ranking": Case({"num_labels": 1}, ranked, ask_ranker),
    "feature_extraction": Case({}, each_text({}), ask_for_features),
}
# Answers of this task's pipeline, which transformers 5 dropped.
ANSWERS = json.loads((Path(__file__).parent / "data" / "question_answering.json").read_text(encoding="utf-8"))
ASKED = [
    Request({"question": ANSWERS["texts"][question], "context": ANSWERS["texts"][context]}, parameters)
    for question, context, parameters in ANSWERS["requests"]
]


def answers(engine: Engine, requests: Sequence[Request]) -> List[Any]:
    results = engine.answer(requests)
    for result in results:
        assert isinstance(result, Answer), result
    return [result.value for result in results if isinstance(result, Answer)]


def assert_equal(answer: Any, expected: Any, relative: float = 1e-4, absolute: float = 1e-5) -> None:
    """The one assertion: equal structure, keys, order and words; numbers within the tolerance."""
    if isinstance(expected, dict):
        assert isinstance(answer, dict) and list(answer) == list(expected)
        for key in expected:
            assert_equal(answer[key], expected[key], relative, absolute)
    elif isinstance(expected, list) and expected and isinstance(expected[0], float):
        np.testing.assert_allclose(np.asarray(answer), np.asarray(expected), rtol=relative, atol=absolute)
    elif isinstance(expected, list):
        assert isinstance(answer, list) and len(answer) == len(expected)
        for one, other in zip(answer, expected):
            assert_equal(one, other, relative, absolute)
    elif isinstance(expected, (float, np.floating)):
        assert type(answer) is float and math.isclose(answer, expected, rel_tol=relative, abs_tol=absolute)
    else:
        assert type(answer) is type(expected) and answer == expected


def written(value: Any) -> str:
    """Return the text in an answer of either writing task."""
    text: str = (value[0] if isinstance(value, list) else value)["generated_text"]
    return text


def generated(model: Any, tokenizer: Any, text: str, **options: Any) -> str:
    """Return the text of transformers' own `generate` for one text alone, in an answer's format."""
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    options = {"do_sample": False, "max_new_tokens": 20, **options}
    if "stop_strings" in options:
        options["tokenizer"] = tokenizer
    ids = model.generate(**inputs, **options)[0]
    if model.config.is_encoder_decoder:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text + str(tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
