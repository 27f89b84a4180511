"""What the frontend sends, read as it arrives.

TorchServe's worker asks the socket for each number and each name of a message by itself, thirty times for a request. Here one
call takes what has come, and the pieces are cut from it.
"""

from __future__ import annotations

import logging
import sys
from select import select
from socket import socket
from typing import Callable, Optional

_MOST_AT_ONCE = 1 << 16  # bytes; longer pieces are read to their end and no further


# Seconds after an answer in which the frontend, where requests wait there, hands over the next ones.
_NOBODY_WAITS = 0.02


class Reader:
    """Called like TorchServe's own function that reads a piece of a message.

    `idle` is called once after each `answered`, where no message follows: then nobody waits for the worker.
    """

    def __init__(self, idle: Callable[[], None] = lambda: None) -> None:
        self._idle = idle
        self._answered = False
        self._connection: Optional[socket] = None
        self._received = bytearray()
        self._start = 0  # of what was not read yet

    def answered(self) -> None:
        """The worker has answered a message: what is read next is the beginning of another one."""
        self._answered = True

    def __call__(self, connection: socket, length: int) -> bytearray:
        """The next `length` bytes. The process ends where the frontend has closed the connection, as TorchServe's does."""
        if connection is not self._connection:
            self._connection, self._received, self._start = connection, bytearray(), 0
        start, end = self._start, self._start + length
        piece = self._received[start:end]
        self._start = end
        while len(piece) < length:
            missing = length - len(piece)
            if self._answered:
                self._answered = False
                if not select([connection], [], [], _NOBODY_WAITS)[0]:
                    self._idle()
            received = bytearray(connection.recv(max(missing, _MOST_AT_ONCE)))
            if not received:
                logging.info("the frontend has closed the connection")
                sys.exit(0)
            piece += received[:missing]
            self._received, self._start = received, missing
        return piece
