"""Whose turn it is to compute: what was asked comes first, what a worker measures for itself goes in between."""

from __future__ import annotations

import contextlib
import threading
from typing import Iterator

_PATIENCE = 0.02  # seconds that a measurement waits for a moment without requests


class Turns:
    """One computes at a time. A measurement lets requests pass, but not for ever: under load it is needed most.

    Requests may come from several threads, measurements from one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy = False
        self._waiting = 0  # requests
        self._due = False  # a measurement that has let enough of them pass
        self._served = 0  # requests

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A request's turn: as soon as what runs has ended."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._busy and not self._due)
            self._waiting -= 1
            self._busy = True
        try:
            yield
        finally:
            self._served += 1
            self._end()

    @contextlib.contextmanager
    def measurement(self) -> Iterator[None]:
        """A measurement's turn: when nobody asks, or after a short while."""
        with self._changed:
            self._due = not self._changed.wait_for(lambda: not self._busy and not self._waiting, _PATIENCE)
            self._changed.wait_for(lambda: not self._busy)
            self._busy, self._due = True, False
        try:
            yield
        finally:
            self._end()

    def wait_for_a_request(self, seconds: float) -> None:
        """Until one more was served, or for so long."""
        with self._changed:
            before = self._served
            self._changed.wait_for(lambda: self._served > before, seconds)

    def _end(self) -> None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
