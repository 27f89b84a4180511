"""What changes a running server happens alone: an update, and the rotation of its keys."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Iterator, Set, Tuple

from traceserve.errors import ServerError
from traceserve.machine import file_locks
from traceserve.serving import instances
from traceserve.serving.instances import Instance

_FILE = "update.lock"  # in the server's folder
_HELD: Set[int] = set()


def locks_held() -> Tuple[int, ...]:
    """Return the descriptors of the locks that this process holds: a child that gets them (`pass_fds`) holds them too, also
    where this process is killed and the child goes on."""
    return tuple(_HELD)


@contextlib.contextmanager
def alone(instance: Instance) -> Iterator[Instance]:
    """Hold the server's lock, if its folder can be locked, and yield the server as it is remembered then; raises ServerError if
    another process has it, or the server has ended.

    The system releases it with this process, and with the children that got it.
    """
    try:
        lock = os.open(Path(instance.folder, _FILE), os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:  # with the server's folder
        raise instances.has_ended(instance) from None
    try:
        try:
            if file_locks.lock_or_raise(lock):
                _HELD.add(lock)
        except file_locks.Held:
            raise ServerError(
                f"the server on port {instance.port} is being changed: another `traceserve update`, or `traceserve keys "
                "--rotate`, is running; wait until it has ended"
            ) from None
        yield instances.as_remembered(instance)
    finally:
        _HELD.discard(lock)
        os.close(lock)
