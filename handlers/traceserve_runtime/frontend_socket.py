"""Buffered reading of the frontend's messages.

TorchServe's worker reads each number and name of a message from the socket separately, thirty times per request. Here one
call reads all available bytes, and the pieces are cut from them. No other file uses a private name of TorchServe.
"""

from __future__ import annotations

import inspect
import logging
import sys
from select import select
from socket import socket
from typing import Any, Callable, Optional

_MOST_AT_ONCE = 1 << 16  # bytes; longer pieces are read exactly to their end


# Seconds after an answer in which a frontend with waiting requests sends the next ones.
_NOBODY_WAITS = 0.02


def read_at_once(codec: Any, idle: Callable[[], None]) -> Optional[SocketReader]:
    """Let TorchServe's codec read each message in a few calls, and call `idle` when no client waits; returns the
    reader.

    `_retrieve_buffer` is a private name of `ts.protocol.otf_message_handler`, from TorchServe 0.8 to 0.12, its last
    version. If it is missing or takes other arguments, the worker reads like TorchServe, measures nothing while idle,
    and None is returned.
    """
    own = getattr(codec, "_retrieve_buffer", None)
    try:
        inspect.signature(own).bind("connection", 4)  # type: ignore[arg-type]
    except TypeError:  # missing, or with other arguments
        return None
    reader = SocketReader(idle)
    codec._retrieve_buffer = reader
    return reader


class SocketReader:
    """A replacement for TorchServe's function that reads a piece of a message.

    `idle` is called once after each `answered` if no message follows, since then nobody waits for the worker.
    """

    def __init__(self, idle: Callable[[], None] = lambda: None) -> None:
        self._idle = idle
        self._answered = False
        self._connection: Optional[socket] = None
        self._received = bytearray()
        self._start = 0  # of the unread bytes

    def answered(self) -> None:
        """Record that the worker answered a message: the next read begins another one."""
        self._answered = True

    def __call__(self, connection: socket, length: int) -> bytearray:
        """Return the next `length` bytes. Like TorchServe's, it ends the process if the frontend closed the
        connection."""
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
