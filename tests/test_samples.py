"""Each task's requests about the built-in texts, and the user's own samples from a file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple, Type

import pytest
from conftest import run_export
from traceserve import cli
from traceserve.building.gate.texts import SENTENCES, TEXTS, VERY_LONG
from traceserve.building.samples import OwnSamples
from traceserve.checking.proof import proof_of
from traceserve.commands import predict
from traceserve.errors import ConfigError
from traceserve.rollout import updating
from traceserve.rollout.replaying import requests_of
from traceserve.rollout.updating import UpdateOptions, UpdateRefused
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.requests import parse_requests
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import ModelFacts, Request, Task
from traceserve_runtime.tasks.feature_extraction import FeatureExtraction
from traceserve_runtime.tasks.fill_mask import FillMask
from traceserve_runtime.tasks.question_answering import QuestionAnswering
from traceserve_runtime.tasks.sequence_classification import SequenceClassification
from traceserve_runtime.tasks.text_ranking import TextRanking
from traceserve_runtime.tasks.zero_shot_classification import ZeroShotClassification
from traceserve_runtime.texts.tokenization import TextTokenizer

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
Make = Callable[[Type[Task]], Task]
# For a model that fits every task.
MODEL = ModelFacts(
    config={"id2label": {0: "contradiction", 1: "neutral", 2: "entailment"}, "decoder_start_token_id": 2},
    generation={},
    tokens={"unk": ("[UNK]", 1), "cls": ("[CLS]", 2), "sep": ("[SEP]", 3), "mask": ("[MASK]", 4)},
    labels=("contradiction", "neutral", "entailment"),
    chat_template=None,
    read_json=lambda name: None,
)


@pytest.fixture(scope="module")
def made(artifact: Path) -> Make:
    """Make a task with a tiny BERT's manifest and tokenizer."""

    def make(task: Type[Task]) -> Task:
        manifest = dataclasses.replace(Manifest.read(artifact), task=task.name, facts=task.facts(MODEL), parameters={})
        tokenizer = TextTokenizer(artifact, manifest.tokenizer, manifest.max_length, manifest.max_rows)
        return task(manifest, tokenizer)

    return make


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def texts_of(request: Request) -> Iterator[str]:
    """Return every text in a request."""
    for value in request.inputs.values():
        yield from [value] if isinstance(value, str) else value


def reads_as(text: str, other: str) -> bool:
    """Return whether two texts are equal except for two words, which a task may mask."""
    one, two = text.split(" "), other.split(" ")
    return len(one) == len(two) and sum(a != b for a, b in zip(one, two)) <= 2


def test_the_texts_are_of_all_kinds() -> None:
    assert {*SENTENCES, VERY_LONG} < set(TEXTS)
    assert len(VERY_LONG.split()) > 512, "longer than every usual model"
    assert "" in TEXTS and len(set(TEXTS)) == len(TEXTS)


@every_task
def test_what_a_task_asks_are_legal_requests(task: Type[Task], made: Make) -> None:
    for request in made(task).from_texts(TEXTS):
        body = {**request.inputs, "parameters": dict(request.parameters)}
        [parsed] = parse_requests({"body": body}, Headers(), task, 0, 1).requests
        assert (parsed.inputs, parsed.parameters) == (request.inputs, request.parameters)


@every_task
def test_a_task_asks_about_every_text(task: Type[Task], made: Make) -> None:
    """Some tasks cannot ask about the empty one."""
    asked = {text for request in made(task).from_texts(TEXTS) for text in texts_of(request)}
    for text in TEXTS:
        assert not text or any(reads_as(text, other) for other in asked), text[:50]


@every_task
def test_a_task_asks_many_things(task: Type[Task], made: Make) -> None:
    requests = made(task).from_texts(TEXTS)
    assert len({json.dumps([dict(request.inputs), dict(request.parameters)]) for request in requests}) >= 20


@every_task
def test_a_task_asks_as_the_gate_does(task: Type[Task], made: Make) -> None:
    for request in made(task).from_texts(TEXTS):
        assert {**task.gate_parameters, **request.parameters} == request.parameters


def asked_by(made: Make, task: Type[Task]) -> List[Request]:
    return made(task).from_texts(TEXTS)


@pytest.mark.parametrize("task", [SequenceClassification, FeatureExtraction])
def test_the_texts_alone_and_pairs(task: Type[Task], made: Make) -> None:
    requests = asked_by(made, task)
    assert tuple(request.inputs["text"] for request in requests if len(request.inputs) == 1) == TEXTS
    pairs = [request.inputs for request in requests if len(request.inputs) == 2]
    assert len(pairs) > 5
    for pair in pairs:
        assert list(pair) == ["text", "text_pair"]
        assert pair["text"] and pair["text_pair"] and pair["text"] != pair["text_pair"]


def test_entailment_is_not_asked_of_nothing(made: Make) -> None:
    requests = asked_by(made, ZeroShotClassification)
    assert [request.inputs["text"] for request in requests] == [text for text in TEXTS if text]


def test_masks_are_the_models_own_one_or_two_in_each_text(made: Make) -> None:
    masked = [request.inputs["text"] for request in asked_by(made, FillMask)]
    counts = [text.count("[MASK]") for text in masked]
    assert len(counts) == len(TEXTS) and set(counts) == {1, 2}
    for text, original in zip(masked, TEXTS):  # in every script, some text remains around the mask
        assert len(text) > len("[MASK]") or not original


def test_each_text_is_a_context_asked_about_in_few_words(made: Make) -> None:
    requests = asked_by(made, QuestionAnswering)
    assert [request.inputs["context"] for request in requests] == [text for text in TEXTS if text.strip()]
    assert all(0 < len(request.inputs["question"]) < 200 for request in requests)
    assert sum(request.inputs["question"] == request.inputs["context"] for request in requests) <= 2


def test_short_texts_are_queries_and_long_ones_documents_too(made: Make) -> None:
    requests = asked_by(made, TextRanking)
    assert all(len(request.inputs["query"]) < 200 and len(request.inputs["documents"]) == 3 for request in requests)
    assert VERY_LONG in {document for request in requests for document in request.inputs["documents"]}


def read_samples(path: Path, task: Type[Task]) -> List[Request]:
    return OwnSamples.read(path).requests(task)


@contextlib.contextmanager
def piped(*lines: str) -> Iterator[Path]:
    """A pipe that holds these lines, by the name that a shell gives to `<(command)`."""
    reading, writing = os.pipe()
    try:
        with open(writing, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        yield Path(f"/dev/fd/{reading}")
    finally:
        os.close(reading)


def needs_an_object(task: Type[Task]) -> bool:
    """Return whether a text alone is no request for this task."""
    return sum(field.required for field in task.fields) > 1


@every_task
def test_a_text_on_each_line(task: Type[Task], tmp_path: Path) -> None:
    path = write(tmp_path / "own.txt", "The first one.", "", "   ", '{"text": "no JSON in a .txt"}', "Žluťoučký kůň 🐎")
    if needs_an_object(task):
        with pytest.raises(ConfigError, match="own.txt, line 1: a text alone is not enough: send an object with"):
            read_samples(path, task)
        return
    requests = read_samples(path, task)
    texts = [request.inputs[task.fields[0].name] for request in requests]
    assert texts == ["The first one.", '{"text": "no JSON in a .txt"}', "Žluťoučký kůň 🐎"]
    assert all(request.parameters == task.gate_parameters for request in requests)


@every_task
def test_a_request_on_each_line_of_jsonl(task: Type[Task], tmp_path: Path) -> None:
    first = task.fields[0].name
    bodies: List[Tuple[Any, int]] = [(task.sample, 1), ({"inputs": task.sample}, 1), ([task.sample, task.sample], 2)]
    if not needs_an_object(task):
        bodies += [("a text", 1), (["one", task.sample], 2), ({"inputs": ["three", "four"]}, 2)]
    path = write(tmp_path / "own.jsonl", *(json.dumps(body) for body, _ in bodies))
    requests = read_samples(path, task)
    sample = task.sample[first]
    expected = [sample] * 4 + ([] if needs_an_object(task) else ["a text", "one", sample, "three", "four"])
    assert [request.inputs[first] for request in requests] == expected
    assert len(requests) == sum(count for _, count in bodies)
    assert all(request.parameters == task.gate_parameters for request in requests)


@every_task
def test_the_samples_own_parameters_are_legal(task: Type[Task], tmp_path: Path) -> None:
    body = {"inputs": task.sample, "parameters": task.sample_parameters}
    [request] = read_samples(write(tmp_path / "own.jsonl", json.dumps(body)), task)
    assert request.inputs == task.sample
    assert request.parameters == {**task.gate_parameters, **task.sample_parameters}


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.csv", "mine.txt"])
def test_a_byte_order_mark_is_no_part_of_the_samples(name: str, tmp_path: Path) -> None:
    lines = {"mine.jsonl": ['{"text": "one"}'], "mine.csv": ["text", "one"], "mine.txt": ["one"]}
    (tmp_path / name).write_text("\n".join(lines[name]), encoding="utf-8-sig")
    assert [request.inputs["text"] for request in read_samples(tmp_path / name, SequenceClassification)] == ["one"]


def test_a_pair_in_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", '{"text": "Is it red?", "text_pair": "It is blue."}')
    [request] = read_samples(path, SequenceClassification)
    assert request.inputs == {"text": "Is it red?", "text_pair": "It is blue."}


def test_parameters_in_jsonl_win_over_those_of_the_gate(tmp_path: Path) -> None:
    body = {"inputs": "x", "parameters": {"top_k": 2, "function_to_apply": "none"}}
    [request] = read_samples(write(tmp_path / "own.jsonl", json.dumps(body)), SequenceClassification)
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
        read_samples(path, FeatureExtraction)
    assert str(path) in raised.value.message


def test_a_bad_line_of_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="own.txt, line 2: .*null character"):
        read_samples(write(tmp_path / "own.txt", "good", "bad \0"), SequenceClassification)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("content", ["", "\n", "  \n\t\n"])
def test_an_empty_file_is_refused(suffix: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / f"own{suffix}"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"own{suffix} holds no text"):
        read_samples(path, SequenceClassification)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--samples .*own.txt cannot be read: No such file or directory$"):
        read_samples(tmp_path / "own.txt", SequenceClassification)


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(ConfigError, match="--samples .*own.txt cannot be read: .*utf-8"):
        read_samples(tmp_path / "own.txt", SequenceClassification)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_jsonl_lines_end_at_newlines_only(separator: str, tmp_path: Path) -> None:
    """JSON allows these characters unescaped in strings, and other programs write them."""
    text = f"one{separator}two"
    path = write(tmp_path / "own.jsonl", json.dumps(text, ensure_ascii=False), '"three"')
    assert [request.inputs["text"] for request in read_samples(path, SequenceClassification)] == [text, "three"]


def test_a_column_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text('label,text\r\n1,"one, two"\r\n2,\r\n3,three\r\n', encoding="utf-8", newline="")
    assert [request.inputs["text"] for request in read_samples(path, SequenceClassification)] == ["one, two", "three"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.CSV", "label,text\n1,one\n2,two\n"),
        ("own.tsv", "text\tlabel\none\t1\ntwo\t2\n"),
        ("own.JSONL", '{"text": "one"}\n"two"\n'),
        ("own.ndjson", '{"text": "one"}\n"two"\n'),
    ],
)
def test_other_names_of_tables_and_lines_of_json(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert [request.inputs["text"] for request in read_samples(path, SequenceClassification)] == ["one", "two"]


@pytest.mark.parametrize("name", ["own.json", "own.parquet", "own.xlsx", "own.jsonl.gz", "own.JSON"])
def test_other_formats_are_not_read_as_lines(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text('[\n"one",\n"two"\n]\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{name} is .*(save it as .csv|a .jsonl file|unpack it first)"):
        OwnSamples.read(path)


def test_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(b"one\r\ntwo\r\n")
    assert [request.inputs["text"] for request in read_samples(path, SequenceClassification)] == ["one", "two"]


def test_a_long_cell_of_a_table(tmp_path: Path) -> None:
    """Python's csv takes 131,072 characters unless it is told otherwise."""
    write(tmp_path / "own.csv", "text", "a" * 131_073)
    assert [len(text) for _, text in OwnSamples.read(tmp_path / "own.csv").lines] == [131_073]


def test_an_update_asks_the_samples_of_a_pipe(mar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: List[Any] = []

    def update(archive: Path, port: Any, options: UpdateOptions, report: Any) -> Any:
        with proof_of(archive) as proof:
            asked.extend(sample.inputs["text"] for sample in requests_of([proof], options.samples) if sample.own)
        raise UpdateRefused("enough")

    monkeypatch.setattr(updating, "update_server", update)
    with piped("one", "two") as path:
        assert cli.main(["update", str(mar), "--samples", str(path)]) == 1
    assert asked == ["one", "two"]


def test_a_build_compares_on_the_samples_of_a_pipe(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with piped("one", "two") as path:
        made = run_export(tmp_path / "x", {"model_name": str(checkpoint("bert")), "max_length": 16}, samples_file=path)
    assert made.manifest.receipt["own_answers"] == 2


def test_predict_names_the_line_that_is_not_utf_8(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ncaf\udce9\n"))
    assert cli.main(["predict", "nobody", "-"]) == 1
    assert "predict: standard input, line 2, is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--file", "own.txt"], ["-"]])
def test_predict_asks_one_text_for_each_line(
    options: List[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "\ufeffone\u2028two\x85\x0cthree\r\n\r\nfour\n"
    monkeypatch.chdir(tmp_path)
    Path("own.txt").write_bytes(content.encode())
    monkeypatch.setattr(sys, "stdin", io.StringIO(content))
    assert list(predict._inputs(cli._parse(["predict", "tiny", *options]))) == [["one\u2028two\x85\x0cthree", "four"]]
