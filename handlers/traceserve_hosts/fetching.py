"""Archives from anywhere, checked by their hash, each unpacked once on a machine.

python -m traceserve_hosts.fetching ADDRESS [SHA256]
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Iterator, List, Optional

from traceserve.archives import staging
from traceserve.archives.contents import unpack
from traceserve.errors import ArchiveError
from traceserve.machine import user_folders
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.manifest import sha256

if sys.platform != "win32":
    import fcntl


def fetch_archive(address: str, expected: Optional[str] = None) -> Path:
    """The folder into which the archive at `address` was unpacked, now or before; raises ArchiveError.

    The folder is named by the archive's SHA-256 and stands in the user's cache, so that the replicas of a machine share it, and
    the pages of its weights. Whoever comes second finds it finished: it appears whole.
    """
    cache = user_folders.cache("archives")
    if expected is not None and (cache / expected).is_dir():
        return cache / expected
    if "://" not in address:
        return _unpacked(Path(address), cache, expected, address)
    with staging.scratch() as scratch:
        return _unpacked(_downloaded(address, scratch), cache, expected, address)


def _unpacked(archive: Path, cache: Path, expected: Optional[str], address: str) -> Path:
    if not archive.is_file():
        raise ArchiveError(f"there is no archive at {address}")
    found = sha256(archive)
    if expected is not None and found != expected:
        raise ArchiveError(
            f"the archive at {address} has the SHA-256 {found}, not {expected}: it is another one, or damaged"
        )
    target = cache / found
    with _alone(cache / f".{found}.lock"):
        if not target.is_dir():
            with staging.staged(target) as folder:
                unpack(archive, folder / target.name)
    return target


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Wait for whoever unpacks the same archive."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _downloaded(address: str, folder: Path) -> Path:
    try:
        import fsspec
    except ImportError:
        raise ArchiveError(f"{address} is fetched by fsspec; install it with: pip install 'traceserve[ray]'") from None
    try:
        with fsspec.open(address, "rb") as source, (folder / "archive.mar").open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except FileNotFoundError:
        raise ArchiveError(f"there is no archive at {address}") from None
    except (ImportError, ValueError) as error:  # the package of this kind of storage, or the kind is not known
        raise ArchiveError(f"{address} cannot be fetched here: {error}") from None
    except OSError as error:
        raise ArchiveError(f"{address} could not be fetched: {error}") from None
    return folder / "archive.mar"


def main(arguments: List[str]) -> int:
    """Fetch, and write where it is: `{"folder": ...}`."""
    try:
        folder = fetch_archive(arguments[0], arguments[1] if len(arguments) > 1 else None)
    except TraceserveError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps({"folder": str(folder)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
