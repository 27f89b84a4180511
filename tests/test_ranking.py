"""Answers are ordered by the model's own outputs, even if a function maps them to one score."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Dict, List, Type

import numpy as np
import pytest
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays
from traceserve_runtime.tasks.contract import Request, Task
from traceserve_runtime.tasks.fill_mask import FillMask
from traceserve_runtime.tasks.sequence_classification import SequenceClassification
from traceserve_runtime.tasks.text_ranking import TextRanking
from traceserve_runtime.tasks.zero_shot_classification import ZeroShotClassification
from traceserve_runtime.texts.rows import Encoded
from traceserve_runtime.texts.tokenization import TextTokenizer

# float32's sigmoid is 1 for all of these.
LARGE = [17.2, 18.0, 17.4, 17.9, 17.6, 17.8]
BEST_FIRST = [1, 3, 5, 4, 2, 0]


def decode(
    kind: Type[Task], artifact: Path, request: Request, outputs: List[List[Any]], facts: Dict[str, Any], **options: Any
) -> Any:
    manifest = dataclasses.replace(
        Manifest.read(artifact), task=kind.name, facts=facts, parameters={"function_to_apply": "sigmoid"}, **options
    )
    task = kind(manifest, TextTokenizer(artifact, manifest.tokenizer, manifest.max_length, manifest.max_rows))
    [encoded] = task.encode([request])
    assert isinstance(encoded, Encoded)
    arrays: List[Arrays] = [{"logits": np.array(output, dtype=np.float32)} for output in outputs]
    if len(arrays) < len(encoded.rows):
        arrays *= len(encoded.rows)
    return task.answer(request, encoded.rows, arrays)[0]


@pytest.mark.parametrize("function", ["sigmoid", "none"])
def test_documents(function: str, artifact: Path) -> None:
    request = Request({"query": "a", "documents": list("bcdefg")}, {"sort": True, "function_to_apply": function})
    outputs = [[value] for value in LARGE]
    answer = decode(TextRanking, artifact, request, outputs, {})
    assert [item["index"] for item in answer] == BEST_FIRST
    if function == "sigmoid":
        assert {item["score"] for item in answer} == {1.0}  # float32's, which cannot distinguish them
    top = decode(TextRanking, artifact, Request(request.inputs, {**request.parameters, "top_k": 2}), outputs, {})
    assert top == answer[:2]
    unsorted = decode(TextRanking, artifact, Request(request.inputs, {"function_to_apply": function}), outputs, {})
    assert [item["index"] for item in unsorted] == list(range(6))


def score_list(*scores: float) -> List[Dict[str, float]]:
    return [{"index": i, "score": score} for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "others", "same"),
    [
        ([0.9, 0.1], [0.94, 0.06], True),  # as int8 moves them
        ([0.9, 0.1], [0.8, 0.1], False),
        ([3e-6, 2e-6, 1e-6], [3.1e-6, 1.9e-6, 1.1e-6], True),
        ([3e-6, 2e-6, 1e-6], [2e-6, 3e-6, 1e-6], False),  # another order, though all are near 0
        ([3e-6, 2e-6, 1e-6], [2e-6, 2e-6, 2e-6], False),
        ([3e-6, 2.9e-6, 1e-6], [2.9e-6, 3e-6, 1e-6], True),  # a near tie
        ([0.99999, 0.9999], [0.9999, 0.99999], False),
        ([1.0, 1.0, 0.5], [1.0, 1.0, 0.5], True),
        ([-11.2, -11.4, 8.0], [-11.3, -11.31, 8.0], True),  # no sigmoids
        ([-11.2, -11.4, 8.0], [-11.3, -11.29, 8.0], False),
        ([-11.2, 0.5, 8.0], [-11.7, 0.69, 8.3], True),
        ([-11.2, 0.5, 8.0], [-11.2, 0.8, 8.0], False),
        ([0.9, 0.1], [0.9], False),
    ],
)
def test_what_counts_as_the_same_ranking(scores: List[float], others: List[float], same: bool, artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    task = TextRanking(manifest, TextTokenizer(artifact, manifest.tokenizer, manifest.max_length, manifest.max_rows))
    assert task.same(score_list(*scores), score_list(*others)) is same
    assert task.same(score_list(*others), score_list(*scores)) is same


def test_an_exchange_of_near_ties_in_the_last_position_is_no_change(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    task = TextRanking(manifest, TextTokenizer(artifact, manifest.tokenizer, manifest.max_length, manifest.max_rows))
    first = {"index": 0, "score": 0.9}
    near, other, far = ({"index": 1, "score": 0.5}, {"index": 2, "score": 0.501}, {"index": 2, "score": 0.6})
    assert task.same([first, near], [first, other])
    assert not task.same([first, near], [first, far])


def test_equal_documents_stay_in_their_order(artifact: Path) -> None:
    request = Request({"query": "a", "documents": list("bcd")}, {"sort": True})
    answer = decode(TextRanking, artifact, request, [[1.0], [2.0], [1.0]], {})
    assert [item["index"] for item in answer] == [1, 0, 2]


@pytest.mark.parametrize("function, values", [("sigmoid", LARGE), ("softmax", [-150.0, -148.0, 0.0]), ("none", LARGE)])
def test_labels(function: str, values: List[float], artifact: Path) -> None:
    labels = tuple(f"label {i}" for i in range(len(values)))
    order = sorted(range(len(values)), key=lambda i: -values[i])
    parameters = {"function_to_apply": function}
    ranked = decode(
        SequenceClassification,
        artifact,
        Request({"text": "a"}, {**parameters, "top_k": None}),
        [values],
        {},
        labels=labels,
    )
    assert [item["label"] for item in ranked] == [labels[i] for i in order]
    best = decode(SequenceClassification, artifact, Request({"text": "a"}, parameters), [values], {}, labels=labels)
    assert best == ranked[0]


@pytest.mark.parametrize("multi_label", [True, False])
def test_candidate_labels(multi_label: bool, artifact: Path) -> None:
    candidates = list("bcdefg")
    values = LARGE if multi_label else [value * 50 - 900 for value in LARGE]  # the softmax is 0 except for the best
    request = Request({"text": "a"}, {"candidate_labels": candidates, "multi_label": multi_label})
    outputs = [[0.0, 0.0, value] for value in values]
    answer = decode(ZeroShotClassification, artifact, request, outputs, {"contradiction": 0, "entailment": 2})
    assert answer["labels"] == [candidates[i] for i in BEST_FIRST]


def test_masked_tokens(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    tokenizer = TextTokenizer(artifact, manifest.tokenizer, manifest.max_length, manifest.max_rows)
    mask = tokenizer.token_id("[MASK]")
    logits = np.full((1, tokenizer.vocabulary_size), -400.0)
    logits[0, [30, 20, 25, 22]] = [0.0, -150.0, -140.0, -160.0]
    facts = {"mask_token": "[MASK]", "mask_id": mask, "pad_id": 0}
    answer = decode(FillMask, artifact, Request({"text": "a [MASK]"}, {"top_k": 4}), [logits.tolist()], facts)
    assert [item["token"] for item in answer] == [30, 25, 20, 22]
    assert [item["score"] for item in answer] == [1.0, 0.0, 0.0, 0.0]
