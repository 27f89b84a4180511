"""Texts that continue their prompt's, with the space before a first word: as OpenAI's servers, vLLM and
text-generation-inference return them."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any, Callable, List

import numpy as np
import pytest
import transformers
from conftest import run_export
from test_service import CHAT, LLAMA, ask, events, stream
from test_written_text import KINDS, TEXTS, read
from tokenizers import decoders
from traceserve.building.gate.texts import SENTENCES
from traceserve_runtime.engine import Engine
from traceserve_runtime.service import Service
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Job, Request
from traceserve_runtime.tasks.generating import Generating
from traceserve_runtime.tasks.text_generation import TextGeneration
from traceserve_runtime.texts.continuation import Continuation
from traceserve_runtime.texts.rows import Encoded, Segments

# Continuations


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_text_cut_anywhere_is_joined_again(kind: str, tmp_path: Path) -> None:
    """Of texts that are cut after a whole character."""
    tokenizer = read(KINDS[kind](), tmp_path)

    def decode(ids: Any) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    lost = 0
    for text in TEXTS:
        ids = tokenizer.token_ids(text)[:80]
        whole = decode(ids)
        for cut in range(1, len(ids)):
            before, alone = decode(ids[:cut]), decode(ids[cut:])
            if before.strip() and "\ufffd" not in before + alone:
                assert before + Continuation(decode, ids[:cut]).of(ids[cut:], alone) == whole, (text, cut)
                lost += before + alone != whole
    assert bool(lost) == (kind != "byte-level")


def test_a_prompt_without_a_text_is_not_continued(tmp_path: Path) -> None:
    """A first word has no space before it, as without a prompt."""
    tokenizer = read(KINDS["llama"](), tmp_path)
    word = tokenizer.token_ids("train")

    def decode(ids: Any) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    for prompt in ([], [1], [1] * 30):
        assert Continuation(decode, prompt).of(word, "train") == "train"
    assert Continuation(decode, [*tokenizer.token_ids("The"), *[1] * 10]).of(word, "train") == " train"
    assert Continuation(decode, tokenizer.token_ids("The")).of([], "") == ""
    assert Continuation(decode, tokenizer.token_ids("The")).of([1, *word], "train") == " train"


# Protocols


@pytest.fixture(scope="module")
def service(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Service:
    """A decoder whose tokenizer leaves out the space before a first word, as Llama's."""
    folder = tmp_path_factory.mktemp("continuing")
    source = checkpoint("llama", "AutoModelForCausalLM")
    transformers.AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder / "source")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    parts = [decoders.Replace("Ġ", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.save_pretrained(folder / "source")
    content = {"model_name": str(folder / "source"), "task": "text_generation", "max_length": 128}
    run_export(folder / "x", content)
    engine = Engine.load(folder / "x")
    engine.manifest.facts["chat_template"] = LLAMA
    return Service(engine, "x")


@pytest.fixture(scope="module")
def prompts(service: Service) -> List[str]:
    """Prompts whose text goes on with a new word."""
    found = [text for text in SENTENCES if text and said(service, text).startswith(" ")]
    assert len(found) > 2
    return found


def ids_of(service: Service, text: str) -> List[int]:
    """Return the new tokens."""
    parameters = {"max_new_tokens": 9, "details": True}
    [answer] = ask(service, "", {"text": text, "parameters": parameters})
    return [token["id"] for token in answer["details"]["tokens"]]


def said(service: Service, text: str) -> str:
    """Return what the new tokens add to the prompt's text."""
    tokenizer = service.engine.task.tokenizer
    prompt = tokenizer.token_ids(text)
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode([*prompt, *ids_of(service, text)], skip_special_tokens=True)[len(before) :]


def test_our_own_answer_is_the_pipelines(service: Service, prompts: List[str]) -> None:
    """Also where a protocol returns another one: new versions are compared by it."""
    parameters = {"max_new_tokens": 9, "return_full_text": False}
    for prompt in prompts:
        expected = said(service, prompt)
        [answer] = ask(service, "", {"text": prompt, "parameters": parameters})
        assert answer["generated_text"] == expected[1:]
        assert stream(service, "", {"text": prompt, "parameters": {**parameters, "stream": True}})[0] == expected[1:]
        [found] = service.engine.answer([Request({"text": prompt}, parameters, continues=True)])
        assert isinstance(found, Answer) and found.value == [answer]
        assert found.continued.value == [{"generated_text": expected}]


def test_completions_keep_the_space_before_the_first_word(service: Service, prompts: List[str]) -> None:
    body = {"prompt": prompts, "max_tokens": 9, "n": 2}
    expected = [said(service, prompt) for prompt in prompts for _ in range(2)]
    assert [choice["text"] for choice in ask(service, "v1/completions", body)["choices"]] == expected
    echoed = [choice["text"] for choice in ask(service, "v1/completions", {**body, "echo": True})["choices"]]
    assert echoed == [prompt + own for prompt, own in zip([each for each in prompts for _ in range(2)], expected)]


def test_so_do_their_tokens(service: Service, prompts: List[str]) -> None:
    """And the other likely ones at their positions."""
    for prompt in prompts:
        body = {"prompt": prompt, "max_tokens": 9, "logprobs": 5}
        [choice] = ask(service, "v1/completions", body)["choices"]
        tokens, likely = choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"]
        assert "".join(tokens) == choice["text"] == said(service, prompt)
        assert choice["logprobs"]["text_offset"] == [0, *accumulate(map(len, tokens))][:-1]
        assert all(token in each for token, each in zip(tokens, likely)) and len(likely) == 9
        text, _ = stream(service, "v1/completions", {**body, "stream": True})
        assert [c for c in events(text) if c["choices"][0]["logprobs"]][0]["choices"][0]["logprobs"] == choice[
            "logprobs"
        ]


def test_a_text_that_is_cut_within_a_character_ends_as_the_pipelines(service: Service, tmp_path: Path) -> None:
    """Decoding leaves nothing of all bytes that stand together, so none of them is sent before they are whole."""
    tokenizer = read(KINDS["llama"](), tmp_path)
    task = TASKS["text_generation"](service.engine.manifest, tokenizer)
    assert isinstance(task, TextGeneration)
    [encoded] = tokenizer.encode([Segments("The train")], ["reject"])
    assert isinstance(encoded, Encoded)
    ids = tokenizer.token_ids("a 日本 a")
    pieces: List[str] = []
    request = Request({"text": "The train"}, {"return_full_text": False, "stream": True}, continues=True)

    def continued(tokens: List[int]) -> str:
        outputs = [{"tokens": np.array(tokens)}]
        found = task.continuation(request, encoded.rows, outputs, Answer(task.decode(request, encoded.rows, outputs)))
        assert found is not None
        return str(found.value)

    tell = task._told(Job(encoded.rows[0], request, pieces.append), continued)
    assert tell is not None
    for cut in range(1, len(ids) + 1):
        tell(ids[:cut], ())
        whole = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        assert continued(ids[:cut]) == " " + whole
        assert all((" " + whole).startswith(piece) for piece in pieces)
    assert pieces[-1] == " a 日本 a"
    assert continued(ids[:-2]).endswith("\ufffd" * 5)


def test_so_do_streams_and_stop_strings(service: Service, prompts: List[str]) -> None:
    """A stop string may begin with that space."""
    for prompt in prompts:
        expected = said(service, prompt)
        for stop in (None, expected[:2], expected[1:3], expected[:1], expected[4:7], "zzzz"):
            body = {"prompt": prompt, "max_tokens": 9, "stop": stop}
            [choice] = ask(service, "v1/completions", body)["choices"]
            assert choice["text"] == (expected if stop is None else expected.partition(stop)[0]), stop
            text, _ = stream(service, "v1/completions", {**body, "stream": True})
            chunks = [event["choices"][0] for event in events(text)]
            assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
            assert chunks[-1]["finish_reason"] == choice["finish_reason"]


def test_texts_of_hugging_face_are_text_generation_inferences(service: Service, prompts: List[str]) -> None:
    for prompt in prompts:
        expected = said(service, prompt)
        parameters = {"max_new_tokens": 9, "details": True, "top_n_tokens": 3}
        for full in (False, True):
            body = {"inputs": prompt, "parameters": {**parameters, "return_full_text": full}}
            [answer] = ask(service, "hf", body)
            assert answer["generated_text"] == (prompt if full else "") + expected
            tokens, likely = answer["details"]["tokens"], answer["details"]["top_tokens"]
            assert "".join(token["text"] for token in tokens) == expected
            assert all(each[0] == token for token, each in zip(tokens, likely)) and len(likely) == 9
        text, _ = stream(service, "hf", {"inputs": prompt, "parameters": {"max_new_tokens": 9}, "stream": True})
        assert "".join(event["token"]["text"] for event in events(text)) == expected
        assert events(text)[-1]["generated_text"] == expected


@pytest.mark.parametrize("begun", ["", "Yes.", "Ich", "The train to", "Could you tell"])
def test_a_chats_message_begins_without_a_space(service: Service, begun: str) -> None:
    """But one that the client has begun goes on as a text does."""
    messages = [*CHAT, {"role": "assistant", "content": begun}] if begun else CHAT
    body = {"messages": messages, "max_tokens": 9, "logprobs": True, "top_logprobs": 2}
    [choice] = ask(service, "v1/chat/completions", body)["choices"]
    parameters = {"max_new_tokens": 9, "return_full_text": False}
    [answer] = ask(service, "", {"messages": messages, "parameters": parameters})
    text = choice["message"]["content"]
    assert text == (" " if begun else "") + answer["generated_text"]
    assert "".join(each["token"] for each in choice["logprobs"]["content"]) == text
    streamed, _ = stream(service, "v1/chat/completions", {**body, "stream": True})
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events(streamed)) == text


def test_a_stream_decodes_a_token_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stop strings too."""
    task = service.engine.task
    assert isinstance(task, Generating)
    calls, own = [], task.text
    monkeypatch.setattr(task, "text", lambda tokens: calls.append(tokens) or own(tokens))

    def counted(**options: Any) -> int:
        calls.clear()
        stream(service, "v1/completions", {"prompt": SENTENCES[1], "max_tokens": 40, "stream": True, **options})
        return len(calls)

    assert counted(stop=["\x00"]) < counted() + 10
