"""This user's folders for state and caches: the usual ones, or a temporary one if these are not writable."""

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
    """Return a folder, made if needed, for data that later commands must find; raises ServerError."""
    return _folder(platformdirs.user_state_dir, "state") / name


def cache(name: str) -> Path:
    """Return a file or folder of the cache, whose parent is made if needed; raises ServerError."""
    return _folder(platformdirs.user_cache_dir, "cache") / name


def state_folder_note() -> Optional[str]:
    """Return a note for the user if the usual state folder is not writable; else None."""
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
    """Return platformdirs' folder; None for a user without a home folder, as in a container with an arbitrary user id.

    For them platformdirs 4.14 raises, and older versions return the relative path `~/...`, which would create a folder
    of that name in the working directory.
    """
    try:
        folder = Path(find(_APP))
    except RuntimeError:
        return None
    return folder if folder.is_absolute() else None


def _usable(folder: Path) -> bool:
    """Return whether files can be made in this folder, which is made if needed."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        if space.is_full(error):  # elsewhere, servers would be lost once there is room again
            raise
        return False
    return os.access(folder, os.W_OK | os.X_OK | os.R_OK)


def _private() -> Path:
    """Return this user's private temporary folder, always with the same name; raises ServerError.

    Its name can be guessed, so somebody else may have made it: it must be a real folder of this user, not accessible
    to anybody else.
    """
    try:
        root = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise ServerError(f"neither the home folder nor a temporary folder can be written: {error}") from None
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = root / f"{_APP}-{user}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()  # not a link's target
    if not stat.S_ISDIR(found.st_mode):
        raise ServerError(_not_ours(folder, "is no folder"))
    if hasattr(os, "getuid"):  # elsewhere the temporary folder is per user
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
