"""The licence of a checkpoint, as its model card or its licence file names it; read for the receipt, never judged."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Optional

from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.model_card import CARD, front_matter, start_of
from traceserve.errors import shortened

FILES = [CARD, "LICENSE*", "LICENCE*", "COPYING*"]  # in a checkpoint's folder
_LONGEST = 120  # characters of a name


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
    card = front_matter(folder)
    own = [card.get(key) for key in ("license_name", "license")]  # "other" stands in `license` if it has a name
    name = next((value for value in own if isinstance(value, str) and value.strip()), None)
    if name is None:
        return None
    link = card.get("license_link")
    return {"name": _short(name), "file": CARD, **({"link": _short(link)} if isinstance(link, str) else {})}


def _from_file(folder: Path) -> Optional[Dict[str, str]]:
    """Return the first line of a licence file."""
    for pattern in FILES[1:]:
        for path in sorted(folder.glob(pattern)):
            lines = [line.strip() for line in start_of(path).splitlines() if line.strip()]
            if lines:
                return {"name": _short(lines[0]), "file": path.name}
    return None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return shortened(text, _LONGEST)
