"""An archive, wherever it lies, to a service in this process that runs the archive's own code."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, NamedTuple, Optional

from traceserve_hosts import SIGNED, earlier_runtimes, libraries, lock_of_users, reason_in

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from traceserve_runtime.service import Service


class Loaded(NamedTuple):
    """A service, and how its archive wants to be served."""

    service: Service
    batch_size: int  # the most requests that are answered together
    batch_delay: float  # seconds that the first of them waits for others
    timeout: float  # seconds that an answer may take


def load_archive(
    address: str,
    sha256: Optional[str] = None,
    name: Optional[str] = None,
    version: Optional[str] = None,
    gpu: bool = False,
    trusted: Optional[str] = None,
    own_process: bool = True,
) -> Loaded:
    """The archive at an address, unpacked and ready to answer; raises RuntimeError with the reason.

    An address is a path, a folder that `unpacked` made, or a URL that fsspec opens (http, s3, gs, ...). `sha256` is that of a
    packed archive, and compared before anything of it runs. `name` and `version` are the archive's own where they are not
    given. The archive's runtime is imported here, so all archives of a process have to have the same one. `trusted` is the text
    of a PEM file, a public key or certificates: the archive has to be signed by it, and a name and version that are given have
    to be its own. `own_process`: the process does nothing else, so its environment and its garbage collector may be set up for
    serving.
    """
    if not own_process:
        with libraries.defaults_while_loading():
            return _load(address, sha256, name, version, gpu, trusted)
    libraries.set_defaults()
    loaded = _load(address, sha256, name, version, gpu, trusted)
    gc.freeze()  # else each full collection walks all of torch's objects while requests wait
    return loaded


def _load(
    address: str,
    sha256: Optional[str],
    name: Optional[str],
    version: Optional[str],
    gpu: bool,
    trusted: Optional[str],
) -> Loaded:
    whole = Path(address, "traceserve.json").is_file()
    if whole and trusted is not None:
        raise RuntimeError(f"{address} is an unpacked archive, and only a packed one (.mar) is signed")
    if whole and sha256 is not None:
        raise RuntimeError(
            f"{address} is an unpacked archive, and only of a packed one (.mar) the SHA-256 can be compared"
        )
    folder = Path(address) if whole else unpacked(address, sha256, trusted)
    _keep(folder.resolve())
    _check_present_runtime(folder.resolve(), address)
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))
    again = "pack the archive again with this version: traceserve archive"
    try:
        from traceserve_runtime import settings
        from traceserve_runtime.engine import Engine
        from traceserve_runtime.manifest import Manifest
        from traceserve_runtime.service import Service
    except ImportError as error:
        raise RuntimeError(
            f"the runtime in {address} cannot be imported: {error}; install what it names, or, where it names a part of "
            f"traceserve_runtime, {again}"
        ) from error
    if not hasattr(Engine, "make_ready"):
        raise RuntimeError(f"the runtime in {address} is of an earlier version, for TorchServe alone; {again}")
    with contextlib.nullcontext() if whole else _naming_cache(folder):
        manifest = Manifest.read(folder, verify=False)
        own_name = (manifest.name, manifest.version)
        if trusted is not None and (name or own_name[0], version or own_name[1]) != own_name:
            raise RuntimeError(
                f"the archive at {address} is {' '.join(own_name)}, and a signed one is not served as {name} {version or ''}"
            )
        config = _serving(folder)
        device = "cuda:0" if gpu and earlier_runtimes.on_gpu(manifest) else "cpu"
        engine = Engine.load(folder, device, settings.read(config))
    engine.make_ready()
    service = Service(engine, name or manifest.name, version or manifest.version, **earlier_runtimes.mirror())
    return Loaded(
        service, config.get("batchSize", 1), config.get("maxBatchDelay", 0) / 1000, config.get("responseTimeout", 120)
    )


def _keep(folder: Path) -> None:
    """Let nobody remove this folder from the cache while this process lives, which may import and open more of it."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # it is no folder of the cache
            users = os.open(lock_of_users(folder), os.O_RDONLY)  # never closed
            fcntl.flock(users, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.utime(lock_of_users(folder))


def _check_present_runtime(folder: Path, address: str) -> None:
    """Raise RuntimeError if a runtime was imported whose code is not the archive's, wherever it lies."""
    present = sys.modules.get("traceserve_runtime")
    if present is None:
        return
    package = Path(str(present.__file__)).parent
    if folder in package.parents:
        return
    named = _code_in_manifest(folder, f"{package.name}/")
    found = {path.relative_to(package.parent).as_posix(): path for path in package.rglob("*.py")}
    if not named or named != {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}:
        raise RuntimeError(f"another traceserve_runtime was imported before that of {address}: {present.__file__}")


def _code_in_manifest(folder: Path, prefix: str) -> Dict[str, str]:
    """The SHA-256 of each of a package's modules; the archive's own runtime, which reads manifests, may not be the one that was
    imported."""
    try:
        files = json.loads((folder / "traceserve.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return {name: digest for name, digest in files.items() if name.startswith(prefix) and name.endswith(".py")}


@contextlib.contextmanager
def _naming_cache(folder: Path) -> Iterator[None]:
    """Name the folder into which an archive was unpacked where its files are wrong: the archive itself may be right."""
    from traceserve_runtime.errors import InvalidManifest

    try:
        yield
    except InvalidManifest as error:
        raise InvalidManifest(
            f"{error} (the archive was unpacked into {folder}; if a file was changed there, remove that folder, and the next "
            "start unpacks the archive again)"
        ) from error


def _serving(folder: Path) -> Dict[str, Any]:
    """The archive's model-config.yaml, which TorchServe reads for its workers."""
    import yaml
    from traceserve_runtime.errors import InvalidManifest

    file = folder / "model-config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidManifest(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def unpacked(address: str, sha256: Optional[str] = None, trusted: Optional[str] = None) -> Path:
    """The folder of an archive on this machine; raises RuntimeError.

    A process of its own fetches it: the builder's code, which unpacks archives, imports another runtime than the archive's. It
    runs in an empty folder, since Python imports from there first.
    """
    address = address if "://" in address else os.path.abspath(address)
    command = [sys.executable, "-m", "traceserve_hosts.fetching", address, *([sha256] if sha256 else [])]
    command += [SIGNED] if trusted is not None else []
    with tempfile.TemporaryDirectory(prefix="traceserve-") as empty:
        result = subprocess.run(
            command, cwd=empty, input=trusted or "", capture_output=True, encoding="utf-8", errors="replace"
        )
    if result.returncode:
        raise RuntimeError(reason_in(result.stderr, f"{address} could not be fetched"))
    return Path(json.loads(result.stdout)["folder"])
