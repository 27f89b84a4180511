"""`traceserve stop`: running requests are finished, and nothing of a cluster stays."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from pathlib import Path
from typing import Iterator, List

import psutil
import pytest
from traceserve.serving import configuration, instances, server
from traceserve.serving.engines import RAY
from traceserve.serving.instances import Instance

from ray_serve.cluster import Cluster, ask, kill, wait_until

BODY = json.dumps({"text": "Where is my parcel?"}).encode()


@pytest.fixture
def cluster(archives: List[Path]) -> Iterator[Cluster]:
    instance = server.start(archives[:1], port=configuration.free_ports(1)[0], workers=1, timeout=180, engine=RAY)
    yield Cluster(instance)
    instances.stop(instance, at_once=True)


def belonging(instance: Instance) -> List[psutil.Process]:
    """All processes of a cluster, whoever is their parent: the guard's session is theirs."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, IndexError):
            status = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            if int(status[3]) == instance.pid and status[0] != "Z":
                found.append(process)
    return found


def test_a_long_request_is_finished(cluster: Cluster) -> None:
    """One that takes longer than Ray waits for a HAProxy that does not answer it any more."""
    connection = http.client.HTTPConnection("127.0.0.1", cluster.instance.port, timeout=60)
    connection.putrequest("POST", "/predictions/intents")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(BODY)))
    connection.endheaders(BODY[:5])
    time.sleep(0.5)
    stopping = threading.Thread(target=instances.stop, args=(cluster.instance,))
    stopping.start()
    with contextlib.closing(connection):
        time.sleep(8)
        assert stopping.is_alive(), "it waits for the request"
        with pytest.raises(ConnectionRefusedError):
            ask(cluster.instance.port, "/health")
        connection.send(BODY[5:])
        response = connection.getresponse()
        assert response.status == 200 and json.loads(response.read())["label"]
    stopping.join(20)
    assert not stopping.is_alive() and belonging(cluster.instance) == []


def test_a_cluster_without_its_first_process_is_ended(cluster: Cluster) -> None:
    assert ask(cluster.instance.port, "/health").status == 200
    assert len(belonging(cluster.instance)) > 5
    kill([cluster.head])
    wait_until(lambda: cluster.instance.process is None, 10)
    instances.stop(cluster.instance)
    wait_until(lambda: belonging(cluster.instance) == [], 10)
    with pytest.raises(ConnectionRefusedError):
        ask(cluster.instance.port, "/health")
