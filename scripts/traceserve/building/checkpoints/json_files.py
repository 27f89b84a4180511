"""Reads a checkpoint's JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, Optional

from traceserve.errors import SourceError, json_reason

_MARKS = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_json(path: Path) -> object:
    """Return a checkpoint's JSON file, None if missing; raises SourceError if it is unreadable."""
    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    for mark, name in _MARKS.items():
        if content.startswith(mark):
            raise SourceError(
                f"{path} begins with a byte-order mark of {name}, and transformers does not read it; save it as UTF-8 "
                "without one"
            )
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is no valid JSON: {json_reason(error)}") from None


def read_object(path: Path) -> Optional[Dict[str, object]]:
    """Return the object in a checkpoint's JSON file, None if missing; raises SourceError for anything else."""
    content = read_json(path)
    if content is not None and not isinstance(content, dict):
        raise SourceError(
            f"{path} should hold a JSON object, not {'a list' if isinstance(content, list) else 'a value'}"
        )
    return content
