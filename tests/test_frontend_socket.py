"""The frontend's messages, read as they arrive, with TorchServe's own codec."""

from __future__ import annotations

import importlib.util
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traceserve_runtime.frontend_socket import SocketReader, read_at_once

codec = pytest.importorskip("ts.protocol.otf_message_handler")


class Connection:
    """Returns sent data in the pieces in which it arrives, and counts calls."""

    def __init__(self, *arriving: bytes) -> None:
        self.arriving = list(arriving)
        self.asked = 0

    def recv(self, most: int) -> bytes:
        self.asked += 1
        if not self.arriving:
            return b""
        piece = self.arriving.pop(0)
        if len(piece) > most:
            self.arriving.insert(0, piece[most:])
        return piece[:most]


def text(value: bytes) -> bytes:
    return struct.pack("!i", len(value)) + value


def message(bodies: Sequence[bytes]) -> bytes:
    """Return a batch as sent by the frontend; each request has two headers."""
    end = struct.pack("!i", -1)
    sent = b"I"
    for number, body in enumerate(bodies):
        headers = b"".join(text(each) for each in (b"host", b"localhost", b"content-type", b"application/json"))
        sent += text(str(number).encode()) + headers + end
        sent += text(b"body") + text(b"application/octet-stream") + text(body) + end
    return sent + end


@pytest.fixture()
def reading_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(codec, "_retrieve_buffer", codec._retrieve_buffer)  # put back after the test
    assert read_at_once(codec, lambda: None) is codec._retrieve_buffer
    assert isinstance(codec._retrieve_buffer, SocketReader)
    yield


def bodies_of(batch: List[Dict[str, Any]]) -> List[bytes]:
    return [bytes(request["parameters"][0]["value"]) for request in batch]


def test_a_message_is_read_in_one_call(reading_at_once: None) -> None:
    bodies = [b'{"text": "%d"}' % number for number in range(20)]
    connection = Connection(message(bodies))
    kind, batch = codec.retrieve_msg(connection)
    assert kind == b"I" and bodies_of(batch) == bodies and connection.asked == 1
    assert [bytes(request["requestId"]) for request in batch] == [str(number).encode() for number in range(20)]
    assert {bytes(header["name"]): bytes(header["value"]) for header in batch[3]["headers"]} == {
        b"host": b"localhost",
        b"content-type": b"application/json",
    }


def test_it_reads_what_torchserve_reads(reading_at_once: None) -> None:
    sent = message([b"one", b"", b"\x00\xff" * 100_000])
    own = importlib.util.module_from_spec(codec.__spec__)  # a worker in this process may have patched the loaded one
    codec.__spec__.loader.exec_module(own)
    assert not isinstance(own._retrieve_buffer, SocketReader)
    assert codec.retrieve_msg(Connection(sent)) == own.retrieve_msg(Connection(sent))


def test_over_a_socket(reading_at_once: None) -> None:
    """Several consecutive messages for one worker; the second connection is another worker's."""
    for _ in range(2):
        frontend, worker = socket.socketpair()
        with frontend, worker, ThreadPoolExecutor(1) as sender:  # a socket's buffer is smaller than the second message
            worker.settimeout(20)
            for bodies in ([b"first"], [b"x" * 150_000, b"second"], [b"third"]):
                sending = sender.submit(frontend.sendall, message(bodies))
                assert bodies_of(codec.retrieve_msg(worker)[1]) == bodies
                sending.result()


@settings(deadline=None, max_examples=200, database=None)
@given(st.lists(st.binary(max_size=40), min_size=1), st.lists(st.integers(1, 30), max_size=60))
def test_pieces_of_any_size_that_arrive_in_any_way(pieces: List[bytes], arriving: List[int]) -> None:
    sent, parts = b"".join(pieces), []
    for size in arriving:
        parts.append(sent[:size])
        sent = sent[size:]
    connection: Any = Connection(*(part for part in (*parts, sent) if part))
    read = SocketReader()
    for piece in pieces:
        assert read(connection, len(piece)) == bytearray(piece)


def test_a_long_piece_is_not_read_past_its_end() -> None:
    """Otherwise the following data would be copied repeatedly."""
    connection: Any = Connection(b"x" * 10, b"y" * 200_000, b"next")
    read = SocketReader()
    assert read(connection, 150_010) == b"x" * 10 + b"y" * 150_000
    assert read(connection, 50_000) == b"y" * 50_000 and read(connection, 4) == b"next"


@pytest.mark.parametrize("arrived", [(), (b"ab",)])
def test_the_process_ends_with_the_frontend(arrived: Tuple[bytes, ...]) -> None:
    connection: Any = Connection(*arrived)
    with pytest.raises(SystemExit) as ended:
        SocketReader()(connection, 4)
    assert ended.value.code == 0


def test_another_connection_begins_anew() -> None:
    one: Any = Connection(b"abcdef")
    other: Any = Connection(b"xyz")
    read = SocketReader()
    assert read(one, 2) == b"ab" and read(other, 3) == b"xyz"


def test_a_torchserve_that_reads_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_retrieve_buffer", lambda connection, length, timeout: b"")
    own = codec._retrieve_buffer
    assert read_at_once(codec, lambda: None) is None and codec._retrieve_buffer is own
    monkeypatch.delattr(codec, "_retrieve_buffer")
    assert read_at_once(codec, lambda: None) is None and not hasattr(codec, "_retrieve_buffer")
    assert read_at_once(None, lambda: None) is None  # another host's worker


def test_idle_is_when_nothing_follows_an_answer() -> None:
    """Not within a message that arrives in parts, nor if the next one has come, nor twice."""
    calls: List[int] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = SocketReader(lambda: (calls.append(1), theirs.sendall(b"next"))[0])
        theirs.sendall(b"I")
        assert bytes(reader(ours, 1)) == b"I"
        assert not calls  # nothing was answered yet
        theirs.sendall(b"part")
        reader.answered()
        assert bytes(reader(ours, 4)) == b"part"
        assert not calls  # somebody waited
        reader.answered()
        assert bytes(reader(ours, 4)) == b"next"
        assert calls == [1]
        theirs.sendall(b"pa")
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(lambda: (time.sleep(0.1), theirs.sendall(b"rt")))
            assert bytes(reader(ours, 4)) == b"part"
            late.result()
        assert calls == [1]
