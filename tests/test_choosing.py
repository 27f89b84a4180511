"""`"save_mode": "auto"`: a rule over the processor and the installed packages, settled before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Set, Tuple

import pytest
from conftest import run_export
from traceserve import cli
from traceserve.building.config import choosing, dtypes
from traceserve.building.config.parsing import parse_config
from traceserve.building.config.setup_config import SetupConfig
from traceserve.building.gate import verification
from traceserve.errors import ConfigError
from traceserve_runtime import processor
from traceserve_runtime.tasks import TASKS

LABELS = {"id2label": {0: "red", 1: "green"}, "label2id": {"red": 0, "green": 1}}
ALL = {"openvino", "nncf"}
VNNI, BF16 = {"avx2", "avx512_vnni"}, {"avx512_vnni", "avx512_bf16"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make this machine one with these processor features and packages."""

    def make(features: Set[str], packages: Set[str] = ALL, x86: bool = True) -> None:
        monkeypatch.setattr(processor, "features", lambda: frozenset(features))
        monkeypatch.setattr(processor, "is_x86", lambda: x86)
        monkeypatch.setattr(choosing, "_installed", lambda package: package in packages)

    return make


def config(task: str = "sequence_classification", **content: Any) -> SetupConfig:
    return parse_config({"model_name": "x/y", "task": task, "save_mode": "auto", **content})[0]


TAKES = "openvino and nncf are installed, and this processor has avx512_vnni and no bfloat16"
OF_PROCESSORS = [
    (VNNI, ALL, True, "openvino", TAKES),
    (
        VNNI,
        {"openvino"},
        True,
        "torchscript",
        "nncf not installed; pip install 'traceserve[openvino]' for int8 on this",
    ),
    (VNNI, set(), True, "torchscript", "openvino and nncf not installed; pip install"),
    (BF16, ALL, True, "torchscript", "this processor has avx512_bf16"),
    ({"amx_bf16", "amx_int8"}, ALL, True, "torchscript", "this processor has amx_bf16"),
    ({"avx2"}, ALL, True, "torchscript", "neither VNNI nor AMX"),
    (set(), ALL, True, "torchscript", "neither VNNI nor AMX"),  # as everywhere but on Linux
    ({"i8mm"}, ALL, False, "torchscript", "measured on x86 alone"),
]


@pytest.mark.parametrize("features, packages, x86, expected, why", OF_PROCESSORS)
def test_the_processor_and_the_packages_decide(
    machine: Callable[..., None], features: Set[str], packages: Set[str], x86: bool, expected: str, why: str
) -> None:
    machine(features, packages, x86)
    choice = choosing.choose(config())
    assert choice.save_mode == expected and why in choice.reason


@pytest.mark.parametrize(
    "content, expected, why",
    [
        ({"task": "text_generation"}, "torchscript", "text_generation stays in float32, unless"),
        ({"task": "text_generation", "dtype": "int8"}, "openvino", "only its loops have int8 weights"),
        ({"task": "token_classification"}, "torchscript", "token_classification is not rounded to int8, unless"),
        ({"task": "token_classification", "dtype": "int8"}, "openvino", "this processor has avx512_vnni"),
        ({"hardware": "gpu"}, "torchscript", "openvino runs on cpu, not on gpu"),
        ({"hardware": "neuron"}, "torchscript", "openvino runs on cpu, not on neuron"),
        ({"dtype": "float32"}, "torchscript", "openvino is faster in int8, not in float32"),
        ({"task": "feature_extraction", "library": "curated_transformers"}, "torchscript", "library curated"),
        ({"dtype": "int8"}, "openvino", "this processor has avx512_vnni"),
    ],
)
def test_the_configuration_decides_too(
    machine: Callable[..., None], content: Dict[str, Any], expected: str, why: str
) -> None:
    machine(VNNI)
    choice = choosing.choose(config(**content))
    assert choice.save_mode == expected and why in choice.reason


def test_int8_asked_for_on_a_processor_with_bfloat16(machine: Callable[..., None]) -> None:
    machine(BF16)
    choice = choosing.choose(config(dtype="int8"))
    assert choice == ("openvino", "openvino and nncf are installed, and this processor has avx512_vnni")


@pytest.mark.parametrize(
    "task, tried",
    [("sequence_classification", ("int8", "float32")), ("token_classification", ("float32",))],
)
def test_openvinos_own_choice(machine: Callable[..., None], task: str, tried: Tuple[str, ...]) -> None:
    pytest.importorskip("nncf")
    machine(VNNI)
    assert dtypes.fastest_in_openvino(TASKS[task], "cpu") == tried


def test_int8_weights_need_no_processor_of_their_own(machine: Callable[..., None]) -> None:
    machine({"avx2"})
    assert choosing.choose(config("text_generation", dtype="int8")).save_mode == "openvino"
    assert choosing.choose(config(dtype="int8")) == ("torchscript", "this processor has neither VNNI nor AMX")


def test_the_default_is_not_auto() -> None:
    assert parse_config({"model_name": "x/y"})[0].save_mode == "torchscript"


def test_what_the_real_save_mode_refuses_is_refused_at_once(machine: Callable[..., None]) -> None:
    machine({"avx2"}, set())
    with pytest.raises(ConfigError, match='dtype is "int8": it is for models that are run once'):
        config("text_generation", dtype="int8")
    machine(VNNI)
    with pytest.raises(ConfigError, match="save_mode openvino on cpu has no option opset, .*belongs to onnx"):
        config(options={"opset": 17})


@pytest.mark.usefixtures("few_texts")
def test_it_is_settled_when_the_checkpoint_says_its_task(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The manifest has the real one; the receipt, the report and the printed table say why."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    machine({"avx2"})
    content = {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 16, "save_mode": "auto"}
    (tmp_path / "setup_config.json").write_text(json.dumps(content))
    assert cli.main(["export", "--output", "x"]) == 0
    why = "this processor has neither VNNI nor AMX"
    manifest = json.loads((tmp_path / "x" / "traceserve.json").read_text())
    assert manifest["save_mode"] == "torchscript" and manifest["receipt"]["save_mode_because"] == why
    assert json.loads((tmp_path / "x.report.json").read_text())["save_mode_because"] == why
    assert f"torchscript ({why})" in capsys.readouterr().out
    run_export(tmp_path / "y", {**content, "save_mode": "torchscript"})
    assert "save_mode_because" not in json.loads((tmp_path / "y" / "traceserve.json").read_text())["receipt"]


def test_openvino_is_built(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Callable[..., None]
) -> None:
    """With the dtypes of its own `auto`, of which int8 is the first."""
    if not processor.native("int8"):
        pytest.skip("this processor has no int8")
    monkeypatch.setattr(verification, "CORPUS", 16)
    monkeypatch.setattr(
        "traceserve.building.attempt.measure_speeds", lambda folders, *rest: dict.fromkeys(folders, 1.0)
    )
    machine(VNNI)
    content = {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 16}
    exported = run_export(tmp_path / "x", {**content, "save_mode": "auto", "dtype": "auto"})
    tried: List[str] = [item["dtype"] for item in exported.manifest.receipt["candidates"]]
    assert exported.manifest.save_mode == "openvino" and tried == ["int8"]
    assert exported.save_mode_because == exported.manifest.receipt["save_mode_because"] == TAKES
