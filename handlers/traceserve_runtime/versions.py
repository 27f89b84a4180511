"""Compares the versions of packages."""

from __future__ import annotations

import re
from typing import Tuple

_RELEASE = re.compile(r"\d+(\.\d+)*")


def release_of(version: str) -> Tuple[int, ...]:
    """Return the numbers that a version begins with: (3, 2, 0) of 3.2.0rc1, (2, 6, 0) of 2.6.0+cpu; none of a name."""
    found = _RELEASE.match(version)
    return tuple(map(int, found.group().split("."))) if found else ()
