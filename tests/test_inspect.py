"""`traceserve inspect`: what an archive says of itself, what is wrong with it, and that nothing in it runs."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import pytest
from conftest import run_export
from traceserve import cli
from traceserve.archives.archive import pack_archive
from traceserve.archives.contents import read_manifest, unpack
from traceserve.archives.listing import list_files
from traceserve.building.checkpoints import licenses
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.checking import packages_here
from traceserve.checking.inspection import inspect_archive
from traceserve.checking.packages_here import PackageHere, packages_of
from traceserve.errors import ArchiveError
from traceserve_runtime import processor
from traceserve_runtime.errors import InvalidManifest
from traceserve_runtime.manifest import Manifest, sealed


def codes(path: Path) -> List[str]:
    return [finding.code for finding in inspect_archive(path).findings if finding.severity != "note"]


def rewritten(mar: Path, target: Path, document: Optional[Callable[[Any], Any]] = None, **files: bytes) -> Path:
    """Copy an archive with its manifest changed, and with more files or others."""
    more = dict(files)
    with zipfile.ZipFile(mar) as source, zipfile.ZipFile(target, "w") as sink:
        for name in source.namelist():
            content = source.read(name)
            if name == "traceserve.json" and document is not None:
                content = json.dumps(document(json.loads(content))).encode()
            sink.writestr(name, more.pop(name, content))
        for name, content in more.items():
            sink.writestr(name, content)
    return target


def with_receipt(**changed: Any) -> Callable[[Any], Any]:
    return lambda document: sealed({**document, "receipt": {**document["receipt"], **changed}})


def test_a_page_of_it(mar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(mar), "--strict"]) == 0
    page = capsys.readouterr().out
    for text in (
        "sequence_classification",
        "red, green, blue",
        "any length up to 32",
        "float32",
        "torchscript for cpu",
    ):
        assert text in page
    assert "passed: 0 of " in page and "graph.pt" in page and "traceserve_runtime/" in page and "MiB" in page


def test_all_of_it_as_json(mar: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(mar), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    manifest = Manifest.read(artifact)
    assert document["format"] == 1 and document["passed"] is True
    assert document["labels"] == ["red", "green", "blue"] and document["task"] == manifest.task
    assert document["receipt"]["answers"] == manifest.receipt["answers"] and document["in_float32"] == []
    assert document["source"]["name"] == manifest.source.name and document["source"]["license"] is None
    hashes = {file["name"]: file["sha256"] for file in document["files"]}
    assert hashes["graph.pt"] == manifest.files["graph.pt"] and document["bytes"] == mar.stat().st_size
    torch = next(package for package in document["packages"] if package["name"] == "torch")
    assert torch["built"] == torch["here"] == manifest.versions["torch"] and torch["tested"] == ">=1.13"
    assert torch["worker"] and not next(p for p in document["packages"] if p["name"] == "transformers")["worker"]
    assert document["worker"]["memory_mib"] > 400


@pytest.mark.parametrize(("command", "code"), [("inspect", 2), ("formats", 1)])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_reader_that_has_gone_is_trouble(command: str, code: int, options: Sequence[str], mar: Path) -> None:
    """As `head` is: 1 would say that something was found."""
    unread, output = os.pipe()
    os.close(unread)
    archive = [str(mar)] if command == "inspect" else []
    started = [sys.executable, "-m", "traceserve", command, *archive, *options]
    result = subprocess.run(started, stdout=output, stderr=subprocess.PIPE, text=True)
    os.close(output)
    assert (result.returncode, result.stderr) == (code, "")


def test_an_artifact_too(artifact: Path, mar: Path) -> None:
    found = inspect_archive(artifact)
    assert found.passed and found.manifest.task == inspect_archive(mar).manifest.task


HOSTILE = "open(%r, 'w').close()\n"


class Hostile:
    """Writes a file when unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_nothing_of_a_hostile_archive_runs(mar: Path, tmp_path: Path) -> None:
    """Its handler, its runtime, its weights and its manifest each write a file when they are imported or unpickled."""
    ran = tmp_path / "ran"
    code, pickled = (HOSTILE % str(ran)).encode(), pickle.dumps(Hostile(str(ran)))
    hostile = rewritten(
        mar,
        tmp_path / "hostile.mar",
        **{"transformer_handler.py": code, "traceserve_runtime/__init__.py": code, "graph.pt": pickled},
        **{"torch.py": code, "arrays.npz": pickled},
    )
    exec(code)  # the trap works
    assert ran.exists()
    ran.unlink()
    pickle.loads(pickled).close()
    assert ran.exists()
    ran.unlink()
    command = [sys.executable, "-m", "traceserve", "inspect", str(hostile), "--strict"]
    result = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 1 and not ran.exists(), result.stdout
    assert "graph.pt is not the file that was verified" in result.stdout
    assert "torch.py is not named in traceserve.json" in result.stdout
    assert "transformer_handler.py is not the file that was verified" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile.mar"]  # nothing was unpacked either


@pytest.mark.parametrize(
    "name", ["../evil.py", "/etc/evil", "traceserve_/../../evil.py", "a\\b.py", "traceserve_x/./y"]
)
def test_a_name_that_leads_out_is_refused(mar: Path, tmp_path: Path, name: str) -> None:
    hostile = rewritten(mar, tmp_path / "hostile.mar", **{name: b""})
    with pytest.raises(ArchiveError, match="holds the name .*, which leads out of its folder"):
        inspect_archive(hostile)
    with pytest.raises(ArchiveError, match="leads out of its folder|does not name"):
        unpack(hostile, tmp_path / "folder")


def test_a_bomb_is_refused_before_it_grows(mar: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.mar"
    with zipfile.ZipFile(mar) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as sink:
        sink.writestr("traceserve.json", source.read("traceserve.json"))
        with sink.open("zeros.bin", "w") as stream:
            for _ in range(80):
                stream.write(bytes(1 << 20))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(ArchiveError, match=r"would grow from [\d,]+ bytes to [\d,]+ \(most of it zeros.bin\)"):
        inspect_archive(bomb)
    with pytest.raises(ArchiveError, match=r"would grow from [\d,]+ bytes to [\d,]+ \(most of it zeros.bin\)"):
        unpack(bomb, tmp_path / "folder")


def test_a_document_of_any_size_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.mar", "w", zipfile.ZIP_DEFLATED) as sink:
        sink.writestr("traceserve.json", b" " * (17 << 20))
    with pytest.raises(ArchiveError, match="traceserve.json has 17,825,792 bytes, and at most 16,777,216 are read"):
        inspect_archive(tmp_path / "x.mar")
    with pytest.raises(ArchiveError, match="traceserve.json has 17,825,792 bytes, and at most 16,777,216 are read"):
        read_manifest(tmp_path / "x.mar")


@pytest.mark.parametrize("read", [read_manifest, list_files, unpack])
@pytest.mark.parametrize("name", ["traceserve.json", "traced_model.pt"])
@pytest.mark.parametrize(
    "method, told", [(zipfile.ZIP_DEFLATED, "is damaged"), (zipfile.ZIP_BZIP2, r"another method \(12\) than stored")]
)
def test_a_file_that_would_take_all_memory_is_read_no_further(
    method: int, told: str, name: str, read: Callable[..., object], mar: Path, tmp_path: Path
) -> None:
    """A few bytes of zeros, declared as long as the file in whose place they are."""
    bomb = tmp_path / "bomb.mar"
    with zipfile.ZipFile(mar) as source, zipfile.ZipFile(bomb, "w") as sink:
        for info in source.infolist():
            if info.filename != name:
                sink.writestr(info.filename, source.read(info))
        sink.writestr(name, bytes(200 << 20), method)
        sink.getinfo(name).file_size = source.getinfo(name).file_size  # as the directory declares it
    tracemalloc.start()
    try:
        if read is read_manifest and name != "traceserve.json":
            read_manifest(bomb)
        else:
            with pytest.raises(ArchiveError, match=told):
                read(bomb, *([tmp_path / "folder"] if read is unpack else []))
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


def test_a_size_that_lies_is_refused(mar: Path, tmp_path: Path) -> None:
    """A zip whose directory declares less than its data holds is read no further than that."""
    with zipfile.ZipFile(tmp_path / "x.mar", "w", zipfile.ZIP_DEFLATED) as sink:
        sink.writestr("traceserve.json", b"[" + b" " * (20 << 20) + b"]")
    content = (tmp_path / "x.mar").read_bytes().replace(struct.pack("<L", (20 << 20) + 2), struct.pack("<L", 100))
    (tmp_path / "x.mar").write_bytes(content)
    with pytest.raises(ArchiveError, match="is damaged"):
        inspect_archive(tmp_path / "x.mar")


def test_unreadable_input_is_2(mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.mar").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "other.mar", "w") as sink:
        sink.writestr("MAR-INF/MANIFEST.json", "{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.mar").write_bytes(mar.read_bytes()[:-1000])
    for name in ("text.mar", "other.mar", "cut.mar", "folder", "missing.mar"):
        assert cli.main(["inspect", str(tmp_path / name)]) == 2, name
        assert name in capsys.readouterr().err.replace("\n", " ")


def test_a_changed_manifest_is_found(mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = rewritten(mar, tmp_path / "x.mar", lambda d: {**d, "labels": ["green", "red", "blue"]})
    assert codes(other) == ["digest"]
    assert cli.main(["inspect", str(other)]) == 0 and cli.main(["inspect", str(other), "--strict"]) == 1
    assert "green, red, blue" in capsys.readouterr().out


def test_changed_missing_and_unknown_files_are_found(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(artifact, folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "graph.pt").unlink()
    (folder / "numpy.py").write_text("")
    assert codes(folder) == ["missing-file", "changed-file", "unknown-file"]


def test_receipts(mar: Path, tmp_path: Path) -> None:
    none = rewritten(mar, tmp_path / "none.mar", lambda d: sealed({**d, "receipt": {}}))
    assert codes(none) == ["no-receipt"]
    empty = rewritten(mar, tmp_path / "empty.mar", with_receipt(answers=0))
    assert codes(empty) == ["no-answers"]
    drifted = rewritten(mar, tmp_path / "drift.mar", with_receipt(passed=False, answers_changed=7))
    assert codes(drifted) == ["drift"]
    assert "7 of " in next(f.message for f in inspect_archive(drifted).findings if f.code == "drift")


def test_a_receipt_without_finite_numbers(mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drift that was allowed may be NaN, or infinite, for which JSON has null."""
    along = {"tokens": 5, "tokens_changed": 4, "near_ties": 0, "mean_drift": None}
    archive = rewritten(mar, tmp_path / "x.mar", with_receipt(largest_difference=None, along_texts=along))
    assert cli.main(["inspect", str(archive)]) == 0
    page = capsys.readouterr().out
    assert "log-probability lost not a finite number per token" in page
    assert "largest difference not a finite number of 1e-04" in page


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"license": 5}, "receipt.license should be an object"),
        ({"license": {}}, "receipt.license.name should be a text"),
        ({"in_float32": 7}, "receipt.in_float32 should be a list"),
        ({"in_float32": [{}]}, "receipt.in_float32[0] should be a text"),
        ({"limits": []}, "receipt.limits should be an object"),
        ({"limits": {"difference": "x"}}, "receipt.limits.difference should be a number"),
        ({"largest_difference": "x"}, "receipt.largest_difference should be a number"),
        ({"along_texts": {}}, "receipt.along_texts.tokens should be a whole number"),
        ({"variants": 5}, "receipt.variants should be a list"),
        ({"answers": True}, "receipt.answers should be a whole number"),
        ({"own_answers": 1, "own_answers_changed": None}, "receipt.own_answers_changed should be a whole number"),
    ],
)
def test_a_receipt_that_no_build_wrote(
    changed: Dict[str, Any], told: str, mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(rewritten(mar, tmp_path / "x.mar", with_receipt(**changed)))]) == 2
    assert f"traceserve.json: {told}; build the archive again" in " ".join(capsys.readouterr().err.split())


def test_a_compiled_model_that_no_build_wrote(mar: Path, tmp_path: Path) -> None:
    for runtime, told in (
        ({"instructions": 5}, "instructions should be a list"),
        ({"machine": 5}, "machine should be a text"),
    ):
        archive = rewritten(mar, tmp_path / "x.mar", lambda d, runtime=runtime: sealed({**d, "runtime": runtime}))
        with pytest.raises(InvalidManifest, match=f"runtime.{told}"):
            inspect_archive(archive)


def test_weights_that_were_not_read_are_found(mar: Path, tmp_path: Path) -> None:
    told = "weights of the checkpoint that Bert does not read: x"
    archive = rewritten(
        mar, tmp_path / "x.mar", lambda d: sealed({**d, "receipt": {**d["receipt"], "unread_weights": told}})
    )
    assert ("unread-weights", told) in [(found.code, found.message) for found in inspect_archive(archive).findings]


def test_labels_of_one_name_are_found(mar: Path, tmp_path: Path) -> None:
    same = rewritten(mar, tmp_path / "x.mar", lambda d: sealed({**d, "labels": ["red", "green", "red"]}))
    assert codes(same) == ["same-labels"]
    message = next(found.message for found in inspect_archive(same).findings if found.code == "same-labels")
    assert message.startswith("labels 0 and 2 are both named red: ")


def test_remote_code(mar: Path, tmp_path: Path) -> None:
    trusted = rewritten(
        mar, tmp_path / "x.mar", lambda d: sealed({**d, "source": {**d["source"], "trust_remote_code": True}})
    )
    assert codes(trusted) == ["remote-code"]


def test_a_processor_without_the_dtype(mar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "features", frozenset)
    severities: Dict[str, Any] = {}
    for dtype in ("bfloat16", "int8"):
        other = rewritten(mar, tmp_path / f"{dtype}.mar", lambda d, dtype=dtype: sealed({**d, "dtype": dtype}))  # type: ignore[misc]
        severities[dtype] = {f.code: f.severity for f in inspect_archive(other).findings}.get("processor")
    assert severities == {"bfloat16": "warning", "int8": "error"}
    onnx = rewritten(mar, tmp_path / "onnx.mar", lambda d: sealed({**d, "dtype": "int8", "save_mode": "onnx"}))
    assert [f.severity for f in inspect_archive(onnx).findings if f.code == "processor"] == ["warning"]
    compiled = {"torch": "2.13.0", "machine": os.uname().machine, "instructions": ["avx512f", "fma"]}
    other = rewritten(mar, tmp_path / "aot.mar", lambda d: sealed({**d, "runtime": compiled}))
    [finding] = [finding for finding in inspect_archive(other).findings if finding.code == "processor"]
    assert finding.severity == "error" and "lacks avx512f, fma" in finding.message


def test_versions(mar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = rewritten(
        mar,
        tmp_path / "x.mar",
        lambda d: sealed({**d, "versions": {**d["versions"], "torch": "1.9.0", "tokenizers": "0.13.1"}}),
    )
    found = {f.code: f.message for f in inspect_archive(old).findings}
    assert found["built-outside"] == "it was built with torch 1.9.0, outside the tested range >=1.13"
    assert "the answers were compared with" in found["other-version"]
    installed = {"numpy": "1.19.0", "torch": "2.13.0"}
    monkeypatch.setattr(packages_here, "installed", installed.get)
    found = {f.code: f.message for f in inspect_archive(mar).findings}
    assert found["here-outside"] == "numpy 1.19.0 here is outside the tested range >=1.20"
    assert "needs safetensors, which is not installed here" in found["missing-package"]


def test_a_save_modes_own_packages(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    from dataclasses import replace

    onnx = {p.name: p for p in packages_of(replace(manifest, save_mode="onnx"))}["onnxruntime"]
    assert onnx.worker and onnx.tested == ">=1.17"
    assert PackageHere("x", "1.0", None, ">=2", True).outside("1.0") and PackageHere("x", None, None, "", True).outside(
        "what"
    )
    assert "jinja2" not in {p.name for p in packages_of(manifest)}
    chats = replace(manifest, facts={"chat_template": "{{ x }}"})
    assert "jinja2" in {p.name for p in packages_of(chats)}


CARD = "---\nlicense: other\nlicense_name: Own Licence 2\nlicense_link: https://example.org\n---\n# Card\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": CARD}, {"name": "Own Licence 2", "file": "README.md", "link": "https://example.org"}),
        ({"README.md": "---\nlicense: apache-2.0\n---\n", "LICENSE": "x"}, {"name": "apache-2.0", "file": "README.md"}),
        (
            {"README.md": "# no front matter", "LICENSE.txt": "\n\nMIT License\n\nText"},
            {"name": "MIT License", "file": "LICENSE.txt"},
        ),
        ({"README.md": "---\n[broken: yaml\n---\n"}, None),
        ({"README.md": "---\ndate: 2026-13-32\nlicense: mit\n---\n"}, None),
        ({"README.md": "---\nlicense: [mit]\n---\n", "LICENSE": ""}, None),
    ],
)
def test_licences(files: Dict[str, str], expected: Any, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licenses.license_of(Checkpoint(tmp_path, "folder")) == expected


def test_the_build_records_the_licence(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("distilbert"), source)
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    run_export(tmp_path / "made", {"model_name": str(source), "max_length": 16})
    archive = pack_archive(tmp_path / "made", "made", tmp_path)
    found = inspect_archive(archive)
    assert found.document()["source"]["license"] == {"name": "mit", "file": "README.md"}
    assert "no-license" not in [finding.code for finding in found.findings]


def test_no_text_of_an_archive_controls_the_terminal(
    mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hostile(document: Any) -> Any:
        versions = {**document["versions"], "torch": "2.\x1b[2J"}
        return sealed({**document, "labels": ["\x1b]0;x\x07", "\x9b1m", "\u202egreen"], "versions": versions})

    archive = rewritten(mar, tmp_path / "x.mar", hostile, **{"\x1b[31m.txt": b""})
    assert cli.main(["inspect", str(archive)]) == 0
    page = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", page)
    assert "?]0;x?, ?1m, ?green" in page and "2.?[2J" in page and "?[31m.txt is not named" in page.replace("\n", " ")
    assert cli.main(["inspect", str(archive), "--json"]) == 0
    page = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", page)
    assert json.loads(page)["labels"] == ["\x1b]0;x\x07", "\x9b1m", "\u202egreen"]
    assert '"\\u009b1m"' in page and '"\\u202egreen"' in page


def test_another_manifest_of_torchserves_is_found(mar: Path, tmp_path: Path) -> None:
    """Such an archive is refused when it is unpacked."""
    with zipfile.ZipFile(mar) as file:
        document = json.loads(file.read("MAR-INF/MANIFEST.json"))
    document["model"]["handler"] = "other.py"
    for content in (json.dumps(document).encode(), b"[]"):
        archive = rewritten(mar, tmp_path / "x.mar", **{"MAR-INF/MANIFEST.json": content})
        assert "torchserve-manifest" in codes(archive)
        with pytest.raises(ArchiveError):
            unpack(archive, tmp_path / "out")


def test_the_folder_one_is_in(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(artifact)
    assert cli.main(["inspect", "."]) == 0
