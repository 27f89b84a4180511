"""Every protocol through the neutral core: its answers equal our own, its errors have its own format, nothing is
lost."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import logging
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple, cast

import numpy as np
import pytest
from conftest import left_behind, run_export
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.generation.loop import WritingLoop
from traceserve_runtime.mirror import Mirror
from traceserve_runtime.protocols import PROTOCOLS, binary_tensors, tei
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.events import Stops, cut_at_stop
from traceserve_runtime.service import Call, Reply, Service
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request
from traceserve_runtime.texts.tokenization import clean_up

LLAMA = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
TEXT, OTHER = "The boat is small.", "Bread is baked every morning."
PAIR = {"source_sentence": TEXT, "sentences": [OTHER]}
PROMPT = "Once upon a time"
CHAT = [{"role": "user", "content": "Tell me about the sea."}]
HUB = "unknown/None; hf_hub/2.4.0; python/3.11"


@pytest.fixture(scope="module")
def services(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Service]:
    """A tiny model of each tested task."""
    folder = tmp_path_factory.mktemp("service")
    own: Mapping[str, Tuple[str, Dict[str, Any]]] = {
        "sequence_classification": ("bert", {"id2label": {0: "red", 1: "green", 2: "blue"}}),
        "feature_extraction": ("bert", {}),
        "text_ranking": ("bert", {"num_labels": 1}),
        "text_generation": ("llama", {}),
        "zero_shot_classification": ("bert", {"id2label": {0: "contradiction", 1: "neutral", 2: "entailment"}}),
    }
    made = {}
    for name, (architecture, options) in own.items():
        source = checkpoint(architecture, TASKS[name].auto_model, **options)
        content = {"model_name": str(source), "task": name, "max_length": 64}
        run_export(folder / name, content, gradients=True)
        engine = Engine.load(folder / name)
        if name == "text_generation":
            engine.manifest.facts["chat_template"] = LLAMA
        made[name] = Service(engine, name)
    return made


def asked(body: Any, path: str = "", client: str = "", **headers: Any) -> Call:
    return Call({"body": body}, Headers("application/json", path=path, client=client, **headers))


def ask(service: Service, path: str, body: Any, status: int = 200, client: str = "") -> Any:
    [reply] = service.answer([asked(body, path, client)])
    assert reply.status == status, reply.body
    return json.loads(reply.body)


def stream(service: Service, path: str, body: Any, client: str = "") -> Tuple[str, Reply]:
    """Return everything that a stream's client gets, and the last reply."""
    pieces: List[bytes] = []
    [reply] = service.answer([asked(body, path, client)], send=lambda i, piece, headers: pieces.append(piece))
    assert reply.status == 200, reply.body
    return b"".join([*pieces, reply.body]).decode(), reply


def events(text: str) -> List[Any]:
    found = [line[5:].strip() for line in text.split("\n\n") if line]
    return [json.loads(each) for each in found if each != "[DONE]"]


# Answers


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_openais_embeddings_are_our_vectors(services: Dict[str, Service], form: Any) -> None:
    service = services["feature_extraction"]
    found = ask(service, "v1/embeddings", {"model": "any", "input": [TEXT, OTHER], "encoding_format": form})
    vectors = [each["embedding"] for each in found["data"]]
    if form == "base64":
        vectors = [np.frombuffer(base64.b64decode(vector), dtype="<f4").tolist() for vector in vectors]
    np.testing.assert_allclose(vectors, ask(service, "", {"inputs": [TEXT, OTHER], "parameters": {"pooling": "mean"}}))
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 4


def test_dimensions_are_the_first_numbers(services: Dict[str, Service]) -> None:
    service = services["feature_extraction"]
    whole = ask(service, "v1/embeddings", {"input": TEXT})["data"][0]["embedding"]
    assert ask(service, "v1/embeddings", {"input": TEXT, "dimensions": 5})["data"][0]["embedding"] == whole[:5]
    shorter = ask(service, "embed", {"inputs": TEXT, "dimensions": 5})[0]
    np.testing.assert_allclose(shorter, np.array(whole[:5]) / np.linalg.norm(whole[:5]), rtol=1e-5)
    error = ask(service, "v1/embeddings", {"input": TEXT, "dimensions": 5000}, 400)["error"]
    assert error["param"] == "dimensions" and "vectors have" in error["message"]


def test_texts_of_openai_are_ours(services: Dict[str, Service]) -> None:
    service = services["text_generation"]
    options = {"max_new_tokens": 9, "return_full_text": False}
    [wanted] = ask(service, "", {"text": PROMPT, "parameters": {**options, "details": True, "top_n_tokens": 2}})
    found = ask(service, "v1/completions", {"prompt": PROMPT, "max_tokens": 9, "logprobs": 2})
    [choice] = found["choices"]
    assert choice["text"] == wanted["generated_text"] and choice["finish_reason"] == "length"
    tokens = wanted["details"]["tokens"]
    assert choice["logprobs"]["token_logprobs"] == [token["logprob"] for token in tokens]
    # By their texts, which two parts of a character may share.
    assert all(1 <= len(each) <= 2 for each in choice["logprobs"]["top_logprobs"])
    assert found["usage"]["completion_tokens"] == 9
    [said] = ask(service, "", {"messages": CHAT, "parameters": options})
    chat = ask(service, "v1/chat/completions", {"messages": CHAT, "max_completion_tokens": 9, "logprobs": True})
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": said["generated_text"], "refusal": None}
    assert len(chat["choices"][0]["logprobs"]["content"]) == 9


def test_a_written_token_is_among_openais_top_ones(services: Dict[str, Service]) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "logprobs": 1, "temperature": 2.0, "seed": 3}
    [choice] = ask(services["text_generation"], "v1/completions", body)["choices"]
    found = choice["logprobs"]
    for text, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"]):
        assert top[text] == logprob and len(top) <= 2
    assert any(len(top) == 2 for top in found["top_logprobs"])


# As huggingface_hub's and openai's clients send back what they were answered.
BACK: Dict[str, Dict[str, Any]] = {
    "huggingface_hub": {"reasoning": None, "tool_call_id": None, "tool_calls": None},
    "openai": {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None},
    "langchain": {"tool_calls": [], "reasoning_content": ""},
    "others": {"annotations": [], "reasoning_content": None, "refusal": ""},
}


@pytest.mark.parametrize("client", BACK)
def test_a_conversation_goes_on_with_a_clients_own_message(services: Dict[str, Service], client: str) -> None:
    service, path = services["text_generation"], "v1/chat/completions"
    said = {"role": "assistant", "content": "It is wide."}

    def answered(message: Any, **more: Any) -> Any:
        return ask(service, path, {"messages": [*CHAT, message, CHAT[0]], "max_tokens": 5, **more})["choices"]

    expected = answered(said)
    assert answered({**said, **BACK[client]}, reasoning_effort=None, guided_json=None) == expected
    calls = {**said, "tool_calls": [{"id": "1"}]}
    error = ask(service, path, {"messages": [*CHAT, calls, CHAT[0]]}, 400)["error"]
    assert error["param"] == "messages[1].tool_calls" and "not supported" in error["message"]


@pytest.mark.parametrize("backwards", [False, True])
def test_two_keys_of_one_parameter_agree(services: Dict[str, Service], backwards: bool) -> None:
    def answered(status: int = 200, **limits: Any) -> Any:
        sent = dict(reversed(list(limits.items()))) if backwards else limits
        return ask(services["text_generation"], "v1/chat/completions", {"messages": CHAT, **sent}, status)

    assert answered(max_tokens=3, max_completion_tokens=3)["usage"]["completion_tokens"] == 3
    assert answered(max_tokens=3, max_completion_tokens=None)["usage"]["completion_tokens"] == 3
    message = answered(400, max_tokens=3, max_completion_tokens=4)["error"]["message"]
    assert '"max_tokens"' in message and '"max_completion_tokens"' in message and "differ" in message
    for name, other in (("max_tokens", "max_completion_tokens"), ("max_completion_tokens", "max_tokens")):
        error = answered(400, **{name: 0, other: None})["error"]
        assert error["param"] == name and other not in error["message"]


def test_details_are_the_models_own(services: Dict[str, Service]) -> None:
    """A chosen token's probability is that of the model's logits, and greedy ones are the likeliest."""
    parameters = {"max_new_tokens": 6, "details": True, "top_n_tokens": 3, "return_full_text": False}
    [found] = ask(services["text_generation"], "", {"text": PROMPT, "parameters": parameters})
    details = found["details"]
    assert details["finish_reason"] == "length" and details["generated_tokens"] == 6 == len(details["tokens"])
    for token, likeliest in zip(details["tokens"], details["top_tokens"]):
        assert all(likeliest[0][key] == token[key] for key in ("id", "logprob")) and token["logprob"] <= 0
        assert [each["logprob"] for each in likeliest] == sorted((each["logprob"] for each in likeliest), reverse=True)
    assert "".join(token["text"] for token in details["tokens"] if not token["special"]) == found["generated_text"]


@pytest.mark.parametrize("stops", [[], ["a"], ["zzzz"]])
def test_a_stream_of_openai_is_the_answer_in_pieces(services: Dict[str, Service], stops: List[str]) -> None:
    service = services["text_generation"]
    body = {"prompt": PROMPT, "max_tokens": 12, "stop": stops}
    wanted = ask(service, "v1/completions", body)
    text, reply = stream(service, "v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert reply.content_type == "text/event-stream" and text.endswith("data: [DONE]\n\n")
    *chunks, last = events(text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == wanted["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == wanted["choices"][0]["finish_reason"]
    assert last["usage"] == wanted["usage"] and not last["choices"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_chats_stream_begins_with_its_role(services: Dict[str, Service]) -> None:
    service = services["text_generation"]
    body = {"messages": CHAT, "max_tokens": 5}
    text, _ = stream(service, "v1/chat/completions", {**body, "stream": True, "logprobs": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in events(text)]
    assert [i for i, delta in enumerate(deltas) if "role" in delta] == [0]
    wanted = ask(service, "v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert "".join(delta.get("content", "") for delta in deltas) == wanted
    [logprobs] = [c["choices"][0]["logprobs"] for c in events(text) if c["choices"][0]["logprobs"]]
    assert len(logprobs["content"]) == 5


def test_the_choices_of_a_prompt_draw_with_their_own_seeds(services: Dict[str, Service]) -> None:
    service = services["text_generation"]
    body = {"prompt": [PROMPT, TEXT], "n": 2, "seed": 7, "temperature": 2.0, "max_tokens": 8}
    texts = [choice["text"] for choice in ask(service, "v1/completions", body)["choices"]]
    for i, (prompt, seed) in enumerate([(PROMPT, 7), (PROMPT, 8), (TEXT, 7), (TEXT, 8)]):
        parameters = {"max_new_tokens": 8, "seed": seed, "temperature": 2.0, "return_full_text": False}
        assert texts[i] == ask(service, "", {"text": prompt, "parameters": parameters})[0]["generated_text"]


@pytest.mark.parametrize("sampled", [{"do_sample": True}, {"do_sample": False, "seed": 7}])
def test_the_choices_of_a_prompt_draw_with_the_archives_seed(
    services: Dict[str, Service], sampled: Dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = services["text_generation"]
    body = {"prompt": PROMPT, "n": 3, "max_tokens": 8}
    alone = {"max_new_tokens": 8, "return_full_text": False}
    for name, value in {"seed": 7, "top_k": 0, **sampled}.items():
        monkeypatch.setitem(service.engine.manifest.parameters, name, value)  # type: ignore[arg-type]
    for asked_for in ({}, {"temperature": 2.0}):
        texts = [choice["text"] for choice in ask(service, "v1/completions", {**body, **asked_for})["choices"]]
        draws = bool(sampled["do_sample"] or asked_for)
        wanted = [{**asked_for, "seed": 7 + i} if draws else {} for i in range(3)]
        for text, own in zip(texts, wanted):
            native = {"text": PROMPT, "parameters": {**alone, **own}}
            assert text == ask(service, "", native)[0]["generated_text"]
        assert len(set(texts)) == (3 if draws else 1)


def test_token_ids_are_read_as_the_text_that_they_say(services: Dict[str, Service]) -> None:
    service = services["feature_extraction"]
    ids = service.engine.task.tokenizer.token_ids(TEXT)
    by_ids = ask(service, "v1/embeddings", {"input": [ids]})["data"][0]["embedding"]
    np.testing.assert_allclose(
        by_ids, ask(service, "v1/embeddings", {"input": TEXT})["data"][0]["embedding"], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("path", "key", "ids", "field"),
    [
        ("v1/embeddings", "input", [999_999], "input[0]"),
        ("v1/embeddings", "input", [[5, 6], [5, 7, 999_999, 8, 2**70]], "input[1][2]"),
        ("v1/embeddings", "input", [[5], [-1]], "input[1][0]"),
        ("v1/completions", "prompt", [5, 6, 2**32], "prompt[2]"),
    ],
)
def test_token_ids_of_another_tokenizer_are_refused(
    services: Dict[str, Service], path: str, key: str, ids: Any, field: str
) -> None:
    service = services["text_generation" if key == "prompt" else "feature_extraction"]
    error = ask(service, path, {key: ids}, 400)["error"]
    assert error["param"] == field and "send the text instead" in error["message"]


def test_a_token_that_the_model_lacks_is_refused(services: Dict[str, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was added to the tokenizer alone, or none."""
    service = services["feature_extraction"]
    tokenizer = service.engine.task.tokenizer
    last = tokenizer.vocabulary_size
    own = Tokenizer.from_str(tokenizer._tokenizer.to_str())
    own.add_tokens([AddedToken("zyzzyva", normalized=False)])
    monkeypatch.setattr(tokenizer, "_tokenizer", own)
    assert service.served.text_of([5, last]).endswith("zyzzyva")
    assert ask(service, "v1/embeddings", {"input": [5, last + 1]}, 400)["error"]["param"] == "input[1]"
    monkeypatch.setattr(tokenizer, "_embeddings", last)
    assert ask(service, "v1/embeddings", {"input": [[5], [last]]}, 400)["error"]["param"] == "input[1][0]"
    assert ask(service, "v1/embeddings", {"input": [[5], [last - 1]]})["data"]


def test_labels_of_tei_and_vllm_are_ours(services: Dict[str, Service]) -> None:
    service = services["sequence_classification"]
    wanted = ask(service, "", {"inputs": TEXT, "parameters": {"top_k": None}})
    assert ask(service, "predict", {"inputs": TEXT}) == wanted
    assert ask(service, "predict", {"inputs": [[TEXT], [OTHER]]})[0] == wanted
    pair = ask(service, "", {"text": TEXT, "text_pair": OTHER, "parameters": {"top_k": None}})
    assert ask(service, "predict", {"inputs": [TEXT, OTHER]}) == pair
    [found] = ask(service, "classify", {"model": "any", "input": TEXT})["data"]
    by_label = {each["label"]: each["score"] for each in wanted}
    assert found["label"] == wanted[0]["label"] and found["probs"] == [by_label[n] for n in ("red", "green", "blue")]


@pytest.mark.parametrize("path", ["rerank", "v1/rerank", "v2/rerank"])
def test_rankings_are_ours(services: Dict[str, Service], path: str) -> None:
    service = services["text_ranking"]
    documents = [TEXT, OTHER, PROMPT]
    wanted = ask(service, "", {"query": "A boat?", "documents": documents, "parameters": {"sort": True}})
    found = ask(service, path, {"query": "A boat?", "documents": documents, "top_n": 2, "return_documents": True})
    assert [(r["index"], r["relevance_score"]) for r in found["results"]] == [
        (w["index"], w["score"]) for w in wanted[:2]
    ]
    assert found["results"][0]["document"]["text"] == documents[wanted[0]["index"]]
    assert ask(service, "rerank", {"query": "A boat?", "texts": documents}) == wanted
    scores = ask(service, "score", {"text_1": "A boat?", "text_2": documents})["data"]
    np.testing.assert_allclose(
        [each["score"] for each in scores],
        [w["score"] for w in sorted(wanted, key=lambda w: int(w["index"]))],
        rtol=1e-5,
    )


def sigmoids(values: Any) -> Any:
    return 1 / (1 + np.exp(-np.array(values)))


RAW: Any = pytest.mark.parametrize("raw", [{}, {"raw_scores": False}, {"raw_scores": True}])


@RAW
@pytest.mark.parametrize("own", ["none", "sigmoid"])
def test_teis_ranks_are_scored_as_tei_does(
    services: Dict[str, Service], own: str, raw: Dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the model's own function, which that of cross-encoder/ms-marco-* is: none."""
    service = services["text_ranking"]
    body = {"query": "A boat?", "documents": [TEXT, OTHER], "parameters": {"function_to_apply": "none", "sort": True}}
    logits = [each["score"] for each in ask(service, "", body)]
    monkeypatch.setitem(service.engine.manifest.parameters, "function_to_apply", own)  # type: ignore[arg-type]
    found = [each["score"] for each in ask(service, "rerank", {"query": "A boat?", "texts": [TEXT, OTHER], **raw})]
    np.testing.assert_allclose(found, logits if raw.get("raw_scores") else sigmoids(logits), rtol=1e-5)


@RAW
@pytest.mark.parametrize("own", ["none", "softmax", "sigmoid"])
def test_teis_labels_are_scored_as_tei_does(
    services: Dict[str, Service], own: str, raw: Dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which independent labels keep their sigmoids."""
    service = services["sequence_classification"]
    parameters = {"function_to_apply": "none", "top_k": None}
    logits = np.array([each["score"] for each in ask(service, "", {"text": TEXT, "parameters": parameters})])
    monkeypatch.setitem(service.engine.manifest.parameters, "function_to_apply", own)  # type: ignore[arg-type]
    found = [each["score"] for each in ask(service, "predict", {"inputs": TEXT, **raw})]
    expected = np.exp(logits) / np.exp(logits).sum() if own != "sigmoid" else sigmoids(logits)
    np.testing.assert_allclose(found, logits if raw.get("raw_scores") else expected, rtol=1e-5)


@pytest.mark.parametrize("own", ["none", "softmax", "sigmoid"])
def test_the_score_of_a_single_label_is_its_sigmoid(services: Dict[str, Service], own: str) -> None:
    served = services["sequence_classification"].served
    one = dataclasses.replace(served.manifest, labels=("red",), parameters={"function_to_apply": own})
    [request] = tei.Predict().read({"body": {"inputs": TEXT}}, Headers(), served._replace(manifest=one), 0).requests
    assert request.parameters["function_to_apply"] == "sigmoid"


def test_similarities_are_cosines(services: Dict[str, Service]) -> None:
    service = services["feature_extraction"]
    vectors = ask(service, "", {"inputs": [TEXT, OTHER], "parameters": {"pooling": "mean", "normalize": True}})
    inputs = {"source_sentence": TEXT, "sentences": [OTHER, TEXT]}
    wanted = [float(np.dot(*vectors)), 1.0]
    np.testing.assert_allclose(ask(service, "similarity", {"inputs": inputs}), wanted, rtol=1e-5)
    np.testing.assert_allclose(ask(service, "", {"inputs": inputs}, client=HUB), wanted, rtol=1e-5)


def test_hugging_faces_client_is_known_by_its_name(services: Dict[str, Service]) -> None:
    service = services["sequence_classification"]
    wanted = ask(service, "", {"inputs": TEXT, "parameters": {"top_k": None}})
    assert ask(service, "", {"inputs": TEXT}, client=HUB) == [wanted] == ask(service, "hf", {"inputs": TEXT})
    assert ask(service, "", {"inputs": TEXT}) == wanted[0]  # and no other client gets this format
    zero_shot = services["zero_shot_classification"]
    body = {"inputs": TEXT, "parameters": {"candidate_labels": ["a", "b"]}}
    found = ask(zero_shot, "", body)
    assert [each["label"] for each in ask(zero_shot, "", body, client=HUB)] == found["labels"]
    assert ask(zero_shot, "", body, client="unknown/None; hf_hub/0.36.2; python/3.11") == found


@pytest.mark.parametrize("shape", [[2], [1]])
def test_each_element_of_a_tensor_is_answered_to_hugging_faces_client(
    services: Dict[str, Service], shape: List[int]
) -> None:
    service, texts = services["sequence_classification"], [TEXT, OTHER][: shape[0]]
    tensor = {"name": "text", "datatype": "BYTES", "shape": shape, "data": texts}
    wanted = ask(service, "hf", {"inputs": texts})
    assert ask(service, "hf", {"inputs": [tensor]}) == wanted and len(wanted) == shape[0]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"inputs": TEXT, "parameters": {"generate_parameters": "none"}}, 400),
        ({"inputs": TEXT, "parameters": 3}, 400),
        ({"inputs": TEXT, "options": ["use_cache"]}, 400),
        ({"inputs": TEXT, "options": 0}, 400),
        ({"inputs": {"source_sentence": TEXT, "sentences": [TEXT] * 10_000}}, 413),
        ({"inputs": PAIR, "parameters": {"pooling": "none"}}, 400),
    ],
)
def test_what_hugging_faces_client_may_not_send_is_refused(
    services: Dict[str, Service], body: Any, status: int
) -> None:
    assert isinstance(ask(services["feature_extraction"], "hf", body, status)["error"], str)


@pytest.mark.parametrize(
    "name, value", [("pooling", "none"), ("pooling", "sum"), ("dimensions", 0), ("dimensions", 999)]
)
def test_errors_of_similarities_name_their_parameters(services: Dict[str, Service], name: str, value: Any) -> None:
    body = {"inputs": PAIR, "parameters": {name: value}}
    assert ask(services["feature_extraction"], "hf", body, 400)["error"].startswith(f"parameters.{name}: ")
    error = ask(services["feature_extraction"], "similarity", {"inputs": PAIR, "parameters": {"prompt_name": "x"}}, 422)
    assert error["error"].startswith("parameters.prompt_name: ")


def test_a_stream_of_hugging_face_has_its_tokens(services: Dict[str, Service]) -> None:
    service = services["text_generation"]
    parameters = {"max_new_tokens": 7, "return_full_text": False}
    [wanted] = ask(service, "", {"text": PROMPT, "parameters": {**parameters, "details": True}})
    text, reply = stream(service, "hf", {"inputs": PROMPT, "parameters": parameters, "stream": True})
    found = events(text)
    assert reply.content_type == "text/event-stream"
    assert [e["token"]["id"] for e in found] == [token["id"] for token in wanted["details"]["tokens"]]
    assert [e["token"]["logprob"] for e in found] == [token["logprob"] for token in wanted["details"]["tokens"]]
    assert "".join(e["token"]["text"] for e in found) == wanted["generated_text"] == found[-1]["generated_text"]
    assert found[-1]["details"]["finish_reason"] == "length" and all(e["details"] is None for e in found[:-1])


def test_a_stream_of_hugging_face_may_end_with_the_prompt_too(services: Dict[str, Service]) -> None:
    service = services["text_generation"]
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 7, "return_full_text": True}}
    [wanted] = ask(service, "hf", body)
    text, _ = stream(service, "hf", {**body, "stream": True})
    found = events(text)
    assert found[-1]["generated_text"] == wanted["generated_text"]
    assert PROMPT + "".join(event["token"]["text"] for event in found) == wanted["generated_text"]


def test_a_stream_of_hugging_face_has_no_likeliest_tokens(services: Dict[str, Service]) -> None:
    service = services["text_generation"]
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3, "top_n_tokens": 0}, "stream": True}
    assert len(events(stream(service, "hf", body)[0])) == 3
    error = ask(service, "hf", {**body, "parameters": {"top_n_tokens": 3}}, 400)["error"]
    assert error.startswith("parameters.top_n_tokens: the likeliest tokens are not streamed")


def test_no_stop_strings_of_hugging_faces_client_are_none(services: Dict[str, Service]) -> None:
    service = services["text_generation"]

    def text(**parameters: Any) -> str:
        [found] = ask(service, "hf", {"inputs": PROMPT, "parameters": {"max_new_tokens": 7, **parameters}})
        return str(found["generated_text"])

    whole = text()
    assert text(stop=[]) == whole
    assert text(stop=[whole[1]]) == whole[: whole.index(whole[1]) + 1] != whole
    assert "string" in ask(service, "hf", {"inputs": PROMPT, "parameters": {"stop": [""]}}, 400)["error"]


def test_hugging_faces_client_may_name_the_encoding_of_vectors(services: Dict[str, Service]) -> None:
    service = services["feature_extraction"]
    assert ask(service, "hf", {"inputs": TEXT, "encoding_format": "float"}) == ask(service, "hf", {"inputs": TEXT})
    error = ask(service, "hf", {"inputs": TEXT, "encoding_format": "base64"}, 400)["error"]
    assert error.startswith("encoding_format: ")


@pytest.mark.parametrize("path", ["v2/repository/index", "v2/models/text_generation/load"])
def test_paths_of_triton_that_are_not_here_are_told_in_a_string(services: Dict[str, Service], path: str) -> None:
    assert ask(services["text_generation"], path, {}, 404)["error"].startswith("nothing is served at /v2/")


def test_metadata_names_an_input_where_none_is_required(services: Dict[str, Service]) -> None:
    found = ask(services["text_generation"], "v2/models/text_generation", {})
    assert found["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]


@pytest.mark.parametrize("path", ["", "hf"])
def test_an_error_of_a_parameter_beside_the_inputs_has_its_path(translator: Service, path: str) -> None:
    error = ask(translator, path, {"inputs": TEXT, "parameters": {"details": True, "num_beams": 2}}, 400)["error"]
    found = error["field"] if isinstance(error, dict) else error.partition(": ")[0]
    assert found == "parameters.details"


@pytest.mark.parametrize("items, place", [([[5], "a"], 1), ([[5], []], 1), ([[], [5]], 0), (["a", [5]], 1)])
def test_the_item_that_is_unlike_the_first_is_named(services: Dict[str, Service], items: Any, place: int) -> None:
    error = ask(services["feature_extraction"], "v1/embeddings", {"input": items}, 400)["error"]
    assert error["param"].startswith(f"input[{place}]")


def test_teis_ranking_may_be_its_first_ones(services: Dict[str, Service]) -> None:
    body = {"query": TEXT, "texts": [TEXT, OTHER, PROMPT]}
    whole = ask(services["text_ranking"], "rerank", body)
    assert ask(services["text_ranking"], "rerank", {**body, "top_n": 2}) == whole[:2]


@pytest.mark.parametrize("only", [(), ("<pad>", "a", "b")], ids=["any", "special"])
def test_a_streams_tokens_are_those_of_its_details(services: Dict[str, Service], only: Tuple[str, ...]) -> None:
    """Parts of characters have their text together, at the last of them; and special tokens have none."""
    service = services["text_generation"]
    bias = {str(service.engine.task.tokenizer.token_id(token)): 100 for token in only}
    joined = special = 0
    for seed in range(4):
        parameters = {"max_new_tokens": 30, "return_full_text": False, "seed": seed, "logit_bias": bias}
        [wanted] = ask(service, "", {"text": PROMPT, "parameters": {**parameters, "details": True}})
        text, _ = stream(service, "hf", {"inputs": PROMPT, "parameters": parameters, "stream": True})
        told = [event["token"] for event in events(text)]
        expected = [{**each, "text": "" if each["special"] else each["text"]} for each in wanted["details"]["tokens"]]
        assert told == expected
        joined += sum(not each["text"] and not each["special"] for each in told)
        special += sum(each["special"] for each in told)
    assert (special if only else joined) > 5


# Texts that are searched with beams by default, and defaults that stop


@pytest.fixture(scope="module")
def translator(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("translator") / "x"
    source = checkpoint("t5", "AutoModelForSeq2SeqLM")
    run_export(folder, {"model_name": str(source), "task": "text2text_generation", "max_length": 16})
    return Service(Engine.load(folder), "translator")


def test_log_probabilities_are_those_without_beams(translator: Service) -> None:
    greedy = {"max_new_tokens": 6, "num_beams": 1}
    wanted = ask(translator, "", {"text": TEXT, "parameters": greedy})["generated_text"]
    [choice] = ask(translator, "v1/completions", {"prompt": TEXT, "max_tokens": 6, "logprobs": 1})["choices"]
    assert choice["text"] == wanted and choice["logprobs"]["tokens"]


def test_a_stream_of_hugging_face_has_no_beams(services: Dict[str, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    service = services["text_generation"]
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 6}, "stream": True}
    wanted, _ = stream(service, "hf", body)
    monkeypatch.setitem(service.engine.manifest.parameters, "num_beams", 3)
    found, _ = stream(service, "hf", body)
    assert found == wanted
    error = ask(service, "hf", {**body, "parameters": {"num_beams": 2}}, 400)["error"]
    assert error.startswith("parameters.num_beams: beams are not streamed")


def test_log_probabilities_where_an_archive_samples(translator: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """It samples unless a request says otherwise, whose text then has no beams."""
    for name, value in {"do_sample": True, "seed": 3}.items():
        monkeypatch.setitem(translator.engine.manifest.parameters, name, value)  # type: ignore[arg-type]
    body = {"prompt": TEXT, "max_tokens": 6, "logprobs": 1}
    for asked_for, own in (({}, {}), ({"temperature": 0}, {"do_sample": False, "num_beams": 1})):
        [choice] = ask(translator, "v1/completions", {**body, **asked_for})["choices"]
        native = {"text": TEXT, "parameters": {"max_new_tokens": 6, **own}}
        assert choice["text"] == ask(translator, "", native)["generated_text"] and choice["logprobs"]["tokens"]


@pytest.mark.parametrize("own", [{"temperature": 0}, {"do_sample": False}])
def test_a_stream_of_hugging_face_has_no_beams_where_it_does_not_sample(
    services: Dict[str, Service], own: Dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = services["text_generation"]
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 6}, "stream": True}
    wanted, _ = stream(service, "hf", body)
    monkeypatch.setitem(service.engine.manifest.parameters, "num_beams", 3)
    monkeypatch.setitem(service.engine.manifest.parameters, "do_sample", True)
    found, _ = stream(service, "hf", {**body, "parameters": {"max_new_tokens": 6, **own}})
    assert found == wanted
    sampled, _ = stream(service, "hf", {**body, "parameters": {"max_new_tokens": 6, "seed": 3}})
    monkeypatch.setitem(service.engine.manifest.parameters, "seed", 3)
    unasked, _ = stream(service, "hf", body)
    assert texts_of_events(unasked) == texts_of_events(sampled) != texts_of_events(wanted)


def texts_of_events(text: str) -> List[str]:
    return [event["token"]["text"] for event in events(text)]


@pytest.mark.parametrize("truncation", ["longest_first", "only_first"])
def test_hugging_faces_client_may_have_long_texts_truncated(translator: Service, truncation: str) -> None:
    def asking(**parameters: Any) -> Any:
        return {"inputs": f"{TEXT} " * 9, "parameters": {"max_new_tokens": 3, **parameters}}

    found = ask(translator, "hf", asking(truncation=truncation))
    assert found == ask(translator, "hf", asking(long_inputs="truncate"))
    assert "tokens" in ask(translator, "hf", asking(truncation="do_not_truncate"), 413)["error"]
    assert "not supported" in ask(translator, "hf", asking(truncation="only_second"), 400)["error"]


def test_hugging_faces_client_may_have_texts_cleaned_up(translator: Service, services: Dict[str, Service]) -> None:
    name, tokenizer = "clean_up_tokenization_spaces", translator.engine.task.tokenizer
    spaced = [number for token in ("\u0120", ".", ",") for number in [tokenizer.token_id(token)] if number is not None]
    assert len(spaced) == 3
    bias = {str(number): 100 for number in spaced}

    def text(**more: Any) -> str:
        parameters = {"max_new_tokens": 12, "num_beams": 1, "logit_bias": bias, "no_repeat_ngram_size": 2, **more}
        [found] = ask(translator, "hf", {"inputs": TEXT, "parameters": parameters})
        return str(found["translation_text"])

    assert text() == text(**{name: False}) and text(**{name: True}) == clean_up(text()) != text()
    body = {"inputs": PROMPT, "parameters": {name: True}, "stream": True}
    error = ask(services["text_generation"], "hf", body, 400)["error"]
    assert error.startswith(f"parameters.{name}: ")


@pytest.mark.parametrize("inputs", [PROMPT, {"messages": CHAT}])
def test_hugging_faces_client_may_have_texts_left_as_they_are(
    services: Dict[str, Service], inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with the pipeline, where the tokenizer cleans up; our own answer, by which versions are compared, stays."""
    service, name = services["text_generation"], "clean_up_tokenization_spaces"
    task = service.engine.task
    spaced = [task.tokenizer.token_id(token) for token in ("\u0120", ".", ",")]
    bias = {str(number): 100 for number in spaced}
    asked = {"max_new_tokens": 12, "logit_bias": bias, "no_repeat_ngram_size": 2}

    def text(**more: Any) -> str:
        [found] = ask(service, "hf", {"inputs": inputs, "parameters": {**asked, **more, "return_full_text": False}})
        return str(found["generated_text"])

    spaced_text = text()
    assert clean_up(spaced_text) != spaced_text
    facts = dataclasses.replace(task.manifest.tokenizer, clean_up=True)
    manifest = dataclasses.replace(task.manifest, tokenizer=facts)
    for each in (task, service.engine):
        monkeypatch.setattr(each, "manifest", manifest)
    service = Service(service.engine, "cleaning")
    monkeypatch.setattr(task.tokenizer, "_clean_up", True)
    monkeypatch.setattr(task.tokenizer, "decodes_locally", False)
    assert text() == text(**{name: True}) == clean_up(spaced_text) and text(**{name: False}) == spaced_text
    assert text(**{name: False, "details": True}) == spaced_text
    body = {"inputs": inputs, "parameters": {**asked, name: False}, "stream": True}
    streamed, _ = stream(service, "hf", body)
    assert "".join(event["token"]["text"] for event in events(streamed)) == spaced_text
    assert events(streamed)[-1]["generated_text"] == spaced_text
    request = Request(inputs if isinstance(inputs, dict) else {"text": inputs}, asked, continues=True, clean_up=False)
    [answer] = service.engine.answer([dataclasses.replace(request, parameters={**asked, "return_full_text": False})])
    assert isinstance(answer, Answer) and answer.value == [{"generated_text": clean_up(spaced_text)}]


def test_openais_texts_end_before_a_stop_string_of_the_archive(
    services: Dict[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = services["text_generation"]
    body = {"prompt": PROMPT, "max_tokens": 24}
    whole = ask(service, "v1/completions", body)["choices"][0]["text"]
    stop = next(whole[i : i + 2] for i in range(4, len(whole)) if "\ufffd" not in whole[i : i + 2])
    expected = ask(service, "v1/completions", {**body, "stop": stop})["choices"]
    assert stop not in expected[0]["text"]
    monkeypatch.setitem(service.engine.manifest.parameters, "stop", [stop])
    assert ask(service, "v1/completions", body)["choices"] == expected
    text, _ = stream(service, "v1/completions", {**body, "stream": True})
    assert "".join(event["choices"][0]["text"] for event in events(text)) == expected[0]["text"]


WHOLE: Mapping[str, Tuple[str, Any]] = {
    "completion": ("v1/completions", {"prompt": PROMPT, "stream": False}),
    "completions": ("v1/completions", {"prompt": PROMPT, "n": 2}),
    "chat": ("v1/chat/completions", {"messages": CHAT}),
    "hub": ("hf", {"inputs": PROMPT}),
    "hub, false": ("hf", {"inputs": PROMPT, "stream": False}),
    "list": ("", [PROMPT]),
    "instances": ("", {"instances": [PROMPT]}),
    "inputs": ("", {"inputs": [PROMPT], "parameters": {"top_n_tokens": 0}}),
    "tensor": ("", {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [PROMPT]}]}),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_cannot_be_streamed_is_answered_whole_where_the_archive_streams(
    services: Dict[str, Service], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, (path, body) = services["text_generation"], WHOLE[kind]
    monkeypatch.setitem(service.engine.manifest.parameters, "max_new_tokens", 5)

    def answer() -> Any:
        found = ask(service, path, body)
        return found.get("choices", found) if isinstance(found, dict) else found

    wanted = answer()
    monkeypatch.setitem(service.engine.manifest.parameters, "stream", True)
    assert answer() == wanted
    pieces, reply = stream(service, "", {"text": PROMPT})
    assert reply.content_type.startswith("text/plain") and pieces


def test_an_item_that_asks_for_a_stream_is_refused_where_the_archive_streams(
    services: Dict[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(services["text_generation"].engine.manifest.parameters, "stream", True)
    body = [PROMPT, {"text": TEXT, "parameters": {"stream": True}}]
    assert ask(services["text_generation"], "", body, 400)["error"]["field"] == "parameters.stream"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_list_is_not_streamed_to_hugging_faces_client(services: Dict[str, Service], streamed: bool) -> None:
    pieces: List[bytes] = []
    call = asked({"inputs": [PROMPT, TEXT], "stream": True}, client=HUB)
    send = (lambda i, piece, headers: pieces.append(piece)) if streamed else None
    [reply] = services["text_generation"].answer([call], send=send)
    assert reply.status == 400 and reply.content_type == "application/json" and not pieces
    assert "send its request alone, not in a list" in json.loads(reply.body)["error"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("v1/completions", {"prompt": PROMPT, "stop": ["ab"]}),
        ("v1/chat/completions", {"messages": CHAT, "stop": ["ab"]}),
        ("hf", {"inputs": PROMPT}),  # the first token is held: it may be the last
    ],
)
def test_a_stream_that_fails_before_its_first_piece_has_the_errors_status(
    services: Dict[str, Service], path: str, body: Dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = services["text_generation"]
    step = service.engine.runner.step
    [first] = service.engine.task.tokenizer.token_ids("a")
    written: List[int] = []

    def fail(*inputs: Any) -> Any:
        outputs, state = step(*inputs)
        logits = np.full_like(outputs["logits"], np.nan if written else -5.0)
        logits[:, first] = np.nan if written else 5.0
        written.append(first)
        return {**outputs, "logits": logits}, state

    monkeypatch.setattr(service.engine.runner, "step", fail)
    pieces: List[bytes] = []
    [reply] = service.answer(
        [asked({**body, "stream": True}, path)], send=lambda i, piece, headers: pieces.append(piece)
    )
    assert len(written) > 1 and not pieces
    assert reply.status == 500 and reply.content_type == "application/json"
    assert "not a number" in str(json.loads(reply.body)["error"])


# Binary tensors


def binary(texts: List[str], **others: Any) -> Tuple[bytes, int]:
    raw = b"".join(len(t.encode()).to_bytes(4, "little") + t.encode() for t in texts)
    tensor = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor], **others}).encode()
    return head + raw, len(head)


def test_binary_tensors_are_read_and_written(services: Dict[str, Service]) -> None:
    texts = [TEXT, "Où est-ce ? 👍🏽"]
    body, length = binary(texts, parameters={"binary_data_output": True}, id="7")
    for name in ("sequence_classification", "feature_extraction"):
        service = services[name]
        parameters = {"pooling": "mean"} if name == "feature_extraction" else {}
        own = body if not parameters else binary(texts, parameters={"binary_data_output": True, **parameters})[0]
        size = length if not parameters else binary(texts, parameters={"binary_data_output": True, **parameters})[1]
        [reply] = service.answer([Call({"body": own}, Headers("application/octet-stream", binary=size))])
        assert reply.status == 200 and reply.content_type == "application/octet-stream"
        start = int(reply.headers[binary_tensors.LENGTH_HEADER])
        [output] = json.loads(reply.body[:start])["outputs"]
        raw = reply.body[start:]
        assert output["parameters"]["binary_data_size"] == len(raw)
        wanted = ask(service, "", {"inputs": texts, "parameters": parameters})
        if output["datatype"] == "FP32":
            found: Any = np.frombuffer(raw, dtype="<f4").reshape(output["shape"])
            np.testing.assert_allclose(found, np.array(wanted, dtype=np.float32), rtol=1e-6)
        else:
            found = [json.loads(element) for element in binary_tensors._elements(raw, "BYTES", "")]
            assert [each["label"] for each in found] == [each["label"] for each in wanted]


@settings(deadline=None, max_examples=60, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut_at=st.integers(0, 400), length=st.integers(0, 400))
def test_a_damaged_binary_body_is_refused_with_a_string(services: Dict[str, Service], cut_at: int, length: int) -> None:
    body, _ = binary([TEXT, OTHER])
    call = Call({"body": body[:cut_at]}, Headers("application/octet-stream", binary=length))
    [reply] = services["sequence_classification"].answer([call])
    if reply.status != 200:
        assert reply.status < 500 and isinstance(json.loads(reply.body)["error"], str)


# Errors


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("v1/completions", {"prompt": 3}, "prompt"),
        ("v1/completions", {"prompt": [PROMPT, 3]}, "prompt[1].text"),
        ("v1/completions", {"prompt": PROMPT, "max_tokens": "many"}, "max_tokens"),
        ("v1/completions", {"prompt": PROMPT, "temperature": -1}, "temperature"),
        ("v1/completions", {"prompt": PROMPT, "n": 0}, "n"),
        ("v1/completions", {"prompt": PROMPT, "logprobs": 99}, "logprobs"),
        ("v1/completions", {"prompt": PROMPT, "logprobs": 0, "echo": True}, "echo"),
        ("v1/completions", {"prompt": PROMPT, "n": 2, "stream": True}, "n"),
        ("v1/completions", {"prompt": PROMPT, "max_tokens": 5000}, "max_tokens"),
        ("v1/completions", {"prompt": PROMPT, "logit_bias": {"5": 101}}, "logit_bias"),
        ("v1/completions", {"prompt": PROMPT, "logit_bias": {"5": 1, "99999999": 1}}, "logit_bias"),
        ("v1/completions", {"prompt": PROMPT, "prompts": 1}, "prompts"),
        ("v1/completions", {}, "prompt"),
        ("v1/chat/completions", {"messages": []}, "messages"),
        (
            "v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        ("v1/chat/completions", {"messages": CHAT, "response_format": {"type": "json_object"}}, "response_format"),
        ("v1/chat/completions", {"messages": CHAT, "top_logprobs": 2}, "top_logprobs"),
        ("v1/embeddings", {"input": TEXT}, None),  # of another task
    ],
)
def test_errors_of_openai_name_its_own_keys(services: Dict[str, Service], path: str, body: Any, field: Any) -> None:
    error = ask(services["text_generation"], path, body, 400)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == field, error


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("v1/completions", {"prompt": TEXT * 99}, "prompt"),
        ("v1/completions", {"prompt": TEXT * 9999}, "prompt"),  # by its characters
        ("v1/completions", {"prompt": PROMPT, "max_tokens": 5000}, "max_tokens"),
        ("v1/completions", {"prompt": PROMPT, "max_tokens": 62}, "prompt"),
        ("v1/chat/completions", {"messages": [{"role": "user", "content": TEXT * 99}]}, "messages"),
        (
            "v1/chat/completions",
            {"messages": CHAT, "max_completion_tokens": 64},
            "max_completion_tokens",
        ),
    ],
)
def test_what_is_beyond_the_context_has_openais_code(
    services: Dict[str, Service], path: str, body: Any, field: str
) -> None:
    """By which clients know what to shorten; and no advice of ours, which such a body cannot follow."""
    error = ask(services["text_generation"], path, body, 400)["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", field), error
    assert "long_inputs" not in error["message"] and "max_new_tokens" not in error["message"]


@pytest.mark.parametrize(
    ("task", "path", "body", "advice"),
    [
        ("feature_extraction", "embed", {"inputs": TEXT * 99}, 'shorten it, or send "truncate": true'),
        ("text_ranking", "rerank", {"query": TEXT, "texts": [TEXT * 99]}, 'or send "truncate": true'),
        (
            "feature_extraction",
            "",
            {"inputs": TEXT * 99, "parameters": {"long_inputs": "reject"}},
            '"truncate"} or "window"',
        ),
        ("text_generation", "hf", {"inputs": TEXT * 99}, 'or ask for "parameters": {"long_inputs": "truncate"}'),
    ],
)
def test_every_protocol_advises_what_it_can_take(
    services: Dict[str, Service], task: str, path: str, body: Any, advice: str
) -> None:
    error = ask(services[task], path, body, 413)["error"]
    message = error if isinstance(error, str) else error["message"]
    assert message.endswith(advice), message
    assert ("long_inputs" in message) is (path in ("", "hf"))


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("v1/completions", {"prompt": ["a"] * 4096, "n": 128}, "n"),
        ("v1/completions", {"prompt": ["a"] * 129, "n": 2}, "n"),
        ("v1/completions", {"prompt": ["a"] * 257}, "prompt"),
    ],
)
def test_choices_are_counted_before_they_are_requests(
    services: Dict[str, Service], path: str, body: Any, field: str
) -> None:
    began = time.process_time()
    error = ask(services["text_generation"], path, body, 413)["error"]
    assert time.process_time() - began < 0.5
    assert error["param"] == field and "one request may have 256; send several" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("embed", {"inputs": 3}, 422),
        ("embed", {"inputs": [TEXT, 3]}, 422),
        ("embed", {"inputs": []}, 422),
        ("embed", {"inputs": TEXT, "truncation_direction": "Left"}, 422),
        ("embed", {"inputs": TEXT * 99}, 413),
        ("similarity", {"inputs": TEXT}, 422),
        ("predict", {"inputs": TEXT}, 400),  # of another task
        ("rerank", {"query": "a", "texts": ["b"]}, 400),
    ],
)
def test_errors_of_tei_have_its_shape_and_statuses(
    services: Dict[str, Service], path: str, body: Any, status: int
) -> None:
    error = ask(services["feature_extraction"], path, body, status)
    assert set(error) == {"error", "error_type"} and isinstance(error["error"], str)


@pytest.mark.parametrize(
    ("body", "headers", "is_tei"),
    [
        ({"query": "a", "documents": ['the key "texts"', 3]}, {}, False),
        ({"query": "a", "documents": ["b"], "texts": ["b"]}, {}, False),
        ({"query": "a", "texts": ["b", 3]}, {}, True),
        ({"query": "a", "texts": ["b", 3]}, {"content_encoding": "gzip"}, True),
        ({"query": "a", "texts": ["b"] * 5000}, {}, True),
    ],
)
def test_an_error_of_rerank_has_the_format_of_the_call(
    services: Dict[str, Service], body: Any, headers: Dict[str, Any], is_tei: bool
) -> None:
    source = json.dumps(body).encode()
    source = gzip.compress(source) if headers else source
    [reply] = services["text_ranking"].answer([Call({"body": source}, asked(body, "rerank", **headers).headers)])
    assert 400 <= reply.status < 500
    assert ("error_type" in json.loads(reply.body)) is is_tei, reply.body


@pytest.mark.parametrize("media", ["application/json; charset=klingon", "multipart/mixed; boundary=x"])
def test_tei_calls_a_body_that_cannot_be_read_invalid(services: Dict[str, Service], media: str) -> None:
    [reply] = services["feature_extraction"].answer([Call({"body": b"{}"}, Headers(media, path="embed"))])
    assert reply.status == 415 and json.loads(reply.body)["error_type"] == "Validation"


def test_tei_cuts_long_texts_where_that_is_asked_for(services: Dict[str, Service]) -> None:
    [reply] = services["feature_extraction"].answer([asked({"inputs": TEXT * 99, "truncate": True}, "embed")])
    assert reply.status == 200 and json.loads(reply.headers["X-Truncated"])["0"]["text"]


def test_the_header_of_many_truncated_texts_is_short(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Common clients refuse headers beyond 8,190 bytes: the whole answer is lost."""
    source = str(checkpoint("bert", TASKS["feature_extraction"].auto_model))
    content = {"model_name": source, "task": "feature_extraction", "max_length": 32, "max_rows": 2048}
    run_export(tmp_path / "wide", content)
    service = Service(Engine.load(tmp_path / "wide"), "wide")
    text = "a " * 40
    for count in (1, 100, 200):
        body = {"inputs": [text] * count, "parameters": {"long_inputs": "truncate", "pooling": "mean"}}
        [reply] = service.answer([asked(body)])
        assert reply.status == 200 and len(json.loads(reply.body)) == count
        told = json.loads(reply.headers["X-Truncated"])
        assert len(reply.headers["X-Truncated"]) <= 4096
        if count == 200:
            assert told == {"requests": 200}
        else:
            assert list(told) == [str(i) for i in range(count)] and told["0"]["text"][1] == len(text)


@pytest.mark.parametrize(
    "body", [{"instances": [3]}, {"inputs": [{"name": "a", "datatype": "FP32", "shape": [1], "data": [1]}]}]
)
def test_errors_of_kserve_are_strings(services: Dict[str, Service], body: Any) -> None:
    """An object makes tritonclient's own error raise."""
    for sent in (body, json.dumps(body).encode()):
        assert isinstance(ask(services["sequence_classification"], "", sent, 400)["error"], str)


def test_an_error_that_cannot_be_told_in_its_own_shape_is_told_in_ours(
    services: Dict[str, Service], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And its neighbours are answered."""

    def broken(*told: Any) -> Any:
        raise KeyError(str(told))

    monkeypatch.setattr(type(PROTOCOLS["embed"]), "error", broken)
    body = {"inputs": "a secret", "truncate": 3}
    refused, answered = services["feature_extraction"].answer([asked(body, "embed"), asked(TEXT)])
    assert refused.status == 400 and json.loads(refused.body)["error"]["type"] == "InvalidRequest"
    assert answered.status == 200 and "KeyError" in caplog.text and "secret" not in caplog.text


def test_an_unknown_path_is_told_what_there_is(services: Dict[str, Service]) -> None:
    error = ask(services["feature_extraction"], "v1/audio", {}, 404)["error"]
    assert all(f"/{path}" in error["message"] for path in PROTOCOLS if path)


def test_a_version_called_v1_is_a_base_url(services: Dict[str, Service]) -> None:
    assert ask(services["feature_extraction"], "embeddings", {"input": TEXT})["object"] == "list"
    assert ask(services["feature_extraction"], "models/feature_extraction", {})["id"] == "feature_extraction"
    assert ask(services["feature_extraction"], "models/other", {}, 404)["error"]["param"] == "model"


# Any body, any path

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.floats(allow_nan=False)
    | st.sampled_from([TEXT, "", "é👍🏽", "\ud800"])
)
_KEYS = st.sampled_from(
    [
        "input",
        "inputs",
        "prompt",
        "messages",
        "text",
        "texts",
        "query",
        "documents",
        "parameters",
        "stream",
        "n",
        "stop",
        "seed",
    ]
    + [
        "temperature",
        "max_tokens",
        "model",
        "encoding_format",
        "truncate",
        "source_sentence",
        "sentences",
        "role",
        "content",
    ]
    + ["instances", "top_n", "logprobs", "other"]
)
_BODIES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4), max_leaves=8
)
_PATHS = st.sampled_from([*PROTOCOLS, "nothing", "v1"])


@settings(deadline=None, max_examples=150, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(st.tuples(_PATHS, _BODIES, st.sampled_from(["", HUB])), min_size=1, max_size=4),
    name=st.sampled_from(sorted({"sequence_classification", "feature_extraction", "text_ranking", "text_generation"})),
)
def test_any_body_at_any_path_is_answered_by_itself(services: Dict[str, Service], calls: List[Any], name: str) -> None:
    """With a status below 500, in JSON or as a page; and as if it were alone."""
    service = services[name]
    together = service.answer([asked(body, path, client) for path, body, client in calls])
    assert len(together) == len(calls)
    for reply, (path, body, client) in zip(together, calls):
        assert reply.status < 500, reply.body
        if reply.content_type == "application/json":
            json.loads(reply.body)
        [alone] = service.answer([asked(body, path, client)])
        assert alone.status == reply.status


@given(
    text=st.text("abc", max_size=12), stops=st.lists(st.text("abc", min_size=1, max_size=3), max_size=3), data=st.data()
)
def test_a_stop_string_is_found_however_the_text_comes(text: str, stops: List[str], data: st.DataObject) -> None:
    at = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    until = Stops(stops)
    pieces = [text[a:b] for a, b in zip([0, *at], [*at, len(text)])]
    got = "".join(until.feed(piece) for piece in pieces) + until.rest()
    places = [text.find(stop) for stop in stops if stop in text]
    first_end = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    if first_end is None:
        assert got == text == cut_at_stop(text, stops)
    else:
        assert text.startswith(got) and min(places) <= len(got) <= max(places) and until.found


# The description


@pytest.mark.parametrize("name", ["sequence_classification", "feature_extraction", "text_ranking", "text_generation"])
def test_the_description_is_valid_and_the_sample_fits_it(services: Dict[str, Service], name: str) -> None:
    import jsonschema
    from openapi_spec_validator import validate

    service = services[name]
    found = ask(service, "openapi.json", {})
    validate(found)
    schema = {**found["components"]["schemas"]["Request"], "components": found["components"]}
    body = service.engine.task.sample_body(service.engine.manifest.facts)
    jsonschema.validate(body, schema)
    example = found["paths"]["/"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert service.answer([asked(example)])[0].status == 200
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**body, "unknown": 1}, schema)
    explaining = found["paths"].get(f"/explanations/{name}/1.0")
    assert (explaining is not None) is (service.engine.task.explains is not None)
    if explaining is not None:
        schema = {**found["components"]["schemas"]["ExplanationRequest"], "components": found["components"]}
        body = {**body, "parameters": {"steps": 8, "method": "occlusion"}}
        jsonschema.validate(body, schema)
        [reply] = service.answer([Call({"body": json.dumps(body).encode()}, Headers("application/json", explain=True))])
        assert reply.status == 200, reply.body
        answer = {**found["components"]["schemas"]["Explanation"], "components": found["components"]}
        jsonschema.validate(json.loads(reply.body), answer)
        assert set(json.loads(reply.body)) <= set(answer["properties"])


def test_the_description_names_the_task_and_what_holds_by_default(services: Dict[str, Service]) -> None:
    found = {name: ask(service, "openapi.json", {}) for name, service in services.items()}
    for name, document in found.items():
        assert document["paths"]["/"]["post"]["tags"] == [name]
    classifier, writer = (
        found[name]["components"]["schemas"]["Parameters"]["properties"]
        for name in ("sequence_classification", "text_generation")
    )
    assert classifier["function_to_apply"]["default"] == "softmax"  # the archive's own
    assert classifier["long_inputs"]["default"] == "window" and writer["long_inputs"]["default"] == "reject"
    assert (writer["top_k"]["default"], writer["stream"]["default"]) == (50, False)  # the task's
    assert "default" not in classifier["top_k"] and "default" not in writer["seed"]


def test_the_page_and_the_facts(services: Dict[str, Service]) -> None:
    service = services["sequence_classification"]
    [page] = service.answer([asked({}, "docs")])
    assert page.content_type.startswith("text/html") and b"openapi.json" in page.body
    assert ask(service, "health", {}) == {"status": "ok"}
    assert ask(service, "info", {})["model_type"]["classifier"]["id2label"] == {"0": "red", "1": "green", "2": "blue"}


def test_a_request_that_breaks_its_protocol_is_logged_once(
    services: Dict[str, Service], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the sentence and the log of every other unexpected error."""

    def broken(*given: Any) -> None:
        raise ValueError(TEXT)

    caplog.set_level(logging.ERROR)
    monkeypatch.setattr("traceserve_runtime.protocols.requests.parse_value", broken)
    error = ask(services["feature_extraction"], "", {"text": TEXT}, 500)["error"]
    assert error["message"] == "an unexpected error in the worker while it read this request; its log has the details"
    assert caplog.text.count("traceserve: ValueError in 1 of 1 requests") == 1 and TEXT not in caplog.text


def panic(*given: Any, **named: Any) -> None:
    """What the tokenizers package does, for some texts, in place of an exception."""
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.encode("a a a a").truncate(2, stride=3)


def test_a_panic_while_a_request_is_read_is_its_own(
    services: Dict[str, Service], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = services["text_generation"]
    monkeypatch.setattr(service.engine.task.tokenizer, "decode", panic)
    first, failed, last = service.answer(
        [asked({}, "v1/models"), asked({"prompt": [5]}, "v1/completions"), asked({}, "health")]
    )
    assert (first.status, failed.status, last.status) == (200, 500, 200)
    assert "while it read this request" in json.loads(failed.body)["error"]["message"]
    assert "RuntimeError in 1 of 3 requests" in caplog.text


def broken(*given: Any, **named: Any) -> None:
    raise ValueError(TEXT)


@pytest.mark.parametrize("fails", [broken, panic])
def test_a_text_that_cannot_be_probed_is_its_owners(
    services: Dict[str, Service], fails: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error proves nothing, so the text is tokenized."""
    service = services["sequence_classification"]
    tokenizer = service.engine.task.tokenizer
    count = tokenizer._count
    probed: List[str] = []

    def probe(texts: List[str]) -> Any:
        probed.extend(text[:4] for text in texts)
        return fails() if texts[0].startswith("hard") else count(texts)

    monkeypatch.setattr(tokenizer, "_count", probe)
    most = tokenizer.limits.tokens
    bodies = [TEXT, "hard " * most, "easy " * most]
    statuses = [reply.status for reply in service.answer([asked({"text": text}) for text in bodies])]
    assert statuses == [200, 413, 413] and {*probed} == {"hard", "easy"}


def test_a_turn_that_fails_leaves_nothing_for_the_next(
    services: Dict[str, Service], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service, stats = services["text_generation"], Stats()
    session = service.session(stats)
    body = {"text": PROMPT, "parameters": {"max_new_tokens": 3}}
    with monkeypatch.context() as patch:
        patch.setattr(WritingLoop, "turn", broken)
        exchanges = session.join([asked(body)], [None])
        assert session.turn() == exchanges and not session.busy
    reply = exchanges[0].reply
    assert reply is not None and reply.status == 500 and caplog.text.count("ValueError in 1 of 1 requests") == 1
    for _ in range(3):
        session.turn()
    assert stats.rows == 0
    [other] = session.join([asked(body)], [None])
    while session.busy:
        session.turn()
    assert other.reply is not None and other.reply.status == 200


def test_half_a_surrogate_pair_in_an_echoed_id_is_answered(services: Dict[str, Service]) -> None:
    """ModelInfer's errors repeat the id, even one that the protocol refuses."""
    headers = Headers("application/json", grpc=True, parts={"body": "application/json"})
    [reply] = services["sequence_classification"].answer([Call({"body": {"id": "\ud800", "inputs": 5}}, headers)])
    assert json.loads(reply.body.decode("utf-8"))["id"] == "?"


class Shown:
    """A mirror that keeps what it is shown."""

    def __init__(self) -> None:
        self.texts: List[object] = []

    def show(self, served: Tuple[str, str], requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        assert served == ("intents", "2.1") and len(requests) == len(answers)
        self.texts += [request.inputs["text"] for request in requests]


def test_the_mirror_is_shown_predictions_alone(services: Dict[str, Service]) -> None:
    """Neither explanations, which are not compared, nor what was refused."""
    shown = Shown()
    service = Service(services["sequence_classification"].engine, "intents", "2.1", mirror=cast(Mirror, shown))
    calls = [asked([TEXT, OTHER]), asked({"text": "explained"}, explain=True), asked({"text": 5}), asked({}, "health")]
    assert [reply.status for reply in service.answer(calls)] == [200, 200, 400, 200]
    assert shown.texts == [TEXT, OTHER]


CALLS: Mapping[str, List[Tuple[str, Any]]] = {
    "sequence_classification": [("", {"inputs": [TEXT, OTHER]}), ("", {"text": 5}), ("v1/embeddings", {"input": [1]})],
    "feature_extraction": [("", {"inputs": [TEXT, OTHER], "parameters": {"pooling": "none"}}), ("", b"{")],
    "text_ranking": [("rerank", {"query": TEXT, "documents": [TEXT, OTHER]})],
    "text_generation": [
        ("", {"text": PROMPT, "parameters": {"max_new_tokens": 5, "details": True, "stop": "zz"}}),
        ("", {"text": PROMPT, "parameters": {"max_new_tokens": 5, "stream": True}}),
        ("", {"text": PROMPT, "parameters": {"num_beams": 2, "max_new_tokens": 5}}),
        ("v1/chat/completions", {"messages": CHAT, "max_tokens": 5, "stream": True}),
    ],
    "zero_shot_classification": [("", {"text": TEXT, "parameters": {"candidate_labels": ["sea", "land"]}})],
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("leaves", [False, True])
def test_an_answered_call_is_freed_at_once(services: Dict[str, Service], streamed: bool, leaves: bool) -> None:
    """Hosts freeze what they have loaded, and full garbage collections are rare: answers in a cycle would fill the memory."""
    kept = []
    for task, calls in CALLS.items():
        for path, body in calls:
            sent: List[bytes] = []
            send = (lambda piece, headers, sent=sent: sent.append(piece)) if streamed else None
            kept += [
                (task, path, each()) for each in left_behind(services[task], asked(body, path), send, leaves) if each()
            ]
    assert not kept
