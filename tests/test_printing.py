"""Output of the commands: paths, messages and commands to copy are printed as they are."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, List, NoReturn

import pytest
from rich.table import Table
from traceserve import cli
from traceserve.archives.reports import report_file
from traceserve.checking.proof import proof_of
from traceserve.commands import printing
from traceserve.commands.arguments import add_nothing
from traceserve.commands.contract import Command

NAMES = ["store [red]x", "q[/v]", ":smile: [bold]", "a folder with a name that is longer than the narrow terminal"]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 40 columns, without colours."""
    for name, value in (("FORCE_COLOR", "1"), ("NO_COLOR", "1"), ("COLUMNS", "40"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)


def plain(text: str) -> str:
    """Return what a terminal shows, without its codes."""
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)


@pytest.mark.parametrize("name", NAMES)
def test_an_archives_path_can_be_copied(
    name: str,
    narrow: None,
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["archive", "--store", name, str(artifact)]) == 0
    first, _, last = plain(capsys.readouterr().out).splitlines()
    assert first.startswith(f"{name}/tiny.mar: ")
    assert Path(shlex.split(last.partition("traceserve serve ")[2])[0]).is_file()


@pytest.mark.parametrize("has_report", [False, True])
def test_a_packed_archive_has_its_artifacts_report(has_report: bool, artifact: Path, tmp_path: Path) -> None:
    """`traceserve verify` showed an earlier archive's speed as that of the build."""
    own, store = tmp_path / "tiny", tmp_path / "store"
    shutil.copytree(artifact, own)
    store.mkdir()
    report_file(store / "tiny.mar").write_text('{"golden_p50_ms": 12.5}')
    if has_report:
        report_file(own).write_text('{"golden_p50_ms": 99.5}')
    assert cli.main(["archive", "--store", str(store), str(own)]) == 0
    with proof_of(store / "tiny.mar") as proof:
        assert proof.p50 == (99.5 if has_report else None)


def test_a_builds_paths_can_be_copied(
    narrow: None,
    few_texts: None,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "[a] configuration.json"
    assert cli.main(["init", str(checkpoint("bert")), "-o", config.name, "--task", "sequence_classification"]) == 0
    command = shlex.split(plain(capsys.readouterr().out).splitlines()[-1].partition("traceserve ")[2])
    assert command == ["build", "--config", config.name]
    assert cli.main([*command, "--output", f"artifacts/{'long' * 10}", "--store", NAMES[0]]) == 0
    report, _, last = plain(capsys.readouterr().out).splitlines()[-3:]
    assert Path(report.partition("report  ")[2]).is_file()
    assert Path(shlex.split(last.partition("traceserve serve ")[2])[0]).is_file()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_an_encoding_lacks_is_printed_as_json_escapes_it(stream: str) -> None:
    text = json.dumps({"label": "日本 é 😀"}, ensure_ascii=False)
    ready = "import sys\nfrom traceserve.commands import printing\nprinting.print_in_any_encoding()"
    program = f"{ready}\nprint({text!r}, file=sys.{stream})"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=True, timeout=60)
    printed = getattr(done, stream)
    assert printed.isascii() and json.loads(printed) == {"label": "日本 é 😀"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("arguments", [["config-schema"], ["--help"], ["--version"]], ids="".join)
def test_standard_output_that_cannot_be_written_is_named(arguments: List[str], buffered: bool) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    command = [sys.executable, "-m", "traceserve", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    told = "error: standard output could not be written: No space left on device; send it elsewhere\n"
    assert (done.returncode, done.stderr) == (1, told)


@pytest.mark.parametrize("arguments", [["config-schema"], ["--help"]], ids="".join)
def test_output_that_nobody_reads_ends_a_command_in_silence(arguments: List[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "traceserve", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(sys.platform == "win32", reason="how a POSIX shell closes it")
def test_a_command_without_standard_output_runs() -> None:
    command = [sys.executable, "-m", "traceserve", "config-schema"]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unexpected_error_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: argparse.Namespace) -> NoReturn:
        raise KeyError("[INST] and [/INST]")

    monkeypatch.setattr(cli, "COMMANDS", (Command("fail", "Fail.", add_nothing, fail),))
    assert cli.main(["fail"]) == 1
    assert "error: unexpected KeyError: '[INST] and [/INST]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "give this user access to it, and to the folders above it, or name another path"),
        (errno.ENAMETOOLONG, "name a shorter path"),
    ],
)
def test_a_path_that_the_system_refuses_is_told_in_a_sentence(
    number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = tmp_path / "other" / "folder"

    def look(options: argparse.Namespace) -> NoReturn:
        raise OSError(number, os.strerror(number), str(refused))

    monkeypatch.setattr(cli, "COMMANDS", (Command("look", "Look.", add_nothing, look),))
    assert cli.main(["look"]) == 1
    assert capsys.readouterr().err == f"error: {refused} cannot be used: {os.strerror(number)}; {advice}\n"


def test_a_name_that_is_too_long_is_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path / ("a" * 300))]) == 2
    assert "cannot be used: File name too long; name a shorter path\n" in capsys.readouterr().err


def test_a_configurations_notes_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "setup_config.json"
    config.write_text('{"model_name": "no/such", "task": "sequence_classification", "FasterTransformer": true}')
    assert cli.main(["build", "--config", str(config)]) == 1
    assert "note: FasterTransformer" in capsys.readouterr().err
    printing.print_note("the template has [/INST] and :smile:", error=True)
    printing.print_line("at [red]\x1b[2J", error=True)
    assert capsys.readouterr().err == "note: the template has [/INST] and :smile:\nat [red]?[2J\n"


def test_cells_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("[a]", "b")
    table.add_row("[red]x[/y]", ":smile:")
    printing.console().print(table)
    shown = capsys.readouterr().out
    assert "[a]" in shown and "[red]x[/y]" in shown and ":smile:" in shown


def test_a_step_of_a_progress_bar_is_printed_as_it_is(narrow: None, capsys: pytest.CaptureFixture[str]) -> None:
    with printing.ProgressBar() as bar:
        bar("x[/y]", 0, 0)
    assert "x[/y]" in plain(capsys.readouterr().err)
