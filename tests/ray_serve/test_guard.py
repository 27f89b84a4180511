"""The guard of a cluster, with a real HAProxy and any command instead of the cluster."""

from __future__ import annotations

import contextlib
import http.client
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator, List

import psutil
import pytest
from traceserve.serving import configuration, ray_guard
from traceserve.serving.ray_cluster import _real_haproxy

from ray_serve.cluster import wait_until

CONFIGURATION = """global
    stats socket {run}/admin.sock
defaults
    mode http
    timeout connect 10s
    timeout client 60s
    timeout server 60s
frontend http_frontend
    bind 127.0.0.1:{port}
    http-request wait-for-body time 60s if METH_POST
    http-request return status 200 content-type text/plain string "answered"
"""


# The lines of Ray's that matter, as `ray_cluster` changed them.
RAYS = """global
    stats socket /run/admin.sock mode 666 level admin expose-fd listeners
    stats timeout 30s
    maxconn 20000
defaults
    mode http
frontend prometheus
    bind 127.0.0.1:7001
    mode http
frontend http_frontend
    bind 127.0.0.1:7000
    default_backend default
backend default
    server proxy 127.0.0.1:7002 check backup
listen stats
    bind 127.0.0.1:7003
    stats enable
    stats uri /stats
"""


def guarding(run: Path, code: str) -> List[str]:
    """The command of a guard whose cluster is some Python."""
    guard = [sys.executable, "-m", "traceserve.serving.ray_guard", str(run), _real_haproxy()]
    return [*guard, sys.executable, "-S", "-c", code]


class Guarded:
    """A running guard, whose HAProxy's end is what the file of its process says."""

    def __init__(self, run: Path) -> None:
        self.run, self.port = run, configuration.free_ports(1)[0]
        self.process = psutil.Popen(guarding(run, "import time; time.sleep(600)"), stderr=subprocess.DEVNULL)

    def configured(self) -> None:
        text = CONFIGURATION.format(run=self.run, port=self.port)
        (self.run / ray_guard.LAST).write_text(text)

    def ended(self) -> None:
        """A HAProxy was started, and has ended."""
        with subprocess.Popen(["true"]) as process:
            pass
        (self.run / ray_guard.PID).write_text(str(process.pid))

    def proxies(self) -> List[psutil.Process]:
        return [each for each in self.process.children() if each.name() == "haproxy"]

    def answers(self) -> bool:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            with contextlib.suppress(OSError):
                connection.request("GET", "/")
                return connection.getresponse().read() == b"answered"
        return False

    def noted(self) -> str:
        with contextlib.suppress(OSError):
            return (self.run / ray_guard.STAND_IN_PID).read_text()
        return ""


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    found = Guarded(tmp_path)
    yield found
    family = found.process.children(recursive=True)
    found.process.terminate()
    try:
        found.process.wait(10)
        assert psutil.wait_procs(family, timeout=5)[1] == [], "the guard's end ends the stand-ins too"
    finally:
        for each in [*family, found.process]:
            with contextlib.suppress(psutil.Error):
                each.kill()


def test_a_configuration_that_cannot_be_read_yet_is_tried_again(guarded: Guarded) -> None:
    guarded.ended()
    time.sleep(1)
    assert not guarded.answers()
    guarded.configured()
    wait_until(guarded.answers, 10)
    assert guarded.noted() == " ".join(str(each.pid) for each in guarded.proxies())


def test_a_second_end_gets_a_stand_in_while_the_first_one_finishes_its_requests(guarded: Guarded) -> None:
    guarded.configured()
    guarded.ended()
    wait_until(guarded.answers, 10)
    [first] = guarded.proxies()
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n1")
        time.sleep(0.5)
        first.send_signal(signal.SIGUSR1)  # by the next HAProxy, once it listens
        wait_until(lambda: not guarded.answers(), 10)
        assert first.is_running()
        guarded.ended()
        wait_until(guarded.answers, 10)
        assert len(guarded.proxies()) == 2 and guarded.noted().split()[0] == str(first.pid)
        client.sendall(b"2")
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
    wait_until(lambda: len(guarded.proxies()) == 1 and guarded.noted() == str(guarded.proxies()[0].pid), 10)
    wait_until(guarded.answers, 10)


def test_a_stand_in_that_no_later_proxy_could_end_does_not_stay(guarded: Guarded) -> None:
    """Its file cannot be written for a while: a folder has its name."""
    guarded.configured()
    (guarded.run / ray_guard.STAND_IN_PID).mkdir()
    guarded.ended()
    time.sleep(1)
    (guarded.run / ray_guard.STAND_IN_PID).rmdir()
    wait_until(lambda: bool(guarded.noted()), 10)
    assert [str(each.pid) for each in guarded.proxies()] == guarded.noted().split()
    wait_until(guarded.answers, 10)


def test_a_stand_in_has_no_socket_but_the_door() -> None:
    """What tells Ray of a running HAProxy would hide that the real one is gone."""
    assert (
        ray_guard.stand_in(RAYS)
        == """global
    maxconn 20000
defaults
    mode http
frontend prometheus
    mode http
frontend http_frontend
    bind 127.0.0.1:7000
    default_backend default
backend default
    server proxy 127.0.0.1:7002 check backup
"""
    )
    plain = CONFIGURATION.replace("    stats socket {run}/admin.sock\n", "")
    assert ray_guard.stand_in(plain) == plain


def test_a_guard_ends_as_its_cluster_does(tmp_path: Path) -> None:
    assert subprocess.run(guarding(tmp_path, "raise SystemExit(7)")).returncode == 7


def test_a_guard_that_is_told_of_the_end_starts_no_stand_in(guarded: Guarded) -> None:
    guarded.configured()
    guarded.ended()
    wait_until(guarded.answers, 10)  # it watches
    [first] = guarded.proxies()
    guarded.process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    guarded.ended()
    time.sleep(1)
    assert guarded.proxies() == [first]


def test_a_proxy_that_nobody_has_waited_for_has_ended(guarded: Guarded) -> None:
    guarded.configured()
    process = subprocess.Popen(["true"])
    try:
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, 10)
        (guarded.run / ray_guard.PID).write_text(str(process.pid))
        wait_until(guarded.answers, 10)
    finally:
        process.wait()
