"""Texts that clients are told while they grow: what of each was told already, and what is new."""

from __future__ import annotations

import json
from typing import Callable, Collection, Dict, Set

from traceserve_runtime.errors import ModelFailure, TraceserveError


class Streams:
    """The texts of one batch; `send(row, piece)` hands a piece of a row's text to its client.

    A stream that was begun cannot change its status any more. One that fails ends with a line of its own that is the JSON
    of the error; see `ended`. Rows that are `whole` cannot be answered in pieces: of them all is told at the end.
    """

    def __init__(self, send: Callable[[int, bytes], None], whole: Collection[int] = ()) -> None:
        self._send = send
        self._whole = whole
        self._told: Dict[int, str] = {}
        self._broken: Set[int] = set()

    def tell(self, row: int, text: str) -> None:
        """Send what `text`, all of it so far, has more than was told; nothing where it has no more.

        A micro-batch that failed is run again, so that texts may begin anew: nothing is told twice. Where the new text is
        another one (drawn without a seed, or by other last digits), nothing more is told.
        """
        if row in self._whole:
            return
        told = self._told.get(row, "")
        if not text.startswith(told):
            if not told.startswith(text):
                self._broken.add(row)
        elif len(text) > len(told) and row not in self._broken:
            self._send(row, text[len(told) :].encode("utf-8"))
            self._told[row] = text

    def rest(self, row: int, text: str) -> bytes:
        """What of the whole text was not told; or the end of a stream whose beginning belongs to another text."""
        told = self._told.get(row, "")
        if row in self._broken or not text.startswith(told):
            return self.ended(ModelFailure("the model failed while it wrote, and began another text; ask again"))
        return text[len(told) :].encode("utf-8")

    def ended(self, error: TraceserveError) -> bytes:
        """The last line of a stream that fails: a line break, the JSON of the error as other answers have it, a line break."""
        return ("\n" + json.dumps(error.to_json()) + "\n").encode("ascii")

    def started(self, row: int) -> bool:
        """Whether anything of this row's text was told."""
        return row in self._told
