"""The changes by each dtype: in answers to a model's own texts and the built-in ones, in accuracy; and its speed.

python tests/benchmarks/precision.py --model FOLDER --task TASK --texts FILE.csv [--label COLUMN] [--dtypes float32,bfloat16]

Every dtype is exported by its own configuration, whether it passes the gate or not, and compared with the original in
float32 on all texts. `plain bfloat16` is `model.to(torch.bfloat16)`, and `naive int8` torch's own dynamic quantization
of every linear layer: traceserve does neither.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence

import tables
import torch
from traceserve.building.checkpoints.original import Original
from traceserve.building.config import parsing
from traceserve.building.export import export
from traceserve.building.exported import Exported
from traceserve.building.gate_options import GateOptions
from traceserve.building.samples import OwnSamples
from traceserve.building.speeds import measure_speeds
from traceserve.building.writers.lowering import precision
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request


def plain_bfloat16(original: Original, texts: Sequence[str]) -> Iterable[Original]:
    """Do the usual thing."""
    model: Any = copy.deepcopy(original.model)
    return [replace(original, model=model.to(torch.bfloat16), dtype="bfloat16")]


def naive_int8(original: Original, texts: Sequence[str]) -> Iterable[Original]:
    """Do the usual thing."""
    model = copy.deepcopy(original.model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    return [replace(original, model=quantized, dtype="int8")]


# Foreign ways, as (dtype, how the model is lowered).
OTHERS: Dict[str, Any] = {"plain bfloat16": ("bfloat16", plain_bfloat16), "naive int8": ("int8", naive_int8)}


def export_as(way: str, content: Dict[str, Any], folder: Path, texts: Path) -> Exported:
    """Export in a dtype, or in one of OTHERS."""
    dtype, lower = OTHERS.get(way, (way, None))
    own = precision.PRECISIONS[dtype]
    if lower is not None:
        precision.PRECISIONS[dtype] = own._replace(lower=lower, tracing=contextlib.nullcontext)
    parsed, _ = parsing.parse_config({**content, "dtype": dtype})
    folder.mkdir()
    try:
        gate = GateOptions(OwnSamples.read(texts), allow_drift=True)
        return export(parsing.LoadedConfig(parsed, folder, ()), folder.name, folder, lambda *_: None, gate)
    finally:
        precision.PRECISIONS[dtype] = own


def accuracy(folder: Path, requests: Sequence[Request], labels: Optional[List[str]]) -> Optional[float]:
    """Return the share of texts whose label comes first."""
    if labels is None:
        return None
    engine = Engine.load(folder)
    values: List[Any] = [answer.value for answer in engine.answer(requests) if isinstance(answer, Answer)]
    got = [value[0]["label"] for value in values]
    return sum(bool(one == other) for one, other in zip(got, labels)) / len(labels)


def main() -> None:
    parser = tables.parser(__doc__, rounds=3)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--task", default="sequence_classification", choices=sorted(TASKS))
    parser.add_argument("--texts", type=Path, required=True, help="a .csv with a column text")
    parser.add_argument("--label", metavar="COLUMN", help="the column of the right label")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N texts")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--dtypes", default="float32,bfloat16,plain bfloat16,int8,naive int8")
    options = parser.parse_args()
    with options.texts.open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))[: options.limit]
    labels = [line[options.label] for line in lines] if options.label else None
    content = {"model_name": str(options.model.resolve()), "task": options.task, "max_length": options.max_length}
    content.update(num_labels=None, long_inputs="truncate")
    with tempfile.TemporaryDirectory() as name:
        texts = Path(name, "texts.jsonl")
        texts.write_text("".join(json.dumps({"text": line["text"]}) + "\n" for line in lines))
        requests = OwnSamples.read(texts).requests(TASKS[options.task])
        made = {way: export_as(way, content, Path(name, way), texts) for way in options.dtypes.split(",")}
        speeds = measure_speeds({way: Path(name, way) for way in made}, requests, lambda *_: None)
        rows, found = [], []
        for way, exported in made.items():
            receipt, folder = exported.manifest.receipt, Path(name, way)
            size = sum(file.stat().st_size for file in folder.iterdir())
            elsewhere = receipt["answers_changed"] - receipt["own_answers_changed"]
            asked = receipt["answers"] - receipt["own_answers"]
            right = accuracy(folder, requests, labels)
            found.append({"way": way, **receipt, "accuracy": right, "speed": speeds[way], "bytes": size})
            rows.append(
                {
                    "dtype": way,
                    "the gate": "passed" if receipt["passed"] else "refused",
                    "changed, own texts": f"{receipt['own_answers_changed']} of {receipt['own_answers']:,}",
                    "changed, built-in texts": f"{elsewhere} of {asked}",
                    "accuracy": "" if right is None else f"{right:.2%}",
                    "largest difference": f"{receipt['largest_difference']:.1e}",
                    "requests/s, times the first": f"{speeds[way] / next(iter(speeds.values())):.2f}",
                    "artifact": f"{size / 1e6:.1f} MB",
                }
            )
    tables.show(rows, options.markdown)
    tables.save(options.json, found)


if __name__ == "__main__":
    main()
