"""Packed weights against shared ones, in process and in turn: what one text and batches of them take.

python tests/benchmarks/packing.py --archive NAME.mar --texts FILE [--threads N] [--rounds 3]
"""

from __future__ import annotations

import random
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Dict, List, Tuple

import tables
import texts as sentences

SIZES = (1, 4, 16, 64)
BATCHES = {1: 120, 4: 40, 16: 16, 64: 6}  # of each size in a round


def main() -> None:
    parser = tables.parser(__doc__, rounds=3)
    parser.add_argument("--archive", type=Path, required=True, metavar="MAR")
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="a .csv with a column text, or lines")
    parser.add_argument("--threads", type=int, metavar="N", help="of each operator [one for each core]")
    options = parser.parse_args()
    from traceserve_runtime.engine import Engine
    from traceserve_runtime.settings import Settings
    from traceserve_runtime.tasks.contract import Request

    asked = [Request({"text": text}, {"long_inputs": "truncate"}) for text in sentences.read(options.texts)]
    random.Random(0).shuffle(asked)
    taken: Dict[Tuple[int, bool], List[float]] = {}
    with tempfile.TemporaryDirectory(prefix="packing-") as folder, tables.progress() as bar:
        with zipfile.ZipFile(options.archive) as packed:
            packed.extractall(folder)
        engines = {
            pack: Engine.load(Path(folder), settings=Settings(options.threads, None, pack)) for pack in (False, True)
        }
        for engine in engines.values():
            engine.warm_up()
            engine.measure()
        task = bar.add_task("", total=options.rounds * len(SIZES))
        for _ in range(options.rounds):
            for size in SIZES:
                bar.update(task, description=f"batches of {size}")
                for number in range(BATCHES[size]):
                    start = number * size % max(1, len(asked) - size)
                    for pack in sorted(engines, reverse=bool(number % 2)):
                        began = time.perf_counter()
                        engines[pack].answer(asked[start : start + size])
                        taken.setdefault((size, pack), []).append(1e3 * (time.perf_counter() - began))
                bar.advance(task)
    rows: List[Dict[str, str]] = []
    for size in SIZES:
        shared, own = (tables.median(taken[size, pack]) for pack in (False, True))
        figures = (tables.figure(shared), tables.figure(own), f"{own / shared:.2f}")
        rows.append(dict(zip(("texts at once", "shared, ms", "packed, ms", "ratio"), (str(size), *figures))))
    tables.save(options.json, rows)
    tables.show(rows, options.markdown)


if __name__ == "__main__":
    main()
