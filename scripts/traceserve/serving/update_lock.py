"""What changes a running server happens alone: an update, and the rotation of its keys."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Iterator

from traceserve.errors import ServerError
from traceserve.serving import instances
from traceserve.serving.instances import Instance

if sys.platform != "win32":
    import fcntl

_FILE = "update.lock"  # in the server's folder


@contextlib.contextmanager
def alone(instance: Instance) -> Iterator[Instance]:
    """Hold the server's lock, and yield the server as it is remembered then; raises ServerError if another process has it.

    The system releases it with this process.
    """
    lock = os.open(Path(instance.folder, _FILE), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if sys.platform != "win32":
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ServerError(
                    f"the server on port {instance.port} is being changed: another `traceserve update`, or `traceserve keys "
                    "--rotate`, is running; wait until it has ended"
                ) from None
        yield instances.as_remembered(instance)
    finally:
        os.close(lock)
