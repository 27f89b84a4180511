"""kill -9 of the worker and of the JVM, under load: no wrong answer, nobody waits forever, and all is as before.

    python -m campaigns.killed [--rounds 5] [--clients 16] [--archive NAME.mar]

A killed worker comes back by itself; a killed server is told by `traceserve status`, leaves no process, and its port is free for
the next one.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import List, NamedTuple, Sequence

import psutil
from traceserve.measuring.answers import Consistency
from traceserve.serving import client, instances, server
from traceserve.serving.instances import Instance
from workers import worker_pids

from campaigns.aims import TRACESERVE, Aim, answer_to, archive_of, main_of, none_of, serving

TEXTS = [f"Parcel number {number} is late." for number in range(40)]
_PATIENCE = 30.0  # seconds that a client waits


class Tried(NamedTuple):
    """One request: when it ended, how long it took, and the status; 0 without an answer."""

    ended: float
    seconds: float
    status: int
    same: bool


class Clients:
    """So many who ask all the time, until `stop`; afterwards `tried` has what they got."""

    def __init__(self, instance: Instance, count: int) -> None:
        self.tried: List[Tried] = []
        self._instance, self._same, self._over = instance, Consistency(), threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        while not self._over.is_set():
            number += 1
            body, began, status, same = (
                json.dumps({"text": TEXTS[number % len(TEXTS)]}).encode(),
                time.monotonic(),
                0,
                True,
            )
            connection = http.client.HTTPConnection("127.0.0.1", self._instance.port, timeout=_PATIENCE)
            try:
                path = f"/predictions/{self._instance.names[0]}"
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer, status = response.read(), response.status
                same = status != 200 or self._same(body, answer)
            except (OSError, http.client.HTTPException):
                self._over.wait(0.05)
            finally:
                connection.close()
            self.tried.append(Tried(time.monotonic(), time.monotonic() - began, status, same))


def kill_workers(instance: Instance, rounds: int, clients: int) -> Sequence[Aim]:
    """Kill the worker again and again under load."""
    for text in TEXTS:
        answer_to(instance, text)
    asking = Clients(instance, clients)
    back: List[float] = []
    try:
        for _ in range(rounds):
            time.sleep(1.0)
            [worker] = worker_pids(instance)
            os.kill(worker, signal.SIGKILL)
            killed = time.monotonic()
            while True:
                time.sleep(0.1)
                good = [
                    each for each in list(asking.tried) if each.status == 200 and each.ended - each.seconds > killed
                ]
                if good or time.monotonic() - killed > 60:
                    back.append(time.monotonic() - killed)
                    break
    finally:
        asking.stop()
    tried = asking.tried
    failed = [each for each in tried if each.status != 200]
    hung = sum(each.seconds >= _PATIENCE for each in tried)
    return [
        Aim(f"kill -9 of the worker, {rounds} times, {clients} clients", "-", f"{len(tried):,} requests", True),
        none_of("wrong answers", sum(not each.same for each in tried), len(tried)),
        Aim(
            "failed, of which without any answer",
            "-",
            f"{len(failed)}, {sum(not each.status for each in failed)}",
            True,
        ),
        none_of(f"that waited {_PATIENCE:.0f} s", hung, len(tried)),
        Aim("answers again after", "15 s", f"{min(back):.1f} to {max(back):.1f} s", max(back) < 15, of_machine=True),
    ]


def kill_server(instance: Instance, archive: Path) -> Sequence[Aim]:
    """Kill the JVM, look what is left, and start the next one on its port."""
    process = instance.process
    assert process is not None
    family = [process, *process.children(recursive=True)]
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=15)
    told = subprocess.run([*TRACESERVE, "status"], capture_output=True, text=True)
    shown = str(instance.port) in told.stdout + told.stderr
    for survivor in alive:
        survivor.kill()
    began = time.monotonic()
    again = server.start([archive], port=instance.port, workers=1, timeout=300)
    seconds = time.monotonic() - began
    try:
        answered = bool(client.predict(again.address, again.names[0], {"text": TEXTS[0]}, 60.0))
    finally:
        instances.stop(again, at_once=True)
    return [
        none_of("processes that outlive a killed JVM", len(alive), len(family)),
        Aim("`traceserve status` tells it", "yes", "yes" if shown else "no", shown),
        Aim("another server on its port", "answers", f"after {seconds:.1f} s", answered),
        Aim(
            "its folder",
            "removed",
            "left" if Path(instance.folder, "store").exists() else "removed",
            not Path(instance.folder, "store").exists(),
        ),
    ]


def campaign(options: argparse.Namespace, folder: Path) -> Sequence[Aim]:
    """Both, one after the other."""
    archive = archive_of(options, folder)
    with serving(archive) as instance:
        found = kill_workers(instance, options.rounds, options.clients)
        return [*found, *kill_server(instance, archive)]


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="killed workers [%(default)s]")
    parser.add_argument("--clients", type=int, default=16, help="that ask meanwhile [%(default)s]")


if __name__ == "__main__":
    sys.exit(main_of(campaign, __doc__, options_of))
