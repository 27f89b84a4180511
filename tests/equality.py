"""Compares every answer on real models and real texts: the engine's with the transformers pipeline's.

    python tests/equality.py --models DIR --data DIR [--python-457 PYTHON] [--save-mode MODE] [--dtype DTYPE] [--own N]
        [--limit N] [--only TASK] [--json FILE]

Each model is exported in a save mode and dtype (torchscript, float32). The engine answers in micro-batches, the
pipeline one text at a time, without padding. Everything in an answer except numbers must be equal: labels, words,
offsets, order; no number may differ by more than 1e-4. Exit code 1 otherwise. For a lower precision it reports how many
answers changed, by the gate's own rule; 3 in 1,000 per line are allowed. (It is exported whatever the gate says. With
--own it gets enough texts to leave as many layers in float32 as needed.)

Ties are counted separately: rankings that differ only in the order of scores that are equal up to float32's
rounding; and generated texts where two tokens are so close that rounding decides, which depends on the batch: the
engine alone writes the pipeline's text. Tasks whose pipeline transformers 5 dropped use PYTHON, an
interpreter with transformers 4.57; without it they are skipped.

DIR of --models has the folders in CASES, and that of --data the texts: banking77_test.csv, wnut17_test.conll
and xquad.en.part1.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import transformers
from conftest import run_export
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from traceserve.building.config import formats
from traceserve.building.gate.findings import LIMITS
from traceserve.building.writers import WRITERS
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request

LIMIT = 1e-4
TIE = 1e-5  # relative difference of two scores
AT_ONCE = 64  # requests per engine call

# The texts.

ATOM = re.compile(r"\[[^\]]+]|Br|Cl|[BNOSPFICbcnosp]")
REACTIONS = (
    "CC(=O)O.OCC>>CC(=O)OCC.O",
    "O=C(O)c1ccccc1O.CC(=O)OC(C)=O>>CC(=O)Oc1ccccc1C(=O)O.CC(=O)O",
    "Nc1ccc(O)cc1.CC(=O)OC(C)=O>>CC(=O)Nc1ccc(O)cc1.CC(=O)O",
    "OB(O)c1ccccc1.Brc1ccccc1.O=C([O-])[O-].[K+].[K+]>>c1ccc(-c2ccccc2)cc1",
    "C=CC=C.O=C1C=CC(=O)O1>>O=C1OC(=O)C2CC=CCC12",
    "CC[O-].[Na+].BrCC>>CCOCC",
    "c1ccccc1.CC(=O)Cl>>CC(=O)c1ccccc1",
    "c1ccccc1.O=[N+]([O-])O>>O=[N+]([O-])c1ccccc1",
    "CC(C)=O.C[Mg]Br>>CC(C)(C)O",
    "O=Cc1ccccc1.C=P(c1ccccc1)(c1ccccc1)c1ccccc1>>C=Cc1ccccc1",
    "OC(=O)c1ccccc1.NCc1ccccc1.CCN=C=NCCCN(C)C>>O=C(NCc1ccccc1)c1ccccc1",
    "CC(C)(C)OC(=O)OC(=O)OC(C)(C)C.NCc1ccccc1>>CC(C)(C)OC(=O)NCc1ccccc1",
    "Brc1ccccc1.C1COCCN1>>c1ccc(N2CCOCC2)cc1",
    "C#Cc1ccccc1.[N-]=[N+]=NCc1ccccc1>>c1ccc(Cn2cc(-c3ccccc3)nn2)cc1",
    "Ic1ccccc1.C#Cc1ccccc1>>C(#Cc1ccccc1)c1ccccc1",
    "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
)


def banking77(data: Path) -> Iterator[Dict[str, str]]:
    """3,080 sentences to a bank."""
    with (data / "banking77_test.csv").open(encoding="utf-8", newline="") as stream:
        yield from ({"text": row["text"]} for row in csv.DictReader(stream))


def wnut17(data: Path) -> Iterator[Dict[str, str]]:
    """Sentences from the web, their tokens joined by spaces."""
    sentences = (data / "wnut17_test.conll").read_text(encoding="utf-8").split("\n\n")
    for sentence in sentences:
        words = [line.split("\t")[0] for line in sentence.split("\n") if line.strip()]
        if words:
            yield {"text": " ".join(words)}


def xquad(data: Path) -> Iterator[Dict[str, str]]:
    """Questions about paragraphs of encyclopedia articles."""
    articles = json.loads((data / "xquad.en.part1.json").read_text(encoding="utf-8"))["data"]
    for paragraph in (paragraph for article in articles for paragraph in article["paragraphs"]):
        for question in paragraph["qas"]:
            yield {"question": question["question"], "context": paragraph["context"]}


def reactions(data: Path) -> Iterator[Dict[str, str]]:
    """Well-known reactions with each atom masked in turn; and the first with every later one, for two masks."""
    for reaction in REACTIONS:
        atoms = [match.span() for match in ATOM.finditer(reaction)]
        for start, end in atoms:
            yield {"text": f"{reaction[:start]}[MASK]{reaction[end:]}"}
        first = atoms[0][1]
        for start, end in atoms[1:]:
            yield {"text": f"[MASK]{reaction[first:start]}[MASK]{reaction[end:]}"}


# What is compared.

Call = Tuple[List[Any], Dict[str, Any]]  # the pipeline's positional and keyword arguments


def by_text(inputs: Dict[str, Any], parameters: Dict[str, Any]) -> Call:
    return [inputs["text"]], parameters


def by_name(inputs: Dict[str, Any], parameters: Dict[str, Any]) -> Call:
    return [], {**inputs, **parameters}


class Case(NamedTuple):
    """A task on a model: the texts, their parameters, and the pipeline's call."""

    task: str
    model: str
    texts: Callable[[Path], Iterator[Dict[str, Any]]]
    parameters: Tuple[Dict[str, Any], ...]
    call: Callable[[Dict[str, Any], Dict[str, Any]], Call]
    config: Dict[str, Any] = {}  # of the export; read-only


STRATEGIES = ("none", "simple", "first", "average", "max")
CASES = (
    Case("sequence_classification", "banking77-minilm", banking77, ({"top_k": None},), by_text),
    Case(
        "token_classification",
        "wnut17-minilm",
        wnut17,
        tuple({"aggregation_strategy": strategy} for strategy in STRATEGIES),
        by_text,
    ),
    Case(
        "question_answering",
        "xquad-minilm",
        xquad,
        (
            {},
            {"max_seq_len": 128, "doc_stride": 32},
            {"top_k": 3, "handle_impossible_answer": True},
            {"top_k": 2, "align_to_words": False, "max_seq_len": 128, "doc_stride": 32},
        ),
        by_name,
        {"max_length": 384},
    ),
    Case("fill_mask", "rxnmapper-albert", reactions, ({}, {"targets": ["C", "N", "O", "c", "Cl"]}), by_text),
    Case("feature_extraction", "minilm", banking77, ({},), by_text),
    Case(
        "text_generation",
        "tinystories-260k-llama",
        banking77,
        ({"do_sample": False, "max_new_tokens": 32}, {"do_sample": False, "max_new_tokens": 24, "num_beams": 3}),
        by_text,
    ),
)


@dataclass
class Result:
    """A line of the table."""

    task: str
    model: str
    parameters: Dict[str, Any]
    texts: int
    different: int
    ties: int
    largest_difference: float
    seconds: float
    pipeline_seconds: float
    save_mode: str = "torchscript"
    dtype: str = "float32"
    passed: bool = True  # the gate, with the given samples
    kept: int = 0  # layers left in float32 in a lower precision
    example: str = ""

    @property
    def equal(self) -> bool:
        """Whether no more differ than allowed; and in float32 no number differs by more than the limit."""
        allowed = LIMITS[self.dtype].changed * self.texts
        return self.different <= allowed and (self.dtype != "float32" or self.largest_difference <= LIMIT)


def difference(answer: Any, expected: Any, ties: bool = False) -> float:
    """Return the largest difference of corresponding numbers; infinity if anything else differs.

    With `ties` a ranking may be reordered where scores are equal.
    """
    if ties and tied(answer, expected):
        return 0.0
    if isinstance(expected, dict):
        if not isinstance(answer, dict) or list(answer) != list(expected):
            return float("inf")
        return max((difference(answer[key], expected[key], ties) for key in expected), default=0.0)
    if isinstance(expected, list):
        if not isinstance(answer, list) or len(answer) != len(expected):
            return float("inf")
        if expected and isinstance(expected[0], float) and all(isinstance(value, float) for value in answer):
            return _finite(np.abs(np.subtract(answer, expected)).max())
        return max((difference(one, other, ties) for one, other in zip(answer, expected)), default=0.0)
    if isinstance(expected, (float, np.floating)):
        return _finite(answer - float(expected)) if isinstance(answer, float) else float("inf")
    return 0.0 if answer == expected else float("inf")


def _finite(value: float) -> float:
    """Return its size; NaN is infinitely wrong."""
    return abs(float(value)) if math.isfinite(value) else float("inf")


def tied(answer: Any, expected: Any) -> bool:
    """Return whether these are two rankings of the same things with the same scores."""
    rankings: List[Dict[str, float]] = []
    for value in (answer, expected):
        if not isinstance(value, list) or not all(isinstance(item, dict) and "score" in item for item in value):
            return False
        scores = [float(item["score"]) for item in value]
        if scores != sorted(scores, reverse=True):
            return False
        things = [json.dumps({key: item[key] for key in item if key != "score"}, sort_keys=True) for item in value]
        rankings.append(dict(zip(things, scores)))
    one, other = rankings
    return one.keys() == other.keys() and all(math.isclose(one[thing], other[thing], rel_tol=TIE) for thing in one)


# The two that answer.

Step = Callable[[int], None]  # this many more are done


def ask_engine(engine: Engine, requests: Sequence[Request], step: Step) -> List[Any]:
    """Return the engine's answers, and its errors unchanged."""
    values: List[Any] = []
    for start in range(0, len(requests), AT_ONCE):
        results = engine.answer(requests[start : start + AT_ONCE])
        values += [result.value if isinstance(result, Answer) else result for result in results]
        step(len(results))
    return values


def alone(engine: Engine, request: Request) -> Any:
    """Return the engine's answer to a request alone."""
    [value] = ask_engine(engine, [request], lambda count: None)
    return value


def ask_pipeline(kind: str, model: Path, calls: Sequence[Call], step: Step) -> Tuple[List[Any], float]:
    """Return the pipeline's answers and their seconds."""
    pipeline = transformers.pipeline(kind, model=str(model), device="cpu")
    values = []
    started = time.monotonic()
    for arguments, named in calls:
        values.append(pipeline(*arguments, **named))
        step(1)
    return values, time.monotonic() - started


# The same in the other interpreter, which need not have this project: it reports each step by a line.
ELSEWHERE = """
import json, sys, time, warnings
import transformers
warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
kind, model, asked, answered = sys.argv[1:]
pipeline = transformers.pipeline(kind, model=model, device="cpu")
with open(asked, encoding="utf-8") as stream:
    calls = json.load(stream)
values = []
started = time.monotonic()
for arguments, named in calls:
    values.append(pipeline(*arguments, **named))
    print(len(values), flush=True)
document = {"values": values, "seconds": time.monotonic() - started}
with open(answered, "w", encoding="utf-8") as stream:
    json.dump(document, stream, default=float)
"""


def ask_elsewhere(python: Path, kind: str, model: Path, calls: Sequence[Call], step: Step) -> Tuple[List[Any], float]:
    """Like ask_pipeline, with another interpreter."""
    with tempfile.TemporaryDirectory() as name:
        asked, answered = Path(name, "asked.json"), Path(name, "answered.json")
        asked.write_text(json.dumps(calls), encoding="utf-8")
        command = [str(python), "-c", ELSEWHERE, kind, str(model), str(asked), str(answered)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip().isdigit():
                    step(1)
        if process.returncode:
            raise SystemExit(f"{python} ended with {process.returncode}")
        document = json.loads(answered.read_text(encoding="utf-8"))
    return document["values"], document["seconds"]


def own_samples(texts: Sequence[Dict[str, Any]], count: int, file: Path) -> Optional[Path]:
    """Write a file of this many texts; None for zero."""
    if not count:
        return None
    chosen = texts[:: max(1, len(texts) // count)][:count]
    file.write_text("".join(json.dumps(text) + "\n" for text in chosen), encoding="utf-8")
    return file


def compare(case: Case, options: argparse.Namespace, progress: Progress) -> Iterator[Result]:
    """Return a result for each set of a case's parameters."""
    kind, model = TASKS[case.task].pipeline, options.models.resolve() / case.model
    texts = list(case.texts(options.data))[: options.limit]
    with tempfile.TemporaryDirectory() as name:
        config = {"model_name": str(model), "task": case.task, "save_mode": options.save_mode, "dtype": options.dtype}
        own = own_samples(texts, options.own, Path(name, "own.jsonl"))
        exported = run_export(
            Path(name, case.model), {**config, **case.config}, samples_file=own, allow_drift=options.dtype != "float32"
        )
        engine = Engine.load(Path(name, case.model))
        for parameters in case.parameters:
            requests = [Request(inputs, parameters) for inputs in texts]
            calls = [case.call(inputs, parameters) for inputs in texts]
            bar = progress.add_task(f"{case.task} {json.dumps(parameters)}", total=2 * len(texts))

            def step(count: int, bar: Any = bar) -> None:
                progress.advance(bar, count)

            started = time.monotonic()
            answers = ask_engine(engine, requests, step)
            seconds = time.monotonic() - started
            if known(kind):
                expected, pipeline_seconds = ask_pipeline(kind, model, calls, step)
            else:
                expected, pipeline_seconds = ask_elsewhere(options.python_457, kind, model, calls, step)
            found = [difference(answer, value) for answer, value in zip(answers, expected)]
            suspects = [i for i, value in enumerate(found) if not math.isfinite(value)]
            if engine.task.loop:
                answers = [alone(engine, requests[i]) if i in suspects else value for i, value in enumerate(answers)]
            if options.dtype == "float32":
                wrong = [i for i in suspects if not math.isfinite(difference(answers[i], expected[i], ties=True))]
            else:
                changed = [not engine.task.same(answer, value) for answer, value in zip(answers, expected)]
                wrong = suspects = [i for i, differs in enumerate(changed) if differs]
            example = f"{texts[wrong[0]]}: {answers[wrong[0]]}, not {expected[wrong[0]]}" if wrong else ""
            yield Result(
                case.task,
                case.model,
                parameters,
                len(texts),
                len(wrong),
                len(suspects) - len(wrong),
                max(filter(math.isfinite, found), default=0.0),
                round(seconds, 2),
                round(pipeline_seconds, 2),
                options.save_mode,
                options.dtype,
                exported.findings.passed,
                len(exported.manifest.receipt["in_float32"]),
                example,
            )


def known(kind: str) -> bool:
    """Return whether this interpreter's transformers has the pipeline."""
    return kind in transformers.pipelines.PIPELINE_REGISTRY.get_supported_tasks()


def show(results: Sequence[Result]) -> Table:
    """Print the results."""
    table = Table("task", "model", "parameters")
    lower = any(result.dtype != "float32" for result in results)
    for name in ("texts", "changed" if lower else "different", "ties", "largest difference", "seconds", "pipeline's"):
        table.add_column(name, justify="right")
    if lower:
        table.add_column("the gate")
    for result in results:
        table.add_row(
            result.task,
            result.model,
            json.dumps(result.parameters) if result.parameters else "",
            f"{result.texts:,}",
            f"[{'green' if result.equal else 'red'}]{result.different} ({result.different / result.texts:.2%})[/]",
            str(result.ties),
            f"{result.largest_difference:.1e}",
            f"{result.seconds:.1f}",
            f"{result.pipeline_seconds:.1f}",
            *([f"{'passed' if result.passed else 'refused'}, {result.kept} layers left"] if lower else []),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--python-457", type=Path, metavar="PYTHON")
    parser.add_argument("--save-mode", default="torchscript", choices=list(WRITERS))
    parser.add_argument("--dtype", default="float32", choices=list(LIMITS))
    parser.add_argument(
        "--own", type=int, default=0, metavar="N", help="give the gate N evenly spread texts as the user's own"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N texts of each")
    parser.add_argument("--only", action="append", choices=sorted({case.task for case in CASES}), metavar="TASK")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, as JSON")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results: List[Result] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for case in CASES:
            if options.only and case.task not in options.only:
                continue
            refusal = formats.refusal(options.save_mode, "cpu", options.dtype, TASKS[case.task])
            if refusal is not None:
                progress.console.print(f"{case.task}: left out: {refusal}")
                continue
            if not known(TASKS[case.task].pipeline) and options.python_457 is None:
                progress.console.print(f"{case.task}: left out without --python-457")
                continue
            results += compare(case, options, progress)
    Console(width=None if sys.stdout.isatty() else 160).print(show(results))
    for result in results:
        if result.example:
            print(f"{result.task} {result.parameters}: {result.example[:2000]}")
    if options.json:
        rows = [{**asdict(result), "equal": result.equal} for result in results]
        options.json.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(0 if results and all(result.equal for result in results) else 1)


if __name__ == "__main__":
    main()
