"""Tokens per second of text generation in several save modes and dtypes, for one client and for many rows.

    python tests/benchmarks/generation_formats.py [--model FOLDER] [--rows 1,16] [--new-tokens 128] [--threads N]

Without --model, a Llama with 135 million random weights is made, as wide and deep as SmolLM2. Each way is built once,
through a shortened gate whose drift is allowed, and with no layer left in float32: random weights have no clear answers.
Then all ways write, alternating, on as many threads; medians are reported. `first token` is the time to read the prompts
(of about 32 tokens) and write one token each; `tokens/s` counts the steps after it, so that prompts do not matter.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tables
import text_models
from traceserve.building.export import Shared
from traceserve.machine import space
from traceserve_runtime import processor
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.generation.loop import Member, WritingLoop
from traceserve_runtime.generation.scores import GenerationSettings
from traceserve_runtime.generation.search import Sampling
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks.contract import Request

PROMPT = "Once upon a time there was a little boat that nobody wanted to sail. It lay in the harbour all winter."
WAYS = "torchscript:float32,torchscript:bfloat16,openvino:float32,openvino:bfloat16,openvino:int8"

Way = Tuple[str, str]


def main() -> None:
    options = parse()
    seconds: Dict[str, Dict[str, List[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="generation-") as name:
        source = options.model or text_models.random_llama(Path(name, "llama"))
        shared = Shared()
        folders = {way: built(Path(name, "-".join(way)), source, way, shared) for way in options.ways}
        shared.reference = None
        gc.collect()
        engines = {way: Engine.load(folder, settings=Settings(options.threads)) for way, folder in folders.items()}
        for warm in (True, *[False] * options.rounds):
            for rows in options.rows:
                for way, engine in engines.items():
                    first, each = written(engine, rows, 4 if warm else options.new_tokens)
                    if not warm:
                        found = seconds.setdefault(f"{' '.join(way)}, {rows} rows", {"first": [], "step": []})
                        found["first"].append(first)
                        found["step"].append(each)
            tables.save(options.json, seconds)
        sizes = {way: space.size([folder]) for way, folder in folders.items()}
    for rows in options.rows:
        base = median_of(seconds, options.ways[0], rows, "step")
        shown = [row(way, rows, seconds, sizes[way], base) for way in options.ways]
        caption = f"{rows} row{'s' * (rows > 1)}, {options.threads} threads, {options.new_tokens} new tokens"
        tables.show(shown, options.markdown, f"{caption}, {processor.name()}")


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__, rounds=5)
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="a decoder; without it a random Llama of 135 million"
    )
    parser.add_argument(
        "--ways",
        type=lambda text: [tuple(way.split(":", 1)) for way in text.split(",")],
        default=WAYS,
        help="save modes and dtypes; the first is the base of the ratios [%(default)s]",
    )
    parser.add_argument("--rows", type=tables.numbers, default="1,16", help="[%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=128, help="per row [%(default)s]")
    parser.add_argument("--threads", type=int, default=processor.cores(), help="of every way [%(default)s]")
    return parser.parse_args()


def built(folder: Path, source: Path, way: Way, shared: Shared) -> Path:
    """Export the checkpoint in this save mode and dtype."""
    print(f"building {' '.join(way)}", file=sys.stderr)
    content = {"model_name": str(source.resolve()), "task": "text_generation", "save_mode": way[0], "dtype": way[1]}
    return text_models.built(folder, {**content, "max_length": 256}, allow_drift=True, shared=shared)


def written(engine: Engine, rows: int, new_tokens: int) -> Tuple[float, float]:
    """Return the seconds of the first token, and those of each later step."""
    [encoded] = engine.task.encode([Request({"text": PROMPT}, {"max_new_tokens": new_tokens})])
    row = encoded.rows[0]  # type: ignore[union-attr]  # the prompt is short enough
    settings = GenerationSettings(max_new_tokens=new_tokens)
    loop = WritingLoop(engine.runner, engine.manifest, "decoder", Stats())
    for _ in range(rows):
        loop.join(Member(row, lambda: Sampling(row.encoding.ids, settings)))
    started = time.perf_counter()
    loop.turn()
    first = time.perf_counter()
    while loop.busy:
        loop.turn()
    return first - started, (time.perf_counter() - first) / (new_tokens - 1)


def median_of(seconds: Dict[str, Dict[str, List[float]]], way: Way, rows: int, what: str) -> float:
    return tables.median(seconds[f"{' '.join(way)}, {rows} rows"][what])


def row(way: Way, rows: int, seconds: Dict[str, Dict[str, List[float]]], size: int, base: float) -> Dict[str, str]:
    """Return a row of the table."""
    step = median_of(seconds, way, rows, "step")
    return {
        "save mode": way[0],
        "dtype": way[1],
        "artifact, MB": tables.figure(size / 1e6),
        "first token, ms": tables.milliseconds(median_of(seconds, way, rows, "first")),
        "a step, ms": tables.milliseconds(step),
        "tokens/s": tables.figure(rows / step),
        "times the first": tables.figure(base / step),
    }


if __name__ == "__main__":
    main()
