"""The running TorchServes of this user: remembered, found, ended."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import platformdirs
import psutil
from traceserve_runtime.manifest import Manifest

from traceserve import torchserve
from traceserve.errors import ServerError


@dataclass(frozen=True)
class Instance:
    """A TorchServe of ours; `folder` holds its configuration, logs and temporary files."""

    port: int
    host: str
    management_port: int
    metrics_port: int
    pid: int
    started: float  # when the process began, to tell it from a later one with the same pid
    names: Tuple[str, ...]
    workers: Dict[str, int]  # by name
    folder: str
    key: Optional[str]  # for predictions, where token authorization is on
    management_key: Optional[str]

    @property
    def url(self) -> str:
        """Where it answers, as seen from this machine."""
        host = "127.0.0.1" if _unspecified(self.host) else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def process(self) -> Optional[psutil.Process]:
        """The running process, or None."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def manifest(self, name: str) -> Manifest:
        """The manifest of one of its archives."""
        return Manifest.read(Path(self.folder, "store", name), verify=False)

    @property
    def log(self) -> Path:
        """What the workers and TorchServe itself wrote."""
        return Path(self.folder, "logs", "server.log")


def remember(instance: Instance) -> None:
    """Write the state file, which holds the keys: for the user alone."""
    path = _state_file(instance.port)
    descriptor = os.open(path.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(dataclasses.asdict(instance), stream)
    os.replace(path.with_suffix(".new"), path)


def running() -> List[Instance]:
    """The running servers of this user, by port; what is left of dead ones is removed."""
    found = []
    for path in sorted(_state_folder().glob("*.json"), key=lambda path: int(path.stem)):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            instance = Instance(**{**content, "names": tuple(content["names"]), "workers": dict(content["workers"])})
        except (ValueError, TypeError, KeyError, FileNotFoundError):
            continue  # being written, or of another version
        if instance.process is not None:
            found.append(instance)
        else:
            stop(instance)
    return found


def find(port: Optional[int]) -> Instance:
    """The server on `port`, or the only one; raises ServerError."""
    servers = running()
    if not servers:
        raise ServerError("no server is running; `traceserve serve model_store/NAME.mar` starts one")
    ports = ", ".join(str(instance.port) for instance in servers)
    if port is None and len(servers) > 1:
        raise ServerError(f"several servers are running, on the ports {ports}; choose one with --port")
    for instance in servers:
        if port in (None, instance.port):
            return instance
    raise ServerError(f"no server of traceserve is running on port {port}, but on {ports}")


def workers_alive(instance: Instance) -> Dict[str, int]:
    """How many worker processes of each archive run."""
    alive = dict.fromkeys(instance.names, 0)
    process = instance.process
    with contextlib.suppress(psutil.Error):
        for child in process.children(recursive=True) if process is not None else ():
            with contextlib.suppress(psutil.Error, KeyError):  # it may have ended
                if "model_service_worker" in " ".join(child.cmdline()):
                    alive[Path(child.cwd()).resolve().name] += 1  # a worker works in its archive's folder
    return alive


def wait(instance: Instance, poll: float = 0.5) -> None:
    """Return when the server has ended."""
    while instance.process is not None:
        time.sleep(poll)


def stop(instance: Instance, at_once: bool = False) -> None:
    """End a server and its workers, and remove its files; it finishes what it is asked now, unless `at_once`."""
    process = instance.process
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [process, *process.children(recursive=True)]
            if not at_once:
                process.terminate()
            _, alive = psutil.wait_procs(family, timeout=0 if at_once else 15)
            for survivor in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    survivor.kill()
            psutil.wait_procs(alive, timeout=5)
    _state_file(instance.port).unlink(missing_ok=True)
    torchserve.keep_class_archive(Path(instance.folder))
    shutil.rmtree(instance.folder, ignore_errors=True)


def _unspecified(host: str) -> bool:
    return host != "localhost" and ipaddress.ip_address(host).is_unspecified


def _state_folder() -> Path:
    folder = Path(platformdirs.user_state_dir("traceserve"), "servers")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _state_file(port: int) -> Path:
    return _state_folder() / f"{port}.json"
