"""The installed package: a wheel in its own environment, away from the repository, does everything."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Callable, Dict, List

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, and with this one's packages except the repository itself."""
    folder = tmp_path_factory.mktemp("installed")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).is_file():  # a wheel is built in the source folder
            (folder / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "sources" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, *wheel, str(folder / "sources")], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "environment")], check=True)
    programs = folder / "environment" / "bin"
    install = ["install", "--no-deps", "--no-index", *map(str, folder.glob("*.whl"))]
    subprocess.run([*pip, "--python", str(programs / "python"), *install], check=True)
    [own] = (folder / "environment").glob("lib/python*/site-packages")
    # An editable installation adds a .pth file, and these are only read in an environment's own folder.
    paths = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    (own / "packages.pth").write_text("\n".join(sorted(paths)))
    return programs


@pytest.fixture
def run(bin_folder: Path, tmp_path: Path) -> Callable[[List[str]], str]:
    """Run a program of that environment in an empty folder."""
    environment: Dict[str, str] = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "200",
    }

    def run(command: List[str]) -> str:
        result = subprocess.run(
            [str(bin_folder / command[0]), *command[1:]],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout

    return run


def test_the_demo_runs(run: Callable[[List[str]], str], tmp_path: Path) -> None:
    printed = run(["traceserve", "demo"])
    accuracy = re.search(r"held-out accuracy over HTTP: (\S+)", printed)
    assert accuracy and float(accuracy.group(1)) >= 0.9
    assert (tmp_path / "model_store" / "support-intents.mar").is_file()


WHERE = "import traceserve, traceserve_runtime, transformer_handler as t; print(traceserve.__file__, t.__file__)"
ANSWER = """
import sys
from pathlib import Path
from traceserve.archives.contents import unpack
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks.contract import Request

unpack(Path(sys.argv[1]), Path("unpacked"))
print(Engine.load(Path("unpacked")).answer([Request({"text": "a text"})])[0].value)
"""


def test_a_checkpoint_is_built_packed_and_answers(
    run: Callable[[List[str]], str], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    assert str(ROOT) not in run(["python", "-c", WHERE])
    config = {"model_name": str(checkpoint("bert")), "task": "sequence_classification", "dtype": "float32"}
    (tmp_path / "setup_config.json").write_text(json.dumps(config))
    run(["traceserve", "export"])
    assert "model_store/bert.mar" in run(["traceserve", "archive", "artifacts/bert"])
    assert "'label': 'LABEL_" in run(["python", "-c", ANSWER, "model_store/bert.mar"])
    for target in ("docker", "kubernetes"):  # templates, and the package's own code
        run(["traceserve", "deploy", target, "model_store/bert.mar", "--output", f"deploy/{target}"])
    image = tmp_path / "deploy/docker/app"
    assert (image / "traceserve_hosts/web.py").is_file() and (image / "transformer_handler.py").is_file()
    for chart in (image / "traceserve/deploying/templates/kubernetes", tmp_path / "deploy/kubernetes/chart"):
        assert (chart / "templates/_helpers.tpl").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {
        "setup_config.json",
        "artifacts",
        "model_store",
        "unpacked",
        "deploy",
    }


def test_the_demos_configuration_is_the_repositorys() -> None:
    """A user may change the one in a clone's root, without effect on the demo."""
    own = ROOT / "scripts/traceserve/building/checkpoints/demo_data/setup_config.json"
    assert json.loads(own.read_text()) == json.loads((ROOT / "setup_config.json").read_text())
