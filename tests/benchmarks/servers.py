"""Servers to measure, as processes: ours, a foreign archive under plain torchserve, LitServe with a pipeline, infinity.

Each is a context manager that starts one, waits for its first answer, and stops it. They inherit the environment.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import psutil
from traceserve.measuring import load_generator
from traceserve.serving import configuration, instances, java, management

SENTENCE = "I still have not received my new card, I ordered over a week ago."
TRACESERVE = (sys.executable, "-m", "traceserve")
Body = Callable[[str], bytes]


@dataclass(frozen=True)
class Server:
    """A running server. `workers` are the processes with the model, `frontend` are its others."""

    url: str
    body: Body
    content_type: str
    seconds: float  # from its start to its first answer
    workers: Sequence[int]
    frontend: Sequence[int]

    def run(
        self, texts: Sequence[str], connections: int, seconds: float, warm_up: float = 2.0
    ) -> load_generator.Result:
        """Send the texts in a closed loop."""
        bodies = [self.body(text) for text in texts]
        return load_generator.send_load(
            load_generator.Endpoint(self.url),
            bodies,
            self.content_type,
            connections,
            seconds=seconds,
            warm_up=warm_up,
        )


Starter = Callable[[], "contextlib.AbstractContextManager[Server]"]


def text_field(text: str) -> bytes:
    """Return the JSON body for ours, and for LitServe with our pipeline."""
    return json.dumps({"text": text}).encode()


@contextlib.contextmanager
def ours(archive: Path, workers: Optional[int] = None, body: Body = text_field) -> Iterator[Server]:
    """Run `traceserve serve`, which returns at the first answer."""
    port = configuration.free_ports(1)[0]
    count = [] if workers is None else ["--workers", str(workers)]
    started = time.monotonic()
    _run([*TRACESERVE, "serve", str(archive), "--port", str(port), *count])
    seconds = time.monotonic() - started
    try:
        url = f"http://127.0.0.1:{port}/predictions/{archive.stem}"
        instance = instances.find_instance(port)
        pids = _torchserve_workers(lambda: management.call(instance, "GET", f"/models/{archive.stem}"))
        yield Server(url, body, "application/json", seconds, pids, [instance.pid])
    finally:
        _run([*TRACESERVE, "stop", "--port", str(port)])


@contextlib.contextmanager
def foreign(archive: Path, batch_size: Optional[int] = None, batch_delay: int = 10) -> Iterator[Server]:
    """Run `torchserve --start` with one worker and its own defaults; `batch_delay` in ms goes with `batch_size`."""
    archive = archive.resolve()
    with tempfile.TemporaryDirectory(prefix="foreign-") as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        shutil.copyfile(archive, folder / archive.name)
        ports = configuration.free_ports(5)
        keys = ("inference_address", "management_address", "metrics_address")
        lines = [f"{key}=http://127.0.0.1:{port}" for key, port in zip(keys, ports)]
        lines += [f"grpc_inference_port={ports[3]}", f"grpc_management_port={ports[4]}", "default_workers_per_model=1"]
        (folder / "config.properties").write_text("\n".join([*lines, "enable_model_api=true"]) + "\n")
        environment = {**os.environ, "TMPDIR": f"{folder}/tmp", "TEMP": f"{folder}/tmp", **java.find_java()}
        run = functools.partial(_run, cwd=folder, env=environment)
        torch_serve = [sys.executable, "-m", "ts.model_server"]
        options = ["--model-store", ".", "--ts-config", "config.properties", "--disable-token-auth", "--ncs"]
        if batch_size is None:
            options += ["--models", f"{archive.stem}={archive.name}"]
        started = time.monotonic()
        run([*torch_serve, "--start", *options])
        try:
            if batch_size is not None:
                query = f"url={archive.name}&initial_workers=1&batch_size={batch_size}&max_batch_delay={batch_delay}"
                _first_answer(f"http://127.0.0.1:{ports[1]}/models?{query}&synchronous=true", b"", "text/plain")
            url = f"http://127.0.0.1:{ports[0]}/predictions/{archive.stem}"
            _first_answer(url, SENTENCE.encode(), "text/plain")
            seconds = time.monotonic() - started
            pid = int((folder / "tmp" / ".model_server.pid").read_text())
            pids = _torchserve_workers(lambda: _described(ports[1], archive.stem))
            yield Server(url, str.encode, "text/plain", seconds, pids, [pid])
        finally:
            run([*torch_serve, "--stop", "--foreground"])


@contextlib.contextmanager
def litserve(python: Path, model: Path, max_length: int = 128, max_batch_size: int = 32) -> Iterator[Server]:
    """Run a transformers pipeline behind LitServe."""
    port = configuration.free_ports(1)[0]
    with tempfile.TemporaryDirectory(prefix="litserve-") as name:
        workers_file = Path(name, "workers")
        command = [str(python), str(Path(__file__).with_name("litserve_pipeline.py")), "--model", str(model.resolve())]
        command += ["--port", str(port), "--max-length", str(max_length), "--max-batch-size", str(max_batch_size)]
        url = f"http://127.0.0.1:{port}/predict"
        with process([*command, "--workers-file", str(workers_file)], url, text_field, Path(name)) as (pid, seconds):
            workers = [int(line) for line in workers_file.read_text().split()]
            yield Server(url, text_field, "application/json", seconds, workers, _others(pid, workers))


@contextlib.contextmanager
def infinity(python: Path, model: Path, kind: str = "classification", max_length: int = 128) -> Iterator[Server]:
    """Run `infinity_emb v2`, with its defaults (batches of up to 32) on the processor."""
    port = configuration.free_ports(1)[0]

    def body(text: str) -> bytes:
        return json.dumps({"model": "bench", "input": [text]}).encode()

    with tempfile.TemporaryDirectory(prefix="infinity-") as name:
        checkpoint = _shortened(model.resolve(), Path(name, "model"), max_length)
        command = [str(python.with_name("infinity_emb")), "v2", "--model-id", str(checkpoint), "--port", str(port)]
        command += ["--host", "127.0.0.1", "--served-model-name", "bench", "--engine", "torch", "--device", "cpu"]
        command += ["--log-level", "warning"]
        path = {"classification": "classify", "embeddings": "embeddings"}[kind]
        url = f"http://127.0.0.1:{port}/{path}"
        with process(command, url, body, Path(name)) as (pid, seconds):
            yield Server(url, body, "application/json", seconds, [pid], _others(pid, [pid]))


def memory(pids: Sequence[int]) -> Dict[str, float]:
    """Return MB of several processes: `pss` (shared pages divided), `rss`, and `uss` (private pages)."""
    infos = [psutil.Process(pid).memory_full_info() for pid in pids]
    return {kind: sum(getattr(info, kind) for info in infos) / 1e6 for kind in ("pss", "rss", "uss")}


def _shortened(model: Path, folder: Path, max_length: int) -> Path:
    """Return the checkpoint with another maximum length, which infinity only takes from the tokenizer."""
    shutil.copytree(model, folder, copy_function=os.symlink)
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps({**content, "model_max_length": max_length}))
    return folder


def _run(command: Sequence[str], **settings: Any) -> None:
    """Run to the end, quietly; print its output if it fails."""
    # To a file: a pipe would stay open as long as the started server.
    with tempfile.TemporaryFile() as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, **settings).returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed: {log.read().decode(errors='replace')}")


@contextlib.contextmanager
def process(command: Sequence[str], url: str, body: Body, folder: Path, timeout: float = 180) -> Iterator[Any]:
    """Run a server in the foreground; return its process id and the seconds to its first answer."""
    log = folder / "log.txt"
    environment = {**os.environ, "DO_NOT_TRACK": "1"}  # otherwise infinity reports its use
    started = time.monotonic()
    with log.open("wb") as stream:
        running = psutil.Popen(command, stdout=stream, stderr=stream, cwd=folder, env=environment)

    def check() -> None:
        if running.poll() is not None:
            raise RuntimeError(f"{' '.join(command)} ended: {log.read_text(errors='replace')[-3000:]}")

    try:
        _first_answer(url, body(SENTENCE), "application/json", check, timeout)
        yield running.pid, time.monotonic() - started
    finally:
        _end(running.pid)


def _end(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        for member in family:  # LitServe's would outlive their parent
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        _, alive = psutil.wait_procs(family, timeout=5)
        for survivor in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
        psutil.wait_procs(alive, timeout=5)


def _others(pid: int, workers: Sequence[int]) -> List[int]:
    family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return [each for each in family if each not in workers]


def _described(port: int, name: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/models/{name}", timeout=10) as response:
        return json.load(response)


def _torchserve_workers(describe: Callable[[], Any]) -> List[int]:
    """Return the workers of an archive once each has loaded it; the first answer may come earlier."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        workers = describe()[0]["workers"]
        if all(worker["status"] == "READY" for worker in workers):
            return [worker["pid"] for worker in workers]
        time.sleep(0.1)
    raise TimeoutError(f"the workers are not ready: {workers}")


def _first_answer(
    url: str, body: bytes, content_type: str, check: Callable[[], None] = lambda: None, timeout: float = 180
) -> None:
    deadline = time.monotonic() + timeout
    reason: Optional[Exception] = None
    while time.monotonic() < deadline:
        check()
        try:
            request = urllib.request.Request(url, data=body, headers={"Content-Type": content_type})
            with urllib.request.urlopen(request, timeout=timeout) as response:
                response.read()
                return
        except urllib.error.HTTPError as error:
            if error.code in (400, 413, 415, 422):  # others mean that it is not ready
                raise RuntimeError(f"{url}: {error}: {error.read().decode(errors='replace')}") from None
            reason = error
        except OSError as error:  # URLError too
            reason = error
        time.sleep(0.02)
    raise TimeoutError(f"{url} gave no answer in {timeout} s: {reason}")
