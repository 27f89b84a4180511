"""TorchServe's setting `client_timeout`: disconnected clients' requests are not computed, and waiting ones hear
nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.request
from pathlib import Path
from typing import Callable, Iterator

import psutil
import pytest
from conftest import run_export
from traceserve.archives.archive import pack_archive
from traceserve.serving import configuration, instances, server
from traceserve.serving.instances import Instance
from workers import worker_pids

TIMEOUT = 2.0  # seconds
COUNT = 20
BODY = json.dumps({"text": "Where is my parcel today?"}).encode()


@pytest.fixture
def served(checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[Instance]:
    content = {"model_name": str(checkpoint("bert")), "max_length": 32, "client_timeout": int(1000 * TIMEOUT)}
    run_export(tmp_path / "tiny", {**content, "task": "sequence_classification", "allow_untrained_head": True})
    mar = pack_archive(tmp_path / "tiny", "tiny", tmp_path)
    instance = server.start([mar], port=configuration.free_ports(1)[0], timeout=90)
    yield instance
    instances.stop(instance)


def ask(instance: Instance) -> int:
    request = urllib.request.Request(
        f"{instance.url}/predictions/tiny", data=BODY, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return int(response.status)


def send(instance: Instance) -> socket.socket:
    """Send a request without reading its answer."""
    connection = socket.create_connection(("127.0.0.1", instance.port), timeout=3)
    head = f"POST /predictions/tiny HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
    connection.sendall(head.encode() + BODY)
    return connection


def computed(instance: Instance) -> float:
    """Return how many requests the worker has answered."""
    with urllib.request.urlopen(f"http://127.0.0.1:{instance.metrics_port}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("traceserve_requests_total{"))


def test_what_waited_too_long_is_not_computed(served: Instance) -> None:
    """Twenty clients hang up while the worker is busy: only the first of each later batch is computed."""
    assert ask(served) == 200
    [worker] = worker_pids(served)
    before = computed(served)
    psutil.Process(worker).suspend()
    try:
        busy = send(served)  # TorchServe passes it to the worker, and waits
        time.sleep(0.5)
        clients = [send(served) for _ in range(COUNT)]
        time.sleep(0.5)
        for client in clients[:-1]:
            client.close()
        time.sleep(TIMEOUT)
    finally:
        os.kill(worker, signal.SIGCONT)
    assert ask(served) == 200
    assert computed(served) - before < COUNT / 2  # at most 3: the busy one, the first that waited, and the last
    for waiting in (busy, clients[-1]):  # still connected, but without an answer
        with waiting, pytest.raises(TimeoutError):
            waiting.recv(1)
