"""What an image installs, and the program that it runs: this very traceserve, and the packages of a worker, pinned.

traceserve itself is copied, not installed: an image then serves with the version that deployed it, released or not, and without
the packages that only building needs (transformers, huggingface_hub).
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Sequence, Set

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from traceserve_runtime.manifest import Manifest

from traceserve.building.config.hardware import HARDWARE
from traceserve.building.config.save_modes import SAVE_MODES
from traceserve.deploying.described import COMPARED, Described, built_with
from traceserve.deploying.plan import Copy
from traceserve.errors import DeployError

_COMMAND = ("pyyaml", "rich", "platformdirs", "psutil")  # what `traceserve serve` needs
_WORKER = ("torch", "tokenizers", "numpy", "safetensors", "jinja2")
# Of those that are not installed where `deploy` runs: the versions that were tried.
TRIED = {
    "ray[serve]": "2.60.0",
    "ray[default,serve]": "2.60.0",
    "uvicorn": "0.54.0",
    "httptools": "0.9.0",
    "multipart": "2.0.1",
}
# Where pip finds torch for a kind of hardware; without one on the ordinary index.
INDEXES = {
    "cpu": "https://download.pytorch.org/whl/cpu",
    "neuron": "https://pip.repos.neuron.amazonaws.com",
    "neuronx": "https://pip.repos.neuron.amazonaws.com",
}
_OWN = ("traceserve", "traceserve_runtime", "traceserve_hosts")
_HANDLER = "transformer_handler"


def requirements(archives: Sequence[Described], extra: Sequence[str]) -> List[str]:
    """The lines of requirements.txt: every package that the archives need, with the version that it has here.

    torch, and what else computes or tokenizes, has the version that the archives were built and compared with. What is not
    installed here has no version.
    """
    wanted = [*_COMMAND, *extra]
    for each in archives:
        wanted += of_worker(each.manifest)
    pins = _closure(dict.fromkeys(wanted), _compared(archives))
    lines = [f"{name}=={version}" for name, version in pins.items() if version]
    return sorted([*lines, *(name for name, version in pins.items() if not version)])


def of_worker(manifest: Manifest) -> List[str]:
    """The packages that a worker of this archive imports."""
    of_tables = (SAVE_MODES.get(manifest.save_mode), HARDWARE.get(manifest.hardware))
    return [*_WORKER, *(package for each in of_tables if each is not None for package in each.packages)]


def ray_version() -> str:
    """The version of Ray in the image."""
    try:
        return metadata.version("ray")
    except metadata.PackageNotFoundError:
        return TRIED["ray[serve]"]


def _compared(archives: Sequence[Described]) -> Dict[str, str]:
    """The packages' versions that the archives were compared with; of several the newest, which reads all tokenizers."""
    found: Dict[str, str] = {}
    for package in COMPARED:
        versions = [built_with(each.manifest, package) for each in archives]
        found[package] = max(filter(None, versions), key=Version, default="")
    return found


def _closure(wanted: Dict[str, None], compared: Mapping[str, str]) -> Dict[str, str]:
    """These packages and all that they depend on, in the versions that are compared, else installed.

    What torch needs, and what needs another version than the installed one, are left to pip.
    """
    found: Dict[str, str] = {}
    waiting = [Requirement(name) for name in wanted]
    while waiting:
        needed = waiting.pop()
        name = canonicalize_name(needed.name)
        if name in found and not needed.extras:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            written = str(needed) if needed.extras or needed.specifier else name
            written, version = (name, compared[name]) if compared.get(name) else (written, TRIED.get(written, ""))
            found.setdefault(written, version)
            continue
        installed = distribution.version.partition("+")[0]
        found[name] = compared.get(name) or installed
        if name != "torch" and found[name] == installed:
            waiting += list(_dependencies(distribution, needed.extras))
    return found


def _dependencies(distribution: metadata.Distribution, extras: Set[str]) -> Iterator[Requirement]:
    for text in distribution.requires or ():
        each = Requirement(text)
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            yield each


def program(folder: str) -> List[Copy]:
    """The files of this traceserve, for a folder on Python's path."""
    files: List[Copy] = []
    for name in _OWN:
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            continue  # traceserve_hosts came later than the others
        root = Path(found.submodule_search_locations[0])
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                files.append(Copy(f"{folder}/{name}/{path.relative_to(root).as_posix()}", path))
    handler = importlib.util.find_spec(_HANDLER)
    if handler is None or handler.origin is None:
        raise DeployError("traceserve's handler is not installed beside it; install traceserve again")
    files.append(Copy(f"{folder}/{_HANDLER}.py", Path(handler.origin)))
    return files
