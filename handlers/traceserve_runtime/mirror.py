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
from typing import List, Optional, Sequence, Tuple

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
        chosen = [pair for pair in zip(requests, answers) if self._random.random() < self._share]
        if not chosen:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            try:
                sender.connect(self._address)
            except (ConnectionRefusedError, FileNotFoundError):
                self._share = 0.0  # its process was killed; until somebody writes another document
                return
            longest = sender.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            for request, answer in chosen:
                with contextlib.suppress(OSError, ValueError, TypeError):  # it is full, or this is too long for it
                    sender.send(_written(served, request, answer, longest))

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


def _written(served: Tuple[str, str], request: Request, answer: Answer, longest: int) -> bytes:
    """The datagram; raises ValueError for one of more bytes, before all of it is written: token vectors take seconds."""
    name, version = served
    shown = {
        "name": name,
        "version": version,
        "inputs": request.inputs,
        "parameters": request.parameters,
        "answer": answer.value,
    }
    pieces: List[str] = []
    size = 0
    for piece in json.JSONEncoder().iterencode(shown):
        size += len(piece)
        if size > longest:
            raise ValueError(f"this is longer than {longest} bytes")
        pieces.append(piece)
    return "".join(pieces).encode("utf-8")
