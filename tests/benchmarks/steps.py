"""A step of text generation in process, as traced, without its copies, with groups of queries as one, and with weights in
float16, in turn.

    python tests/benchmarks/steps.py [--model FOLDER | --layers N] [--dtype float32] [--rows 1,16] [--past 150,400]

The traced step copies all keys and values of earlier tokens to put a token's behind them, and repeats them where queries share
some; a worker's does neither, and lets attention take such queries together. It also keeps float32 weights in float16 where they
are the same there. All read a prompt of
`--past` random tokens in each row, and then step. Without --model it is a Llama with random weights, as wide and deep as
SmolLM2. Medians of all steps, and of the rounds' ratios to the way before.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tables
import text_models
from traceserve_runtime import processor
from traceserve_runtime.engine import Engine
from traceserve_runtime.runtimes.graph import insert_constant
from traceserve_runtime.runtimes.torchscript import grouped_queries, growing, packing

WAYS = ("as traced", "without copies", "in groups", "in float16")
ROUNDING = {"float32": 1e-4, "bfloat16": 2e-2}  # of the largest logit
STEPS = 10  # of each, before it is the other's turn


def main() -> None:
    options = parse()
    taken: Dict[Tuple[int, int], List[Dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="steps-") as name, tables.progress() as bar:
        runners = loaded(built(options, Path(name)))
        task = bar.add_task("", total=options.rounds * len(options.rows) * len(options.past))
        for rows in options.rows:
            for past in options.past:
                loops = {way: Loop(runner, rows, past) for way, runner in runners.items()}
                for _ in range(options.rounds):
                    bar.update(task, description=f"{rows} rows of {past} tokens")
                    taken.setdefault((rows, past), []).append({way: loops[way].seconds() for way in WAYS})
                    bar.advance(task)
                same(loops, ROUNDING[options.dtype])
    caption = f"{options.dtype}, {processor.cores()} threads, {processor.name()}"
    table = [line(rows, past, found) for (rows, past), found in taken.items()]
    tables.save(options.json, table)
    tables.show(table, options.markdown, caption)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__, rounds=9)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a decoder; without it a random Llama")
    parser.add_argument("--layers", type=int, default=text_models.SMOLLM2["num_hidden_layers"], help="[%(default)s]")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="[%(default)s]")
    parser.add_argument("--rows", type=tables.numbers, default="1,16", help="[%(default)s]")
    parser.add_argument("--past", type=tables.numbers, default="150,400", help="tokens of each row [%(default)s]")
    return parser.parse_args()


def built(options: argparse.Namespace, folder: Path) -> Path:
    model = options.model.resolve() if options.model else text_models.random_llama(folder / "llama", options.layers)
    content = {"model_name": str(model), "task": "text_generation", "dtype": options.dtype}
    return text_models.built(folder / "text", {**content, "max_length": max(options.past) + 200})


def loaded(artifact: Path) -> Dict[str, Any]:
    copying = mock.patch.object(growing, "write_behind", return_value=None)
    repeating = mock.patch.object(grouped_queries, "group", return_value=0)
    apart = mock.patch.object(grouped_queries, "_others", lambda graph, *_, before: insert_constant(graph, 0, before))
    whole = mock.patch.object(packing, "is_half", return_value=False)
    runners = []
    for changed in ((copying, repeating, whole), (apart, whole), (whole,), ()):
        with contextlib.ExitStack() as stack:
            for each in changed:
                stack.enter_context(each)
            runners.append(Engine.load(artifact).runner)
    return dict(zip(WAYS, runners))


class Loop:
    """Rows of random tokens, which one runner continues."""

    def __init__(self, runner: Any, rows: int, past: int) -> None:
        self.runner = runner
        self.random = np.random.default_rng(0)
        ids = self.random.integers(3, 250, (rows, past))
        self.mask = np.ones_like(ids)
        self.state = runner.start({"input_ids": ids, "attention_mask": self.mask})
        self._step(ids)
        self._next()  # the first has no room yet

    def seconds(self) -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            self._next()
        return (time.perf_counter() - began) / STEPS

    def _next(self) -> None:
        self.mask = np.concatenate([self.mask, np.ones_like(self.mask[:, :1])], axis=1)
        self._step(self.random.integers(3, 250, (len(self.mask), 1)))

    def _step(self, ids: np.ndarray) -> None:
        positions = self.mask.cumsum(axis=1)[:, -ids.shape[1] :] - 1
        inputs = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions}
        outputs, self.state = self.runner.step(inputs, self.state)
        self.logits = outputs["logits"]


def same(loops: Dict[str, Loop], share: float) -> None:
    first, *others = (loops[way].logits for way in WAYS)
    for other in others:
        if not np.allclose(first, other, atol=share * max(1.0, float(np.abs(first).max()))):
            raise SystemExit(f"the logits differ by {np.abs(first - other).max():g}")


def line(rows: int, past: int, found: List[Dict[str, float]]) -> tables.Row:
    cells = {"rows": f"{rows}", "tokens in each": f"{past}"}
    for before, way in zip((None, *WAYS), WAYS):
        cells[f"{way}, ms"] = tables.figure(1e3 * tables.median([each[way] for each in found]))
        if before:
            cells[f"{way}, ratio"] = f"{tables.median([each[way] / each[before] for each in found]):.2f}"
    return cells


if __name__ == "__main__":
    main()
