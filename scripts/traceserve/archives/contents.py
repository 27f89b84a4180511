"""An archive's files: reading, unpacking, and changing its serving configuration in place."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Collection, Dict, Mapping, Sequence

from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.manifest import (
    HANDLER_FILE,
    MANIFEST_FILE,
    OWN_CODE,
    Manifest,
    is_inside,
    sha256,
    write_document,
)

from traceserve.archives import staging
from traceserve.archives.model_config import SERVING_FILE, Serving
from traceserve.errors import ArchiveError
from traceserve.machine import space

ARCHIVER_MANIFEST = "MAR-INF/MANIFEST.json"
_METADATA = "traceserve.egg-info/"  # written beside the handler by an editable installation; never imported
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date in a zip
# Archives are stored, or deflated by hand: texts may shrink much, weights hardly.
_LARGEST_GROWTH, _ALWAYS_ALLOWED = 8, 64 << 20
_MOST_FILES = 10_000
LARGEST_DOCUMENT = 16 << 20  # bytes, of a JSON or YAML file that is parsed
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile unpacks others whole, whatever their declared size
# zipfile's exceptions for files that are not zips, are truncated, or have a changed byte: in names, sizes, methods,
# flags or data. (RuntimeError, the base of NotImplementedError, is for an unknown method or encryption.)
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    KeyError,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,
)


def unpack(path: Path, folder: Path, only: Sequence[str] = ()) -> None:
    """Extract an archive, or these of its files, into `folder`; raises ArchiveError for a damaged one, NoSpace.

    It must contain only files in its manifest. Code is compared with the manifest here, before it
    runs; the worker compares all files.
    """
    manifest = read_manifest(path)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(path) as file:
            files = checked_members(path, file)
            _check_known(path, files, manifest)
            members = [info for info in files.values() if not only or info.filename in only]
            size = sum(info.file_size for info in members)
            space.require_space(folder, size, f"unpacking {path.name}")
            with space.Needed(folder, size, f"unpacking {path.name}"):
                file.extractall(folder, members)
    except DAMAGED as error:
        raise damaged(path, error) from None
    if not only:
        manifest.verify_files(folder, [name for name in manifest.files if name.endswith(".py")])
        other = folder / ARCHIVER_MANIFEST
        wrong = wrong_in_torchserves_manifest(other.read_bytes() if other.is_file() else b"", manifest)
        if wrong:
            raise ArchiveError(f"{path} {wrong}")


def wrong_in_torchserves_manifest(content: bytes, manifest: Manifest) -> str:
    """Return why an archive is refused if TorchServe's own manifest, which ours does not hash, does not say what ours says.

    Its version is in the URL, and its handler is what TorchServe runs. One that was packed by hand may differ.
    """
    if HANDLER_FILE not in manifest.files:
        return ""
    wanted = {"handler": HANDLER_FILE, "modelVersion": manifest.version, "configFile": SERVING_FILE}
    try:
        document = json.loads(content.decode("utf-8"))
        found = {key: document["model"][key] for key in wanted}
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"is damaged: its {ARCHIVER_MANIFEST} cannot be read; build it, or copy it, again"
    for key, value in wanted.items():
        if found[key] != value:
            return (
                f"is not what was packed: its {ARCHIVER_MANIFEST} has the {key} {found[key]!r}, and its {MANIFEST_FILE} "
                f"{value!r}; build the archive again"
            )
    return ""


def checked_members(path: Path, archive: zipfile.ZipFile) -> Dict[str, zipfile.ZipInfo]:
    """Return an archive's files by name; raises ArchiveError for a hostile list: more files than any of ours has, one twice,
    a name that leads out of the folder, a method that ours never have, or sizes beyond what such an archive can hold."""
    check_count(path, sum(not info.is_dir() for info in archive.infolist()))
    members: Dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename
        if not is_inside(name.rstrip("/")) and name != MANIFEST_FILE:  # our own prefixes do not make it harmless
            raise ArchiveError(
                f"{path} holds the name {name!r}, which leads out of its folder; do not unpack or serve it"
            )
        if name in members:
            raise ArchiveError(f"{path} holds the file {name} twice; build the archive again")
        _check_method(path, info)
        if not info.is_dir():
            members[name] = info
    _check_growth(path, {name: info.file_size for name, info in members.items()})
    return members


def _check_method(path: Path, info: zipfile.ZipInfo) -> None:
    """Raise ArchiveError for a file that could take more memory than its declared size."""
    if info.compress_type not in _METHODS:
        raise ArchiveError(
            f"{path} holds {info.filename}, compressed by another method ({info.compress_type}) than stored or deflated, which "
            "no archive of traceserve has; build it, or copy it, again"
        )


def check_document(path: Path, name: str, size: int) -> None:
    """Raise ArchiveError for a document of more bytes than are parsed."""
    if size > LARGEST_DOCUMENT:
        raise ArchiveError(f"{path}: {name} has {size:,} bytes, and at most {LARGEST_DOCUMENT:,} are read")


def _check_growth(path: Path, sizes: Mapping[str, int]) -> None:
    """Raise ArchiveError for an archive whose files declare more bytes than it can hold of a model."""
    allowed = _LARGEST_GROWTH * path.stat().st_size + _ALWAYS_ALLOWED
    if sum(sizes.values()) > allowed:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ArchiveError(
            f"{path} would grow from {path.stat().st_size:,} bytes to {sum(sizes.values()):,} (most of it {largest}), and "
            f"{allowed:,} are allowed: it may be made to fill a disk; do not unpack or serve it"
        )


def _check_known(path: Path, names: Collection[str], manifest: Manifest) -> None:
    """Raise ArchiveError unless the archive holds only files in the manifest.

    A hand-packed archive's manifest names no code; its folder of handlers may contain an installation's metadata.
    """
    known = {*manifest.files, MANIFEST_FILE, ARCHIVER_MANIFEST, HANDLER_FILE}
    for name in names:
        if name not in known and not is_our_own(name):
            raise ArchiveError(
                f"{path} holds the file {name}, which its {MANIFEST_FILE} does not name; build the archive again"
            )


def check_count(path: Path, files: int) -> None:
    """Raise ArchiveError for an archive of more files than any of ours has."""
    if files > _MOST_FILES:
        raise ArchiveError(f"{path} holds {files:,} files, and an archive has at most {_MOST_FILES:,}")


def is_our_own(name: str) -> bool:
    """Return whether a file is part of our runtime, or of an installation's metadata beside it."""
    return name == HANDLER_FILE or name.startswith((OWN_CODE, _METADATA))


def read_manifest(path: Path) -> Manifest:
    """Return the manifest in an archive; raises ArchiveError for a file that is not one of our archives."""
    return Manifest.from_json(_read_document(path))


def _read_document(path: Path) -> object:
    try:
        return json.loads(_read(path, MANIFEST_FILE))
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{path} is no archive of traceserve: {error}") from None


def read_serving(path: Path) -> Serving:
    """Return an archive's serving configuration; raises ArchiveError."""
    return Serving.from_yaml(_read(path, SERVING_FILE).decode("utf-8", "replace"))


def _read(path: Path, name: str) -> bytes:
    """Read one document of an archive."""
    try:
        with zipfile.ZipFile(path) as file:
            info = file.getinfo(name)
            _check_method(path, info)
            check_document(path, name, info.file_size)
            with file.open(info) as stream:
                return stream.read(info.file_size)  # without a number zipfile unpacks all before it counts
    except DAMAGED as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> TraceserveError:
    """Return the error for a file that cannot be read as an archive."""
    if isinstance(error, TraceserveError):  # already reported
        return error
    if isinstance(error, FileNotFoundError):
        return ArchiveError(f"{path} does not exist; `traceserve build` makes it")
    if path.is_dir():
        return ArchiveError(_instead_of_an_archive(path))
    if not _is_whole(path):
        return ArchiveError(
            f"{path} is no archive of traceserve, or was not copied whole: {error}; build it, or copy it, again"
        )
    if isinstance(error, KeyError):
        return ArchiveError(f"{path} is no archive of traceserve: {error.args[0]}; `traceserve build` makes one")
    return ArchiveError(f"{path} is damaged: {error}; build it, or copy it, again")


def _instead_of_an_archive(folder: Path) -> str:
    if (folder / MANIFEST_FILE).is_file():
        return f"{folder} is an artifact, not an archive (.mar): `traceserve archive {folder}` packs it"
    return f"{folder} is a folder, not an archive (.mar); `traceserve build` makes one"


def _is_whole(path: Path) -> bool:
    """Return whether a file is a zip from its first byte: an archive cut after traced_model.pt ends like that zip."""
    try:
        with zipfile.ZipFile(path) as file:
            return min((info.header_offset for info in file.infolist()), default=0) == 0
    except DAMAGED:
        return False


def configure_archive(path: Path, serving: Serving) -> None:
    """Replace an archive's serving configuration in place; all other bytes stay the same.

    The finished new archive replaces the old one atomically: after an interruption, the old one remains.
    """
    document = _read_document(path)
    Manifest.from_json(document)  # checks that it is ours, and complete
    assert isinstance(document, dict)
    path = path.resolve()  # not a link to it
    with staging.staged(path) as folder:
        write_document(document, folder)
        configure_unpacked(folder, serving)
        changed = {name: (folder / name).read_bytes() for name in (MANIFEST_FILE, SERVING_FILE)}
        space.require_space(folder, path.stat().st_size, f"another {path.name}")
        copy_archive(path, folder / path.name, changed)
        shutil.copymode(path, folder / path.name)


def configure_unpacked(folder: Path, serving: Serving) -> None:
    """Write an unpacked archive's serving configuration, and its SHA-256 into the manifest.

    The manifest keeps its schema, which the runtime beside it reads.
    """
    document = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    Manifest.from_json(document)
    (folder / SERVING_FILE).write_text(serving.to_yaml(), encoding="utf-8")
    document["files"][SERVING_FILE] = sha256(folder / SERVING_FILE)
    write_document(document, folder)


def copy_archive(packed: Path, target: Path, changed: Mapping[str, bytes]) -> None:
    """Copy an archive with some files replaced, in sorted order and without dates."""
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as sink:
        for name in sorted(source.namelist()):
            info = zipfile.ZipInfo(name, EPOCH)
            info.external_attr = 0o644 << 16
            info.file_size = len(changed[name]) if name in changed else source.getinfo(name).file_size
            with source.open(name) as reader, sink.open(info, "w") as writer:
                if name in changed:
                    writer.write(changed[name])
                else:
                    shutil.copyfileobj(reader, writer, 1 << 20)  # weights are large
