"""Makes question_answering.json: answers of the question-answering pipeline, which transformers 5 dropped.

It needs this project and transformers 4.57, in their own environment:

    pip install --editable . transformers==4.57.6
    python tests/data/make_question_answering.py

The models are those of tests/models.py, whose weights are the same under every version; rerun this if that file or the
sentences of traceserve.building.samples change. Left out, and counted at the end, are
- requests that the pipeline cannot answer: a window without room for the requested overlap;
- answers of score 0: with fewer candidates than `top_k` the pipeline fills the list with arbitrary positions,
  some with the end before the start, or too long. Ours are never such;
- answers whose scores are so close that rounding decides their order.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Optional

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import transformers
from traceserve.building.gate.texts import SENTENCES, TEXTS

AUTO_MODEL = "AutoModelForQuestionAnswering"
QUESTIONS = [text for text in SENTENCES if "?" in text or "？" in text]
CONTEXTS = [text[:3000] for text in TEXTS if text]
LONG = [text for text in CONTEXTS if len(text) > 200]
PARAMETERS: List[Dict[str, Any]] = [
    {},
    {"top_k": 3},
    {"max_answer_len": 4, "top_k": 2},
    {"handle_impossible_answer": True, "top_k": 3},
    {"align_to_words": False},
    {"align_to_words": False, "top_k": 3, "max_answer_len": 30},
]
FOR_LONG: List[Dict[str, Any]] = [
    *PARAMETERS,
    {"doc_stride": 16},
    {"doc_stride": 32, "top_k": 3},
    {"max_seq_len": 96, "doc_stride": 8, "top_k": 3},
    {"max_seq_len": 96, "doc_stride": 24, "handle_impossible_answer": True, "top_k": 40, "max_answer_len": 3},
    {"max_seq_len": 128, "align_to_words": False, "top_k": 3},
]
NEAR = 1e-4  # relative difference of scores


def requests() -> List[Dict[str, Any]]:
    """Return the requests: every context with two sets of parameters, the long ones with all."""
    asked = []
    for i, context in enumerate(CONTEXTS):
        for k, parameters in enumerate(FOR_LONG if context in LONG else [PARAMETERS[i % 6], PARAMETERS[(i + 3) % 6]]):
            question = QUESTIONS[(i + 3 * k) % len(QUESTIONS)]
            asked.append({"question": question, "context": context, "parameters": parameters})
    return asked


def ask(pipeline: Any, request: Dict[str, Any], left_out: Dict[str, int]) -> Optional[List[Dict[str, Any]]]:
    """Return the pipeline's answers as a list, one more than requested if there is one; or None."""
    parameters = {**request["parameters"], "top_k": request["parameters"].get("top_k", 1) + 1}
    own = {key: request[key] for key in ("question", "context")}
    try:
        answers = pipeline(**own, **request["parameters"])
        more = pipeline(**own, **parameters)
    except BaseException as error:  # the tokenizers package panics, which is not an Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        left_out["cannot be answered"] += 1
        return None
    scores = [answer["score"] for answer in (more if isinstance(more, list) else [more])]
    if min(scores, default=0) <= 1e-12:
        left_out["a score of 0"] += 1
        return None
    if any(later > (1 - NEAR) * earlier for earlier, later in zip(scores, scores[1:])):
        left_out["scores too near"] += 1
        return None
    return answers if isinstance(answers, list) else [answers]


def main() -> None:
    """Write question_answering.json beside this file."""
    transformers.logging.set_verbosity_error()
    asked = requests()
    texts = list(dict.fromkeys(text for request in asked for text in (request["question"], request["context"])))
    left_out: Dict[str, int] = Counter()
    answers: Dict[str, Dict[str, Any]] = {}
    for architecture, family in models.ARCHITECTURES.items():
        if not family.encodes or AUTO_MODEL not in models.auto_models(architecture):
            continue
        with tempfile.TemporaryDirectory() as folder:
            models.make(Path(folder), architecture, AUTO_MODEL)
            pipeline = transformers.pipeline("question-answering", model=folder, device="cpu")
        own = {}
        for number, request in enumerate(asked):
            listed = ask(pipeline, request, left_out)
            if listed is not None:
                keys = ("start", "end", "answer")
                own[number] = [[float(f"{a['score']:.6g}"), *(a[key] for key in keys)] for a in listed]
        answers[architecture] = own
    lines = [f'"transformers": {json.dumps(transformers.__version__)}', f'"texts": {json.dumps(texts, indent=0)}']
    rows = [[texts.index(r["question"]), texts.index(r["context"]), r["parameters"]] for r in asked]
    lines.append('"requests": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    tables = [
        f'"{name}": {{\n' + ",\n".join(f'"{i}": {json.dumps(a, ensure_ascii=False)}' for i, a in own.items()) + "\n}"
        for name, own in answers.items()
    ]
    lines.append('"answers": {\n' + ",\n".join(tables) + "\n}")
    path = Path(__file__).with_name("question_answering.json")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{path.name}: {sum(map(len, answers.values()))} answers, {path.stat().st_size:,} bytes")
    print("left out: " + ", ".join(f"{reason}: {count}" for reason, count in left_out.items()))


if __name__ == "__main__":
    main()
