"""Recorded servers: removal of state files, remains of dead servers, and interrupts."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Iterator, List

import psutil
import pytest
from traceserve import cli
from traceserve.archives import staging
from traceserve.errors import ServerError
from traceserve.serving import configuration, instances, server
from traceserve.serving.engines import RAY
from traceserve.serving.instances import Instance

LOG = "2026-11-26 ERROR java.lang.OutOfMemoryError: Java heap space\n2026-11-26 INFO one more line\n"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This test's own folders; the temporary one has a path short enough for sockets."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with tempfile.TemporaryDirectory() as temporary:
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        yield


@pytest.fixture()
def processes() -> Iterator[List[subprocess.Popen[bytes]]]:
    started: List[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def remembered(processes: List[subprocess.Popen[bytes]], port: int = 18000, **changes: Any) -> Instance:
    """A killable process instead of a TorchServe."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    processes.append(process)
    folder = Path(tempfile.mkdtemp(prefix=f"traceserve-{port}-"))
    for name in ("store", "logs", "tmp", "run"):
        (folder / name).mkdir()
    (folder / "store" / "weights").write_bytes(bytes(1000))
    (folder / "logs" / "server.log").write_text(LOG)
    started = psutil.Process(process.pid).create_time()
    instance = Instance(
        port, "127.0.0.1", 1, 2, process.pid, started, ("tiny",), {"tiny": 1}, str(folder), None, None, **changes
    )
    instances.remember(instance)
    return instance


def kill(instance: Instance) -> None:
    process = instance.process
    assert process is not None
    process.kill()
    process.wait()


def test_stopping_a_server_leaves_the_next_one_on_its_port_alone(processes: Any) -> None:
    old = remembered(processes)
    kill(old)
    new = remembered(processes)
    instances.stop(old)
    assert instances.running() == [new]
    assert not Path(old.folder).exists() and Path(new.folder, "store").is_dir()
    instances.stop(new)
    assert instances.running() == [] and new.process is None and not Path(new.folder).exists()


def test_a_clock_that_is_set_makes_no_other_process_of_a_server(processes: Any) -> None:
    """psutil's start of a process moves with the clock; the kernel's ticks do not."""
    old = remembered(processes)  # as one that was started before there were ticks
    assert old.ticks is None and old.process is not None
    told = dataclasses.replace(old, ticks=instances.ticks_of(old.pid), started=old.started + 3600)
    assert told.ticks and told.process is not None
    instances.remember(told)
    assert instances.running() == [told] and instances.died() == []
    assert Path(old.folder, "store", "weights").is_file()
    assert dataclasses.replace(told, ticks=told.ticks + 1).process is None  # a later process with its pid
    kill(told)
    processes[0].wait()
    assert instances.ticks_of(old.pid) is None and instances.running() == []


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::1", "[::1]")]
)
def test_urls_reach_the_address_that_it_listens_on(host: str, shown: str) -> None:
    started = Instance(8080, host, 0, 8082, 1, 0.0, (), {}, "", None, None, metrics_host=host)
    assert started.url == f"http://{shown}:8080" and started.metrics_url == f"http://{shown}:8082/metrics"


def test_of_a_server_that_does_not_answer_in_time_a_warning_is_quoted(processes: Any) -> None:
    """And no other line of its log."""
    instance = remembered(processes, configuration.free_ports(1)[0])
    with pytest.raises(ServerError) as caught:
        server._wait_for_answer(instance, "tiny", {}, 0.3)
    assert caught.value.message == (
        "tiny gave no answer within 0.3 s; `traceserve serve --timeout S` waits longer; its log's last warning: 2026-11-26 ERROR "
        "java.lang.OutOfMemoryError: Java heap space"
    )
    instance.log.write_text(LOG.splitlines()[1])
    with pytest.raises(ServerError, match="within 0.3 s; `traceserve serve --timeout S` waits longer$"):
        server._wait_for_answer(instance, "tiny", {}, 0.3)


def test_a_server_of_another_machine_is_not_judged(processes: Any) -> None:
    """For example, of another container that shares the home folder: its process is not visible here."""
    other = remembered(processes, machine="another one")
    kill(other)
    assert instances.running() == [] and instances.died() == []
    instances.sweep()
    assert Path(other.folder, "store", "weights").is_file()
    assert list((Path(os.environ["XDG_STATE_HOME"]) / "traceserve" / "servers").iterdir())


def test_the_log_of_a_dead_server_is_kept_until_somebody_has_seen_it(
    processes: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """And of its run/ all but the keys."""
    instance = remembered(processes)
    for name in ("tls.pem", "key", "key_file.json", "serve.json"):
        Path(instance.folder, "run", name).write_text("private")
    kill(instance)
    assert instances.running() == [] and instance.log.is_file()
    assert cli.main(["predict", "tiny", "hello"]) == 1
    assert "on port 18000 died; `traceserve status` says why" in capsys.readouterr().err
    instances.sweep()  # as at the next start
    assert instance.log.is_file()
    assert cli.main(["status"]) == 0
    shown = capsys.readouterr().out
    assert "tiny on port 18000 died" in shown and "OutOfMemoryError: Java heap space" in shown
    assert str(instance.log) in shown
    assert instance.log.read_text() == LOG and not Path(instance.folder, "store").exists()
    assert [path.name for path in Path(instance.folder, "run").iterdir()] == ["serve.json"]
    instances.sweep()
    assert not Path(instance.folder).exists() and instances.died() == []


def test_the_keys_of_a_dead_server_are_forgotten_once_it_was_shown(processes: Any) -> None:
    """One that the user chose may be that of other servers."""
    instance = dataclasses.replace(
        remembered(processes, engine=RAY), key="chosen by the user", management_key="another"
    )
    instances.remember(instance)
    kill(instance)
    assert cli.main(["status"]) == 0
    [state] = (Path(os.environ["XDG_STATE_HOME"]) / "traceserve" / "servers").iterdir()
    assert "chosen" not in state.read_text() and "another" not in state.read_text()
    [dead] = instances.died()
    assert (dead.seen, dead.port, dead.engine) == (True, 18000, RAY)


@pytest.mark.parametrize("options", [["--port", "18000"], ["--all"]])
def test_stop_removes_what_is_left_of_a_dead_server(
    processes: Any, options: List[str], capsys: pytest.CaptureFixture[str]
) -> None:
    instance = remembered(processes)
    kill(instance)
    assert cli.main(["stop", *options]) == 0
    assert "tiny on port 18000 had died; its log is removed" in capsys.readouterr().out
    assert not Path(instance.folder).exists() and instances.died() == []


def test_stop_takes_a_port_or_all(processes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    instance = remembered(processes)
    instances.remember(instance)
    assert cli.main(["stop", "--port", "18001", "--all"]) == 1
    assert "give --port or --all, not both" in capsys.readouterr().err and instance.process is not None


def test_of_dead_servers_the_last_ones_are_kept(processes: Any) -> None:
    """As for a service that is restarted repeatedly."""
    every = [remembered(processes, port=18000 + i) for i in range(7)]
    for i, instance in enumerate(every):
        kill(instance)
        instances._remove(instance)
        folder = Path(instance.folder)
        (folder / "logs").mkdir(parents=True)
        instance.log.write_text(LOG)
        instances.remember(dataclasses.replace(instance, started=instance.started + 10 * i))
    assert [instance.port for instance in instances.died()] == [18006, 18005, 18004, 18003, 18002]
    assert [Path(instance.folder).exists() for instance in every] == [False] * 2 + [True] * 5


def test_a_server_without_its_folder_is_forgotten(processes: Any) -> None:
    """As after a restart of the machine, which empties the temporary folder."""
    instance = remembered(processes)
    kill(instance)
    subprocess.run(["rm", "-r", instance.folder], check=True)
    assert instances.died() == []
    assert list((Path(os.environ["XDG_STATE_HOME"]) / "traceserve" / "servers").iterdir()) == []


@pytest.mark.parametrize("end", ["stop", "status"])
def test_what_outlived_the_first_process_of_a_cluster_is_ended(processes: Any, end: str) -> None:
    """It would answer on the port for ever, and nobody would know of it. Other clusters' and programs stay."""
    instance, other = remembered(processes, engine=RAY), remembered(processes, port=18001, engine=RAY)
    sleep = ["-S", "-c", "import time; time.sleep(600)"]

    def started(program: str, folder: str) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen([program, *sleep, f"{folder}/run/x"], executable=sys.executable))
        return processes[-1]

    left = [started(program, instance.folder) for program in ("raylet", "/bin/gcs_server", "haproxy")]
    others = [started("raylet", other.folder), started("editor", instance.folder)]
    kill(instance)
    if end == "stop":
        instances.stop(instance)
    else:
        assert instances.died() == [instance]
    for process in left:
        process.wait(5)
    assert [process.poll() for process in others] == [None] * 2 and instances.running() == [other]


def launched() -> List[str]:
    """Return the arguments of every TorchServe running in this test's temporary folder."""
    found = []
    for process in psutil.process_iter():
        try:
            arguments = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if f"{tempfile.gettempdir()}/traceserve-" in arguments:
            found.append(arguments)
    return found


@pytest.mark.parametrize("where", ["launched", "remembered"])
def test_an_interrupted_start_leaves_nothing_running(mar: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real JVM, and an interrupt before it is recorded, or right after."""
    seen: List[List[str]] = []
    real: Any = server.launch if where == "launched" else instances.remember

    def interrupted(*arguments: Any) -> Any:
        real(*arguments)
        seen.append(launched())
        raise KeyboardInterrupt

    monkeypatch.setattr(*((server, "launch") if where == "launched" else (instances, "remember")), interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.start([mar], port=configuration.free_ports(1)[0])
    assert any("ModelServer" in arguments for arguments in seen[0])
    assert launched() == [] and os.listdir(tempfile.gettempdir()) == []
    assert instances.running() == [] and instances.died() == []


def test_an_interrupt_in_the_midst_of_a_start_leaves_nothing(mar: Path, tmp_path: Path) -> None:
    """The signal comes as soon as any part of TorchServe runs: mostly the JVM's starter."""
    import signal

    temporary = tempfile.gettempdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "traceserve", "serve", str(mar), "--port", str(configuration.free_ports(1)[0])],
        env={**os.environ, "TMPDIR": temporary},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not launched() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in error
    assert launched() == [] and os.listdir(temporary) == []


def test_a_start_that_was_killed_is_swept_by_the_next(processes: Any) -> None:
    """It had unpacked an archive; running or starting servers are left alone."""
    running = remembered(processes)
    left, starting = (Path(tempfile.mkdtemp(prefix="traceserve-18000-")) for _ in range(2))
    for folder in (left, Path(running.folder)):
        (folder / staging.LOCK_FILE).touch()
    with staging.held(starting):
        server._sweep()
    assert not left.exists() and starting.exists()
    assert running.process is not None and Path(running.folder, "store", "weights").is_file()
