"""uvicorn as a real host: a short text that comes during long requests is answered before they end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import psutil
import pytest
from conftest import run_export
from traceserve.archives.archive import pack_archive
from traceserve.building.gate.texts import VERY_LONG
from traceserve.serving.configuration import free_ports

LONG = [VERY_LONG[:400]] * 500  # seconds of work


class Web(NamedTuple):
    """The server: its port, and its process."""

    port: int
    process: psutil.Process

    def seconds(self) -> float:
        """Of processor time, since its start."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


def ask(port: int, body: Any, sent: Optional[threading.Semaphore] = None) -> Tuple[int, Any]:
    """The answer's status and document; `sent` is released once the whole request was sent."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("POST", "/predictions/wide", json.dumps(body), {"Content-Type": "application/json"})
        if sent is not None:
            sent.release()
        response = connection.getresponse()
        return response.status, json.loads(response.read())


@pytest.fixture(scope="module")
def web(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("web")
    wide = checkpoint("bert", hidden_size=128, num_hidden_layers=4, intermediate_size=512)
    run_export(folder / "wide", {"model_name": str(wide), "max_length": 128, "max_rows": 2048})
    archive = pack_archive(folder / "wide", "wide", folder)
    [free] = free_ports(1)
    command = [sys.executable, "-m", "traceserve_hosts.web", str(archive), "--port", str(free)]
    process = subprocess.Popen(command, env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")})
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                assert ask(free, {"text": "Yes."})[0] == 200
                break
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield Web(free, psutil.Process(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_a_short_text_comes_back_before_the_long_requests_that_were_there_first(web: Web) -> None:
    sent = threading.Semaphore(0)
    ended: List[str] = []
    found: List[Tuple[str, int, Any]] = []

    def send(name: str, body: Any) -> None:
        status, answer = ask(web.port, body, sent)
        ended.append(name)
        found.append((name, status, answer))

    long = [threading.Thread(target=send, args=("long", LONG)) for _ in range(2)]
    before = web.seconds()
    for each in long:
        each.start()
    for _ in long:
        assert sent.acquire(timeout=60)
    while web.seconds() < before + 0.5:  # they were read, and run; together they take several times as long
        assert not ended
        time.sleep(0.01)
    for _ in range(3):
        send("short", {"text": "Yes."})
    for each in long:
        each.join()
    assert ended == ["short"] * 3 + ["long"] * 2
    assert all(status == 200 for _, status, _ in found)
    assert all(len(answer) == len(LONG) for name, _, answer in found if name == "long")
