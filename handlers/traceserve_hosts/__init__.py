"""Hosts other than TorchServe: each file translates one server's requests for `traceserve_runtime.service`.

Nothing here travels in an archive. An archive brings the runtime that it was proven with, and it is this one that answers:
so no file imports `traceserve_runtime` before `loading.load_archive` has put the archive's folder first on the path, but
`fetching`, which runs in a process of its own.
"""

from pathlib import Path

KEY_VARIABLE = "TRACESERVE_KEY"  # where it is set, every request needs this key, as `Authorization: Bearer KEY`
# Or the key is in this file, which is read for each request: it may be rotated.
KEY_FILE_VARIABLE = "TRACESERVE_KEY_FILE"
SIGNED = "--signed"  # to `fetching`: the archive needs a signature


def lock_of_users(folder: Path) -> Path:
    """The file beside an unpacked archive of the cache that its processes lock; its date is when one was started last."""
    return folder.with_name(f".{folder.name}.used")


def reason_in(said: str, otherwise: str) -> str:
    """The last line of an error or a program's output: the reason, also after a traceback; `otherwise` where there is none."""
    return next((line.strip() for line in reversed(said.splitlines()) if line.strip()), otherwise)
