"""The files that targets fill in: `@{name}` stands for a value; all else is written as it is."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Iterable

import yaml

FOLDER = Path(__file__).parent


class _Template(string.Template):
    """`@` in the place of `$`, which shells, Docker and Helm have; braces always, so that an address is none."""

    delimiter = "@"
    pattern = r"@\{(?P<braced>[a-z_]+)\}|(?P<escaped>(?!))|(?P<named>(?!))|(?P<invalid>(?!))"  # type: ignore[assignment]


def read_template(name: str) -> str:
    """A template's text as it is."""
    return (FOLDER / name).read_text(encoding="utf-8")


def fill(file: str, /, **values: str) -> str:
    """A template with its values; raises KeyError for one that is missing."""
    return _Template(read_template(file)).substitute(values)


def block(value: object, indent: int = 0) -> str:
    """YAML for the lines under a key, indented by so many spaces, without a newline at the end."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1000)
    return "\n".join(f"{' ' * indent}{line}" for line in text.splitlines())


def flow(value: object) -> str:
    """JSON, which is YAML on one line."""
    return json.dumps(value, ensure_ascii=False)


def comment(lines: Iterable[str]) -> str:
    """Sentences as comments."""
    return "\n".join(f"# {line}" for line in lines)
