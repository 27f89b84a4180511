"""A request as a command to copy."""

from __future__ import annotations

import json
import shlex
from typing import Mapping


def curl(url: str, body: Mapping[str, object], *options: str) -> str:
    """Return the command that sends `body` as JSON."""
    parts = ["curl", url, *options, "-H", "Content-Type: application/json", "-d", json.dumps(body, ensure_ascii=False)]
    return " ".join(shlex.quote(part) for part in parts)
