"""The lock of a server's folder, held as long as the server lives: it shows others that the server runs.

The lock (`flock`) is on the folder itself, since systemd-tmpfiles, which removes what has lain in /tmp for some days, skips a
locked folder and everything below it. It belongs to the open descriptor: whoever inherits that holds the lock too.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path
from typing import Iterator, Optional

from traceserve.machine.file_locks import try_lock


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Optional[int]]:
    """Lock a new server's folder, and yield the descriptor for the server to inherit; None if locks are unsupported."""
    if sys.platform == "win32":
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor if try_lock(descriptor) else None
    finally:
        os.close(descriptor)


def is_released(folder: Path, machine: str) -> bool:
    """Return whether nobody holds the lock of a folder any more that a server on this machine held: it has ended.

    False where the lock does not tell: for other machines' folders, and those that are not here.
    """
    if sys.platform == "win32" or not _shares_locks(machine):
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        return try_lock(descriptor, shared=True)  # shared: several may look at a time
    finally:
        os.close(descriptor)


def _shares_locks(machine: str) -> bool:
    """Return whether a machine is this one, before or after a restart, or a container on it. No other machine sees a folder's
    lock, on a network's file system neither."""
    return any(told == own for told, own in zip(machine.split()[:2], this_machine().split()[:2]))


def is_this_machine(machine: str) -> bool:
    """Return whether `this_machine` once said so of this one, whose name may have been set since."""
    return machine.split()[-2:] == this_machine().split()[-2:]


def this_machine() -> str:
    """Identify this machine, and if possible this container, among others with the same pids: by its name, its start, and
    its namespace of pids."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)
