"""The double keeps the contract that the other tests rely on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Tuple

import pytest
import torch
import torch_neuron
from neuron_double import cores

LOAD = "import sys, torch; {extra}; torch.jit.load(sys.argv[1]); print('loaded', flush=True); sys.stdin.read()"


class Sum(torch.nn.Module):
    """Two outputs of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        return self.linear(a) + b, a * 2


INPUTS = (torch.ones(2, 4), torch.ones(2, 3))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with torch.no_grad():
        torch.jit.save(torch_neuron.trace(Sum().eval(), INPUTS), str(tmp_path / "model.pt"))
    return tmp_path / "model.pt"


def start(file: Path, extra: str = "import torch_neuron") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD.format(extra=extra), str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_unknown_without_the_package(file: Path) -> None:
    _, words = start(file, "pass").communicate(timeout=60)
    assert "Unknown builtin op: neuron::forward_1" in words


def test_shapes_dtypes_and_positions_are_exact(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = torch.jit.load(str(file))
    first, second = module(*INPUTS)
    assert first.shape == (2, 3) and torch.equal(second, INPUTS[0] * 2)
    for wrong, words in (
        ((torch.ones(3, 4), torch.ones(3, 3)), "Incorrect tensor shape at input tensor #0"),
        ((INPUTS[0], INPUTS[1].double()), "Incorrect tensor type at input tensor #1"),
    ):
        with pytest.raises(RuntimeError):
            module(*wrong)
        assert words in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="missing value for argument 'argument_1'"):
        module(a=INPUTS[0], b=INPUTS[1])


def test_a_core_belongs_to_one_process(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_RT_NUM_CORES", "3")
    other = start(file)
    try:
        assert other.stdout is not None and other.stdout.readline() == "loaded\n"
        with pytest.raises(RuntimeError, match="could not be initialized"):
            torch.jit.load(str(file))
        monkeypatch.setenv("NEURON_RT_NUM_CORES", "1")
        torch.jit.load(str(file))
        assert len(cores.owners()) == 4
    finally:
        other.communicate("", timeout=60)
    assert len(cores.owners()) == 1


def test_all_cores_are_taken_by_default(file: Path) -> None:
    torch.jit.load(str(file))
    assert len(cores.owners()) == 4


def test_no_chip(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_DOUBLE_CORES", "0")
    with pytest.raises(RuntimeError, match="could not be initialized"):
        torch.jit.load(str(file))
