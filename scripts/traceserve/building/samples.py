"""The user's own samples: texts, or request bodies."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import List, Mapping, Tuple, Type

from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.requests import parse_requests
from traceserve_runtime.tasks.contract import Request, Task

from traceserve.errors import ConfigError


@dataclass(frozen=True)
class OwnSamples:
    """What a file of samples holds. It is read once: it may be a pipe.

    `lines`: the numbered non-blank ones, or the cells of a .csv file's column `text`.
    """

    path: Path
    lines: Tuple[Tuple[int, str], ...]

    @classmethod
    def read(cls, path: Path) -> OwnSamples:
        """Read a file; raises ConfigError if it has no text."""
        return cls(path, tuple(_lines(path)))

    @property
    def whole(self) -> bool:
        """Whether each line is a request body, as in a .jsonl file."""
        return self.path.suffix == ".jsonl"

    def requests(self, task: Type[Task]) -> List[Request]:
        """Return the requests in all lines; raises ConfigError for one that is none."""
        requests = []
        for number, line in self.lines:
            try:
                body: object = json.loads(line) if self.whole else line
                row: Mapping[str, object] = {"body": body}
                requests += parse_requests(row, Headers(), task, 0, len(line)).requests
            except (ValueError, TraceserveError) as error:
                raise ConfigError(f"--samples {self.path}, line {number}: {error}") from None
        return [Request(r.inputs, {**task.gate_parameters, **r.parameters}) for r in requests]


def _lines(path: Path) -> List[Tuple[int, str]]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--samples {path} cannot be read: {error}") from None
    if path.suffix == ".csv":
        csv.field_size_limit(max(csv.field_size_limit(), len(content)))  # a long text is no error
        rows = csv.DictReader(io.StringIO(content, newline=""))
        columns = rows.fieldnames or ()
        if "text" not in columns:
            raise ConfigError(f"--samples {path} should have a header with a column text, not: {', '.join(columns)}")
        found = [(rows.line_num, row["text"] or "") for row in rows]
    else:  # not splitlines: JSON may contain U+2028
        found = [(number, line.rstrip("\r")) for number, line in enumerate(content.split("\n"), 1)]
    found = [(number, line) for number, line in found if line.strip()]
    if not found:
        raise ConfigError(f"--samples {path} holds no text")
    return found
