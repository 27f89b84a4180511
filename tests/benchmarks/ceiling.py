"""Measures the ceilings of the load generator, and of TorchServe without a model: no server measurement can exceed
them.

    python tests/benchmarks/ceiling.py [--connections 16,64] [--seconds 3] [--rounds 3]

First a server in its own process answers every request with the same bytes: its ceiling is the generator's.
Then TorchServe, configured as in `traceserve serve`, serves an archive made here whose handler answers {} to every
item. The generator's share of a core is reported, and the requests that a whole core of it would send.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import psutil
import servers
import tables
from traceserve.archives.model_config import Serving
from traceserve.measuring import load_generator
from traceserve.serving import configuration, java, server

# TorchServe's headers, for answers of the same size.
_ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nx-request-id: 5f1ebc09-3d09-4d2c-8f2b-5d4c2a0e6b7f\r\n"
    b"Pragma: no-cache\r\nCache-Control: no-cache; no-store, must-revalidate, private\r\n"
    b"Expires: Thu, 01 Jan 1970 00:00:00 UTC\r\ncontent-length: 2\r\nconnection: keep-alive\r\n\r\n{}"
)
_HANDLER = """
def handle(rows, context):
    return [b"{}"] * len(rows or [])
"""
_BODIES = [servers.text_field(f"{servers.SENTENCE} {number}") for number in range(100)]


class _Fixed(asyncio.Protocol):
    """Answers anything; each request arrives whole."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(_ANSWER)


def _serve_fixed(pipe: Connection) -> None:
    async def serve() -> None:
        listening = await asyncio.get_running_loop().create_server(_Fixed, "127.0.0.1", 0)
        pipe.send(listening.sockets[0].getsockname()[1])
        await listening.serve_forever()

    asyncio.run(serve())


@contextlib.contextmanager
def fixed() -> Iterator[str]:
    """Yield the URL of a server that does nothing."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve_fixed, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/"
    finally:
        process.terminate()
        process.join()


@contextlib.contextmanager
def no_op() -> Iterator[str]:
    """Yield the URL of an archive without a model."""
    with tempfile.TemporaryDirectory(prefix="no-op-") as name:
        folder = Path(name)
        port = configuration.free_ports(1)[0]
        archive = _archive(folder)
        (folder / "server").mkdir()
        _, settings = configuration.configure_server(folder / "server", {}, {}, "127.0.0.1", port)
        # `configure` would refuse it: an archive without a manifest is not ours.
        shutil.copy(archive, settings["model-store"])
        config = settings["ts-config"]
        config.write_text(config.read_text().replace("load_models=", f"load_models=no-op={archive.name}"))
        pid = server.launch(folder / "server", settings, java.find_java())
        process = psutil.Process(pid)
        try:
            url = f"http://127.0.0.1:{port}/predictions/no-op"
            servers._first_answer(url, _BODIES[0], "application/json")
            yield url
        finally:
            family = [process, *process.children(recursive=True)]
            process.terminate()
            for survivor in psutil.wait_procs(family, timeout=15)[1]:
                survivor.kill()


def _archive(folder: Path) -> Path:
    handler, config = folder / "handler.py", folder / "model-config.yaml"
    handler.write_text(_HANDLER)
    config.write_text(Serving(batch_size=32, max_batch_delay=2, response_timeout=60, workers=1).to_yaml())
    command = [str(Path(sys.executable).with_name("torch-model-archiver")), "--model-name", "no-op", "--version", "1.0"]
    command += ["--handler", str(handler), "--config-file", str(config), "--export-path", str(folder)]
    subprocess.run([*command, "--archive-format", "zip-store"], check=True, stdout=subprocess.DEVNULL)
    return folder / "no-op.mar"


def main() -> None:
    parser = tables.parser(__doc__, rounds=3)
    parser.add_argument("--connections", default="16,64", metavar="N[,N...]", help="[%(default)s]")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per measurement [%(default)g]")
    options = parser.parse_args()
    counts = [int(part) for part in options.connections.split(",")]
    subjects: Dict[str, Callable[[], Any]] = {"a server that does nothing": fixed, "TorchServe without a model": no_op}
    results: Dict[Tuple[str, int], List[load_generator.Result]] = {}
    with tables.progress() as bar:
        task = bar.add_task("", total=options.rounds * len(subjects) * len(counts))
        for _ in range(options.rounds):
            for name, start in subjects.items():
                with start() as url:
                    for connections in counts:
                        bar.update(task, description=f"{name}, {connections} connections")
                        result = load_generator.send_load(
                            load_generator.Endpoint(url),
                            _BODIES,
                            connections=connections,
                            seconds=options.seconds,
                            warm_up=1.5,
                        )
                        results.setdefault((name, connections), []).append(result)
                        bar.advance(task)
    tables.show([_row(*key, found) for key, found in results.items()], options.markdown)
    tables.save(
        options.json,
        [
            {"server": name, "connections": connections, "requests/s": result.throughput, "cpu": result.cpu}
            for (name, connections), found in results.items()
            for result in found
        ],
    )


def _row(name: str, connections: int, found: List[load_generator.Result]) -> Dict[str, str]:
    return {
        "": name,
        "connections": str(connections),
        "requests/s": tables.figure(tables.median(result.throughput for result in found)),
        "p50 ms": tables.milliseconds(tables.median(result.percentile(50) for result in found)),
        "p99 ms": tables.milliseconds(tables.median(result.percentile(99) for result in found)),
        "generator's share of a core": f"{100 * tables.median(result.cpu for result in found):.0f} %",
        "requests/s of a whole core": tables.figure(tables.median(r.throughput / r.cpu for r in found)),
        "errors": str(sum(result.failed for result in found)),
    }


if __name__ == "__main__":
    main()
