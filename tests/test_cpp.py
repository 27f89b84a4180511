"""The C++ example: its commands build it, and its output equals the handler's answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest
from conftest import ROOT
from tokenizers import Tokenizer
from transformer_handler import TransformerHandler

EXAMPLE = ROOT / "docs" / "cpp" / "logits.cpp"
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="tried on Linux only"),
    pytest.mark.skipif(CMAKE is None, reason="there is no cmake"),
    pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler"),
]


class Context:
    def __init__(self, folder: Path) -> None:
        self.system_properties = {"model_dir": str(folder)}

    def get_all_request_header(self, index: int) -> Any:
        return {}

    def set_response_header(self, index: int, key: str, value: str) -> None: ...


def commands() -> List[str]:
    """Return the commands in its first comment."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    return [line[7:] for line in lines if line.startswith("//     ")]


def run(command: str, folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for name in ("CC", "CXX", "CXXFLAGS", "LDFLAGS"):  # set by other tests of this process
        environment.pop(name, None)
    result = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_it_gives_the_logits_of_the_handler(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE.parent, tmp_path / "docs" / "cpp")
    configure, build, ask = commands()
    run(configure, tmp_path)
    run(build, tmp_path)
    program, model, *_ = ask.split()
    assert model.startswith("artifacts/")

    handler, context = TransformerHandler(), Context(artifact)
    handler.initialize(context)
    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    for text in ("Where is my parcel?", "The train leaves at nine."):
        asked = {"inputs": text, "parameters": {"function_to_apply": "none", "top_k": None}}
        [answer] = handler.handle([{"body": asked}], context)
        scores = {item["label"]: item["score"] for item in json.loads(answer)}
        ids = " ".join(map(str, tokenizer.encode(text).ids))
        printed = run(f"{program} {artifact / Path(model).name} {ids}", tmp_path)
        assert [float(line) for line in printed.split()] == pytest.approx(
            [scores[label] for label in ("red", "green", "blue")], abs=1e-6
        )
