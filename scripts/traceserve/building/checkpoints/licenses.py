"""The licence of a checkpoint, as its model card or its licence file names it; read for the receipt, never judged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, Optional

import yaml

from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.errors import shortened

FILES = ["README.md", "LICENSE*", "LICENCE*", "COPYING*"]  # in a checkpoint's folder
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---", re.DOTALL)
_LONGEST, _MOST_READ = 120, 1 << 20  # characters of a name, and of a file


def license_of(checkpoint: Checkpoint) -> Optional[Dict[str, str]]:
    """Return the licence's name, its file, and its link if the card has one; an adapter's own. None if none is named."""
    folder = checkpoint.adapter.stored.folder if checkpoint.adapter is not None else checkpoint.folder
    places = dict.fromkeys((checkpoint.root or folder, folder))
    for place in places:
        found = _from_card(place) or _from_file(place)
        if found is not None:
            return found
    return None


def _from_card(folder: Path) -> Optional[Dict[str, str]]:
    """Return what the front matter of a model card says."""
    front = _FRONT_MATTER.match(_text(folder / "README.md"))
    try:
        card = yaml.safe_load(front.group(1)) if front else None
    except (yaml.YAMLError, RecursionError):
        return None
    if not isinstance(card, dict):
        return None
    own = [card.get(key) for key in ("license_name", "license")]  # "other" stands in `license` if it has a name
    name = next((value for value in own if isinstance(value, str) and value.strip()), None)
    if name is None:
        return None
    link = card.get("license_link")
    return {"name": _short(name), "file": "README.md", **({"link": _short(link)} if isinstance(link, str) else {})}


def _from_file(folder: Path) -> Optional[Dict[str, str]]:
    """Return the first line of a licence file."""
    for pattern in FILES[1:]:
        for path in sorted(folder.glob(pattern)):
            lines = [line.strip() for line in _text(path).splitlines() if line.strip()]
            if lines:
                return {"name": _short(lines[0]), "file": path.name}
    return None


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as stream:
            return stream.read(_MOST_READ)
    except OSError:
        return ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return shortened(text, _LONGEST)
