"""The processes of a running TorchServe that hold models."""

from __future__ import annotations

import contextlib
from typing import List

import psutil
from traceserve.serving import stopping
from traceserve.serving.instances import Instance


def worker_pids(instance: Instance) -> List[int]:
    """Return their numbers, in order."""
    process = instance.process
    found = []
    with contextlib.suppress(psutil.Error):
        for child in process.children(recursive=True) if process is not None else ():
            with contextlib.suppress(psutil.Error):  # it may have ended
                if stopping.WORKER in " ".join(child.cmdline()):
                    found.append(child.pid)
    return sorted(found)
