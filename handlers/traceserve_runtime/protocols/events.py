"""Server-sent events, which foreign protocols stream: one JSON document each."""

from __future__ import annotations

import json
from typing import Sequence

from traceserve_runtime.json_types import Json

CONTENT_TYPE = "text/event-stream"


def event(document: Json, space: str = " ") -> bytes:
    """Encode one event."""
    return f"data:{space}{json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n".encode(
        "utf-8", "replace"
    )


DONE = b"data: [DONE]\n\n"


class Stops:
    """Cuts a growing text before its first stop string; text that may begin one is held back."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Add text; return what can be sent now."""
        if self.found:
            return ""
        whole = self._held + text
        ends = [whole.find(stop) for stop in self._stops if stop in whole]
        if ends:
            self.found, self._held = True, ""
            return whole[: min(ends)]
        kept = max((self._begun(whole, stop) for stop in self._stops), default=0)
        self._held = whole[len(whole) - kept :]
        return whole[: len(whole) - kept]

    def rest(self) -> str:
        """Return the text held back, at the end."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """Return how many of the last characters may begin the stop string."""
        start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while start >= 0 and not stop.startswith(text[start:]):
            start = text.find(stop[0], start + 1)
        return len(text) - start if start >= 0 else 0


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Cut a text before its first stop string."""
    until = Stops(stops)
    return until.feed(text) + until.rest()
