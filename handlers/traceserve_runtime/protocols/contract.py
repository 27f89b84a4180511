"""The contract of a protocol: which calls it owns, what they ask, and how they are answered, streamed and refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, List, Mapping, NamedTuple, Optional, Sequence, Type, Union
from typing import Protocol as Interface

from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.json_types import Json
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.tasks.contract import Answer, Request, Task, WrittenToken


class Served(NamedTuple):
    """The served model, its name and version; `text_of` decodes token ids."""

    name: str
    version: str
    manifest: Manifest
    task: Type[Task]
    text_of: Callable[[Sequence[int]], str]


class Form(Interface):
    """The response format for the requests of one body."""

    def reply(self, answers: Sequence[Answer], served: Served) -> Response:
        """Return the response document: parsed JSON or a Document."""
        ...

    def field_path(self, index: int, where: str, name: Optional[str]) -> Optional[str]:
        """Return the path in the client's body of the field `name` of request `index`, which is at `where`."""
        ...


class Frames(Interface):
    """The format of a streamed text."""

    @property
    def content_type(self) -> str:
        """The media type of the whole stream."""
        ...

    def piece(self, text: str, tokens: Sequence[WrittenToken]) -> bytes:
        """Return the bytes for new text and its tokens (if kept); empty if the text is held back."""
        ...

    def end(self, text: str, answer: Answer, tokens: int) -> bytes:
        """Return the last piece: the remaining text and the final details; `tokens` counts those sent before."""
        ...

    def failed(self, error: TraceserveError) -> bytes:
        """Return the last piece of a stream that fails: its status was already sent."""
        ...


class ErrorFormat(Interface):
    """The response format for a call that fails."""

    def error(self, error: TraceserveError, parts: Mapping[str, object], headers: Headers, served: Served) -> Refusal:
        """Return the response to an error."""
        ...


@dataclass(frozen=True)
class Body:
    """The requests of one call and their response format; with `frames` the answer may be streamed."""

    requests: List[Request]
    protocol: Form
    frames: Optional[Frames] = field(default=None, compare=False)
    # Of the format that was recognized; None: of the path.
    errors: Optional[ErrorFormat] = field(default=None, compare=False)

    @property
    def streamable(self) -> bool:
        """Whether the answer may be streamed."""
        return self.frames is not None

    def field_path(self, index: int, name: Optional[str]) -> Optional[str]:
        """Return the path in the client's body of a field of request `index`."""
        request, where = self.requests[index], self.requests[index].where
        if request.envelope is not None and name is not None and name.startswith("parameters."):
            where = request.envelope
        return self.protocol.field_path(index, where, name)


@dataclass(frozen=True)
class Document:
    """An answer that needs no model, or one that is not JSON: then its value is bytes."""

    value: Union[Json, bytes]
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """An error in a protocol's format."""

    document: Json
    status: int
    phrase: str

    @classmethod
    def of(cls, document: Json, error: TraceserveError) -> Refusal:
        """Make one with the error's own status."""
        return cls(document, error.status, error.phrase)


Response = Union[Json, Document]


class Protocol(ErrorFormat, Interface):
    """A protocol, or one path of it. Its `error` finds the format of a call that it could not read."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Union[Body, Document]:
        """Read a call; `group` numbers it. Raises a TraceserveError with a 4xx status that names the field."""
        ...
