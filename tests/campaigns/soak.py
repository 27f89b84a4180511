"""A soak with texts of mixed lengths: memory and p99 at the end are those of the beginning, and every answer the first one.

    python -m campaigns.soak [--seconds 1800] [--connections 8] [--archive NAME.mar]

The time is cut into windows. Memory is the worker's private one (USS), since the page cache's share depends on others.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from typing import List, NamedTuple, Sequence

import psutil
from traceserve.measuring.answers import Consistency
from traceserve.measuring.load_generator import Endpoint, send_load
from traceserve.serving.instances import Instance
from workers import worker_pids

from campaigns.aims import Aim, archive_of, main_of, none_of, serving

WORDS = (
    "the",
    "parcel",
    "came",
    "late",
    "and",
    "my",
    "order",
    "is",
    "not",
    "what",
    "I",
    "asked",
    "for",
    "last",
    "week",
)
_WINDOWS = 15
_BODIES = 400


class Window(NamedTuple):
    """What one part of the time showed."""

    requests: int
    failed: int
    p99: float  # seconds
    memory: int  # bytes


def bodies(seed: int = 0, most: int = 120) -> List[bytes]:
    """Texts of 1 word to `most`, short ones more often; every tenth request a list."""
    noise = random.Random(seed)

    def text() -> str:
        return " ".join(noise.choices(WORDS, k=min(most, 1 + int(noise.expovariate(1 / 20)))))

    return [
        json.dumps([text() for _ in range(8)] if i % 10 == 0 else {"text": text()}).encode() for i in range(_BODIES)
    ]


def campaign(options: argparse.Namespace, folder: Path) -> Sequence[Aim]:
    """Serve, send, compare the last third with the first."""
    with serving(archive_of(options, folder)) as instance:
        return soak(instance, options.seconds, options.connections)


def soak(instance: Instance, seconds: float, connections: int, parts: int = _WINDOWS) -> Sequence[Aim]:
    """Send so long; before that, a part that is not counted."""
    [worker] = worker_pids(instance)
    process, same = psutil.Process(worker), Consistency()
    target, sent = Endpoint(f"{instance.url}/predictions/{instance.names[0]}"), bodies()
    send_load(target, sent, connections=connections, seconds=seconds / parts, warm_up=0.5, check=same)
    windows = []
    for _ in range(parts):
        found = send_load(target, sent, connections=connections, seconds=seconds / parts, warm_up=0.0, check=same)
        windows.append(Window(found.requests, found.failed, found.percentile(99), process.memory_full_info().uss))
    return aims_of(windows, worker_pids(instance) == [worker])


def aims_of(windows: Sequence[Window], same_worker: bool) -> Sequence[Aim]:
    """Compare the last third with the first."""
    third = max(1, len(windows) // 3)
    first, last = windows[:third], windows[-third:]
    requests = sum(window.requests + window.failed for window in windows)
    growth = statistics.median(w.memory for w in last) / statistics.median(w.memory for w in first) - 1
    drift = statistics.median(w.p99 for w in last) / statistics.median(w.p99 for w in first) - 1
    memory, p99 = windows[-1].memory / 1e6, windows[-1].p99 * 1000
    return [
        none_of("failed, or with another answer than the first", sum(window.failed for window in windows), requests),
        Aim(
            "growth of the worker's memory",
            "2 %",
            f"{growth:+.1%} ({memory:.0f} MB at the end)",
            growth < 0.02,
            of_machine=True,
        ),
        Aim("drift of p99", "10 %", f"{drift:+.1%} ({p99:.0f} ms at the end)", drift < 0.10, of_machine=True),
        Aim("the same worker", "yes", "yes" if same_worker else "no", same_worker),
    ]


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=1800, help="of load [%(default)s]")
    parser.add_argument("--connections", type=int, default=8, help="in a closed loop [%(default)s]")


if __name__ == "__main__":
    sys.exit(main_of(campaign, __doc__, options_of))
