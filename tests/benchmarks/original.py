"""The duration of the gate's original: each row alone, and rows of one length together; and the difference of their
outputs.

    python tests/benchmarks/original.py --model FOLDER --samples FILE [--every N]

Alternating, in one process: chunks of the samples one way, then the other.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import List

import numpy as np
from traceserve.building.checkpoints import loading, sources
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate.reference import Reference, Wanted, run_original
from traceserve.building.samples import OwnSamples
from traceserve_runtime.manifest import TokenizerFacts
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.texts.rows import Encoded, Segments
from traceserve_runtime.texts.tokenization import TextTokenizer

TASK = "sequence_classification"
CHUNKS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a checkpoint of a classifier")
    parser.add_argument("--samples", type=Path, required=True, metavar="FILE", help="as in traceserve build")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take only each Nth sample [%(default)s]")
    options = parser.parse_args()
    config, _ = parse_config({"model_name": str(options.model.resolve()), "task": TASK})
    with loading.quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        original = loading.load_original(config, sources.fetch_checkpoint(config, Path()), Path())
        original.write_tokenizer(Path(folder))
        facts: TokenizerFacts = original.tokenizer_facts
        tokenizer = TextTokenizer(Path(folder), facts, original.max_length, max_rows=1)
        asked = OwnSamples.read(options.samples).requests(TASKS[TASK])[:: options.every]
        encoded = tokenizer.encode([Segments(request.inputs["text"]) for request in asked], ["truncate"] * len(asked))
    rows = list({tuple(e.rows[0].encoding.ids): e.rows[0] for e in encoded if isinstance(e, Encoded)}.values())
    reference = Reference(original)
    ratios: List[float] = []
    alone = together = most = 0.0
    for chunk in (range(start, len(rows), CHUNKS) for start in range(CHUNKS)):
        began = time.perf_counter()
        exact = [run_original(original, rows[i], ["logits"])["logits"] for i in chunk]
        middle = time.perf_counter()
        reference.prepare((Wanted(i, rows[i], dict) for i in chunk), ["logits"], lambda done, total: None)
        ended = time.perf_counter()
        got = [reference.outputs(i, dict)["logits"] for i in chunk]
        most = max([most, *(float(np.abs(a - b).max()) for a, b in zip(got, exact))])
        ratios.append((middle - began) / (ended - middle))
        alone, together = alone + middle - began, together + ended - middle
    print(f"{len(rows)} rows: alone {alone:.1f} s, together {together:.1f} s, median of {CHUNKS} ratios", end=" ")
    print(f"{statistics.median(ratios):.2f}, largest difference {most:.1e}, together to the end: {reference.together}")


if __name__ == "__main__":
    main()
