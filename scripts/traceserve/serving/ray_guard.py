"""Runs a Ray cluster, and answers in its HAProxy's stead while that is gone.

    python -m traceserve.serving.ray_guard RUN HAPROXY COMMAND...

Ray starts an ended HAProxy again, but needs up to ten seconds, in which connections would be refused. RUN is the folder in which
the program that starts HAProxy leaves `haproxy.pid` and `last.cfg`; HAPROXY is the real program; COMMAND starts the
cluster. All of the cluster's processes descend from this one. It ends with the cluster, whose exit status it returns.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import List, Optional, Sequence

import psutil

PID, LAST, STAND_IN, STAND_IN_PID = "haproxy.pid", "last.cfg", "stand-in.cfg", "stand-in.pid"
_POLL = 0.1  # seconds
# The sockets of HAProxy that Ray asks whether it runs, and its statistics: Ray must miss the one that it started.
_OF_THE_REAL_ONE = re.compile(r"^ *(stats socket .*|stats timeout .*|bind 127\.0\.0\.1:\d+)\n", re.MULTILINE)


class Guard:
    """A running cluster, and the stand-ins of its HAProxy: the latest, and earlier ones that finish their requests."""

    def __init__(self, run: Path, haproxy: str, command: Sequence[str]) -> None:
        self._run, self._haproxy = run, haproxy
        self._cluster = subprocess.Popen(list(command))
        self._watched: Optional[psutil.Process] = None
        self._missed: Optional[int] = None  # the process that the stand-in stands for
        self._stand_ins: List[subprocess.Popen[bytes]] = []
        self._stopping = False

    def watch(self) -> int:
        """Return the cluster's exit status once it has ended."""
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGUSR1, self._stop)
        try:
            while self._cluster.poll() is None:
                with contextlib.suppress(OSError):  # as while a file is written; the cluster must not end for it
                    self._look()
                time.sleep(_POLL)
        finally:
            for each in self._stand_ins:
                each.kill()
        return self._cluster.returncode

    def _look(self) -> None:
        running = [each for each in self._stand_ins if each.poll() is None]
        if running != self._stand_ins:
            self._note(running)
        pid = _pid(self._run / PID)
        # Whether it stops is asked last: HAProxy may have ended for that very reason.
        if pid is None or pid == self._missed or self._runs(pid) or self._stopping:
            return
        text = (self._run / LAST).read_text(encoding="utf-8")
        (self._run / STAND_IN).write_text(stand_in(text), encoding="utf-8")
        command = [self._haproxy, "-db", "-f", str(self._run / STAND_IN)]
        if running:  # the HAProxy that has just ended may have told them to end
            command += ["-sf", *(str(each.pid) for each in running)]
        started = subprocess.Popen(command)
        try:
            self._note([*running, started])
        except OSError:  # no later HAProxy would end it
            started.kill()
            started.wait()
            raise
        self._missed = pid  # only once: a configuration that HAProxy refuses ends the stand-in too

    def _note(self, running: List[subprocess.Popen[bytes]]) -> None:
        """Write down the running stand-ins: the next HAProxy ends them once it listens itself."""
        file = self._run / STAND_IN_PID
        if running:
            new = file.with_suffix(".new")
            new.write_text(" ".join(str(each.pid) for each in running), encoding="ascii")
            new.replace(file)
        else:
            file.unlink(missing_ok=True)
        self._stand_ins = running

    def _runs(self, pid: int) -> bool:
        with contextlib.suppress(psutil.Error):
            if self._watched is None or self._watched.pid != pid:
                self._watched = psutil.Process(pid)
            return bool(self._watched.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
        return False

    def _end(self, number: int, frame: Optional[FrameType]) -> None:
        self._stopping = True
        self._cluster.terminate()

    def _stop(self, number: int, frame: Optional[FrameType]) -> None:
        self._stopping = True


def stand_in(text: str) -> str:
    """Return a HAProxy's configuration without its sockets for Ray."""
    shared, listen, statistics = text.partition("\nlisten stats")
    del statistics  # its last section
    head, door, rest = shared.partition("\nfrontend http_frontend")
    return _OF_THE_REAL_ONE.sub("", head) + door + rest + ("\n" if listen else "")


def _pid(file: Path) -> Optional[int]:
    with contextlib.suppress(FileNotFoundError, ValueError):  # not there yet, or being written
        return int(file.read_text(encoding="ascii"))
    return None


def guard(arguments: Sequence[str]) -> int:
    """Run the command of these arguments, and return its exit status."""
    run, haproxy, *command = arguments
    return Guard(Path(run), haproxy, command).watch()


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
