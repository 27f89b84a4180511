"""Text generation in process beside CTranslate2, in turn: a decoder, and two encoder-decoders.

    python tests/benchmarks/text_libraries.py --ctranslate2-python PYTHON [--dtype int8] [--families llama,marian,t5]

Each family is a checkpoint with random weights: a Llama of 135 million weights (as wide and deep as SmolLM2), a Marian as
large as the opus-mt models, and a T5 as large as t5-small. Both write the same number of greedy tokens after the same texts,
one text at a time and 16 at once, on as many threads. Medians of the rounds are reported; our time includes tokenizing and
decoding. CTranslate2 has no server, so this compares what a server could do at most; text_servers.py compares servers.

Its environment: `pip install ctranslate2 torch transformers sentencepiece`, with our versions of torch and transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tables
import text_models
from traceserve.building.gate.texts import SENTENCES
from traceserve_runtime import processor
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.settings import Settings
from traceserve_runtime.tasks.contract import Request

SAVE_MODES = {"float32": "torchscript", "int8": "openvino"}
PROMPTS = tuple(sentence for sentence in SENTENCES if 5 < len(sentence) < 100)

Write = Callable[[Sequence[str], int], float]  # texts and tokens each; seconds


def main() -> None:
    options = parse()
    for family in options.families:
        found: Dict[str, Dict[str, List[float]]] = {}
        with tempfile.TemporaryDirectory(prefix="libraries-") as name, contextlib.ExitStack() as running:
            model = text_models.FAMILIES[family](Path(name, "model"))
            task = "text_generation" if family == "llama" else "text2text_generation"
            ways: Dict[str, Write] = {"traceserve": ours(model, Path(name, "artifact"), task, options)}
            ways["CTranslate2"] = running.enter_context(ctranslate2(model, Path(name, "converted"), options))
            for turn in range(-1, options.rounds):
                for rows in options.rows:
                    texts = [PROMPTS[i % len(PROMPTS)] for i in range(rows)]
                    for way in sorted(ways, reverse=bool(turn % 2)):
                        seconds = ways[way](texts, options.new_tokens if turn >= 0 else 4)
                        if turn >= 0:  # the first warms up
                            found.setdefault(way, {}).setdefault(f"{rows}", []).append(
                                rows * options.new_tokens / seconds
                            )
        tables.save(options.json and options.json.with_suffix(f".{family}.json"), found)
        caption = f"{family}, {options.dtype}, {options.threads} threads, {processor.name()}"
        tables.show(rows_of(found, options.rows), options.markdown, caption)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__, rounds=5)
    parser.add_argument("--ctranslate2-python", type=Path, required=True, metavar="PYTHON")
    parser.add_argument("--dtype", default="float32", choices=sorted(SAVE_MODES), help="[%(default)s]")
    parser.add_argument(
        "--families", type=lambda text: text.split(","), default="llama,marian,t5", help="[%(default)s]"
    )
    parser.add_argument("--rows", type=tables.numbers, default="1,16", help="[%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=64, help="per text [%(default)s]")
    parser.add_argument("--threads", type=int, default=processor.cores(), help="of both [%(default)s]")
    return parser.parse_args()


def ours(model: Path, folder: Path, task: str, options: argparse.Namespace) -> Write:
    own = {"model_name": str(model), "task": task, "max_length": 256}
    text_models.built(folder, {**own, "save_mode": SAVE_MODES[options.dtype], "dtype": options.dtype})
    engine = Engine.load(folder, settings=Settings(options.threads))

    def write(texts: Sequence[str], tokens: int) -> float:
        asked = {"max_new_tokens": tokens, "min_new_tokens": tokens, "num_beams": 1}
        began = time.perf_counter()
        answers = engine.answer([Request({"text": text}, asked) for text in texts], Stats())
        seconds = time.perf_counter() - began
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return seconds

    return write


@contextlib.contextmanager
def ctranslate2(model: Path, work: Path, options: argparse.Namespace) -> Iterator[Write]:
    command = [str(options.ctranslate2_python), str(Path(__file__).with_name("ctranslate2_texts.py"))]
    command += ["--model", str(model), "--work", str(work), "--dtype", options.dtype, "--threads", str(options.threads)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def said() -> Dict[str, Any]:
        line = stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(command)} ended with {process.wait()}")
        heard: Dict[str, Any] = json.loads(line)
        return heard

    def write(texts: Sequence[str], tokens: int) -> float:
        stdin.write(json.dumps({"texts": list(texts), "tokens": tokens}) + "\n")
        stdin.flush()
        heard = said()
        if heard["tokens"] != len(texts) * tokens:
            raise SystemExit(f"CTranslate2 wrote {heard['tokens']} tokens, not {len(texts) * tokens}")
        return float(heard["seconds"])

    try:
        print("CTranslate2", said()["version"], file=sys.stderr)
        yield write
    finally:
        stdin.close()
        process.wait(60)


def rows_of(found: Dict[str, Dict[str, List[float]]], counts: Sequence[int]) -> List[tables.Row]:
    """Return tokens per second, and the median of each round's ratio."""
    ours, other = found["traceserve"], found["CTranslate2"]
    return [
        {
            "texts at once": f"{rows}",
            "traceserve, tokens/s": tables.figure(tables.median(ours[f"{rows}"])),
            "CTranslate2, tokens/s": tables.figure(tables.median(other[f"{rows}"])),
            "ratio": tables.figure(tables.median(one / two for one, two in zip(ours[f"{rows}"], other[f"{rows}"]))),
        }
        for rows in counts
    ]


if __name__ == "__main__":
    main()
