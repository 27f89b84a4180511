"""Ending a server's processes: it finishes running requests first, unless it must end at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Iterator, List

import psutil

# Programs of our servers: the JVM and its starter, Ray's daemons and their starter.
_SERVERS = (
    "org.pytorch.serve.ModelServer",
    "ts.model_server",
    "ray.scripts.scripts",
    "gcs_server",
    "raylet",
    "haproxy",
)
_SECONDS_TO_FINISH = 15
# TorchServe's workers may go on for so long before it is told to end, and are at rest if they take less than this share of a
# core, and no thread waits for one, for so many whiles in a row: between two batches a busy worker may seem at rest.
_SECONDS_TO_REST, _RESTING, _WHILE, _WHILES = 40.0, 0.2, 0.3, 3
_WAITING = ("R", "D")  # states of a thread that runs or may run, or waits for a disk
WORKER = "model_service_worker"  # in the command line of TorchServe's workers
_GUARD = "traceserve.serving.ray_guard"  # the first process of a cluster
_DRAINED = "haproxy"  # finishes running requests on SIGUSR1
_CONTROLLER = "ray::ServeController"  # kills and replaces a HAProxy that does not answer for some seconds


def end_server(process: psutil.Process, at_once: bool) -> None:
    """End a server and its workers, at once or when they have finished running requests; an interrupt only ends the
    waiting."""
    drained = at_once
    try:
        if not at_once:
            drained = _drain(process)
            if not drained:
                _rest(process)
    finally:
        _end([process], drained)


def end_all_in(folder: Path) -> None:
    """Immediately end every server that was started on this folder."""
    _end(list(_started_in(folder)), at_once=True)


def _started_in(folder: Path) -> Iterator[psutil.Process]:
    """Yield a server's starter and daemons: a path in the folder is among their arguments."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            arguments = process.cmdline()
            names = {Path(argument).name for argument in arguments[:1]} | set(arguments)
            if not names.isdisjoint(_SERVERS) and any(f"{folder}{os.sep}" in argument for argument in arguments):
                yield process


def _drain(process: psutil.Process) -> bool:
    """Let a cluster's HAProxy finish its running requests; return whether there was one."""
    proxies = []
    with contextlib.suppress(psutil.Error):
        if _GUARD not in process.cmdline():
            return False
        process.send_signal(signal.SIGUSR1)  # its HAProxy needs no stand-in from now on
        children = process.children(recursive=True)
        proxies = [child for child in children if _is_proxy(child)]
        for controller in (child for child in children if proxies and _is_controller(child)):
            controller.suspend()
    for proxy in proxies:
        with contextlib.suppress(psutil.Error):
            proxy.send_signal(signal.SIGUSR1)
    psutil.wait_procs(proxies, timeout=_SECONDS_TO_FINISH)
    return bool(proxies)


def _rest(process: psutil.Process) -> None:
    """Wait until TorchServe's workers have nothing to do.

    It drops what they are at once it is told to end (seen with 0.12), and says of no request that it is being answered.
    """
    deadline, workers = time.monotonic() + _SECONDS_TO_REST, []
    with contextlib.suppress(psutil.Error):
        workers = [child for child in process.children(recursive=True) if _is_worker(child)]
    for worker in workers:
        _is_busy(worker)  # its share counts from here on
    quiet = 0
    while workers and quiet < _WHILES and time.monotonic() < deadline:
        time.sleep(_WHILE)
        busy = [_is_busy(worker) for worker in workers]
        quiet = 0 if any(busy) else quiet + 1


def _is_busy(worker: psutil.Process) -> bool:
    """Return whether a worker took a share of a core since it was last looked at, or would have, had it got one."""
    with contextlib.suppress(psutil.Error):
        return bool(worker.cpu_percent() >= 100 * _RESTING) or _is_starved(worker)
    return False


def _is_starved(process: psutil.Process) -> bool:
    """Return whether one of its threads waits for a core, as under load or a quota, or for a disk (Linux)."""
    with contextlib.suppress(OSError):
        return any(_state_of(thread) in _WAITING for thread in Path(f"/proc/{process.pid}/task").iterdir())
    return False


def _state_of(thread: Path) -> str:
    with contextlib.suppress(OSError):  # it has ended
        return (thread / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    return ""


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return WORKER in " ".join(process.cmdline())
    return False


def _is_proxy(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.name() == _DRAINED)
    return False


def _is_controller(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).startswith(_CONTROLLER)
    return False


def _end(processes: List[psutil.Process], at_once: bool) -> None:
    family = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [process, *process.children(recursive=True)]
            if not at_once:
                process.terminate()
    _, alive = psutil.wait_procs(family, timeout=0 if at_once else _SECONDS_TO_FINISH)
    for survivor in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    psutil.wait_procs(alive, timeout=5)
