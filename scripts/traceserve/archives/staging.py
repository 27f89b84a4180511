"""Atomic output: a result appears under its name only when finished.

A process with a private folder holds a lock (`flock`) on a file in it, which the system releases when the process
ends, for any reason. Two containers with one model_store see each other's locks, but not each other's processes.
On NFS other machines see the lock unless it was mounted with `nolock` or `local_lock`: then two
machines should not build into one folder at the same time.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import AbstractSet, Iterator, Optional, Pattern, Set, Type

from traceserve_runtime.errors import TraceserveError

from traceserve.machine import file_locks, space
from traceserve.option_names import option, switch

LOCK_FILE = ".traceserve.lock"
_UNIQUE = r"[a-z0-9_]{8}"  # mkdtemp's suffix
_SCRATCH = re.compile(rf"traceserve-scratch-{_UNIQUE}")
# Folders without a lock come from an earlier version, or a file system without locks. None is in use for this long.
_OLD = 7 * 24 * 3600.0  # seconds
# A folder's errors for who may not write there, or where a folder cannot be.
_UNWRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENXIO,
    errno.EINVAL,
}
_own: Set[Path] = set()  # on NFS a process does not see its own locks


def check_replaceable(target: Path, force: bool, error: Type[TraceserveError], elsewhere: str = "output") -> None:
    """Raise `error` if `target` exists and may not be replaced: a link to nothing never, of another its target by force.

    The option `elsewhere` names another place.
    """
    with _writing(target):
        dangling, exists = _dangling(target), target.exists()
    if dangling is not None:
        raise error(dangling)
    if exists and not force:
        raise error(f"{target} exists already; {switch('force')} replaces it, {option(elsewhere)} writes elsewhere")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield a private folder beside `target`; the result made in it under the target's name replaces it at the end.

    Of a link its target is replaced, and the folder is beside that, on its disk; a link to nothing raises TraceserveError.
    If the block raises or is interrupted, the folder is removed, with those above it that were made for it, and an earlier
    target remains. The next process removes the remains of a killed one. Raises TraceserveError if nothing can be written
    there.
    """
    with _writing(target):
        dangling = _dangling(target)
        place = target.resolve() if target.is_symlink() else target
    if dangling is not None:
        raise TraceserveError(dangling)
    with contextlib.ExitStack() as stack:
        with _writing(target, _UNWRITABLE | {errno.ENOENT}):  # the error of /proc, where nothing is made
            stack.enter_context(_folders_above(place))
            _sweep(place)
            folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.{os.getpid()}.", dir=place.parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(held(folder))
            stack.callback(_empty, folder)
        yield folder
        with _writing(target):
            _replace(folder / target.name, place, folder / "replaced")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield a temporary folder, removed at the end; first removes those of this user's killed processes.

    A forked child, whose copy of this context ends with it, leaves the folder to its parent.
    """
    maker = os.getpid()
    for left in abandoned(Path(tempfile.gettempdir()), _SCRATCH):
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="traceserve-scratch-"))
    try:
        with held(folder):
            try:
                yield folder
            finally:
                if os.getpid() == maker:
                    _empty(folder)
    finally:
        if os.getpid() == maker:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Path]:
    """Lock one's own folder, so that `abandoned` skips it."""
    maker, lock = os.getpid(), _locked(folder)
    _own.add(folder.resolve())
    try:
        yield folder
    finally:
        _own.discard(folder.resolve())
        if os.getpid() == maker:  # not a forked child
            exempt(folder)
        if lock is not None:
            os.close(lock)


def exempt(folder: Path) -> None:
    """Let `abandoned` skip one's own folder from now on, even if this process is killed: it is found otherwise."""
    with contextlib.suppress(OSError):
        (folder / LOCK_FILE).unlink()


def abandoned(parent: Path, pattern: Pattern[str], old: float = math.inf) -> Iterator[Path]:
    """Yield this user's folders in `parent` that match and whose process is gone; each is locked meanwhile.

    Folders without a lock count if they have not changed for `old` seconds.
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
            if file_locks.try_lock(lock):
                yield path
        finally:
            os.close(lock)


def write_whole(path: Path, text: str) -> None:
    """Atomically write a text file, with an earlier one's permissions; if that fails, the earlier one remains.

    What is no file, such as /dev/stdout or a pipe, is written to, and so is a file that is mounted by itself. Raises
    TraceserveError for a folder, and where nothing can be written; NoSpace.
    """
    with _writing(path):
        if path.is_dir():
            raise TraceserveError(f"{path} is a folder; name a file in it, or another one")
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
    with staged(path) as folder, space.named_file(folder.parent / path.name):
        new = folder / path.name
        new.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, new)


@contextlib.contextmanager
def _writing(target: Path, refusals: AbstractSet[int] = _UNWRITABLE) -> Iterator[None]:
    """Turn a refusal by the file system into a sentence. A full disk has its own, and a closed pipe is none."""
    try:
        yield
    except OSError as error:
        if error.errno not in refusals:
            raise
        raise TraceserveError(f"{target} cannot be written: {error.strerror}; choose another folder") from error


@contextlib.contextmanager
def _folders_above(target: Path) -> Iterator[None]:
    """Make the folders above `target`; at the end those are removed again that were missing and are empty."""
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it has the target, or another process's
                folder.rmdir()


def _dangling(target: Path) -> Optional[str]:
    """Return why `target` is not replaced, if it is a link to nothing: that may only be out of reach; else None."""
    if not target.is_symlink() or target.exists():
        return None
    return f"{target} is a link to {os.readlink(target)}, which does not exist; remove the link, or write elsewhere"


def _replace(made: Path, target: Path, replaced: Path) -> None:
    if not target.is_dir():
        try:
            os.replace(made, target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            shutil.copyfile(made, target)  # mounted by itself into a container: nothing takes its place
        return
    os.rename(target, replaced)  # a folder cannot be renamed over another
    try:
        os.rename(made, target)
    except BaseException:
        os.rename(replaced, target)
        raise


def _sweep(target: Path) -> None:
    """Remove the private folders of dead processes; restore a target that one of them had moved aside."""
    for path in abandoned(target.parent, re.compile(re.escape(f".{target.name}.") + rf"\d+\.{_UNIQUE}"), _OLD):
        if (path / "replaced").is_dir() and not target.exists():
            os.rename(path / "replaced", target)
        shutil.rmtree(path, ignore_errors=True)


def _empty(folder: Path) -> None:
    """Remove all of a private folder but its lock, by which the next process knows the remains of one that is killed here."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK_FILE:
            with contextlib.suppress(OSError):
                path.unlink()


def _locked(folder: Path) -> Optional[int]:
    """Lock the folder's file, which appears under its name only once locked; None if locks are unsupported."""
    new = folder / f"{LOCK_FILE}.new"
    lock = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
    if file_locks.try_lock(lock):
        os.rename(new, folder / LOCK_FILE)
        return lock
    os.close(lock)
    new.unlink()
    return None


def _is_own_folder(path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return not path.is_symlink() and path.is_dir() and (not hasattr(os, "getuid") or found.st_uid == os.getuid())


def _age(path: Path) -> float:
    """Return the seconds since a folder without a lock changed; 0 if it has a lock, or is gone."""
    with contextlib.suppress(OSError):
        return 0.0 if (path / LOCK_FILE).exists() else time.time() - path.stat().st_mtime
    return 0.0
