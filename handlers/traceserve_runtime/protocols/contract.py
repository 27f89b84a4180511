"""What a protocol is: which calls are its own, what they ask, and how they are answered, streamed and refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Type, Union
from typing import Protocol as Interface

from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.tasks.contract import Answer, Request, Task


class Served(NamedTuple):
    """What is served, and under which name and version."""

    name: str
    version: str
    manifest: Manifest
    task: Type[Task]


class Form(Interface):
    """How the requests of one body are answered."""

    def reply(self, answers: Sequence[Answer], served: Served) -> Any:
        """The document that the client gets."""
        ...

    def place(self, index: int, where: str, name: Optional[str]) -> Optional[str]:
        """The path in the client's body of the field `name` of the request `index`, which stands at `where`."""
        ...


class Frames(Interface):
    """How a growing text is sent in pieces."""

    @property
    def content_type(self) -> str:
        """Of the whole stream."""
        ...

    def piece(self, text: str) -> bytes:
        """What is sent for text that is new; empty where it is held back."""
        ...

    def end(self, text: str, answer: Answer) -> bytes:
        """The last piece: for the rest of the text, and what is said of all of it."""
        ...

    def failed(self, error: TraceserveError) -> bytes:
        """The last piece of a stream that fails: its status was sent long ago."""
        ...


@dataclass(frozen=True)
class Body:
    """What one call asks, and the form in which it is answered; with `frames` it may be answered in pieces."""

    requests: List[Request]
    protocol: Form
    frames: Optional[Frames] = field(default=None, compare=False)

    @property
    def streamable(self) -> bool:
        """Whether its answer may be sent in pieces."""
        return self.frames is not None

    def place(self, index: int, name: Optional[str]) -> Optional[str]:
        """The path in the client's body of a field of the request `index`."""
        return self.protocol.place(index, self.requests[index].where, name)


@dataclass(frozen=True)
class Document:
    """An answer for which nothing is computed."""

    value: Any
    content_type: str = "application/json"


class Protocol(Interface):
    """One protocol, or one path of it."""

    def read(self, parts: Mapping[str, Any], headers: Headers, served: Served, group: int) -> Union[Body, Document]:
        """What a call asks; `group` numbers it. Raises a TraceserveError of status 4xx, which names the field."""
        ...

    def error(self, error: TraceserveError, parts: Mapping[str, Any], headers: Headers, served: Served) -> Any:
        """The document of an error."""
        ...
