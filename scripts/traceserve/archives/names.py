"""Archive names and versions that TorchServe and its archiver allow."""

from __future__ import annotations

import re
from pathlib import Path

from traceserve_runtime.manifest import VERSION

from traceserve.errors import ArchiveError

STORE = Path("model_store")  # the usual folder of archives
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def check_name(name: str) -> str:
    """Return `name` if TorchServe allows it; raises ArchiveError."""
    if not NAME.fullmatch(name):
        raise ArchiveError(f"{name!r} cannot name an archive: letters, digits, _ . and - only, a letter or digit first")
    return name


def check_version(version: str) -> str:
    """Return `version` if it is safe in a URL; raises ArchiveError. TorchServe neither parses nor sorts versions."""
    if not re.fullmatch(VERSION, version):
        raise ArchiveError(
            f"{version!r} cannot be an archive's version: letters, digits, _ . and - only, a letter or digit first, at most "
            "64; as 1.0, 2.1 or 2026-11-26"
        )
    return version
