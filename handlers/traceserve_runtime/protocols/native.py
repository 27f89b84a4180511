"""Our own protocol: a text, an object or a list in, an answer or a list of answers out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Optional, Sequence

from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.json_types import Json
from traceserve_runtime.protocols.contract import Served
from traceserve_runtime.tasks.contract import Answer, WrittenToken

UNSEEN = "truncated"  # the key of what `noted` adds


@dataclass(frozen=True)
class Plain:
    """Our own protocol."""

    is_list: bool

    def reply(self, answers: Sequence[Answer], served: Served) -> Json:
        """Return the response, of answers that are `noted`."""
        return self.document([noted(answer) for answer in answers], served)

    def document(self, answers: Sequence[Json], served: Served) -> Json:
        """Return the response for all answers."""
        return list(answers) if self.is_list else answers[0]

    def field_path(self, index: int, where: str, name: Optional[str]) -> Optional[str]:
        """Return the path in the client's body of the field `name` of request `index`, which is at `where`."""
        return ".".join(part for part in (where, name) if part) or None


@dataclass(frozen=True)
class PlainText:
    """A stream of plain text. If it fails, its last line is the error as JSON."""

    content_type: str = "text/plain; charset=utf-8"

    def piece(self, text: str, tokens: Sequence[WrittenToken]) -> bytes:
        """Return the text itself."""
        return text.encode("utf-8")

    def end(self, text: str, answer: Answer, tokens: int) -> bytes:
        """Return the text that was not sent yet."""
        return text.encode("utf-8")

    def failed(self, error: TraceserveError) -> bytes:
        """Return a line break, the error's usual JSON, a line break."""
        return ("\n" + json.dumps(error.to_json()) + "\n").encode("ascii")


PLAIN_TEXT = PlainText()


def noted(answer: Answer) -> Json:
    """Return the answer's value; of a truncated text, each of its objects has the characters that the model did not see."""
    value, note = answer.value, {UNSEEN: answer.unseen}
    if answer.unseen and isinstance(value, dict):
        return {**value, **note}
    if answer.unseen and isinstance(value, list):
        return [{**item, **note} if isinstance(item, dict) else item for item in value]
    return value
