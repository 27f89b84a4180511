"""A streamed text: what was already sent to its client, and what is new."""

from __future__ import annotations

from typing import Callable, Optional, Sequence

from traceserve_runtime.errors import ModelFailure, TraceserveError
from traceserve_runtime.protocols.contract import Frames
from traceserve_runtime.protocols.native import PLAIN_TEXT
from traceserve_runtime.tasks.contract import Answer, WrittenToken


class Stream:
    """The text of one call; `send` passes a piece of it to the client. Without `send` everything is sent at the end.

    A stream that has begun cannot change its status, and ends with its error.
    """

    def __init__(self, send: Optional[Callable[[bytes], object]], frames: Optional[Frames] = None) -> None:
        self._send = send
        self._frames = PLAIN_TEXT if frames is None else frames
        self._told = ""
        self._tokens = 0  # how many were sent
        self._broken = False

    @property
    def content_type(self) -> str:
        """The media type of the whole stream."""
        return self._frames.content_type

    @property
    def started(self) -> bool:
        """Whether any of the text was sent."""
        return bool(self._told)

    def tell(self, text: str, tokens: Sequence[WrittenToken] = ()) -> None:
        """Send the new part of `text`, the whole text so far; nothing if it has not grown. `tokens` are the text's
        tokens, if requested.

        A micro-batch that failed is retried, so the text may restart: nothing is sent twice. If the new text
        differs (sampled without a seed, or by rounding), nothing more is sent.
        """
        if self._send is None:
            return
        if not text.startswith(self._told):
            self._broken = self._broken or not self._told.startswith(text)
        elif len(text) > len(self._told) and not self._broken:
            piece = self._frames.piece(text[len(self._told) :], tokens[self._tokens :])
            self._tokens = len(tokens)
            if piece:
                self._send(piece)
            self._told = text

    def rest(self, text: str, answer: Optional[Answer] = None) -> bytes:
        """Return the unsent rest of the text; or the error if the stream began with another text."""
        if self._broken or not text.startswith(self._told):
            return self.ended(ModelFailure("the model failed while it wrote, and began another text; ask again"))
        return self._frames.end(text[len(self._told) :], answer or Answer(text), self._tokens)

    def ended(self, error: TraceserveError) -> bytes:
        """Return the last piece of a stream that fails."""
        return self._frames.failed(error)
