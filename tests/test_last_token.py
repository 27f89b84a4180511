"""Classifiers on decoders: each row is answered by its last token, whatever its padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
import transformers
from conftest import run_export
from oracle import COLORS, TEXTS, answers, assert_equal
from traceserve_runtime.engine import Engine
from traceserve_runtime.runtimes import calling
from traceserve_runtime.tasks.contract import Request

END = 1  # "<end>", which begins and ends texts; "<pad>" is 0
# Texts that contain padding and end tokens, also at their end.
ASKED = [*TEXTS[:8], "a <end> b", "hello <end>", "<end> x <end><end>", "<end>", "x <pad> y", "yo <pad>"]


@pytest.mark.parametrize("save_mode", ["torchscript", "pretrained", "onnx"])
@pytest.mark.parametrize("pad_token_id", [None, END, -1])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.combinations
def test_equals_the_pipeline(
    architecture: str,
    pad_token_id: Any,
    save_mode: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The pipeline answers one text at a time; -1 occurs in old configurations, and is not a token."""
    source = checkpoint(architecture, pad_token_id=pad_token_id, **COLORS)
    run_export(tmp_path / "x", {"model_name": str(source), "save_mode": save_mode, "task": "sequence_classification"})
    pipeline = transformers.pipeline("text-classification", model=str(source), device="cpu")
    got = answers(Engine.load(tmp_path / "x"), [Request({"text": text}, {"top_k": None}) for text in ASKED])
    for text, answer in zip(ASKED, got):
        assert_equal(answer, pipeline(text, top_k=None), 1e-4, 1e-4)


def test_a_score_equals_the_pipeline_that_pads_with_the_end(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """As for rankers of replies and reward models: one label, and batches padded with the end token."""
    source = checkpoint("gpt2", pad_token_id=None, num_labels=1)
    run_export(tmp_path / "x", {"model_name": str(source), "task": "text_ranking"})
    pipeline = transformers.pipeline("text-classification", model=str(source), device="cpu")
    pipeline.model.config.pad_token_id = pipeline.tokenizer.eos_token_id
    pipeline.tokenizer.pad_token = pipeline.tokenizer.eos_token
    pairs = [{"text": TEXTS[0], "text_pair": document} for document in TEXTS[1:6]]
    [ranked] = answers(Engine.load(tmp_path / "x"), [Request({"query": TEXTS[0], "documents": TEXTS[1:6]})])
    expected = pipeline(pairs, batch_size=5, function_to_apply="sigmoid")
    for one, other in zip(ranked, expected):
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


HEADS: Dict[str, Dict[str, Any]] = {
    "token_classification": COLORS,
    "question_answering": {},
}


@pytest.mark.parametrize("save_mode", ["torchscript", "pretrained"])
@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_other_heads_need_no_padding_token(
    architecture: str,
    task: str,
    save_mode: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The gate compares each row with the original's, run alone."""
    kind = {"token_classification": "AutoModelForTokenClassification"}.get(task, "AutoModelForQuestionAnswering")
    source = checkpoint(architecture, kind, pad_token_id=None, **HEADS[task])
    config = {"model_name": str(source), "save_mode": save_mode, "task": task, "max_length": 64}
    assert run_export(tmp_path / "x", config).findings.passed


class Rewarding(transformers.LlamaForSequenceClassification):
    """A head of several layers, as in reward models."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.score = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, 1))


class Scaled(transformers.LlamaForSequenceClassification):
    """A head that is more than its layers."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        result = super().forward(*inputs, **named)
        result.logits = result.logits * 3
        return result


def config(**options: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.LlamaConfig(vocab_size=50, pad_token_id=None, **sizes, **options)


ROWS: List[List[int]] = [[5, 6, 7, 8, 9], [10, 11], [12, 2, 2]]


def test_a_head_of_several_layers() -> None:
    torch.manual_seed(0)
    model = Rewarding(config(num_labels=1)).eval()
    single = calling.Single(model, ("input_ids", "attention_mask"), ("logits",))
    ids, mask = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64)
    for i, row in enumerate(ROWS):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    with torch.no_grad():
        [got] = single(ids, mask)
        torch.testing.assert_close(got, torch.cat([model(torch.tensor([row])).logits for row in ROWS]))


def test_a_head_that_is_not_known_is_left_to_the_model() -> None:
    """Anything that would change the model's own numbers is not substituted."""
    torch.manual_seed(0)
    model = Scaled(config()).eval()
    single = calling.Single(model, ("input_ids", "attention_mask"), ("logits",))
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        [got] = single(ids, torch.ones_like(ids))
        torch.testing.assert_close(got, model(ids).logits)
