"""Reads the user's file of labels, index_to_name."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Dict, List

from traceserve.building.config.config_files import unique_keys
from traceserve.errors import ConfigError


def read_labels(name: str, folder: Path) -> Dict[int, str]:
    """Read `{"0": "name", ...}`, or the pytorch/serve example's `{"label_list": "[name, ...]"}`, from a file relative to
    `folder`; raises ConfigError."""
    path = folder / os.path.expanduser(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
        if isinstance(content, dict) and set(content) == {"label_list"}:
            return dict(enumerate(_listed(content["label_list"])))
        return {_index(key): _name(name) for key, name in content.items()}
    except ConfigError as error:
        raise ConfigError(f"index_to_name: {path}: {error.message}") from None
    except OSError as error:
        raise ConfigError(f"index_to_name: {path} cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise ConfigError(
            f'index_to_name: {path} should hold a JSON object like {{"0": "name", "1": "name"}}'
        ) from None


def _index(key: str) -> int:
    """Parse a class index; raises ValueError for another spelling, such as "01", which may be a second one's."""
    index = int(key)
    if key != str(index):
        raise ValueError(key)
    return index


def _name(value: object) -> str:
    """Return a label's name; raises TypeError for anything but a text, such as torchserve's pairs of pictures' labels."""
    if not isinstance(value, str):
        raise TypeError("name")
    return value


def _listed(value: object) -> List[str]:
    """Return a list, or parse its text: Python's or JSON's, or bare names."""
    if isinstance(value, str):
        value = _parsed(value.strip())
    if not isinstance(value, (list, tuple)):
        raise TypeError("label_list")
    return [_name(name) for name in value]


def _parsed(text: str) -> object:
    """Parse a list's text; bare names stay as they are written, also if they look like numbers."""
    bare = [name.strip().strip("'\"") for name in text.strip("][)(").split(",")]
    try:
        written = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return bare
    if isinstance(written, str):
        return [written]
    numbers = isinstance(written, (list, tuple)) and written and all(isinstance(name, (int, float)) for name in written)
    return bare if numbers else written
