"""`traceserve status`, of a real TorchServe that was asked right and wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Iterator

import psutil
import pytest
from traceserve import cli
from traceserve.archives.archive import pack_archive
from traceserve.commands.status import _duration
from traceserve.measuring import activity
from traceserve.serving import configuration, instances, server, stopping
from traceserve.serving.instances import Instance

GOOD, BAD, LONG = b"hello", b'{"txt": "a"}', b"hello " * 200_000
COMMAND = [sys.executable, "-m", "traceserve", "status"]


@pytest.fixture(scope="module")
def served(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    folder = tmp_path_factory.mktemp("status")
    instance = server.start(
        [pack_archive(artifact, "tiny", folder)], port=configuration.free_ports(1)[0], timeout=180, host="0.0.0.0"
    )
    yield instance
    instances.stop(instance)


def ask(served: Instance, body: bytes) -> int:
    kind = "application/json" if body[:1] == b"{" else "text/plain"
    headers = {"Content-Type": kind, "Authorization": f"Bearer {served.key}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{served.url}/predictions/tiny", body, headers), timeout=60
        ) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def settled(served: Instance, requests: int) -> activity.Sample:
    """A sample of as many requests: the worker's counters come a moment after its answers."""
    deadline = time.monotonic() + 10
    while True:
        found = activity.sample(served, "tiny")
        counted = found.counters.get("traceserve_requests_total", 0) + sum(found.errors.values())
        if counted >= requests or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def test_what_an_archive_did(served: Instance) -> None:
    """By a server with keys: the management API, which knows the queue, has one of its own."""
    before = settled(served, 1)
    asked = [ask(served, body) for body in [*[GOOD] * 7, BAD, BAD, LONG]]
    assert asked == [200] * 7 + [400, 400, 413]
    found = activity.between(before, settled(served, int(before.counters["traceserve_requests_total"]) + 10))
    assert found.requests == 10 and found.errors == {"InvalidRequest": 2, "InputTooLong": 1}
    assert found.waiting == 0 and found.padding_share is not None and 0 <= found.padding_share < 1
    assert found.latency is not None and found.queue is not None and 0 < found.queue < found.latency < 60
    assert found.batch_p50 is not None and found.batch_p99 is not None
    assert 0 < found.batch_p50 <= found.batch_p99 <= 10 and found.batch_p50 < found.latency
    counts = activity.answers_by_status(served)
    assert counts["2XX"] >= 7 and counts["4XX"] == 3 and counts["5XX"] == 0


def test_the_command_shows_the_totals(served: Instance) -> None:
    ask(served, BAD)
    settled(served, 2)
    shown = subprocess.run(
        COMMAND, capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert str(served.port) in shown.stdout and "1 of 1" in shown.stdout
    assert re.search(r"tiny\W+1\.0\W", shown.stdout), shown.stdout
    [row] = re.findall(r"^ tiny\S* +(\d+) +[\d.]+ .*?(\d+) *$", shown.stdout, re.MULTILINE)
    assert int(row[0]) >= 2 and int(row[1]) >= 1
    assert re.search(rf"tiny:{served.port} failed: .*\d InvalidRequest", shown.stdout)
    assert re.search(rf"{served.port}: \d+ answers 2XX, [1-9]\d* answers 4XX, 0 answers 5XX; http", shown.stdout)


def test_a_worker_that_cannot_be_started_again_is_no_worker(served: Instance) -> None:
    """Its processes are there most of the time: TorchServe starts one after the other."""
    model = served.unpacked("tiny") / served.manifest("tiny").model_file
    hidden = model.rename(model.with_name("hidden"))

    def shown(until: str) -> str:
        deadline = time.monotonic() + 60
        while True:
            said = subprocess.run(COMMAND, capture_output=True, text=True, timeout=60, check=True).stdout
            if until in said or time.monotonic() > deadline:
                return said

    try:
        [worker] = [
            each for each in psutil.Process(served.pid).children(True) if stopping.WORKER in " ".join(each.cmdline())
        ]
        worker.kill()
        said = shown("cannot load")
        assert "0 of 1" in said and "1 of 1" not in said
        assert (
            f"tiny:{served.port} a worker cannot load the archive: traceserve.json names the file {model.name}" in said
        )
    finally:
        hidden.rename(model)
    said = shown("1 of 1")
    assert "1 of 1" in said and "cannot load" not in said


def test_a_server_that_hangs_is_told_apart(served: Instance) -> None:
    """Its processes are alive."""
    os.kill(served.pid, signal.SIGSTOP)
    try:
        shown = subprocess.run(COMMAND, capture_output=True, text=True, timeout=60, check=True)
    finally:
        os.kill(served.pid, signal.SIGCONT)
    assert "no answer" in shown.stdout and "1 of 1" not in shown.stdout
    assert f"{served.port}: does not answer; http" in shown.stdout


def test_it_is_watched_line_by_line_until_interrupted(served: Instance) -> None:
    watching = subprocess.Popen([*COMMAND, "--watch", "0.5"], stdout=subprocess.PIPE, text=True)
    try:
        assert watching.stdout is not None
        watching.stdout.readline()  # it has begun
        for _ in range(3):
            ask(served, GOOD)
            ask(served, BAD)
        lines = [watching.stdout.readline() for _ in range(5)]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 0
    finally:
        watching.kill()
        watching.communicate()
    own = [re.search(rf"tiny:{served.port} requests (\d+), requests/s .*errors (\d+)", line) for line in lines]
    assert all(own), lines
    assert sum(int(found[1]) for found in own if found) == 6
    assert sum(int(found[2]) for found in own if found) == 3 and "(" in "".join(lines)


def test_it_is_watched_on_a_terminal(served: Instance) -> None:
    """In a table that is drawn anew."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    watching = subprocess.Popen([*COMMAND, "--watch", "0.3"], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        deadline = time.monotonic() + 30
        while shown.count(b"the last 0.3 s") < 2 and time.monotonic() < deadline:
            ask(served, GOOD)
            shown += os.read(ours, 65536)
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 0
    finally:
        watching.kill()
        watching.wait()
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert text.count("the last 0.3 s; Ctrl-C ends") >= 2 and re.search(r"tiny:\d+ +\d+ ", text)


def test_no_server(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    watching = subprocess.Popen(
        [*COMMAND, "--watch", "0.2"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        assert watching.stdout is not None
        assert watching.stdout.readline().rstrip().endswith("no server is running")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 0
    finally:
        watching.kill()
        watching.communicate()


def test_it_is_verified_through_its_own_door(
    served: Instance, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its name, whose key is known; by its archive; and by its URL with a key, a wrong one, and none."""
    archive = pack_archive(artifact, "tiny", tmp_path)
    assert cli.main(["verify", "tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["asked"] == found["golden"] > 20 and found["notes"] == []
    assert cli.main(["verify", str(archive)]) == 0
    (tmp_path / "key").write_text(f"{served.key}\n")
    url = [f"{served.url}/predictions/tiny", "--archive", str(archive)]
    assert cli.main(["verify", *url, "--key-file", str(tmp_path / "key")]) == 0
    assert cli.main(["verify", *url, "--key", "wrong"]) == 2
    assert cli.main(["verify", *url]) == 2
    assert "give its key: --key KEY or --key-file" in capsys.readouterr().err.replace("\n", " ")
    (tmp_path / "newer").mkdir()
    newer = pack_archive(artifact, "tiny", tmp_path / "newer", version="2.0")
    assert cli.main(["verify", str(newer)]) == 1
    assert "it does not serve version 2.0 of tiny" in capsys.readouterr().out.replace("\n", " ")


def test_a_server_may_be_up_for_days() -> None:
    assert _duration(11_045.5) == "3:04:05"
    assert _duration(2 * 86_400 + 11_045) == "2 days, 3:04:05"
