"""`traceserve diff`: two archives, what they say of themselves and how they answer."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, List, Optional, TextIO, Tuple

import pytest
from conftest import run_export
from test_samples import piped
from traceserve import cli
from traceserve.archives.contents import unpack
from traceserve.building.gate.findings import LIMITS
from traceserve.checking import answering, comparing
from traceserve.checking.answering import Answered, Told
from traceserve.checking.comparing import AnswerChange, ArchiveComparison, FieldChange, Side
from traceserve.checking.comparison_page import comparison_page
from traceserve.commands.printing import answer_in_brief
from traceserve.errors import ArchiveError
from traceserve_runtime.engine import load_task
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.tasks.contract import Answer, Request

LABELS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
MARKER = "<script>alert(1)</script> & more"


@pytest.fixture(scope="module")
def other(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same labels."""
    folder = tmp_path_factory.mktemp("other") / "other"
    run_export(folder, {"model_name": str(checkpoint("distilbert", **LABELS)), "max_length": 24})
    return folder


def archives_compared(drift: float) -> ArchiveComparison:
    """Two equal archives, but for their scores."""
    side = Side("x", 1, 1.0, 1.0, 1.0)
    return ArchiveComparison((side, side), "x", 1, False, (), (), (), 1, (), (), 0.0, drift, 1e-4)


def test_an_archive_equals_itself(mar: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Packed or not."""
    assert cli.main(["diff", str(mar), str(artifact), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] and found["asked"] > 60 and found["changed"] == found["labels"] == found["tokenizer"] == []
    assert found["drift_max"] < 1e-5 and found["limit"] == 1e-4
    for side in found["sides"]:
        assert side["p50_ms"] > 0 and side["requests_per_second"] > 0 and 50 < side["memory_mib"] < 2000


def test_another_model(mar: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the user's own texts, which may come from a pipe; the page quotes those whose answer changed."""
    texts = [MARKER, *(f"the train number {i} leaves from platform {i % 7}" for i in range(60))]
    page = tmp_path / "diff.html"
    page.write_text("earlier")
    os.link(page, tmp_path / "earlier.html")
    with piped(*texts) as path:
        arguments = ["diff", str(mar), str(other), "--samples", str(path), "--html", str(page), "--threads", "1"]
        assert cli.main(arguments) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "different:" in said and "of 61 answers changed" in said and "max_length" in said
    assert all(text not in said for text in texts)  # the table quotes none
    assert (tmp_path / "earlier.html").read_text() == "earlier"  # replaced, not overwritten
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html and "train number" in html and "http" not in html.split("</style>")[1]


@pytest.mark.parametrize(
    ("one", "other", "change"),
    [
        (("a", "b"), ("a", "b", "b"), FieldChange("only in one", "", "b")),
        (("a", "a", "b"), ("a", "b", "b"), FieldChange("only in one", "a", "b")),
        (("a", "b", "a"), ("a", "a", "b"), FieldChange("order, from position 1", "b", "a")),
    ],
)
def test_labels_may_repeat(one: Tuple[str, ...], other: Tuple[str, ...], change: FieldChange, artifact: Path) -> None:
    own = Manifest.read(artifact)
    assert list(comparing._labels(replace(own, labels=one), replace(own, labels=other))) == [change]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_page_is_written_also_where_nobody_reads_the_table(
    options: List[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unread: TextIO
) -> None:
    monkeypatch.setattr(comparing, "compare_archives", lambda *arguments: archives_compared(drift=0.0))
    monkeypatch.setattr(sys, "stdout", unread)
    assert cli.main(["diff", "a.mar", "b.mar", "--html", str(tmp_path / "diff.html"), *options]) == 2
    assert "<html" in (tmp_path / "diff.html").read_text(encoding="utf-8")


def test_swapped_labels_move_every_answer(mar: Path, tmp_path: Path) -> None:
    unpack(mar, tmp_path / "swapped")
    replace(Manifest.read(tmp_path / "swapped"), labels=("green", "red", "blue")).write(tmp_path / "swapped")
    found = comparing.compare_archives(mar, tmp_path / "swapped", None, 1, lambda what, done, total: None)
    assert not found.equal and found.labels == (FieldChange("order, from position 0", "red", "green"),)
    assert {move[:2] for move in found.moves} <= {("red", "green"), ("green", "red")} and found.changed
    assert sum(count for _, _, count in found.moves) == len(found.changed)
    for each in found.changed:
        assert {each.one[0]["label"], each.other[0]["label"]} == {"red", "green"}


@pytest.mark.parametrize(
    "answer, shown",
    [
        ("joy", "joy"),
        ([{"label": "joy"}, {"label": "fear"}], '{"label": "joy"}'),
        ({"text": "größe"}, '{"text": "größe"}'),
        ([], "[]"),
        ("a\x1b[31mred\u202e", "a?[31mred?"),  # a stranger's text does not control the terminal
        ({"a\x9b": "b\u2066"}, '{"a\\u009b": "b\\u2066"}'),
        ("x" * 30, "x" * 23 + "…"),
    ],
)
def test_an_answer_in_brief(answer: Any, shown: str) -> None:
    assert answer_in_brief(answer, 24) == shown


def test_a_page_that_cannot_be_written_is_refused_first(
    mar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparing, "compare_archives", lambda *_: pytest.fail("it was compared"))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "x")
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "link", "is a link to")):
        assert cli.main(["diff", str(mar), str(mar), "--html", str(path)]) == 2
        assert words in capsys.readouterr().err


def test_trouble_is_2(mar: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(artifact, tmp_path / "tagger")
    replace(Manifest.read(artifact), task="token_classification").write(tmp_path / "tagger")
    for arguments, words in (
        ([mar, tmp_path / "tagger"], "they cannot be asked the same"),
        ([mar, tmp_path / "missing.mar"], "does not exist"),
        ([mar, mar, "--samples", tmp_path / "none.txt"], "cannot be read"),
        ([mar, mar, "--html", tmp_path / "none" / "x.html"], "there is no folder"),
    ):
        assert cli.main(["diff", *map(str, arguments)]) == 2
        assert words in capsys.readouterr().err.replace("\n", " ")


def changed_tokenizer(artifact: Path, folder: Path, edit: Callable[[Any], None]) -> List[FieldChange]:
    """Compare an artifact's tokenizer with an edited one."""
    shutil.copytree(artifact, folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    edit(document)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    manifests = [Manifest.read(artifact), Manifest.read(folder, verify=False)]
    return list(comparing._tokenizers([artifact, folder], manifests))


def test_tokenizers_are_compared_by_content(artifact: Path, tmp_path: Path) -> None:
    """Not by the file's layout, which json.dumps changes."""
    assert changed_tokenizer(artifact, tmp_path / "same", lambda document: None) == []

    def lower(document: Any) -> None:
        document["normalizer"]["lowercase"] = False

    [found] = changed_tokenizer(artifact, tmp_path / "cased", lower)
    assert found.what == "normalizer" and '"lowercase": true' in found.one and '"lowercase": false' in found.other

    def exchange(document: Any) -> None:
        vocab = document["model"]["vocab"]
        vocab["t"], vocab["e"] = vocab["e"], vocab["t"]

    [found] = changed_tokenizer(artifact, tmp_path / "exchanged", exchange)
    assert found.what == "tokens only in one" and found.one.count("=") == 2


ENTITIES = [
    {"entity": "PER", "score": 0.9, "word": "Ada", "start": 0, "end": 3},
    {"entity": "LOC", "score": 0.9, "word": "London", "start": 9, "end": 15},
]


@pytest.mark.parametrize(
    ("one", "other", "moves"),
    [
        ([{"label": "a", "score": 1.0}], [{"label": "b", "score": 1.0}], (("a", "b", 1),)),
        (ENTITIES, ENTITIES[:1], (("LOC 9–15", "nothing", 1),)),
        (ENTITIES[1:], [{**ENTITIES[1], "start": 10}], (("LOC 9–15", "LOC 10–15", 1),)),
        ({"labels": ["x", "y"], "scores": [1.0, 0.0]}, {"labels": ["y", "x"], "scores": [1.0, 0.0]}, (("x", "y", 1),)),
        ([{"generated_text": "x"}], [{"generated_text": "y"}], ()),
        ("InputTooLong", [{"label": "a", "score": 1.0}], (("InputTooLong", "a", 1),)),
    ],
)
def test_moves(one: Any, other: Any, moves: Tuple[Any, ...]) -> None:
    assert comparing.moves_of([AnswerChange(1, {}, one, other)]) == moves


def test_answers_are_compared_by_the_task(artifact: Path) -> None:
    task = load_task(artifact, Manifest.read(artifact))
    requests = [Request({"text": str(i)}) for i in range(4)]

    def told(*scores: float) -> Told:
        return Told([{"label": "red", "score": scores[0]}, {"label": "blue", "score": scores[1]}], None)

    one = [told(0.6, 0.4), told(0.6, 0.4), Told(None, "InputTooLong"), Told(None, "InputTooLong")]
    other = [told(0.5, 0.5), Told([{"label": "blue", "score": 0.6}], None), Told(None, "InputTooLong"), told(0.6, 0.4)]
    changed, drift = comparing._compared(task, requests, one, other)
    assert [each.number for each in changed] == [2, 4] and drift == [pytest.approx(0.1)]


class Tags(HTMLParser):
    """Checks that tags are closed, and collects links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: List[str] = []
        self.links: List[Tuple[str, Optional[str]]] = []

    def handle_starttag(self, tag: str, attributes: List[Tuple[str, Optional[str]]]) -> None:
        self.links += [item for item in attributes if item[0] in ("src", "href", "onclick", "onerror")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_escapes_every_text() -> None:
    evil = MARKER + "\" onerror='x'"
    side = Side(evil, 1, 1.0, 1.0, 1.0)
    change = FieldChange(evil, evil, evil)
    found = ArchiveComparison(
        (side, side), evil, 1, True, (change,), (change,), (change,), 1,
        (AnswerChange(1, {evil: evil}, [{"label": evil}], evil),), ((evil, evil, 1),), 0.0, 0.0, 1e-4,
    )  # fmt: skip
    html = comparison_page(found)
    tags = Tags()
    tags.feed(html)
    assert tags.open == [] and tags.links == [] and "<script" not in html and html.count("&lt;script&gt;") >= 14


def test_merges_added_tokens_and_the_models_settings_are_compared(artifact: Path, tmp_path: Path) -> None:
    def added(document: Any) -> None:
        document["added_tokens"][0]["lstrip"] = True

    def prefix(document: Any) -> None:
        document["model"]["continuing_subword_prefix"] = "@@"

    for number, (edit, what) in enumerate(((added, "added tokens"), (prefix, "model's continuing_subword_prefix"))):
        assert [found.what for found in changed_tokenizer(artifact, tmp_path / str(number), edit)] == [what]

    def facts(**model: Any) -> Any:
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
        manifest = replace(manifest_here, tokenizer=replace(manifest_here.tokenizer, file="tokenizer.json"))
        return comparing._tokenizer_facts(tmp_path, manifest), comparing._vocabulary(tmp_path, manifest)

    manifest_here = Manifest.read(artifact)
    assert facts(merges=["a b", "c d"]) == facts(merges=[["a", "b"], ["c", "d"]], ignore_merges=False)
    assert facts(merges=["a b", "c d"]) != facts(merges=["c d", "a b"])
    assert facts(vocab=[["a", -1.0]]) != facts(vocab=[["a", -2.0]])
    assert facts(unk_id=0) != facts(unk_id=None)


def test_what_both_refuse_is_not_equal(artifact: Path) -> None:
    answered, refused = Told([{"label": "red", "score": 1.0}], None), Told(None, "InputTooLong")
    assert comparing._refused_by_both([answered, refused, refused], [answered, refused, answered]) == 1
    for other in ([refused, refused], [answered, refused]):
        with pytest.raises(ArchiveError, match="none of the 2 requests was answered by both.*InputTooLong.*--samples"):
            comparing._refused_by_both([refused, refused], other)


def test_refused_requests_are_counted(mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    too_long = json.dumps({"inputs": "word " * 99, "parameters": {"long_inputs": "reject"}})
    samples = tmp_path / "own.jsonl"
    samples.write_text(too_long)
    assert cli.main(["diff", str(mar), str(mar), "--samples", str(samples)]) == 2
    assert "none of the 1 requests was answered by both" in " ".join(capsys.readouterr().err.split())
    samples.write_text(too_long + '\n"short"\n')
    assert cli.main(["diff", str(mar), str(mar), "--samples", str(samples)]) == 0
    assert "0 of 2 answers changed (1 refused by both)" in " ".join(capsys.readouterr().out.split())


class Refusing:
    """An engine that takes its time to refuse all but one request."""

    def warm_up(self) -> None:
        pass

    def answer(self, requests: List[Request]) -> List[Any]:
        time.sleep(0.02 * sum(request.inputs["text"] != "good" for request in requests))
        return [Answer("yes") if request.inputs["text"] == "good" else ValueError() for request in requests]


def test_refused_requests_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "_TIMED", 2)
    monkeypatch.setattr(answering, "Engine", SimpleNamespace(load=lambda folder: Refusing()))
    texts = ["bad", "bad", "bad", "good"]
    document = {"folder": "x", "requests": [[{"text": text}, {}] for text in texts]}
    (tmp_path / "asked.json").write_text(json.dumps(document))
    assert answering._answer_all(tmp_path / "asked.json")["p50_ms"] < 10


@pytest.mark.parametrize(
    ("drift", "equal"), [(1e-4, True), (1.1e-4, False), (float("inf"), False), (float("nan"), False)]
)
def test_scores_may_drift_up_to_the_limit(drift: float, equal: bool) -> None:
    found = archives_compared(drift)
    assert found.equal is equal and found.document()["equal"] is equal


def test_a_refusal_for_another_reason_is_a_changed_answer(artifact: Path) -> None:
    task = load_task(artifact, Manifest.read(artifact))
    too_long, invalid = Told(None, "InputTooLong"), Told(None, "InvalidRequest")
    request = Request({"text": "x"}, {})
    assert comparing._compared(task, [request], [too_long], [too_long]) == ([], [])
    changed, drift = comparing._compared(task, [request], [too_long], [invalid])
    assert changed == [AnswerChange(1, {"text": "x"}, "InputTooLong", "InvalidRequest")] and drift == []


def test_refused_requests_are_no_throughput(tmp_path: Path) -> None:
    answered = Answered([Told("x", None), Told(None, "InputTooLong")], 1.0, 2.0, 3.0)
    assert comparing._side(tmp_path, answered).requests_per_second == 0.5


def test_each_side_runs_by_itself_within_the_wider_limit_of_both(
    mar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the threads that were asked for, whatever the environment says, and nothing of the folder where the user is."""
    unpack(mar, tmp_path / "lower")
    replace(Manifest.read(tmp_path / "lower"), dtype="bfloat16").write(tmp_path / "lower")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "torch.py").write_text("raise ImportError('of the working directory')")
    (tmp_path / "path").mkdir()
    note = f"open({str(tmp_path / 'threads')!r}, 'a').write(os.environ['OMP_NUM_THREADS'] + ' ')"
    (tmp_path / "path" / "sitecustomize.py").write_text(f"import os\n{note}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.chdir(tmp_path / "here")
    found = comparing.compare_archives(mar, tmp_path / "lower", None, 1, lambda what, done, total: None)
    assert found.limit == LIMITS["bfloat16"].difference > LIMITS["float32"].difference
    assert (tmp_path / "threads").read_text().split() == ["1", "1"]
