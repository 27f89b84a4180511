"""Slow and rude clients: nobody else waits for them, nothing of them stays open, and a full queue is told at once.

    python -m campaigns.slow [--clients 100] [--seconds 20] [--archive NAME.mar]

Some send a byte at a time, some half a body, some hang up after their request; then more ask than the queue holds.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from traceserve.serving.instances import Instance
from workers import worker_pids

from campaigns.aims import Aim, archive_of, main_of, none_of, serving
from campaigns.hostile import good_client

QUEUE = 2
_LONG = json.dumps(["word " * 10] * 32).encode()


def _request(instance: Instance, body: bytes) -> bytes:
    head = f"POST /predictions/{instance.names[0]} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def drip(instance: Instance, seconds: float) -> None:
    """Send a request byte by byte, and never its end."""
    ends = time.monotonic() + seconds
    with socket.create_connection(("127.0.0.1", instance.port), 10) as connection, contextlib.suppress(OSError):
        for byte in _request(instance, _LONG):
            if time.monotonic() > ends:
                return
            connection.send(bytes([byte]))
            time.sleep(0.2)


def half(instance: Instance, seconds: float) -> None:
    """Send half a body, wait, and go; again and again."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with socket.create_connection(("127.0.0.1", instance.port), 10) as connection, contextlib.suppress(OSError):
            connection.sendall(_request(instance, _LONG)[: -len(_LONG) // 2])
            time.sleep(0.5)


def hang_up(instance: Instance, seconds: float) -> None:
    """Send a request, and go before its answer; again and again."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with socket.create_connection(("127.0.0.1", instance.port), 10) as connection, contextlib.suppress(OSError):
            connection.sendall(_request(instance, b'{"text": "I will not wait."}'))
        time.sleep(0.2)


KINDS = {"a byte at a time": drip, "half a body": half, "hanging up": hang_up}


def open_files(instance: Instance) -> int:
    process = instance.process
    return process.num_fds() if process is not None else 0


def ask_once(instance: Instance, body: bytes) -> Tuple[int, float, Dict[str, str]]:
    """Return the status, the seconds and the headers of one request; status 0 without an answer."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", instance.port, timeout=60)
    try:
        connection.request("POST", f"/predictions/{instance.names[0]}", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status, time.monotonic() - began, {k.lower(): v for k, v in response.getheaders()}
    except (OSError, http.client.HTTPException):
        return 0, time.monotonic() - began, {}
    finally:
        connection.close()


def bother(instance: Instance, clients: int, seconds: float) -> Sequence[Aim]:
    """Let them bother a server, one kind after the other."""
    [worker] = worker_pids(instance)
    ask_once(instance, b'"Yes."')
    before, found = open_files(instance), []
    for name, kind in KINDS.items():
        with good_client(instance) as good, ThreadPoolExecutor(clients) as pool:
            for each in [pool.submit(kind, instance, seconds) for _ in range(clients)]:
                each.result()
        answers = int(good["answers"])
        found.append(
            none_of(f"{name}, {clients} clients: a good client's answers wrong or missing", int(good["wrong"]), answers)
        )
        found.append(Aim("its longest wait", "5 s", f"{good['slowest']:.2f} s", good["slowest"] < 5, of_machine=True))
    deadline = time.monotonic() + 20
    while open_files(instance) > before + 10 and time.monotonic() < deadline:
        time.sleep(0.5)
    left = open_files(instance) - before
    return [
        *found,
        Aim("connections that stay open", "10 or fewer", str(max(0, left)), left <= 10),
        Aim(
            "the same worker",
            "yes",
            "yes" if worker_pids(instance) == [worker] else "no",
            worker_pids(instance) == [worker],
        ),
    ]


def overflow(instance: Instance, clients: int) -> Sequence[Aim]:
    """Ask more than the queue holds."""
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda _: ask_once(instance, _LONG), range(4 * clients)))
    statuses = Counter(status for status, *_ in answers)
    refused: List[float] = sorted(seconds for status, seconds, _ in answers if status == 503)
    retry = sorted({headers.get("retry-after", "none") for status, _, headers in answers if status == 503})
    slowest = refused[-1] if refused else 0.0
    after = ask_once(instance, b'"Yes."')[0]
    return [
        Aim(
            f"a queue of {QUEUE}, {clients} clients: statuses",
            "200 and 503",
            f"{dict(statuses)}",
            set(statuses) == {200, 503},
        ),
        Aim("the slowest refusal", "2 s", f"{slowest:.2f} s", slowest < 2, of_machine=True),
        Aim("Retry-After of TorchServe's 503", "none (docs/frontend.md)", ", ".join(retry) or "-", retry == ["none"]),
        Aim("answered afterwards", "200", str(after), after == 200),
    ]


def campaign(options: argparse.Namespace, folder: Path) -> Sequence[Aim]:
    """Serve with a short queue, and let them come."""
    archive = archive_of(options, folder)
    with serving(archive) as instance:
        found = bother(instance, options.clients, options.seconds)
    with serving(archive, QUEUE) as instance:
        return [*found, *overflow(instance, 24)]


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, default=100, help="of each kind [%(default)s]")
    parser.add_argument("--seconds", type=float, default=20, help="for each kind [%(default)s]")


if __name__ == "__main__":
    sys.exit(main_of(campaign, __doc__, options_of))
