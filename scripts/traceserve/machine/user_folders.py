"""Where this user's state and caches are kept: in the usual folders, or where these cannot be written in a temporary one."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Callable, Optional

import platformdirs

from traceserve.errors import ServerError
from traceserve.machine import space

_APP = "traceserve"


def state(name: str) -> Path:
    """A folder for what later commands must find again, made if need be; raises ServerError."""
    return _folder(platformdirs.user_state_dir, "state") / name


def cache(name: str) -> Path:
    """A file or folder of the cache, whose folder is made if need be; raises ServerError."""
    return _folder(platformdirs.user_cache_dir, "cache") / name


def note() -> Optional[str]:
    """A sentence for the user where the usual state folder cannot be written; None where it can."""
    usual = _usual(platformdirs.user_state_dir)
    used = _folder(platformdirs.user_state_dir, "state")
    if used == usual:
        return None
    missing = f"{usual} cannot be written" if usual else "this user has no home folder"
    return (
        f"{missing}, so servers are remembered in {used}; commands find them there as long as "
        "TMPDIR is the same. XDG_STATE_HOME names another folder"
    )


def _folder(find: Callable[[str], str], kind: str) -> Path:
    folder = _usual(find)
    return folder if folder is not None and _usable(folder) else _private() / kind


def _usual(find: Callable[[str], str]) -> Optional[Path]:
    """What platformdirs says; None for a user without a home folder, as in a container with an arbitrary user id.

    There platformdirs 4.14 raises, and older ones give the relative path `~/...`, which would become a folder of that
    name in the working directory.
    """
    try:
        folder = Path(find(_APP))
    except RuntimeError:
        return None
    return folder if folder.is_absolute() else None


def _usable(folder: Path) -> bool:
    """Whether files can be made in this folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        if space.is_full(error):  # elsewhere, servers would be lost as soon as there is room again
            raise
        return False
    return os.access(folder, os.W_OK | os.X_OK | os.R_OK)


def _private() -> Path:
    """The temporary folder of this user alone, under the same name each time; raises ServerError.

    Its name can be guessed, so somebody else may have made it: it is used only if it is a real folder of this user that
    nobody else may read or write.
    """
    try:
        root = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise ServerError(f"neither the home folder nor a temporary folder can be written: {error}") from None
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = root / f"{_APP}-{user}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()  # not what a link leads to
    if not stat.S_ISDIR(found.st_mode):
        raise ServerError(_not_ours(folder, "is no folder"))
    if hasattr(os, "getuid"):  # elsewhere the temporary folder is the user's own
        if found.st_uid != os.getuid():
            raise ServerError(_not_ours(folder, f"belongs to the user {found.st_uid}, not {os.getuid()}"))
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise ServerError(_not_ours(folder, "may be opened by others (its mode should be 700)"))
    for kind in ("state", "cache"):
        (folder / kind).mkdir(mode=0o700, exist_ok=True)
    return folder


def _not_ours(folder: Path, what: str) -> str:
    return (
        f"the home folder cannot be written, and {folder}, which would be used in its place, {what}; remove it, or set "
        "XDG_STATE_HOME and XDG_CACHE_HOME to folders of your own"
    )
