"""Tokens per second of text generation: with a cache, recomputed at every step, and by transformers.

    python tests/benchmarks/generation.py [--model FOLDER | --family qwen3.5] [--new-tokens 200] [--rounds 5] [--batch 1]

All three write the same tokens (checked), alternating, on the same threads; medians are reported. `recomputed` runs the
same graph on the whole text at every step, as a trace without a cache has to. Without --model a Llama with 24 million
random weights is made, for which the graph's size matters more than the loop's; with --family a larger model whose layers
have states of a fixed size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import numpy as np
import text_models
import torch
import transformers
from rich.console import Console
from rich.table import Table
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.generation.loop import Member, WritingLoop
from traceserve_runtime.generation.scores import GenerationSettings
from traceserve_runtime.generation.search import Sampling
from traceserve_runtime.tasks.contract import Request

PROMPT = (
    "Once upon a time there was a little boat that nobody wanted to sail. It lay in the harbour all winter, and the snow "
    "covered its deck. One morning"
)
LLAMA = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1376,
    "max_position_embeddings": 1024,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the folder of a decoder; without it a random Llama")
    parser.add_argument("--family", choices=text_models.RECURRENT, help="a random model of this family")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1, help="how many prompts at once")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = options.model or made(Path(folder, "made"), options.family)
        content = {
            "model_name": str(Path(source).resolve()),
            "task": "text_generation",
            "max_length": 256 + options.new_tokens,
        }
        engine = Engine.load(text_models.built(Path(folder, "exported"), content))
        ways = contenders(engine, source, options.new_tokens, options.batch)
        seconds: Dict[str, List[float]] = {name: [] for name in ways}
        written = {name: way() for name, way in ways.items()}  # a warm-up round
        for _ in range(options.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
    if any(tokens != written["past as input"] for tokens in written.values()):
        sys.exit("they write different tokens")
    table = Table("way", "seconds", "tokens/s", "times the first")
    own = statistics.median(seconds["past as input"])
    for name, took in seconds.items():
        median = statistics.median(took)
        rate = options.new_tokens * options.batch / median
        table.add_row(name, f"{median:.3f}", f"{rate:,.0f}", f"{median / own:.2f}")
    Console().print(table)


def made(folder: Path, family: Optional[str]) -> Path:
    """Make a checkpoint of random weights, as wide and deep as a small model in practical use."""
    if family is not None:
        return text_models.random_recurrent(folder, family)
    models.make(folder, "llama", "AutoModelForCausalLM", **LLAMA)
    length = LLAMA["max_position_embeddings"]
    transformers.AutoTokenizer.from_pretrained(folder, model_max_length=length).save_pretrained(folder)
    return folder


def contenders(engine: Engine, source: Path, new_tokens: int, batch: int) -> Dict[str, Callable[[], List[List[int]]]]:
    """Return the three ways to write `new_tokens` after the prompt; each returns every row's new ids."""
    [encoded] = engine.task.encode([Request({"text": PROMPT}, {"max_new_tokens": new_tokens})])
    row = encoded.rows[0]  # type: ignore[union-attr]  # the prompt is short enough
    ids = row.encoding.ids
    settings = GenerationSettings(max_new_tokens=new_tokens)

    def past_as_input() -> List[List[int]]:
        loop = WritingLoop(engine.runner, engine.manifest, "decoder", Stats())
        members = [Member(row, lambda: Sampling(ids, settings)) for _ in range(batch)]
        for member in members:
            loop.join(member)
        while loop.busy:
            loop.turn()
        return [member.search.tokens for member in members if member.search is not None]

    def recomputed() -> List[List[int]]:
        whole = np.array([ids] * batch)
        for _ in range(new_tokens):
            mask = np.ones_like(whole)
            inputs = {"input_ids": whole, "attention_mask": mask, "position_ids": mask.cumsum(axis=1) - 1}
            outputs, _ = engine.runner.step(inputs, engine.runner.start(inputs))
            whole = np.concatenate([whole, outputs["logits"].argmax(axis=1)[:, None]], axis=1)
        tokens: List[List[int]] = whole[:, len(ids) :].tolist()
        return tokens

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source).float().eval()
    tensor = torch.tensor([ids] * batch)

    def by_transformers() -> List[List[int]]:
        whole = model.generate(
            tensor,
            attention_mask=torch.ones_like(tensor),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=None,
        )
        tokens: List[List[int]] = whole[:, len(ids) :].tolist()
        return tokens

    return {"past as input": past_as_input, "recomputed": recomputed, "transformers": by_transformers}


if __name__ == "__main__":
    main()
