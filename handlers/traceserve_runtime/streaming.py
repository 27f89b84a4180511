"""Texts that clients are told while they grow: what of each was told already, and what is new."""

from __future__ import annotations

from typing import Callable, Collection, Dict


class Streams:
    """The texts of one batch; `send(row, piece)` hands a piece of a row's text to its client.

    Rows that are `whole` cannot be answered in pieces: of them all is told at the end.
    """

    def __init__(self, send: Callable[[int, bytes], None], whole: Collection[int] = ()) -> None:
        self._send = send
        self._whole = whole
        self._told: Dict[int, str] = {}

    def tell(self, row: int, text: str) -> None:
        """Send what `text`, all of it so far, has more than was told; nothing where it has no more.

        A micro-batch that failed is run again, so that texts may begin anew: nothing is told twice.
        """
        if row in self._whole:
            return
        told = self._told.get(row, "")
        if len(text) > len(told) and text.startswith(told):
            self._send(row, text[len(told) :].encode("utf-8"))
            self._told[row] = text

    def rest(self, row: int, text: str) -> bytes:
        """What of the whole text was not told."""
        return text[len(self._told.get(row, "")) :].encode("utf-8")

    def started(self, row: int) -> bool:
        """Whether anything of this row's text was told."""
        return row in self._told
