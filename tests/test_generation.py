"""Token by token: the loop writes transformers' `generate`'s texts, and samples by its processors' probabilities."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import jinja2
import models
import numpy as np
import pytest
import torch
import transformers
from conftest import run_export
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import answers, generated, written
from test_written_text import KINDS, read
from test_written_text import TEXTS as WRITTEN
from tokenizers import decoders
from traceserve.building.gate.texts import SENTENCES, VERY_LONG
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidRequest, MissingPackage, TraceserveError, Unsupported
from traceserve_runtime.generation.scores import GenerationSettings, drawable, processed
from traceserve_runtime.generation.search import Sampling
from traceserve_runtime.protocols.events import Stops
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, ModelFacts, Request
from traceserve_runtime.tasks.generating import Generating
from traceserve_runtime.tasks.generation_parameters import PARAMETERS, SAMPLING
from traceserve_runtime.tasks.parameters import Parameter
from traceserve_runtime.tasks.token_details import token_details
from traceserve_runtime.texts import chat
from traceserve_runtime.texts.rows import Encoded
from traceserve_runtime.texts.written_text import NEIGHBOURS, WORDS, added_texts

DECODERS = ("gpt2", "llama")
ENCODER_DECODERS = ("t5", "marian", "bart")
TASK = {**dict.fromkeys(DECODERS, "text_generation"), **dict.fromkeys(ENCODER_DECODERS, "text2text_generation")}
TEXTS = [text for text in SENTENCES if text][:10]

Made = Tuple[Engine, Any, Any]  # the engine, the original model, its tokenizer


@pytest.fixture(scope="module")
def made(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    @lru_cache(maxsize=None)
    def make(architecture: str) -> Made:
        task = TASK[architecture]
        source = checkpoint(architecture, TASKS[task].auto_model)
        folder = tmp_path_factory.mktemp("generating") / architecture
        run_export(folder, {"model_name": str(source), "task": task, "max_length": 128})
        model = getattr(transformers, TASKS[task].auto_model).from_pretrained(source).eval()
        return Engine.load(folder), model, transformers.AutoTokenizer.from_pretrained(source)

    return make


def original(made: Made, text: str, **options: Any) -> str:
    """Return the original's text for one text alone."""
    _, model, tokenizer = made
    return generated(model, tokenizer, text, **options)


@pytest.mark.parametrize("architecture", TASK)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1},
        {"num_beams": 1, "repetition_penalty": 1.7},
        {"num_beams": 1, "no_repeat_ngram_size": 2, "min_new_tokens": 12},
        {"num_beams": 2},
        {"num_beams": 4, "length_penalty": 2.0},
        {"num_beams": 4, "length_penalty": -1.0, "early_stopping": True},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
        {"num_beams": 5, "early_stopping": True, "min_new_tokens": 5},
    ],
    ids=str,
)
@pytest.mark.combinations
def test_equals_generate(architecture: str, options: Dict[str, Any], made: Callable[[str], Made]) -> None:
    """All texts in one batch, prompts of many lengths, against the original on each alone."""
    engine, _, _ = made(architecture)
    requests = [Request({"text": text}, {"max_new_tokens": 20, **options}) for text in TEXTS]
    expected = [original(made(architecture), text, **options) for text in TEXTS]
    assert [written(value) for value in answers(engine, requests)] == expected


@pytest.mark.parametrize("architecture, beams", [("gpt2", 1), ("bart", 3)])
@pytest.mark.parametrize("presence, frequency", [(2.0, 0.0), (0.0, 0.7), (-1.0, 0.3)])
@pytest.mark.combinations
def test_penalties_of_openai(
    architecture: str, beams: int, presence: float, frequency: float, made: Callable[[str], Made]
) -> None:
    """As its documentation has them, for the tokens that were written; transformers has none."""

    def penalized(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = []
        for row, own in zip(ids.tolist(), scores.tolist()):
            new = row[begin:]
            rows.append(
                [mu - new.count(j) * frequency - float(new.count(j) > 0) * presence for j, mu in enumerate(own)]
            )
        return torch.tensor(rows)

    engine, _, tokenizer = made(architecture)
    asked = {"num_beams": beams, "max_new_tokens": 20, "presence_penalty": presence, "frequency_penalty": frequency}
    got = [written(value) for value in answers(engine, [Request({"text": text}, asked) for text in TEXTS])]
    plain = [original(made(architecture), text, num_beams=beams) for text in TEXTS]
    expected = []
    for text in TEXTS:
        begin = len(tokenizer(text)["input_ids"]) if TASK[architecture] == "text_generation" else 1
        expected.append(original(made(architecture), text, num_beams=beams, logits_processor=[penalized]))
    assert got == expected != plain


@pytest.mark.parametrize("architecture, beams", [("gpt2", 1), ("bart", 3)])
def test_logit_bias(architecture: str, beams: int, made: Callable[[str], Made]) -> None:
    """As transformers' `sequence_bias` of single tokens, each row by its own."""
    engine, _, tokenizer = made(architecture)
    plain = [original(made(architecture), text, num_beams=beams) for text in TEXTS]
    first = [tokenizer(text, add_special_tokens=False)["input_ids"][:2] for text in plain]
    biases = [{ids[0]: -100, ids[1]: 1.5, 7: 2} for ids in first]
    asked = [
        {"num_beams": beams, "max_new_tokens": 20, "logit_bias": {str(k): v for k, v in b.items()}} for b in biases
    ]
    requests = [Request({"text": text}, one) for text, one in zip(TEXTS, asked)]
    got = [written(value) for value in answers(engine, requests)]
    assert got != plain and got == [
        original(made(architecture), text, num_beams=beams, sequence_bias=[[[k], float(v)] for k, v in own.items()])
        for text, own in zip(TEXTS, biases)
    ]


def test_the_gate_knows_what_transformers_lacks_or_names_otherwise(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    parameters = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"9": -100}, "max_new_tokens": 20}
    lines = [json.dumps({"text": text, "parameters": parameters}) for text in TEXTS[:3]]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    source = checkpoint("gpt2", "AutoModelForCausalLM")
    content = {"model_name": str(source), "task": "text_generation", "max_length": 128}
    receipt = run_export(tmp_path / "x", content, samples_file=tmp_path / "mine.jsonl").manifest.receipt
    assert (receipt["own_answers"], receipt["own_answers_changed"]) == (3, 0)


@pytest.mark.parametrize("architecture", TASK)
def test_texts_that_end_leave_the_batch(architecture: str, made: Callable[[str], Made]) -> None:
    """With an early end: a token that some of the texts are known to contain."""
    engine, model, tokenizer = made(architecture)
    lengths = set()
    for number, text in enumerate(TEXTS):
        ids = model.generate(
            **tokenizer(text, return_tensors="pt", return_token_type_ids=False), do_sample=False, max_new_tokens=24
        )[0]
        end = int(ids[-2 - 2 * number])
        before = engine.manifest.facts["eos_ids"]
        engine.manifest.facts["eos_ids"] = [end]
        try:
            got = engine.answer([Request({"text": text}, {"max_new_tokens": 24, "num_beams": 1}) for text in TEXTS])
        finally:
            engine.manifest.facts["eos_ids"] = before
        for text, result in zip(TEXTS, got):
            assert isinstance(result, Answer)
            expected = original(made(architecture), text, max_new_tokens=24, num_beams=1, eos_token_id=end)
            assert written(result.value) == expected
            lengths.add(len(expected))
    assert len(lengths) > 3


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_a_mixed_batch_answers_as_each_alone(architecture: str, made: Callable[[str], Made]) -> None:
    engine, _, _ = made(architecture)
    kinds: List[Dict[str, Any]] = [
        {"num_beams": 1, "max_new_tokens": 5},
        {"num_beams": 1, "max_new_tokens": 30},
        {"num_beams": 4, "max_new_tokens": 12},
        {"seed": 7, "temperature": 0.7, "max_new_tokens": 20},
        {"num_beams": 2, "max_new_tokens": 25, "early_stopping": True},
    ]
    requests = [Request({"text": TEXTS[i % len(TEXTS)]}, kinds[i % len(kinds)]) for i in range(31)]
    alone = [answers(engine, [request])[0] for request in requests]
    order = list(range(31))
    for seed in range(3):
        random.Random(seed).shuffle(order)
        together = answers(engine, [requests[i] for i in order])
        assert together == [alone[i] for i in order]


def test_a_stop_string_ends_some_texts(made: Callable[[str], Made]) -> None:
    engine, _, _ = made("gpt2")
    texts = [Request({"text": text}, {"max_new_tokens": 40, "stop": ["e"]}) for text in TEXTS]
    stopped = 0
    for text, value in zip(TEXTS, answers(engine, texts)):
        whole = original(made("gpt2"), text, max_new_tokens=40)
        expected = original(made("gpt2"), text, max_new_tokens=40, stop_strings=["e"])
        assert written(value) == expected
        stopped += expected != whole
    assert stopped > 3


@pytest.mark.parametrize("stop", ["\n", "aa", ["zz", "t", "%"]])
def test_stop_strings(stop: Any, made: Callable[[str], Made]) -> None:
    engine, _, _ = made("llama")
    requests = [Request({"text": text}, {"max_new_tokens": 40, "stop": stop}) for text in TEXTS]
    expected = [original(made("llama"), text, max_new_tokens=40, stop_strings=stop) for text in TEXTS]
    assert [written(value) for value in answers(engine, requests)] == expected


@pytest.fixture(scope="module")
def stripping(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A decoder that leaves out the space before a first word, as sentencepiece's do, and writes <pad> soon after
    the first text."""
    folder = tmp_path_factory.mktemp("stripping")
    source = checkpoint("llama", "AutoModelForCausalLM")
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(TEXTS[0], return_tensors="pt", return_token_type_ids=False)
    third = model.generate(**inputs, do_sample=False, max_new_tokens=3)[0, -1]
    model.config.tie_word_embeddings = False
    weight = model.lm_head.weight.detach().clone()
    weight[tokenizer.pad_token_id] = 2 * weight[third]
    model.lm_head.weight = torch.nn.Parameter(weight)
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("Ġ", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    run_export(
        folder / "x",
        {"model_name": str(folder / "source"), "task": "text_generation", "dtype": "float32", "max_length": 128},
    )
    return Engine.load(folder / "x"), model, tokenizer


def new_tokens(made: Made, text: str, **options: Any) -> List[int]:
    _, model, tokenizer = made
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, do_sample=False, tokenizer=tokenizer, **options)[0]
    found: List[int] = ids[inputs["input_ids"].shape[1] :].tolist()
    return found


def details_of(engine: Engine, text: str, **parameters: Any) -> Dict[str, Any]:
    [answer] = answers(engine, [Request({"text": text}, {"details": True, **parameters})])
    found: Dict[str, Any] = answer[0]["details"]
    return found


def test_a_stop_string_may_be_a_special_token(stripping: Made) -> None:
    expected = new_tokens(stripping, TEXTS[0], max_new_tokens=10, stop_strings=["<pad>"])
    assert expected[-1] == stripping[2].pad_token_id and len(expected) < 10
    details = details_of(stripping[0], TEXTS[0], max_new_tokens=10, stop=["<pad>"])
    assert [token["id"] for token in details["tokens"]] == expected and details["finish_reason"] == "stop_sequence"


@pytest.mark.parametrize("kind", [*KINDS, "wordpiece"])
@pytest.mark.parametrize("clean_up", [False, True])
def test_stop_strings_end_any_tokens_where_the_original_criterion_does(
    kind: str, clean_up: bool, made: Callable[[str], Made], tmp_path: Path
) -> None:
    """It spells special tokens, as the [SEP] behind a prompt, and what is cleaned up later."""
    own = KINDS[kind]() if kind in KINDS else models.make_tokenizer("bert").backend_tokenizer
    original: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=own)
    task = TASKS["text_generation"](made("llama")[0].manifest, read(own, tmp_path, clean_up))
    assert isinstance(task, Generating)
    valid = [i for i in range(len(original)) if not str(own.id_to_token(i)).startswith("<0x")]
    valid = [i for i in valid if "\ufffd" not in task.tokenizer.decode([i], False)]
    chosen = random.Random(5)
    found = 0
    for _ in range(60):
        prompt = original("the train at", add_special_tokens=chosen.random() < 0.5).input_ids
        new = [i for word in chosen.choices(valid, k=8) for i in (word, chosen.choice([1, word]))]
        text = own.decode([*prompt, *new], skip_special_tokens=False)
        at = chosen.randrange(8, len(text) - 4)
        stop = text[at : at + chosen.randint(1, 4)]
        criterion = transformers.StopStringCriteria(original, [stop])
        ends = task._ends(Request({"text": "a"}, {"stop": stop}), prompt, task._spelled(prompt, growing=True))
        assert ends is not None
        for count in range(1, len(new) + 1):
            expected = bool(criterion(torch.tensor([prompt + new[:count]]), None)[0])
            assert ends(new[:count]) == expected, (stop, prompt, new[:count])
            if expected:
                found += 1
                break
    assert found > 20


def test_a_stop_string_may_begin_with_the_space_before_the_first_word(stripping: Made) -> None:
    engine, _, tokenizer = stripping
    found = 0
    for text in TEXTS:
        first = tokenizer.convert_ids_to_tokens(new_tokens(stripping, text, max_new_tokens=1))[0]
        if first.startswith("Ġ") and len(first) > 1:
            found += 1
            stop = first.replace("Ġ", " ")
            assert len(new_tokens(stripping, text, max_new_tokens=10, stop_strings=[stop])) == 1
            assert details_of(engine, text, max_new_tokens=10, stop=[text[-3:] + stop])["generated_tokens"] == 1
    assert found


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_stop_string_of_openai_begins_in_what_is_written(kind: str, made: Callable[[str], Made]) -> None:
    """As with vLLM; with transformers it may begin in the prompt."""
    engine, _, _ = made("llama")
    if kind == "chat":
        facts = {**engine.manifest.facts, "chat_template": "{{ messages[0].content }}"}
        manifest = replace(engine.manifest, facts=facts)
        task = TASKS["text_generation"](manifest, engine.task.tokenizer)
        engine = Engine(engine.folder, manifest, task, engine.runner)
    found = 0
    for text in TEXTS:
        fields = {"text": text} if kind == "text" else {"messages": [{"role": "user", "content": text}]}
        whole = continued(engine, fields)
        first = whole["generated_text"][:1]
        stop = text[-2:] + first
        if whole["details"]["finish_reason"] != "length" or first == "\ufffd" or stop in whole["generated_text"]:
            continue
        found += 1
        assert continued(engine, fields, stop=stop) == whole
        native = continued(engine, fields, continues=False, stop=stop)["details"]
        assert native["finish_reason"] == "stop_sequence" and native["generated_tokens"] < 12
        ended = continued(engine, fields, stop=first)["details"]
        assert ended["finish_reason"] == "stop_sequence" and ended["generated_tokens"] < 12
    assert found > 3


def continued(engine: Engine, fields: Dict[str, Any], continues: bool = True, **parameters: Any) -> Dict[str, Any]:
    asked = {"max_new_tokens": 12, "return_full_text": False, "details": True, **parameters}
    [result] = engine.answer([Request(fields, asked, continues=continues)])
    assert isinstance(result, Answer)
    value: Any = result.continued.value
    found: Dict[str, Any] = value[0]
    return found


STOP = next(parameter for parameter in TASKS["text_generation"].parameters if parameter.name == "stop")


def test_a_lone_space_is_no_special_token(tmp_path: Path) -> None:
    tokenizer = read(KINDS["sentencepiece"](), tmp_path)
    space, pad = (tokenizer.token_id(token) for token in ("\u2581", "<pad>"))
    word = next(number for number in range(tokenizer.vocabulary_size) if tokenizer.decode([number], True).isalpha())
    assert space is not None and pad is not None
    assert tokenizer.decode([space], False) == "" and tokenizer.special_of([space, pad, word]) == {pad}
    output = {"tokens": np.array([word, space, pad]), "logarithms": np.zeros(3)}
    assert [(each["text"], each["special"]) for each in token_details(tokenizer, output)["tokens"]] == [
        (tokenizer.decode([word], True), False),
        (" ", False),
        ("<pad>", True),
    ]


def test_only_special_tokens_are_stop_strings_by_themselves(made: Callable[[str], Made], tmp_path: Path) -> None:
    tokenizer = read(KINDS["sentencepiece"](), tmp_path)
    space, pad = (tokenizer.token_id(token) for token in ("\u2581", "<pad>"))
    assert space is not None and pad is not None
    task = TASKS["text_generation"](made("llama")[0].manifest, tokenizer)
    assert isinstance(task, Generating)
    ends = task._ends(Request({"text": "a"}, {"stop": ["\u2581", "<pad>"]}), [], task.text)
    assert ends is not None and not ends([space]) and ends([space, pad])


def test_what_is_cleaned_up_is_sent_once_it_cannot_change(made: Callable[[str], Made], tmp_path: Path) -> None:
    manifest = made("llama")[0].manifest
    facts = replace(manifest.tokenizer, clean_up=True)
    tokenizer = read(KINDS["byte-level"](), tmp_path, clean_up=True)
    task = TASKS["text_generation"](replace(manifest, tokenizer=facts), tokenizer)
    assert isinstance(task, Generating)
    tokens = ["I", "do", "n", "'", "t", "know", ",", "it", "'", "s", "a", "'", "re", "?", "n", "'", "n", "'", "m"]
    whole = tokenizer.cleaned(" ".join(tokens))
    assert whole == "I don't know, it's a're? n'n'm"
    for count in range(1, len(tokens) + 1):
        assert whole.startswith(task._settled(tokenizer.cleaned(" ".join(tokens[:count]))))


def test_stop_strings_are_few_and_short() -> None:
    """Each is looked for after every token of every text."""
    for value in ("x" * 256, ["x"], ["x" * 256] * 16):
        assert STOP.accepts(value)
    for value in ("x" * 257, ["x"] * 17, ["x", "y" * 257], [], ""):
        assert not STOP.accepts(value)
    assert STOP.legal == "a string or a list of strings, at most 16 of at most 256 characters each"
    text = {"type": "string", "minLength": 1, "maxLength": 256}
    array = {"type": "array", "items": text, "minItems": 1, "maxItems": 16}
    assert STOP.schema["anyOf"] == [text, array]
    model = ModelFacts({}, {"stop_strings": ["x"] * 17}, {}, (), None, lambda name: None)
    with pytest.raises(Unsupported, match="generation_config.json says stop_strings = .* at most 16 of at most 256"):
        TASKS["text_generation"].defaults(model)


@pytest.mark.parametrize(
    ("most", "longest", "limits"),
    [(None, None, ""), (3, None, ", at most 3"), (None, 9, ", at most 9 characters each")],
)
def test_a_list_has_the_limits_that_it_names(most: Any, longest: Any, limits: str) -> None:
    parameter = Parameter("words", list, "", most=most, longest=longest)
    assert parameter.legal == f"a string or a list of strings{limits}"
    assert parameter.accepts(["x"] * 4) is (most is None) and parameter.accepts("x" * 10) is (longest is None)


@settings(deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_what_may_begin_a_stop_string_is_held_back(pieces: List[str], stops: List[str]) -> None:
    """And nothing else."""
    until, whole, sent = Stops(stops), "", ""
    for piece in pieces:
        whole, sent = whole + piece, sent + until.feed(piece)
        cuts = [whole.find(stop) for stop in stops if stop in whole]
        if cuts:
            assert until.found and sent == whole[: min(cuts)]
            return
        begun = [n for stop in stops for n in range(len(stop)) if whole.endswith(stop[:n])]
        assert sent == whole[: len(whole) - max(begun, default=0)]
    assert sent + until.rest() == whole


def test_beginnings_of_long_stop_strings_are_found_at_once() -> None:
    """By their first letter: not by trying each length."""

    class Piece(str):
        compared = 0

        def endswith(self, *arguments: Any) -> bool:
            Piece.compared += 1
            return super().endswith(*arguments)

    for stop in ("x" * 256, "ab" * 128):
        assert Stops([stop])._begun(Piece("y" * 5000 + stop[:100]), stop) == 100
    assert not Piece.compared


# Log-probabilities


def naively_added(decode: Callable[[List[int]], str], ids: List[int], others: List[List[int]]) -> Any:
    """As `added_texts`, from whole texts."""
    texts, of_others, before = [], [], ""
    for i, instead in enumerate(others):
        of_others.append([decode([*ids[:i], other])[len(before) :] for other in instead])
        after = decode(ids[: i + 1])
        texts.append((after if i + 1 == len(ids) else after.rstrip("\ufffd"))[len(before) :])
        before += texts[-1]
    return texts, of_others


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("clean_up", [False, True])
def test_the_text_of_each_token_is_what_it_adds_to_the_whole(kind: str, clean_up: bool, tmp_path: Path) -> None:
    """And so is that of each other one at its position."""
    tokenizer = read(KINDS[kind](), tmp_path, clean_up)
    words = tokenizer.decodes_words_locally
    assert words == (kind != "llama")

    def decode(ids: Any) -> str:
        return tokenizer.decode(ids, False, raw=True)

    valid = [i for i in range(tokenizer.vocabulary_size) if not tokenizer.token(i).startswith("<0x")]
    chosen = random.Random(4)
    for text in WRITTEN:
        ids = tokenizer.token_ids(text)[:90]
        for _ in range(len(ids) // 20):
            ids.insert(chosen.randrange(len(ids)), 1)  # special tokens, and bytes that are no character
        others = [chosen.sample(valid, 4) for _ in ids]
        near = WORDS if words else NEIGHBOURS
        assert tokenizer.spells_locally
        got = added_texts(decode, tokenizer.spells_locally, ids, others, near)
        expected = naively_added(decode, ids, others)
        if kind != "llama":
            assert got == expected
        for some, same in zip([got[0], *got[1]], [expected[0], *expected[1]]):
            assert all(
                one == other or "\ufffd" in other for one, other in zip(some, same)
            )  # bytes spoil those before them


@pytest.mark.parametrize("clean_up", [False, True])
def test_log_probabilities_take_little_time(
    clean_up: bool, made: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made while everybody else waits: once, and from few tokens each, however long the text is."""
    engine, _, _ = made("llama")
    tokenizer = engine.task.tokenizer
    asked = {"max_new_tokens": 100, "min_new_tokens": 100, "details": True, "top_n_tokens": 20, "seed": 1}
    [expected] = answers(engine, [Request({"text": "The train"}, asked)])
    decoded: List[int] = []

    class Counting:
        """The tokenizer, of which the decoded tokens are counted."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        decodes_locally = not clean_up

        def decode(self, ids: Any, *arguments: Any, **options: Any) -> str:
            decoded.append(len(ids))
            return tokenizer.decode(ids, *arguments, **options)

        def decode_each(self, sequences: Any, *arguments: Any, **options: Any) -> List[str]:
            decoded.extend(map(len, sequences))
            return tokenizer.decode_each(sequences, *arguments, **options)

    counting: Any = Counting()
    monkeypatch.setattr(engine.task, "tokenizer", counting)
    assert answers(engine, [Request({"text": "The train"}, asked)]) == [expected]
    written_alone = 100 * 100 if clean_up else 100 * 24  # while it is written, for `stream` and `stop`
    assert sum(decoded) - written_alone < 100 * 21 * 8


def test_log_probabilities_of_one_http_request_are_limited(
    made: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 128 tokens writes no more, whatever is asked for."""
    engine, _, _ = made("llama")

    def refused(count: int, group: Any = 7, **asked: Any) -> List[Any]:
        request = Request({"text": "a"}, {"details": True, "max_new_tokens": 127, **asked}, group)
        return [part for part in engine.task.parts([request] * count) if isinstance(part, TraceserveError)]

    assert refused(24, top_n_tokens=20) == refused(250) == refused(250, group=None, top_n_tokens=20) == []
    assert refused(250, details=False, top_n_tokens=20) == []
    errors = refused(25, top_n_tokens=20)
    assert len(errors) == 25 and errors[0].status == 413 and errors[0].field == "parameters.top_n_tokens"
    assert "may have 66,675 log-probabilities; one request may have about 65,536" in errors[0].message
    assert refused(25, top_n_tokens=20, max_new_tokens=10) == []
    # Texts that have to be decoded whole take longer.
    monkeypatch.setattr(engine.task.tokenizer, "decodes_locally", False)
    assert refused(24, top_n_tokens=20) == []
    monkeypatch.setattr(engine.task.tokenizer, "spells_locally", False)
    assert "about 32,768" in refused(24, top_n_tokens=20)[0].message


def test_a_seed_draws_the_same_again(made: Callable[[str], Made]) -> None:
    engine, _, _ = made("gpt2")
    request = Request({"text": "The train"}, {"seed": 5, "max_new_tokens": 30})
    [one], [two] = answers(engine, [request]), answers(engine, [request])
    others = [answers(engine, [Request({"text": "The train"}, {"seed": s, "max_new_tokens": 30})])[0] for s in range(4)]
    assert one == two
    assert len({written(other) for other in others}) == 4
    unseeded = [answers(engine, [Request({"text": "The"}, {"do_sample": True, "max_new_tokens": 30})])[0] for _ in "ab"]
    assert unseeded[0] != unseeded[1]


def hugging_face(scores: np.ndarray, ids: List[int], options: Dict[str, Any]) -> np.ndarray:
    """Return the probabilities after transformers' own processors."""
    processors = transformers.LogitsProcessorList()
    if options.get("repetition_penalty", 1.0) != 1.0:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if options.get("no_repeat_ngram_size"):
        processors.append(transformers.NoRepeatNGramLogitsProcessor(options["no_repeat_ngram_size"]))
    if options.get("temperature", 1.0) != 1.0:
        processors.append(transformers.TemperatureLogitsWarper(options["temperature"]))
    if options.get("top_k"):
        processors.append(transformers.TopKLogitsWarper(options["top_k"]))
    if options.get("top_p", 1.0) < 1.0:
        processors.append(transformers.TopPLogitsWarper(options["top_p"]))
    if options.get("min_p"):
        processors.append(transformers.MinPLogitsWarper(options["min_p"]))
    if options.get("typical_p"):
        processors.append(transformers.TypicalLogitsWarper(options["typical_p"]))
    # In double precision: what float32 sums decide differently at a limit is not what is compared.
    left = processors(torch.tensor([ids]), torch.from_numpy(scores[None].astype(np.float64)))
    return np.asarray(left.softmax(-1)[0].numpy())


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(60, 4), (3000, 4), (3000, 0.5)]),
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0.1, 3),
            "top_k": st.integers(1, 40),
            "top_p": st.floats(0.05, 0.99),
            "min_p": st.floats(0.01, 0.9),
            "typical_p": st.floats(0.05, 0.95),
            "repetition_penalty": st.floats(0.5, 2),
            "no_repeat_ngram_size": st.integers(1, 4),
        },
    ),
)
def test_probabilities_are_those_of_the_original_processors(
    seed: int, made: Tuple[int, float], options: Dict[str, Any]
) -> None:
    size, spread = made
    rng = np.random.default_rng(seed)
    scores = (rng.standard_normal(size) * spread).astype(np.float32)
    ids = rng.integers(0, 12, 20).tolist()
    chosen = GenerationSettings(max_new_tokens=50, do_sample=True, **options)
    ids_left, left = drawable(processed(scores, np.array(ids[:8]), ids[8:], chosen), chosen)
    got = np.zeros(size, np.float32)
    got[ids_left] = left
    expected = hugging_face(scores, ids, options)
    for _ in range(4):  # of tokens at a limit, as two that are equally typical, rounding takes one or the other
        noise = rng.uniform(-3e-6, 3e-6, size).astype(np.float32)
        assume(((hugging_face(scores + noise, ids, options) > 0) == (expected > 0)).all())
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_a_temperature_near_zero_takes_the_best(made: Callable[[str], Made]) -> None:
    engine, _, _ = made("gpt2")
    for temperature in (1e-46, 1e-38, 1e-7, 1e-5):
        request = Request({"text": "The train"}, {"temperature": temperature, "seed": 1, "max_new_tokens": 12})
        assert written(answers(engine, [request])[0]) == original(made("gpt2"), "The train", max_new_tokens=12)


@pytest.mark.parametrize(("tokens", "best"), [([], 13), ([3], 13), ([3, 3], 2)])
def test_the_forced_last_token_wins_over_the_forced_first(tokens: List[int], best: int) -> None:
    chosen = GenerationSettings(max_new_tokens=len(tokens) % 2 + 1, forced_bos_id=9, forced_eos_ids=(13,))
    scores = np.eye(20, dtype=np.float32)[2]
    assert processed(scores, np.array([0]), tokens, chosen).argmax() == best


def test_what_transformers_reads_otherwise_than_it_stands() -> None:
    """Words that are the end, which may not be forbidden; and the names of a decoder's positions."""

    def facts(config: Dict[str, Any], **generation: Any) -> Dict[str, Any]:
        model = ModelFacts({"decoder_start_token_id": 0, **config}, generation, {}, (), None, lambda name: None)
        return TASKS["text2text_generation"].facts(model)

    assert facts({}, eos_token_id=[2, 3], bad_words_ids=[[2], [2, 4], [5], [3]])["bad_words_ids"] == [[2, 4], [5]]
    assert facts({"max_position_embeddings": 64})["most_new_tokens"] == 64
    assert (
        facts({"max_encoder_position_embeddings": 99, "max_decoder_position_embeddings": 50})["most_new_tokens"] == 50
    )
    decoder = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    assert facts({"decoder": decoder})["most_new_tokens"] == 512
    assert facts({"decoder": {**decoder, "model_type": "bert"}})["most_new_tokens"] == 514
    assert facts({"d_model": 32})["most_new_tokens"] == 4096


def test_the_least_of_new_tokens_takes_the_place_of_the_least_length(made: Callable[[str], Made]) -> None:
    """Also where the configuration asks for it."""
    engine, model, tokenizer = made("bart")
    manifest = engine.manifest
    facts = {**manifest.facts, "min_length": 30}
    asked = replace(manifest, facts=facts, parameters={**manifest.parameters, "min_new_tokens": 2, "num_beams": 1})
    task = TASKS["text2text_generation"](asked, engine.task.tokenizer)
    for text in TEXTS[:3]:
        [encoded] = task.tokenize([Request({"text": text})], task.parts([Request({"text": text})]))
        assert isinstance(encoded, Encoded)
        chosen = task.settings(Request({"text": text}), encoded.rows[0], [0])
        assert chosen.min_length == 0 and chosen.min_new_tokens == 2


def test_something_is_drawn_where_every_token_is_forbidden() -> None:
    asked = GenerationSettings(max_new_tokens=2, do_sample=True, no_repeat_ngram_size=1, top_k=3, top_p=0.9, seed=0)
    search = Sampling(range(8), asked)
    assert search.advance(np.zeros((1, 8), dtype=np.float32)) is not None and search.tokens == [7]


def test_draws_follow_the_probabilities() -> None:
    """A chi-squared test with 20,000 draws, against the original processors' distribution."""
    rng = np.random.default_rng(1)
    scores = (rng.standard_normal(40) * 2).astype(np.float32)
    options = {"temperature": 0.8, "top_k": 12, "top_p": 0.9}
    expected = hugging_face(scores, [0], options)
    counts = np.zeros(40)
    for seed in range(20_000):
        search = Sampling([0], GenerationSettings(max_new_tokens=1, do_sample=True, seed=seed, **options))
        search.advance(scores[None])
        counts[search.tokens[0]] += 1
    assert not counts[expected == 0].any()
    wanted = 20_000 * expected[expected > 0]
    distance = ((counts[expected > 0] - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    assert distance < freedom + 4 * np.sqrt(2 * freedom)


def test_a_bias_of_the_draws_would_be_seen() -> None:
    """Proves that the test above can fail: always taking the best token is far from the distribution."""
    expected = hugging_face(np.arange(10, dtype=np.float32) / 3, [0], {})
    wanted = 20_000 * expected
    assert ((np.eye(10)[9] * 20_000 - wanted) ** 2 / wanted).sum() > 9 + 4 * np.sqrt(18)


def test_a_text_that_has_no_room_is_refused_or_cut(made: Callable[[str], Made]) -> None:
    engine, _, _ = made("gpt2")
    [refused] = engine.answer([Request({"text": VERY_LONG}, {"max_new_tokens": 10})])
    assert isinstance(refused, TraceserveError) and refused.status == 413 and "window" not in refused.message
    [far] = engine.answer([Request({"text": "a"}, {"max_new_tokens": 128})])
    assert isinstance(far, TraceserveError) and far.status == 413 and far.field == "parameters.max_new_tokens"
    [cut] = engine.answer(
        [Request({"text": VERY_LONG}, {"max_new_tokens": 10, "long_inputs": "truncate", "return_full_text": False})]
    )
    assert isinstance(cut, Answer) and cut.unseen["text"][0] == 0
    [room] = engine.answer([Request({"text": VERY_LONG}, {"long_inputs": "truncate", "return_full_text": False})])
    assert isinstance(room, Answer) and len(VERY_LONG) - room.unseen["text"][1] > 64
    kept = VERY_LONG[room.unseen["text"][1] :]
    assert kept + written(room.value) == original(made("gpt2"), kept, max_new_tokens=64)
    kept = VERY_LONG[cut.unseen["text"][1] :]
    assert kept and VERY_LONG.endswith(kept)
    assert kept + written(cut.value) == original(made("gpt2"), kept, max_new_tokens=10)


def test_the_part_of_a_prompt_that_may_be_read_is_read(made: Callable[[str], Made]) -> None:
    engine, _, tokenizer = made("gpt2")
    fits = VERY_LONG
    while len(tokenizer(fits)["input_ids"]) > 90:
        fits = fits[:-1]
    for text, most in ((fits, 100), (fits, 120), (VERY_LONG, 100)):
        room = 128 - min(most, len(tokenizer(text)["input_ids"]))
        found, wanted = engine.answer(
            [Request({"text": text}, {"truncate": most, **more}) for more in ({}, {"max_new_tokens": room})]
        )
        assert isinstance(found, Answer) and found == wanted and bool(found.unseen) == (text != fits)
    found, wanted = engine.answer(
        [Request({"text": VERY_LONG}, own) for own in ({"truncate": 500}, {"long_inputs": "truncate"})]
    )
    assert isinstance(found, Answer) and found == wanted and found.tokens == 64


def test_without_a_limit_the_room_is_filled(made: Callable[[str], Made]) -> None:
    engine, _, tokenizer = made("llama")
    text = " ".join(TEXTS)[:100]
    [value] = answers(engine, [Request({"text": text})])
    assert written(value) == original(made("llama"), text, max_new_tokens=128 - len(tokenizer(text)["input_ids"]))


def test_an_archive_may_truncate_and_tell_details(
    made: Callable[[str], Made], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    content = {"task": "text_generation", "max_length": 128, "parameters": {"truncate": 4, "details": True}}
    run_export(tmp_path / "x", {"model_name": str(checkpoint("llama", "AutoModelForCausalLM")), **content})
    engine, wanted = Engine.load(tmp_path / "x"), {"max_new_tokens": 8, "truncate": 4, "details": True}
    text = TEXTS[1]
    cut, whole = (Request({"text": text}, {"max_new_tokens": 8, **more}) for more in ({}, {"long_inputs": "reject"}))
    plain = Request({"text": text}, {"max_new_tokens": 8, "details": True})
    assert answers(engine, [cut, whole]) == answers(made("llama")[0], [Request({"text": text}, wanted), plain])
    [refused] = engine.answer([Request({"text": text}, {"truncate": 100, "long_inputs": "reject"})])
    assert isinstance(refused, InvalidRequest) and refused.field == "parameters.truncate"


def test_parameters_that_contradict_each_other(made: Callable[[str], Made]) -> None:
    engine, _, _ = made("gpt2")
    [result] = engine.answer([Request({"text": "a"}, {"num_beams": 3, "temperature": 0.5})])
    assert isinstance(result, InvalidRequest) and result.field == "parameters.num_beams"
    [sampling] = [parameter for parameter in PARAMETERS if parameter.name == "do_sample"]
    for name in SAMPLING:
        assert name in result.message and name in sampling.description
        [refused] = engine.answer([Request({"text": "a"}, {"num_beams": 2, name: 1})])
        assert isinstance(refused, InvalidRequest) and refused.field == "parameters.num_beams"
    [cold] = answers(engine, [Request({"text": "a"}, {"temperature": 0, "max_new_tokens": 9})])
    assert written(cold) == original(made("gpt2"), "a", max_new_tokens=9)
    [fine] = engine.answer([Request({"text": "a"}, {"num_beams": 3, "temperature": 0.5, "do_sample": False})])
    assert isinstance(fine, Answer)


@pytest.mark.parametrize("architecture", DECODERS)
def test_streaming_tells_the_answer_in_pieces(architecture: str, made: Callable[[str], Made]) -> None:
    """Byte-level tokens are parts of characters; no piece splits one, and none is revoked."""
    engine, _, _ = made(architecture)
    told: Dict[int, List[str]] = {}
    requests = [Request({"text": text}, {"max_new_tokens": 60, "stream": True, "seed": 3}) for text in TEXTS]
    requests.append(Request({"text": "quiet"}, {"max_new_tokens": 60, "seed": 3}))
    results = engine.answer(requests, emit=lambda i, unseen, text: told.setdefault(i, []).append(text))
    assert set(told) == set(range(len(TEXTS)))
    for i, pieces in told.items():
        result = results[i]
        assert isinstance(result, Answer)
        plain = Request({"text": TEXTS[i]}, {**requests[i].parameters, "stream": False, "return_full_text": False})
        assert result.value == written(answers(engine, [plain])[0])
        assert len(pieces) >= 15
        for before, after in zip(pieces, [*pieces[1:], result.value]):
            assert after.startswith(before)
        assert not any(piece.endswith("\ufffd") for piece in pieces)


TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "trimmed": (
        "{{ bos_token }}{% for m in messages %}[{{ m.role | upper }}] {{ m.content | trim }} {% endfor %}"
        "{% if add_generation_prompt %}[ASSISTANT] {% endif %}"
    ),
    "strict": (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate: user, assistant, user') }}{% endif %}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
        "{% else %}USER: {{ m['content'] | tojson }}\n{% endif %}{% endfor %}"
    ),
    "asking": (
        "{% if tools is not none or documents is not none %}[TOOLS]{% endif %}{% for m in messages %}{{ m['role'] }}: "
        "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    ),
}
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": " Où est  la gare? "}, {"role": "assistant", "content": "Là. "}],
    [
        {"role": "user", "content": "Tell <b>me</b> 'more'"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?\n"},
    ],
    [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, two,"}],
]


@pytest.mark.parametrize("messages", CHATS, ids=lambda messages: str(len(messages)))
@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_are_rendered_as_by_transformers(template: str, messages: List[Dict[str, str]]) -> None:
    tokenizer = models.make_tokenizer("gpt")
    tokenizer.chat_template = TEMPLATES[template]
    continues = messages[-1]["role"] == "assistant"
    expected = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not continues, continue_final_message=continues
    )
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    assert chat.render(TEMPLATES[template], tokens, messages) == expected


def test_what_a_template_refuses_is_told() -> None:
    with pytest.raises(InvalidRequest, match="Roles must alternate"):
        chat.render(TEMPLATES["strict"], {"eos_token": "</s>"}, [{"role": "system", "content": "x"}])


@pytest.mark.parametrize(("version", "enough"), [("3.2.0rc1", True), ("3.1.6.dev0", True), ("3.1.5", False)])
def test_jinja2_may_be_a_prerelease(version: str, enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja2, "__version__", version)
    template = f"{{# {version} #}}{{{{ messages[0].content }}}}"  # one that was not compiled before
    if enough:
        assert chat.render(template, {}, CHATS[0]) == CHATS[0][0]["content"]
        return
    with pytest.raises(MissingPackage, match=f"jinja2 3.1.6 or newer, .* this is {version}"):
        chat.render(template, {}, CHATS[0])


def test_a_template_is_kept_in_its_sandbox() -> None:
    with pytest.raises(InvalidRequest):
        chat.render("{{ messages.__class__.__mro__[1].__subclasses__() }}", {}, CHATS[0])


def test_chats_over_the_engine(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    """Equal to the pipeline, for answers and for continuing the assistant's own message."""
    source = tmp_path / "chatty"
    source.mkdir()
    for path in checkpoint("llama", "AutoModelForCausalLM").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATES["chatml"]
    tokenizer.save_pretrained(source)
    run_export(tmp_path / "chat", {"model_name": str(source), "task": "text_generation", "max_length": 128})
    engine = Engine.load(tmp_path / "chat")
    pipeline = transformers.pipeline("text-generation", model=str(source), device="cpu")
    for messages in CHATS:
        expected = pipeline([messages], max_new_tokens=12, do_sample=False)[0]
        [value] = answers(engine, [Request({"messages": messages}, {"max_new_tokens": 12})])
        assert value == expected
    [plain] = engine.answer([Request({"text": "x"}, {"max_new_tokens": 2})])
    assert isinstance(plain, Answer)


def test_a_chat_without_a_template_is_refused(made: Callable[[str], Made]) -> None:
    [result] = made("gpt2")[0].answer([Request({"messages": CHATS[0]})])
    assert isinstance(result, InvalidRequest) and "no chat template" in result.message


@pytest.mark.parametrize("architecture", DECODERS)
def test_answers_are_the_pipelines(architecture: str, made: Callable[[str], Made]) -> None:
    engine, model, tokenizer = made(architecture)
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    for text in TEXTS:
        for full in (True, False):
            [value] = answers(engine, [Request({"text": text}, {"max_new_tokens": 9, "return_full_text": full})])
            assert value == pipeline([text], max_new_tokens=9, do_sample=False, return_full_text=full)[0]


@pytest.mark.parametrize(
    ("value", "tokens", "legal"),
    [
        (np.nan, slice(None), False),
        (np.nan, slice(7, 8), False),
        (np.inf, slice(7, 8), False),
        (-np.inf, slice(None), False),
        (-np.inf, slice(7, 8), True),
    ],
)
@pytest.mark.parametrize("sampled", [{}, {"seed": 1}])
def test_numbers_that_are_none_fail_their_request_alone(
    sampled: Dict[str, Any], value: float, tokens: slice, legal: bool, made: Callable[[str], Made]
) -> None:
    """A token may be impossible; but not all of them, and none can be certain."""
    engine, _, _ = made("gpt2")
    own = engine.runner

    class Broken:
        """The real model, except for one row of its logits."""

        def start(self, inputs: Any) -> Any:
            return own.start(inputs)

        def step(self, inputs: Any, state: Any, rows: Any = None) -> Any:
            outputs, state = own.step(inputs, state, rows)
            if len(outputs["logits"]) == 3:
                outputs["logits"][1, tokens] = value
            return outputs, state

    engine.runner = Broken()  # type: ignore[assignment]
    try:
        parameters = {"max_new_tokens": 5, **sampled}
        results = engine.answer([Request({"text": text}, parameters) for text in ("one", "two", "six")])
    finally:
        engine.runner = own
    assert [isinstance(result, Answer) for result in results].count(True) == 2 + legal
    assert [type(result).__name__ for result in results].count("ModelFailure") == 1 - legal


ORACLE = json.loads(Path(__file__).with_name("data").joinpath("text2text_generation.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_text_to_text_is_the_pipelines_of_4_57(architecture: str, made: Callable[[str], Made]) -> None:
    """See data/make_text2text_generation.py."""
    engine, _, _ = made(architecture)
    cases = [case for case in ORACLE["cases"] if case["architecture"] == architecture]
    assert len(cases) == 35
    got = answers(engine, [Request({"text": case["text"]}, case["parameters"]) for case in cases])
    assert got == [case["answer"] for case in cases]
