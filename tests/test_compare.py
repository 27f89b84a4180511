"""`traceserve build --compare`: every save mode and dtype, built, measured, and nothing left over."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List

import pytest
from test_samples import piped
from traceserve import cli
from traceserve.building import artifact, attempt
from traceserve.building.checkpoints import loading, sources
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.config import formats
from traceserve.building.config.dtypes import DTYPES
from traceserve.building.config.parsing import LoadedConfig, parse_config
from traceserve.building.config.save_modes import SAVE_MODES
from traceserve.building.gate import findings, verification
from traceserve.building.gate.texts import SENTENCES
from traceserve.commands import compare
from traceserve.errors import ExportError
from traceserve.measuring import formats_compared
from traceserve.measuring.engine_figures import EngineFigures, measure_engine
from traceserve.measuring.formats_compared import ComparedFormat, possible_formats
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Request

LABELS = {"id2label": {0: "red", 1: "green"}, "label2id": {"red": 0, "green": 1}}


def configured(folder: Path, content: Dict[str, Any]) -> None:
    (folder / "setup_config.json").write_text(json.dumps({"max_length": 32, **content}))


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> List[str]:
    """Return a list that grows with each call."""
    calls: List[str] = []
    own = getattr(module, name)

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        return own(*arguments, **named)

    monkeypatch.setattr(module, name, call)
    return calls


def test_each_is_built_and_measured_and_nothing_stays(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verification, "TEXTS", SENTENCES[1:6])  # the gate has its own tests
    tried = [("torchscript", "float32"), ("openvino", "float32"), ("openvino", "int8")]
    monkeypatch.setattr(formats_compared, "possible_formats", lambda config: tried)
    monkeypatch.setattr(formats_compared, "_MOST", 64)
    loaded = counted(monkeypatch, loading, "load_original")
    fetched = counted(monkeypatch, sources, "fetch_checkpoint")
    hashed = counted(monkeypatch, Checkpoint, "source")
    raced = counted(monkeypatch, attempt, "measure_speeds")
    written = counted(monkeypatch, artifact, "write_artifact")
    monkeypatch.setitem(sys.modules, "nncf", None)
    configured(tmp_path, {"model_name": str(checkpoint("bert", **LABELS))})
    assert cli.main(["build", "--compare", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["formats"]
    assert [(row["save_mode"], row["dtype"]) for row in rows] == tried
    for row in rows[:2]:
        assert row["bytes"] > 10_000 and row["changed"] == 0 and row["answers"] == 5
        figures = row["figures"]
        assert 0 < figures["p50_ms"] < 1000 * figures["load_seconds"] and figures["per_second"] > 1
        assert 20e6 < figures["memory"] < 2e9
    assert rows[1]["figures"]["memory"] < rows[0]["figures"]["memory"]  # that process has no torch
    assert rows[2]["figures"] is None and "pip install 'traceserve[openvino]'" in rows[2]["refused"]
    # One original for all, and no artifact beside them to race with: each is measured in its own process.
    assert (len(loaded), len(raced), len(written)) == (1, 0, 2)
    assert (len(fetched), len(hashed)) == (1, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "setup_config.json"]
    assert not list((tmp_path / "scratch").glob("*compare*"))


def test_what_is_compared_is_what_is_legal() -> None:
    config, _ = parse_config({"model_name": "x/y", "task": "sequence_classification"})
    legal = [
        (save_mode, dtype)
        for save_mode in SAVE_MODES
        for dtype in DTYPES
        if dtype in formats.dtypes(save_mode, "cpu", TASKS["sequence_classification"])
    ]
    assert possible_formats(config) == legal and len(legal) > 8
    content = {"model_name": "x/y", "task": "feature_extraction", "library": "curated_transformers"}
    assert {mode for mode, _ in possible_formats(parse_config(content)[0])} == {"torchscript"}


@pytest.mark.parametrize(("architecture", "auto_model"), [("llama", "CausalLM"), ("t5", "Seq2SeqLM")])
def test_texts_are_written_and_measured(
    architecture: str,
    auto_model: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As many tokens in each save mode and dtype, for one client and for 16."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(verification, "TEXTS", SENTENCES[1:6])
    monkeypatch.setattr(findings, "MOST_DRIFT", 1.0)  # a random model's tokens are near ties, and some change
    monkeypatch.setitem(findings.LIMITS, "bfloat16", findings.LIMITS["bfloat16"]._replace(changed_elsewhere=0.5))
    tried = [("torchscript", "float32"), ("torchscript", "bfloat16")]
    monkeypatch.setattr(formats_compared, "possible_formats", lambda config: tried)
    shown: List[ComparedFormat] = []
    monkeypatch.setattr(compare, "_print_rows", lambda rows, show=compare._print_rows: (shown.extend(rows), show(rows)))
    configured(tmp_path, {"model_name": str(checkpoint(architecture, f"AutoModelFor{auto_model}")), "max_length": 128})
    assert cli.main(["build", "--compare"]) == 0
    exact, lower = shown
    assert (exact.changed, exact.answers, exact.counted) == (0, 5, "texts")
    assert lower.counted == "tokens" and 5 * 4 < lower.answers <= 5 * 24
    for row in shown:
        assert row.figures is not None and row.figures.writing is not None
        writing = row.figures.writing
        assert 0 < writing.first_token_ms < row.figures.p50_ms
        assert 0 < writing.tokens_per_second < writing.tokens_per_second_together
        assert writing.tokens_per_second_together == pytest.approx(32 * row.figures.per_second)
        # A text is its first token and the 31 others; in other runs, on a machine that others use.
        rest = (row.figures.p50_ms - writing.first_token_ms) / 1000
        assert 1 / 5 < writing.tokens_per_second / (31 / rest) < 5
    said = capsys.readouterr().out
    assert "tokens/s, 1" in said and "first token, ms" in said and "0 of 5 texts" in said
    assert f"{lower.changed} of {lower.answers} tokens" in said and "requests/s" not in said


@pytest.mark.parametrize(
    "options",
    [
        *(["--version", "2.0"], ["--allow-drift"], ["--samples", "x", "--keep-samples"], ["--force"]),
        *(["--store", "elsewhere"], ["--output", "artifacts/x"]),
    ],
)
def test_what_comparing_does_not_heed_is_refused(
    options: List[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["build", "--compare", *options]) == 1
    [named] = [option for option in options if option.startswith("--") and option != "--samples"]
    assert f"--compare writes nothing, and takes no {named}," in capsys.readouterr().err


def test_json_is_for_comparing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "--json"]) == 1
    assert "--json is for --compare" in capsys.readouterr().err


def test_the_best_are_marked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    rows = [
        ComparedFormat("torchscript", "float32", "", 90_000_000, 0, 34, EngineFigures(1.5, 300_000_000, 4.0, 250.0)),
        ComparedFormat("openvino", "int8", "", 30_000_000, 2, 340, EngineFigures(0.5, 200_000_000, 5.0, 700.0)),
        ComparedFormat("onnx", "int8", "needs [more] packages"),
    ]
    compare._print_rows(rows)
    shown = capsys.readouterr().out
    first, second = (next(line for line in shown.splitlines() if name in line) for name in ("torchscript", "openvino"))
    assert first.count("*") == 1 and "4 *" in first and "0 of 34" in first
    assert second.count("*") == 4 and "700 *" in second and "0.5 *" in second and "2 of 340" in second
    assert "onnx in int8: needs [more] packages" in shown


def test_refused_requests_are_not_measured(artifact: Path) -> None:
    rejects = {"long_inputs": "reject"}
    long, short = Request({"text": "a long text " * 30}, rejects), Request({"text": "short"}, rejects)
    assert measure_engine(artifact, [long, short, long], 1).refused == 2
    with pytest.raises(ExportError, match="refuses every one of these requests; the first: the text has "):
        measure_engine(artifact, [long], 1)


def test_what_cannot_be_measured_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is asked the samples, which may come from a pipe."""
    asked: List[List[str]] = []

    def export(loaded: LoadedConfig, name: str, folder: Path, *others: Any, **named: Any) -> Any:
        if loaded.config.dtype == "float32":
            (folder / "whole").touch()
        requests = others[1].samples.requests(TASKS["sequence_classification"])
        asked.append([request.inputs["text"] for request in requests])
        return SimpleNamespace(findings=findings.Findings(findings.LIMITS["float32"]))

    child = tmp_path / "child.py"
    child.write_text(
        "import json, pathlib, sys\n"
        "if not (pathlib.Path(sys.argv[1]) / 'whole').exists():\n"
        "    raise ValueError('it has no model')\n"
        "print(json.dumps({'load_seconds': 1.0, 'memory': 1, 'p50_ms': 1.0, 'per_second': 1.0, 'writing': None}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(formats_compared.engine_figures, "__name__", "child")
    monkeypatch.setattr(formats_compared, "export", export)
    monkeypatch.setattr(
        formats_compared.sources, "fetch_checkpoint", lambda *_: SimpleNamespace(task="sequence_classification")
    )
    tried = [("torchscript", "bfloat16"), ("torchscript", "float32")]
    monkeypatch.setattr(formats_compared, "possible_formats", lambda config: tried)
    config = parse_config({"model_name": "x/y", "task": "sequence_classification"})[0]
    loaded = LoadedConfig(config, tmp_path, ())
    with piped("one", "two") as path:
        first, second = formats_compared.compared_formats(loaded, lambda *_: None, path)
    assert asked == [["one", "two"]] * 2
    assert first.refused == "it cannot be measured: ValueError: it has no model" and first.figures is None
    assert second.figures is not None and not second.refused
