"""Disk space: checked before large writes; a full disk is reported in one line, with the path and the needed size."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Iterator, List, Optional

from traceserve.errors import NoSpace
from traceserve.option_names import option

# EFBIG is the error of a limit on file sizes (`ulimit -f`).
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|\[Errno (28|122|27)\]|os error (28|122|27)\b"
)
# PyTorch's writer does not report why a write failed.
_TORCH_WORDS = re.compile(r"PytorchStreamWriter failed|inline_container\.cc.*(unexpected pos|failed)|iostream error")
_MARGIN = 4 << 20  # for files beside it: tables, manifests, directories


def is_full(error: BaseException) -> bool:
    """Return whether an error or one of its causes says that a disk (or a quota, or a limit on files) is full."""
    seen: List[BaseException] = []
    current: Optional[BaseException] = error
    while current is not None and current not in seen:
        seen.append(current)
        if isinstance(current, OSError) and current.errno in _FULL:
            return True
        if _WORDS.search(str(current)) or _TORCH_WORDS.search(str(current)):
            return True
        current = _before(current)
    return False


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise NoSpace unless `folder` (which exists) has room for this many more bytes.

    If possible, the space is allocated and released at once: a quota may leave this user less than the file system
    reports.
    """
    needed += _MARGIN
    free = shutil.disk_usage(folder).free
    if free < needed or not _can_take(folder, needed):
        raise NoSpace(_sentence(folder, what, needed, free))


class Needed:
    """A block that writes about this many bytes into `folder`, with any library: a full disk is raised as NoSpace."""

    def __init__(self, folder: Path, needed: int, what: str) -> None:
        self.folder, self.needed, self.what = folder, needed, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: Optional[BaseException], where: object) -> None:
        if error is not None and not isinstance(error, NoSpace) and is_full(error):
            raise full_disk_error(error, [self.folder], self.needed, self.what) from error


@contextlib.contextmanager
def named_file(path: Path, chosen: bool = True) -> Iterator[None]:
    """Raise a full disk as NoSpace in a block that writes this file. `chosen`: the user chose its name, and may choose
    another."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        otherwise = ", or name a file elsewhere" if chosen else ""
        start = _start(path, path.name, None, shutil.disk_usage(path.parent).free)
        raise NoSpace(f"{start}; free some{otherwise}") from error


def full_disk_error(
    error: BaseException, folders: List[Path], needed: Optional[int] = None, what: str = "a file"
) -> NoSpace:
    """Return an error that is_full as one line about the file that it names, or else the fullest of the given disks."""
    path = _named(error)
    if path is None:
        folders = [_existing(folder.absolute()) for folder in (*folders, Path(_temporary()))]
        path = min(folders, key=lambda folder: shutil.disk_usage(folder).free)
    return NoSpace(_sentence(path, what, needed, shutil.disk_usage(_existing(path)).free))


def size(paths: List[Path]) -> int:
    """Return the bytes of these files, and of all files in these folders."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else (path,)) if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _can_take(folder: Path, needed: int) -> bool:
    if not hasattr(os, "posix_fallocate"):
        return True
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, needed)
    except OSError as error:
        return not is_full(error)  # the file system does not support it
    return True


def _named(error: BaseException) -> Optional[Path]:
    """Return the first file named by a full-disk error among these errors."""
    current: Optional[BaseException] = error
    for _ in range(20):
        if current is None:
            break
        if isinstance(current, OSError) and current.errno in _FULL and isinstance(current.filename, (str, os.PathLike)):
            return Path(current.filename)
        current = _before(current)
    return None


def _before(error: BaseException) -> Optional[BaseException]:
    """Return an error's cause, unless it was suppressed."""
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _existing(path: Path) -> Path:
    return path if path.exists() or path == path.parent else _existing(path.parent)


def _sentence(path: Path, what: str, needed: Optional[int], free: int) -> str:
    return (
        f"{_start(path, what, needed, free)}; free some, or write elsewhere ({option('output')}, {option('store')}; TMPDIR for "
        f"temporary files, now {_temporary()})"
    )


def _start(path: Path, what: str, needed: Optional[int], free: int) -> str:
    wanted = f"{what} needs {_mb(needed)}" if needed is not None else f"{what} could not be written whole"
    return f"no space left on the disk of {path}: {wanted}, {_mb(free)} are free to this user at most"


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # writing a file will show it
        return os.environ.get("TMPDIR", os.curdir)


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
