"""Completion on Tab, by a real shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Callable, List, Set

import pytest
from test_instances import remembered
from traceserve.commands import completion
from traceserve.serving import instances

# What bash does on Tab: it calls the function that the script registered, and reads COMPREPLY.
TAB = """
eval "$(traceserve completion bash)"
COMP_LINE=$1; COMP_POINT=${#1}; COMP_TYPE=9; COMP_KEY=9
read -ra COMP_WORDS <<< "$1"; [[ $1 == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_python_argcomplete traceserve "${COMP_WORDS[COMP_CWORD]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def tab(tmp_path: Path) -> Callable[[str], Set[str]]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def press(line: str) -> Set[str]:
        command = ["bash", "-euo", "pipefail", "-c", TAB, "bash", line]
        result = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True, check=True
        )
        return {word.rstrip() for word in result.stdout.splitlines()}

    return press


def test_commands_and_options(tab: Callable[[str], Set[str]]) -> None:
    assert tab("traceserve b") == {"bench", "build"}
    assert tab("traceserve build --s") == {"--samples", "--store"}
    assert {"bash", "zsh", "fish"} <= tab("traceserve completion ")


def test_what_is_at_hand(tab: Callable[[str], Set[str]], tmp_path: Path) -> None:
    (tmp_path / "one.mar").write_bytes(b"")
    (tmp_path / "one.txt").write_bytes(b"")
    assert tab("traceserve serve on") == {"one.mar"}
    assert tab("traceserve build --config on") == {"one.mar", "one.txt"}
    assert "question_answering" in tab("traceserve tasks ")
    assert "kubernetes" in tab("traceserve deploy ")


def test_running_servers(tab: Callable[[str], Set[str]]) -> None:
    processes: List[subprocess.Popen[bytes]] = []
    instance = remembered(processes)
    try:
        assert "tiny" in tab("traceserve predict ")
        assert tab("traceserve predict tiny --port ") == {"18000"}
        assert tab("traceserve serve one.mar --port ") == {""}  # it takes a free one
    finally:
        instances.stop(instance, at_once=True)
        processes[0].wait()


@pytest.mark.parametrize("shell", completion._SHELLS)
def test_a_script_for_each_shell(shell: str) -> None:
    command = [sys.executable, "-m", "traceserve", "completion"]
    printed = subprocess.run([*command, shell], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "traceserve" in printed
    by_variable = subprocess.run(
        command, env={**os.environ, "SHELL": f"/bin/{shell}"}, stdout=subprocess.PIPE, text=True, check=True
    )
    assert by_variable.stdout == printed
