"""The files that targets fill in: `@{name}` stands for a value; all else is written as it is."""

from __future__ import annotations

import json
import math
import re
import string
from pathlib import Path
from typing import Iterable, Mapping

import yaml

FOLDER = Path(__file__).parent
_PLAIN_KEY = re.compile(
    r"[A-Za-z][A-Za-z0-9_./-]{3,}|cpu|url|env"
)  # none of these is a number; PyYAML quotes true and false


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


class _Dumper(yaml.SafeDumper):
    """Every string in double quotes. PyYAML quotes by YAML 1.1: 1e5, 0o17 and y stay plain, which Go reads as other types."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')


def _with_plain_keys(dumper: yaml.SafeDumper, mapping: Mapping[str, object]) -> yaml.Node:
    node = dumper.represent_mapping("tag:yaml.org,2002:map", mapping)
    for key, _ in node.value:
        if _PLAIN_KEY.fullmatch(key.value):
            key.style = None
    return node


_Dumper.add_representer(str, _quoted)
_Dumper.add_representer(dict, _with_plain_keys)


def block(value: object, indent: int = 0) -> str:
    """YAML for the lines under a key, indented by so many spaces, without a newline at the end."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return "\n".join(f"{' ' * indent}{line}" for line in text.splitlines())


def flow(value: object) -> str:
    """JSON, which is YAML on one line."""
    return json.dumps(value, ensure_ascii=False)


def comment(lines: Iterable[str]) -> str:
    """Sentences as comments."""
    return "\n".join(f"# {line}" for line in lines)
