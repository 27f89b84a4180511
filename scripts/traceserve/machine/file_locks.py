"""Locks of open files and folders (`flock`), which the system releases with the last process that has the descriptor."""

from __future__ import annotations

import sys

if sys.platform != "win32":
    import fcntl


def try_lock(descriptor: int, shared: bool = False) -> bool:
    """Lock what is open, without waiting; returns False if another holds it, or locks are unsupported."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
