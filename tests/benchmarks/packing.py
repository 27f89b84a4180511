"""The duration of one text and of batches, in process and alternating: packed weights against shared ones; weights of a
checkpoint in half precision, packed in float16 against float32; unpadded tokens, with padding only in attention, against the
graph as traced; bfloat16's attention in float32 against the traced one; or two archives.

python tests/benchmarks/packing.py --archive NAME.mar --texts FILE [--what weights | halves | tokens | attention] [--rounds 3]
python tests/benchmarks/packing.py --archive NAME.mar --texts FILE --beside OTHER.mar
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Dict, List, Optional, Tuple
from unittest import mock

import building
import tables
import texts as sentences
from traceserve.building.writers.torchscript.weights import write_graph
from traceserve_hosts import libraries
from traceserve_runtime.engine import Engine
from traceserve_runtime.manifest import Manifest, sha256
from traceserve_runtime.runtimes.torchscript.reader import UNPADDED
from traceserve_runtime.settings import Settings

SIZES = (1, 4, 16, 37, 64)
BATCHES = {1: 120, 4: 40, 16: 16, 37: 8, 64: 6}  # per size in a round


def main() -> None:
    parser = tables.parser(__doc__, rounds=3)
    parser.add_argument("--archive", type=Path, required=True, metavar="MAR")
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="a .csv with a column text, or lines")
    parser.add_argument("--what", choices=WAYS, default="weights", help="[%(default)s]")
    parser.add_argument("--beside", type=Path, metavar="MAR", help="another archive to compare with, instead of --what")
    parser.add_argument("--threads", type=int, metavar="N", help="per operator [one per core]")
    options = parser.parse_args()
    libraries.set_defaults()  # a worker's; torch is not imported yet
    from traceserve_runtime.tasks.contract import Request

    asked = [Request({"text": text}, {"long_inputs": "truncate"}) for text in sentences.read(options.texts)]
    random.Random(0).shuffle(asked)
    taken: Dict[Tuple[int, str], List[float]] = {}
    with tempfile.TemporaryDirectory(prefix="packing-") as folder, tables.progress() as bar:
        own = building.unpacked(options.archive, Path(folder, "own"))
        if options.beside is None:
            engines = WAYS[options.what](own, options.threads)
        else:
            settings = Settings(options.threads)
            engines = {
                "the other": Engine.load(building.unpacked(options.beside, Path(folder, "other")), settings=settings)
            }
            engines["this archive"] = Engine.load(own, settings=settings)
        for engine in engines.values():
            engine.warm_up()
            engine.scheduler.measure()
        task = bar.add_task("", total=options.rounds * len(SIZES))
        for _ in range(options.rounds):
            for size in SIZES:
                bar.update(task, description=f"batches of {size}")
                for number in range(BATCHES[size]):
                    start = number * size % max(1, len(asked) - size)
                    for way in sorted(engines, reverse=bool(number % 2)):
                        began = time.perf_counter()
                        engines[way].answer(asked[start : start + size])
                        taken.setdefault((size, way), []).append(1e3 * (time.perf_counter() - began))
                bar.advance(task)
    rows: List[Dict[str, str]] = []
    for size in SIZES:
        before, after = (tables.median(taken[size, way]) for way in engines)
        figures = (tables.figure(before), tables.figure(after), f"{after / before:.2f}")
        rows.append(dict(zip(("texts at once", *(f"{way}, ms" for way in engines), "ratio"), (str(size), *figures))))
    tables.save(options.json, rows)
    tables.show(rows, options.markdown)


def weights(folder: Path, threads: Optional[int]) -> Dict[str, Engine]:
    """Shared by all workers, and packed for one."""
    return {
        way: Engine.load(folder, settings=Settings(threads, None, pack))
        for way, pack in (("shared", False), ("packed", True))
    }


def halves(folder: Path, threads: Optional[int]) -> Dict[str, Engine]:
    """Packed in float32, and in float16."""
    with mock.patch("traceserve_runtime.runtimes.torchscript.packing.is_half", return_value=False):
        engines = {"in float32": Engine.load(folder, settings=Settings(threads))}
    return {**engines, "in float16": Engine.load(folder, settings=Settings(threads))}


def tokens(folder: Path, threads: Optional[int]) -> Dict[str, Engine]:
    """In padded rows, as traced, and unpadded."""
    manifest = Manifest.read(folder)
    if not manifest.runtime.get(UNPADDED):
        raise SystemExit("the graph of this archive was not rewritten: it computes padding as traced")
    traced = Path(shutil.copytree(folder, folder.with_name("traced")))
    write_graph(traced, manifest.model_file)
    files = {name: sha256(traced / name) for name in manifest.files}
    replace(manifest, files=files, runtime={**manifest.runtime, UNPADDED: False}).write(traced)
    settings = Settings(threads)
    return {"traced": Engine.load(traced, settings=settings), "end to end": Engine.load(folder, settings=settings)}


def attention(folder: Path, threads: Optional[int]) -> Dict[str, Engine]:
    """As traced, and in float32."""
    with mock.patch("traceserve_runtime.runtimes.torchscript.attention.widen", return_value=0):
        engines = {"as traced": Engine.load(folder, settings=Settings(threads))}
    return {**engines, "in float32": Engine.load(folder, settings=Settings(threads))}


WAYS = {"weights": weights, "halves": halves, "tokens": tokens, "attention": attention}


if __name__ == "__main__":
    main()
