"""What `traceserve serve` has left where it was killed before the server was recorded."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Iterator, List

from traceserve.archives import staging
from traceserve.serving import instances

_FOLDER = re.compile(r"traceserve-(\d+)-[a-z0-9_]{8}")  # the names that `prefix` begins


def prefix(port: int) -> str:
    """Return how the name of a server's folder begins."""
    return f"traceserve-{port}-"


def ports_of_killed_starts() -> List[int]:
    """Return the ports of servers that may run without a record. Nothing is ended."""
    return [_port(folder) for folder in _left()]


def end_killed_starts() -> List[int]:
    """End what killed starts have left, and remove their folders; returns their ports."""
    ended = []
    for folder in _left():
        instances.end_started_in(folder)
        ended.append(_port(folder))
    return ended


def _left() -> Iterator[Path]:
    """Yield the folders of killed starts; each is locked meanwhile."""
    for place in sorted({Path(tempfile.gettempdir()), Path("/tmp")}):
        if place.is_dir():
            for folder in staging.abandoned(place, _FOLDER):
                if not instances.is_remembered(folder):
                    yield folder


def _port(folder: Path) -> int:
    return int(folder.name.split("-")[1])
