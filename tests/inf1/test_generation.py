"""Text to text with a padded encoder and a padded decoder, equal to `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks.contract import Answer, Job, Request
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from inf1.conftest import WRITER

TEXTS = [
    "The train leaves at nine.",
    "Where is it?",
    "My parcel is three days late, and nobody tells me why that is so.",
    "Please cancel my order.",
    "This is the fifth text.",
]


@pytest.mark.parametrize("architecture", ["marian", "t5"])
def test_texts_are_those_of_generate(
    architecture: str, exported: Callable[..., Path], checkpoint: Callable[..., Path]
) -> None:
    """Greedily and with beams, which are more rows than any graph takes; also past the short target length."""
    engine = Engine.load(exported(architecture, "AutoModelForSeq2SeqLM", WRITER))
    source = checkpoint(architecture, "AutoModelForSeq2SeqLM")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    for parameters in ({"max_new_tokens": 38, "num_beams": 1}, {"max_new_tokens": 12, "num_beams": 3}):
        answers = engine.answer([Request({"text": text}, parameters) for text in TEXTS])
        assert texts(answers) == [generated(model, tokenizer, text, parameters) for text in TEXTS]


def texts(answers: List[Any]) -> List[str]:
    assert all(isinstance(answer, Answer) for answer in answers), answers
    return [answer.value["generated_text"] for answer in answers]


def generated(model: Any, tokenizer: Any, text: str, parameters: Dict[str, Any]) -> str:
    encoded = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(encoded["input_ids"], attention_mask=encoded["attention_mask"], **parameters)
    written: str = tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return written


def test_no_more_is_written_than_was_compiled(exported: Callable[..., Path]) -> None:
    engine = Engine.load(exported("marian", "AutoModelForSeq2SeqLM", WRITER))
    assert engine.manifest.facts["most_new_tokens"] == 40 and engine.manifest.runtime["targets"] == [32, 40]
    request = Request({"text": TEXTS[0]}, {"max_new_tokens": 500, "num_beams": 1})
    [row] = engine.task.encode([request])[0].rows  # type: ignore[union-attr]
    loop, member = engine.task.open_loop(engine.runner, Stats()), engine.task.member(Job(row, request))
    assert loop is not None
    loop.join(member)
    while loop.busy:
        loop.turn()
    output = engine.task.written(member)
    assert len(output["tokens"]) <= 40
