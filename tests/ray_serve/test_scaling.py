"""`traceserve serve --engine ray --most-workers`: replicas are added as requests wait, and end when fewer do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Dict, List

import pytest
from traceserve.errors import ServerError
from traceserve.serving import configuration, instances, server
from traceserve.serving.engines import RAY
from traceserve.serving.plan import Scaling

from ray_serve.cluster import Cluster, Load, wait_until


def test_replicas_come_and_go_with_the_load(archives: List[Path], expected: Dict[bytes, bytes]) -> None:
    instance = server.start(
        archives[:1],
        port=configuration.free_ports(1)[0],
        workers=1,
        timeout=180,
        engine=RAY,
        scaling=Scaling(most=2, ongoing=2),
    )
    try:
        cluster = Cluster(instance)
        assert len(cluster.up()) == 1
        with Load(cluster, expected, 120.0, connections=16) as load:
            seconds = wait_until(lambda: len(cluster.up()) == 2, 90)
            time.sleep(10)  # both answer
            found = load.counts()
        print(f"\nscaled up: {found}, after {seconds:.1f} s")
        assert found["failed at first"] == found["failed"] == found["wrong"] == 0 < found["requests"]
        wait_until(lambda: len(cluster.up()) == 1, 180)
    finally:
        instances.stop(instance)


def test_what_cannot_scale_is_refused(archives: List[Path]) -> None:
    with pytest.raises(ServerError, match="--most-workers 1 is less than the 2 workers"):
        server.start(archives[:1], port=1025, workers=2, engine=RAY, scaling=Scaling(most=1))
    with pytest.raises(ServerError, match="--gpus is for archives built for GPUs; intents is for cpu"):
        server.start(archives[:1], port=1025, engine=RAY, scaling=Scaling(gpus=0.5))
    with pytest.raises(ServerError, match="are for --engine ray"):
        server.start(archives[:1], port=1025, scaling=Scaling(most=2))
