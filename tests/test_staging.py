"""Atomic output: targets, leftovers, interruptions, a real SIGKILL."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from conftest import nothing
from traceserve import cli
from traceserve.archives import archive, staging
from traceserve.archives.staging import LOCK_FILE, check_replaceable, held, scratch, staged
from traceserve.building import packing
from traceserve.building.config.parsing import LoadedConfig, parse_config
from traceserve.building.config.targets import Targets, build_targets
from traceserve.errors import ArchiveError, ExportError
from traceserve.machine import file_locks
from traceserve_runtime.errors import TraceserveError

STAY_INSIDE = """
import sys
import tempfile
import time
from pathlib import Path
from traceserve.archives.staging import staged

target = Path(sys.argv[1])
with staged(target) as folder:
    (folder / target.name).mkdir()
    (folder / target.name / "half").write_text("not finished")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "store" / "thing"


@pytest.fixture
def dead() -> int:
    """The id of an ended process."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def living() -> Iterator[int]:
    """The id of a process that runs during the test."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate()


def put(target: Path, content: str, as_folder: bool) -> None:
    if as_folder:
        target.mkdir(parents=True)
        target = target / "inner"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content)


def seen(folder: Path) -> Dict[str, str]:
    """Return every file below `folder`, including hidden ones, and empty folders."""
    paths = [path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())]
    return {path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else "" for path in paths}


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_the_target_appears_whole_at_the_end(target: Path, as_folder: bool, replacing: bool) -> None:
    if replacing:
        put(target, "old", as_folder)
        if as_folder:
            (target / "of the old one only").write_text("old")
    before = seen(target.parent)
    with staged(target) as folder:
        assert folder.parent == target.parent and folder.name.startswith(".")
        put(folder / target.name, "new", as_folder)
        (folder / "scratch").write_text("not part of it")
        assert {k: v for k, v in seen(target.parent).items() if not k.startswith(".")} == before
    assert seen(target.parent) == {"thing/inner" if as_folder else "thing": "new"}


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_block_changes_nothing(
    target: Path, as_folder: bool, replacing: bool, interruption: type
) -> None:
    if replacing:
        put(target, "old", as_folder)
    before = seen(target.parent)
    with pytest.raises(interruption):
        with staged(target) as folder:
            put(folder / target.name, "new", as_folder)
            raise interruption
    assert seen(target.parent) == before


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_a_block_that_makes_nothing_keeps_the_old_target(target: Path, as_folder: bool) -> None:
    put(target, "old", as_folder)
    before = seen(target.parent)
    with pytest.raises(FileNotFoundError):
        with staged(target):
            pass
    assert seen(target.parent) == before


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failing_rename_restores_the_old_target(
    target: Path, as_folder: bool, failure: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renaming the result fails, as if the disk disappeared; renaming back does not."""
    put(target, "old", as_folder)
    before = seen(target.parent)
    rename, replace = os.rename, os.replace

    def failing(name: str, real: object) -> None:
        def act(source: Path, destination: Path) -> None:
            if Path(source).name == target.name and Path(source).parent != target.parent:
                raise failure("no")
            real(source, destination)  # type: ignore[operator]

        monkeypatch.setattr(os, name, act)

    failing("rename", rename)
    failing("replace", replace)
    with pytest.raises(failure):
        with staged(target) as folder:
            put(folder / target.name, "new", as_folder)
    assert seen(target.parent) == before


def test_parents_are_made(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "c.mar"
    with staged(target) as folder:
        (folder / "c.mar").write_text("whole")
    assert target.read_text() == "whole"


def test_targets_side_by_side_may_be_nested(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with staged(one) as outer, staged(two) as inner:
        put(inner / "two", "2", as_folder=True)
        put(outer / "one", "1", as_folder=False)
    assert seen(tmp_path) == {"one": "1", "two/inner": "2"}


def stage_once(target: Path) -> None:
    """Enter and leave without making anything, like an export that fails immediately."""
    with pytest.raises(ZeroDivisionError):
        with staged(target):
            raise ZeroDivisionError


def leave(folder: Path, inner: str, content: str) -> None:
    """Leave a killed process's remains: its folder, and its lock file, which the system unlocked."""
    put(folder / inner, content, as_folder=True)
    (folder / LOCK_FILE).touch()


def test_what_a_dead_process_left_is_swept(target: Path, dead: int) -> None:
    put(target, "old", as_folder=False)
    leave(target.parent / f".thing.{dead}.abcd_123", "thing", "half")
    stage_once(target)
    assert seen(target.parent) == {"thing": "old"}


def test_a_target_that_a_dead_process_had_moved_aside_is_put_back(target: Path, dead: int) -> None:
    left = target.parent / f".thing.{dead}.abcd_123"
    leave(left, "replaced", "old")
    put(left / "thing", "perhaps whole", as_folder=True)
    stage_once(target)
    assert seen(target.parent) == {"thing/inner": "old"}


def test_a_target_that_was_replaced_in_time_stays(target: Path, dead: int) -> None:
    """The dead process had finished its renames, but not yet removed the replaced target."""
    put(target, "new", as_folder=True)
    leave(target.parent / f".thing.{dead}.abcd_123", "replaced", "old")
    stage_once(target)
    assert seen(target.parent) == {"thing/inner": "new"}


def test_a_folder_that_is_locked_is_left_alone(target: Path) -> None:
    put(target.parent / ".thing.1.abcd_456" / "replaced", "old", as_folder=True)
    with held(target.parent / ".thing.1.abcd_456"):
        before = seen(target.parent)
        stage_once(target)
        assert seen(target.parent) == before


@pytest.mark.parametrize("days", [1, 8])
def test_a_folder_without_a_lock_is_swept_after_a_week(target: Path, living: int, days: int) -> None:
    """From an earlier version, or a file system without locks; whatever process has its id here."""
    left = target.parent / f".thing.{living}.abcd_123"
    put(left / "thing", "half", as_folder=True)
    os.utime(left, (time.time() - 86400 * days,) * 2)
    stage_once(target)
    assert left.exists() == (days == 1)


@pytest.mark.parametrize("strange", ["a link", "another user's"])
def test_nothing_of_a_stranger_takes_the_targets_place(
    strange: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of a dead process may hold the earlier target; one that only looks so does not."""
    target.parent.mkdir()
    left = target.parent / ".thing.1.abcd_123"
    elsewhere = tmp_path / "elsewhere" if strange == "a link" else left
    put(elsewhere / "replaced", "strange", as_folder=True)
    (elsewhere / LOCK_FILE).touch()
    if strange == "a link":
        left.symlink_to(elsewhere)
    else:
        monkeypatch.setattr(os, "getuid", lambda: left.stat().st_uid + 1)
    with pytest.raises(KeyError), staged(target):
        raise KeyError
    assert left.exists() and (elsewhere / "replaced").is_dir() and not target.exists()


SWEEP = """
import sys
from pathlib import Path
from traceserve.archives.staging import staged

target = Path(sys.argv[1])
with staged(target) as folder:
    (folder / target.name).write_text("swept")
"""


def test_a_process_that_cannot_see_the_pid_sees_that_a_build_runs(target: Path) -> None:
    """Like two containers with one model_store: neither sees the other's processes."""
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*apart, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this user may not make a pid namespace")
    command = [sys.executable, "-c", STAY_INSIDE, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        running = target.parent / child.stdout.readline().strip()
        subprocess.run([*apart, sys.executable, "-c", SWEEP, str(target)], check=True)
        assert target.read_text() == "swept"
        assert (running / "thing" / "half").read_text() == "not finished"
        child.kill()
    assert running.exists()
    subprocess.run([*apart, sys.executable, "-c", SWEEP, str(target)], check=True)
    assert not running.exists()


@pytest.mark.parametrize(
    "name", [".thing", ".thing.", ".thing.x", ".thing.{dead}", ".things.{dead}.abcd_123", "thing.{dead}.abcd_123"]
)
def test_other_hidden_files_are_left_alone(target: Path, dead: int, name: str) -> None:
    leave(target.parent / name.format(dead=dead), "somebody", "else's")
    before = seen(target.parent)
    stage_once(target)
    assert seen(target.parent) == before


def test_a_name_that_goes_on_with_a_number_is_another_target(tmp_path: Path, dead: int, living: int) -> None:
    """For example llama-3 and llama-3.1: the second's private folder is not the first one's."""
    leave(tmp_path / f".llama-3.{dead}.{living}.abcd_123", f"llama-3.{dead}", "half")
    before = seen(tmp_path)
    stage_once(tmp_path / "llama-3")
    assert seen(tmp_path) == before


def test_a_file_system_without_locks(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_locks, "try_lock", lambda lock: False)
    with staged(target) as folder:
        put(folder / "thing", "new", as_folder=False)
        assert not (folder / LOCK_FILE).exists()
    assert seen(target.parent) == {"thing": "new"}


SCRATCH = """
import sys
from traceserve.archives.staging import scratch

with scratch() as folder:
    (folder / "large").write_bytes(bytes(1000))
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_temporary_files_of_a_killed_process_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    somebodys = tmp_path / "traceserve-scratch-notes"
    somebodys.mkdir()
    children = [
        subprocess.Popen([sys.executable, "-c", SCRATCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed, working = (Path(child.stdout.readline().strip()) for child in children)  # type: ignore[union-attr]
    children[0].kill()
    children[0].communicate()
    assert (killed / "large").is_file() and killed.parent == tmp_path
    with scratch() as folder:
        assert not killed.exists()
        assert (working / "large").is_file() and somebodys.is_dir()
        assert folder.is_dir()
    children[1].communicate("")
    assert list(tmp_path.iterdir()) == [somebodys]


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_a_killed_process_leaves_the_target_as_it_was(target: Path, replacing: bool) -> None:
    if replacing:
        put(target, "old", as_folder=True)
    with subprocess.Popen(
        [sys.executable, "-c", STAY_INSIDE, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        left = child.stdout.readline().strip()
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    old = {"thing/inner": "old"} if replacing else {}
    assert seen(target.parent) == {**old, f"{left}/thing/half": "not finished", f"{left}/{LOCK_FILE}": ""}
    stage_once(target)
    assert seen(target.parent) == old


STAY_AT_THE_END = """
import shutil
import sys
from pathlib import Path
from traceserve.archives.staging import staged

def stay(*arguments, **options):
    print(flush=True)
    sys.stdin.read()

target = Path(sys.argv[1])
with staged(target) as folder:
    (folder / target.name).mkdir()
    shutil.rmtree = stay
"""


def test_what_a_process_leaves_that_is_killed_while_it_tidies_up_is_swept(target: Path) -> None:
    """It keeps its lock until nothing else is left: without one its folder would stay for days."""
    put(target, "old", as_folder=True)
    with subprocess.Popen(
        [sys.executable, "-c", STAY_AT_THE_END, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.kill()
    assert len(list(target.parent.iterdir())) == 2
    stage_once(target)
    assert len(list(target.parent.iterdir())) == 1


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("error", [ExportError, ArchiveError])
def test_check_free_refuses_what_is_there(target: Path, as_folder: bool, error: type) -> None:
    put(target, "old", as_folder)
    with pytest.raises(error, match="thing exists already; --force replaces it"):
        check_replaceable(target, False, error)


def test_check_free_allows_a_free_place_and_force(target: Path) -> None:
    check_replaceable(target, False, ExportError)
    put(target, "old", as_folder=False)
    check_replaceable(target, True, ExportError)
    assert target.read_text() == "old"


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_of_a_link_the_target_is_replaced(target: Path, as_folder: bool, tmp_path: Path) -> None:
    """The new one is made on the target's disk, which may be another; the link stays."""
    real = tmp_path / "disk" / "real"
    put(real, "old", as_folder)
    target.parent.mkdir()
    target.symlink_to(real)
    with pytest.raises(ArchiveError, match="thing exists already; --force replaces it"):
        check_replaceable(target, False, ArchiveError)
    check_replaceable(target, True, ArchiveError)
    with staged(target) as folder:
        assert folder.parent == real.parent
        put(folder / target.name, "new", as_folder)
    assert target.is_symlink() and list(target.parent.iterdir()) == [target]
    assert seen(real.parent) == {"real/inner" if as_folder else "real": "new"}


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
def test_a_link_to_nothing_is_refused(target: Path, force: bool, tmp_path: Path) -> None:
    target.parent.mkdir()
    target.symlink_to(tmp_path / "unmounted" / "thing")
    words = "thing is a link to .*/unmounted/thing, which does not exist; remove the link, or write elsewhere"
    with pytest.raises(ArchiveError, match=words):
        check_replaceable(target, force, ArchiveError)
    with pytest.raises(TraceserveError, match=words):
        with staged(target):
            pytest.fail("it began")
    assert target.is_symlink() and os.listdir(tmp_path) == ["store"] and os.listdir(target.parent) == ["thing"]


def test_an_archive_that_is_a_link_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    put_file(Path("artifacts/thing/traceserve.json"), "{}")
    Path("model_store").mkdir()
    Path("model_store/thing.mar").symlink_to("gone.mar")
    for force in ([], ["--force"]):
        assert cli.main(["archive", "artifacts/thing", *force]) == 1
        assert "thing.mar is a link to gone.mar, which does not exist" in " ".join(capsys.readouterr().err.split())


def test_a_text_is_written_whole_or_not_at_all(target: Path) -> None:
    """A limit on the size of files acts like a full disk."""
    put(target, "old", as_folder=False)
    target.chmod(0o640)
    code = (
        "import resource, sys; from pathlib import Path; from traceserve.archives.staging import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))\n"
        "write_whole(Path(sys.argv[1]), 'longer than this')"
    )
    failed = subprocess.run([sys.executable, "-B", "-c", code, str(target)], capture_output=True, text=True)
    assert "File too large" in failed.stderr and seen(target.parent) == {"thing": "old"}
    staging.write_whole(target, "new")
    assert seen(target.parent) == {"thing": "new"} and target.stat().st_mode & 0o777 == 0o640


WRITE = """
import sys
from pathlib import Path
from traceserve.archives.staging import write_whole

write_whole(Path(sys.argv[1]), "new")
"""


def test_a_file_that_is_mounted_by_itself(tmp_path: Path) -> None:
    """As containers mount one: its name cannot be given to another file."""
    inside, outside = tmp_path / "inside" / "setup_config.json", tmp_path / "outside.json"
    for path in (inside, outside):
        put_file(path, "something longer")
    apart = [
        "unshare",
        "--mount",
        "sh",
        "-ec",
        'mount --bind "$1" "$2" && shift 2 && "$@"',
        "sh",
        str(outside),
        str(inside),
    ]
    if subprocess.run([*apart, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this user may not mount")
    subprocess.run([*apart, sys.executable, "-c", WRITE, str(inside)], check=True)
    assert outside.read_text() == "new" and seen(inside.parent) == {"setup_config.json": "something longer"}


def where_nothing_is_written(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command while this user cannot write into `folder`; for root it is mounted read-only."""
    if os.geteuid():
        folder.chmod(0o555)
        try:
            return subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
        finally:
            folder.chmod(0o755)
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && "$@"'
    apart = ["unshare", "--mount", "sh", "-ec", script, "sh", str(folder)]
    if subprocess.run([*apart, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this user may not mount")
    return subprocess.run([*apart, *command], cwd=folder.parent, capture_output=True, text=True)


@pytest.mark.parametrize("place", ["new.html", "new/new.html", "old.html"])
def test_a_folder_that_cannot_be_written(place: str, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    put_file(closed / "old.html", "old")
    code = WRITE.replace("from pathlib", "from traceserve_runtime.errors import TraceserveError\nfrom pathlib")
    code = code.replace("\nwrite_whole", "\ntry:\n    write_whole").replace(
        '"new")', '"new")\nexcept TraceserveError as error:\n    sys.exit(error.message)'
    )
    done = where_nothing_is_written(closed, sys.executable, "-c", code, f"closed/{place}")
    refusal = r"closed/\S+ cannot be written: (Read-only file system|Permission denied); choose another folder\n"
    assert done.returncode == 1 and re.fullmatch(refusal, done.stderr), done.stderr
    assert seen(tmp_path) == {"closed/old.html": "old"}


@pytest.mark.parametrize("options", [("--store", "closed"), ("--output", "closed/x"), ("--output", "closed/a/x")])
def test_a_build_into_a_folder_that_cannot_be_written(options: List[str], tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    put_file(tmp_path / "setup_config.json", '{"model_name": "org/thing"}')
    done = where_nothing_is_written(tmp_path / "closed", sys.executable, "-m", "traceserve", "build", *options)
    told = " ".join(done.stderr.split())
    assert done.returncode == 1 and "cannot be written: " in told and "choose another folder" in told
    assert "report it" not in told and sorted(os.listdir(tmp_path)) == ["closed", "setup_config.json"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize("place", ["/proc/new/x.mar", "/proc/x.mar"])
def test_a_folder_where_nothing_can_be_made(place: str) -> None:
    with pytest.raises(TraceserveError, match=f"{place} cannot be written: No such file .*; choose another folder"):
        with staged(Path(place)):
            pytest.fail("it began")


def test_a_text_into_a_folder(tmp_path: Path) -> None:
    with pytest.raises(TraceserveError, match="pages is a folder; name a file in it"):
        put(tmp_path / "pages", "mine", as_folder=True)
        staging.write_whole(tmp_path / "pages", "new")
    assert seen(tmp_path) == {"pages/inner": "mine"}


def test_folders_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "new" / "store" / "x.mar", tmp_path / "empty" / "x.mar"):
        with pytest.raises(KeyboardInterrupt), staged(target):
            raise KeyboardInterrupt
    assert seen(tmp_path) == {"empty": ""}
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "new" / "store" / "x.mar"):
        put_file(tmp_path / "new" / "another's", "stays")
        raise KeyboardInterrupt
    assert seen(tmp_path) == {"empty": "", "new/another's": "stays"}


def test_a_text_into_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        staging.write_whole(tmp_path / "pipe", "read at once")
        assert os.read(reader, 100) == b"read at once"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def put_file(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def targets(folder: Path, model_name: str = "org/thing", force: bool = False, **places: Path) -> Targets:
    """The targets of a build with its configuration in `folder`."""
    config, notes = parse_config({"model_name": model_name})
    loaded = LoadedConfig(config, folder, notes)
    return build_targets(loaded, places.get("output"), places.get("store", Path("model_store")), None, force)


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
def test_a_folder_of_the_users_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("artifacts/mine/config.json", "notes/thesis.txt", "artifacts/ours/inner/config.json"):
        put_file(Path(file), "years of work")
    put_file(Path("artifacts/ours/traceserve.json"), "{}")
    for options, words in (
        ({"model_name": "artifacts/mine"}, "artifacts/mine holds the checkpoint, which would be replaced"),
        ({"output": Path("notes")}, "notes is no artifact of traceserve (it has no traceserve.json)"),
        ({"model_name": "artifacts/ours"}, "artifacts/ours holds the checkpoint"),
        (
            {"model_name": "artifacts/ours/inner", "output": Path("artifacts/ours")},
            "artifacts/ours holds the checkpoint",
        ),
    ):
        with pytest.raises(ExportError) as caught:
            targets(tmp_path, force=force, **options)  # type: ignore[arg-type]
        assert words in caught.value.message and "--output artifacts/NAME" in caught.value.message
        assert "--force" not in caught.value.message
    with pytest.raises(ExportError, match="ours holds the configuration"):
        targets(tmp_path / "artifacts" / "ours", output=Path("artifacts/ours"), force=force)


def test_an_artifact_and_an_empty_folder_are_replaced_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put_file(Path("artifacts/thing/traceserve.json"), "{}")
    Path("empty").mkdir()
    for output in (Path("artifacts/thing"), Path("empty")):
        assert targets(tmp_path, output=output, force=True).artifact == output
        with pytest.raises(ExportError, match="exists already; --force replaces it, --output writes elsewhere"):
            targets(tmp_path, output=output)


def test_where_an_archive_exists_the_error_names_the_option_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`traceserve archive` has no --output."""
    monkeypatch.chdir(tmp_path)
    put_file(Path("model_store/thing.mar"), "old")
    with pytest.raises(ArchiveError, match="thing.mar exists already; --force replaces it, --store writes elsewhere"):
        targets(tmp_path)


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
@pytest.mark.parametrize(
    "places, words",
    [
        ({"store": "file"}, "--store file: .*/file is a file, not a folder"),
        ({"store": "file/store"}, "--store file/store: .*/file is a file"),
        ({"output": "file/x"}, "--output file/x: .*/file is a file"),
        ({"output": "file"}, "file is a file, but an artifact is a folder"),
        ({"output": "."}, "--output . does not end in the artifact's name"),
        ({"output": ".."}, "--output .. does not end in the artifact's name"),
        ({"output": "x/.."}, "--output x/.. does not end in the artifact's name"),
        ({"store": "folders"}, "folders/thing.mar is a folder, not an archive"),
        (
            {"model_name": "models/my mödel"},
            "'my mödel' cannot name an archive: .* model_name, .* --output artifacts/NAME",
        ),
        ({"model_name": "/"}, "'' cannot name an archive: .* --output artifacts/NAME"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_at_once(
    places: Dict[str, str], words: str, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folders/thing.mar").mkdir(parents=True)
    model_name = places.get("model_name", "org/thing")
    with pytest.raises(TraceserveError, match=words):
        targets(
            tmp_path, model_name, force, **{key: Path(place) for key, place in places.items() if key != "model_name"}
        )


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize(
    "store, words",
    [
        ("file", "--store file: .*/file is a file, not a folder"),
        ("file/store", "--store file/store: .*/file is a file, not a folder"),
        ("folders", "folders/thing.mar is a folder, not an archive"),
    ],
)
def test_archive_refuses_the_same_places(
    store: str,
    words: str,
    force: List[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("file", "folders/thing.mar/thesis.txt", "artifacts/thing/traceserve.json"):
        put_file(Path(file), "years of work")
    before = seen(tmp_path)
    monkeypatch.setattr(archive, "pack_archive", lambda *given: pytest.fail("it began"))
    assert cli.main(["archive", "artifacts/thing", "--store", store, *force]) == 1
    assert re.search(words, capsys.readouterr().err)
    assert seen(tmp_path) == before


def test_of_two_builds_of_one_name_the_later_one_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, notes = parse_config({"model_name": "org/thing"})
    store = Path("model_store")

    def other_finishes(*given: Any) -> None:
        put_file(Path("artifacts/thing/traceserve.json"), "other")

    monkeypatch.setattr(packing, "export", other_finishes)
    monkeypatch.setattr(packing.archive, "pack_archive", lambda *given: None)
    with pytest.raises(ExportError, match="artifacts/thing exists already; --force replaces it"):
        packing.export_and_pack(LoadedConfig(config, tmp_path, notes), targets(tmp_path, store=store), nothing)
    assert seen(tmp_path) == {"artifacts/thing/traceserve.json": "other"}
