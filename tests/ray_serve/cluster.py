"""A Ray Serve that `traceserve serve` started, seen from outside: its processes, its replicas; and load on it."""

from __future__ import annotations

import contextlib
import csv
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set

import psutil
from http_reply import Reply
from traceserve.measuring.answers import same_answer
from traceserve.measuring.load_generator import WRONG, Endpoint, Result, send_load
from traceserve.serving.instances import Instance
from traceserve_hosts import ray_config


@dataclass(frozen=True)
class Cluster:
    """A server with one archive."""

    instance: Instance

    @property
    def head(self) -> psutil.Process:
        process = self.instance.process
        assert process is not None
        return process

    @property
    def variables(self) -> Dict[str, str]:
        """The environment of the cluster, with its token."""
        return self.head.environ()

    @property
    def address(self) -> str:
        [port] = [part.partition("=")[2] for part in self.head.cmdline() if part.startswith("--port=")]
        return f"127.0.0.1:{port}"

    def deploy(self, archive: Path, version: str, replicas: int, cores: float = 1.0) -> None:
        """Roll out an archive, as `python -m traceserve_hosts.ray_cluster` does for everybody."""
        own = ray_config.Replicas(replicas, replicas, cores)
        hosted = ray_config.Hosted(str(archive), self.instance.names[0], version, replicas=own)
        config = {
            "http": {"host": "127.0.0.1", "port": self.instance.port},
            "applications": ray_config.applications([hosted]),
        }
        file = Path(self.instance.folder, "run", "rolled-out.json")
        file.write_text(json.dumps(config))
        command = [sys.executable, "-m", "traceserve_hosts.ray_cluster", self.address, str(file)]
        result = subprocess.run(command, env=self.variables, capture_output=True, text=True, timeout=180)
        assert result.returncode == 0, result.stderr

    def processes(self) -> Iterator[psutil.Process]:
        yield self.head
        yield from self.head.children(recursive=True)

    def named(self, part: str) -> List[psutil.Process]:
        """The processes with this in their command line."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if part in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def replicas(self) -> List[psutil.Process]:
        return self.named("ray::ServeReplica")

    def proxies(self) -> List[psutil.Process]:
        """HAProxy's processes."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.name() == "haproxy" and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def up(self) -> Set[str]:
        """The replicas to which HAProxy sends requests."""
        url = f"http://127.0.0.1:{self.variables['RAY_SERVE_HAPROXY_STATS_PORT']}/stats;csv"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
            rows = list(csv.DictReader(io.StringIO(response.read().decode().lstrip("# "))))
            own = [row for row in rows if row["svname"] not in ("FRONTEND", "BACKEND") and row["bck"] == "0"]
            return {row["svname"] for row in own if row["status"].startswith("UP")}
        return set()


class Load:
    """A load that runs until it is ended, or for `most` seconds; its client sends a failed request once more, after a
    second. As a context it ends with its block, also where that fails."""

    def __init__(self, cluster: Cluster, expected: Dict[bytes, bytes], most: float, connections: int = 8) -> None:
        self.result: Optional[Result] = None
        self.began = time.monotonic()
        self._ended = threading.Event()

        def run() -> None:
            self.result = send_load(
                Endpoint(f"{cluster.instance.url}/predictions/{cluster.instance.names[0]}"),
                list(expected),
                connections=connections,
                seconds=most,
                warm_up=0.0,
                timeout=30.0,
                retries=1,
                check=lambda body, answer: same_answer(expected[body], answer),
                ended=self._ended,
            )

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def runs(self) -> bool:
        return self._thread.is_alive()

    def counts(self) -> Dict[str, object]:
        """End it, and count."""
        self._ended.set()
        self._thread.join()
        assert self.result is not None
        wrong = self.result.errors.get(WRONG, 0)
        return {
            "requests": self.result.requests + self.result.failed,
            "failed at first": len(self.result.failures),
            "answered when sent again": self.result.retried,
            "failed": self.result.failed - wrong,
            "wrong": wrong,
            "reasons": dict(self.result.errors),
        }


def kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            os.kill(process.pid, signal.SIGKILL)


def wait_until(reached: Callable[[], bool], seconds: float) -> float:
    """Return how long it took; fails after `seconds`."""
    began = time.monotonic()
    while not reached():
        assert time.monotonic() - began < seconds, f"not reached in {seconds} s"
        time.sleep(0.1)
    return time.monotonic() - began


def ask(port: int, path: str, body: Any = None, method: Optional[str] = None, **headers: str) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        sent = None if body is None else json.dumps(body)
        own = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
        connection.request(method or ("GET" if sent is None else "POST"), path, sent, own)
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
