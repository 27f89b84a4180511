"""Reads what lies in an archive or an artifact's folder, without unpacking, importing or unpickling any of it.

Nothing in a file decides how much is read: names, numbers and sizes are checked before the first byte, documents have a
largest size, and every other file is only hashed, in blocks.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Callable, List, Mapping, Tuple

from traceserve_runtime.manifest import MANIFEST_FILE, Manifest

from traceserve.archives.contents import (
    ARCHIVER_MANIFEST,
    DAMAGED,
    check_count,
    check_document,
    checked_members,
    damaged,
    is_our_own,
    wrong_in_torchserves_manifest,
)
from traceserve.errors import ArchiveError

# How a file differs from the manifest.
MISSING, CHANGED, UNHASHED, UNKNOWN = "missing", "changed", "unhashed", "unknown"
_BLOCK = 1 << 20

Open = Callable[[str], IO[bytes]]


@dataclass(frozen=True)
class ListedFile:
    """A file in an archive: its size in bytes, and its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Listing:
    """The files of an archive or a folder, and the parsed manifest; `documents` holds the other requested files."""

    path: Path
    size: int  # bytes, of the archive's file, or of all files in the folder
    manifest: Mapping[str, Any]
    files: Tuple[ListedFile, ...]
    documents: Mapping[str, bytes]


def list_files(path: Path, documents: Tuple[str, ...] = ()) -> Listing:
    """Read an archive or an artifact's folder, with the content of these documents if it has them.

    Raises ArchiveError, which names the file, for a damaged archive, for a name that leads outside of it, and for one
    that would grow to more than its size allows.
    """
    if path.is_dir():
        names = {file.relative_to(path).as_posix(): file.stat().st_size for file in _files_below(path)}
        check_count(path, len(names))
        return _listed(path, sum(names.values()), names, lambda name: (path / name).open("rb"), documents)
    try:
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(path))
            sizes = {name: info.file_size for name, info in checked_members(path, archive).items()}
            return _listed(path, path.stat().st_size, sizes, archive.open, documents)
    except DAMAGED as error:
        raise damaged(path, error) from None


def differences(listing: Listing, manifest: Manifest) -> List[Tuple[str, str]]:
    """Return the files that are not as the manifest names them, each with how it differs; unhashed is our own code without a
    hash, as in an archive that was packed by hand."""
    found = {file.name: file.sha256 for file in listing.files}
    named = [
        (name, CHANGED if name in found else MISSING)
        for name, digest in manifest.files.items()
        if found.get(name) != digest
    ]
    strangers = [name for name in found if name not in (*manifest.files, MANIFEST_FILE, ARCHIVER_MANIFEST)]
    return [*named, *((name, UNHASHED if is_our_own(name) else UNKNOWN) for name in strangers)]


def wrong_for_torchserve(listing: Listing, manifest: Manifest) -> str:
    """Return what is wrong with TorchServe's own manifest, of a listing with this document; empty if nothing is."""
    return wrong_in_torchserves_manifest(listing.documents.get(ARCHIVER_MANIFEST, b""), manifest)


def _files_below(folder: Path) -> List[Path]:
    if not (folder / MANIFEST_FILE).is_file():
        raise ArchiveError(f"{folder} has no {MANIFEST_FILE}: it is no artifact; `traceserve build` makes one")
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and "__pycache__" not in file.parts]


def _listed(path: Path, size: int, sizes: Mapping[str, int], open_file: Open, documents: Tuple[str, ...]) -> Listing:
    if MANIFEST_FILE not in sizes:
        raise ArchiveError(
            f"{path} is no archive of traceserve: it holds no {MANIFEST_FILE}; `traceserve build` makes one"
        )
    content = {
        name: _small(path, name, sizes[name], open_file) for name in (MANIFEST_FILE, *documents) if name in sizes
    }
    try:
        manifest = json.loads(content.pop(MANIFEST_FILE))
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{path} is no archive of traceserve: {MANIFEST_FILE} is not valid JSON: {error}") from None
    if not isinstance(manifest, dict):
        raise ArchiveError(f"{path} is no archive of traceserve: {MANIFEST_FILE} should hold an object")
    files = tuple(ListedFile(name, count, _hash(open_file, name)) for name, count in sorted(sizes.items()))
    return Listing(path, size, manifest, files, content)


def _small(path: Path, name: str, size: int, open_file: Open) -> bytes:
    check_document(path, name, size)
    with open_file(name) as stream:
        return stream.read(size)


def _hash(open_file: Open, name: str) -> str:
    digest = hashlib.sha256()
    with open_file(name) as stream:
        for block in iter(lambda: stream.read(_BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()
