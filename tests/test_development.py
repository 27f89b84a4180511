"""The development pages are followed literally, in a copy of the code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from conftest import ROOT

PAGES = ROOT / "docs" / "development"


def blocks(page: str, language: str) -> List[str]:
    """Return a page's fenced blocks."""
    return re.findall(rf"```{language}\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture()
def copy(tmp_path: Path) -> Path:
    """Copy the code without compiled files."""
    for name in ("handlers", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return tmp_path


def run(folder: Path, *command: str) -> str:
    paths = os.pathsep.join(str(folder / name) for name in ("handlers", "scripts"))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


ASK = """
import json, sys
from pathlib import Path
from traceserve_runtime.engine import Engine
from traceserve_runtime.service import Call, Service
from traceserve_runtime.protocols.bodies import Headers
service = Service(Engine.load(Path(sys.argv[1])), "x")
for path, body in json.loads(sys.argv[2]):
    print(service.answer([Call({"body": body}, Headers("application/json", path=path))])[0].body.decode())
"""


def test_a_task_is_one_file_and_one_row(copy: Path, checkpoint: Callable[..., Path]) -> None:
    file, imported, row = blocks("add-a-task.md", "python")
    place, _, code = file.partition("\n")
    (copy / place[2:]).write_text(code, encoding="utf-8")
    table = copy / "handlers/traceserve_runtime/tasks/__init__.py"
    text = table.read_text(encoding="utf-8")
    text = text.replace("\n\nTASKS", "\n" + imported.partition("\n")[2] + "\nTASKS").replace(
        "        Text2TextGeneration,\n", "        Text2TextGeneration,\n" + row.partition("\n")[2]
    )
    table.write_text(text, encoding="utf-8")
    [config] = blocks("add-a-task.md", "json")
    content: Dict[str, Any] = json.loads(config)
    content["model_name"] = str(checkpoint("gpt2", "AutoModelForCausalLM"))
    (copy / "setup_config.json").write_text(json.dumps(content), encoding="utf-8")

    built = run(copy, "-m", "traceserve", "build", "--output", "artifacts/next", "--store", "store")
    assert "next_token" in built
    assert "### next_token" in run(copy, "-m", "traceserve", "tasks", "--markdown")
    asked = [["", {"text": "The boat", "parameters": {"top_k": 3}}], ["openapi.json", {}], ["", {"txt": "The boat"}]]
    answer, described, refused = run(copy, "-c", ASK, "artifacts/next", json.dumps(asked)).splitlines()[-3:]
    best = json.loads(answer)
    assert len(best) == 3 and best[0]["score"] >= best[1]["score"]
    assert "top_k" in json.loads(described)["components"]["schemas"]["Parameters"]["properties"]
    assert "did you mean" in json.loads(refused)["error"]["message"]


def add(path: Path, after: str, block: str) -> None:
    """Insert a block, without the comment with its location, after the last occurrence of `after` in a file."""
    text = path.read_text(encoding="utf-8")
    before, found, rest = text.rpartition(after)
    assert found, f"{path.name} has no {after!r}"
    path.write_text(before + after + block.partition("\n")[2] + rest, encoding="utf-8")


def test_a_save_mode_is_two_files_and_its_rows(copy: Path, checkpoint: Callable[..., Path]) -> None:
    row, writer, writers, in_writers, reader, readers, in_runtimes, in_variants = blocks("add-a-save-mode.md", "python")
    for file in (writer, reader):
        place, _, code = file.partition("\n")
        (copy / place[2:]).write_text(code, encoding="utf-8")
    building, runtimes = copy / "scripts/traceserve/building", copy / "handlers/traceserve_runtime/runtimes/__init__.py"
    add(building / "config/save_modes.py", 'measured_against="torchscript",\n    ),\n', row)
    add(building / "writers/__init__.py", "from typing import Dict\n\n", writers)
    add(building / "writers/__init__.py", "check=aot_inductor.check,\n    ),\n", in_writers)
    add(runtimes, "from traceserve_runtime.settings import Settings\n", readers)
    add(runtimes, '"aot_inductor": aot_inductor.read,\n', in_runtimes)
    add(runtimes, '"aot_inductor": aot_inductor.variants,\n', in_variants)
    [config] = blocks("add-a-save-mode.md", "json")
    content: Dict[str, Any] = json.loads(config)
    content["model_name"] = str(checkpoint("bert"))
    (copy / "setup_config.json").write_text(json.dumps(content), encoding="utf-8")

    run(copy, "-m", "traceserve", "build", "--output", "artifacts/exported", "--store", "store")
    receipt = json.loads((copy / "artifacts/exported/traceserve.json").read_text(encoding="utf-8"))["receipt"]
    assert [each["variant"] for each in receipt["variants"]] == ["model.pt2, by torch.export"] and receipt["passed"]
    assert "exported" in run(copy, "-m", "traceserve", "formats")
    [answer] = run(copy, "-c", ASK, "artifacts/exported", json.dumps([["", {"text": "The boat"}]])).splitlines()[-1:]
    assert set(json.loads(answer)) == {"label", "score"}
