"""What a worker shows of its answered requests, and that it waits for nobody."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from traceserve_runtime.mirror import Mirror
from traceserve_runtime.tasks.contract import Answer, Request

REQUESTS = [Request({"text": f"text {number}"}, {"top_k": 2}) for number in range(400)]
ANSWERS = [Answer([{"label": "red", "score": number / 400}]) for number in range(400)]
SERVED = ("intents", "1.0")


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "m.sock"))
        listener.settimeout(0)
        yield listener


def ask_for(folder: Path, share: float, when: int = 1) -> None:
    path = folder / "mirror.json"
    path.write_text(json.dumps({"share": share, "socket": str(folder / "m.sock")}))
    os.utime(path, ns=(when, when))


def shown(listener: socket.socket) -> List[dict]:
    found = []
    while True:
        try:
            found.append(json.loads(listener.recv(1 << 20)))
        except BlockingIOError:
            return found


def test_a_share_is_shown_while_it_is_asked_for(listener: socket.socket, tmp_path: Path) -> None:
    mirror = Mirror(str(tmp_path / "mirror.json"))
    seen = []

    def show() -> int:
        for request, answer in zip(REQUESTS, ANSWERS):
            mirror.show(SERVED, [request], [answer])
            seen.extend(shown(listener))
        count = len(seen)
        seen.clear()
        return count

    assert show() == 0
    ask_for(tmp_path, 0.25)
    assert show() == pytest.approx(100, abs=50)
    ask_for(tmp_path, 1.0, when=2)
    assert show() == 400
    (tmp_path / "mirror.json").unlink()
    assert show() == 0


def test_a_request_with_its_answer(listener: socket.socket, tmp_path: Path) -> None:
    ask_for(tmp_path, 1.0)
    Mirror(str(tmp_path / "mirror.json")).show(SERVED, REQUESTS[:2], ANSWERS[:2])
    [one, two] = shown(listener)
    assert one == {
        "name": "intents",
        "version": "1.0",
        "inputs": {"text": "text 0"},
        "parameters": {"top_k": 2},
        "answer": [{"label": "red", "score": 0.0}],
    }
    assert two["inputs"] == {"text": "text 1"}


def test_nobody_waits_for_a_listener(listener: socket.socket, tmp_path: Path) -> None:
    """Neither for one that reads nothing, nor for one that has gone, nor for a text that no datagram holds."""
    ask_for(tmp_path, 1.0)
    mirror = Mirror(str(tmp_path / "mirror.json"))
    started = time.monotonic()
    for _ in range(20):
        mirror.show(SERVED, REQUESTS, ANSWERS)
    mirror.show(SERVED, [Request({"text": "x" * 10_000_000})], ANSWERS[:1])
    assert 0 < len(shown(listener)) < 20 * len(REQUESTS)
    mirror.show(SERVED, REQUESTS[:1], ANSWERS[:1])
    assert len(shown(listener)) == 1
    listener.close()
    mirror.show(SERVED, REQUESTS[:1], ANSWERS[:1])
    assert time.monotonic() - started < 5


def test_a_listener_that_was_killed_is_asked_for_no_longer(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its document and its socket's file stay; until another document is written."""
    ask_for(tmp_path, 1.0)
    listener.close()
    mirror = Mirror(str(tmp_path / "mirror.json"))
    with monkeypatch.context() as patch:
        patch.setattr("traceserve_runtime.mirror._written", None)
        mirror.show(SERVED, REQUESTS[:1], ANSWERS[:1])
        patch.setattr(socket, "socket", None)
        mirror.show(SERVED, REQUESTS[:1], ANSWERS[:1])
    (tmp_path / "m.sock").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as another:
        another.bind(str(tmp_path / "m.sock"))
        another.settimeout(0)
        ask_for(tmp_path, 1.0, when=2)
        mirror.show(SERVED, REQUESTS[:1], ANSWERS[:1])
        assert len(shown(another)) == 1


def test_of_what_no_datagram_holds_little_is_written(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for(tmp_path, 1.0)
    written: List[int] = []
    pieces = json.JSONEncoder.iterencode

    def counted(*arguments: Any) -> Iterator[str]:
        for piece in pieces(*arguments):
            written.append(len(piece))
            yield piece

    monkeypatch.setattr(json.JSONEncoder, "iterencode", counted)
    vectors = Answer([[0.123456789] * 384 for _ in range(1000)])
    Mirror(str(tmp_path / "mirror.json")).show(SERVED, REQUESTS[:2], [vectors, ANSWERS[0]])
    assert [each["inputs"] for each in shown(listener)] == [{"text": "text 1"}]
    assert 0 < sum(written) < 1_000_000  # of 4,600,000


def test_a_worker_without_descriptors_answers(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*arguments: object) -> None:
        raise OSError(24, "Too many open files")

    ask_for(tmp_path, 1.0)
    mirror = Mirror(str(tmp_path / "mirror.json"))
    monkeypatch.setattr(socket, "socket", none_left)
    mirror.show(SERVED, REQUESTS[:1], ANSWERS[:1])
    assert shown(listener) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"share": 1}', '{"share": "all", "socket": ""}'])
def test_a_damaged_document_asks_for_nothing(listener: socket.socket, tmp_path: Path, content: str) -> None:
    (tmp_path / "mirror.json").write_text(content)
    Mirror(str(tmp_path / "mirror.json")).show(SERVED, REQUESTS[:1], ANSWERS[:1])
    assert shown(listener) == []
