"""Reads a checkpoint's model card (README.md) and the other texts beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict

import yaml

CARD = "README.md"
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---", re.DOTALL)
_MOST_READ = 1 << 20  # characters of a file


def front_matter(folder: Path) -> Dict[object, object]:
    """Return the front matter of a folder's model card; nothing if there is no card, or if it cannot be read."""
    front = _FRONT_MATTER.match(start_of(folder / CARD))
    try:
        found = yaml.safe_load(front.group(1)) if front else None
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        LookupError,
        AttributeError,
    ):  # the last three: of dates and tags
        return {}
    return found if isinstance(found, dict) else {}


def start_of(path: Path) -> str:
    """Return the first million characters of a text, with or without a byte-order mark; "" if it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as stream:
            return stream.read(_MOST_READ)
    except OSError:
        return ""
