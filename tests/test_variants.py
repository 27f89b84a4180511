"""The gate compares each file in each way of running it, and a failing rewritten graph is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest
import torch
from conftest import needs_native, run_export
from traceserve.building.gate.findings import DriftError
from traceserve.building.writers.torchscript import weights, writer
from traceserve.building.writers.torchscript.unpadding import Unpadded
from traceserve.commands.printing import print_findings
from traceserve_runtime.engine import Engine
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes import RUNTIMES, VARIANTS
from traceserve_runtime.runtimes.torchscript import attention as attentions
from traceserve_runtime.runtimes.torchscript import devices, packing
from traceserve_runtime.runtimes.torchscript import weights as weights_read
from traceserve_runtime.runtimes.torchscript.reader import UNPADDED, _reading, _readings
from traceserve_runtime.settings import Settings

PLAIN = "traced_model.pt, by plain torch.jit.load"
PACKED, MAPPED = "graph.pt, weights packed", "graph.pt, weights mapped"


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "traceserve.building.gate.verification.TEXTS", ("One.", "Another text, a little longer than the first.")
    )
    monkeypatch.setattr("traceserve.building.gate.verification.CORPUS", 70)


def content(checkpoint: Callable[..., Path], **more: Any) -> Any:
    return {"model_name": str(checkpoint("bert")), "max_length": 32, **more}


def off(module: Any, amount: float = 1.0) -> Any:
    """Return the same module with its graphs' first output wrong by `amount`."""
    for graph in devices.graphs(module):
        torch._C._jit_pass_inline(graph)
        made = next(iter(graph.outputs())).node()
        assert made.kind() == "prim::TupleConstruct"
        with graph.insert_point_guard(made):
            wrong, factor = graph.insertConstant(amount), graph.insertConstant(1)
        add = graph.create("aten::add", [made.inputsAt(0), wrong, factor], 1)
        add.insertBefore(made)
        made.replaceInput(0, add.output())
    return module


def test_every_save_mode_lists_its_variants() -> None:
    assert set(VARIANTS) == set(RUNTIMES)


def test_every_setting_has_its_variants(artifact: Path) -> None:
    """A new setting is either listed, or declared here as not affecting the graph and its shapes."""
    manifest = Manifest.read(artifact)
    assert set(Settings._fields) == {"pack_weights", "threads", "length_step", "explain_seconds"}
    for settings in (Settings(), Settings(pack_weights=False), Settings(threads=1), Settings(length_step=8)):
        assert _reading(manifest, "cpu", settings) in _readings(manifest, "cpu")


@pytest.mark.skipif(not packing.possible(), reason="nothing is packed on this processor")
def test_the_receipt_lists_each_of_them(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    run_export(tmp_path / "x", content(checkpoint))
    receipt = Manifest.read(tmp_path / "x").receipt
    assert [(row["variant"], row["device"]) for row in receipt["variants"]] == [
        (PACKED, "cpu"),
        (MAPPED, "cpu"),
        (PLAIN, "cpu"),
    ]
    for row in receipt["variants"]:
        assert row["cells"] == receipt["cells"] and row["answers"] == receipt["answers"] > 1
        assert 0 < row["largest_difference"] < 1e-5 and row["answers_changed"] == 0


@needs_native("bfloat16")
@pytest.mark.skipif(not packing.possible(), reason="nothing is packed on this processor")
def test_in_bfloat16_attention_of_either_kind_is_compared(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    run_export(tmp_path / "x", content(checkpoint, dtype="bfloat16"))
    rows = Manifest.read(tmp_path / "x").receipt["variants"]
    named = [row["variant"] for row in rows]
    wide = ", attention in float32"
    assert set(named) == {PACKED, MAPPED, PACKED + wide, MAPPED + wide, PLAIN} and len(named) == 5
    assert named[0] == PACKED + (wide if attentions.sooner_wide() else "")
    assert len({row["largest_difference"] for row in rows}) > 2  # their computations do differ
    assert rows[0]["answers"] == 72 and {row["answers"] for row in rows[1:]} == {19}


@pytest.mark.parametrize("save_mode", ["pretrained", "onnx"])
def test_other_save_modes_have_one_on_each_device(
    save_mode: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    exported = run_export(tmp_path / "x", content(checkpoint, save_mode=save_mode))
    [row] = exported.manifest.receipt["variants"]
    assert row["device"] == "cpu" and row["cells"] == len(exported.findings.cells) > 10


@pytest.mark.skipif(not packing.possible(), reason="nothing is packed on this processor")
@pytest.mark.parametrize("wrong", [PACKED, MAPPED])
def test_weights_that_come_out_otherwise_are_caught(
    wrong: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed, as in a single worker; or not, as in several."""
    pack, assign = packing.pack, weights_read.assign
    if wrong == PACKED:
        monkeypatch.setattr(packing, "pack", lambda module: pack(off(module)))
    else:  # packing removes it
        monkeypatch.setattr(weights_read, "assign", lambda module, *rest: assign(off(module), *rest))
        monkeypatch.setattr(packing, "pack", lambda module: pack(off(module, -1.0)))
    with pytest.raises(DriftError) as error:
        run_export(tmp_path / "x", content(checkpoint))
    assert [found.variant for found in error.value.findings.every if not found.alike] == [wrong]


def test_the_file_that_plain_torch_reads_is_compared(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU and C++ run it, but no worker on a CPU: the graph beside it is correct here."""
    write_graph = weights.write_graph

    def spoiling(folder: Path, model_file: str, rewritten: Any = None) -> Tuple[str, ...]:
        right: Any = torch.jit.load(str(folder / model_file))  # type: ignore[no-untyped-call]
        wrong: Any = torch.jit.load(str(folder / model_file))  # type: ignore[no-untyped-call]
        torch.jit.save(off(wrong), str(folder / model_file))
        return write_graph(folder, model_file, rewritten if rewritten is not None else right)

    monkeypatch.setattr(weights, "write_graph", spoiling)
    with pytest.raises(DriftError) as error:
        run_export(tmp_path / "x", content(checkpoint))
    findings = error.value.findings
    assert [found.variant for found in findings.every if not found.alike] == [PLAIN] and not findings.passed
    assert findings.largest_difference > 0.1
    print_findings(findings)
    assert "by plain torch.jit.load" in " ".join(capsys.readouterr().err.split())


def test_a_rewritten_graph_that_fails_is_left_out(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The traced graph is served instead, and this is reported."""
    own = writer._unpadded

    def spoiled(*arguments: Any) -> Unpadded:
        made = own(*arguments)
        assert made is not None
        return made._replace(module=off(made.module))

    monkeypatch.setattr(writer, "_unpadded", spoiled)
    exported = run_export(tmp_path / "x", content(checkpoint))
    manifest = Manifest.read(tmp_path / "x")  # and every file matches the manifest
    assert manifest.runtime[UNPADDED] is False and exported.manifest == manifest
    assert manifest.shapes.lengths is None and manifest.receipt["passed"]
    refused: List[Any] = manifest.receipt["rewritten_graph_refused"]
    assert refused and all(row["largest_difference"] > 0.1 for row in refused)
    engine = Engine.load(tmp_path / "x")
    assert engine.scheduler.cost.padding.cost == 1
    from traceserve.commands.build import _print_exported

    _print_exported(exported, tmp_path / "x", 1.0)
    assert "rewritten graph was refused" in " ".join(capsys.readouterr().out.split())


def test_a_row_alone_is_compared_with_padding_too(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker with a `length_step` runs it so; if it is wrong, rows are never padded."""
    exported = run_export(tmp_path / "x", content(checkpoint))
    assert exported.manifest.shapes.padded
    alone = {(cell.length, cell.padded) for cell in exported.findings.cells if cell.batch == 1}
    assert {(32, True), (16, True), (32, False)} <= alone
    from traceserve_runtime.runtimes.torchscript.reader import TorchScriptRunner

    call = TorchScriptRunner.__call__

    def wrong(self: Any, inputs: Any) -> Any:
        outputs = call(self, inputs)
        mask = inputs["attention_mask"]
        return {
            name: array + (len(mask) == 1 and mask.size > 30 and mask.size - mask.sum() > 8)
            for name, array in outputs.items()
        }

    monkeypatch.setattr(TorchScriptRunner, "__call__", wrong)
    exported = run_export(tmp_path / "y", content(checkpoint, sequence_lengths="auto"))
    assert not exported.manifest.shapes.padded and not any(cell.padded for cell in exported.findings.cells)


@pytest.mark.parametrize("at_hand", [False, True])
def test_an_archive_for_a_gpu_is_compared_on_the_gpu_at_hand(
    at_hand: bool, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: at_hand)
    folder = tmp_path / "x"
    if at_hand:
        if torch.cuda.device_count():
            run_export(folder, content(checkpoint, hardware="gpu"))
            rows = Manifest.read(folder).receipt["variants"]
            assert ("traced_model.pt, moved to its device", "cuda:0") in [(r["variant"], r["device"]) for r in rows]
        else:  # it claims there is one: the gate must have tried it
            with pytest.raises(
                (RuntimeError, AssertionError, DriftError), match="(?i)cuda|nvidia|answer as the original"
            ):
                run_export(folder, content(checkpoint, hardware="gpu"))
        return
    run_export(folder, content(checkpoint, hardware="gpu"))
    assert {row["device"] for row in Manifest.read(folder).receipt["variants"]} == {"cpu"}
