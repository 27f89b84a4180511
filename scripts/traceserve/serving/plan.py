"""The plan of a start: which archives, how each is served, where, and by which engine; and the record of what it started."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Mapping, Optional, Sequence

import psutil
from traceserve_runtime import processor
from traceserve_runtime.manifest import Manifest

from traceserve.archives import staging
from traceserve.archives.contents import read_manifest, read_serving
from traceserve.archives.model_config import Serving
from traceserve.archives.names import check_name
from traceserve.errors import ServerError
from traceserve.serving import instances
from traceserve.serving.configuration import DEFAULT_WORKERS
from traceserve.serving.front import FrontendOptions
from traceserve.serving.instances import Instance
from traceserve.serving.log import last_words


@dataclass(frozen=True)
class Archive:
    """One archive and its serving configuration."""

    name: str  # it answers at /predictions/NAME
    file: Path
    manifest: Manifest
    serving: Serving
    changed: bool  # overrides its own model-config.yaml
    share: float = 1.0  # of the requests to its name, relative to other versions

    @property
    def workers(self) -> int:
        """Its number of processes, by default one. (TorchServe's own default is one per core.)"""
        return self.serving.workers or DEFAULT_WORKERS


@dataclass(frozen=True)
class Scaling:
    """How many processes an archive may get, and what each takes, where the engine decides that itself."""

    most: Optional[int] = None  # processes; None: as many as at the start
    # Requests per process beyond which there are to be more; None: twice the batch size.
    ongoing: Optional[float] = None
    gpus: Optional[float] = None  # per process; None: the processes of an archive for GPUs share one


@dataclass(frozen=True)
class ServerPlan:
    """A server to start in `folder`; the archives by their folders below it."""

    archives: Mapping[str, Archive]
    host: str
    port: int
    front: FrontendOptions
    timeout: float  # seconds
    progress: Callable[[str], None]
    engine: str
    folder: Path = Path()
    lock: Optional[int] = None  # the descriptor of the locked folder, for the server to inherit
    scaling: Scaling = Scaling()
    trusted: Optional[str] = None  # the server's own copy of what signatures are checked by, if they are demanded

    @property
    def files(self) -> Dict[str, Path]:
        """The archives, by their folders."""
        return {key: archive.file for key, archive in self.archives.items()}

    @property
    def changed(self) -> Dict[str, Serving]:
        """The configurations of archives that override their own."""
        return {key: archive.serving for key, archive in self.archives.items() if archive.changed}

    @property
    def workers(self) -> Dict[str, int]:
        """The number of processes per name."""
        found: Dict[str, int] = {}
        for archive in self.archives.values():
            found[archive.name] = found.get(archive.name, 0) + archive.workers
        return found


def record_started(
    plan: ServerPlan,
    pid: int,
    metrics_port: int,
    management_port: int = 0,
    metrics_host: str = "127.0.0.1",
    key: Optional[str] = None,
    management_socket: Optional[str] = None,
) -> Instance:
    """Record the just launched server of a plan as running, with what its engine alone knows; raises ServerError if it has
    ended."""
    try:
        started = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        raise ServerError(f"the server ended as soon as it was started{last_words(plan.folder)}") from None
    certificate = plan.front.certificate
    instance = Instance(
        port=plan.port,
        host=plan.host,
        management_port=management_port,
        metrics_port=metrics_port,
        pid=pid,
        started=started,
        names=tuple(plan.workers),
        workers=plan.workers,
        folder=str(plan.folder),
        key=key,
        management_key=None,
        certificate=None if certificate is None else str(certificate),
        engine=plan.engine,
        management_socket=management_socket,
        trusted=plan.trusted,
        ticks=instances.ticks_of(pid),
        metrics_host=metrics_host,
        locked=plan.lock is not None,
    )
    instances.remember(instance)
    staging.exempt(plan.folder)  # another user's home, or a container's, has no record of it
    return instance


def planned(
    files: Sequence[Path],
    serving: Optional[Serving],
    workers: Optional[int],
    versions: bool,
    shares: Sequence[float] = (),
) -> Dict[str, Archive]:
    """Return the archives by their folders; raises ServerError for two with the same address.

    `versions`: the engine supports several versions of one name.
    """
    if shares and len(shares) != len(files):
        raise ServerError(f"--shares has {len(shares)} numbers for {len(files)} archives; give one for each")
    found: Dict[str, Archive] = {}
    for i, path in enumerate(files):
        name = check_name(path.stem)
        manifest, own = read_manifest(path), read_serving(path)
        key = f"{name}-{manifest.version}" if versions and name in found else name
        if key in found or (key != name and found[name].manifest.version == manifest.version):
            said = f", both as version {manifest.version}" if versions else ""
            raise ServerError(f"{found[name].file} and {path} would both answer at /predictions/{name}{said}")
        wanted = _wanted(own, serving, workers)
        share = shares[i] if shares else 1.0
        found[key] = Archive(name, path.resolve(), manifest, wanted, wanted != own, share)
    return found


def _wanted(own: Serving, serving: Optional[Serving], workers: Optional[int]) -> Serving:
    """Return an archive's serving configuration; several workers share the cores unless threads are set."""
    wanted = serving or own
    wanted = wanted if workers is None else dataclasses.replace(wanted, workers=workers)
    if (wanted.workers or 1) > 1 and wanted.threads is None and "OMP_NUM_THREADS" not in os.environ:
        wanted = dataclasses.replace(wanted, threads=max(1, processor.cores() // (wanted.workers or 1)))
    return wanted
