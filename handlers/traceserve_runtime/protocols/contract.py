"""What a protocol is: which calls are its own, what they ask, and how they are answered, streamed and refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, List, Mapping, NamedTuple, Optional, Sequence, Type, Union
from typing import Protocol as Interface

from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.tasks.contract import Answer, Request, Task, WrittenToken


class Served(NamedTuple):
    """What is served, and under which name and version; `text_of` gives the text of token ids."""

    name: str
    version: str
    manifest: Manifest
    task: Type[Task]
    text_of: Callable[[Sequence[int]], str]


class Form(Interface):
    """How the requests of one body are answered."""

    def reply(self, answers: Sequence[Answer], served: Served) -> Any:
        """The document that the client gets, parsed JSON or a Document."""
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

    def piece(self, text: str, tokens: Sequence[WrittenToken]) -> bytes:
        """What is sent for text that is new, and for its tokens where these are kept; empty where it is held back."""
        ...

    def end(self, text: str, answer: Answer, tokens: int) -> bytes:
        """The last piece: for the rest of the text, and what is said of all of it; so many `tokens` were sent before."""
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
    """An answer for which nothing is computed, or one of another kind than JSON: then its value is bytes."""

    value: Any
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """An error as a protocol tells it."""

    document: Any
    status: int
    phrase: str

    @classmethod
    def of(cls, document: Any, error: TraceserveError) -> Refusal:
        """With the error's own status."""
        return cls(document, error.status, error.phrase)


class Protocol(Interface):
    """One protocol, or one path of it."""

    def read(self, parts: Mapping[str, Any], headers: Headers, served: Served, group: int) -> Union[Body, Document]:
        """What a call asks; `group` numbers it. Raises a TraceserveError of status 4xx, which names the field."""
        ...

    def error(self, error: TraceserveError, parts: Mapping[str, Any], headers: Headers, served: Served) -> Refusal:
        """What a client is told of an error."""
        ...
