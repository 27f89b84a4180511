"""A streamed text: what was already sent to its client, and what is new."""

from __future__ import annotations

from copy import deepcopy
from typing import Callable, Optional, Sequence

from traceserve_runtime.errors import ModelFailure, TraceserveError
from traceserve_runtime.protocols.contract import Frames
from traceserve_runtime.protocols.native import PLAIN_TEXT
from traceserve_runtime.tasks.contract import Answer, WrittenToken


class Stream:
    """The text of one call; `send` passes a piece of it to the client. Without `send` everything is sent at the end.

    A stream of which something was sent cannot change its status, and ends with its error.
    """

    def __init__(self, send: Optional[Callable[[bytes], object]], frames: Optional[Frames] = None) -> None:
        self._send = send
        self._frames = self._unused = PLAIN_TEXT if frames is None else frames
        self._told = ""  # to the frames, which may hold it back
        self._tokens = 0  # how many of them
        self._sent = False
        self._broken = False

    @property
    def content_type(self) -> str:
        """The media type of the whole stream."""
        return self._frames.content_type

    @property
    def started(self) -> bool:
        """Whether anything was sent."""
        return self._sent

    def tell(self, text: str, tokens: Sequence[WrittenToken] = ()) -> None:
        """Send the new part of `text`, the whole text so far; nothing if it has not grown. `tokens` are the text's
        tokens, if requested.

        A micro-batch that failed is retried, so the text may restart: nothing is sent twice. If the new text
        differs (sampled without a seed, or by rounding) from one of which something was sent, nothing more is sent.
        """
        if self._send is None:
            return
        if not text.startswith(self._told) and not self._told.startswith(text):
            self._begin_anew()
        if len(text) > len(self._told) and not self._broken:
            if not self._told:
                self._unused = deepcopy(self._frames)
            piece = self._frames.piece(text[len(self._told) :], tokens[self._tokens :])
            self._tokens = len(tokens)
            if piece:
                self._sent = True
                self._send(piece)
            self._told = text

    def rest(self, text: str, answer: Optional[Answer] = None) -> bytes:
        """Return the unsent rest of the text; raises ModelFailure if the stream began with another text."""
        if not text.startswith(self._told):
            self._begin_anew()
        if self._broken:
            raise ModelFailure("the model failed while it wrote, and began another text; ask again")
        return self._frames.end(text[len(self._told) :], answer or Answer(text), self._tokens)

    def close(self) -> None:
        """Send nothing more."""
        self._send = None

    def ended(self, error: TraceserveError) -> bytes:
        """Return the last piece of a stream that fails."""
        return self._frames.failed(error)

    def _begin_anew(self) -> None:
        """Let another text begin, which is possible only while nothing was sent."""
        self._broken = self._sent
        if not self._sent:
            self._frames, self._told, self._tokens = self._unused, "", 0
