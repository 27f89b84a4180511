"""Two nodes on this machine, the head that `traceserve serve` starts and another raylet, which is killed under load.

The raylets share the loopback address, so what depends on several machines' networks is not tested.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List

import psutil
import pytest
from traceserve.serving import configuration, instances, server
from traceserve.serving.engines import RAY

from ray_serve.cluster import Cluster, Load, kill, wait_until

LONGEST = 180.0  # seconds


@pytest.fixture
def cluster(archives: List[Path]) -> Iterator[Cluster]:
    instance = server.start(archives[:1], port=configuration.free_ports(1)[0], workers=1, timeout=180, engine=RAY)
    yield Cluster(instance)
    instances.stop(instance)


@pytest.fixture
def node(cluster: Cluster) -> Iterator[psutil.Process]:
    """A node of as many cores as the head."""
    agent, metrics = configuration.free_ports(2)
    command = [sys.executable, str(Path(__file__).with_name("node.py")), "start", "--block", "--disable-usage-stats"]
    command += [f"--address={cluster.address}", "--node-ip-address=127.0.0.1", f"--num-cpus={os.cpu_count()}"]
    command += [f"--object-store-memory={80 << 20}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
    log = Path(cluster.instance.folder, "logs", "node.log")
    with log.open("wb") as stream:
        started = subprocess.Popen(
            command,
            # With 0, the head's setting, Ray starts no further node.
            env={**cluster.variables, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            cwd=log.parent,
        )
    process = psutil.Process(started.pid)
    try:
        wait_until(lambda: "Ray runtime started" in log.read_text(errors="replace") or started.poll() is not None, 60)
        assert started.poll() is None, log.read_text(errors="replace")
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            kill([*process.children(recursive=True), process])
        started.wait()


def test_a_node_is_lost_under_load(
    cluster: Cluster, node: psutil.Process, archives: List[Path], expected: Dict[bytes, bytes]
) -> None:
    """The head's replica answers meanwhile, and the lost one gets a successor on the head, which has room for one more."""
    cores = os.cpu_count() or 1
    cluster.deploy(archives[1], "2.0", 2, cores)
    wait_until(lambda: len(cluster.up()) == 2, 90)
    family = [*node.children(recursive=True), node]
    away = [each for each in family if each.is_running() and "ray::ServeReplica" in " ".join(each.cmdline())]
    assert len(away) == 1, "Serve spreads replicas over nodes"
    before = cluster.up()
    with Load(cluster, expected, LONGEST) as load:
        time.sleep(2)
        began = time.monotonic()
        kill(family)
        wait_until(lambda: len(cluster.up()) == 2 and cluster.up() != before, LONGEST - 30)
        back = time.monotonic() - began
        time.sleep(3)
        assert load.runs
        found = load.counts()
    print(f"\na node lost: {found}, as before after {back:.1f} s")
    assert found["failed"] == found["wrong"] == 0 and int(str(found["requests"])) > 100
