"""`traceserve update` on a real Ray Serve, under load."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import pytest
from traceserve import cli
from traceserve.archives.archive import pack_archive
from traceserve.errors import ServerError
from traceserve.machine import user_folders
from traceserve.rollout.engines import on_ray
from traceserve.rollout.updating import UpdateOptions, update_server
from traceserve.serving import configuration, instances, ray_applications, server
from traceserve.serving.engines import RAY
from traceserve.serving.instances import Instance
from traceserve_runtime.manifest import Manifest, sha256

from ray_serve.cluster import Cluster, Load, ask, wait_until

NAME = "intents"
BODY = {"text": "Where is my parcel?"}
LONGEST = 300.0  # seconds of a load


@pytest.fixture(scope="module")
def swapped(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other labels, as version 3.0."""
    folder = tmp_path_factory.mktemp("three")
    checkpoint = folder / "checkpoint"
    shutil.copytree(user_folders.cache("demo-support-intents"), checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    labels = list(config["id2label"].values())
    moved = labels[1:] + labels[:1]
    config.update(id2label=dict(enumerate(moved)), label2id={label: i for i, label in enumerate(moved)})
    (checkpoint / "config.json").write_text(json.dumps(config))
    settings = folder / "setup_config.json"
    settings.write_text(json.dumps({"model_name": str(checkpoint), "max_length": 64, "dtype": "float32"}))
    assert cli.main(["export", "--config", str(settings), "--output", str(folder / "artifact")]) == 0
    return pack_archive(folder / "artifact", NAME, folder, "3.0")


@pytest.fixture(scope="module")
def port(archives: List[Path]) -> Iterator[int]:
    """The port of a server that starts with version 1.0, in one replica."""
    found = configuration.free_ports(1)[0]
    instance = server.start(archives[:1], port=found, timeout=180, engine=RAY)
    yield found
    instances.stop(instance)


def the_only_version(port: int) -> str:
    """The version that a server runs, remembers, and whose files it has; fails if these differ."""
    instance = instances.find_instance(port)
    [version] = on_ray.versions_of(instance, NAME)
    assert on_ray.running_version(instance, NAME).version == version == instance.manifest(NAME).version
    [application] = ray_applications.applications_of(instance)["applications"]
    assert application["args"]["version"] == version and application["route_prefix"] == "/"
    assert [folder.name for folder in Path(instance.folder, "store").iterdir()] == [instance.unpacked(NAME).name]
    wait_until(lambda: len(Cluster(instance).replicas()) == 1, 30)
    assert cli.main(["verify", NAME, "--port", str(port)]) == 0
    return version


def another(archives: List[Path], version: str) -> Path:
    """The archive with the same answers, as 1.0 or 2.0, that is not this version."""
    return archives[0] if version != "1.0" else archives[1]


def test_no_request_fails_and_changed_answers_are_refused(
    archives: List[Path], swapped: Path, port: int, expected: Dict[bytes, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    with Load(Cluster(instances.find_instance(port)), expected, LONGEST) as load:
        assert cli.main(["update", str(archives[1]), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["old"], document["new"], document["changed"], document["kept"]) == ("1.0", "2.0", 0, {})
        assert document["verified"] == document["compared"] > 20
        assert the_only_version(port) == "2.0"
        assert ask(port, "/predictions/intents/1.0", BODY).status == 404
        before = Cluster(instances.find_instance(port)).replicas()
        capsys.readouterr()
        assert cli.main(["update", str(swapped)]) == 1
        said = capsys.readouterr()
        assert "verified 3.0" in said.out and "promoted" not in said.out
        assert "→" in said.err and "(--allow-changes); intents 2.0 answers as before" in said.err
        assert the_only_version(port) == "2.0" and Cluster(instances.find_instance(port)).replicas() == before
        assert load.runs
        found = load.counts()
    print(f"\nan update, and one that is refused: {found}; the first took {document['seconds']:.0f} s")
    assert found["failed at first"] == found["failed"] == found["wrong"] == 0 and int(str(found["requests"])) > 100


def test_live_requests_are_asked_of_both(
    archives: List[Path], swapped: Path, port: int, expected: Dict[bytes, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """A version whose answers to them differ is refused, and nothing of the texts stays in the server's folders."""
    instance, before = instances.find_instance(port), the_only_version(port)
    allowed = 33  # all of the golden set's, so that one live request is one too many
    options = ["--json", "--shadow", "1", "--shadow-seconds", "4", "--allow-changes", str(allowed)]
    with Load(Cluster(instance), expected, LONGEST) as load:
        capsys.readouterr()
        assert cli.main(["update", str(swapped), *options]) == 1
        said = capsys.readouterr().err
        counted = re.search(rf"3.0 answers (\d+) of (\d+) live requests otherwise than {before}", said)
        asked = len(expected) + 1  # and the sample that a replica asks itself to know whether it is well
        assert counted and 0 < int(counted.group(1)) <= int(counted.group(2)) <= asked, said
        found = load.counts()
    assert found["failed at first"] == found["wrong"] == 0
    assert the_only_version(port) == before
    assert not {path.name for path in Path(instance.folder).iterdir()} & {"mirror.json", "mirror.sock"}
    files = [path for path in Path(instance.folder).rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if b"17 days for my parcel" in path.read_bytes()]


def test_what_cannot_run_is_taken_back(archives: List[Path], port: int, tmp_path: Path) -> None:
    version = the_only_version(port)
    replicas = Cluster(instances.find_instance(port)).replicas()
    folder = tmp_path / "unpacked"
    shutil.unpack_archive(str(another(archives, version)), str(folder), "zip")
    runtime = "traceserve_runtime/engine.py"
    (folder / runtime).write_text("raise ImportError('broken on purpose')\n")
    manifest = Manifest.read(folder, verify=False)
    dataclasses.replace(manifest, files={**manifest.files, runtime: sha256(folder / runtime)}).write(folder)
    broken = Path(shutil.make_archive(str(tmp_path / NAME), "zip", folder)).rename(tmp_path / f"{NAME}.mar")
    with pytest.raises(ServerError, match=f"broken on purpose.*; intents {version} answers as before"):
        update_server(broken, port, UpdateOptions())
    assert the_only_version(port) == version and Cluster(instances.find_instance(port)).replicas() == replicas


def test_more_workers_than_find_room_are_refused(archives: List[Path], port: int) -> None:
    version = the_only_version(port)
    with pytest.raises(
        ServerError, match=rf"50 workers of intents need 50 cores .*; intents {version} answers as before"
    ):
        update_server(another(archives, version), port, UpdateOptions(workers=50))
    assert the_only_version(port) == version


def test_what_fails_after_the_switch_is_rolled_back(
    archives: List[Path], port: int, expected: Dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    version, switched = the_only_version(port), []
    real = on_ray.switch_to

    def failing(instance: Instance, name: str, to: str, timeout: float) -> None:
        real(instance, name, to, timeout)
        switched.append(on_ray.running_version(instance, name).version)
        if len(switched) == 1:
            raise ServerError("failed on purpose")

    monkeypatch.setattr(on_ray, "switch_to", failing)
    other = another(archives, version)
    with Load(Cluster(instances.find_instance(port)), expected, LONGEST) as load:
        with pytest.raises(ServerError, match=f"failed on purpose; intents {version} answers as before"):
            update_server(other, port, UpdateOptions())
        assert switched == ["1.0" if version != "1.0" else "2.0", version]
        assert the_only_version(port) == version
        found = load.counts()
    assert found["failed at first"] == found["failed"] == found["wrong"] == 0


def test_a_new_version_that_is_down_is_rolled_back(
    archives: List[Path], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its replicas end right after the switch, and cannot start again: nothing answers that could be asked its version."""
    version = the_only_version(port)
    real, other = on_ray.switch_to, another(archives, version)
    new = "1.0" if version != "1.0" else "2.0"

    def downed(instance: Instance, name: str, to: str, timeout: float) -> None:
        real(instance, name, to, timeout)
        if to == new:
            shutil.rmtree(Path(instance.folder, "store", f"{NAME}@{new}"))
            for replica in Cluster(instance).replicas():
                replica.kill()
            wait_until(lambda: ask(port, f"/v2/models/{NAME}").status != 200, 30)

    monkeypatch.setattr(on_ray, "switch_to", downed)
    with pytest.raises(ServerError, match=f"does not answer its own sample.*; intents {version} answers as before"):
        update_server(other, port, UpdateOptions())
    assert the_only_version(port) == version


def test_an_interrupt_takes_it_back(archives: List[Path], port: int) -> None:
    version = the_only_version(port)
    command = [sys.executable, "-m", "traceserve", "update", str(another(archives, version)), "--port", str(port)]
    updating_it = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert updating_it.stdout is not None
    assert updating_it.stdout.readline().startswith("registered")
    updating_it.send_signal(signal.SIGINT)
    _, said = updating_it.communicate(timeout=60)
    assert updating_it.returncode == 130 and "interrupted" in said
    assert the_only_version(port) == version


def test_what_a_killed_update_left_is_in_nobodys_way(archives: List[Path], swapped: Path, port: int) -> None:
    """There is room for one replica more, and the next update needs it for another version."""
    version = the_only_version(port)
    command = [sys.executable, "-m", "traceserve", "update", str(swapped), "--allow-changes", "99", "--port", str(port)]
    updating_it = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert updating_it.stdout is not None and updating_it.stdout.readline().startswith("registered")
    updating_it.kill()
    updating_it.communicate(timeout=60)
    assert set(on_ray.versions_of(instances.find_instance(port), NAME)) == {version, "3.0"}
    other = another(archives, version)
    assert update_server(other, port, UpdateOptions(timeout=120)).kept == {}
    assert the_only_version(port) == ("1.0" if version != "1.0" else "2.0")


@contextlib.contextmanager
def naming(port: int, version: str) -> Iterator[Counter[int]]:
    """A client that names a version in its path all the time; the statuses of its answers."""
    ended, statuses = threading.Event(), Counter[int]()

    def name_it() -> None:
        while not ended.wait(0.2):
            statuses[ask(port, f"/predictions/intents/{version}", BODY).status] += 1

    thread = threading.Thread(target=name_it)
    thread.start()
    try:
        yield statuses
    finally:
        ended.set()
        thread.join()


def test_a_version_that_requests_name_stays(archives: List[Path], port: int) -> None:
    """Until an update finds none of them; meanwhile no other archive takes its version."""
    version = the_only_version(port)
    same, new = archives[0 if version == "1.0" else 1], another(archives, version)
    with naming(port, version) as statuses:
        updated = update_server(new, port, UpdateOptions())
        with pytest.raises(
            ServerError, match=rf"{version} still runs, for \d+ requests .*; intents {updated.new} answers"
        ):
            update_server(same, port, UpdateOptions())
    assert set(statuses) == {200} and updated.kept.keys() == {version} and updated.kept[version] > 10
    instance = instances.find_instance(port)
    assert set(on_ray.versions_of(instance, NAME)) == {"1.0", "2.0"}
    assert ask(port, f"/predictions/intents/{version}", BODY).status == 200
    assert on_ray.running_version(instance, NAME).version == updated.new
    time.sleep(2 * on_ray._COUNTED)  # Ray's metrics are late
    again = update_server(new, port, UpdateOptions())  # which answers already
    assert (again.old, again.new, again.kept) == (version, updated.new, {})
    assert the_only_version(port) == updated.new
    with pytest.raises(ServerError, match=f"already served as version {updated.new}"):
        update_server(new, port, UpdateOptions())


def test_one_of_several_archives_is_replaced(archives: List[Path], expected: Dict[bytes, bytes]) -> None:
    """Behind the router too, at the root paths; the other archive goes on."""
    port = configuration.free_ports(1)[0]
    instance = server.start([archives[0], archives[2]], port=port, timeout=180, engine=RAY)
    ended, statuses = threading.Event(), Counter[Tuple[str, int]]()

    def ask_others() -> None:
        while not ended.wait(0.05):
            for path, body in (
                ("/v1/models/intents:predict", {"instances": [BODY["text"]]}),
                ("/predictions/other", BODY),
            ):
                statuses[path, ask(port, path, body).status] += 1

    thread = threading.Thread(target=ask_others)
    try:
        others = [each for each in Cluster(instance).replicas() if "other" in " ".join(each.cmdline())]
        with Load(Cluster(instance), expected, LONGEST) as load:
            thread.start()
            updated = update_server(archives[1], port, UpdateOptions())
            ended.set()
            thread.join()
            found = load.counts()
        print(f"\none of two archives: {found}, {dict(statuses)}, {updated.seconds:.0f} s")
        assert found["failed at first"] == found["wrong"] == 0
        assert len(statuses) == 2 and {status for _, status in statuses} == {200}
        assert len(others) == 1 and others[0].is_running()
        assert ask(port, "/v2/models/intents").json["versions"] == ["2.0"]
        assert ask(port, "/explanations/intents/1.0", BODY).status == 404
        with pytest.raises(ServerError, match="already served as version 2.0"):
            update_server(archives[1], port, UpdateOptions())
    finally:
        ended.set()
        instances.stop(instance)


def test_a_name_with_shares_is_not_updated(archives: List[Path], swapped: Path) -> None:
    port = configuration.free_ports(1)[0]
    instance = server.start(archives[:2], port=port, timeout=180, engine=RAY, shares=(1, 1))
    try:
        with pytest.raises(ServerError, match="served in several versions on port .*--shares"):
            update_server(swapped, port, UpdateOptions())
        assert ask(port, "/predictions/intents/1.0", BODY).status == 200
    finally:
        instances.stop(instance)
