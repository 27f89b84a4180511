"""What clients see when replicas and the proxy are killed, and versions are rolled out, under load.

    nox -s ray -- tests/ray_serve/test_faults.py -s

prints the counts. Each load's client sends a failed request once more, after a second.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import psutil
import pytest
from traceserve.serving import configuration, instances, server
from traceserve.serving.engines import RAY

from ray_serve.cluster import Cluster, Load, ask, kill, wait_until

BACK = 20.0  # seconds in which everything is to be as before
BODY = {"text": "Where is my parcel?"}
Counts = Dict[str, object]


@pytest.fixture(scope="module")
def cluster(archives: List[Path]) -> Iterator[Cluster]:
    """One archive in two replicas."""
    instance = server.start(archives[:1], port=configuration.free_ports(1)[0], workers=2, timeout=180, engine=RAY)
    yield Cluster(instance)
    instances.stop(instance)


def under_load(
    cluster: Cluster,
    expected: Dict[bytes, bytes],
    what: str,
    act: Callable[[], object],
    back: Callable[[], bool],
    seconds: float = 12.0,
) -> Counts:
    """Return the counts of a load during which `act` happens, and the seconds until everything was as before."""
    load = Load(cluster, expected, seconds)
    time.sleep(2)
    began = time.monotonic()
    act()
    wait_until(back, 60)
    ended = time.monotonic()
    found = load.counts()
    assert load.result is not None
    last = max((load.began + moment for moment in load.result.failures), default=began)
    found["back after"] = round(max(ended, last) - began, 1)
    print(f"\n{what}: {found}")
    assert ended < load.began + seconds, "the load ended before everything was as before"
    return found


def none_lost(found: Counts, first: bool) -> bool:
    """No answer was wrong, and none missing after one retry; `first`: and no retry was needed."""
    return (
        found["failed"] == found["wrong"] == 0
        and int(str(found["requests"])) > 100
        and float(str(found["back after"])) <= BACK
        and (not first or found["failed at first"] == 0)
    )


def test_a_replica_is_killed(cluster: Cluster, expected: Dict[bytes, bytes]) -> None:
    before, victim = cluster.up(), cluster.replicas()[0]
    found = under_load(
        cluster,
        expected,
        "a replica killed",
        lambda: kill([victim]),
        lambda: len(cluster.up()) == len(before) == 2 and cluster.up() != before,
        20.0,
    )
    assert none_lost(found, first=False)


def test_the_proxy_is_killed(cluster: Cluster, expected: Dict[bytes, bytes]) -> None:
    before, proxies = cluster.up(), cluster.proxies()
    assert proxies
    found = under_load(
        cluster,
        expected,
        "HAProxy killed",
        lambda: kill(proxies),
        lambda: cluster.up() == before and len(cluster.proxies()) == 1,
        20.0,
    )
    assert none_lost(found, first=False)


def test_the_proxys_actor_is_killed(cluster: Cluster, expected: Dict[bytes, bytes]) -> None:
    """Its HAProxy, which would hear of no replica from then on, ends or makes way for the next one."""
    before, old = cluster.up(), {each.pid for each in cluster.proxies()}
    actors = cluster.named("HAProxyManager")
    assert actors
    found = under_load(
        cluster,
        expected,
        "HAProxy's actor killed",
        lambda: kill(actors),
        lambda: (
            cluster.up() == before
            and len(cluster.proxies()) == 1
            and not old & {each.pid for each in cluster.proxies()}
        ),
        20.0,
    )
    assert none_lost(found, first=False)


@pytest.mark.parametrize("replicas", [2, 1])
def test_a_new_version_is_rolled_out(
    cluster: Cluster, archives: List[Path], expected: Dict[bytes, bytes], replicas: int
) -> None:
    """Also where a single replica answers: the new one starts before the old one ends."""
    version = "2.0" if replicas == 2 else "1.0"
    if replicas == 1:
        cluster.deploy(archives[1], "2.0", 1)
        wait_until(lambda: len(cluster.up()) == len(cluster.replicas()) == 1, 60)
    before = cluster.up()
    found = under_load(
        cluster,
        expected,
        f"version {version} rolled out to {replicas} replicas",
        lambda: cluster.deploy(archives[0 if version == "1.0" else 1], version, replicas),
        lambda: len(cluster.up()) == replicas and not cluster.up() & before,
        45.0,
    )
    found["back after"] = 0.0  # no time is set for it
    assert none_lost(found, first=True)
    assert ask(cluster.instance.port, f"/predictions/intents/{version}", BODY).status == 200


def test_without_any_replica_clients_are_told_to_try_again(cluster: Cluster) -> None:
    """What was on its way to a killed replica gets no answer; what comes later waits for the next replica, or is refused."""
    victims = cluster.replicas()
    kill(victims)
    psutil.wait_procs(victims, timeout=10)
    began, replies = time.monotonic(), []
    while not replies or replies[-1].status != 200:
        assert time.monotonic() - began < BACK
        with contextlib.suppress(ConnectionError):
            replies.append(ask(cluster.instance.port, "/predictions/intents", BODY))
    print(f"\nno replica: {[reply.status for reply in replies]} in {time.monotonic() - began:.1f} s")
    for reply in replies[:-1]:
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert reply.json["error"]["type"] == "Unavailable"
