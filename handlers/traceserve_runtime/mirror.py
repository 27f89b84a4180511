"""Shows a share of the answered requests to somebody of the same user, while he asks for them: to compare a new version.

A document in the server's own folder says who: {"share": 0.1, "socket": PATH}, a datagram socket. Without the document
nothing is shown. Nothing is logged or kept, and nobody waits: what the listener cannot take is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from typing import Optional, Sequence, Tuple

from traceserve_runtime.tasks.contract import Answer, Request

VARIABLE = "TRACESERVE_MIRROR"  # in a worker's environment: the document's path


class Mirror:
    """Where requests are shown, if anywhere; it is looked up before each of them."""

    def __init__(self, path: Optional[str]) -> None:
        self._path = path
        self._changed = 0  # when the document was written last, as far as known, in nanoseconds
        self._share = 0.0
        self._address = ""
        self._random = random.Random()

    def show(self, served: Tuple[str, str], requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        """Show a share of a call's requests, and their answers by this name and version."""
        if self._path is None or not self._asked_for(self._path):
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            for request, answer in zip(requests, answers):
                if self._random.random() < self._share:
                    # It is full, gone, or this is too long for it.
                    with contextlib.suppress(OSError, ValueError, TypeError):
                        sender.sendto(_written(served, request, answer), self._address)

    def _asked_for(self, path: str) -> bool:
        try:
            changed = os.stat(path).st_mtime_ns
            if changed != self._changed:
                with open(path, encoding="utf-8") as file:
                    document = json.load(file)
                self._share, self._address = float(document["share"]), str(document["socket"])
                self._changed = changed
        except (OSError, ValueError, LookupError, TypeError):
            return False
        return True


def _written(served: Tuple[str, str], request: Request, answer: Answer) -> bytes:
    name, version = served
    shown = {
        "name": name,
        "version": version,
        "inputs": request.inputs,
        "parameters": request.parameters,
        "answer": answer.value,
    }
    return json.dumps(shown).encode("utf-8")
