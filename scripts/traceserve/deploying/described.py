"""What an archive says that a deployment needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import List, Sequence, Tuple

from packaging.version import InvalidVersion, Version
from traceserve_runtime.json_types import JsonObject
from traceserve_runtime.manifest import MANIFEST_FILE, Manifest, sha256
from traceserve_runtime.tasks import TASKS

from traceserve.archives.contents import ARCHIVER_MANIFEST, read_manifest, read_serving
from traceserve.archives.listing import (
    CHANGED,
    UNHASHED,
    UNKNOWN,
    Listing,
    differences,
    list_files,
    wrong_for_torchserve,
)
from traceserve.archives.model_config import Serving
from traceserve.archives.names import check_name
from traceserve.building.config.hardware import HARDWARE
from traceserve.building.config.save_modes import SAVE_MODES
from traceserve.errors import ArchiveError, DeployError

# Packages whose versions, where an archive was built and compared, are those of its deployment.
COMPARED = ("torch", "tokenizers", "transformers", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Described:
    """An archive; `canary` is a request that it must be able to answer."""

    file: Path
    name: str  # in its URL
    sha256: str
    size: int  # bytes, of the file
    unpacked: int  # bytes, of the model and what lies beside it
    manifest: Manifest
    serving: Serving
    canary: JsonObject

    @property
    def version(self) -> str:
        """In its URL, too."""
        return self.manifest.version

    @property
    def workers(self) -> int:
        """Processes, as `traceserve tune` found best, else one."""
        return self.serving.workers or 1


def describe(files: Sequence[Path]) -> Tuple[Described, ...]:
    """Read archives; raises ArchiveError for what is none of ours, DeployError for those that cannot be served together."""
    found: List[Described] = []
    for file in files:
        manifest, serving = read_manifest(file), read_serving(file)
        name = check_name(file.stem)
        _check_known(file, manifest)
        listing = _whole(file, manifest)
        for other in found:
            if other.name == name:
                raise DeployError(
                    f"{other.file} and {file} would both answer at /predictions/{name}; rename one of them"
                )
        unpacked = sum(each.size for each in listing.files)
        canary = TASKS[manifest.task].canary_body(manifest)
        found.append(Described(file, name, sha256(file), listing.size, unpacked, manifest, serving, canary))
    _check_together(found)
    return tuple(found)


def _check_known(file: Path, manifest: Manifest) -> None:
    """Raise DeployError for what no archive says that this traceserve can serve."""
    for what, value, known in (
        ("task", manifest.task, TASKS),
        ("save mode", manifest.save_mode, SAVE_MODES),
        ("hardware", manifest.hardware, HARDWARE),
    ):
        if value not in known:
            raise DeployError(f"{file} has the {what} {value!r}, and this traceserve knows {', '.join(known)}")
    for package in COMPARED:
        try:
            built_with(manifest, package)
        except InvalidVersion:
            version = manifest.versions[package]
            raise DeployError(
                f"{file} was built with {package} {version!r}, which is no version; build it again"
            ) from None


def _whole(file: Path, manifest: Manifest) -> Listing:
    """Return what an archive holds; raises ArchiveError unless these are the files of its manifest, unchanged."""
    listing = list_files(file, (ARCHIVER_MANIFEST,))
    for name, how in differences(listing, manifest):
        if how == UNKNOWN:
            raise ArchiveError(f"{file} holds {name}, which its {MANIFEST_FILE} does not name; build the archive again")
        if how != UNHASHED:
            what = "was changed: its SHA-256 differs from" if how == CHANGED else "is missing, and named in"
            raise ArchiveError(f"{file} is damaged: {name} {what} {MANIFEST_FILE}; build it, or copy it, again")
    wrong = wrong_for_torchserve(listing, manifest)
    if wrong:
        raise ArchiveError(f"{file} {wrong}")
    return listing


def _check_together(found: Sequence[Described]) -> None:
    """Archives of one deployment run in one image and on one kind of machine."""
    for what, value in (
        ("hardware", lambda each: each.manifest.hardware),
        ("torch", lambda each: built_with(each.manifest, "torch")),
    ):
        values = {value(each): each.file for each in found}
        if len(values) > 1:
            told = ", ".join(f"{key} of {file}" for key, file in values.items())
            raise DeployError(
                f"these archives were built for different {what} ({told}), and one image has one; deploy each by itself, or "
                "build them again alike"
            )


def built_with(manifest: Manifest, package: str) -> str:
    """The version of a package that the archive was built with, without the mark of its build (+cpu); empty if it does not say.
    Raises InvalidVersion."""
    version = manifest.versions.get(package, "")
    return Version(version).public if version else ""
