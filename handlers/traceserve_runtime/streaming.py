"""Texts that clients are sent while they grow: what of each was sent already, and what is new."""

from __future__ import annotations

from typing import Callable, Collection, Dict, Mapping, Optional, Sequence, Set

from traceserve_runtime.errors import ModelFailure, TraceserveError
from traceserve_runtime.protocols.contract import Frames
from traceserve_runtime.protocols.native import PLAIN_TEXT
from traceserve_runtime.tasks.contract import Answer, WrittenToken


class Streams:
    """The texts of one batch; `send(i, piece)` hands a piece of the text of call number `i` to its client.

    A stream that was begun cannot change its status any more, and ends with its error. Calls that are `whole` cannot be
    answered in pieces: all is sent at the end.
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
        """Of the whole stream."""
        return self._of(index).content_type

    def tell(self, index: int, text: str, tokens: Sequence[WrittenToken] = ()) -> None:
        """Send what `text`, all of it so far, has more than was sent; nothing where it has no more. `tokens` are those that it
        is made of, where they are told too.

        A micro-batch that failed is run again, so that texts may begin anew: nothing is sent twice. Where the new text is
        another one (drawn without a seed, or by other last digits), nothing more is sent.
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
        """What of the whole text was not sent; or the end of a stream whose beginning belongs to another text."""
        told = self._told.get(index, "")
        if index in self._broken or not text.startswith(told):
            return self.ended(index, ModelFailure("the model failed while it wrote, and began another text; ask again"))
        return self._of(index).end(text[len(told) :], answer or Answer(text), self._tokens.get(index, 0))

    def ended(self, index: int, error: TraceserveError) -> bytes:
        """The last piece of a stream that fails."""
        return self._of(index).failed(error)

    def started(self, index: int) -> bool:
        """Whether anything of this call's text was sent."""
        return index in self._told
