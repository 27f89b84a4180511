"""Locks of open files and folders (`flock`), which the system releases with the last process that has the descriptor."""

from __future__ import annotations

import sys

if sys.platform != "win32":
    import fcntl


class Held(Exception):
    """Another process holds the lock."""


def try_lock(descriptor: int, shared: bool = False) -> bool:
    """Lock what is open, without waiting; returns False if another holds it, or locks are unsupported."""
    try:
        return lock_or_raise(descriptor, shared)
    except Held:
        return False


def lock_or_raise(descriptor: int, shared: bool = False) -> bool:
    """Lock what is open, without waiting; returns False if locks are unsupported, and raises Held if another holds it."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Held from None
    except OSError:  # as of a network's file system without locks
        return False
    return True
