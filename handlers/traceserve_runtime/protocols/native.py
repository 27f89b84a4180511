"""Our own protocol: a text, an object or a list, answered by the answer or a list of answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Sequence

from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.protocols.contract import Served
from traceserve_runtime.tasks.contract import Answer, WrittenToken


class Model(NamedTuple):
    """What is served, as V2 names it in its answers."""

    name: str
    version: str


@dataclass(frozen=True)
class Plain:
    """Our own protocol."""

    is_list: bool

    def reply(self, answers: Sequence[Answer], served: Served) -> Any:
        """The document that the client gets; where the answers have room, with the characters that the model never saw."""
        return self.document([noted(answer) for answer in answers], Model(served.name, served.version))

    def document(self, answers: Sequence[Any], model: Model) -> Any:
        """What the client gets for the answers to all that it asked."""
        return list(answers) if self.is_list else answers[0]

    def place(self, index: int, where: str, name: Optional[str]) -> Optional[str]:
        """The path in the client's body of the field `name` of the request `index`, which stands at `where`."""
        return ".".join(part for part in (where, name) if part) or None


@dataclass(frozen=True)
class PlainText:
    """A stream of plain text. One that fails ends with a line of its own that is the JSON of the error."""

    content_type: str = "text/plain; charset=utf-8"

    def piece(self, text: str, tokens: Sequence[WrittenToken]) -> bytes:
        """The text itself."""
        return text.encode("utf-8")

    def end(self, text: str, answer: Answer, tokens: int) -> bytes:
        """What was not sent yet."""
        return text.encode("utf-8")

    def failed(self, error: TraceserveError) -> bytes:
        """A line break, the JSON of the error as other answers have it, a line break."""
        return ("\n" + json.dumps(error.to_json()) + "\n").encode("ascii")


PLAIN_TEXT = PlainText()


def noted(answer: Answer) -> Any:
    """The answer's value; where its dictionaries have room, with the characters that the model never saw."""
    if not answer.unseen or isinstance(answer.value, str):
        return answer.value
    note = {"truncated": answer.unseen}
    if isinstance(answer.value, dict):
        return {**answer.value, **note}
    return [{**item, **note} if isinstance(item, dict) else item for item in answer.value]
