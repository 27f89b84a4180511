"""An archive's files: read, unpacked, and its serving configuration changed in place."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, Mapping, Sequence

from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.manifest import HANDLER_FILE, MANIFEST_FILE, OWN_CODE, Manifest, sha256, write_document

from traceserve.archives import staging
from traceserve.archives.model_config import SERVING_FILE, Serving
from traceserve.errors import ArchiveError
from traceserve.machine import space

ARCHIVER_MANIFEST = "MAR-INF/MANIFEST.json"
_METADATA = "traceserve.egg-info/"  # an editable installation writes it beside the handler; nothing imports it
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date that a zip can hold
_LARGEST_RATIO = 1100  # of what deflate makes of zeros
# What zipfile raises for files that are no zip, are cut, or have a byte changed: in names, sizes, methods, flags or data.
# (A RuntimeError, which NotImplementedError is too, for a method or an encryption that is not known.)
_DAMAGED = (
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
    """Extract an archive, or these files of it, into `folder`; raises ArchiveError for a damaged one, NoSpace.

    It may hold the files that its manifest names and no other. Its code is compared with the manifest here, where that
    code does not run yet; the worker compares all files.
    """
    manifest = read_manifest(path)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(path) as file:
            _check_names(path, file.namelist(), manifest)
            members = [info for info in file.infolist() if not only or info.filename in only]
            size = sum(info.file_size for info in members)
            if size > _LARGEST_RATIO * path.stat().st_size:
                raise zipfile.BadZipFile("it tells sizes of files that it cannot hold")
            space.require(folder, size, f"unpacking {path.name}")
            with space.Needed(folder, size, f"unpacking {path.name}"):
                file.extractall(folder, members)
    except _DAMAGED as error:
        raise _damaged(path, error) from None
    if not only:
        manifest.verify_files(folder, [name for name in manifest.files if name.endswith(".py")])


def _check_names(path: Path, names: Sequence[str], manifest: Manifest) -> None:
    """Raise ArchiveError unless the archive holds each file once, and none that the manifest does not name.

    The manifest of one that was packed by hand names no code; its folder of handlers may have an installation's metadata.
    """
    known = {*manifest.files, MANIFEST_FILE, ARCHIVER_MANIFEST, HANDLER_FILE}
    files = [name for name in names if not name.endswith("/")]
    for name in files:
        if name not in known and not name.startswith((OWN_CODE, _METADATA)):
            raise ArchiveError(
                f"{path} holds the file {name}, which its {MANIFEST_FILE} does not name; build the archive again"
            )
        if files.count(name) > 1:
            raise ArchiveError(f"{path} holds the file {name} twice; build the archive again")


def read_manifest(path: Path) -> Manifest:
    """The manifest inside an archive; raises ArchiveError for a file that is no archive of ours."""
    return Manifest.from_json(_read_document(path))


def _read_document(path: Path) -> Any:
    try:
        return json.loads(_read(path, MANIFEST_FILE))
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{path} is no archive of traceserve: {error}") from None


def read_serving(path: Path) -> Serving:
    """How an archive is served; raises ArchiveError."""
    return Serving.from_yaml(_read(path, SERVING_FILE).decode("utf-8", "replace"))


def _read(path: Path, name: str) -> bytes:
    """One file of an archive."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.read(name)
    except _DAMAGED as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> TraceserveError:
    """What to say of a file that cannot be read as an archive."""
    if isinstance(error, TraceserveError):  # said already
        return error
    if isinstance(error, FileNotFoundError):
        return ArchiveError(f"{path} does not exist; `traceserve build` makes it")
    if not _is_whole(path):
        return ArchiveError(
            f"{path} is no archive of traceserve, or was not copied whole: {error}; build it, or copy it, again"
        )
    if isinstance(error, KeyError):
        return ArchiveError(f"{path} is no archive of traceserve: {error.args[0]}; `traceserve build` makes one")
    return ArchiveError(f"{path} is damaged: {error}; build it, or copy it, again")


def _is_whole(path: Path) -> bool:
    """Whether a file is a zip from its first byte on: an archive that was cut behind traced_model.pt ends as that zip does."""
    try:
        with zipfile.ZipFile(path) as file:
            return min((info.header_offset for info in file.infolist()), default=0) == 0
    except _DAMAGED:
        return False


def configure(path: Path, serving: Serving) -> None:
    """Give an archive, in place, another serving configuration; everything else in it stays byte for byte.

    The new archive takes the old one's place when it is finished: whoever is interrupted has the old one.
    """
    document = _read_document(path)
    Manifest.from_json(document)  # checks that it is one of ours, and whole
    path = path.resolve()  # not a link to it
    with staging.staged(path) as folder:
        write_document(document, folder)
        configure_unpacked(folder, serving)
        changed = {name: (folder / name).read_bytes() for name in (MANIFEST_FILE, SERVING_FILE)}
        space.require(folder, path.stat().st_size, f"another {path.name}")
        copy_archive(path, folder / path.name, changed)
        shutil.copymode(path, folder / path.name)


def configure_unpacked(folder: Path, serving: Serving) -> None:
    """Write the serving configuration of an unpacked archive, and its SHA-256 into the manifest.

    The manifest keeps its schema: the runtime that lies beside it reads that one.
    """
    document = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    Manifest.from_json(document)
    (folder / SERVING_FILE).write_text(serving.to_yaml(), encoding="utf-8")
    document["files"][SERVING_FILE] = sha256(folder / SERVING_FILE)
    write_document(document, folder)


def copy_archive(packed: Path, target: Path, changed: Mapping[str, bytes]) -> None:
    """Copy an archive with some files changed, in sorted order and without dates."""
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as sink:
        for name in sorted(source.namelist()):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = 0o644 << 16
            info.file_size = len(changed[name]) if name in changed else source.getinfo(name).file_size
            with source.open(name) as reader, sink.open(info, "w") as writer:
                if name in changed:
                    writer.write(changed[name])
                else:
                    shutil.copyfileobj(reader, writer, 1 << 20)  # weights are large
