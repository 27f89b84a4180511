"""init: a first configuration, from what a checkpoint says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Callable, List

import pytest
from test_space import run
from traceserve.building.config.parsing import load_config
from traceserve.cli import main

Make = Callable[..., Path]


def written(path: Path) -> Any:
    load_config(path)  # it is legal
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "architecture, auto_model, task, longest",
    [
        ("bert", "AutoModelForTokenClassification", "token_classification", 160),
        ("roberta", "AutoModelForQuestionAnswering", "question_answering", 160),
        ("gpt2", "AutoModelForCausalLM", "text_generation", 160),
        ("t5", "AutoModelForSeq2SeqLM", "text2text_generation", 512),
    ],
)
def test_the_checkpoint_says_the_task_and_its_length(
    architecture: str,
    auto_model: str,
    task: str,
    longest: int,
    checkpoint: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = checkpoint(architecture, auto_model)
    output = tmp_path / "new" / "mine.json"
    assert main(["init", str(source), "-o", str(output)]) == 0
    content = written(output)
    assert content["model_name"] == str(source) and content["task"] == task and content["save_mode"] == "torchscript"
    assert 0 < content["max_length"] <= longest
    assert f"traceserve build --config {output}" in capsys.readouterr().out.replace("\n", "")


def test_a_relative_folder_stays_relative_to_the_configuration(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint("bert", id2label={0: "red", 1: "green", 2: "blue"})
    (tmp_path / "model").symlink_to(source)
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["init", "model"]) == 0
    printed = capsys.readouterr().out
    assert "red, green, blue" in printed and printed.endswith("next:  traceserve build\n")
    assert main(["init", "model", "-o", "configs/a.json"]) == 0
    config = load_config(Path("configs/a.json"))
    assert (config.folder / config.config.model_name).resolve() == source.resolve()


def test_the_configurations_folder_may_be_new(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(checkpoint("bert"))
    monkeypatch.chdir(tmp_path)
    output = Path("new/deep/x.json")
    assert main(["init", "model", "-o", str(output), "--task", "sequence_classification"]) == 0
    config = load_config(output)
    assert not Path(config.config.model_name).is_absolute()
    assert (config.folder / config.config.model_name).resolve() == (tmp_path / "model").resolve()


@pytest.mark.parametrize("options", [[], ["--force"]])
def test_a_folder_is_no_configuration(
    options: List[str], checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(checkpoint("bert")), "-o", str(tmp_path), *options]) == 1
    assert f"error: {tmp_path} is a folder; name a file" in capsys.readouterr().err and not os.listdir(tmp_path)


def test_an_existing_one_is_kept(checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("setup_config.json").write_text("mine")
    source = str(checkpoint("bert", "AutoModelForTokenClassification"))
    assert main(["init", source]) == 1 and Path("setup_config.json").read_text() == "mine"
    assert main(["init", "nowhere", "--force"]) == 1 and Path("setup_config.json").read_text() == "mine"
    assert main(["init", source, "--force"]) == 0 and written(Path("setup_config.json"))


def test_a_link_to_nothing_is_refused_before_the_checkpoint_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "c.json"
    link.symlink_to(tmp_path / "nothing")
    assert main(["init", str(tmp_path / "no checkpoint"), "-o", str(link), "--force"]) == 1
    assert f"{link} is a link to " in " ".join(capsys.readouterr().err.split())


def test_on_a_full_disk_the_earlier_one_stays(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("setup_config.json").write_text("mine")
    source = checkpoint("bert", "AutoModelForTokenClassification")
    # Python does not notice that a file of bytecode was cut.
    result = run("init", source, "--force", limit=16, PYTHONDONTWRITEBYTECODE="1")
    assert result.returncode == 1 and "no space left on the disk of" in result.stderr
    assert Path("setup_config.json").read_text() == "mine" and os.listdir() == ["setup_config.json"]


def test_a_home_of_nobody_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "~nobody-here/model"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "unexpected" not in said and "~nobody-here/model is neither a folder" in said


def one_output(checkpoint: Make) -> str:
    return str(checkpoint("bert", id2label={0: "LABEL_0"}, label2id={"LABEL_0": 0}))


class Input:
    """A terminal, or not."""

    def __init__(self, terminal: bool) -> None:
        self.isatty = lambda: terminal


def test_several_tasks_are_named_to_a_script(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", Input(terminal=False))
    assert main(["init", one_output(checkpoint)]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "can be for several tasks" in told and "--task sequence_classification" in told
    assert not Path("setup_config.json").exists()
    assert main(["init", one_output(checkpoint), "--task", "text_ranking"]) == 0
    assert written(Path("setup_config.json"))["task"] == "text_ranking"
    for nobody in (Input(terminal=False), None):  # None: it was closed by who started the command
        monkeypatch.setattr("sys.stdin", nobody)
        assert main(["init", "--force"]) == 1
        assert "name a checkpoint" in capsys.readouterr().err


def test_somebody_at_a_terminal_is_asked(checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answers: List[str] = [one_output(checkpoint), "no_task", "text_ranking"]
    monkeypatch.setattr("sys.stdin", Input(terminal=True))
    monkeypatch.setattr("builtins.input", lambda *_: answers.pop(0))
    assert main(["init"]) == 0 and answers == []
    assert written(Path("setup_config.json"))["task"] == "text_ranking"


def test_an_empty_answer_is_asked_again_and_ctrl_d_ends(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At both questions."""
    monkeypatch.chdir(tmp_path)
    answers: List[str] = []

    def read(*_: object) -> str:
        if not answers:
            raise EOFError
        return answers.pop(0)

    monkeypatch.setattr("sys.stdin", Input(terminal=True))
    monkeypatch.setattr("builtins.input", read)
    for given, question in (([], "checkpoint"), (["", " ", one_output(checkpoint), ""], "several tasks fit")):
        answers[:] = given
        assert main(["init"]) == 1 and answers == []
        [line] = [line for line in capsys.readouterr().err.splitlines() if line]
        assert line.startswith(f"error: no answer to: {question}") and not os.listdir(tmp_path)
    answers[:] = ["", one_output(checkpoint), "text_ranking"]
    assert main(["init"]) == 0 and answers == []
    assert written(Path("setup_config.json"))["task"] == "text_ranking"
