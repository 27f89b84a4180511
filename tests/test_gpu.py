"""The GPU command, rehearsed on the CPU: all of its code runs, with few and small models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_it_builds_asks_shares_and_measures(tmp_path: Path) -> None:
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("handlers", "scripts", "tests"))
    command = [sys.executable, "-m", "gpu", "--rehearse", "--processes", "2", "--output", str(tmp_path)]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["failures"] and not report["left_out"]
    assert len(report["outcomes"]) == 6 and all(outcome["passed"] for outcome in report["outcomes"])
    assert report["workers"]["labels_alike"] and report["workers"]["devices"] == ["cpu"] * 3
    assert {(speed["model"], speed["what"]) for speed in report["speeds"]} >= {
        (model, who) for model in ("bert-base", "llama-135m") for who in ("traceserve", "transformers")
    }
    assert all(speed["tokens_per_second"] > 0 for speed in report["speeds"])
    assert "| bert-base | float32 | 2 | traceserve |" in (tmp_path / "report.md").read_text()
