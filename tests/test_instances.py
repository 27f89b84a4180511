"""Recorded servers: removal of state files, remains of dead servers, and interrupts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Iterator, List, Optional

import psutil
import pytest
from test_client import answering
from traceserve import cli
from traceserve.archives import staging
from traceserve.errors import ServerError
from traceserve.serving import configuration, instances, killed_starts, server, server_lock, stopping
from traceserve.serving.engines import RAY, TORCHSERVE
from traceserve.serving.front import FrontendOptions
from traceserve.serving.instances import Instance
from traceserve.serving.log import end_of_last_load, last_words, load_failure
from traceserve.serving.plan import Scaling, ServerPlan, record_started

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
    process = psutil.Process(instance.pid)
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
    assert instances.running() == [told] and instances.tidy_dead() == []
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


def test_a_server_that_refuses_its_own_sample_is_not_asked_again(processes: Any) -> None:
    with answering(422, b'{"error": {"message": "too long", "field": "text"}}') as url:
        instance = remembered(processes, int(url.rpartition(":")[2]))
        began = time.monotonic()
        with pytest.raises(ServerError, match=r"^tiny does not answer its own sample: too long \(at text\)$"):
            server._wait_for_answer(instance, "tiny", {}, 20.0)
    assert time.monotonic() - began < 10


def test_a_server_without_a_worker_is_asked_again(processes: Any) -> None:
    """Also where it drops a request without a word, once nobody would wait for it any more."""
    asked: List[float] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(time.monotonic())
            if len(asked) == 2:
                ended.wait(20)
            self.send_response(503 if len(asked) == 1 else 200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: Any) -> None: ...

    ended = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as asked_server:
        threading.Thread(target=asked_server.serve_forever, args=(0.01,)).start()
        try:
            server._wait_for_answer(
                remembered(processes, asked_server.server_address[1]), "tiny", {}, 20.0, patience=0.5
            )
        finally:
            ended.set()
            asked_server.shutdown()
    assert len(asked) == 3 and asked[1] - asked[0] < 0.5 <= asked[2] - asked[1]


def test_what_another_version_remembered_is_passed_over(processes: Any) -> None:
    """And what is no document at all: the other servers are found."""
    instance = remembered(processes)
    folder = Path(os.environ["XDG_STATE_HOME"]) / "traceserve" / "servers"
    [own] = folder.iterdir()
    earlier = json.loads(own.read_text())
    del earlier["pid"]
    for name, content in (("a", '{"port"'), ("b", '{"port": 1}'), ("c", json.dumps(earlier)), ("d", "[]")):
        (folder / f"{name}.json").write_text(content)
    assert instances.running() == [instance] and instances.tidy_dead() == []


def test_what_a_later_version_remembered_is_found(processes: Any) -> None:
    """Its server still runs when an earlier version is installed again."""
    instance = remembered(processes)
    [own] = (Path(os.environ["XDG_STATE_HOME"]) / "traceserve" / "servers").iterdir()
    own.write_text(json.dumps({**json.loads(own.read_text()), "a_field_of_later": 1}))
    assert instances.running() == [instance]
    instances.stop(instance)
    assert not own.exists()


def test_a_machine_may_be_renamed(processes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = remembered(processes)
    monkeypatch.setattr(platform, "node", lambda: "renamed")
    assert instances.running() == [instance]


def test_an_interrupt_ends_the_waiting_of_a_stop_and_not_the_stop(
    processes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(process: psutil.Process) -> None:
        raise KeyboardInterrupt

    instance = remembered(processes)
    monkeypatch.setattr(stopping, "_rest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        instances.stop(instance)
    assert instance.process is None and not Path(instance.folder).exists()
    assert instances.running() == instances.tidy_dead() == []


def test_a_server_that_does_not_end_is_killed(processes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gets its time before that."""
    monkeypatch.setattr(stopping, "_SECONDS_TO_FINISH", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    processes.append(subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE))
    with processes[0].stdout as said:
        assert said.readline() == b"ready\n"
    process, began = psutil.Process(processes[0].pid), time.monotonic()
    stopping._end([process], at_once=False)
    assert not process.is_running() and time.monotonic() - began >= 0.5


# A worker that computes for three tenths of a second; and what takes its core from it.
COMPUTING = (
    "import sys, time; print('ready', flush=True); sys.stdin.readline()\n"
    "while time.process_time() < 0.3: pass\n"
    "open(sys.argv[2], 'w').close(); time.sleep(600)"
)
SPINNING = "import time; ended = time.monotonic() + 60\nwhile time.monotonic() < ended: pass"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no process can be kept to one core here")
def test_a_worker_that_gets_little_of_a_core_may_finish(processes: Any, tmp_path: Path) -> None:
    """Nine processes share one core, and the worker computes with a ninth of it, less than one at rest may take."""
    core, answered = min(os.sched_getaffinity(0)), tmp_path / "answered"
    command = [sys.executable, "-S", "-c", COMPUTING, stopping.WORKER, str(answered)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    processes += [worker, *(subprocess.Popen([sys.executable, "-S", "-c", SPINNING]) for _ in range(8))]
    with worker.stdout as said, worker.stdin as asked:
        assert said.readline() == b"ready\n"
        for process in processes:
            os.sched_setaffinity(process.pid, {core})
        asked.write(b"\n")
        asked.flush()
        began = time.monotonic()
        stopping._rest(psutil.Process())
    assert answered.exists() and time.monotonic() - began < 20


def test_what_torchserve_cannot_scale_is_refused(mar: Path) -> None:
    with pytest.raises(
        ServerError, match="^torchserve keeps the number of workers; --most-workers, --ongoing and --gpus are"
    ):
        server.start([mar], port=configuration.free_ports(1)[0], scaling=Scaling(most=2))
    assert os.listdir(tempfile.gettempdir()) == []


DIED = "2026-11-26T10:00:00,000 INFO  Backend worker process died.\n"
RAISED = "2026-11-26T10:00:00,000 WARN  onnxruntime.capi.errors.NoSuchFile.LoadError: no model\n"


@pytest.mark.parametrize(
    ("log", "start", "reason"),
    [
        ("", 0, None),
        ("2026 INFO Failed to load model tiny, exception no model \n", 0, "no model"),
        ("2026 INFO Load model tiny cpu OOM, exception too large\n", 0, "too large"),
        ("2026 INFO Failed to load model tiny, exception no model\n", 55, None),  # an earlier worker's
        ("2026 INFO Failed to load model tiny, exception no model\n", 5000, "no model"),  # the log was rotated since
        (DIED + RAISED, 0, "onnxruntime.capi.errors.NoSuchFile.LoadError: no model"),
        (RAISED + DIED, 0, None),  # of something else; its own reason may still come
        (DIED, 0, None),
        (DIED * 2, 0, "its process died without a reason"),
        ("x org.pytorch.serve.archive.model.ModelNotFoundException: no tiny\n", 0, "no tiny"),
    ],
)
def test_why_a_worker_could_not_load_is_read_in_the_log(
    log: str, start: int, reason: Optional[str], tmp_path: Path
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "server.log").write_text(log)
    found = load_failure(tmp_path / "logs" / "server.log", start)
    assert (found and found.reason) == reason
    assert load_failure(tmp_path / "none.log") is None
    last = (RAISED if RAISED in log else log).strip().splitlines()[-1:]
    assert last_words(tmp_path) == (f": {last[0]}" if log else " without a message in its log")


def test_the_archive_whose_worker_cannot_load_is_named(processes: Any) -> None:
    """Not the one that is asked meanwhile; and one that is started beside it does not fail with it."""
    instance = dataclasses.replace(remembered(processes, configuration.free_ports(1)[0]), names=("intents", "tiny"))
    instance.log.write_text("2026 INFO Failed to load model tiny, exception no model\n")
    with pytest.raises(ServerError, match="^the worker of tiny cannot load the archive: no model$"):
        server._wait_for_answer(instance, "intents", {}, 5.0)
    assert load_failure(instance.log, name="intents") is None
    found = load_failure(instance.log, name="tiny")
    assert found is not None and found.reason == "no model"
    instance.log.write_text(DIED + RAISED)  # which do not tell whose
    with pytest.raises(ServerError, match="^the worker of intents or tiny cannot load the archive: onnxruntime"):
        server._wait_for_answer(instance, "intents", {}, 5.0)


def test_failures_before_a_worker_last_loaded_the_archive_are_over(tmp_path: Path) -> None:
    log, failed = tmp_path / "server.log", "2026 INFO Failed to load model tiny, exception {}\n"
    loaded = "2026 INFO traceserve loaded tiny: sequence_classification, torchscript\n"
    log.write_text(failed.format("earlier") + loaded + loaded.replace("tiny", "tiny2") + failed.format("no memory"))
    assert load_failure(log, end_of_last_load(log, "tiny"), "tiny") == ("tiny", "no memory")
    assert load_failure(log, end_of_last_load(log, "tiny.*"), "tiny") == ("tiny", "earlier")
    assert end_of_last_load(tmp_path / "none.log", "tiny") == 0


def test_a_server_of_another_machine_is_not_judged(processes: Any) -> None:
    """For example, of another container that shares the home folder: its process is not visible here."""
    other = remembered(processes, machine="another one")
    kill(other)
    assert instances.running() == [] and instances.tidy_dead() == []
    instances.sweep()
    assert Path(other.folder, "store", "weights").is_file()
    assert list((Path(os.environ["XDG_STATE_HOME"]) / "traceserve" / "servers").iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such locks")
def test_a_server_of_an_ended_container_is_known_by_its_folders_lock(processes: Any) -> None:
    """Or of this machine before it was started again; whatever process has its pid now."""
    node, *_ = server_lock.this_machine().split()
    others = [f"{node} another-boot 1", server_lock.this_machine() + "1"]
    died = [remembered(processes, 18000 + i, machine=machine, locked=True) for i, machine in enumerate(others)]
    unknown = [
        remembered(processes, 18010, machine="another one", locked=True),  # which shares the folder, but no locks
        remembered(processes, 18011, machine=others[0]),  # as an earlier version started it
    ]
    with contextlib.ExitStack() as running:
        for instance in died:
            assert running.enter_context(server_lock.locked(Path(instance.folder))) is not None
        assert instances.running() == instances.tidy_dead() == []
    assert instances.running() == [] and {instance.port for instance in instances.tidy_dead()} == {18000, 18001}
    assert [sorted(os.listdir(instance.folder)) for instance in died] == [["logs", "run"]] * 2
    for instance in instances.tidy_dead():
        instances.mark_seen(instance)
    instances.sweep()
    assert not any(Path(instance.folder).exists() for instance in died)
    assert all(Path(instance.folder, "store", "weights").is_file() for instance in unknown)
    assert len(list((Path(os.environ["XDG_STATE_HOME"]) / "traceserve" / "servers").iterdir())) == 2


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
    assert Path(instance.folder, "store").is_dir()  # an error removes nothing
    instances.sweep()  # as at the next start
    assert instance.log.is_file()
    assert cli.main(["status"]) == 0
    shown = capsys.readouterr().out
    assert "tiny on port 18000 died" in shown and "OutOfMemoryError: Java heap space" in shown
    assert str(instance.log) in shown
    assert instance.log.read_text() == LOG and not Path(instance.folder, "store").exists()
    assert [path.name for path in Path(instance.folder, "run").iterdir()] == ["serve.json"]
    instances.sweep()
    assert not Path(instance.folder).exists() and instances.tidy_dead() == []


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
    [dead] = instances.tidy_dead()
    assert (dead.seen, dead.port, dead.engine) == (True, 18000, RAY)


def test_two_commands_may_tidy_a_dead_server_at_once(processes: Any) -> None:
    instance = remembered(processes)
    kill(instance)
    shutil.rmtree(instance.folder)
    instances._keep_only(instance)
    assert not Path(instance.folder).exists()


@pytest.mark.parametrize("options", [["--port", "18000"], ["--all"]])
def test_stop_removes_what_is_left_of_a_dead_server(
    processes: Any, options: List[str], capsys: pytest.CaptureFixture[str]
) -> None:
    instance = remembered(processes)
    kill(instance)
    assert cli.main(["stop", *options]) == 0
    assert "tiny on port 18000 had died; its log is removed" in capsys.readouterr().out
    assert not Path(instance.folder).exists() and instances.tidy_dead() == []


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
    assert [instance.port for instance in instances.tidy_dead()] == [18006, 18005, 18004, 18003, 18002]
    assert [Path(instance.folder).exists() for instance in every] == [False] * 2 + [True] * 5


def test_a_server_without_its_folder_is_forgotten(processes: Any) -> None:
    """As after a restart of the machine, which empties the temporary folder."""
    instance = remembered(processes)
    kill(instance)
    subprocess.run(["rm", "-r", instance.folder], check=True)
    assert instances.tidy_dead() == []
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
        assert instances.tidy_dead() == [instance]
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
    assert instances.running() == [] and instances.tidy_dead() == []


def test_of_two_starts_on_one_port_the_second_says_that_it_is_taken(mar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both had found it free; the reason is in the JVM's output, not in its log."""
    monkeypatch.setattr(server, "_check_port", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ServerError, match="^TorchServe ended: .*Address already in use$"):
            server.start([mar], port=taken.getsockname()[1])
    assert launched() == [] and os.listdir(tempfile.gettempdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="it has no /tmp")
@pytest.mark.parametrize("name", ["R&D", "a#b", "${date}", "100%25", "a,b", "jörg", "a" * 100])
def test_a_temporary_folder_whose_path_would_mean_something_else_is_not_used(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To XML, a URL, Log4j, or as a socket's path."""
    (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    made = server._new_folder(18000, "tmp/.ts.sock.65535")
    made.rmdir()
    assert made.parent == Path("/tmp") and os.listdir(tmp_path / name) == []
    real = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix, dir: real(prefix=prefix, dir=dir or tmp_path / name))
    monkeypatch.setattr(server, "_PLAIN", re.compile("nothing"))
    with pytest.raises(ServerError, match="; set TMPDIR to one with a shorter path of letters and digits$"):
        server._new_folder(18000, "tmp/.ts.sock.65535")
    assert os.listdir(tmp_path / name) == []


def test_a_temporary_folder_of_plain_characters_is_used() -> None:
    place = Path(tempfile.mkdtemp(prefix="a b+c-d.e_f"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(place))
        assert server._new_folder(18000, "tmp/.ts.sock.65535").parent == place


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
        assert killed_starts.ports_of_killed_starts() == [18000] and left.exists()
        assert killed_starts.end_killed_starts() == [18000]
    assert not left.exists() and starting.exists()
    assert running.process is not None and Path(running.folder, "store", "weights").is_file()


def test_a_server_that_another_home_has_recorded_is_left_alone(
    processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although its start was killed: the folder for temporary files is that of every home."""
    folder = Path(tempfile.mkdtemp(prefix="traceserve-18000-"))
    (folder / staging.LOCK_FILE).touch()
    processes.append(subprocess.Popen(["sleep", "600"]))
    started = ServerPlan({}, "127.0.0.1", 18000, FrontendOptions(), 60, print, TORCHSERVE, folder)
    record_started(started, processes[-1].pid, metrics_port=0)
    assert [instance.port for instance in instances.running()] == [18000]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    assert instances.running() == [] and killed_starts.end_killed_starts() == []
    assert folder.exists() and processes[-1].poll() is None


def test_a_killed_starts_server_is_ended_before_its_port_is_tried(
    processes: Any, mar: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And by `stop --all`; `status` tells of it."""

    def launch(plan: Any) -> Instance:
        raise ServerError("launched")

    port = configuration.free_ports(1)[0]
    listening = (
        f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); print(flush=True); time.sleep(600)"
    )

    def left() -> subprocess.Popen[bytes]:
        folder = Path(tempfile.mkdtemp(prefix=f"traceserve-{port}-"))
        (folder / staging.LOCK_FILE).touch()
        command = ["raylet", "-S", "-c", listening, f"{folder}/run/x"]
        processes.append(subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE))
        with processes[-1].stdout as said:
            said.readline()
        return processes[-1]

    engine = server.SERVING_ENGINES[TORCHSERVE]._replace(launch=launch)
    monkeypatch.setitem(server.SERVING_ENGINES, TORCHSERVE, engine)
    first = left()
    with pytest.raises(ServerError, match="^launched$"):
        server.start([mar], port=port)
    first.wait(5)
    second = left()
    assert cli.main(["status"]) == 0 and second.poll() is None
    assert (
        f"`traceserve serve --port {port}` may have left a server; `traceserve stop --all`" in capsys.readouterr().out
    )
    assert cli.main(["stop", "--all"]) == 0
    assert f"ended what a killed `traceserve serve --port {port}` had left" in capsys.readouterr().out
    second.wait(5)


def test_torchserve_listens_on_no_ipv6_address(mar: Path) -> None:
    for host in ("::", "::1"):
        with pytest.raises(ServerError, match=f"such as --host {host}; --host 0.0.0.0 listens on IPv6 too$"):
            server.start([mar], host, configuration.free_ports(1)[0])
    configuration.check_host("::1", ipv6=True)


def test_a_dead_server_whose_log_was_removed_is_told(processes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    instance = remembered(processes)
    kill(instance)
    instance.log.unlink()
    assert cli.main(["status"]) == 0
    assert "tiny on port 18000 died without a message in its log" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            "Error occurred during initialization of VM\nMultiple garbage collectors selected\n",
            ": Error occurred during initialization of VM: Multiple garbage collectors selected",
        ),
        ("Picked up JAVA_TOOL_OPTIONS: -XX:+ExitOnOutOfMemoryError\n2026 INFO loaded\n", ": 2026 INFO loaded"),
        ("NOTE: Picked up JDK_JAVA_OPTIONS: -XX:+CrashOnOutOfMemoryError\n", " without a message in its log"),
        (
            "Invalid configuration: Invalid binding address\nException in thread Thread-0 java.lang.NullPointerException\n",
            ": Invalid configuration: Invalid binding address",
        ),
    ],
)
def test_why_a_server_ended_is_the_cause_alone(log: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "start.log").write_text(log)
    assert last_words(tmp_path) == words


def test_a_warning_of_any_archive_is_not_quoted(processes: Any) -> None:
    """TorchServe writes it for each archive that does not fix the number of its workers."""
    instance = remembered(processes)
    instance.log.write_text("2026 WARN slow\n2026 WARN Invalid model config in mar, minWorkers:0, maxWorkers:0\n")
    assert server._last_warning(instance.log) == "; its log's last warning: 2026 WARN slow"


@pytest.mark.parametrize("how", ["stopped", "stopping", "died"])
def test_a_server_in_the_foreground_ends_well_if_it_was_stopped(
    how: str, processes: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """systemd starts one that failed again."""
    instance = remembered(processes)
    if how == "stopping":
        instances.remember(dataclasses.replace(instance, stopped=True))
    if how == "stopped":
        instances.stop(instance)
    else:
        kill(instance)
    monkeypatch.setattr(server, "start", lambda *arguments, **options: instance)
    monkeypatch.setattr("traceserve.commands.serve.print_instance", lambda *arguments: None)
    assert cli.main(["serve", "tiny.mar", "--foreground"]) == int(how == "died")
    assert ("stopped by another command" in capsys.readouterr().out) == (how != "died")


def test_what_a_killed_writer_of_a_state_file_left_is_removed(processes: Any) -> None:
    instance = remembered(processes)
    folder = Path(os.environ["XDG_STATE_HOME"]) / "traceserve" / "servers"
    old, new = (folder / f".x.json.{name}.new" for name in ("old", "new"))
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    instances.sweep()
    assert not old.exists() and new.exists() and instances.running() == [instance]


def test_a_clock_that_is_set_makes_no_server_older(processes: Any) -> None:
    instance = dataclasses.replace(remembered(processes), started=time.time() + 86_400)
    instance = dataclasses.replace(instance, ticks=instances.ticks_of(instance.pid))
    assert 0 <= instance.seconds_up < 600
    kill(instance)
    assert instance.seconds_up == 0
