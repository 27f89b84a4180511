"""An update on Ray Serve, as far as it goes without Ray: what it refuses, and what it asks of the cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, cast

import psutil
import pytest
from test_client import answering
from test_instances import processes, remembered, state  # noqa: F401  (fixtures)
from traceserve.checking.proof import Proof
from traceserve.errors import ServerError
from traceserve.rollout.engines import on_ray
from traceserve.rollout.updating import UpdateOptions, _Update
from traceserve.serving import client, ray_applications, ray_cluster, server
from traceserve.serving.engines import RAY
from traceserve.serving.front import FrontendOptions
from traceserve.serving.instances import Instance
from traceserve.serving.plan import Archive, ServerPlan, planned
from traceserve.serving.update_lock import alone
from traceserve_hosts import ray_config

OLD = "0.9"  # the running version of `tiny`, in two replicas of a core each
Change = Dict[str, Any]


@pytest.fixture
def cluster(processes: List[subprocess.Popen[bytes]]) -> Instance:  # noqa: F811
    """What a cluster with room for three cores leaves in its folder; its process only sleeps, and nothing listens."""
    asleep = [sys.executable, "-S", "-c", "import time; time.sleep(600)", "--port=1", "--num-cpus=3"]
    process = subprocess.Popen(asleep)
    processes.append(process)
    began = psutil.Process(process.pid).create_time()
    instance = dataclasses.replace(remembered(processes), engine=RAY, pid=process.pid, started=began)
    serve_also(instance)
    return instance


def serve_also(instance: Instance, *others: ray_config.Hosted) -> None:
    """Let these be served beside `tiny`."""
    own = ray_config.Hosted("/old", "tiny", OLD, replicas=ray_config.Replicas(2, 2, surge=0))
    config = {"http": {}, "applications": ray_config.applications([own, *others])}
    ray_applications.remember_applications(Path(instance.folder), config)


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> List[Change]:
    """What is asked of Ray."""
    found: List[Change] = []
    monkeypatch.setattr(ray_applications, "change_applications", lambda instance, change, *rest: found.append(change))
    monkeypatch.setattr(ray_cluster.processor, "cores", lambda: 2)
    return found


@pytest.fixture
def archive(mar: Path) -> Callable[[int], Archive]:
    """The next version, with so many workers."""
    return lambda workers: planned([mar], None, workers, False)["tiny"]


def switched_to(instance: Instance, version: str) -> on_ray._KnownVersions:
    """Remember that an update began with OLD, and put `version` into its place while requests named OLD."""
    [application] = ray_applications.applications_of(instance)["applications"]
    versions = {OLD: application["args"], version: {**application["args"], "version": version}}
    own = {OLD: "tiny-0.9-its-own"}
    known = on_ray._KnownVersions(versions, named_before={OLD: 0}, staying={OLD: 3}, applications=own)
    on_ray._remember(instance, "tiny", known)
    return known


def test_back_to_the_old_version_nobody_is_asked(cluster: Instance, changes: List[Change]) -> None:
    """Nothing answers at the server's port. A replica starts before one ends, also where GPUs' replicas do not; and the
    one that stayed for requests that name the version ends when the others have it again."""
    switched_to(cluster, "2.0")
    on_ray.switch_to(cluster, "tiny", OLD, 5.0)
    first, second = changes
    assert first["removed"] == [] and [each["name"] for each in first["applications"]] == ["tiny"]
    args = first["applications"][0]["args"]
    assert args["version"] == OLD and args["replicas"]["surge"] == 20
    assert second == {"applications": [], "removed": ["tiny-0.9-its-own"]}
    known = on_ray._known(cluster, "tiny")
    assert known.staying == known.applications == {}
    assert ray_applications.applications_of(cluster)["applications"] == first["applications"]


@pytest.mark.parametrize("works", [False, True])
def test_the_new_version_is_removed_only_where_the_old_one_is_back(
    works: bool,
    cluster: Instance,
    changes: List[Change],
    archive: Callable[[int], Archive],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else its replicas, which are started again, would find no files."""
    new, asked = archive(2), []

    def failing(instance: Instance, change: Change, timeout: float, what: str) -> None:
        asked.append(timeout)
        raise ServerError("no room")

    if not works:
        monkeypatch.setattr(ray_applications, "change_applications", failing)
    switched_to(cluster, new.manifest.version)
    running = on_ray.versions_of(cluster, "tiny")[OLD]
    update = _Update(new, cluster, running, cast(Proof, None), UpdateOptions(timeout=5.0), print)
    update._unpacked = update._registered = update._promoted = True
    update._folder.mkdir()
    said = update._take_back()
    assert update._folder.is_dir() is not works
    if works:
        assert said == f"tiny {OLD} answers as before" and changes[-1]["removed"] == ["tiny-0.9-its-own"]
        assert set(on_ray.versions_of(cluster, "tiny")) == {OLD}
    else:
        assert said.startswith(f"nor could {OLD} be restored: tiny is left to {new.manifest.version}")
        assert "`traceserve stop --port 18000` and `traceserve serve`" in said
        assert asked == [600.0]  # longer than for a start, and nothing was removed after it
        assert set(on_ray.versions_of(cluster, "tiny")) == {OLD, new.manifest.version}


def test_a_version_at_its_own_path_has_a_name_that_none_had(
    cluster: Instance, changes: List[Change], archive: Callable[[int], Archive], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither another archive's application, nor one of its own that was removed, as what a killed update has left is."""
    new = archive(2)
    version = new.manifest.version
    serve_also(cluster, ray_config.Hosted("/other", f"tiny-{version}", "1.0", replicas=ray_config.Replicas(cpus=0)))
    monkeypatch.setattr(server, "canary", lambda manifest: {})
    monkeypatch.setattr(client, "predict", lambda *asked: {})
    running = on_ray.versions_of(cluster, "tiny")[OLD]
    monkeypatch.setattr(on_ray, "running_version", lambda instance, name: running)
    monkeypatch.setattr(on_ray, "naming_counts", lambda instance, name, metric: {})
    names = []
    for _ in range(2):
        on_ray.begin_update(cluster, "tiny")
        on_ray.start_beside(cluster, new, "tiny@new", 5.0)
        names += [each["name"] for each in changes[-1]["applications"]]
    first, second = names
    assert first != second and {first[:-8], second[:-8]} == {f"tiny-{version}-"}
    assert [change["removed"] for change in changes if "removed" in change] == [[first]]
    on_ray.remove_version(cluster, "tiny", version)
    on_ray.remove_version(cluster, "tiny", version)
    assert [change["removed"] for change in changes if "removed" in change] == [[first], [second]]
    assert on_ray.versions_of(cluster, "tiny") == {OLD: running}


@pytest.mark.parametrize(
    "workers, words",
    [
        (1, "a worker of tiny .* takes 2 cores beside the 2 of all that runs, .* room for 3: give as many --workers"),
        (2, "18000 does not answer"),  # Ray was asked for it; nothing listens here
        (3, "3 workers of tiny need 3 cores with all else .*first worker 1 more; .* room for 3: give fewer --workers"),
    ],
)
def test_a_replica_that_finds_no_cores_is_not_waited_for(
    workers: int, words: str, cluster: Instance, changes: List[Change], archive: Callable[[int], Archive]
) -> None:
    """There is room for one beside the two of a core each; one that has both cores takes two."""
    with pytest.raises(ServerError, match=words):
        on_ray.start_beside(cluster, archive(workers), "tiny@new", 0.0)
    started = "18000 does not answer" in words
    assert len(changes) == started and len(on_ray.versions_of(cluster, "tiny")) == 1 + started


def test_what_a_killed_update_has_begun_keeps_the_lock(cluster: Instance, tmp_path: Path) -> None:
    """The host's program goes on without it; here it hangs in its import of Ray."""
    (tmp_path / "ray.py").write_text("import time\nprint('began', flush=True)\ntime.sleep(600)\n")
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from traceserve.serving import instances, ray_applications\nfrom traceserve.serving.update_lock import alone\n"
        "with alone(instances.find_instance(18000)) as instance:\n"
        "    print('held', flush=True)\n"
        f"    variables = {{**os.environ, 'PYTHONPATH': {str(tmp_path)!r}}}\n"
        "    ray_applications._run(Path(instance.folder, 'run', 'serve.json'), '', variables, 60, 'tiny')\n"
    )
    update = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert update.stdout is not None and update.stdout.readline() == "held\n"
    children = []
    deadline = time.monotonic() + 30
    while not children and time.monotonic() < deadline:
        children = [
            each for each in psutil.Process(update.pid).children() if "traceserve_hosts.ray_cluster" in each.cmdline()
        ]
        time.sleep(0.05)
    [child] = children
    update.kill()
    update.communicate()
    try:
        with pytest.raises(ServerError, match="is being changed"), alone(cluster):
            pass
    finally:
        child.kill()
    deadline = time.monotonic() + 30
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    with alone(cluster):
        pass


@pytest.mark.parametrize("how", ["no file", "half a file", "no such process", "another command"])
def test_a_cluster_that_has_ended_is_said_to(how: str, cluster: Instance) -> None:
    file = Path(cluster.folder, "run", "serve.json")
    if how == "no file":
        file.unlink()
    elif how == "half a file":
        file.write_text(json.dumps({"applications": []})[:5])
    elif how == "no such process":
        os.kill(cluster.pid, signal.SIGKILL)
        psutil.Process(cluster.pid).wait()
    else:  # as a process whose arguments are gone
        cluster = dataclasses.replace(cluster, pid=os.getpid(), started=psutil.Process().create_time())
    ask = ray_applications.cores_of_cluster if how.endswith("command") else ray_applications.applications_of
    with pytest.raises(ServerError, match="the server on port 18000 has ended; `traceserve status` says why"):
        ask(cluster)


@pytest.mark.parametrize(
    ("ray", "timeout", "words"),
    [
        ("raise ImportError('no such Ray')", 60, "^Ray Serve cannot serve tiny: ImportError: no such Ray$"),
        (
            "import time; time.sleep(60)",
            0.5,
            "^tiny did not answer on Ray Serve within 0 s; --timeout gives it longer$",
        ),
    ],
)
def test_why_the_hosts_program_failed_is_said(
    ray: str, timeout: float, words: str, cluster: Instance, tmp_path: Path
) -> None:
    (tmp_path / "ray.py").write_text(ray)
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with pytest.raises(ServerError, match=words):
        ray_applications._run(Path(cluster.folder, "run", "serve.json"), "", variables, timeout, "tiny")


@pytest.mark.parametrize(("before", "named"), [(5, 3), (9, 0)])
def test_requests_that_named_a_version_since_the_update_began_are_counted(
    before: int, named: int, cluster: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all replicas; one that was started again counts from the beginning."""
    monkeypatch.setattr(on_ray, "_COUNTED", 0.0)
    lines = [f'{on_ray._NAMING}{{model_name="tiny",model_version="{OLD}",replica="{i}"}} 4.0' for i in range(2)]
    lines.append(f'{on_ray._NAMING}{{model_name="tiny",model_version="2.0",replica="2"}} 100.0')
    known = on_ray._KnownVersions({}, named_before={OLD: before}, staying={OLD: 0}, applications={})
    with answering(200, "\n".join(lines).encode()) as url:
        instance = dataclasses.replace(cluster, metrics_port=int(url.rpartition(":")[2]))
        on_ray._remember(instance, "tiny", known)
        assert on_ray.drain_version(instance, "tiny", OLD, {}, 5.0) == named
        assert on_ray.drain_version(instance, "tiny", "2.0", {}, 5.0) == 0  # it did not stay for them


@pytest.mark.parametrize("step", ["begin_update", "switch_to"])
def test_without_metrics_it_is_unknown_whether_requests_name_a_version(
    step: str, cluster: Instance, changes: List[Change], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens at their port. The running version stays in its place: clients who name it would get 404."""
    monkeypatch.setattr(on_ray, "_COUNTED", 0.0)
    cluster = dataclasses.replace(cluster, metrics_port=1)
    running = on_ray.versions_of(cluster, "tiny")[OLD]
    monkeypatch.setattr(on_ray, "running_version", lambda instance, name: running)
    on_ray._remember(cluster, "tiny", on_ray._KnownVersions({"2.0": {}}, {OLD: 0}, {}, {"2.0": "tiny-2.0-its-own"}))
    with pytest.raises(
        ServerError, match="whether requests name a version of tiny in their path is unknown: http.*:1/m"
    ):
        on_ray.begin_update(cluster, "tiny") if step == "begin_update" else on_ray.switch_to(
            cluster, "tiny", "2.0", 5.0
        )
    assert changes == []


@pytest.mark.parametrize(("host", "refused"), [("0.0.0.0", True), ("::", True), ("127.0.0.1", False), ("::1", False)])
def test_metrics_beyond_the_loopback_address_are_refused(
    host: str, refused: bool, archive: Callable[[int], Archive], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray binds them to the loopback address."""
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: name)
    plan = ServerPlan({"tiny": archive(1)}, host, 18000, FrontendOptions(metrics_port=9000), 5.0, print, RAY)
    with (
        pytest.raises(ServerError, match="--metrics-port 9000 .* not on --host")
        if refused
        else contextlib.nullcontext()
    ):
        ray_cluster._check(plan)
