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

# Seconds. How long it takes until everything is as before is printed: on a busy machine it is no fault.
LONGEST = 180.0  # of a load
AFTER = 3.0  # for which the load goes on then
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
) -> Counts:
    """Return the counts of a load from two seconds before `act` to some after everything was as before, and the seconds
    between these."""
    with Load(cluster, expected, LONGEST) as load:
        time.sleep(2)
        began = time.monotonic()
        act()
        wait_until(back, LONGEST - 30)
        ended = time.monotonic()
        time.sleep(AFTER)
        assert load.runs, "the load ended before everything was as before"
        found = load.counts()
        assert load.result is not None
        last = max((load.began + moment for moment in load.result.failures), default=began)
        print(f"\n{what}: {found}, back after {max(ended, last) - began:.1f} s")
        return found


def none_lost(found: Counts, first: bool) -> bool:
    """No answer was wrong, and none missing after one retry; `first`: and no retry was needed."""
    return (
        found["failed"] == found["wrong"] == 0
        and int(str(found["requests"])) > 100
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
    )
    assert none_lost(found, first=True)
    assert ask(cluster.instance.port, f"/predictions/intents/{version}", BODY).status == 200


def test_without_any_replica_clients_are_told_to_try_again(cluster: Cluster) -> None:
    """What was on its way to a killed replica gets no answer; what comes later waits for the next replica, or is refused."""
    victims = cluster.replicas()
    kill(victims)
    psutil.wait_procs(victims, timeout=10)
    began, replies = time.monotonic(), []
    while not replies or replies[-1].status != 200:
        assert time.monotonic() - began < LONGEST
        with contextlib.suppress(ConnectionError):
            replies.append(ask(cluster.instance.port, "/predictions/intents", BODY))
    print(f"\nno replica: {[reply.status for reply in replies]} in {time.monotonic() - began:.1f} s")
    for reply in replies[:-1]:
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert reply.json["error"]["type"] == "Unavailable"
