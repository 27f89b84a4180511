"""Keys of servers: their files, their rotation, and where they are shown."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any, Callable, List, TextIO

import pytest
from test_instances import processes, remembered, state  # noqa: F401  (fixtures)
from traceserve import cli
from traceserve.errors import ServerError
from traceserve.machine import file_locks
from traceserve.serving import instances, keys
from traceserve.serving import server as starting
from traceserve.serving.engines import RAY
from traceserve.serving.instances import Instance
from traceserve.serving.update_lock import alone


@pytest.fixture
def server(processes: Any) -> Instance:  # noqa: F811
    """A cluster's record and its key's file: replicas read that."""
    instance = dataclasses.replace(remembered(processes), engine=RAY, key="first")
    keys.write_key(keys.ray_key_file(Path(instance.folder)), "first")
    instances.remember(instance)
    return instance


def test_keys_are_not_rotated_while_an_update_runs(server: Instance) -> None:
    """It goes on with those that it began with, and could not take back anything."""
    with alone(server), pytest.raises(ServerError, match="port 18000 is being changed: another `traceserve update`"):
        keys.rotate_keys(server, "second")
    assert keys.current(server).key == "first" == instances.find_instance(18000).key
    assert keys.rotate_keys(server, "second").key == "second" == instances.find_instance(18000).key


def test_a_file_system_without_locks_hinders_no_rotation(server: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockless(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file_locks.fcntl, "flock", lockless)
    assert keys.rotate_keys(server, "second").key == "second"


def test_a_rotation_forgets_nothing_that_an_update_remembered_meanwhile(server: Instance) -> None:
    instances.remember(dataclasses.replace(server, folders={"tiny": "tiny@2.0"}))
    assert keys.rotate_keys(server).folders == {"tiny": "tiny@2.0"} == instances.find_instance(18000).folders


@pytest.mark.parametrize("removed", [False, True])
def test_nothing_changes_a_server_that_has_ended(removed: bool, server: Instance) -> None:
    process = server.process
    assert process is not None
    process.kill()
    process.wait()
    if removed:  # by another command, in the midst of this one
        shutil.rmtree(server.folder)
    with pytest.raises(ServerError, match="port 18000 has ended"):
        keys.rotate_keys(server)


def test_half_a_rotation_is_remembered(processes: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Else commands would send a key that is no longer one."""
    instance = dataclasses.replace(remembered(processes), key="first", management_key="own")
    file = Path(instance.folder, instances.TORCHSERVE_KEYS)

    def write(inference: str) -> None:
        found = {"inference": inference, "management": "own", "API": "maker"}
        file.write_text(json.dumps({kind: {"key": key} for kind, key in found.items()}))

    def call(maker: Instance, method: str, path: str) -> None:
        if path == "/token?type=management":
            raise ServerError("it ended")
        write("second")

    write("first")
    instances.remember(instance)
    monkeypatch.setattr(keys.management, "call", call)
    with pytest.raises(ServerError, match="^it ended$"):
        keys.rotate_keys(instance)
    assert instances.find_instance(18000).key == "second"


@pytest.mark.parametrize("kind", ["key", "state"])
def test_of_two_writers_at_once_neither_fails(
    kind: str, server: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one writes all of its file just before the first one's takes its place."""
    file, replace = tmp_path / "key", os.replace
    writers: List[Callable[[str], None]] = [
        lambda text: keys.write_key(file, text),
        lambda text: instances.remember(dataclasses.replace(server, key=text)),
    ]
    write = writers[kind == "state"]

    def second_first(*paths: Any) -> None:
        monkeypatch.setattr(os, "replace", replace)
        write("second")
        replace(*paths)

    monkeypatch.setattr(os, "replace", second_first)
    write("first")
    [written] = [file] if kind == "key" else Path(os.environ["XDG_STATE_HOME"], "traceserve", "servers").iterdir()
    text = written.read_text()
    assert (text.strip() if kind == "key" else json.loads(text)["key"]) == "first"
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".new")] == []


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_key_is_no_key(content: str, server: Instance, capsys: pytest.CaptureFixture[str]) -> None:
    keys.ray_key_file(Path(server.folder)).write_text(content)
    assert cli.main(["keys", "--write", str(Path(server.folder, "written"))]) == 1
    assert "the keys of the server on port 18000 cannot be read" in " ".join(capsys.readouterr().err.split())
    assert not Path(server.folder, "written").exists() and instances.find_instance(18000).key == "first"


def test_a_key_replaces_regular_files_alone(
    server: Instance, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a device nor a link to one, such as /dev/stdout."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for name in ("fifo", "link"):
        assert cli.main(["keys", "--rotate", "--write", str(tmp_path / name)]) == 1
        assert "exists and is no regular file" in " ".join(capsys.readouterr().err.split())
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode) and (tmp_path / "link").is_symlink()
    assert keys.current(server).key == "first"
    for content in ("my notes\n", "one\ntwo\n", "x" * 5000):
        (tmp_path / "file").write_text(content)
        assert cli.main(["keys", "--rotate", "--write", str(tmp_path / "file")]) == 1
        assert "exists and holds more than a key" in capsys.readouterr().err
        assert (tmp_path / "file").read_text() == content and keys.current(server).key == "first"
    (tmp_path / "file").write_text("old\n")
    assert cli.main(["keys", "--write", str(tmp_path / "file")]) == 0
    assert (tmp_path / "file").read_text() == "first\n"


@pytest.mark.parametrize(
    "terminal, options, shown", [(True, [], True), (False, [], False), (True, ["--foreground"], False)]
)
def test_a_key_is_shown_to_a_person_alone(
    terminal: bool,
    options: List[str],
    shown: bool,
    server: Instance,
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A container in the foreground may have a terminal (docker run -t), and its output is a log."""
    Path(server.folder, "store", "tiny").symlink_to(artifact)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(starting, "start", lambda *arguments, **options: dataclasses.replace(server, key="s3cret"))
    monkeypatch.setattr(instances, "wait", lambda instance: None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert cli.main(["serve", "tiny.mar", *options]) == (1 if options else 0)
    assert ("s3cret" in capsys.readouterr().out) == shown


def test_serve_with_a_closed_output_starts_all_the_same(
    server: Instance, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a cron job's `>&-`: it failed once the server ran, and left it so."""
    Path(server.folder, "store", "tiny").symlink_to(artifact)
    monkeypatch.setattr(starting, "start", lambda *arguments, **options: server)
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["serve", "tiny.mar"]) == 0 and not capsys.readouterr().err


def test_serve_in_the_foreground_leaves_no_server_where_nobody_reads_its_output(
    server: Instance, artifact: Path, monkeypatch: pytest.MonkeyPatch, unread: TextIO
) -> None:
    """Whoever started it took its end for the server's, which went on and held the port."""
    Path(server.folder, "store", "tiny").symlink_to(artifact)
    stopped: List[Instance] = []
    monkeypatch.setattr(starting, "start", lambda *arguments, **options: server)
    monkeypatch.setattr(instances, "stop", stopped.append)
    monkeypatch.setattr(sys, "stdout", unread)
    assert cli.main(["serve", "tiny.mar", "--foreground"]) == 1
    assert stopped == [server]
