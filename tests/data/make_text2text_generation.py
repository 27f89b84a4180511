"""Makes text2text_generation.json: the texts of transformers 4.57's pipeline, which version 5 dropped.

    python tests/data/make_text2text_generation.py

with transformers 4.57 and this repository installed. The models are tiny and random; their weights depend only on their
names (tests/models.py), so they are the same under every version.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import transformers
from traceserve.building.gate.texts import SENTENCES

OUTPUT = Path(__file__).with_name("text2text_generation.json")
PARAMETERS: List[Dict[str, Any]] = [
    {"max_new_tokens": 16},  # the pipeline itself uses four beams
    {"max_new_tokens": 16, "num_beams": 1},
    {"max_new_tokens": 24, "num_beams": 3, "no_repeat_ngram_size": 2, "length_penalty": 2.0},
    {"max_new_tokens": 24, "num_beams": 5, "early_stopping": True, "length_penalty": 0.3},
    {"max_new_tokens": 12, "num_beams": 2, "early_stopping": "never", "repetition_penalty": 1.4},
]


def main() -> None:
    if not transformers.__version__.startswith("4.57"):
        sys.exit(f"this needs transformers 4.57, not {transformers.__version__}")
    cases = []
    for architecture in ("t5", "marian", "bart"):
        with tempfile.TemporaryDirectory() as name:
            folder = models.make(Path(name, architecture), architecture, "AutoModelForSeq2SeqLM")
            pipeline = transformers.pipeline("text2text-generation", model=str(folder), device="cpu")
            for parameters in PARAMETERS:
                for text in SENTENCES[1:20:3]:
                    [answer] = pipeline([text], **parameters)
                    cases.append(
                        {"architecture": architecture, "text": text, "parameters": parameters, "answer": answer}
                    )
    document = json.dumps({"transformers": transformers.__version__, "cases": cases}, ensure_ascii=False, indent=0)
    OUTPUT.write_text(document + "\n", encoding="utf-8")
    print(f"{OUTPUT.name}: {len(cases)} answers")


if __name__ == "__main__":
    main()
