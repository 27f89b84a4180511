"""Streamed texts: what was already sent to each client, and what is new."""

from __future__ import annotations

from typing import Callable, Collection, Dict, Mapping, Optional, Sequence, Set

from traceserve_runtime.errors import ModelFailure, TraceserveError
from traceserve_runtime.protocols.contract import Frames
from traceserve_runtime.protocols.native import PLAIN_TEXT
from traceserve_runtime.tasks.contract import Answer, WrittenToken


class Streams:
    """The texts of one batch; `send(i, piece)` passes a piece of call number `i`'s text to its client.

    A stream that has begun cannot change its status, and ends with its error. `whole` calls cannot be
    streamed: everything is sent at the end.
    """

    def __init__(
        self,
        send: Callable[[int, bytes], object],
        whole: Collection[int] = (),
        frames: Mapping[int, Frames] = {},
    ) -> None:
        self._send = send
        self._whole = whole
        self._frames = frames
        self._told: Dict[int, str] = {}
        self._tokens: Dict[int, int] = {}  # how many were sent
        self._broken: Set[int] = set()

    def _of(self, index: int) -> Frames:
        return self._frames.get(index, PLAIN_TEXT)

    def content_type(self, index: int) -> str:
        """Return the media type of the whole stream."""
        return self._of(index).content_type

    def tell(self, index: int, text: str, tokens: Sequence[WrittenToken] = ()) -> None:
        """Send the new part of `text`, the whole text so far; nothing if it has not grown. `tokens` are the text's
        tokens, if requested.

        A micro-batch that failed is retried, so texts may restart: nothing is sent twice. If the new text
        differs (sampled without a seed, or by rounding), nothing more is sent.
        """
        if index in self._whole:
            return
        told = self._told.get(index, "")
        if not text.startswith(told):
            if not told.startswith(text):
                self._broken.add(index)
        elif len(text) > len(told) and index not in self._broken:
            piece = self._of(index).piece(text[len(told) :], tokens[self._tokens.get(index, 0) :])
            self._tokens[index] = len(tokens)
            if piece:
                self._send(index, piece)
            self._told[index] = text

    def rest(self, index: int, text: str, answer: Optional[Answer] = None) -> bytes:
        """Return the unsent rest of the text; or the error if the stream began with another text."""
        told = self._told.get(index, "")
        if index in self._broken or not text.startswith(told):
            return self.ended(index, ModelFailure("the model failed while it wrote, and began another text; ask again"))
        return self._of(index).end(text[len(told) :], answer or Answer(text), self._tokens.get(index, 0))

    def ended(self, index: int, error: TraceserveError) -> bytes:
        """Return the last piece of a stream that fails."""
        return self._of(index).failed(error)

    def started(self, index: int) -> bool:
        """Return whether any of this call's text was sent."""
        return index in self._told
