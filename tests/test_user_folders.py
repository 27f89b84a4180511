"""Where servers are recorded if the home folder is not writable: a private temporary folder, which nobody can plant."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict

import pytest
from traceserve.errors import ServerError
from traceserve.machine import user_folders


@pytest.fixture()
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that even root cannot write; returns the fallback's temporary folder."""
    monkeypatch.setenv("HOME", "/proc/nohome" if sys.platform == "linux" else str(tmp_path / "a file" / "home"))
    (tmp_path / "a file").write_text("")
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"traceserve-{os.getuid()}"


def test_a_usual_folder_is_used_without_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "new" / "state"))
    assert user_folders.state("servers") == tmp_path / "new" / "state" / "traceserve" / "servers"
    assert user_folders.state_folder_note() is None


def test_an_unwritable_home_falls_back_to_a_private_folder(homeless: Path) -> None:
    assert user_folders.state("servers") == homeless / "state" / "servers"
    assert user_folders.state("servers") == homeless / "state" / "servers"  # again, as in the next command
    assert user_folders.cache("x.jsa") == homeless / "cache" / "x.jsa"
    assert (homeless / "cache").is_dir()
    assert homeless.stat().st_mode & 0o777 == 0o700
    note = user_folders.state_folder_note()
    assert note and os.environ["HOME"] in note and str(homeless) in note and "XDG_STATE_HOME" in note


def test_a_relative_home_makes_no_folder_in_the_working_directory(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(homeless.parent)
    monkeypatch.setenv("XDG_STATE_HOME", "~/state")
    assert user_folders.state("servers") == homeless / "state" / "servers"
    assert not (homeless.parent / "~").exists()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root may become a user without a home")
def test_a_user_without_a_home_folder() -> None:
    """As in a container with an arbitrary user id: no HOME, and no entry in the password file."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        script = (
            "import os, tempfile\nfrom traceserve.machine import user_folders\n"
            f"tempfile.tempdir = {name!r}\nos.chdir({name!r})\nos.setuid(54321)\n"
            "print(user_folders.state('servers'))\nprint(user_folders.state_folder_note())"
        )
        environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_STATE_HOME")}
        result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        folder, note = result.stdout.splitlines()
        assert folder == str(Path(name, "traceserve-54321", "state", "servers"))
        assert "no home folder" in note
        assert os.listdir(name) == ["traceserve-54321"]


def test_a_folder_that_somebody_planted_is_refused(homeless: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    homeless.symlink_to(tmp_path / "theirs")
    with pytest.raises(ServerError, match=f"{homeless}.* is no folder; remove it, or set XDG_STATE_HOME"):
        user_folders.state("servers")
    homeless.unlink()
    homeless.write_text("")
    with pytest.raises(ServerError, match="is no folder"):
        user_folders.state("servers")
    homeless.unlink()
    homeless.mkdir(mode=0o755)
    homeless.chmod(0o755)
    with pytest.raises(ServerError, match="opened by others"):
        user_folders.state("servers")
    assert not list((tmp_path / "theirs").iterdir()) and not list(homeless.iterdir())


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root may give a folder away")
def test_another_users_folder_is_refused(homeless: Path) -> None:
    homeless.mkdir(mode=0o700)
    os.chown(homeless, 65534, 65534)
    with pytest.raises(ServerError, match="belongs to the user 65534, not 0"):
        user_folders.state("servers")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment: Dict[str, str] = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")}
    return subprocess.run(
        [sys.executable, "-m", "traceserve", *arguments],
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/nohome cannot be made on Linux, by root either")
def test_commands_say_where_servers_are_remembered(tmp_path: Path) -> None:
    for command, code, words in (
        (["status"], 0, "no server is running"),
        (["stop"], 1, "no server is running"),
        (["predict", "tiny", "hello"], 1, "no server is running"),
    ):
        result = run(*command, HOME="/proc/nohome", TMPDIR=str(tmp_path))
        assert result.returncode == code and words in result.stdout + result.stderr
        assert "note:" in result.stderr and str(tmp_path / f"traceserve-{os.getuid()}") in result.stderr
        assert "unexpected" not in result.stderr
    assert "note:" not in run("status", HOME=str(tmp_path / "home")).stderr
    assert "note:" not in run("config-schema", HOME="/proc/nohome", TMPDIR=str(tmp_path)).stderr
