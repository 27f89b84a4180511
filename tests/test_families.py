"""Families with their own way of writing: each equals transformers' generate, or is refused."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import models
import pytest
import transformers
from conftest import run_export
from oracle import COLORS, TEXTS, answers, assert_equal, generated, written
from traceserve.errors import ExportError
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Request

V4 = transformers.__version__.startswith("4.")
RECURRENT = [] if V4 else list(models.RECURRENT)

# A family, its save modes (openvino: one that no other test writes with it), and whether a step reads only new tokens.
WRITTEN: Dict[str, Tuple[str, List[str], bool]] = {
    "bloom": ("text_generation", ["torchscript", "pretrained", "onnx"], True),
    "openai-gpt": ("text_generation", ["torchscript", "pretrained", "onnx", "openvino"], False),
    "mamba": ("text_generation", [*(["torchscript"] if RECURRENT else []), "pretrained"], False),
    **{name: ("text_generation", ["torchscript", "pretrained"], True) for name in RECURRENT},
    "led": ("text2text_generation", ["torchscript", "pretrained"], True),
    "blenderbot": ("text2text_generation", ["torchscript", "pretrained"], True),
    "blenderbot-small": ("text2text_generation", ["torchscript", "pretrained", "onnx"], True),
    "m2m_100": ("text2text_generation", ["torchscript", "pretrained", "onnx"], True),
    "encoder-decoder": ("text2text_generation", ["torchscript", "pretrained", "onnx"], True),
    "switch": ("text2text_generation", ["pretrained"], True),
}
# Before transformers 5 Switch cannot run on only an encoder's output (it is refused), and Mamba's own beam search does
# not reorder its state.
NEWER = {"switch", "mamba"}
OPTIONS: List[Dict[str, Any]] = [{"num_beams": 1}, {"num_beams": 3, "no_repeat_ngram_size": 2}]


def content(source: Path, task: str, save_mode: str) -> Dict[str, Any]:
    return {"model_name": str(source), "task": task, "save_mode": save_mode, "max_length": 64}


@lru_cache(maxsize=None)
def original(source: Path, task: str) -> Tuple[Any, Any]:
    model = getattr(transformers, TASKS[task].auto_model).from_pretrained(source).eval()
    return model, transformers.AutoTokenizer.from_pretrained(source)


@pytest.mark.parametrize(
    "architecture, save_mode",
    [(name, mode) for name, (_, modes, _) in WRITTEN.items() for mode in modes if not (V4 and name == "switch")],
)
@pytest.mark.combinations
def test_equals_generate(architecture: str, save_mode: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Texts of many lengths in one batch, including whole windows and one token more."""
    task = WRITTEN[architecture][0]
    source = checkpoint(architecture, TASKS[task].auto_model)
    run_export(tmp_path / "x", content(source, task, save_mode))
    engine = Engine.load(tmp_path / "x")
    model, tokenizer = original(source, task)
    fitting = [text for text in TEXTS if len(tokenizer(text)["input_ids"]) < 48]
    texts = [*fitting[:6], "a", *(" ".join(["a b"] * count) for count in (2, 3, 4, 5))]
    for options in OPTIONS[: 1 if V4 and architecture in NEWER else None]:
        requests = [Request({"text": text}, {"max_new_tokens": 12, **options}) for text in texts]
        expected = [generated(model, tokenizer, text, **{"max_new_tokens": 12, **options}) for text in texts]
        assert [written(value) for value in answers(engine, requests)] == expected
    # Their decoders' positions have names of their own, and no token is beyond the last.
    if architecture in ("led", "encoder-decoder"):
        assert answers(engine, [Request({"text": "a"}, {"max_new_tokens": 4000, "num_beams": 1})])


@pytest.mark.parametrize("architecture", [name for name in WRITTEN if not (V4 and name == "switch")])
def test_what_keeps_no_keys_and_values_reads_all_again(
    architecture: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    task, _, keeps_past = WRITTEN[architecture]
    source = checkpoint(architecture, TASKS[task].auto_model)
    manifest = run_export(tmp_path / "x", content(source, task, "pretrained")).manifest
    assert manifest.runtime["keeps_past"] is keeps_past


@pytest.mark.parametrize(
    "architecture", [name for name, (_, modes, _) in WRITTEN.items() if "torchscript" not in modes]
)
def test_a_refusal_names_the_save_mode_that_writes_it(
    architecture: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Experts depend on the tokens, and a recurrence on the text's length (before transformers 5): a trace keeps neither."""
    task, modes, _ = WRITTEN[architecture]
    with pytest.raises(ExportError, match=f"; try save_mode {' or '.join(modes)}$"):
        run_export(tmp_path / "x", content(checkpoint(architecture, TASKS[task].auto_model), task, "torchscript"))


@pytest.mark.parametrize("save_mode", ["torchscript", "pretrained"])
def test_what_writes_otherwise_than_it_reads_is_refused(
    save_mode: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("xlnet", "AutoModelForCausalLM")
    with pytest.raises(
        ExportError,
        match="^XLNetLMHeadModel does not write from cached keys and values, .* so no save_mode can write it$",
    ):
        run_export(tmp_path / "x", content(source, "text_generation", save_mode))


@pytest.mark.skipif(
    not hasattr(transformers, "OpenAIPrivacyFilterConfig"), reason="this transformers has not the model"
)
def test_experts_that_the_original_loops_over_are_traced_together(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """By OpenAI's privacy filter; afterwards the original has its own way again, with which the gate compares."""
    from traceserve.building.writers.tracing.wrapping import all_experts

    source = checkpoint("openai_privacy_filter", "AutoModelForTokenClassification")
    receipt = run_export(tmp_path / "x", content(source, "token_classification", "torchscript")).manifest.receipt
    assert receipt["passed"] and receipt["own_answers"] == 0 and receipt["largest_difference"] < 1e-5
    model: Any = transformers.AutoModelForTokenClassification.from_pretrained(source)
    with all_experts(model):
        assert model.config._experts_implementation == "grouped_mm"
    assert model.config._experts_implementation == "eager"


def test_a_trace_leaves_what_it_changed(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    from traceserve.building.writers.tracing.wrapping import traceable

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(value)
            return value * 2

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * 2

    before = vars(torch.autograd.Function)["apply"], torch.Tensor.as_strided, torch.Tensor.scatter
    one = torch.ones(2, requires_grad=True)
    with traceable(torch.nn.Linear(1, 1)):
        assert Double.apply(one).tolist() == [2, 2]
        windows = torch.arange(24.0).reshape(1, 6, 4).as_strided((1, 2, 4, 4), (24, 8, 4, 1))
        assert windows[0, 1].tolist() == torch.arange(8.0, 24.0).reshape(4, 4).tolist()
        assert torch.arange(6).as_strided((2, 2), (1, 2)).tolist() == [[0, 2], [1, 3]]
        marked = torch.jit.trace(mark, (torch.zeros(1, 3, dtype=torch.bool), torch.tensor([[1]])))
    assert marked(torch.zeros(1, 4, dtype=torch.bool), torch.tensor([[3]])).tolist() == [[False, False, False, True]]
    assert (vars(torch.autograd.Function)["apply"], torch.Tensor.as_strided, torch.Tensor.scatter) == before
    Double.apply(one).sum().backward()
    assert one.grad is not None and one.grad.tolist() == [2, 2]


def mark(mask: Any, indices: Any) -> Any:
    """Sparse attention's choice of positions, twice: by position, and by name."""
    chosen = mask.scatter(-1, indices, True)
    return mask.scatter(-1, indices, value=False) | chosen


def test_every_family_of_the_table_is_tried() -> None:
    assert set(models.WRITING) == {*WRITTEN, *models.RECURRENT, "xlnet"} - {"mamba"}


@pytest.mark.parametrize("save_mode", ["torchscript", "pretrained"])
@pytest.mark.parametrize("architecture", ["reformer", "nystromformer", "yoso"])
@pytest.mark.combinations
def test_an_encoder_equals_the_pipeline(
    architecture: str, save_mode: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Reformer and YOSO have separate training functions, which are traced as their forward pass."""
    source = checkpoint(architecture, **COLORS)
    run_export(tmp_path / "x", content(source, "sequence_classification", save_mode))
    assert_classifies_as_the_pipeline(tmp_path / "x", source, 64)


def assert_classifies_as_the_pipeline(folder: Path, source: Path, most: int) -> None:
    """Texts of many lengths up to `most` tokens in one batch; the pipeline answers one at a time."""
    pipeline = transformers.pipeline("text-classification", model=str(source), device="cpu")
    # transformers 4 also passes types, if the model's own tokenizer has them.
    pipeline.tokenizer.model_input_names = list(Engine.load(folder).manifest.inputs)
    texts = [text for text in TEXTS if len(pipeline.tokenizer(text)["input_ids"]) <= most][:8]
    for text, answer in zip(texts, answers(Engine.load(folder), [Request({"text": text}) for text in texts])):
        assert_equal(answer, pipeline([text])[0], 1e-4, 1e-4)


@pytest.mark.skipif(V4, reason="Qwen3.5 is since transformers 5")
def test_the_language_model_of_a_checkpoint_that_reads_images_too(tmp_path: Path) -> None:
    """Qwen3.5's checkpoints are of a class that no table of causal models has; its texts are those of the whole model."""
    family = models.RECURRENT["qwen3.5"]
    tokenizer = models.make_tokenizer(family.tokenizer)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = getattr(transformers, family.config)(**family.options, **ids, vocab_size=len(tokenizer))
    vision = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=text.to_dict(), vision_config=vision)
    whole = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    made = run_export(tmp_path / "x", {"model_name": str(tmp_path / "source"), "max_length": 64})
    assert made.manifest.task == "text_generation" and made.manifest.runtime["fixed_states"] == 6
    engine = Engine.load(tmp_path / "x")
    for prompt in TEXTS[1:4]:
        [answer] = answers(engine, [Request({"text": prompt}, {"max_new_tokens": 12, "num_beams": 1})])
        assert written(answer) == generated(whole, tokenizer, prompt, max_new_tokens=12, num_beams=1)
