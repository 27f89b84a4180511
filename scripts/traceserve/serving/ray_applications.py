"""The applications of a Ray cluster of ours: which there are, and changes by the host's own program."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping

import psutil

from traceserve.errors import ServerError, last_line
from traceserve.machine.private_files import write_private
from traceserve.serving import instances
from traceserve.serving.instances import Instance
from traceserve.serving.update_lock import locks_held

_FILE = "serve.json"  # below a server's run/: all of its applications
_CHANGE = "change.json"  # the latest change
_PORT, _CORES = "--port=", "--num-cpus="  # of `ray start`: the cluster's own


def run_applications(
    folder: Path, config: Mapping[str, Any], address: str, variables: Mapping[str, str], timeout: float, what: str
) -> None:
    """Run all applications of a new cluster, and remember them; raises ServerError with a replica's message."""
    remember_applications(folder, config)
    _run(folder / "run" / _FILE, address, variables, timeout, what)


def change_applications(instance: Instance, config: Mapping[str, Any], timeout: float, what: str) -> None:
    """Run and remove applications of a running cluster, and leave the others; raises ServerError."""
    with _process(instance) as process:
        port, variables = _started_with(process, _PORT), process.environ()
    file = Path(instance.folder, "run", _CHANGE)
    write_private(file, json.dumps({**config, "http": applications_of(instance)["http"], "others": "stay"}, indent=2))
    _run(file, f"127.0.0.1:{port}", variables, timeout, what)


def cores_of_cluster(instance: Instance) -> int:
    """Return for how many cores a cluster was started: no more are given to replicas, whatever the machine has."""
    with _process(instance) as process:
        return int(_started_with(process, _CORES))


def applications_of(instance: Instance) -> Dict[str, Any]:
    """Return the configuration of all applications, without versions that are beside them for an update."""
    with _process(instance):
        found: Dict[str, Any] = json.loads(Path(instance.folder, "run", _FILE).read_text(encoding="utf-8"))
        return found


def remember_applications(folder: Path, config: Mapping[str, Any]) -> None:
    """Write down the configuration of all applications of the server in this folder."""
    write_private(folder / "run" / _FILE, json.dumps(config, indent=2))


@contextlib.contextmanager
def _process(instance: Instance) -> Iterator[psutil.Process]:
    """Yield a cluster's first process; raises ServerError if it has ended, or ends while it and its files are read."""
    try:
        process = instance.process
        if process is None:
            raise psutil.NoSuchProcess(instance.pid)
        yield process
    except (OSError, psutil.Error, ValueError):
        raise instances.has_ended(instance) from None


def _started_with(process: psutil.Process, option: str) -> str:
    """Return the value of an option of `ray start`, which the cluster's first process runs."""
    [value] = [part[len(option) :] for part in process.cmdline() if part.startswith(option)]
    return value


def _run(file: Path, address: str, variables: Mapping[str, str], timeout: float, what: str) -> None:
    command = [sys.executable, "-m", "traceserve_hosts.ray_cluster", address, str(file)]
    try:
        result = subprocess.run(
            command,
            cwd=file.parent,
            env=dict(variables),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            pass_fds=locks_held(),  # it may go on where this process is killed: nobody else changes the server meanwhile
        )
    except subprocess.TimeoutExpired:
        raise ServerError(
            f"{what} did not answer on Ray Serve within {timeout:.0f} s; --timeout gives it longer"
        ) from None
    if result.returncode:
        raise ServerError(f"Ray Serve cannot serve {what}: {last_line(result.stderr)}")
