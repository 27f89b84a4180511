"""Starts archives: a private, quiet, hardened instance per port, ready when returned."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

from traceserve_hosts import libraries
from traceserve_runtime import mirror
from traceserve_runtime.json_types import JsonObject
from traceserve_runtime.manifest import Manifest

from traceserve.archives import signing, staging
from traceserve.archives.model_config import Serving
from traceserve.errors import ServerError, last_line
from traceserve.machine import neuron_cores
from traceserve.serving import client, configuration, instances, java, keys, management, ray_cluster, server_lock
from traceserve.serving.engines import DEFAULT_PORT, RAY, TORCHSERVE
from traceserve.serving.front import FrontendOptions
from traceserve.serving.instances import Instance
from traceserve.serving.log import last_words, load_failure
from traceserve.serving.plan import Archive, Scaling, ServerPlan, planned, record_started

_SLACK = 0.5  # seconds an answer may take after the frontend's own limit

_LONGEST_SOCKET_PATH = 103  # bytes, on macOS; Linux has 107
_WARNING = re.compile(r"^\S+ +(?:WARN|ERROR) .*$", re.MULTILINE)
# Characters of a path that mean nothing else in XML, URLs, Log4j's patterns and HAProxy's configuration.
_PLAIN = re.compile(r"[\w /.+-]*", re.ASCII)
_FOLDER = re.compile(r"traceserve-\d+-[a-z0-9_]{8}")  # the names by _new_folder


def start(
    archives: Sequence[Path],
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    workers: Optional[int] = None,
    timeout: float = 300.0,
    progress: Optional[Callable[[str], None]] = None,
    serving: Optional[Serving] = None,
    front: FrontendOptions = FrontendOptions(),
    engine: str = TORCHSERVE,
    shares: Sequence[float] = (),
    trusted: Optional[Path] = None,
    scaling: Scaling = Scaling(),
) -> Instance:
    """Start an engine on archives and wait until each has answered a request; raises ServerError with the reason.

    `serving` and `workers` override the archives' own configurations. `shares` divide the requests to one name among
    its versions, if the engine supports several. With `trusted`, a public key or certificates, only archives that are
    signed by it are served; SignatureError is raised for others.
    """
    kind = SERVING_ENGINES[engine]
    if scaling != Scaling() and not kind.scales:
        raise ServerError(
            f"{engine} keeps the number of workers; --most-workers, --ongoing and --gpus are for --engine {RAY}"
        )
    pem = None if trusted is None else signing.read_trusted(trusted)
    with signing.verified(archives, pem) as files:
        found = planned(files, serving, workers, kind.versions, shares)
        plan = ServerPlan(found, host, port, front, timeout, progress or (lambda text: None), engine, scaling=scaling)
        return _started(plan, pem)


def _started(plan: ServerPlan, trusted: Optional[signing.Trusted]) -> Instance:
    kind = SERVING_ENGINES[plan.engine]
    configuration.check_host(plan.host)
    _check_port(plan.host, plan.port)
    if plan.front.metrics_port:
        _check_port(plan.host, plan.front.metrics_port, "--metrics-port")
    plan.front.check(kind.only_rsa)
    _sweep()
    with staging.held(_new_folder(plan.port, kind.longest_socket)) as folder, server_lock.locked(folder) as lock:
        plan = dataclasses.replace(plan, folder=folder, lock=lock)
        try:
            plan = _with_copies(plan, trusted)
            instance = kind.launch(plan)
            for archive in plan.archives.values():
                plan.progress(f"waiting for {archive.name} to answer")
                patience = (archive.serving.client_timeout or float("inf")) / 1000 + _SLACK
                _wait_for_answer(instance, archive.name, canary(archive.manifest), plan.timeout, patience)
        except BaseException:  # interrupts too: nobody else knows of the started process
            instances.end_started_in(folder)
            raise
    return instance


def _with_copies(plan: ServerPlan, trusted: Optional[signing.Trusted]) -> ServerPlan:
    """Copy into the server's folder what our later commands check by, whatever becomes of the user's files."""
    if trusted is not None:
        own = plan.folder / "trusted.pem"
        own.write_bytes(trusted.content)
        plan = dataclasses.replace(plan, trusted=str(own))
    if plan.front.certificate is not None:
        served = plan.folder / "certificate.pem"
        served.write_bytes(plan.front.certificate.read_bytes())
        plan = dataclasses.replace(plan, front=dataclasses.replace(plan.front, certificate=served))
    return plan


def _launch_torchserve(plan: ServerPlan) -> Instance:
    """Start TorchServe in the plan's folder; raises ServerError with the reason."""
    for archive in plan.archives.values():
        check_for_torchserve(archive)
    hardware = {name: archive.manifest.hardware for name, archive in plan.archives.items()}
    needed = neuron_cores.for_workers(hardware, plan.workers)
    needed_by_java = java.find_java()
    folder, front = plan.folder, plan.front
    private = management.is_private(folder)
    (management_port, metrics_port), settings = configuration.configure_server(
        folder, plan.files, plan.changed, plan.host, plan.port, front, private
    )
    pid = launch(folder, settings, {**needed_by_java, **needed}, plan.lock)
    socket_path = str(folder / management.SOCKET) if private else None
    metrics_host = plan.host if front.metrics_port else "127.0.0.1"
    instance = record_started(plan, pid, metrics_port, management_port, metrics_host, management_socket=socket_path)
    if configuration.demands_keys(plan.host, front):
        instance = _with_keys(instance, plan.timeout)
        instances.remember(instance)
    return instance


def check_for_torchserve(archive: Archive) -> None:
    """Raise ServerError for what TorchServe cannot serve."""
    if archive.serving.continuous_batching and archive.workers > 1:
        raise ServerError(
            f"{archive.name} has continuous_batching, with which TorchServe's second worker hangs, and {archive.workers} "
            "workers; start one, or build the archive without it"
        )


class ServingEngine(NamedTuple):
    """How an engine serves archives."""

    launch: Callable[[ServerPlan], Instance]
    versions: bool  # it supports several versions of one name
    longest_socket: str  # below a server's folder
    scales: bool  # it changes the number of processes as requests wait
    only_rsa: bool  # its TLS reads no other private keys


SERVING_ENGINES: Dict[str, ServingEngine] = {
    TORCHSERVE: ServingEngine(_launch_torchserve, False, "tmp/.ts.sock.65535", False, True),
    RAY: ServingEngine(ray_cluster.launch_cluster, True, ray_cluster.LONGEST_SOCKET, True, False),
}


def _sweep() -> None:
    """Remove the remains of dead servers whose failure was shown, and of killed starts."""
    instances.sweep()
    for place in {Path(tempfile.gettempdir()), Path("/tmp")}:
        if place.is_dir():
            for left in staging.abandoned(place, _FOLDER):
                if not instances.is_remembered(left):
                    instances.end_started_in(left)


def _new_folder(port: int, longest_socket: str) -> Path:
    """Make a temporary folder for an engine's sockets and configuration, which limit its path; raises ServerError."""
    made: List[Path] = []
    for place in (None, "/tmp"):
        with contextlib.suppress(OSError):
            made.append(Path(tempfile.mkdtemp(prefix=f"traceserve-{port}-", dir=place)))
            short = len(os.fsencode(made[-1] / longest_socket)) <= _LONGEST_SOCKET_PATH
            if short and all(_PLAIN.fullmatch(str(path)) for path in (made[-1], made[-1].resolve())):
                for unused in made[:-1]:
                    unused.rmdir()
                return made[-1]
    for unused in made:
        unused.rmdir()
    raise ServerError(
        f"the temporary folder {tempfile.gettempdir()} has too long a path for the sockets of the server, or one with "
        "special characters; set TMPDIR to one with a shorter path of letters and digits"
    )


def _check_port(host: str, port: int, option: str = "--port") -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ServerError(f"--host {host} is no address of this machine") from None
            raise ServerError(
                f"port {port} of {host} cannot be used ({error.strerror}); choose another with {option}, or stop what uses "
                "it (`traceserve status` shows the servers of traceserve)"
            ) from None


def launch(folder: Path, settings: Dict[str, Path], needed: Dict[str, str], lock: Optional[int] = None) -> int:
    """Run `torchserve --start` with the needed environment; returns the pid of its JVM, which inherits the lock."""
    keeper = [] if lock is None else ["traceserve.serving.lock_keeper", str(lock)]
    command = [sys.executable, "-m", *keeper, "ts.model_server", "--start", "--no-config-snapshots"]
    command += [part for option, value in settings.items() for part in (f"--{option}", str(value))]
    variables = {
        **{key: value for key, value in os.environ.items() if not key.startswith("TS_")},
        **needed,
        # TorchServe keeps its pid file, sockets and unpacked archives in the temporary folder: one per instance.
        "TMPDIR": str(folder / "tmp"),
        "TEMP": str(folder / "tmp"),
        "LOG_LOCATION": str(folder / "logs"),
        "METRICS_LOCATION": str(folder / "logs"),
        mirror.VARIABLE: str(folder / configuration.MIRROR_FILE),
        **libraries.settings(),
    }
    with (folder / "logs" / "start.log").open("wb") as log:
        result = subprocess.run(
            command,
            cwd=folder / "run",
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
    pid_file = folder / "tmp" / ".model_server.pid"
    if result.returncode or not pid_file.is_file():
        said = (folder / "logs" / "start.log").read_text(encoding="utf-8", errors="replace")
        hint = "; install it with: pip install 'traceserve[serve]'" if "No module named" in said else ""
        raise ServerError(f"torchserve did not start: {last_line(said)}{hint}")
    return int(pid_file.read_text())


def _with_keys(instance: Instance, timeout: float) -> Instance:
    """Wait for the keys that TorchServe writes into its working directory once it listens."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        _check_alive(instance)
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            found = keys.torchserve_keys(Path(instance.folder))
            return dataclasses.replace(instance, key=found["inference"], management_key=found["management"])
        time.sleep(0.05)
    raise ServerError(f"TorchServe wrote no keys within {timeout:.0f} s")


def canary(manifest: Manifest) -> JsonObject:
    """Return the body of a request that this archive answers."""
    from traceserve_runtime.tasks import TASKS  # imports numpy and tokenizers while the JVM starts

    return TASKS[manifest.task].canary_body(manifest)


def _wait_for_answer(
    instance: Instance, name: str, body: JsonObject, timeout: float, patience: float = float("inf")
) -> None:
    """Ask until there is an answer, for `timeout` seconds. Without a worker the frontend holds a request indefinitely, so
    a thread asks, while this one watches the worker's log.

    A request is retried after `patience` seconds, when the frontend has silently dropped it.
    """
    deadline = time.monotonic() + timeout

    def ask(outcome: List[Optional[Exception]]) -> None:
        try:
            left = max(1.0, deadline - time.monotonic())
            client.predict(instance.address, name, body, left)
            outcome.append(None)
        except Exception as error:  # reported by the waiting thread
            outcome.append(error)

    while time.monotonic() < deadline:
        outcome: List[Optional[Exception]] = []
        thread = threading.Thread(target=ask, args=(outcome,), daemon=True)
        thread.start()
        ends = min(deadline, time.monotonic() + patience)
        while not outcome and time.monotonic() < ends:
            thread.join(0.05)
            _check_alive(instance)
        if outcome and outcome[0] is None:
            return
        if outcome and not isinstance(outcome[0], client.NotYet):
            raise ServerError(f"{name} does not answer its own sample: {outcome[0]}")
        time.sleep(0.02)
    raise ServerError(
        f"{name} gave no answer within {timeout:g} s; `traceserve serve --timeout S` waits longer{_last_warning(instance.log)}"
    )


def _last_warning(log: Path) -> str:
    """Return a log's last line at level WARN or ERROR, as the end of an error; empty if there is none."""
    found = _WARNING.findall(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else []
    return f"; its log's last warning: {found[-1].rstrip()}" if found else ""


def _check_alive(instance: Instance) -> None:
    """Raise a worker's own error if it could not load, or the server's if it ended."""
    failed = load_failure(instance.log)
    if failed:
        raise ServerError(
            f"the worker of {failed.name or ' or '.join(instance.names)} cannot load the archive: {failed.reason}"
        )
    if instance.process is None:
        raise ServerError(f"the server ended{last_words(Path(instance.folder))}")
