"""This user's running TorchServes: recorded, found, stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import psutil
from traceserve_runtime.manifest import Manifest

from traceserve.errors import NoSpace, ServerError
from traceserve.machine import user_folders
from traceserve.machine.private_files import write_private
from traceserve.serving import java, server_lock, stopping
from traceserve.serving.client import Address
from traceserve.serving.engines import RAY, TORCHSERVE

_KEPT = 5  # folders of dead servers kept until their failure was shown; older ones go
_REPLICA = re.compile(r"ray::ServeReplica:([^:]+)")
_READABLE = ("logs", "run")  # kept of a dead server
CERTIFICATE_AND_KEY = "run/tls.pem"  # in a cluster's folder, for its HAProxy
RAY_KEY, TORCHSERVE_KEYS = "run/key", "run/key_file.json"  # in a server's folder
_SECRET = (CERTIFICATE_AND_KEY, RAY_KEY, TORCHSERVE_KEYS)


@dataclass(frozen=True)
class Instance:
    """One of our servers; `folder` holds its configuration, logs and temporary files."""

    port: int
    host: str
    management_port: int
    metrics_port: int
    pid: int
    started: float  # start of the process, in seconds since 1970
    names: Tuple[str, ...]
    workers: Dict[str, int]  # by name
    folder: str
    key: Optional[str]  # for predictions, if token authorization is on
    management_key: Optional[str]
    machine: str = dataclasses.field(default_factory=server_lock.this_machine)
    seen: bool = False  # its failure was shown to somebody
    certificate: Optional[str] = None  # the file of its certificate, if it uses TLS
    engine: str = TORCHSERVE
    management_socket: Optional[str] = None  # TorchServe's, if this user alone reaches it; then it has no port
    folders: Dict[str, str] = dataclasses.field(default_factory=dict)  # by name, if it is not the name: after an update
    trusted: Optional[str] = None  # the file by which signatures are checked, if they are demanded
    ticks: Optional[int] = None  # start of the process on the clock that nobody sets, see `ticks_of`
    metrics_host: str = "127.0.0.1"
    locked: bool = False  # its folder, as long as it runs

    @property
    def url(self) -> str:
        """Its URL from this machine."""
        return f"{'https' if self.certificate else 'http'}://{_in_url(self.host)}:{self.port}"

    @property
    def address(self) -> Address:
        """Its address from this machine, with its key and certificate."""
        return Address(self.url, self.key, self.certificate)

    def predictions_url(self, name: str) -> str:
        """Return the URL from this machine at which one of its archives predicts."""
        return f"{self.url}/predictions/{name}"

    @property
    def metrics_url(self) -> str:
        """Its metrics' URL from this machine."""
        return f"http://{_in_url(self.metrics_host)}:{self.metrics_port}/metrics"

    @property
    def process(self) -> Optional[psutil.Process]:
        """The running process, or None."""
        if not server_lock.is_this_machine(self.machine):  # its pid is another process's here
            return None
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if self._is(process) and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def _is(self, process: psutil.Process) -> bool:
        """Return whether this is its process, not a later one with the same pid."""
        if self.ticks is not None:
            return ticks_of(process.pid) == self.ticks
        return bool(abs(process.create_time() - self.started) < 1)

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of one of its archives."""
        return Manifest.read(self.unpacked(name), verify=False)

    def unpacked(self, name: str) -> Path:
        """Return the folder of one of its archives."""
        return Path(self.folder, "store", self.folders.get(name, name))

    @property
    def log(self) -> Path:
        """The log of the workers and of TorchServe itself."""
        return Path(self.folder, "logs", "server.log")


_FIELDS = {field.name for field in dataclasses.fields(Instance)}


def ticks_of(pid: int) -> Optional[int]:
    """Return when a process started, in the kernel's ticks since the machine did; None if it has ended, or where the system
    does not tell.

    psutil's `create_time` moves whenever the machine's clock is set, and with it a server would seem to be another process.
    """
    try:
        told = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(told.rpartition(")")[2].split()[19])


def remember(instance: Instance) -> None:
    """Write the state file, readable only by the user since it has the keys. Its name identifies this start, not just
    the port. Raises NoSpace."""
    write_private(_state_file(instance), json.dumps(dataclasses.asdict(instance)))


def running() -> List[Instance]:
    """Return this user's running servers on this machine, by port. Nothing is removed."""
    return [instance for instance in _remembered() if instance.process is not None]


def dead() -> List[Instance]:
    """Return the last servers that died and whose logs still exist, the latest first. Nothing is removed."""
    return [instance for instance in _ended() if instance.log.is_file()][:_KEPT]


def tidy_dead() -> List[Instance]:
    """Return the same; nothing of any dead server runs any more, and no more than the readable files of these is left."""
    kept = dead()
    for instance in _ended():
        _end_orphans(instance)
        if instance in kept:
            _keep_only(instance)
        else:
            _remove(instance)
    return kept


def _ended() -> List[Instance]:
    ended = [instance for instance in _remembered() if instance.process is None]
    return sorted(ended, key=lambda instance: -instance.started)


def as_remembered(instance: Instance) -> Instance:
    """Return the same server as its state file has it now; raises ServerError if it has ended."""
    for each in running():
        if each.folder == instance.folder:
            return each
    raise has_ended(instance)


def has_ended(instance: Instance) -> ServerError:
    """Return the error of a command whose server has ended."""
    return ServerError(f"the server on port {instance.port} has ended; `traceserve status` says why")


def mark_seen(instance: Instance) -> None:
    """Record that this server's failure was shown: the next start removes its remains. Its keys are forgotten at once."""
    with contextlib.suppress(OSError, NoSpace):  # shown again next time
        remember(dataclasses.replace(instance, seen=True, key=None, management_key=None))


def sweep() -> None:
    """Remove the remains of dead servers whose failure was shown."""
    for instance in tidy_dead():
        if instance.seen:
            _remove(instance)


def is_remembered(folder: Path) -> bool:
    """Return whether a server in this folder has a state file, on any machine."""
    return (_state_folder() / f"{folder.name}.json").exists()


def _remembered() -> Iterator[Instance]:
    """Yield this machine's servers with a state file. Those of other machines or containers that share the home
    are skipped, since their processes are not visible here, unless their folder's lock shows that they have ended."""
    found: List[Instance] = []
    for path in _state_folder().glob("*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = {key: value for key, value in content.items() if key in _FIELDS}  # a later version has others
            instance = Instance(**{**known, "names": tuple(content["names"]), "workers": dict(content["workers"])})
        except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError):
            continue  # being removed, or from another version
        if server_lock.is_this_machine(instance.machine) or (
            instance.locked and server_lock.is_released(Path(instance.folder), instance.machine)
        ):
            found.append(instance)
    return iter(sorted(found, key=lambda instance: (instance.port, instance.started)))


def find_instance(port: Optional[int]) -> Instance:
    """Return the server on `port`, or the only one; raises ServerError."""
    servers = running()
    if not servers:
        raise none_running()
    ports = ", ".join(str(instance.port) for instance in servers)
    if port is None and len(servers) > 1:
        raise ServerError(f"several servers are running, on the ports {ports}; choose one with --port")
    for instance in servers:
        if port in (None, instance.port):
            return instance
    raise ServerError(f"no server of traceserve is running on port {port}, but on {ports}")


def none_running(name: str = "NAME", otherwise: str = "") -> ServerError:
    """Return the error of a command that needs a server, of an archive if named, while none is running."""
    ports = ", ".join(str(instance.port) for instance in dead())
    told = f" (one on port {ports} died; `traceserve status` says why)" if ports else ""
    return ServerError(f"no server is running{told}; `traceserve serve model_store/{name}.mar` starts one{otherwise}")


def serving_instance(name: str, port: Optional[int] = None, or_url: bool = False) -> Instance:
    """Return the server of an archive, on this port if given; raises ServerError. `or_url`: whether the caller takes a URL
    in place of a name."""
    if "://" in name:
        raise ServerError(
            f"{name} is a URL; give the archive's name, and --port if several servers serve it, or ask the URL with curl"
        )
    if port is not None:
        found = [find_instance(port)]
        if name not in found[0].names:
            raise ServerError(f"the server on port {port} has no {name}, but {', '.join(found[0].names)}")
        return found[0]
    found = serving_instances(name, ", and a URL stands for any other server" if or_url else "")
    if len(found) > 1:
        ports = ", ".join(str(instance.port) for instance in found)
        raise ServerError(
            f"{name} is served on the ports {ports}; choose one with --port{', or give URLs' if or_url else ''}"
        )
    return found[0]


def serving_instances(name: str, otherwise: str) -> List[Instance]:
    """Return the servers of an archive; raises ServerError where there is none, and says what else may be named."""
    servers = running()
    if not servers:
        raise none_running(name, otherwise)
    found = [instance for instance in servers if name in instance.names]
    if not found:
        others = ", ".join(sorted({other for instance in servers for other in instance.names}))
        raise ServerError(
            f"no server of traceserve serves {name}, but {others}; `traceserve serve model_store/{name}.mar` starts one"
            + otherwise
        )
    return found


def workers_alive(instance: Instance) -> Dict[str, int]:
    """Return the number of running worker processes per archive."""
    alive = dict.fromkeys(instance.names, 0)
    process = instance.process
    names = {instance.unpacked(name).resolve(): name for name in instance.names}
    with contextlib.suppress(psutil.Error):
        for child in process.children(recursive=True) if process is not None else ():
            with contextlib.suppress(psutil.Error, KeyError):  # it may have ended
                command = " ".join(child.cmdline())
                replica = _REPLICA.match(command)
                if replica:
                    application = replica.group(1)  # NAME, or NAME-VERSION where a name has several
                    alive[application if application in alive else application.rpartition("-")[0]] += 1
                elif stopping.WORKER in command:
                    alive[names[Path(child.cwd()).resolve()]] += 1  # a worker works in its archive's folder
    return alive


def wait(instance: Instance, poll: float = 0.5) -> None:
    """Return when the server has ended."""
    while instance.process is not None:
        time.sleep(poll)


def stop(instance: Instance, at_once: bool = False) -> None:
    """Stop a server and its workers, and remove its files; it finishes running requests unless `at_once`."""
    process = instance.process
    try:
        if process is not None:
            stopping.end_server(process, at_once)
    finally:  # an interrupt only ends the waiting
        _end_orphans(instance)
        with contextlib.suppress(OSError):  # the next server starts without it
            java.keep_class_archive(Path(instance.folder))
        _remove(instance)


def end_started_in(folder: Path) -> None:
    """Immediately end every TorchServe started on this folder, recorded or not, and remove the folder."""
    for _ in range(2):  # a starter may just be starting its JVM
        stopping.end_all_in(folder)
    with contextlib.suppress(FileNotFoundError):
        (_state_folder() / f"{folder.name}.json").unlink()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(sockets_folder(folder), ignore_errors=True)


def _end_orphans(instance: Instance) -> None:
    """Immediately end what outlived a cluster's first process, as where that was killed: it would hold the port."""
    if instance.engine == RAY:
        stopping.end_all_in(Path(instance.folder))


def sockets_folder(folder: Path) -> Path:
    """Return the folder of a cluster's HAProxy's sockets: Ray adds 57 characters to their paths, limited to 97."""
    return Path("/tmp", f"ts-{folder.name[-8:]}")


def _remove(instance: Instance) -> None:
    """Remove its folder and its own state file, never that of another server now on the port."""
    with contextlib.suppress(FileNotFoundError):
        _state_file(instance).unlink()
    shutil.rmtree(instance.folder, ignore_errors=True)
    shutil.rmtree(sockets_folder(Path(instance.folder)), ignore_errors=True)


def _keep_only(instance: Instance) -> None:
    """Keep only a dead server's readable files: its archives and temporary files are large, and its keys are secret."""
    with contextlib.suppress(FileNotFoundError):  # another command may remove it meanwhile
        for path in Path(instance.folder).iterdir():
            if path.is_dir() and path.name not in _READABLE:
                shutil.rmtree(path, ignore_errors=True)
    for name in _SECRET:
        Path(instance.folder, name).unlink(missing_ok=True)


def _in_url(host: str) -> str:
    """Return how this machine reaches an address that a server listens on."""
    if host != "localhost" and ipaddress.ip_address(host).is_unspecified:
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _state_folder() -> Path:
    folder = user_folders.state("servers")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _state_file(instance: Instance) -> Path:
    return _state_folder() / f"{Path(instance.folder).name}.json"
