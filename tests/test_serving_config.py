"""An archive's serving configuration: its file, how it is replaced, and what TorchServe obeys."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from traceserve.archives import contents as archives
from traceserve.archives import model_config
from traceserve.archives.contents import configure_archive, read_manifest, read_serving
from traceserve.archives.model_config import SERVING_FILE, Serving
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import ArchiveError, ServerError
from traceserve.serving import configuration, instances, server
from traceserve.serving.front import FrontendOptions
from traceserve.serving.instances import Instance
from traceserve_runtime import processor
from traceserve_runtime.manifest import MANIFEST_FILE, Manifest, sha256
from traceserve_runtime.texts.limits import RequestLimits

BUILT = Serving(batch_size=64, max_batch_delay=1, response_timeout=300)
TUNED = replace(BUILT, batch_size=8, workers=2, threads=1, length_step=8, pack_weights=True, client_timeout=30_000)
whole = st.integers(1, 10_000)
maybe = st.none() | whole
servings = st.builds(
    Serving,
    batch_size=whole,
    max_batch_delay=whole,
    response_timeout=whole,
    startup_timeout=whole,
    client_timeout=maybe,
    workers=maybe,
    threads=maybe,
    length_step=maybe,
    pack_weights=st.none() | st.booleans(),
    continuous_batching=st.none() | st.booleans(),
)


@settings(deadline=None, max_examples=50, database=None)
@given(servings)
def test_what_is_written_is_read(serving: Serving) -> None:
    assert Serving.from_yaml(serving.to_yaml()) == serving


def test_the_keys_that_torchserve_and_the_handler_read() -> None:
    always = "maxRetryTimeoutInSec: 2147483\n"
    assert BUILT.to_yaml() == f"batchSize: 64\nmaxBatchDelay: 1\nresponseTimeout: 300\nstartupTimeout: 300\n{always}"
    assert yaml.safe_load(TUNED.to_yaml()) == {
        "batchSize": 8,
        "maxBatchDelay": 1,
        "responseTimeout": 300,
        "startupTimeout": 300,
        "clientTimeoutInMills": 30_000,
        "minWorkers": 2,
        "maxWorkers": 2,
        "maxRetryTimeoutInSec": 2_147_483,  # a thousand times as much is the most that 32 bits hold
        "handler": {"threads": 1, "length_step": 8, "pack_weights": True},
    }


def test_the_server_adds_what_an_older_archive_lacks(
    mar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise TorchServe starts no worker again after five minutes of failures."""
    old, serving = Path(shutil.copy(mar, tmp_path / "old.mar")), read_serving(mar)
    with monkeypatch.context() as patch:
        patch.setattr(model_config, "_RETRIES", {})
        configure_archive(old, serving)
    assert "maxRetryTimeoutInSec" not in contents(old)[SERVING_FILE].decode() and read_serving(old) == serving
    (tmp_path / "server").mkdir()
    store = configuration.prepare_folder(tmp_path / "server", {"old": old, "new": mar}, {})
    for name in ("old", "new"):
        assert (store / name / SERVING_FILE).read_text() == serving.to_yaml()
        Manifest.read(store / name)  # otherwise the worker would refuse it


RIGHT = BUILT.to_yaml()
# Lists of ten times the last one: few characters, and 10 ** 12 numbers.
NESTED = "".join(f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 13))


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [", "not valid YAML"),
        ("\3", "not valid YAML: unacceptable character #x0003"),
        ("batchSize: 2026-99-99", "not valid YAML: month must be in"),
        ("[" * 5000, "not valid YAML"),
        ("", "should hold keys and values"),
        ("- 1", "should hold keys and values, not list"),
        (RIGHT + "handler: fast\n", "handler: should hold keys and values, not str"),
        (RIGHT.replace("batchSize", "batchsize"), "batchsize is not known here; did you mean batchSize"),
        (RIGHT + "deviceIds: 3\n", "deviceIds is not known here; known are batchSize"),
        (RIGHT + "handler: {thread: 1}\n", "handler: thread is not known here; did you mean threads"),
        (RIGHT + "handler: {pack_weights: 1}\n", "handler: pack_weights should be true or false, not 1"),
        (RIGHT.replace("64", "many"), "batchSize should be a whole number of 1 or more, not 'many'"),
        (RIGHT.replace("64", "true"), "not True"),
        (RIGHT.replace("Delay: 1", "Delay: 0"), "maxBatchDelay should be a whole number of 1 or more, not 0"),
        (RIGHT.replace("64", f"\n- &a0 [1]\n{NESTED}"), "aliases (*name) are not allowed"),
        (RIGHT.replace("64", str([1] * 999)), "batchSize should be a whole number of 1 or more, not [1, 1, 1"),
        (RIGHT.replace("2147483", "soon"), "maxRetryTimeoutInSec should be a whole number of 1 or more, not 'soon'"),
        (RIGHT + "minWorkers: 2\n", "minWorkers and maxWorkers should be given both"),
        (RIGHT + "minWorkers: 1\nmaxWorkers: 4\n", "and be equal"),
        (RIGHT.replace("batchSize: 64\n", ""), "lacks the key batchSize"),
    ],
)
def test_what_is_wrong_is_told(text: str, words: str) -> None:
    with pytest.raises(ArchiveError) as error:
        Serving.from_yaml(text)
    assert words in error.value.message and SERVING_FILE in error.value.message
    assert "\n" not in error.value.message and len(error.value.message) < 300


@pytest.fixture
def mar(mar: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copy(mar, tmp_path / "tiny.mar"))


@pytest.fixture
def packed(mar: Path, tmp_path: Path) -> Path:
    """It as it was."""
    return Path(shutil.copy(mar, tmp_path / "packed.mar"))


def contents(path: Path) -> Dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_an_artifact_has_what_its_configuration_says(packed: Path) -> None:
    config = SetupConfig(model_name="any")
    assert read_serving(packed) == Serving(config.batch_size, config.max_batch_delay, config.response_timeout)


def test_configure_changes_this_file_and_its_hash_alone(packed: Path, mar: Path, tmp_path: Path) -> None:
    mar.chmod(0o640)
    configure_archive(mar, TUNED)
    assert read_serving(mar) == TUNED and mar.stat().st_mode & 0o777 == 0o640
    old, new = contents(packed), contents(mar)
    assert {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)} == {SERVING_FILE, MANIFEST_FILE}
    before, after = read_manifest(packed), read_manifest(mar)
    digest = hashlib.sha256(new[SERVING_FILE]).hexdigest()
    assert after == replace(before, files={**before.files, SERVING_FILE: digest})
    with zipfile.ZipFile(mar) as file:
        file.extractall(tmp_path / "unpacked")
    Manifest.read(tmp_path / "unpacked")  # verifies every file
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_configure_gives_the_same_bytes_each_time(packed: Path, mar: Path) -> None:
    configure_archive(mar, TUNED)
    first = sha256(mar)
    with zipfile.ZipFile(mar) as file:
        assert {info.date_time for info in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    configure_archive(mar, replace(TUNED, workers=7))
    configure_archive(mar, TUNED)
    assert sha256(mar) == first
    configure_archive(mar, read_serving(packed))
    assert sha256(mar) == sha256(packed)


def test_configure_follows_a_link(mar: Path, tmp_path: Path) -> None:
    link = tmp_path / "links" / "tiny.mar"
    link.parent.mkdir()
    link.symlink_to(mar)
    configure_archive(link, TUNED)
    assert link.is_symlink() and read_serving(mar) == TUNED


def test_an_interrupted_configure_leaves_the_old_archive(mar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sha256(mar)

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(archives.shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        configure_archive(mar, TUNED)
    assert sha256(mar) == before and [path.name for path in mar.parent.iterdir()] == ["tiny.mar"]


def test_what_is_no_archive_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "text.mar"
    path.write_text("no zip")
    with pytest.raises(ArchiveError, match="no archive of traceserve"):
        configure_archive(path, TUNED)
    assert path.read_text() == "no zip"


def worker_folders(instance: Instance) -> Dict[str, int]:
    """Return each archive's number of worker processes, once as many run as expected, and a while after."""
    deadline = time.monotonic() + 60
    while instances.workers_alive(instance) != instance.workers and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    return instances.workers_alive(instance)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "traceserve", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_workers_are_those_of_the_archive_unless_they_are_asked_for(
    packed: Path, mar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two archives in one server, one of them tuned: by the command, with the real TorchServe."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    configure_archive(mar, TUNED)
    before = sha256(mar)
    Path(shutil.copy(packed, mar.with_name("plain.mar")))
    port = str(configuration.free_ports(1)[0])
    for options, expected in (([], {"tiny": 2, "plain": 1}), (["--workers", "3"], {"tiny": 3, "plain": 3})):
        served = run("serve", "tiny.mar", "plain.mar", "--port", port, *options, cwd=mar.parent)
        try:
            assert served.returncode == 0, served.stderr
            instance = instances.find_instance(int(port))
            assert instance.workers == expected and worker_folders(instance) == expected
            status = run("status", cwd=mar.parent).stdout
            for name, count in expected.items():
                assert any(name in line and f"{count} of {count}" in line for line in status.splitlines())
            own = read_serving(mar)
            unpacked = Path(instance.folder, "store", "tiny")
            assert Serving.from_yaml((unpacked / SERVING_FILE).read_text()) == replace(own, workers=expected["tiny"])
            Manifest.read(unpacked)  # otherwise the worker would refuse it
            plain = Serving.from_yaml(Path(instance.folder, "store", "plain", SERVING_FILE).read_text())
            assert plain.threads == (max(1, processor.cores() // 3) if options else None)  # several share the cores
        finally:
            assert run("stop", "--port", port, cwd=mar.parent).returncode == 0
    assert sha256(mar) == before


@pytest.mark.parametrize(
    "host, words",
    [
        ("nosuchhost", "--host should be an IP address or localhost, not nosuchhost"),
        ("300.1.1.1", "--host should be an IP address or localhost, not 300.1.1.1"),
        ("192.0.2.1", "--host 192.0.2.1 is no address of this machine"),
    ],
)
def test_an_address_that_this_machine_lacks(host: str, words: str, mar: Path) -> None:
    with pytest.raises(ServerError, match=f"^{words}$"):
        server.start([mar], host, configuration.free_ports(1)[0], front=FrontendOptions(keys=False))


def test_a_server_may_be_given_another_configuration(mar: Path) -> None:
    wanted = replace(TUNED, batch_size=4, workers=1)
    instance = server.start([mar], port=configuration.free_ports(1)[0], timeout=90, serving=wanted)
    try:
        assert instance.workers == {"tiny": 1} and worker_folders(instance) == {"tiny": 1}
        unpacked = Path(instance.folder, "store", "tiny", SERVING_FILE)
        assert Serving.from_yaml(unpacked.read_text()) == wanted
        manifest = read_manifest(mar)
        largest = RequestLimits.of(manifest.max_length, manifest.max_rows).largest_body
        assert f"max_request_size={largest}\n" in Path(instance.folder, "config.properties").read_text()
    finally:
        instances.stop(instance, at_once=True)
    assert read_serving(mar) == BUILT
    assert not os.path.exists(instance.folder)


def test_a_temporary_folder_too_deep_for_sockets(tmp_path: Path, mar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchServe's workers listen on sockets there, whose paths have a limit: reported before anything starts."""
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    instance = server.start([mar], port=configuration.free_ports(1)[0], timeout=90)
    try:
        assert worker_folders(instance) == {"tiny": 1} and len(instance.folder) < 60
    finally:
        instances.stop(instance, at_once=True)
    assert list(deep.iterdir()) == []
