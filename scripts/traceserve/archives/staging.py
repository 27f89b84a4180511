"""Whole or not at all: what is made appears under its name only when it is finished.

Whoever works in a private folder holds a lock on a file in it (`flock`), which the system gives back when its process
ends, however it ends. Two containers with one model_store see each other's locks, although not each other's processes.
On NFS the lock is seen by other machines unless it was mounted with `nolock` or `local_lock`: there, builds of two
machines into one folder should not run at the same time.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Iterator, Optional, Pattern, Set, Type

from traceserve_runtime.errors import TraceserveError

if sys.platform != "win32":
    import fcntl

LOCK_FILE = ".traceserve.lock"
_UNIQUE = r"[a-z0-9_]{8}"  # as mkdtemp ends names
_SCRATCH = re.compile(rf"traceserve-scratch-{_UNIQUE}")
# Folders without a lock: of an earlier version, or where there are no locks. Nothing works in one for so long.
_OLD = 7 * 24 * 3600.0  # seconds
_own: Set[Path] = set()  # on NFS a process does not see its own locks


def check_free(target: Path, force: bool, error: Type[TraceserveError]) -> None:
    """Raise `error` if `target` is there and may not be replaced."""
    if target.exists() and not force:
        raise error(f"{target} exists already; --force replaces it, --output or --store writes elsewhere")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A private folder beside `target`; what is made in it under the target's name takes its place at the end.

    If the block raises, or is interrupted, the folder goes and an earlier target stays as it was. What a killed
    process left behind is removed by the next one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}.", dir=target.parent))
    try:
        with held(folder):
            yield folder
            _replace(folder / target.name, target, folder / "replaced")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, removed at the end; what killed processes of this user left behind is removed first."""
    for left in abandoned(Path(tempfile.gettempdir()), _SCRATCH):
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="traceserve-scratch-"))
    try:
        with held(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Path]:
    """Hold the lock of a folder of one's own, so that `abandoned` passes over it."""
    lock = _locked(folder)
    _own.add(folder.resolve())
    try:
        yield folder
    finally:
        _own.discard(folder.resolve())
        with contextlib.suppress(OSError):
            (folder / LOCK_FILE).unlink()
        if lock is not None:
            os.close(lock)


def abandoned(parent: Path, pattern: Pattern[str], old: float = math.inf) -> Iterator[Path]:
    """The folders of this user in `parent` that are called so and whose process is gone; each is locked meanwhile.

    Of those without a lock, the ones that have not changed for `old` seconds.
    """
    for path in sorted(parent.iterdir()):
        if not pattern.fullmatch(path.name) or path.resolve() in _own or not _is_own_folder(path):
            continue
        try:
            lock = os.open(path / LOCK_FILE, os.O_RDWR)
        except OSError:
            if _age(path) > old:
                yield path
            continue
        try:
            if _try_lock(lock):
                yield path
        finally:
            os.close(lock)


def write_beside(target: Path, suffix: str, text: str) -> Path:
    """Write `text` into the file beside `target` that has its name and this suffix, at once; gives the file."""
    path = target.with_name(target.name[: -len(".mar")] + suffix if target.suffix == ".mar" else target.name + suffix)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
    return path


def _replace(made: Path, target: Path, replaced: Path) -> None:
    if not target.is_dir():
        os.replace(made, target)
        return
    os.rename(target, replaced)  # a folder cannot be renamed over another
    try:
        os.rename(made, target)
    except BaseException:
        os.rename(replaced, target)
        raise


def _sweep(target: Path) -> None:
    """Remove the private folders of processes that are gone; put back a target that one of them had moved aside."""
    for path in abandoned(target.parent, re.compile(re.escape(f".{target.name}.") + rf"\d+\.{_UNIQUE}"), _OLD):
        if (path / "replaced").is_dir() and not target.exists():
            os.rename(path / "replaced", target)
        shutil.rmtree(path, ignore_errors=True)


def _locked(folder: Path) -> Optional[int]:
    """A lock on the folder's file, which appears under its name only when it is locked; None where there are no locks."""
    new = folder / f"{LOCK_FILE}.new"
    lock = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
    if _try_lock(lock):
        os.rename(new, folder / LOCK_FILE)
        return lock
    os.close(lock)
    new.unlink()
    return None


def _try_lock(lock: int) -> bool:
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is held, or this file system has no locks
        return False
    return True


def _is_own_folder(path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return not path.is_symlink() and path.is_dir() and (not hasattr(os, "getuid") or found.st_uid == os.getuid())


def _age(path: Path) -> float:
    """Seconds since a folder without a lock has changed; 0 for one that has a lock, or has gone."""
    with contextlib.suppress(OSError):
        return 0.0 if (path / LOCK_FILE).exists() else time.time() - path.stat().st_mtime
    return 0.0
