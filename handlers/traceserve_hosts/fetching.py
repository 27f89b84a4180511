"""Archives from anywhere, checked by their hash, each unpacked once on a machine.

python -m traceserve_hosts.fetching ADDRESS [SHA256]

With --signed, a public key or certificates come on standard input, and the archive needs its signature, ADDRESS.sig.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Iterator, List, Optional
from urllib.parse import urlsplit, urlunsplit

from traceserve.archives import signing, staging
from traceserve.archives.contents import unpack
from traceserve.errors import ArchiveError
from traceserve.machine import space, user_folders
from traceserve_runtime.errors import TraceserveError, reason
from traceserve_runtime.manifest import sha256

from traceserve_hosts import SIGNED, lock_of_users

if sys.platform != "win32":
    import fcntl

_KEPT_UNUSED = 30 * 24 * 3600  # seconds that an unpacked archive stays which nobody fetched, and no process has
_SIZES = ".sizes.json"  # in an unpacked folder: of its other files, by name


def fetch_archive(address: str, expected: Optional[str] = None, trusted: Optional[str] = None) -> Path:
    """The folder into which the archive at `address` was unpacked, now or before; raises ArchiveError.

    With `trusted`, the text of a PEM file, the archive's signature is checked on a private copy, which is what is unpacked.

    The folder is named by the archive's SHA-256 and stands in the user's cache, so that the replicas of a machine share it, and
    the pages of its weights. Whoever comes second finds it finished: it appears whole. One that has lost a file since, as
    temporary folders do by age, is unpacked again. Others that nobody has used for long are removed.
    """
    cache = user_folders.cache("archives")
    folder = _fetched(address, cache, expected, trusted)
    _remove_unused(cache)
    return folder


def _fetched(address: str, cache: Path, expected: Optional[str], trusted: Optional[str]) -> Path:
    expected = None if expected is None else expected.lower()
    if trusted is not None:
        with staging.scratch() as scratch:
            return _unpacked(_signed_copy(address, scratch, trusted), cache, expected, address)
    if expected is not None and (cache / expected).is_dir():
        with _alone(cache, expected):
            if _is_whole(cache / expected):
                lock_of_users(cache / expected).touch()
                return cache / expected
    if "://" not in address:
        return _unpacked(Path(address), cache, expected, address, private=False)
    with staging.scratch() as scratch:
        return _unpacked(_downloaded(address, scratch / "archive.mar"), cache, expected, address)


def _signed_copy(address: str, scratch: Path, trusted: str) -> Path:
    """A private copy of the archive, of whom the signer is known."""
    pem = scratch / "trusted.pem"
    pem.write_text(trusted, encoding="utf-8")
    check = signing.signature_check(pem)
    if "://" not in address:
        given = Path(address)
        return signing.copy_verified(given, signing.signature_file(given), scratch / given.name, check)
    parts = urlsplit(address)
    (scratch / "fetched").mkdir()
    archive = scratch / "fetched" / Path(parts.path).name
    _downloaded(address, archive)
    signature = urlunsplit(parts._replace(path=parts.path + signing.SUFFIX))
    _downloaded(signature, signing.signature_file(archive), "signature")
    return signing.copy_verified(archive, signing.signature_file(archive), scratch / archive.name, check)


def _unpacked(archive: Path, cache: Path, expected: Optional[str], address: str, private: bool = True) -> Path:
    if not archive.is_file():
        raise ArchiveError(f"there is no archive at {address}")
    found = sha256(archive)
    if expected is not None and found != expected:
        raise ArchiveError(
            f"the archive at {address} has the SHA-256 {found}, not {expected}: it is another one, or damaged"
        )
    target = cache / found
    with _alone(cache, found):
        if not _is_whole(target):
            with staging.staged(target) as folder:
                unpack(archive if private else _private_copy(archive, folder, found), folder / target.name)
                _note_sizes(folder / target.name)
        lock_of_users(target).touch()
    return target


def _private_copy(archive: Path, folder: Path, digest: str) -> Path:
    """A copy with this SHA-256: whoever may write the archive could exchange it between hashing and unpacking."""
    copy, what = folder / "archive.mar", f"a private copy of {archive.name}"
    size = archive.stat().st_size
    space.require_space(folder, size, what)
    with space.Needed(folder, size, what):
        shutil.copyfile(archive, copy)
    if sha256(copy) != digest:
        raise ArchiveError(f"{archive} was changed while it was read; take an archive that nobody writes to")
    return copy


def _note_sizes(folder: Path) -> None:
    """Write down the sizes of all files, for `_is_whole`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / _SIZES).write_text(json.dumps(sizes), encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    """Whether all files are there, in their sizes. (Whoever loads them compares their hashes.)"""
    try:
        sizes = json.loads((folder / _SIZES).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _alone(cache: Path, digest: str) -> Iterator[None]:
    """Wait for whoever unpacks the same archive."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{digest}.lock").open("w") as lock:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_unused(cache: Path) -> None:
    """Remove the archives that were fetched long ago, and that no process has; those of earlier versions, which say nothing
    about it, stay."""
    if sys.platform == "win32":
        return
    for folder in [path for path in cache.iterdir() if _is_old(lock_of_users(path))]:
        with contextlib.suppress(OSError), _alone(cache, folder.name), lock_of_users(folder).open("a") as users:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error where a process has it
            if _is_old(lock_of_users(folder)):  # still
                shutil.rmtree(folder)
                lock_of_users(folder).unlink()


def _is_old(lock: Path) -> bool:
    try:
        return time.time() - lock.stat().st_mtime > _KEPT_UNUSED
    except OSError:  # there is none
        return False


def _downloaded(address: str, target: Path, what: str = "archive") -> Path:
    try:
        import fsspec
    except ImportError:
        raise ArchiveError(f"{address} is fetched by fsspec; install it with: pip install 'traceserve[ray]'") from None
    try:
        with fsspec.open(address, "rb") as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except Exception as error:  # each storage's package has its own
        raise _explained(error, address, what) from None
    return target


def _explained(error: Exception, address: str, what: str) -> ArchiveError:
    """The explanation of a failed download.

    Of http, fsspec says that the file is not there for most errors, such as 403 or no connection: the cause is what happened.
    """
    if isinstance(error, FileNotFoundError) and address.startswith(("http://", "https://")):
        cause = error.__cause__
        error = cause if isinstance(cause, Exception) and getattr(cause, "status", None) != 404 else error
    if isinstance(error, FileNotFoundError):
        return ArchiveError(f"there is no {what} at {address}")
    if isinstance(error, (ImportError, ValueError)):  # the package of this kind of storage, or the kind is not known
        return ArchiveError(f"{address} cannot be fetched here: {error}")
    return ArchiveError(f"{address} could not be fetched: {reason(error)}")


def main(arguments: List[str]) -> int:
    """Fetch, and write where it is: `{"folder": ...}`."""
    trusted = sys.stdin.read() if SIGNED in arguments else None
    arguments = [argument for argument in arguments if argument != SIGNED]
    try:
        folder = fetch_archive(arguments[0], arguments[1] if len(arguments) > 1 else None, trusted)
    except TraceserveError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps({"folder": str(folder)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
