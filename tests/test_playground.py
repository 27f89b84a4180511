"""The playground without its page: forms made from descriptions, bodies made from forms, answers as HTML, whom it asks."""

from __future__ import annotations

import html
import json
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from conftest import ROOT
from traceserve import cli
from traceserve.errors import ServerError
from traceserve.playground import asking, description, form, marks, models, panels, shapes
from traceserve.playground.asking import Heard
from traceserve.playground.description import Description, InputField
from traceserve.playground.marks import Mark
from traceserve.playground.models import Model
from traceserve.playground.shapes import STARTING, Context
from traceserve_runtime.engine import Engine
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Served
from traceserve_runtime.protocols.openapi import openapi_document
from traceserve_runtime.protocols.requests import parse_requests
from traceserve_runtime.service import Call, Service
from traceserve_runtime.tasks import TASKS

NASTY = "<img src=x onerror='alert(1)'> & `"


def of(task: str, artifact: Path, **changes: Any) -> Description:
    """How a model of this task describes itself."""
    manifest = replace(Manifest.read(artifact), **changes)
    served = Served("some name", "2.0", manifest, TASKS[task], lambda ids: "")
    return description.read_description(json.loads(json.dumps(openapi_document(served))), "here")


def text_of(shown: str) -> str:
    """The text of HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", shown))


# Forms


@pytest.mark.parametrize("task", TASKS)
def test_the_form_has_all_that_the_task_takes_and_asks_its_sample(task: str, artifact: Path) -> None:
    own = TASKS[task]
    found = of(task, artifact)
    controls = form.controls([found])
    wanted = [*(field.name for field in own.fields), *(f"parameters.{p.name}" for p in own.all_parameters())]
    assert [control.key for control in controls] == wanted
    assert (found.name, found.version, found.task, found.labels) == ("some name", "2.0", task, ("red", "green", "blue"))
    body = form.body(controls, [control.value for control in controls])
    assert body == own.sample_body(Manifest.read(artifact).facts)


@pytest.mark.parametrize("task", TASKS)
def test_what_a_form_begins_with_is_legal(task: str, artifact: Path) -> None:
    controls = form.controls([of(task, artifact)], STARTING.get(task, {}))
    body = form.body(controls, [control.value for control in controls])
    assert STARTING.get(task, {}).items() <= body.get("parameters", {}).items()
    assert len(parse_requests({"body": body}, Headers(), TASKS[task], 0, 1).requests) == 1


def test_only_tasks_begin_with_other_parameters() -> None:
    assert set(STARTING) <= set(TASKS)


def typed(task: str, artifact: Path, **values: Any) -> Dict[str, Any]:
    """The body for values typed into an otherwise empty form."""
    controls = form.controls([of(task, artifact)])
    return form.body(controls, [values.get(control.name) for control in controls])


@pytest.mark.parametrize(
    "task, name, value, sent",
    [
        ("sequence_classification", "top_k", "3", 3),
        ("sequence_classification", "top_k", "null", None),
        ("sequence_classification", "top_k", "many", "many"),  # the server says what is wrong with it
        ("sequence_classification", "function_to_apply", '"none"', "none"),
        ("feature_extraction", "normalize", "false", False),
        ("text_generation", "early_stopping", '"never"', "never"),
        ("text_generation", "early_stopping", "true", True),
        ("text_generation", "temperature", "0.5", 0.5),
        ("text_generation", "seed", "7", 7),
        ("text_generation", "seed", "7.5", 7.5),
        ("text_generation", "seed", "0", 0),
        ("text_generation", "seed", "x", "x"),
        ("text_generation", "logit_bias", "50: -100\n\n7:2.5", {"50": -100, "7": 2.5}),
        ("text_generation", "logit_bias", "50: much", {"50": "much"}),
        ("text_generation", "stop", "one, two\n\nthree", ["one, two", "three"]),
    ],
)
def test_what_is_typed_is_sent_as_json_has_it(task: str, name: str, value: Any, sent: Any, artifact: Path) -> None:
    body = typed(task, artifact, text="x", **{name: value})
    assert body == {"text": "x", "parameters": {name: sent}}
    assert type(body["parameters"][name]) is type(sent)


def test_what_is_empty_is_not_sent_unless_it_must_be(artifact: Path) -> None:
    assert typed("sequence_classification", artifact) == {"text": ""}
    assert typed("text_ranking", artifact, query="q") == {"query": "q", "documents": []}
    assert typed("text_ranking", artifact, query="q", documents="a\n\nb\n")["documents"] == ["a", "b"]
    lines = "one\fpage\u2028still one\r\ntwo"  # as copied from a PDF
    assert typed("text_ranking", artifact, query="q", documents=lines)["documents"] == [
        "one\fpage\u2028still one",
        "two",
    ]
    assert typed("text_generation", artifact) == {}


def test_a_line_of_numbers_says_what_it_is(artifact: Path) -> None:
    with pytest.raises(form.FormError, match="what is added") as error:
        typed("text_generation", artifact, logit_bias="50")
    assert error.value.field == "parameters.logit_bias"


def test_a_chat_is_typed_line_by_line(artifact: Path) -> None:
    body = typed("text_generation", artifact, messages="system: Be brief.\nuser: Note: this\n\nand that\nassistant:")
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Note: this\n\nand that"},
        {"role": "assistant", "content": ""},
    ]
    with pytest.raises(form.FormError, match="who says it") as error:
        typed("text_generation", artifact, messages="Hello")
    assert error.value.field == "messages"


def test_a_control_says_what_is_legal_and_what_holds(artifact: Path) -> None:
    controls = {c.name: c for c in form.controls([of("text_generation", artifact, parameters={"top_p": 0.9})])}
    assert controls["top_p"].placeholder == "default: 0.9" and controls["top_p"].info.endswith("0.0 to 1")
    assert controls["top_k"].info.endswith("0 or more") and controls["seed"].placeholder == "default"
    assert controls["stream"].choices == (("default: false", ""), ("true", "true"), ("false", "false"))
    other = of("text_generation", artifact, parameters={"top_p": 0.8})
    both = {c.name: c for c in form.controls([of("text_generation", artifact, parameters={"top_p": 0.9}), other])}
    assert both["top_p"].placeholder == "default: 0.9 / 0.8"


def test_two_models_are_asked_what_both_know(artifact: Path) -> None:
    found = of("text_generation", artifact)
    older = replace(found, parameters=tuple(own for own in found.parameters if own.name != "seed"))
    keys = [control.key for control in form.controls([found, older])]
    assert "parameters.seed" not in keys and len(keys) == len(form.controls([found])) - 1


@pytest.mark.parametrize(
    "path, key",
    [
        ("parameters.top_k", "parameters.top_k"),
        ("documents[1]", "documents"),
        ("messages[0].role", None),
        ("query", "query"),
        ("querying", None),
        ("parameters", None),
        (None, None),
    ],
)
def test_an_error_is_shown_at_the_input_that_it_is_about(path: Any, key: Any, artifact: Path) -> None:
    controls = form.controls([of("text_ranking", artifact)])
    number = form.control_at(controls, path)
    assert (None if number is None else controls[number].key) == key


def test_a_document_of_another_kind_is_refused() -> None:
    with pytest.raises(ServerError, match="http://here describes itself in another way"):
        description.read_description({"openapi": "3.1.0", "paths": {}}, "http://here")


# Answers

CONTEXT = Context(
    Description(
        "n",
        "1.0",
        "t",
        "",
        (InputField("question", {"type": "string"}, True), InputField("text", {"type": "string"}, True)),
        (),
    ),
    {"question": "?", "text": f"Ada {NASTY} London", "documents": [NASTY, "b"]},
)
ANSWERS: Dict[str, Tuple[Any, Any]] = {
    "labels": ([{"label": NASTY, "score": 0.9}, {"label": "b", "score": 0.1}], [{"label": "b", "score": 0.6}]),
    "a label": ({"label": NASTY, "score": 0.9}, {"label": "b", "score": 0.6}),
    "candidates": (
        {"sequence": "s", "labels": [NASTY, "b"], "scores": [0.8, 0.2]},
        {"sequence": "s", "labels": ["b", NASTY], "scores": [0.7, 0.3]},
    ),
    "tokens": (
        [{"score": 0.5, "token": 1, "token_str": NASTY, "sequence": f"a {NASTY}"}],
        [{"score": 0.5, "token": 2, "token_str": "b", "sequence": "a b"}],
    ),
    "tokens of two masks": (
        [[{"score": 0.5, "token": 1, "token_str": NASTY, "sequence": "s"}]] * 2,
        [[{"score": 0.5, "token": 2, "token_str": "b", "sequence": "s"}]] * 2,
    ),
    "ranks": (
        [{"index": 0, "score": 3.5}, {"index": 1, "score": -1}],
        [{"index": 1, "score": 3}, {"index": 0, "score": 1}],
    ),
    "entities": (
        [{"entity_group": "PER", "score": 0.9, "word": "ada", "start": 0, "end": 3}],
        [{"entity_group": "LOC", "score": 0.9, "word": "london", "start": 38, "end": 44}],
    ),
    "tokens with labels": (
        [{"entity": "B-PER", "score": 0.9, "index": 1, "word": "ada", "start": 0, "end": 3}],
        [{"entity": "B-LOC", "score": 0.9, "index": 1, "word": "ada", "start": 0, "end": 3}],
    ),
    "an answer": (
        {"score": 0.9, "start": 0, "end": 3, "answer": "Ada"},
        {"score": 0.9, "start": 4, "end": 8, "answer": NASTY[:4]},
    ),
    "a text": ({"generated_text": f"one {NASTY} two"}, {"generated_text": "one three two"}),
    "a stream": (f"one {NASTY} two", "one three two"),
    "a chat": (
        [{"generated_text": [{"role": NASTY, "content": NASTY}]}],
        [{"generated_text": [{"role": "user", "content": "b"}]}],
    ),
    "a vector": ([0.6, 0.8], [0.8, 0.6]),
    "vectors": ([[[0.6, 0.8], [1.0, 0.0]]], [[[0.8, 0.6], [1.0, 0.0]]]),
    "something else": ({NASTY: 1}, {"b": 2}),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_is_shown_and_whatever_it_holds_is_text(kind: str) -> None:
    answer, other = ANSWERS[kind]
    for shown in (
        shapes.show(answer, CONTEXT),
        shapes.show(answer, CONTEXT, other),
        shapes.show(other, CONTEXT, answer),
    ):
        assert "<img" not in shown and shown.strip()
    wanted = NASTY if NASTY in json.dumps(answer) else ""
    assert wanted in text_of(shapes.show(answer, CONTEXT))
    assert shapes.difference(answer, answer) == "Both give the same answer."
    assert "same answer" not in shapes.difference(answer, other)


def test_each_kind_of_answer_has_a_shape_of_its_own() -> None:
    fallback = shapes.SHAPES[-1]
    assert [kind for kind, (answer, _) in ANSWERS.items() if shapes.shape_of(answer) is fallback] == ["something else"]


def test_ranks_are_said_in_english() -> None:
    one = [{"label": "x", "score": 0.5}]
    for rank, word in ((2, "2nd"), (3, "3rd"), (11, "11th"), (13, "13th"), (21, "21st"), (22, "22nd"), (113, "113th")):
        two = [*({"label": str(i), "score": 0.9} for i in range(rank - 1)), {"label": "x", "score": 0.5}]
        assert f"(there {word})" in shapes.show(one, CONTEXT, two)


def test_differences_are_said_and_marked() -> None:
    one = [{"label": "a", "score": 0.6}, {"label": "b", "score": 0.4}]
    two = [{"label": "b", "score": 0.7}, {"label": "c", "score": 0.3}]
    shown = shapes.show(one, CONTEXT, two)
    assert "only here" in shown and "-0.300 (there 1st)" in shown and shown.count("ts-differs") == 2
    assert shapes.difference(one, two) == "They differ: the first has a, the second b."
    close = [{"label": "a", "score": 0.61}, {"label": "b", "score": 0.39}]
    assert shapes.difference(one, close) == "The order is the same; scores differ by 0.01 at most."
    last = [{"label": "a", "score": 0.60001}, {"label": "b", "score": 0.39999}]
    assert "last digits" in shapes.difference(one, last)
    assert shapes.difference([1.0, 0.0], [0.6, 0.8]) == "Cosine of the two: 0.6000."
    assert "cannot be compared" in shapes.difference([1.0], [1.0, 2.0])
    assert shapes.difference([], one) == "The answers are of different kinds."
    entities, others = ANSWERS["entities"]
    assert shapes.difference(entities, others) == "0 marks are the same; 1 only the first has, 1 only the second."
    assert "PER 0.90, only here" in shapes.show(entities, CONTEXT, others)
    assert marks.changed_words("one <two> three", "one four three") == (
        'one <mark class="ts-changed">&lt;two&gt;</mark> three'
    )


def test_scores_that_are_no_probabilities_fill_no_more_than_their_row() -> None:
    shown = shapes.show([{"label": "a", "score": 8.0}, {"label": "b", "score": -4.0}], CONTEXT)
    assert re.findall(r"width:([\d.]+)%", shown) == ["100.0", "50.0"] and "-4.0000" in shown


def test_marks_may_overlap_and_nothing_of_the_text_is_lost() -> None:
    text = "The train to the coast"
    own = [Mark(4, 9, "a", "a", 0.9), Mark(4, 22, "b", "b", 0.5), Mark(100, 200, "c", "c", 0.1)]
    shown = marks.marked(text, own)
    assert [re.sub(r"<[^>]*>", "", re.sub(r"<span.*?</span>", "", shown))] == [text]
    assert text_of(shown) == "The traina 0.90 to the coastb 0.50"
    assert marks.marked("", []) == ""


def test_a_kind_of_entity_has_one_colour_in_every_text() -> None:
    kinds = ("PER", "LOC")
    one, two = (marks.marked("x", [Mark(0, 1, "B-LOC", "LOC", 1.0)], kinds) for _ in range(2))
    assert one == two and marks.COLOURS[1] in one
    many = marks.marked("x" * 20, [Mark(i, i + 1, str(i), str(i), 1.0) for i in range(20)])
    assert many.count("<mark") == 20


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("colour", marks.COLOURS)
def test_marked_words_are_read_easily(colour: str) -> None:
    """The strictest level of WCAG, 1.4.6."""
    assert (luminance(colour) + 0.05) / (luminance(marks.INK) + 0.05) >= 7


# Panels, and what is heard

MODEL = Model("http://127.0.0.1:1", CONTEXT.description)


def test_what_was_not_read_is_marked_in_the_text() -> None:
    text = "seen <unseen> seen"
    heard = Heard(value=[0.5], unseen={"text": (5, 13), "documents[1]": (0, 1)}, done=True)
    [shown] = panels.panels([MODEL], {"text": text, "documents": ["a", "bc"]}, [heard])
    assert '<s class="ts-unread">&lt;unseen&gt;</s>' in shown and '<s class="ts-unread">b</s>' in shown
    assert "did not read 8 of the 18 characters of text" in text_of(shown)


def test_an_error_is_told_as_it_is_and_nothing_is_compared_with_it() -> None:
    wrong = Heard(error=f"no {NASTY}", where="parameters.top_k", done=True)
    one, two = panels.panels([MODEL, MODEL], {}, [wrong, Heard(value={"label": "a", "score": 1.0}, done=True)])
    assert 'role="alert"' in one and f"parameters.top_k: no {NASTY}" in text_of(one) and "<img" not in one
    assert "to the other" not in two and panels.verdict([wrong, wrong]) == ""


@pytest.mark.parametrize(
    "text, whole, error, where",
    [
        ('a\nb\n{"error": {"type": "T", "message": "it failed", "field": null}}\n', "a\nb", "it failed", None),
        ("a\nb", "a\nb", None, None),
        ('a\n{"error": 1', 'a\n{"error": 1', None, None),
        (
            '{"error": {"message": "written by the model"}}',
            '{"error": {"message": "written by the model"}}',
            None,
            None,
        ),
    ],
)
def test_a_stream_that_failed_ends_with_its_error(text: str, whole: str, error: Any, where: Any) -> None:
    assert asking._ended(text) == (whole, error, where)


def test_a_server_that_is_not_there_is_an_answer_too() -> None:
    [heard] = asking.ask(MODEL, {"text": "x"})
    assert heard.done and heard.error is not None and "does not answer" in heard.error
    [*_, last] = asking.ask_each([MODEL, MODEL], {"text": "x"}, threading.Event())
    assert all(each.done and each.error for each in last)


def test_a_key_is_named_in_the_command_and_not_shown() -> None:
    model = replace(MODEL, key="secret", certificate="/c.pem", any_name=False)
    body = {"text": "it's", "parameters": {"stream": True}}
    assert asking.curl_command(model, body) == (
        'curl -H "Authorization: Bearer $TRACESERVE_KEY" http://127.0.0.1:1/predictions/n/1.0 --cacert /c.pem --no-buffer '
        '-H \'Content-Type: application/json\' -d \'{"text": "it\'"\'"\'s", "parameters": {"stream": true}}\''
    )
    assert "--insecure" in asking.curl_command(replace(model, any_name=True), body)


# Whom it asks


@pytest.mark.parametrize(
    "place, said",
    [
        ("nothing", "no server is running; `traceserve serve model_store/nothing.mar` starts one, and any other"),
        (
            "http://127.0.0.1:1/other/x",
            "is no URL of a model; it should look like http://127.0.0.1:8080/predictions/NAME",
        ),
        ("ftp://127.0.0.1/predictions/x", "is no URL of a model"),
        ("http://user:word@127.0.0.1/predictions/x", "is no URL of a model"),
        ("http://127.0.0.1:1/predictions/x/1.0", "http://127.0.0.1:1 does not answer"),
    ],
)
def test_a_place_that_cannot_be_asked(place: str, said: str) -> None:
    with pytest.raises(ServerError, match=re.escape(said)):
        models.find_model(place)


def test_without_a_server_there_is_nothing_to_show() -> None:
    with pytest.raises(ServerError, match="no server is running"):
        models.every()


def test_two_archives_side_by_side_have_one_task() -> None:
    other = replace(MODEL, description=replace(MODEL.description, name="m", task="other"))
    models.check_comparable([MODEL, MODEL])
    with pytest.raises(ServerError, match="n's is t and m's is other"):
        models.check_comparable([MODEL, other])


def test_without_gradio_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["playground"]) == 1
    assert "pip install 'traceserve[playground]'" in capsys.readouterr().err


def test_gradio_has_one_door() -> None:
    files: List[Path] = [*(ROOT / "scripts").rglob("*.py"), *(ROOT / "handlers").rglob("*.py")]
    door = [
        path.name for path in files if re.search(r"^\s*(import|from) gradio", path.read_text("utf-8"), re.MULTILINE)
    ]
    assert door == ["interface.py"]


# Explanations


def explained(text: str, *amounts: float, label: str = "red") -> Dict[str, Any]:
    """An explanation of a text's words."""
    words = [
        {"word": found[0], "field": "text", "start": found.start(), "end": found.end(), "attribution": amount}
        for found, amount in zip(re.finditer(r"\S+", text), amounts)
    ]
    return {
        "method": "integrated_gradients",
        "answer": {"label": label, "score": 0.9},
        "target": {"label": label},
        "quantity": "logit",
        "value": 3.0,
        "baseline_value": 1.0,
        "words": words,
        "completeness_error": 0.001,
        "steps": 24,
    }


def test_an_explanation_is_a_heat_map_and_a_table() -> None:
    text = f"good {NASTY.split()[0]} bad the"
    context = Context(CONTEXT.description, {"text": text})
    shown = shapes.show(explained(text, 2.0, -0.5, -1.0, 0.0), context)
    assert "<img" not in shown and text in text_of(shown)
    assert "Explains label red: logit 3.000, without the words 1.000; integrated gradients, 24 steps" in text_of(shown)
    colours = re.findall(r"background:#(\w\w)(\w\w)(\w\w)[^>]*>([^<]*)<", shown)
    assert [html.unescape(word) for *_, word in colours] == text.split()[:3]  # what adds nothing has no background
    assert [green > red for red, green, *_ in colours] == [True, False, False]
    assert re.findall(r"<td>(adds|takes)</td>", shown)[:3] == ["adds", "takes", "takes"]
    assert "+2.000" in shown and "-1.000" in shown and "No gradients" not in shown
    assert "No gradients: it is int8" in shapes.show({**explained("a", 1.0), "because": "it is int8"}, context)


def test_words_of_other_fields_stand_in_their_own_texts() -> None:
    value = explained("a train", 1.0, 2.0)
    value["words"] = [{**word, "field": "documents[1]"} for word in value["words"]]
    shown = shapes.show(value, Context(CONTEXT.description, {"query": "x", "documents": ["no", "a train"]}))
    assert text_of(re.findall(r'<p class="ts-text">.*?</p>', shown)[0]) == "a train"


def test_how_explanations_differ() -> None:
    one = explained("good bad", 2.0, 1.0)
    assert shapes.difference(one, explained("good bad", 1.9, 1.0)).startswith("Both give the same answer, but")
    assert shapes.difference(one, explained("good bad", 1.0, 2.0)) == (
        'The strongest word is another one: "good", "bad".'
    )
    other = explained("good bad", 2.0, 1.0, label="blue")
    assert shapes.difference(one, other) == "The first explains label red, the second label blue."
    assert shapes.difference(one, [{"label": "red", "score": 1.0}]) == "The answers are of different kinds."


def test_what_an_archive_explains_is_shown(artifact: Path) -> None:
    service = Service(Engine.load(artifact), "some name")
    body = {"text": "A red flower, and a green leaf."}
    [reply] = service.answer([Call({"body": json.dumps(body).encode()}, Headers("application/json", explain=True))])
    value = json.loads(reply.body)
    shown = shapes.show(value, Context(of("sequence_classification", artifact), body))
    assert "ts-heat" in shown and body["text"] in text_of(shown)


@pytest.mark.parametrize("task", TASKS)
def test_which_tasks_can_be_explained(task: str, artifact: Path) -> None:
    assert of(task, artifact).explains == (TASKS[task].explains is not None)
