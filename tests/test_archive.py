"""The archive: deterministic bytes, no unneeded files, and a worker that needs three packages."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import pytest
from conftest import ROOT, run_export
from traceserve import cli
from traceserve.archives.archive import pack_archive
from traceserve.archives.contents import configure_archive, read_manifest, read_serving, unpack
from traceserve.archives.names import check_name
from traceserve.checking.answering import ask_in_a_process
from traceserve.errors import ArchiveError
from traceserve_hosts import loading
from traceserve_runtime.errors import InvalidManifest
from traceserve_runtime.manifest import OLDEST, SCHEMA, Manifest, sha256
from traceserve_runtime.tasks.contract import Request


@pytest.fixture
def packed(mar: Path) -> Path:
    """The archive that all tests share."""
    return mar


def test_the_same_artifact_gives_the_same_bytes(artifact: Path, packed: Path, tmp_path: Path) -> None:
    assert sha256(pack_archive(artifact, "tiny", tmp_path)) == sha256(packed)
    with zipfile.ZipFile(packed) as file:
        assert {info.date_time for info in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_nothing_of_the_working_directory_is_imported(
    artifact: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a checkpoint's files, or a clone of the archiver; and the temporary folder may have a comma in its name."""
    for module in ("model_archiver/model_packaging", "traceserve/checking/answering", "traceserve_hosts/fetching"):
        file = tmp_path / f"{module}.py"
        file.parent.mkdir(parents=True)
        file.write_text("raise SystemExit('code of the working directory ran')\n")
        (file.parents[0] / "__init__.py").touch()
    (tmp_path / "a,b").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a,b"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    again = pack_archive(artifact, "tiny", tmp_path)
    assert again.read_bytes() == packed.read_bytes()
    assert loading.unpacked(again.name, sha256(again)).name == sha256(again)
    (tmp_path / "scratch").mkdir()
    requests = [Request({"text": "The boat is small."})]
    answered = ask_in_a_process(Path(os.path.relpath(artifact)), requests, 1, tmp_path / "scratch")
    assert not answered.answers[0].error


def test_an_artifact_in_place_of_an_archive(artifact: Path, tmp_path: Path) -> None:
    """And the other way round."""
    with pytest.raises(
        ArchiveError, match=f"^{artifact} is an artifact, .*: `traceserve archive {artifact}` packs it$"
    ):
        unpack(artifact, tmp_path / "x")
    with pytest.raises(ArchiveError, match=f"^{tmp_path} is a folder, not an archive"):
        read_manifest(tmp_path)
    (tmp_path / "x.mar").write_text("")
    for place, told in (
        ("nosuch", "is no folder of an artifact"),
        ("x.mar", "is no folder"),
        (".", "is no artifact: it has"),
    ):
        path = tmp_path / place
        with pytest.raises(ArchiveError, match=f"^{re.escape(str(path))} {told}.*; `traceserve export` makes one"):
            pack_archive(path, "x", tmp_path)


def test_two_builds_give_the_same_bytes(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """In separate processes, as two builds are."""
    config = {"model_name": str(checkpoint("distilbert")), "max_length": 32}
    (tmp_path / "setup_config.json").write_text(json.dumps(config))
    hashes = []
    for store in ("one", "two"):
        command = [sys.executable, "-m", "traceserve", "build", "--force", "--output", "artifacts/x", "--store", store]
        result = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert result.returncode == 0, result.stdout
        hashes.append(sha256(tmp_path / store / "x.mar"))
    assert hashes[0] == hashes[1]


def test_a_trace_is_saved_without_walking_every_library(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collection before it took a third of a small model's build."""
    frozen = []
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda: (frozen.append(gc.get_freeze_count()), collect())[1])
    run_export(tmp_path / "x", {"model_name": str(checkpoint("distilbert")), "max_length": 32})
    assert frozen and min(frozen) > 100_000 and gc.get_freeze_count() == 0


def test_what_lies_in_it(packed: Path) -> None:
    """At its root, nothing could shadow a library except the handler and the one package."""
    with zipfile.ZipFile(packed) as file:
        names = set(file.namelist())
        assert all(info.compress_type == zipfile.ZIP_STORED for info in file.infolist())
        manifest = json.loads(file.read("MAR-INF/MANIFEST.json"))
        document = json.loads(file.read("traceserve.json"))
        hashed = {name: __import__("hashlib").sha256(file.read(name)).hexdigest() for name in names}
    roots = {name.split("/")[0] for name in names}
    assert {name for name in roots if name.endswith(".py") or "." not in name} == {
        "transformer_handler.py",
        "traceserve_runtime",
        "MAR-INF",
    }
    assert roots >= {"traced_model.pt", "tokenizer.json", "traceserve.json", "model-config.yaml"}
    assert not any("__pycache__" in name for name in names)
    assert manifest["model"] | {"modelVersion": "1.0"} == {
        "modelName": "tiny",
        "serializedFile": "traced_model.pt",
        "handler": "transformer_handler.py",
        "modelVersion": "1.0",
        "configFile": "model-config.yaml",
    }
    assert document["files"] == {
        k: v for k, v in hashed.items() if k not in ("traceserve.json", "MAR-INF/MANIFEST.json")
    }


def test_the_manifest_can_be_read_from_the_archive(packed: Path, tmp_path: Path) -> None:
    assert read_manifest(packed).name == "tiny"
    with pytest.raises(ArchiveError, match="does not exist"):
        read_manifest(tmp_path / "none.mar")
    (tmp_path / "text.mar").write_text("no zip")
    with pytest.raises(ArchiveError, match="no archive of traceserve"):
        read_manifest(tmp_path / "text.mar")


def test_a_damaged_artifact_is_not_packed(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "x")
    with (tmp_path / "x" / "traced_model.pt").open("ab") as file:
        file.write(b"!")
    with pytest.raises(InvalidManifest, match="not the one that was verified"):
        pack_archive(tmp_path / "x", "x", tmp_path)
    assert not (tmp_path / "x.mar").exists()


@pytest.mark.parametrize("name", ["", ".hidden", "a b", "a/b", "é", "-x", "a:b"])
def test_names_that_torchserve_refuses(name: str) -> None:
    with pytest.raises(ArchiveError, match="cannot name an archive"):
        check_name(name)


CLEAN = """
import json, socket, sys
sys.path[:0] = [ARCHIVE, PACKAGES]

def refuse(*arguments): raise AssertionError("the worker reached for the network")
socket.socket.connect = refuse
socket.getaddrinfo = refuse

class Context:
    system_properties = {"model_dir": ARCHIVE, "gpu_id": None}
    metrics = None
    def get_all_request_header(self, index): return {"body": {"content-type": "text/plain"}}
    def set_response_header(self, index, key, value): pass
    def set_response_status(self, code, phrase, index): raise AssertionError(code)

from transformer_handler import TransformerHandler
handler = TransformerHandler()
handler.initialize(Context())
[answer] = handler.handle([{"body": "a text in a clean room"}], Context())
loaded = {name.split(".")[0] for name in sys.modules}
for name in ("transformers", "huggingface_hub", "traceserve", "ts", "safetensors", "pydantic", "requests"):
    assert name not in loaded, name
try:
    import transformers
except ImportError:
    print(answer.decode())
"""


def test_it_answers_in_a_clean_environment(packed: Path, tmp_path: Path) -> None:
    """With torch, tokenizers and numpy, torch's own dependencies, the standard library, and no network."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in (
        "torch",
        "torchgen",
        "functorch",
        "tokenizers",
        "numpy",
        "typing_extensions",
        "sympy",
        "mpmath",
        "networkx",
        "jinja2",
        "markupsafe",
        "fsspec",
        "filelock",
    ):
        spec = find_spec(name)
        if spec is not None and spec.origin is not None:
            origin = Path(spec.origin)
            source = origin.parent if origin.name == "__init__.py" else origin
            (packages / source.name).symlink_to(source)
    libraries = Path(find_spec("numpy").origin).parent.parent / "numpy.libs"  # type: ignore[union-attr, arg-type]
    if libraries.is_dir():
        (packages / libraries.name).symlink_to(libraries)
    root = tmp_path / "archive"
    with zipfile.ZipFile(packed) as file:
        file.extractall(root)
    script = CLEAN.replace("ARCHIVE", repr(str(root))).replace("PACKAGES", repr(str(packages)))
    result = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)) == {"label", "score"}


def test_reading_checks_the_code_too(packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed) as file:
        file.extractall(tmp_path)
    Manifest.read(tmp_path)
    (tmp_path / "traceserve_runtime" / "engine.py").write_text("# something else\n")
    with pytest.raises(InvalidManifest, match="traceserve_runtime/engine.py"):
        Manifest.read(tmp_path)


def _caught(status: str) -> int:
    """Return the signals that a process of Linux handles, as bits."""
    return int(status.partition("SigCgt:")[2].split()[0], 16)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("hangups_heard")
@pytest.mark.parametrize("ignored", [False, True])
def test_the_end_of_the_terminal_ends_a_command_without_nohup(ignored: bool, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*(["nohup"] if ignored else []), sys.executable, "-m", "traceserve", "predict", "tiny", "-"],
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},  # where no server is known
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    status = Path(f"/proc/{process.pid}/status")
    while not _caught(status.read_text()) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.02)
    time.sleep(0.1)  # SIGHUP is next
    process.send_signal(signal.SIGHUP)
    if ignored:
        time.sleep(0.5)
        assert process.poll() is None
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (1 if ignored else 130)
    assert (b"no server" if ignored else b"interrupted") in errors


_STRUCK = """
import os, signal, sys, time
from traceserve import cli

class Struck:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def in_a_destructor(options):
    Struck()
    time.sleep(60)

def wrapped_by_a_library(options):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except BaseException as error:
        raise ValueError(repr(error)) from None

def parse(arguments, parse=cli._parse):
    options = parse(arguments)
    options.run = globals()[sys.argv[1]]
    return options

cli._parse = parse
sys.exit(cli.main(["status"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="ends a process there")
@pytest.mark.parametrize("where", ["in_a_destructor", "wrapped_by_a_library"])
def test_a_signal_is_not_lost(where: str) -> None:
    """Python discards an exception that is raised in a destructor, and some libraries turn all into their own."""
    found = subprocess.run([sys.executable, "-c", _STRUCK, where], capture_output=True, text=True, timeout=50)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "interrupted; nothing was left half-made\n")


def test_an_interrupted_command_says_what_it_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parse(arguments: Any) -> Any:
        raise cli._Interrupted("1.0 may still run")

    monkeypatch.setattr(cli, "_parse", parse)
    monkeypatch.setattr(cli, "_end_by_signals", lambda: None)
    assert cli.main([]) == 130 and capsys.readouterr().err == "interrupted; 1.0 may still run\n"


def interrupted_build(tmp_path: Path, seconds: float, signal_number: int) -> Dict[str, Any]:
    """Start a build, send it a signal so long after it began to listen to them, and return its leftovers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "traceserve", "build", "--force", "--output", "artifacts/x"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    status = Path(f"/proc/{process.pid}/status")
    while status.is_file() and process.poll() is None and not _caught(status.read_text()) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.02)
    time.sleep(seconds)
    process.send_signal(signal_number)
    output, _ = process.communicate(timeout=120)
    files = {
        p.relative_to(tmp_path).as_posix() for f in ("artifacts", "model_store") for p in (tmp_path / f).rglob("*")
    }
    return {"code": process.returncode, "output": output, "files": files}


def test_an_interrupted_or_failed_build_leaves_what_was_there(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    config = {"model_name": str(checkpoint("bert", **labels)), "max_length": 32}
    (tmp_path / "setup_config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "traceserve", "build", "--output", "artifacts/x"]
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE)
    mar = tmp_path / "model_store" / "x.mar"
    good = sha256(mar)
    names = {
        p.relative_to(tmp_path).as_posix() for f in ("artifacts", "model_store") for p in (tmp_path / f).rglob("*")
    }
    for seconds, number in ((0.5, signal.SIGINT), (2.5, signal.SIGTERM)):
        left = interrupted_build(tmp_path, seconds, number)
        if left["code"]:  # it may have finished before the signal
            assert left["code"] == 130, left["output"]
        assert left["files"] == names
        assert sha256(mar) == good
        Manifest.read(tmp_path / "artifacts" / "x")
    (tmp_path / "setup_config.json").write_text(json.dumps({**config, "model_name": "no/where"}))
    failed = subprocess.run([*command, "--force"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1 and "error:" in failed.stderr and "Traceback" not in failed.stderr
    assert sha256(mar) == good


def test_an_archive_of_an_unknown_zip_version_is_told_in_a_sentence(packed: Path, tmp_path: Path) -> None:
    """zipfile raises a NotImplementedError for it."""
    content = bytearray(packed.read_bytes())
    with zipfile.ZipFile(packed) as file:
        content[file.start_dir + 6] = 84  # the version needed to extract the first file
    damaged = tmp_path / "damaged.mar"
    damaged.write_bytes(content)
    with pytest.raises(ArchiveError, match="damaged.mar is no archive of traceserve, or was not copied whole: .*8.4"):
        read_manifest(damaged)


DAMAGES = 60


def test_a_damaged_archive_is_told_in_a_sentence(packed: Path, tmp_path: Path) -> None:
    """Cut anywhere, or with a changed byte: more often in the metadata than in the weights."""
    whole = packed.read_bytes()
    noise = random.Random(0)
    with zipfile.ZipFile(packed) as file:
        directory = file.start_dir
        headers = [info.header_offset for info in file.infolist()]
    refused = 0
    for number in range(3 * DAMAGES):
        content = bytearray(whole)
        if number % 3 == 0:
            content = content[: noise.randrange(len(whole))]
        else:
            start = noise.choice(headers) if number % 3 == 1 else directory
            at = start + noise.randrange(30 if number % 3 == 1 else len(whole) - directory)
            content[at] ^= 1 << noise.randrange(8)
        damaged = tmp_path / "damaged.mar"
        damaged.write_bytes(content)
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            read_manifest(damaged)
            read_serving(damaged)
            unpack(damaged, folder)
            Manifest.read(folder)
        except (ArchiveError, InvalidManifest) as error:
            assert "\n" not in error.message and error.message
            refused += 1
        else:  # of dates, attributes, or versions: the files are unchanged
            assert Manifest.read(folder) == read_manifest(packed)
    assert refused > DAMAGES
    (tmp_path / "cut.mar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArchiveError, match="cut.mar is no archive of traceserve, or was not copied whole: .*again"):
        read_manifest(tmp_path / "cut.mar")
    with pytest.raises(ArchiveError, match="a.mar is no archive of traceserve: .*traceserve.json"):
        with zipfile.ZipFile(tmp_path / "a.mar", "w") as file:
            file.writestr("MAR-INF/MANIFEST.json", "{}")
        read_manifest(tmp_path / "a.mar")


def test_serving_a_damaged_archive_is_refused_in_one_line(packed: Path, tmp_path: Path) -> None:
    """Its manifest is intact, but not the weights."""
    content = bytearray(packed.read_bytes())
    with zipfile.ZipFile(packed) as file:
        info = file.getinfo("traced_model.pt")
    content[info.header_offset + 1000] ^= 1
    (tmp_path / "x.mar").write_bytes(content)
    result = subprocess.run(
        [sys.executable, "-m", "traceserve", "serve", str(tmp_path / "x.mar")], capture_output=True, text=True
    )
    [line] = result.stderr.splitlines()
    assert result.returncode == 1
    assert line.startswith(f"error: {tmp_path}/x.mar is damaged: Bad CRC-32 for file 'traced_model.pt'")


def rezipped(packed: Path, target: Path, **changed: bytes) -> Path:
    """Return the archive with changed or added files, as by `unzip`, an editor and `zip -r`."""
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(target, "w") as sink:
        for name in source.namelist():
            if name not in changed:
                sink.writestr(name, source.read(name))
        for name, content in changed.items():
            sink.writestr(name, content)
        sink.writestr("MAR-INF/", "")  # like `zip -r`
    return target


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"modelVersion": "2.0"}, "has the modelVersion '2.0', and its traceserve.json '1.0'"),
        ({"handler": "traceserve_runtime/softmax.py"}, "has the handler"),
        ({"configFile": "tokenizer.json"}, "has the configFile"),
        (None, "its MAR-INF/MANIFEST.json cannot be read"),
    ],
)
def test_another_manifest_of_torchserves_is_refused(
    changed: Optional[Dict[str, str]], words: str, packed: Path, tmp_path: Path
) -> None:
    """As of another archive; TorchServe would run that handler, and answer under that version."""
    document = json.loads(zipfile.ZipFile(packed).read("MAR-INF/MANIFEST.json"))
    content = b"[]" if changed is None else json.dumps({**document, "model": {**document["model"], **changed}}).encode()
    other = rezipped(packed, tmp_path / "x.mar", **{"MAR-INF/MANIFEST.json": content})
    with pytest.raises(ArchiveError, match=words):
        unpack(other, tmp_path / "out")


def test_an_edited_label_is_neither_packed_nor_served(artifact: Path, packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(artifact, copy)
    text = (copy / "traceserve.json").read_text(encoding="utf-8")
    (copy / "traceserve.json").write_text(text.replace('"red"', '"rot"'), encoding="utf-8")
    with pytest.raises(InvalidManifest, match="it was changed after the gate"):
        pack_archive(copy, "tiny", tmp_path)
    assert not (tmp_path / "tiny.mar").exists()
    with zipfile.ZipFile(packed) as file:
        content = file.read("traceserve.json").replace(b'"red"', b'"rot"')
    mar = rezipped(packed, tmp_path / "x.mar", **{"traceserve.json": content})
    for act in (
        read_manifest,
        lambda path: unpack(path, tmp_path),
        lambda path: configure_archive(path, read_serving(packed)),
    ):
        with pytest.raises(InvalidManifest, match="it was changed after the gate"):
            act(mar)


def test_no_changed_byte_of_a_rezipped_document_is_served(packed: Path, tmp_path: Path) -> None:
    """Refused, or the same document (white space); it is read before anything is started."""
    with zipfile.ZipFile(packed) as file:
        whole = file.read("traceserve.json")
    manifest, noise, refused = read_manifest(packed), random.Random(1), 0
    for _ in range(200):
        content = bytearray(whole)
        content[noise.randrange(len(whole))] ^= 1 << noise.randrange(8)
        mar = rezipped(packed, tmp_path / "x.mar", **{"traceserve.json": bytes(content)})
        try:
            assert read_manifest(mar) == manifest
        except (ArchiveError, InvalidManifest):
            refused += 1
    assert refused > 120


def test_a_file_that_the_manifest_does_not_name_is_not_served(packed: Path, tmp_path: Path) -> None:
    mar = rezipped(packed, tmp_path / "x.mar", **{"json.py": b"", "notes.txt": b""})
    with pytest.raises(
        ArchiveError, match="x.mar holds the file (json.py|notes.txt), which its traceserve.json does not"
    ):
        unpack(mar, tmp_path / "out")
    with zipfile.ZipFile(packed) as file:
        handler = file.read("transformer_handler.py")
    mar = rezipped(packed, tmp_path / "x.mar", **{"transformer_handler.py": handler + b"\n"})
    with pytest.raises(InvalidManifest, match="transformer_handler.py is not the one that was verified"):
        unpack(mar, tmp_path / "out2")
    mar = rezipped(packed, tmp_path / "x.mar")
    with zipfile.ZipFile(mar, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("tokenizer.json", "{}")
    with pytest.raises(ArchiveError, match="holds the file tokenizer.json twice"):
        unpack(mar, tmp_path / "out3")
    mar = rezipped(packed, tmp_path / "x.mar", **{f"traceserve_runtime/{i}.py": b"" for i in range(10_000)})
    with pytest.raises(ArchiveError, match=r"x.mar holds 10,\d+ files, and an archive has at most 10,000"):
        unpack(mar, tmp_path / "out4")  # each name would be looked for among all
    unpack(rezipped(packed, tmp_path / "x.mar"), tmp_path / "whole")
    Manifest.read(tmp_path / "whole")


def test_another_serving_configuration_keeps_the_schema(packed: Path, tmp_path: Path) -> None:
    """An earlier archive's runtime only reads its own schema."""
    with zipfile.ZipFile(packed) as file:
        document = json.loads(file.read("traceserve.json"))
    old = {key: value for key, value in document.items() if key not in ("digest", "version")}
    old["schema"] = OLDEST
    mar = rezipped(packed, tmp_path / "x.mar", **{"traceserve.json": json.dumps(old).encode()})
    for path, schema in ((mar, OLDEST), (Path(shutil.copy(packed, tmp_path / "new.mar")), SCHEMA)):
        configure_archive(path, replace(read_serving(path), batch_size=7))
        assert read_serving(path).batch_size == 7
        with zipfile.ZipFile(path) as file:
            written = json.loads(file.read("traceserve.json"))
        assert written["schema"] == schema and ("digest" in written) == (schema == SCHEMA)
        unpack(path, tmp_path / str(schema))
        Manifest.read(tmp_path / str(schema))


def test_another_serving_configuration_keeps_the_links_and_the_permissions(packed: Path, tmp_path: Path) -> None:
    mar = Path(shutil.copy(packed, tmp_path / "x.mar"))
    mar.chmod(0o640)
    (tmp_path / "link.mar").symlink_to("x.mar")
    configure_archive(tmp_path / "link.mar", replace(read_serving(mar), batch_size=7))
    assert os.readlink(tmp_path / "link.mar") == "x.mar" and read_serving(mar).batch_size == 7
    assert mar.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.mar", "x.mar"]


def test_the_packages_own_handler_is_packed(artifact: Path, packed: Path, tmp_path: Path) -> None:
    """Not one of the same name in the working directory, which comes first on the path."""
    (tmp_path / "transformer_handler.py").write_text("class Other: pass\n")
    script = (
        "import sys; sys.path.insert(0, ''); from pathlib import Path; from traceserve.archives.archive import pack_archive; "
        "import transformer_handler; assert transformer_handler.Other; "
        f"pack_archive(Path({str(artifact)!r}), 'tiny', Path('.'))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert sha256(tmp_path / "tiny.mar") == sha256(packed)
    with zipfile.ZipFile(tmp_path / "tiny.mar") as file:
        assert file.read("transformer_handler.py") == (ROOT / "handlers" / "transformer_handler.py").read_bytes()


def test_the_version_is_the_artifacts_or_another(artifact: Path, tmp_path: Path) -> None:
    for version, expected in ((None, "1.0"), ("2.0", "2.0"), ("2026-11-26_b", "2026-11-26_b")):
        with zipfile.ZipFile(pack_archive(artifact, "tiny", tmp_path, version)) as file:
            assert json.loads(file.read("MAR-INF/MANIFEST.json"))["model"]["modelVersion"] == expected
        assert read_manifest(tmp_path / "tiny.mar").version == expected


@pytest.mark.parametrize("version", ["", "-1", "a/b", "1 0", "é", "1" * 65, "1\n", "..", "%31"])
def test_versions_that_cannot_stand_in_a_url(version: str, artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="cannot be an archive's version"):
        pack_archive(artifact, "tiny", tmp_path, version)


def test_an_archive_that_was_packed_by_hand_is_served(artifact: Path, tmp_path: Path) -> None:
    """With the README's command: its manifest is the artifact's, which names no code."""
    options = {
        "model-name": "tiny",
        "version": "1.0",
        "archive-format": "zip-store",
        "serialized-file": artifact / "traced_model.pt",
        "handler": ROOT / "handlers" / "transformer_handler.py",
        "extra-files": f"{artifact},{ROOT / 'handlers'}",
        "config-file": artifact / "model-config.yaml",
        "export-path": tmp_path,
    }
    program = [sys.executable, "-m", "model_archiver.model_packaging"]
    subprocess.run([*program, *(f"--{key}={value}" for key, value in options.items())], check=True)
    unpack(tmp_path / "tiny.mar", tmp_path / "out")
    assert Manifest.read(tmp_path / "out") == Manifest.read(artifact)
