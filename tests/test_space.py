"""A full disk, really: small in-memory file systems, and limits on file sizes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from traceserve.archives import staging
from traceserve.archives.archive import pack_archive
from traceserve.errors import NoSpace
from traceserve.machine import space
from traceserve.machine.private_files import write_private
from traceserve.serving import configuration, keys

Mount = Callable[[str], Path]


@pytest.fixture()
def mount() -> Iterator[Mount]:
    """Mount an in-memory file system of a size, with a path short enough for sockets."""
    mounted: List[Path] = []

    def make(size: str) -> Path:
        place = Path(tempfile.mkdtemp())
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, stderr=subprocess.PIPE)
        except (OSError, subprocess.CalledProcessError):
            place.rmdir()
            pytest.skip("this user may not mount a small disk")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


def test_room_is_required_before_anything_is_written(mount: Mount) -> None:
    disk = mount("8m")
    space.require_space(disk, 1 << 20, "a small file")
    with pytest.raises(NoSpace) as caught:
        space.require_space(disk, 20 << 20, "a large file")
    assert str(disk) in caught.value.message and "a large file needs 25.2 MB, 8.4 MB are free" in caught.value.message
    assert "--output" in caught.value.message and "TMPDIR" in caught.value.message
    assert list(disk.iterdir()) == []


def test_a_full_disk_is_told_with_its_path_and_what_is_needed(mount: Mount) -> None:
    disk = mount("1m")
    with pytest.raises(
        NoSpace, match=rf"no space left on the disk of {disk}: the weights needs 5.0 MB, 0.0 MB are free"
    ):
        with space.Needed(disk, 5_000_000, "the weights"):
            (disk / "weights").write_bytes(bytes(5_000_000))


def test_a_file_on_a_full_disk_names_its_own_disk(mount: Mount) -> None:
    """A failed write names no file, and the folders of other options are on other disks."""
    for write in (staging.write_whole, keys.write_key):
        disk = mount("100k")
        (disk / "earlier").write_bytes(bytes(98304))
        with pytest.raises(NoSpace, match=rf"disk of {disk}/x.html: x.html could not be written whole, 0.0 MB") as full:
            write(disk / "x.html", "long " * 4000)
        assert full.value.message.endswith("are free to this user at most; free some, or name a file elsewhere")
        assert files(disk) == {"earlier": 98304}


def test_a_file_of_our_own_on_a_full_disk_names_its_disk(mount: Mount) -> None:
    """Such as a server's state file, whose name nobody chose."""
    disk = mount("100k")
    (disk / "earlier").write_bytes(bytes(98304))
    told = (
        rf"disk of {disk}/x.json: x.json could not be written whole, 0.0 MB are free to this user at most; free some$"
    )
    with pytest.raises(NoSpace, match=told):
        write_private(disk / "x.json", "long " * 4000)
    assert files(disk) == {"earlier": 98304}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_a_full_disk_is(number: int, tmp_path: Path) -> None:
    """The system's own error, one raised from it, or one with only its message."""
    own = OSError(number, os.strerror(number), str(tmp_path / "x" / "file"))
    assert space.is_full(own) and f"the disk of {tmp_path}/x/file: " in space.full_disk_error(own, []).message
    try:
        try:
            raise own
        except OSError as error:
            raise RuntimeError("could not be saved") from error
    except RuntimeError as error:
        assert space.is_full(error)
    assert space.is_full(RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})"))
    assert not space.is_full(OSError(errno.EACCES, "Permission denied"))
    assert not space.is_full(RuntimeError("a shape of 28 by 122"))


@pytest.fixture(scope="module")
def config(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    # 10 MB of weights: more than any margin.
    folder = checkpoint("bert", **labels, hidden_size=256, intermediate_size=2048, num_hidden_layers=2)
    path = tmp_path_factory.mktemp("config") / "setup_config.json"
    path.write_text(json.dumps({"model_name": str(folder), "max_length": 16, "dtype": "float32"}))
    return path


def run(*arguments: Any, limit: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a traceserve command; optionally with a limit on its files' sizes."""
    import resource

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "traceserve", *map(str, arguments)],
        env={**os.environ, "COLUMNS": "400", **variables},
        capture_output=True,
        text=True,
        preexec_fn=limited if limit else None,
    )


def files(folder: Path) -> Dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def assert_told(result: subprocess.CompletedProcess[str], *words: str) -> None:
    [line] = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.returncode == 1 and "unexpected" not in result.stderr and "Traceback" not in result.stderr
    assert line.startswith("error: no space left on the disk of ") and " needs " in line and "are free" in line
    for word in words:
        assert word in line


@pytest.mark.parametrize("size", ["1m", "12m"])
def test_an_export_onto_a_full_disk(size: str, config: Path, mount: Mount) -> None:
    """Too small for the model, and for its file's other contents."""
    disk = mount(size)
    result = run("export", "--config", config, "--output", disk / "artifacts" / "x")
    assert_told(result, str(disk), "the traced model")
    assert files(disk) == {}


def test_a_build_whose_store_is_full(config: Path, mount: Mount, tmp_path: Path) -> None:
    disk = mount("8m")
    result = run("build", "--config", config, "--output", tmp_path / "x", "--store", disk)
    assert_told(result, str(disk), "the archive x.mar")
    assert files(disk) == {} and not (tmp_path / "x").exists()


def test_a_build_with_a_full_temporary_folder(config: Path, mount: Mount, tmp_path: Path) -> None:
    disk = mount("8m")
    result = run(
        "build", "--config", config, "--output", tmp_path / "x", "--store", tmp_path / "store", TMPDIR=str(disk)
    )
    assert_told(result, str(disk), "TMPDIR")
    assert files(disk) == {} and not (tmp_path / "x").exists() and files(tmp_path / "store") == {}


def test_a_limit_on_files(config: Path, tmp_path: Path) -> None:
    """Like a quota: there is room, but not for this user. torch.jit.save would abort the process."""
    result = run("export", "--config", config, "--output", tmp_path / "x", limit=1 << 20)
    assert_told(result, str(tmp_path), "the traced model")
    assert files(tmp_path) == {}


@pytest.mark.parametrize("save_mode", ["pretrained", "onnx", "aot_inductor"])
def test_other_save_modes(save_mode: str, config: Path, mount: Mount, tmp_path: Path) -> None:
    disk = mount("8m")
    content = {**json.loads(config.read_text()), "save_mode": save_mode}
    (tmp_path / "setup_config.json").write_text(json.dumps(content))
    result = run("export", "--config", tmp_path / "setup_config.json", "--output", disk / "x")
    assert_told(result, str(disk))
    assert files(disk) == {}


def test_serving_with_a_full_temporary_folder(artifact: Path, mount: Mount, tmp_path: Path) -> None:
    packed = pack_archive(artifact, "tiny", tmp_path)
    disk = mount("4m")
    result = run(
        "serve",
        packed,
        "--port",
        str(configuration.free_ports(1)[0]),
        TMPDIR=str(disk),
        XDG_STATE_HOME=str(tmp_path / "state"),
    )
    assert_told(result, str(disk), "unpacking tiny.mar")
    assert files(disk) == {}
