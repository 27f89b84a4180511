"""The processor's native dtypes, and archives whose dtype it lacks."""

from __future__ import annotations

import dataclasses
import logging
import platform
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, Optional, Set

import pytest
import torch
from traceserve_runtime import processor
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import MissingPackage
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks.contract import Answer, Request
from transformer_handler import TransformerHandler

X86 = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu sse2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_int8
vmx flags\t: vnmi preemption_timer
bugs\t\t: spectre_v1

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: another name
flags\t\t: fpu
"""
OLD_X86 = "processor\t: 0\nmodel name\t: Intel(R) Core(TM) i5-4590\nflags\t\t: fpu sse2 avx avx2 fma\n"
ARM = """\
processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes sve i8mm bf16 dgh rng
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""
OLD_ARM = "processor\t: 0\nFeatures\t: fp asimd aes\n"


def claim(patch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    (folder / "cpuinfo").write_bytes(text.encode("utf-8", "surrogateescape"))
    patch.setattr(processor, "CPUINFO", folder / "cpuinfo")


@pytest.mark.parametrize(
    ("text", "some", "bfloat16", "int8"),
    [
        (X86, {"fpu", "avx512_bf16", "amx_int8"}, True, True),
        (OLD_X86, {"fma", "avx2"}, False, False),
        (ARM, {"asimd", "bf16", "rng"}, True, True),
        (OLD_ARM, {"asimd", "aes"}, False, False),
        ("flags: avx_vnni", {"avx_vnni"}, False, True),
        ("flags: avx512_bf16 \udcff", {"avx512_bf16"}, True, False),
        ("flags: xavx512_bf16 bf16x avx512_bf160", {"bf16x"}, False, False),
        ("power management: bf16\nvmx flags: bf16\n", set(), False, False),
        ("flags", set(), False, False),
        ("", set(), False, False),
    ],
    ids=["x86", "old-x86", "arm", "old-arm", "vnni", "no-utf8", "near", "other-keys", "no-value", "empty"],
)
def test_what_a_processor_does(
    text: str, some: Set[str], bfloat16: bool, int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(monkeypatch, tmp_path, text)
    assert processor.features() >= some and "preemption_timer" not in processor.features()
    assert (processor.native("bfloat16"), processor.native("int8")) == (bfloat16, int8)
    assert processor.native("float32") and processor.native("float16")


def test_without_linux_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "missing")
    assert processor.features() == frozenset()
    assert not processor.native("bfloat16") and not processor.native("int8") and processor.native("float32")
    assert processor.name() == (platform.processor() or platform.machine())


def test_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, tmp_path, X86)
    assert processor.name() == "Intel(R) Xeon(R) Platinum 8488C"
    claim(monkeypatch, tmp_path, ARM)
    assert processor.name() == (platform.processor() or platform.machine())


def in_dtype(artifact: Path, folder: Path, dtype: str) -> Path:
    """Copy the artifact with this dtype in its manifest."""
    shutil.copytree(artifact, folder)
    dataclasses.replace(Manifest.read(artifact), dtype=dtype).write(folder)
    return folder


def test_int8_is_refused_where_it_would_be_wrong(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_dtype(artifact, tmp_path / "x", "int8")
    claim(monkeypatch, tmp_path, OLD_X86)
    sentence = (
        "int8 needs a processor with one of amx_int8, avx512_vnni, avx_vnni, i8mm; this one has none; "
        'build the archive with "dtype": "float32" for it'
    )
    with pytest.raises(MissingPackage) as error:
        Engine.load(folder)
    assert error.value.message == sentence
    with pytest.raises(RuntimeError) as told:  # as TorchServe reports it
        TransformerHandler().initialize(SimpleNamespace(system_properties={"model_dir": str(folder)}))
    assert str(told.value) == sentence


def test_int8_is_read_where_it_is_right(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = in_dtype(artifact, tmp_path / "x", "int8")
    for text in (X86, ARM):
        claim(monkeypatch, tmp_path, text)
        assert isinstance(Engine.load(folder).answer([Request({"text": "Yes."})])[0], Answer)


def test_bfloat16_is_told_where_it_is_slow_and_answers(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    folder = in_dtype(artifact, tmp_path / "x", "bfloat16")
    claim(monkeypatch, tmp_path, OLD_ARM)
    [answer] = Engine.load(folder).answer([Request({"text": "Yes."})])
    assert isinstance(answer, Answer)
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage() == (
        "bfloat16 needs a processor with one of amx_bf16, avx512_bf16, bf16; this one has none; answers are right, but "
        'slow: build the archive with "dtype": "float32" for it'
    )


@pytest.mark.parametrize(("dtype", "text"), [("bfloat16", X86), ("bfloat16", ARM), ("float32", OLD_X86)])
def test_nothing_is_told_where_it_is_fast(
    dtype: str,
    text: str,
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = in_dtype(artifact, tmp_path / "x", dtype)
    claim(monkeypatch, tmp_path, text)
    Engine.load(folder)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# A container's cores.


V2, V1 = "0::{}", "3:memory:/other\n2:cpu,cpuacct:{}\n0::/unlimited"


@pytest.mark.parametrize(
    ("lines", "own", "files", "expected"),
    [
        (V2, "/", {"cpu.max": "400000 100000\n"}, 4),
        (V2, "/", {"cpu.max": "150000 100000"}, 1),
        (V2, "/", {"cpu.max": "50000 100000"}, 1),
        (V2, "/", {"cpu.max": "max 100000"}, None),
        (V2, "/", {}, None),
        # A systemd service and its parents.
        (
            V2,
            "/a.slice/b",
            {"cpu.max": "max 100000", "a.slice/cpu.max": "300000 100000", "a.slice/b/cpu.max": "max 1"},
            3,
        ),
        (V2, "/a.slice/b", {"a.slice/cpu.max": "300000 100000", "a.slice/b/cpu.max": "20000 10000"}, 2),
        (V2, "/a/b", {"a/c/cpu.max": "300000 100000"}, None),  # another's
        # A container sees its own group as the root, but is given the host's name of it.
        (V2, "/kubepods/pod1/x", {"cpu.max": "200000 100000"}, 2),
        (V1, "/kubepods/x", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        (V1, "/x", {"cpu,cpuacct/x/cpu.cfs_quota_us": "600000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "200000\n"}, 3),
        (V1, "/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, None),
        (V1, "/x", {"cpu/x/cpu.cfs_quota_us": "100000"}, None),
        (V1, "/x", {"memory/x/cpu.cfs_quota_us": "100000", "memory/x/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_a_quota(
    lines: str,
    own: str,
    files: Dict[str, str],
    expected: Optional[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limited(monkeypatch, tmp_path, lines.format(own), files)
    assert processor.quota() == expected


def test_without_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "OWN_GROUPS", tmp_path / "none")
    assert processor.quota() is None and processor.cores() >= 1


def test_a_model_takes_no_more_threads_than_its_container_has(
    artifact: Path, two_cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(3)
    limited(monkeypatch, tmp_path, V2.format("/"), {"cpu.max": "100000 100000"})
    assert processor.cores() == 1
    Engine.load(artifact, settings=Settings(threads=2))
    assert torch.get_num_threads() == 2  # as requested
    Engine.load(artifact)
    assert torch.get_num_threads() == 1


def test_the_name_of_a_control_group_may_be_of_any_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limited(monkeypatch, tmp_path, V2.format("/"), {"cpu.max": "100000 100000"})
    (tmp_path / "own").write_bytes(b"0::/caf\xe9/job\n")
    assert processor.cores() == 1


def limited(patch: pytest.MonkeyPatch, folder: Path, own: str, files: Dict[str, str]) -> None:
    """Control groups with these files, and a process in those of `own`."""
    for name, content in {"own": own, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    patch.setattr(processor, "GROUPS", folder)
    patch.setattr(processor, "OWN_GROUPS", folder / "own")
