"""Streamed texts beside long prompts, which are read in parts or whole: how long clients wait for their tokens.

    python tests/benchmarks/long_prompts.py [--model FOLDER] [--host web|torchserve] [--prompt 1500] [--streams 4]

One checkpoint is served twice, the second time by an archive without the note that its prompts may be read in parts. Both servers
run at once, and are asked in turn. --streams clients stream one text of --tokens tokens after another, each with a short
prompt, while another client sends prompts of --prompt tokens, one after another. Without --model it is a Llama with 135 million
random weights, as wide and deep as SmolLM2. Medians of the rounds, and ratios to the first column.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import statistics
import sys
import tempfile
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import beside
import tables
import text_models
from conftest import run_export
from traceserve.archives.archive import pack_archive
from traceserve.building.gate.texts import VERY_LONG
from traceserve_runtime.engine import load_task
from traceserve_runtime.generation.steps import IN_PARTS
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.texts.rows import Encoded, Segments

LONG_TOKENS = 8  # new ones behind a long prompt


class Streamed(NamedTuple):
    first: float  # seconds until the first piece
    gaps: List[float]  # seconds between two pieces


def main() -> None:
    options = parse()
    found: Dict[str, List[Dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        ways = archives(options.model or text_models.random_llama(folder / "model", options.layers), folder, options)
        prompt = prompt_of(folder / "text", options.prompt)
        urls = {way: stack.enter_context(beside.started(beside.Way(way, options.host, ways[way]))) for way in ways}
        for url in urls.values():
            measured(url, prompt, options, 2.0, 0.0)
        for _ in range(options.rounds):
            for way, url in urls.items():
                found.setdefault(way, []).append(measured(url, prompt, options, options.seconds, options.pause))
                print(way, json.dumps(found[way][-1]), flush=True)
    tables.show_medians(found)


def archives(model: Path, folder: Path, options: argparse.Namespace) -> Dict[str, Path]:
    """Return the two archives by their way."""
    config: Dict[str, Any] = {
        "model_name": str(model.resolve()),
        "task": "text_generation",
        "continuous_batching": True,
    }
    config.update(dtype=options.dtype, save_mode=options.save_mode, max_length=options.prompt + options.tokens + 64)
    artifact = folder / "text"
    run_export(artifact, config)
    packed = {"in parts": pack_archive(artifact, "parts", folder)}
    manifest = Manifest.read(artifact)
    if not manifest.runtime.get(IN_PARTS):
        raise SystemExit("the build found that this model's prompts cannot be read in parts")
    replace(manifest, runtime={**manifest.runtime, IN_PARTS: False}).write(artifact)
    return {**packed, "whole": pack_archive(artifact, "whole", folder)}


def prompt_of(artifact: Path, tokens: int) -> str:
    """Return a text of about so many tokens."""
    manifest = Manifest.read(artifact)
    words = VERY_LONG.split()
    [encoded] = load_task(artifact, manifest).tokenizer.encode([Segments(" ".join(words[:50]))], ["truncate"])
    assert isinstance(encoded, Encoded)
    needed = 50 * tokens // encoded.rows[0].length
    return " ".join((words * (1 + needed // len(words)))[:needed])


def measured(url: str, prompt: str, options: argparse.Namespace, seconds: float, pause: float) -> Dict[str, float]:
    until = time.perf_counter() + seconds
    with ThreadPoolExecutor(options.streams + 1) as pool:
        long = pool.submit(ask_long, url, prompt, until, pause)
        streams = [pool.submit(ask_streamed, url, i, options.tokens, until) for i in range(options.streams)]
        texts = [each for stream in streams for each in stream.result()]
        waits = long.result()
    gaps = sorted(gap for each in texts for gap in each.gaps)
    return {
        "between two pieces, p50 in ms": 1000 * statistics.median(gaps),
        "between two pieces, p99 in ms": 1000 * gaps[int(0.99 * len(gaps))],
        "between two pieces, longest in ms": 1000 * gaps[-1],
        "first piece, p50 in ms": 1000 * statistics.median(each.first for each in texts),
        "pieces a second": len(gaps) / seconds,
        "a long prompt's answer, p50 in ms": 1000 * statistics.median(waits),
    }


def ask_long(url: str, prompt: str, until: float, pause: float) -> List[float]:
    waits: List[float] = []
    body = body_of(prompt, LONG_TOKENS, stream=False)
    while not waits or time.perf_counter() < until:
        time.sleep(pause)
        began = time.perf_counter()
        connection, response = post(url, body)
        answer = response.read()
        if response.status != 200:
            raise SystemExit(f"{url} answered {response.status}: {answer[:300]!r}")
        connection.close()
        waits.append(time.perf_counter() - began)
    return waits


def ask_streamed(url: str, client: int, tokens: int, until: float) -> List[Streamed]:
    texts: List[Streamed] = []
    for number in itertools.count():
        if texts and time.perf_counter() >= until:
            return texts
        at = [time.perf_counter()]
        connection, response = post(url, body_of(f"Story {client}.{number}: the boats", tokens, stream=True))
        while response.read1(65536):
            at.append(time.perf_counter())
        if response.status != 200 or len(at) < 3:
            raise SystemExit(f"{url} answered {response.status} in {len(at) - 1} pieces")
        connection.close()
        texts.append(Streamed(at[1] - at[0], [two - one for one, two in zip(at[1:], at[2:])]))
    raise AssertionError


def body_of(text: str, tokens: int, stream: bool) -> bytes:
    parameters = {"max_new_tokens": tokens, "min_new_tokens": tokens, "stream": stream, "long_inputs": "truncate"}
    return json.dumps({"text": text, "parameters": parameters}).encode()


def post(url: str, body: bytes) -> Tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=600)
    connection.request("POST", parts.path, body, {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the folder of a decoder [random, 135 million weights]")
    parser.add_argument("--layers", type=int, default=30, help="of the random one [%(default)s]")
    parser.add_argument("--host", choices=("web", "torchserve"), default="web")
    parser.add_argument("--save-mode", default="torchscript")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=1500, help="tokens of a long prompt, about [%(default)s]")
    parser.add_argument("--tokens", type=int, default=60, help="of a streamed text [%(default)s]")
    parser.add_argument("--streams", type=int, default=4, help="clients that stream [%(default)s]")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds before each long prompt [%(default)s]")
    parser.add_argument("--seconds", type=float, default=20.0, help="of asking each, per round [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
