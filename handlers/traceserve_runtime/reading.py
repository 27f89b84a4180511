"""What the frontend sends, read as it arrives.

TorchServe's worker asks the socket for each number and each name of a message by itself, thirty times for a request. Here one
call takes what has come, and the pieces are cut from it.
"""

from __future__ import annotations

import logging
import sys
from socket import socket
from typing import Optional

_MOST_AT_ONCE = 1 << 16  # bytes; longer pieces are read to their end and no further


class Reader:
    """Called like TorchServe's own function that reads a piece of a message."""

    def __init__(self) -> None:
        self._connection: Optional[socket] = None
        self._received = bytearray()
        self._start = 0  # of what was not read yet

    def __call__(self, connection: socket, length: int) -> bytearray:
        """The next `length` bytes. The process ends where the frontend has closed the connection, as TorchServe's does."""
        if connection is not self._connection:
            self._connection, self._received, self._start = connection, bytearray(), 0
        start, end = self._start, self._start + length
        piece = self._received[start:end]
        self._start = end
        while len(piece) < length:
            missing = length - len(piece)
            received = bytearray(connection.recv(max(missing, _MOST_AT_ONCE)))
            if not received:
                logging.info("the frontend has closed the connection")
                sys.exit(0)
            piece += received[:missing]
            self._received, self._start = received, missing
        return piece
