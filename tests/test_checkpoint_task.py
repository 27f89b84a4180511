"""A checkpoint's task: detected for "auto", and compared with the head if configured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import pytest
import torch
from models import auto_models, make
from safetensors.torch import load_file, save_file
from traceserve import cli
from traceserve.building.checkpoints import sources, task
from traceserve.building.config import task_names
from traceserve.building.config.parsing import parse_config
from traceserve.errors import ConfigError, SourceError
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.tasks import TASKS

CLASSIFIERS = ("sequence_classification", "zero_shot_classification", "text_ranking")
# Each auto class, its checkpoints' task, and the other allowed tasks.
HEADS: Dict[str, Tuple[str, Tuple[str, ...]]] = {
    "AutoModelForSequenceClassification": ("sequence_classification", CLASSIFIERS),
    "AutoModelForTokenClassification": ("token_classification", ("token_classification",)),
    "AutoModelForQuestionAnswering": ("question_answering", ("question_answering",)),
    "AutoModelForMaskedLM": ("fill_mask", ("fill_mask",)),
    "AutoModelForCausalLM": ("text_generation", ("text_generation",)),
    "AutoModelForSeq2SeqLM": ("text2text_generation", ("text2text_generation",)),
}
FAMILIES = ("bert", "roberta", "modernbert", "gpt2", "llama", "t5")
NAMED = [(family, head) for family in FAMILIES for head in HEADS if head in auto_models(family)]
Checkpoints = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    made: Dict[Any, Path] = {}

    def checkpoint(family: str, head: str, **options: Any) -> Path:
        key = (family, head, json.dumps(options))
        if key not in made:
            made[key] = make(tmp_path_factory.mktemp("checkpoint") / "x", family, head, **options)
        return made[key]

    return checkpoint


def copied(source: Path, folder: Path, **changes: Any) -> Path:
    """Copy with these changes to config.json; None removes a key."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    facts = {**json.loads((folder / "config.json").read_text(encoding="utf-8")), **changes}
    facts = {key: value for key, value in facts.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def found(folder: Path, **content: Any) -> Tuple[str, str]:
    resolved = task.resolve(parse_config({"model_name": "x", **content})[0], folder)
    return resolved.config.task, resolved.reason


def refusal(folder: Path, **content: Any) -> str:
    with pytest.raises(SourceError) as raised:
        found(folder, **content)
    return raised.value.message


def allowed(folder: Path) -> Tuple[str, ...]:
    """Return the tasks that may be configured for a checkpoint."""
    answers = []
    for name in TASKS:
        try:
            assert found(folder, task=name) == (name, "")
            answers.append(name)
        except SourceError as error:
            assert f"holds no trained weights for the task {name}" in error.message
    return tuple(answers)


@pytest.mark.parametrize("family, head", NAMED)
def test_the_architecture_names_the_task_and_forbids_the_others(
    family: str, head: str, checkpoints: Checkpoints
) -> None:
    """Any model has features; other heads often share weight names, such as `classifier`."""
    folder = checkpoints(family, head, **({"num_labels": 3} if "Classification" in head else {}))
    expected, others = HEADS[head]
    [architecture] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    assert found(folder) == (expected, f"from architectures: {architecture}")
    assert set(allowed(folder)) == {*others, "feature_extraction"}


def test_a_refusal_names_the_right_task(checkpoints: Checkpoints) -> None:
    folder = checkpoints("modernbert", "AutoModelForTokenClassification", num_labels=3)
    assert refusal(folder, task="sequence_classification") == (
        "x holds no trained weights for the task sequence_classification: architectures: "
        'ModernBertForTokenClassification; set "task": "token_classification", or name a checkpoint that was fine-tuned for '
        "sequence_classification"
    )
    assert found(folder, task="sequence_classification", allow_untrained_head=True)[0] == "sequence_classification"


# Without `architectures`: a family, a head, and the tasks that its weights allow.
BY_WEIGHTS = [
    ("bert", "AutoModelForTokenClassification", ("token_classification",)),
    ("bert", "AutoModelForQuestionAnswering", ("question_answering",)),
    ("bert", "AutoModelForMaskedLM", ("fill_mask",)),
    ("bert", "AutoModel", ("feature_extraction",)),
    # Token classifiers had the pooler too, until 2020.
    ("bert", "AutoModelForSequenceClassification", ("sequence_classification", "token_classification")),
    ("roberta", "AutoModelForSequenceClassification", ("sequence_classification",)),
    ("roberta", "AutoModelForTokenClassification", ("token_classification",)),
    ("modernbert", "AutoModelForTokenClassification", ("sequence_classification", "token_classification")),
    ("llama", "AutoModelForSequenceClassification", ("sequence_classification",)),
    ("llama", "AutoModelForTokenClassification", ("token_classification",)),
    ("llama", "AutoModelForCausalLM", ("text_generation",)),
    ("gpt2", "AutoModelForCausalLM", ("feature_extraction", "text_generation")),
    ("bart", "AutoModelForSeq2SeqLM", ("feature_extraction", "text2text_generation")),
    ("t5", "AutoModelForSeq2SeqLM", ("feature_extraction", "text2text_generation")),
]


@pytest.mark.parametrize("family, head, tasks", BY_WEIGHTS)
def test_weights_tell_where_no_architecture_does(
    family: str, head: str, tasks: Tuple[str, ...], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    options = {"num_labels": 3} if "Classification" in head else {}
    folder = copied(checkpoints(family, head, **options), tmp_path / "x", architectures=None)
    if len(tasks) == 1:
        assert found(folder)[0] == tasks[0]
    else:
        assert refusal(folder).endswith('set "task": ' + " or ".join(f'"{name}"' for name in tasks))
    legal = allowed(folder)
    for name in TASKS:
        fits = name in tasks or name == "feature_extraction"
        if TASKS[name].auto_model not in ("AutoModelForSequenceClassification", "AutoModelForMaskedLM"):
            assert (name in legal) is fits


@pytest.mark.parametrize("pickled", [False, True])
def test_weights_tell_of_a_class_of_ones_own(pickled: bool, checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints("bert", "AutoModelForTokenClassification", num_labels=3)
    folder = copied(source, tmp_path / "x", architectures=["EntityTagger"])
    if pickled:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    assert found(folder)[0] == "token_classification"
    assert allowed(folder) == ("token_classification", "feature_extraction")


@pytest.mark.parametrize("name", ["BertCRF", "BertCRFForTokenClassification"])
def test_a_head_that_nothing_reads_whole_is_no_tasks(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Such as a layer after the classifier's outputs: without it other labels would be chosen."""
    source = checkpoints("bert", "AutoModelForTokenClassification", num_labels=3)
    folder = copied(source, tmp_path / "x", architectures=[name])
    if name.endswith("ForTokenClassification"):
        assert found(folder)[0] == "token_classification"
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "crf.transitions": torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    assert f"x is for none of the tasks here: architectures: {name}, and a head of" in refusal(folder)
    assert "crf.transitions" in refusal(folder, task="token_classification")


def test_a_model_of_pretraining_fills_masks(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints("bert", "AutoModelForPreTraining")
    assert found(source)[0] == "fill_mask" and set(allowed(source)) == {"fill_mask", "feature_extraction"}
    electra = checkpoints("electra", "AutoModelForPreTraining")  # detects replaced tokens, but fills no mask
    assert "x is for none of the tasks here" in refusal(electra) and allowed(electra) == ("feature_extraction",)


def test_heads_that_no_task_reads(checkpoints: Checkpoints) -> None:
    folder = checkpoints("bert", "AutoModelForMultipleChoice")
    assert "x is for none of the tasks here: architectures: BertForMultipleChoice" in refusal(folder)
    assert "no task here reads that head" in refusal(folder, task="sequence_classification")
    assert allowed(folder) == ("feature_extraction",)


def test_a_model_that_writes_fills_masks_when_it_is_told_to(checkpoints: Checkpoints) -> None:
    folder = checkpoints("bart", "AutoModelForSeq2SeqLM")
    assert found(folder)[0] == "text2text_generation"
    assert set(allowed(folder)) == {"text2text_generation", "fill_mask", "feature_extraction"}


def test_a_decoder_without_its_head_writes_by_its_embeddings(checkpoints: Checkpoints) -> None:
    folder = checkpoints("gpt2", "AutoModel")
    assert refusal(folder).endswith('set "task": "feature_extraction" or "text_generation"')
    assert set(allowed(folder)) == {"text_generation", "feature_extraction"}


def test_classes_of_another_framework_have_the_same_heads(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints("bert", "AutoModelForTokenClassification", num_labels=3)
    folder = copied(source, tmp_path / "x", architectures=["TFBertForTokenClassification"])
    assert found(folder)[0] == "token_classification"


def test_auto_map_names_the_head_of_a_checkpoints_own_code(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints("bert", "AutoModelForTokenClassification", num_labels=3)
    code = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModel": "modeling_own.OwnModel",
        "AutoModelForTokenClassification": "org/code--modeling_own.OwnTagger",
    }
    changes = {"model_type": "own", "auto_map": code}
    folder = copied(source, tmp_path / "x", architectures=["OwnTagger"], **changes)
    assert found(folder) == ("token_classification", "from architectures: OwnTagger")
    assert '"token_classification"' in refusal(folder, task="sequence_classification")
    base = copied(source, tmp_path / "base", architectures=["OwnModel"], **changes)
    assert found(base)[0] == "feature_extraction"
    unknown = copied(source, tmp_path / "unknown", architectures=["OwnSomething"], **changes)
    assert "can be for several tasks" in refusal(unknown)


NLI = {"0": "contradiction", "1": "neutral", "2": "entailment"}
# Files beside a classifier's weights; the task, or the undecided candidates.
CLASSIFIER_FILES: Dict[str, Tuple[Dict[str, Any], Dict[str, str], Any]] = {
    "labels": ({"id2label": {"0": "red", "1": "green"}}, {}, "sequence_classification"),
    "one output": ({"id2label": {"0": "LABEL_0"}}, {}, ("sequence_classification", "text_ranking")),
    "cross-encoder": (
        {"id2label": {"0": "LABEL_0"}, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        {},
        "text_ranking",
    ),
    "older cross-encoder": (
        {"id2label": {"0": "LABEL_0"}, "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        {},
        "text_ranking",
    ),
    "cross-encoder of classes": (
        {"id2label": {"0": "a", "1": "b"}, "sentence_transformers": {"version": "5.0"}},
        {},
        "sequence_classification",
    ),
    "cross-encoder with modules": (
        {"id2label": {"0": "LABEL_0"}},
        {"config_sentence_transformers.json": '{"model_type": "CrossEncoder"}', "modules.json": "[]"},
        "text_ranking",
    ),
    "cross-encoder of several outputs": (
        {"id2label": {"0": "a", "1": "b", "2": "c"}},
        {"config_sentence_transformers.json": '{"model_type": "CrossEncoder"}', "modules.json": "[]"},
        "sequence_classification",
    ),
    "cross-encoder of inference": (
        {"id2label": NLI},
        {"config_sentence_transformers.json": '{"model_type": "CrossEncoder"}'},
        ("sequence_classification", "zero_shot_classification"),
    ),
    "inference": ({"id2label": NLI}, {}, ("sequence_classification", "zero_shot_classification")),
    "inference of two": (
        {"id2label": {"0": "entailment", "1": "not_entailment"}},
        {},
        ("sequence_classification", "zero_shot_classification"),
    ),
    "inference with a card": (
        {"id2label": NLI},
        {"README.md": "---\nlicense: mit\npipeline_tag: zero-shot-classification\n---\n# A model\n"},
        "zero_shot_classification",
    ),
    "a card of another head": (
        {"id2label": NLI},
        {"README.md": "---\npipeline_tag: fill-mask\n---\n"},
        ("sequence_classification", "zero_shot_classification"),
    ),
    "a card's text": (
        {"id2label": NLI},
        {"README.md": "# A model\npipeline_tag: zero-shot-classification\n"},
        ("sequence_classification", "zero_shot_classification"),
    ),
    "sentence-transformers": (
        {},
        {"modules.json": '[{"type": "sentence_transformers.models.Transformer"}]'},
        "feature_extraction",
    ),
}


@pytest.mark.parametrize("name", CLASSIFIER_FILES)
def test_files_decide_between_tasks_that_share_a_head(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    facts, files, expected = CLASSIFIER_FILES[name]
    outputs = len(facts.get("id2label", "ab"))
    source = checkpoints("bert", "AutoModelForSequenceClassification", num_labels=outputs)
    folder = copied(source, tmp_path / "x", **facts)
    for file, text in files.items():
        mark = "\ufeff" if file == "README.md" else ""  # as by some editors; JSON with one is refused
        (folder / file).write_text(mark + text, encoding="utf-8")
    if isinstance(expected, str):
        assert found(folder)[0] == expected
    else:
        assert refusal(folder).endswith('set "task": ' + " or ".join(f'"{candidate}"' for candidate in expected))
        for candidate in expected:
            assert found(folder, task=candidate)[0] == candidate


@pytest.mark.parametrize(
    ("content", "words"), [("\ufeff[]", "begins with a byte-order mark of UTF-8"), ("[" * 200_000, "is no valid JSON")]
)
@pytest.mark.parametrize("file", ["config.json", "config_sentence_transformers.json", "modules.json"])
def test_json_that_is_refused_elsewhere_is_refused_here(
    file: str, content: str, words: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = copied(checkpoints("bert", "AutoModelForMaskedLM"), tmp_path / "x")
    (folder / file).write_text(content, encoding="utf-8")
    assert f"{file} {words}" in refusal(folder)


def test_a_sparse_encoder_is_refused_by_name(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = copied(checkpoints("bert", "AutoModelForMaskedLM"), tmp_path / "x")
    (folder / "config_sentence_transformers.json").write_text('{"model_type": "SparseEncoder"}', encoding="utf-8")
    assert "x is a SparseEncoder of sentence-transformers" in refusal(folder)
    assert found(folder, task="fill_mask")[0] == "fill_mask"


def test_a_cross_encoder_that_writes_is_no_classifier(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = copied(checkpoints("gpt2", "AutoModelForCausalLM"), tmp_path / "x")
    (folder / "config_sentence_transformers.json").write_text('{"model_type": "CrossEncoder"}', encoding="utf-8")
    assert found(folder)[0] == "text_ranking"


def test_what_the_found_task_forbids_is_refused(checkpoints: Checkpoints) -> None:
    folder = checkpoints("bert", "AutoModelForTokenClassification", num_labels=3)
    with pytest.raises(ConfigError, match="token_classification has no parameter top_k"):
        found(folder, parameters={"top_k": 2})
    assert found(checkpoints("bert", "AutoModelForMaskedLM"), parameters={"top_k": 2})[0] == "fill_mask"


@pytest.mark.parametrize("content", [{}, {"task": "sequence_classification"}])
@pytest.mark.parametrize("keys, value", [({}, "bert"), ({"type": "roberta"}, "roberta")])
def test_a_missing_model_type_is_named(
    keys: Dict[str, str], value: str, content: Dict[str, str], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = copied(checkpoints("bert", "AutoModelForSequenceClassification"), tmp_path / "x", **keys)
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({key: facts[key] for key in facts if key != "model_type"}))
    with pytest.raises(SourceError, match=f'its config.json has no model_type; add "model_type": "{value}", in a copy'):
        found(folder, **content)


def test_a_gguf_file_is_a_text_generators(tmp_path: Path) -> None:
    assert found(tmp_path, gguf_file="x.gguf") == ("text_generation", "from gguf_file: x.gguf")


@pytest.mark.parametrize("content", [{}, {"task": "fill_mask"}])
def test_architectures_that_are_no_list_are_refused(
    content: Dict[str, str], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = copied(checkpoints("bert", "AutoModelForMaskedLM"), tmp_path / "x", architectures="BertForMaskedLM")
    with pytest.raises(SourceError, match="architectures .*should be a list of names, not 'BertForMaskedLM'"):
        found(folder, **content)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("content", [{}, {"task": "sequence_classification"}])
@pytest.mark.parametrize(
    "id2label, reason",
    [
        ({"0": "a", "1": "b", "2": "c"}, r"its config.json names 3 labels \(id2label\), but its head has 5 outputs"),
        (None, "its config.json names no labels, so 2 are taken, but its head has 5 outputs"),
        ({"0": "a", "x": "b"}, 'should be an object like {"0": "name", "1": "name"}'),
        (["a", "b", "c", "d", "e"], 'should be an object like {"0": "name", "1": "name"}'),
    ],
)
def test_a_head_has_an_output_for_each_label(
    id2label: Any, reason: str, content: Dict[str, str], family: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source = checkpoints(family, "AutoModelForSequenceClassification", num_labels=5)
    folder = copied(source, tmp_path / "x", id2label=id2label, label2id=None)
    with pytest.raises(SourceError, match=reason):
        found(folder, **content)


def test_a_fetched_checkpoint_knows_its_task(checkpoints: Checkpoints) -> None:
    folder = checkpoints("bert", "AutoModelForTokenClassification", num_labels=3)
    checkpoint = sources.fetch_checkpoint(parse_config({"model_name": str(folder)})[0], folder)
    assert (checkpoint.task, checkpoint.task_found) == (
        "token_classification",
        "from architectures: BertForTokenClassification",
    )
    with pytest.raises(SourceError, match='set "task": "token_classification"'):
        sources.fetch_checkpoint(parse_config({"model_name": str(folder), "task": "question_answering"})[0], folder)


def test_the_build_tells_the_task_and_by_what_it_was_found(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    folder = checkpoints("bert", "AutoModelForTokenClassification", num_labels=3)
    content = {"model_name": str(folder), "dtype": "float32", "max_length": 16}
    Path("setup_config.json").write_text(json.dumps(content), encoding="utf-8")
    assert cli.main(["export", "--output", "artifacts/tagger"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "task token_classification (from architectures: BertForTokenClassification)" in printed
    assert Manifest.read(Path("artifacts/tagger")).task == "token_classification"


def test_a_wrong_head_is_refused_before_its_weights_are_there(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = copied(checkpoints("bert", "AutoModelForTokenClassification", num_labels=3), tmp_path / "x")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match='set "task": "token_classification"'):
        task.check_early(parse_config({"model_name": "x", "task": "question_answering"})[0], folder)
    with pytest.raises(ConfigError, match="has no parameter top_k"):
        task.check_early(parse_config({"model_name": "x", "parameters": {"top_k": 2}})[0], folder)
    task.check_early(parse_config({"model_name": "x"})[0], folder)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ner", "token_classification"),
        ("token-classification", "token_classification"),
        ("text-classification", "sequence_classification"),
        ("sentiment-analysis", "sequence_classification"),
        ("question-answering", "question_answering"),
        ("fill-mask", "fill_mask"),
        ("feature-extraction", "feature_extraction"),
        ("text-generation", "text_generation"),
        ("text2text-generation", "text2text_generation"),
        ("zero-shot-classification", "zero_shot_classification"),
        ("text-ranking", "text_ranking"),
        ("rerank", "text_ranking"),
    ],
)
@pytest.mark.parametrize("key", ["task", "mode"])
def test_a_pipelines_name_is_its_task(key: str, name: str, expected: str) -> None:
    assert parse_config({"model_name": "x", key: name})[0].task == expected


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("sentence-similarity", "feature_extraction"),
        ("summarization", "text2text_generation"),
        ("translation", "text2text_generation"),
        ("translation_en_to_de", "text2text_generation"),
    ],
)
def test_a_name_that_promises_more_is_refused_with_the_word(name: str, word: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config({"model_name": "x", "task": name})
    assert f'task is "{name}"' in raised.value.message
    assert f'write "{word}"' in raised.value.message


def test_each_alias_is_for_a_task() -> None:
    assert set(task_names.ALIASES.values()) == set(TASKS) and not set(task_names.ALIASES) & set(TASKS)
