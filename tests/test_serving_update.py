"""`traceserve update` on the real TorchServe, under load."""

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
from pathlib import Path
from typing import Iterator, List

import pytest
from traceserve import cli
from traceserve.archives.contents import unpack
from traceserve.errors import NoSpace, ServerError
from traceserve.measuring import activity
from traceserve.measuring.answers import Consistency
from traceserve.measuring.load_generator import Endpoint, Result, send_load
from traceserve.rollout import updating
from traceserve.rollout.draining import drain
from traceserve.rollout.updating import UpdateOptions, update_server
from traceserve.serving import client, configuration, instances, management, server
from traceserve.serving.instances import Instance
from traceserve.serving.update_lock import alone
from traceserve_runtime.manifest import HANDLER_FILE, Manifest, sha256

BODIES = [json.dumps({"text": f"Parcel number {number} is late."}).encode() for number in range(40)]


@pytest.fixture(scope="module")
def port(archives: Path) -> Iterator[int]:
    """The port of a server that starts with version 1.0."""
    found = configuration.free_ports(1)[0]
    server.start([archives / "1.0" / "tiny.mar"], port=found, timeout=180)
    yield found
    instances.stop(instances.find_instance(found))


@contextlib.contextmanager
def load(instance: Instance) -> Iterator[List[Result]]:
    """Eight connections ask all the time; an answer that differs from the first one to the same text is an error."""
    results: List[Result] = []
    ended, same = threading.Event(), Consistency()

    def send() -> None:
        target = Endpoint(f"{instance.url}/predictions/tiny")
        while not ended.is_set():
            results.append(send_load(target, BODIES, connections=8, seconds=0.5, warm_up=0, check=same))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield results
    finally:
        ended.set()
        thread.join()


def the_only_version(port: int) -> str:
    """The version that a server has registered, serves, remembers, and whose files it has; fails if these differ."""
    instance = instances.find_instance(port)
    [version] = management.registered(instance, "tiny")
    assert management.default(instance, "tiny").version == version == instance.manifest("tiny").version
    assert [folder.name for folder in Path(instance.folder, "store").iterdir()] == [instance.unpacked("tiny").name]
    assert instances.workers_alive(instance) == {"tiny": 1}
    assert cli.main(["verify", "tiny", "--port", str(port)]) == 0
    return version


def test_no_request_fails_and_changed_answers_are_refused(
    archives: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with load(instances.find_instance(port)) as results:
        assert cli.main(["update", str(archives / "2.0" / "tiny.mar"), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["old"], document["new"], document["changed"], document["kept"]) == ("1.0", "2.0", 0, {})
        assert document["verified"] == document["compared"] > 20
        assert the_only_version(port) == "2.0"
        capsys.readouterr()
        assert cli.main(["update", str(archives / "3.0" / "tiny.mar")]) == 1
        said = capsys.readouterr()
        assert "verified 3.0" in said.out and "promoted" not in said.out
        assert "green → red" in said.err and "(--allow-changes); tiny 2.0 answers as before" in said.err
        assert the_only_version(port) == "2.0"
    assert sum(result.requests for result in results) > 100
    assert {reason for result in results for reason in result.errors} == set()


def shadow_update(archive: Path, share: str, *more: str) -> int:
    return cli.main(["update", str(archive), "--json", "--shadow", share, "--shadow-seconds", "2", *more])


def test_live_requests_are_asked_of_both(archives: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A version whose answers to them differ is refused; one whose answers hold is promoted, and no client notices."""
    instance = instances.find_instance(port)
    before = the_only_version(port)
    with load(instance) as results:
        capsys.readouterr()
        assert shadow_update(archives / "3.0" / "tiny.mar", "1", "--allow-changes", "20") == 1
        said = capsys.readouterr().err
        assert re.search(rf"3.0 answers \d+ of \d+ live requests otherwise than {before}", said), said
        assert the_only_version(port) == before
        capsys.readouterr()
        other = {"1.0": "2.0", "2.0": "1.0"}[before]
        assert shadow_update(archives / other / "tiny.mar", "0.5") == 0
        told = json.loads(capsys.readouterr().out)["shadowed"]
        assert told["shown"] > told["compared"] > len(BODIES) // 2 and told["changed"] == 0
        assert told["compared"] <= len(BODIES) and told["largest_difference"] < 1e-6
    assert {reason for result in results for reason in result.errors} == set()
    assert not {path.name for path in Path(instance.folder).iterdir()} & {"mirror.json", "mirror.sock"}
    for path in Path(instance.folder).rglob("*"):
        assert not path.is_file() or b"is late." not in path.read_bytes(), path


def test_changed_answers_may_be_allowed(archives: Path, port: int) -> None:
    """Also where an update that was killed has left the new version beside the old one."""
    before = the_only_version(port)
    instance = instances.find_instance(port)
    unpack(archives / "3.0" / "tiny.mar", Path(instance.folder, "store", "tiny@3.0"))
    management.register_version(instance, "tiny", "tiny@3.0", 1)
    updated = update_server(archives / "3.0" / "tiny.mar", port, UpdateOptions(allowed_changes=40))
    assert (updated.old, updated.new) == (before, "3.0") and 0 < len(updated.replay.moved) <= 40
    assert the_only_version(port) == "3.0"


def test_requests_that_name_a_version_are_seen(port: int) -> None:
    """While a version is drained; all requests are counted, whatever they name."""
    instance = instances.find_instance(port)
    version = the_only_version(port)
    canary = server.canary(instance.manifest("tiny"))
    assert drain(instance, "tiny", version, canary, 30) == 0
    before = activity.sample(instance, "tiny").counters["ts_inference_requests_total"]
    ended = threading.Event()

    def ask() -> None:
        while not ended.wait(0.05):
            client.predict(instance.address, f"tiny/{version}", "hello")

    thread = threading.Thread(target=ask)
    thread.start()
    named = drain(instance, "tiny", version, canary, 30)
    ended.set()
    thread.join()
    assert named > 2
    client.predict(instance.address, "tiny", "hello")
    grown = activity.sample(instance, "tiny").counters["ts_inference_requests_total"] - before
    assert grown > named + 1


def repacked(source: Path, target: Path, name: str, content: bytes, named: bool) -> Path:
    """A copy of an archive with another file's content; its manifest names the content's hash, if `named`."""
    target.parent.mkdir()
    folder = target.parent / "unpacked"
    shutil.unpack_archive(str(source), str(folder), "zip")
    (folder / name).write_bytes(content)
    if named:
        manifest = Manifest.read(folder, verify=False)
        dataclasses.replace(manifest, files={**manifest.files, name: sha256(folder / name)}).write(folder)
    return Path(shutil.make_archive(str(target.with_suffix("")), "zip", folder)).rename(target)


@pytest.mark.parametrize(
    "name, named, reason",
    [
        ("traced_model.pt", False, "traced_model.pt is not the one that was verified"),
        (HANDLER_FILE, True, "cannot load the archive: .*broken on purpose"),
    ],
)
def test_what_cannot_run_is_taken_back(
    name: str, named: bool, reason: str, archives: Path, port: int, tmp_path: Path
) -> None:
    """Another file than the manifest names, found before TorchServe knows of it; and a worker that cannot load."""
    version = the_only_version(port)
    other = archives / ("1.0" if version != "1.0" else "2.0") / "tiny.mar"
    content = b"import traceserve_runtime\nraise RuntimeError('broken on purpose')\n"
    broken = repacked(other, tmp_path / "broken" / "tiny.mar", name, content, named)
    with pytest.raises(RuntimeError, match=f"{reason}.*; tiny {version} answers as before"):
        update_server(broken, port, UpdateOptions())
    assert the_only_version(port) == version


def test_an_interrupt_takes_it_back(archives: Path, port: int) -> None:
    version = the_only_version(port)
    other = archives / ("1.0" if version != "1.0" else "2.0") / "tiny.mar"
    command = [sys.executable, "-m", "traceserve", "update", str(other), "--allow-changes", "99", "--port", str(port)]
    updating_it = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert updating_it.stdout is not None
    assert updating_it.stdout.readline().startswith("registered")
    updating_it.send_signal(signal.SIGINT)
    _, said = updating_it.communicate(timeout=60)
    assert updating_it.returncode == 130 and "interrupted" in said
    assert the_only_version(port) == version


def test_a_version_that_may_still_answer_keeps_its_files(
    archives: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TorchServe's API refuses the update from the switch on, as it does with keys that are no longer valid."""
    before, instance = the_only_version(port), instances.find_instance(port)
    new = "1.0" if before != "1.0" else "2.0"
    promote = updating._Update._promote

    def cut_off(self: updating._Update) -> None:
        promote(self)
        self._instance = dataclasses.replace(self._instance, management_socket=f"{instance.folder}/gone")
        raise ServerError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(updating._Update, "_promote", cut_off)
        with pytest.raises(ServerError, match=f"cut off; nor could {before} be restored: tiny is left to {new}"):
            update_server(archives / new / "tiny.mar", port, UpdateOptions(allowed_changes=99))
    assert management.default(instance, "tiny").version == new
    assert Manifest.read(Path(instance.folder, "store", f"tiny@{new}")).version == new  # compares all files
    # The next update finds both.
    assert update_server(archives / before / "tiny.mar", port, UpdateOptions(allowed_changes=99)).old == new
    assert the_only_version(port) == before


def test_a_version_that_cannot_be_removed_is_left_to_the_next_update(
    archives: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one answers already, so nothing is taken back."""
    before, instance = the_only_version(port), instances.find_instance(port)
    new = "1.0" if before != "1.0" else "2.0"
    said: List[str] = []

    def refused(self: updating._Update, version: str, named: int) -> None:
        raise ServerError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(updating._Update, "_remove", refused)
        found = update_server(archives / new / "tiny.mar", port, UpdateOptions(allowed_changes=99), said.append)
    assert found.new == new and found.kept == {} and management.default(instance, "tiny").version == new
    assert said[-1] == f"kept {before}: no answer; the next update looks again"
    assert update_server(archives / before / "tiny.mar", port, UpdateOptions(allowed_changes=99)).old == new
    assert the_only_version(port) == before


def test_a_version_that_cannot_be_remembered_answers_beside_the_old_one(
    archives: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: `status` and `verify` still find the files of the old one, which gives the same answers."""
    before, new, instance = "1.0", "2.0", instances.find_instance(port)
    if the_only_version(port) != before:
        update_server(archives / before / "tiny.mar", port, UpdateOptions(allowed_changes=99))
    said: List[str] = []

    def full(instance: Instance) -> None:
        raise NoSpace("no space left on the disk of x.json")

    with monkeypatch.context() as patch:
        patch.setattr(instances, "remember", full)
        found = update_server(archives / new / "tiny.mar", port, UpdateOptions(allowed_changes=99), said.append)
    assert found.new == new and found.kept == {} and management.default(instance, "tiny").version == new
    assert said[-1] == (
        f"kept {before}, which `traceserve status` still shows: no space left on the disk of x.json; the next update looks again"
    )
    assert cli.main(["status"]) == 0 and cli.main(["verify", "tiny", "--port", str(port)]) == 0
    assert update_server(archives / before / "tiny.mar", port, UpdateOptions(allowed_changes=99)).old == new
    assert the_only_version(port) == before


def test_an_update_that_was_killed_is_finished_by_the_same_again(
    archives: Path, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the switch: the server is remembered with the version that answers, and `status` names both."""
    before = the_only_version(port)
    new = "1.0" if before != "1.0" else "2.0"

    def killed(self: updating._Update, *arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(updating._Update, "_drain", killed)
        patch.setattr(updating._Update, "_take_back", killed)
        with pytest.raises(KeyboardInterrupt):
            update_server(archives / new / "tiny.mar", port, UpdateOptions(allowed_changes=99))
    assert instances.find_instance(port).manifest("tiny").version == new
    capsys.readouterr()
    assert cli.main(["status"]) == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    assert f"tiny:{port} {before} beside {new}: of an update that runs, or for the next to remove" in shown
    said: List[str] = []
    found = update_server(archives / new / "tiny.mar", port, UpdateOptions(), said.append)
    assert (found.old, found.new, found.kept) == (before, new, {}) and found.verification.passed
    assert said[0] == f"{new} answers already, and {before} beside it, which an earlier update left"
    assert said[-1] == f"removed {before}, which had answered all its requests"
    assert the_only_version(port) == new


def test_what_is_refused_before_anything_starts(
    archives: Path, port: int, mar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = the_only_version(port)
    served = archives / version / "tiny.mar"
    before = instances.find_instance(port)
    instances.remember(dataclasses.replace(before, folders={}))  # an update was killed after the switch
    with pytest.raises(ServerError, match=f"already served as version {version}.*build --version V"):
        update_server(served, port, UpdateOptions())
    assert instances.find_instance(port).unpacked("tiny") == before.unpacked("tiny")
    (tmp_path / "other.mar").write_bytes(served.read_bytes())
    with pytest.raises(ServerError, match="has no other"):
        update_server(tmp_path / "other.mar", port, UpdateOptions())
    cut = tmp_path / "tiny.mar"
    cut.write_bytes(served.read_bytes()[:-3000])
    with pytest.raises(RuntimeError, match="was not copied whole"):
        update_server(cut, port, UpdateOptions())
    instance = instances.find_instance(port)
    running = dataclasses.replace(management.default(instance, "tiny"), continuous=True)
    other_version = archives / ("1.0" if version != "1.0" else "2.0") / "tiny.mar"
    with monkeypatch.context() as patch:
        patch.setattr(management, "default", lambda *arguments: running)
        with pytest.raises(
            ServerError, match=rf"response_timeout of {running.response_timeout} s; --timeout .* not 20"
        ):
            update_server(other_version, port, UpdateOptions(timeout=20))
    with alone(instance), pytest.raises(ServerError, match="another `traceserve update`"):
        update_server(served, port, UpdateOptions())
    other = dataclasses.replace(instance, management_socket=None)
    monkeypatch.setattr(instances, "serving_instance", lambda name, port: other)
    with pytest.raises(ServerError, match="takes no new versions"):
        update_server(served, port, UpdateOptions())


def test_only_a_closed_folder_and_an_address_without_callers_are_private(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert management.is_private(tmp_path) == (sys.platform == "linux")
    tmp_path.chmod(0o750)
    assert not management.is_private(tmp_path)
    assert not management._is_unreachable("127.0.0.1")
