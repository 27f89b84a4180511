"""The duration of drawing one token, in process and alternating, on one thread: ours beside transformers' own processors and
torch's `multinomial`.

The logits are normally distributed with a deviation of 3; `kept` are the tokens that may be drawn of them.

python tests/benchmarks/sampling.py [--rounds 5]
"""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import tables
import torch
import transformers
from traceserve_runtime.generation.scores import GenerationSettings, drawable
from traceserve_runtime.generation.search import Sampling

VOCABULARIES = (32_000, 49_152, 128_256)
WAYS: Tuple[Dict[str, Any], ...] = (
    {"temperature": 0.7},
    {"top_k": 50},
    {"top_k": 50, "top_p": 0.9},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"typical_p": 0.9},
)
_DEVIATION = 3.0
_DRAWS = 20  # per round


def main() -> None:
    options = tables.parser(__doc__, rounds=5).parse_args()
    torch.set_num_threads(1)
    found: List[Dict[str, Any]] = []
    with tables.progress() as bar:
        task = bar.add_task("", total=len(VOCABULARIES) * len(WAYS))
        for size in VOCABULARIES:
            scores = np.random.default_rng(0).normal(0, _DEVIATION, size).astype(np.float32)
            for asked in WAYS:
                bar.update(task, description=f"{size:,} tokens, {_described(asked)}")
                settings = GenerationSettings(1, do_sample=True, seed=0, **asked)
                kept = len(drawable(scores, settings).ids)
                ways = {"ours": _ours(scores, settings), "transformers": _transformers(scores, asked)}
                taken: Dict[str, List[float]] = {way: [] for way in ways}
                for _ in range(options.rounds):
                    for way, draw in ways.items():
                        taken[way].append(_seconds(draw))
                found.append({"vocabulary": size, "settings": asked, "kept": kept, "seconds": taken})
                bar.advance(task)
    rows = []
    for each in found:
        medians = {way: tables.median(seconds) for way, seconds in each["seconds"].items()}
        rows.append(
            {
                "vocabulary": f"{each['vocabulary']:,}",
                "settings": _described(each["settings"]),
                "kept": f"{each['kept']:,}",
                **{f"{way}, ms": f"{1000 * seconds:.2f}" for way, seconds in medians.items()},
                "ratio": f"{medians['ours'] / medians['transformers']:.2f}",
            }
        )
    tables.show(rows, options.markdown)
    tables.save(options.json, found)


def _described(asked: Dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in asked.items())


def _ours(scores: np.ndarray, settings: GenerationSettings) -> Callable[[], object]:
    return lambda: Sampling([0], settings).advance(scores[None])


def _transformers(scores: np.ndarray, asked: Dict[str, Any]) -> Callable[[], object]:
    made = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
        "typical_p": transformers.TypicalLogitsWarper,
    }
    processors = transformers.LogitsProcessorList([made[name](value) for name, value in asked.items()])
    logits = torch.from_numpy(scores)[None]
    ids: Any = torch.zeros(1, 1, dtype=torch.long)
    return lambda: torch.multinomial(processors(ids, logits).softmax(-1), 1)


def _seconds(draw: Callable[[], object]) -> float:
    draw()
    began = time.perf_counter()
    for _ in range(_DRAWS):
        draw()
    return (time.perf_counter() - began) / _DRAWS


if __name__ == "__main__":
    main()
