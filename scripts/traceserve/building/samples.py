"""The user's own samples: texts, or request bodies."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, List, Mapping, Tuple, Type

from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.requests import parse_requests
from traceserve_runtime.tasks.contract import Request, Task

from traceserve.errors import ConfigError, unread_reason
from traceserve.option_names import option

_BODIES = (".jsonl", ".ndjson")  # each line is a request body
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
# What would be read as lines of text, and what to do instead.
_TABLE = "a table, which is not read here; save it as .csv, with a column text"
_PACKED = "compressed; unpack it first"
_REFUSED = {
    ".json": "one JSON document, which is not read here; write a request body on each line of a .jsonl file, such as "
    '{"text": "..."}',
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods"), _TABLE),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip"), _PACKED),
}


@dataclass(frozen=True)
class OwnSamples:
    """What a file, which is read once, since it may be a pipe, or a Python caller's list of samples holds.

    `name`, and behind it `numbering`, say in errors where a sample stands; `whole`: whether each line is a request body, as in
    a .jsonl file; `lines`: the numbered non-blank ones, or the cells of a .csv or .tsv file's column `text`.
    """

    name: str
    lines: Tuple[Tuple[int, str], ...]
    whole: bool
    numbering: str = ", line {}"

    def __post_init__(self) -> None:
        if not self.lines:
            raise ConfigError(f"{self.name} holds no text")

    @classmethod
    def read(cls, path: Path) -> OwnSamples:
        """Read a file; raises ConfigError if it has no text."""
        name = f"{option('samples')} {path}"
        return cls(name, tuple(_lines(path, name)), path.suffix.lower() in _BODIES)

    @classmethod
    def listed(cls, samples: Iterable[object]) -> OwnSamples:
        """Take texts or request bodies; raises ConfigError if there are none."""
        return cls(option("samples"), tuple(enumerate(map(json.dumps, samples))), whole=True, numbering="[{}]")

    def at(self, number: int) -> str:
        """Name a sample by its number."""
        return f"{self.name}{self.numbering.format(number)}"

    def requests(self, task: Type[Task]) -> List[Request]:
        """Return the requests in all lines; raises ConfigError for one that is none."""
        requests = []
        for number, line in self.lines:
            try:
                body: object = json.loads(line) if self.whole else line
                row: Mapping[str, object] = {"body": body}
                requests += parse_requests(row, Headers(), task, 0, len(line)).requests
            except (ValueError, TraceserveError) as error:
                raise ConfigError(f"{self.at(number)}: {error}") from None
        return [Request(r.inputs, {**task.gate_parameters, **r.parameters}) for r in requests]


def _lines(path: Path, name: str) -> List[Tuple[int, str]]:
    suffix = path.suffix.lower()
    if suffix in _REFUSED:
        raise ConfigError(f"{name} is {_REFUSED[suffix]}")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read: {unread_reason(error)}") from None
    if suffix in _SEPARATORS:
        csv.field_size_limit(max(csv.field_size_limit(), len(content)))  # a long text is no error
        rows = csv.DictReader(io.StringIO(content, newline=""), delimiter=_SEPARATORS[suffix])
        columns = rows.fieldnames or ()
        if "text" not in columns:
            raise ConfigError(f"{name} should have a header with a column text, not: {', '.join(columns)}")
        found = [(rows.line_num, row["text"] or "") for row in rows]
    else:  # not splitlines: JSON may contain U+2028
        found = [(number, line.rstrip("\r")) for number, line in enumerate(content.split("\n"), 1)]
    return [(number, line) for number, line in found if line.strip()]
