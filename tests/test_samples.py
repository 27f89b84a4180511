"""The built-in samples of every task, and the user's own from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Type

import pytest
from traceserve.errors import ConfigError
from traceserve.samples import SENTENCES, VERY_LONG, built_in, read
from traceserve_runtime.requests import Headers, parse
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Task
from traceserve_runtime.tasks.feature_extraction import FeatureExtraction
from traceserve_runtime.tasks.sequence_classification import SequenceClassification

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@every_task
def test_built_in_samples_are_legal_requests(task: Type[Task]) -> None:
    for request in built_in(task):
        body = {**request.inputs, "parameters": dict(request.parameters)}
        [parsed] = parse({"body": body}, Headers(), task, 0, 1).requests
        assert (parsed.inputs, parsed.parameters) == (request.inputs, request.parameters)


@every_task
def test_built_in_samples_hold_every_sentence_and_a_very_long_text(task: Type[Task]) -> None:
    first = task.fields[0].name
    alone = [request.inputs[first] for request in built_in(task) if len(request.inputs) == 1]
    assert set(alone) >= {*SENTENCES, VERY_LONG}
    assert len(VERY_LONG.split()) > 512, "longer than every usual model"
    assert "" in alone


@every_task
def test_built_in_samples_hold_pairs_where_the_task_takes_them(task: Type[Task]) -> None:
    names = [field.name for field in task.fields]
    pairs = [request.inputs for request in built_in(task) if len(request.inputs) > 1]
    assert len(pairs) == (len(list(zip(SENTENCES[3::4], SENTENCES[4::4]))) if len(names) > 1 else 0)
    for pair in pairs:
        assert list(pair) == names[:2]
        assert all(pair.values()) and len(set(pair.values())) == 2


@every_task
def test_built_in_samples_ask_as_the_gate_does(task: Type[Task]) -> None:
    assert {json.dumps(dict(request.parameters)) for request in built_in(task)} == {json.dumps(task.gate_parameters)}


@every_task
def test_a_text_on_each_line(task: Type[Task], tmp_path: Path) -> None:
    path = write(tmp_path / "own.txt", "The first one.", "", "   ", '{"text": "no JSON in a .txt"}', "Žluťoučký kůň 🐎")
    requests = read(path, task)
    texts = [request.inputs[task.fields[0].name] for request in requests]
    assert texts == ["The first one.", '{"text": "no JSON in a .txt"}', "Žluťoučký kůň 🐎"]
    assert all(request.parameters == task.gate_parameters for request in requests)


@every_task
def test_a_request_on_each_line_of_jsonl(task: Type[Task], tmp_path: Path) -> None:
    bodies = ["a text", task.sample, {"inputs": task.sample}, ["one", task.sample], {"inputs": ["three", "four"]}]
    path = write(tmp_path / "own.jsonl", *map(json.dumps, bodies))
    requests = read(path, task)
    first = task.fields[0].name
    sample = task.sample[first]
    assert [request.inputs[first] for request in requests] == ["a text", sample, sample, "one", sample, "three", "four"]
    assert all(request.parameters == task.gate_parameters for request in requests)


def test_a_pair_in_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", '{"text": "Is it red?", "text_pair": "It is blue."}')
    [request] = read(path, SequenceClassification)
    assert request.inputs == {"text": "Is it red?", "text_pair": "It is blue."}


def test_parameters_in_jsonl_win_over_those_of_the_gate(tmp_path: Path) -> None:
    body = {"inputs": "x", "parameters": {"top_k": 2, "function_to_apply": "none"}}
    [request] = read(write(tmp_path / "own.jsonl", json.dumps(body)), SequenceClassification)
    assert request.parameters == {"top_k": 2, "function_to_apply": "none"}


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "Expecting property name"),
        ("plain text", "Expecting value"),
        ("[]", "the list is empty"),
        ("7", "a number is not a request"),
        ("null", "null is not a request"),
        ('{"txt": "x"}', 'unknown field "txt" \\(did you mean "text"\\?\\)'),
        ('{"text": 1}', '"text" should be a string, not a number'),
        ('{"inputs": "x", "parameters": {"pooling": "sum"}}', '"pooling" should be one of'),
        ('"a \\u0000 null"', "null character"),
    ],
)
def test_a_bad_line_is_named(line: str, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", '"a good one"', "", line, '"another"')
    with pytest.raises(ConfigError, match=f"own.jsonl, line 3: .*{reason}") as raised:
        read(path, FeatureExtraction)
    assert str(path) in raised.value.message


def test_a_bad_line_of_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="own.txt, line 2: .*null character"):
        read(write(tmp_path / "own.txt", "good", "bad \0"), SequenceClassification)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("content", ["", "\n", "  \n\t\n"])
def test_an_empty_file_is_refused(suffix: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / f"own{suffix}"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"own{suffix} holds no text"):
        read(path, SequenceClassification)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--samples .*own.txt cannot be read: .*No such file"):
        read(tmp_path / "own.txt", SequenceClassification)


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(ConfigError, match="--samples .*own.txt cannot be read: .*utf-8"):
        read(tmp_path / "own.txt", SequenceClassification)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_jsonl_lines_end_at_newlines_only(separator: str, tmp_path: Path) -> None:
    """JSON allows these characters in a string as they are; other programs write them so."""
    text = f"one{separator}two"
    path = write(tmp_path / "own.jsonl", json.dumps(text, ensure_ascii=False), '"three"')
    assert [request.inputs["text"] for request in read(path, SequenceClassification)] == [text, "three"]


def test_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(b"one\r\ntwo\r\n")
    assert [request.inputs["text"] for request in read(path, SequenceClassification)] == ["one", "two"]
