"""Hostile requests over every protocol: each is answered, nobody else notices, and the worker neither fails nor grows.

    python -m campaigns.hostile [--requests 100000] [--connections 8] [--archive NAME.mar] [--seed 0]

Each request begins as a legal one of a protocol and is then damaged: bits, cuts, repetitions, deep nesting, and values of the
wrong kind or size anywhere in its JSON; under any content type, and over gRPC too. A good client asks all the time, and compares
each answer with its first one.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import grpc
import psutil
import torchserve_grpc
from traceserve.measuring.answers import Consistency
from traceserve.serving.instances import Instance
from workers import worker_pids

from campaigns.aims import Aim, archive_of, main_of, none_of, serving
from campaigns.replies import FORM, MULTIPART, Reply

TEXT = "Where is my order? It should have come last week."
TENSOR = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}
# Behind /predictions/NAME/VERSION/, except where the path begins with a slash.
SEEDS: Sequence[Tuple[str, object]] = (
    ("", {"text": TEXT, "parameters": {"top_k": 2, "long_inputs": "window"}}),
    ("", [TEXT, {"text": TEXT}]),
    ("", {"inputs": TEXT, "parameters": {"top_k": 2}}),
    ("", {"instances": [TEXT, {"text": TEXT}]}),
    ("/v1/models/{name}:predict", {"instances": [TEXT]}),
    ("/v2/models/{name}/infer", {"id": "a", "inputs": [TENSOR], "outputs": [{"name": "answer"}]}),
    ("/explanations/{name}", {"text": TEXT}),
    ("v1/embeddings", {"input": [TEXT], "model": "m", "encoding_format": "base64"}),
    ("v1/completions", {"prompt": TEXT, "max_tokens": 3, "stream": True}),
    ("v1/chat/completions", {"messages": [{"role": "user", "content": TEXT}], "n": 1}),
    ("v1/rerank", {"query": TEXT, "documents": [TEXT, TEXT], "top_n": 1}),
    ("v1/classify", {"input": [TEXT]}),
    ("predict", {"inputs": [TEXT], "raw_scores": True}),
    ("embed", {"inputs": [TEXT], "normalize": True}),
    ("similarity", {"inputs": {"source_sentence": TEXT, "sentences": [TEXT]}}),
    ("openapi.json", None),
    ("v2", None),
)
TYPES = (
    *("application/json",) * 12,
    *("text/plain", "text/csv", "application/jsonlines", "application/octet-stream", "", "a/b; charset=utf-16"),
    *(FORM, f"{MULTIPART}; boundary=b"),
)
VALUES: Sequence[object] = (
    *(None, True, -1, 0, 1e308, 2**63, 10**400, "", "\0", "\ud800", "x" * 5000, [], {}, [[]], [None], {"": {}}),
    *({"text": TEXT}, [TEXT] * 300, {str(i): i for i in range(300)}, float("nan"), "漢" * 2000, "ﷺ" * 500, "‮‏́" * 500),
)
_REFUSED = ("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED")  # over gRPC, of the frontend's own
_LATE = ("DEADLINE_EXCEEDED", "UNAVAILABLE")
_SECONDS = 60.0  # in which any answer has to come


def _changed(value: Any, noise: random.Random) -> Any:
    """The value with one part, at any depth, exchanged for a hostile one; or nested."""
    if isinstance(value, dict) and value and noise.random() < 0.8:
        key = noise.choice(list(value))
        if noise.random() < 0.15:
            return {**{k: v for k, v in value.items() if k != key}, noise.choice(["", "inputs", "x" * 300]): value[key]}
        return {**value, key: _changed(value[key], noise)}
    if isinstance(value, list) and value and noise.random() < 0.8:
        i = noise.randrange(len(value))
        return [*value[:i], _changed(value[i], noise), *value[i + 1 :]]
    if noise.random() < 0.1:
        return [value] * noise.choice([2, 40, 400])
    return noise.choice(VALUES)


def hostile_body(seed: object, noise: random.Random) -> bytes:
    """A damaged request."""
    kind = noise.random()
    if kind < 0.05:
        return noise.choice(
            [b"", b"[" * 20_000, b'{"a":' * 5000, b"\xff\xfe" * 50, noise.randbytes(noise.randrange(2000))]
        )
    content = json.dumps(_changed(seed, noise) if kind < 0.7 else seed).encode("utf-8", "surrogatepass")
    if kind > 0.6 and content:
        for _ in range(noise.randrange(1, 4)):
            at = noise.randrange(len(content))
            part = content[at : at + noise.randrange(40)]
            content = noise.choice(
                (
                    content[:at] + bytes([noise.randrange(256)]) + content[at + 1 :],
                    content[:at] + b"%zz=" + content[at:],  # an invalid escape, in a form
                    content[:at] or b" ",
                    content[:at] + part * noise.randrange(1, 30) + content[at:],
                )
            )
    return content


class Tally:
    """What came back; shared by the threads."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.slowest = 0.0
        self.failures: List[str] = []
        self._lock = threading.Lock()

    def add(self, status: str, seconds: float, failure: str = "") -> None:
        with self._lock:
            self.statuses[status] += 1
            self.slowest = max(self.slowest, seconds)
            if failure:
                self.failures.append(failure)


def send_hostile(instance: Instance, count: int, seed: int, tally: Tally) -> None:
    """Send so many over one connection after the other."""
    noise, name = random.Random(seed), instance.names[0]
    task = instance.manifest(name).task
    connection = http.client.HTTPConnection("127.0.0.1", instance.port, timeout=_SECONDS)
    for _ in range(count):
        path, legal = noise.choice(SEEDS)
        whole = (
            path.format(name=name) if path.startswith("/") else f"/predictions/{name}{'/1.0/' if path else ''}{path}"
        )
        body, method = hostile_body(legal, noise), "GET" if legal is None else "POST"
        content_type = noise.choice(TYPES)
        began, status, failure = time.perf_counter(), "no answer", ""
        try:
            connection.request(method, whole, body, {"Content-Type": content_type} if content_type else {})
            response = connection.getresponse()
            reply = Reply(whole, content_type, response.status, response.read())
            status = f"{reply.whose}: {reply.status}"
            if reply.is_failure(task):
                status = f"failed: {status}"
                failure = f"{status} to {whole} {content_type} {body[:200]!r}: {reply.body[:200]!r}"
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            failure = f"{type(error).__name__} after {time.perf_counter() - began:.1f} s to {whole} {content_type} {body[:200]!r}"
        tally.add(status, time.perf_counter() - began, failure)
    connection.close()


def send_hostile_grpc(instance: Instance, count: int, seed: int, tally: Tally) -> None:
    """Send so many over gRPC: predictions, streams, and V2's calls."""
    lines = Path(instance.folder, "config.properties").read_text(encoding="utf-8").splitlines()
    port = int(dict(line.split("=", 1) for line in lines)["grpc_inference_port"])
    caller, noise, name = torchserve_grpc.Client(port), random.Random(seed), instance.names[0]
    for _ in range(count):
        _, legal = noise.choice(SEEDS)
        body = hostile_body(legal, noise)
        part = {noise.choice(["data", "body", "text", "", "x" * 50]): body}
        tensor = {
            "name": "text",
            "datatype": noise.choice(["BYTES", "FP32", ""]),
            "shape": [noise.choice([1, 0, -1, 2**40])],
        }
        calls = (
            partial(caller.predictions, name, part, _SECONDS),
            partial(caller.stream_predictions, name, part, _SECONDS),
            partial(caller.model_infer, name, [tensor], raw_input_contents=[body]),
        )
        began = time.perf_counter()
        try:
            noise.choice(calls)()
            tally.add("grpc: OK", time.perf_counter() - began)
        except grpc.RpcError as error:
            code = error.code().name
            refused = code in _REFUSED
            status = f"{'' if refused or code in _LATE else 'failed: '}grpc: {code}"
            failure = "" if refused else f"{status} {body[:200]!r}: {str(error.details())[:200]}"
            tally.add(status, time.perf_counter() - began, failure)
    caller.close()


@contextlib.contextmanager
def good_client(instance: Instance) -> Iterator[Dict[str, float]]:
    """Someone who asks all the time: how many answers, how many wrong or missing, and the longest wait."""
    seen: Dict[str, float] = {"answers": 0, "wrong": 0, "slowest": 0.0}
    same, over = Consistency(), threading.Event()
    body = json.dumps({"text": TEXT}).encode()

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", instance.port, timeout=_SECONDS)
        while not over.is_set():
            began = time.perf_counter()
            try:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", f"/predictions/{instance.names[0]}", body, headers)
                response = connection.getresponse()
                fine = same(body, response.read()) and response.status == 200
            except (OSError, http.client.HTTPException):
                connection.close()
                fine = False
            seen["answers"] += 1
            seen["wrong"] += not fine
            seen["slowest"] = max(seen["slowest"], time.perf_counter() - began)
            over.wait(0.02)
        connection.close()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def attack(instance: Instance, requests: int, connections: int, seed: int) -> Sequence[Aim]:
    """Send hostile requests to a server; the aims."""
    tally, [worker] = Tally(), worker_pids(instance)
    _send_all(instance, max(requests // 10, 20), connections, seed + 1_000_000, Tally())  # it has seen the largest once
    before = psutil.Process(worker).memory_info().rss
    began = time.monotonic()
    with good_client(instance) as good:
        _send_all(instance, requests, connections, seed, tally)
    seconds = time.monotonic() - began
    after = psutil.Process(worker).memory_info().rss if worker_pids(instance) == [worker] else 0
    for line in tally.failures[:20]:
        print(line)
    total, fives = sum(tally.statuses.values()), Counter(tally.statuses)
    failed = sum(n for status, n in fives.items() if status.startswith("failed: "))
    of_frontend = sum(n for status, n in fives.items() if status.startswith("frontend: 5"))
    late = sum(n for status, n in fives.items() if status in ("no answer", *(f"grpc: {code}" for code in _LATE)))
    growth = (after - before) / 1e6
    return [
        Aim("sent", f"{requests:,}", f"{total:,} in {seconds:.0f} s", total >= requests),
        none_of("5xx, except those of docs/frontend.md and of explanations without time", failed, total),
        Aim("5xx of TorchServe's frontend for unreadable forms (docs/frontend.md)", "-", f"{of_frontend:,}", True),
        none_of("without an answer", late, total),
        Aim("the same worker", "yes", "yes" if after else "no", bool(after)),
        Aim(
            "its memory after a tenth more",
            "grew by less than 64 MB",
            f"{growth:+.0f} MB",
            growth < 64,
            of_machine=True,
        ),
        none_of("answers to the good client wrong or missing", int(good["wrong"]), int(good["answers"])),
        Aim("its longest wait", "10 s", f"{good['slowest']:.1f} s", good["slowest"] < 10, of_machine=True),
        Aim("the longest wait of all", "-", f"{tally.slowest:.1f} s", True),
        Aim("answers by status", "-", ", ".join(f"{status}: {n:,}" for status, n in fives.most_common(12)), True),
    ]


def _send_all(instance: Instance, requests: int, connections: int, seed: int, tally: Tally) -> None:
    over_grpc = requests // 20
    share = -(-(requests - over_grpc) // connections)
    threads = [
        threading.Thread(target=send_hostile, args=(instance, share, seed + i, tally)) for i in range(connections)
    ]
    threads.append(threading.Thread(target=send_hostile_grpc, args=(instance, over_grpc, seed - 1, tally)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def campaign(options: argparse.Namespace, folder: Path) -> Sequence[Aim]:
    """Serve, attack, look."""
    with serving(archive_of(options, folder)) as instance:
        return attack(instance, options.requests, options.connections, options.seed)


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=100_000, help="hostile ones [%(default)s]")
    parser.add_argument("--connections", type=int, default=8, help="that send them [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="other damages for another number [%(default)s]")


if __name__ == "__main__":
    sys.exit(main_of(campaign, __doc__, options_of))
