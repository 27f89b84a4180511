"""Checkpoints with their own code: traces do not depend on the hash that transformers puts into module names."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
import zipfile
from itertools import count
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
import transformers
from conftest import run_export
from oracle import COLORS, answers, assert_equal
from traceserve.building.writers.tracing.wrapping import plain_names
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks.contract import Request
from transformers import dynamic_module_utils

MODEL = """# {number}
import torch
from transformers import BertConfig, BertForSequenceClassification
from .parts import Head


class MyConfig(BertConfig):
    model_type = "my-bert"


class MyModel(BertForSequenceClassification):
    config_class = MyConfig

    def __init__(self, config):
        super().__init__(config)
        self.classifier = Head(config.hidden_size, config.num_labels)
        self.post_init()
"""
PARTS = '''import torch


class Scale(torch.nn.Module):
    """Of the second file, and of no use without it."""

    def forward(self, hidden):
        return hidden * 1.5


class Head(torch.nn.Linear):
    def __init__(self, size, labels):
        super().__init__(size, labels)
        self.scale = Scale()

    def forward(self, hidden):
        return self.scale(super().forward(hidden))
'''


def with_code(folder: Path, checkpoint: Path, number: int) -> Path:
    """The checkpoint in `folder`, with its own model and parts; each number has another hash."""
    shutil.copytree(checkpoint, folder)
    (folder / "modeling_my.py").write_text(MODEL.format(number=number))
    (folder / "parts.py").write_text(PARTS)
    config = json.loads((folder / "config.json").read_text())
    config.update(
        model_type="my-bert",
        architectures=["MyModel"],
        auto_map={
            "AutoConfig": "modeling_my.MyConfig",
            "AutoModelForSequenceClassification": "modeling_my.MyModel",
        },
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def folders(root: Path, checkpoint: Path, first: Callable[[str], bool]) -> Path:
    """Make checkpoints with these hashes of their code; before version 5 there is none."""
    digest = getattr(dynamic_module_utils, "_compute_local_source_files_hash", None)
    for number in count():
        folder = with_code(root / f"code{number}" / "my-model.2", checkpoint, number)
        if digest is None or first(digest(str(folder), str(folder / "modeling_my.py"))[0]):
            return folder
        shutil.rmtree(folder)
    raise AssertionError


@pytest.mark.parametrize("first", [str.isdigit, str.isalpha], ids=["digit", "letter"])
def test_equals_the_pipeline_whatever_the_hash(
    first: Callable[[str], bool], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = folders(tmp_path, checkpoint("bert", **COLORS), first)
    config: Any = {"model_name": str(source), "task": "sequence_classification", "trust_remote_code": True}
    run_export(tmp_path / "one", config)
    assert torch.jit.load(str(tmp_path / "one" / "traced_model.pt"))
    pipeline = transformers.pipeline("text-classification", model=str(source), device="cpu", trust_remote_code=True)
    texts = ["Where is my parcel?", "The train leaves at nine."]
    for text, got in zip(texts, answers(Engine.load(tmp_path / "one"), [Request({"text": text}) for text in texts])):
        assert_equal(got, pipeline([text])[0])


def test_two_builds_are_equal(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Each in its own process, as builds are."""
    source = with_code(tmp_path / "checkpoint", checkpoint("bert", **COLORS), 0)
    config = {"model_name": str(source), "task": "sequence_classification", "trust_remote_code": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32", "max_length": 16}))
    for name in ("one", "two"):
        command = ["-m", "traceserve", "export", "--config", "config.json", "--output", name]
        subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True)
    one, two = ((tmp_path / name / "traced_model.pt").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_trace_names_our_own_classes_as_it_always_did(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Wherever their files move: the same checkpoint gives the same graph."""
    run_export(
        tmp_path / "x", {"model_name": str(checkpoint("bert")), "task": "sequence_classification", "max_length": 32}
    )
    with zipfile.ZipFile(tmp_path / "x" / "traced_model.pt") as file:
        names = {name.partition("/code/__torch__/")[2] for name in file.namelist()}
    # If this process traced other models before, torch numbers the name.
    names = {re.sub(r"/___torch_mangle_\d+\.py$", ".py", name) for name in names}
    assert {name for name in names if "traceserve" in name and name.endswith(".py")} == {"traceserve/wrapping.py"}
    assert not [name for name in sys.modules if name == "traceserve.wrapping"]


def test_classes_have_their_names_again(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = with_code(tmp_path / "named", checkpoint("bert", **COLORS), 0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, trust_remote_code=True)
    kinds = [type(model), type(model.classifier), type(model.classifier.scale), type(model.bert)]
    before = [kind.__module__ for kind in kinds]
    with plain_names(model):
        assert [kind.__module__.split(".")[-1] for kind in kinds] == [
            "code_modeling_my",
            "code_parts",
            "code_parts",
            "modeling_bert",
        ]
        assert inspect.getsource(type(model)).startswith("class MyModel")
    assert [kind.__module__ for kind in kinds] == before
    assert not [name for name in sys.modules if name.startswith("transformers_modules.code_")]
