"""The AWS Inf1 stack with doubles of torch_neuron and torch_neuronx (tests/doubles); `nox -s inf1` makes it.

Without the doubles nothing here is collected.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional

import pytest
from conftest import run_export
from traceserve.building.exported import Exported

collect_ignore_glob = [] if importlib.util.find_spec("neuron_double") else ["test_*.py"]

LABELS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
CLASSIFIER = {"hardware": "neuron", "dtype": "auto", "max_length": 64}
WRITER = {
    "hardware": "neuron",
    "dtype": "auto",
    "task": "text2text_generation",
    "sequence_lengths": [16, 48],
    "options": {"target_length": 40},
}
SWITCHES = ("CORES", "COMPILER", "SECONDS", "NOISE", "TORCH")


@pytest.fixture(scope="session")
def locks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("locks")


@pytest.fixture(autouse=True)
def machine(locks: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give every test its own inf1.xlarge, with all cores free."""
    from neuron_double import cores

    monkeypatch.setenv("NEURON_DOUBLE_FOLDER", str(locks))
    for name in SWITCHES:
        monkeypatch.delenv(f"NEURON_DOUBLE_{name}", raising=False)
    for name in ("NEURON_RT_NUM_CORES", "NEURON_RT_VISIBLE_CORES"):
        monkeypatch.setenv(name, "")  # so that the code's settings are undone
        monkeypatch.delenv(name)
    cores.release()
    yield
    cores.release()


@pytest.fixture
def build(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Exported]:
    """Export a tiny classifier for a chip into tmp_path/out."""

    def make(content: Optional[Dict[str, Any]] = None, **options: Any) -> Exported:
        model = checkpoint("bert", **LABELS)
        return run_export(tmp_path / "out", {"model_name": str(model), **CLASSIFIER, **(content or {})}, **options)

    return make


@pytest.fixture(scope="session")
def exported(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, locks: Path
) -> Callable[..., Path]:
    """Make artifacts by configuration, each once, by default with a compiler that rounds nothing."""
    from neuron_double import cores

    made: Dict[str, Path] = {}

    def make(architecture: str, auto_model: str, content: Dict[str, Any], noise: str = "none", **options: Any) -> Path:
        key = repr((architecture, auto_model, content, noise))
        if key not in made:
            folder = tmp_path_factory.mktemp("exported") / architecture
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("NEURON_DOUBLE_NOISE", noise)
                patch.setenv("NEURON_DOUBLE_FOLDER", str(locks))
                model = checkpoint(architecture, auto_model, **options)
                run_export(folder, {"model_name": str(model), **content})
            cores.release()
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def classifier(exported: Callable[..., Path]) -> Path:
    """The artifact of a tiny classifier with three labels."""
    return exported("bert", "AutoModelForSequenceClassification", CLASSIFIER, **LABELS)
