"""Configuration files in practice: JSON with a byte-order mark, the pytorch/serve example's YAML, its labels by
location."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from test_loading import COLORS, original
from traceserve.building.config.parsing import load_config
from traceserve.errors import ConfigError

# From the example's model-config.yaml, with users' additions.
EXAMPLE = """
minWorkers: 1
maxWorkers: 2
batchSize: 8
maxBatchDelay: 50
responseTimeout: 120
maxRetryTimeoutInSec: 60
clientTimeoutInMills: 60000
deviceType: "gpu"
handler:
  model_name: bert-base-uncased
  mode: sequence_classification
  do_lower_case: true
  num_labels: 2
  save_mode: pretrained
  max_length: 150
  captum_explanation: true
  embedding_name: bert
  BetterTransformer: false
  model_parallel: false
pt2:
  compile:
    enable: True
    backend: inductor
"""


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert raised.value.message.startswith(str(path))
    return raised.value.message


@pytest.mark.parametrize("name", ["model-config.yaml", "mine.YML"])
def test_the_examples_yaml(name: str, tmp_path: Path) -> None:
    loaded = load_config(write(tmp_path / name, EXAMPLE))
    config = loaded.config
    assert (config.model_name, config.task, config.save_mode) == (
        "bert-base-uncased",
        "sequence_classification",
        "pretrained",
    )
    assert (config.num_labels, config.max_length) == (2, 150)
    assert (config.batch_size, config.max_batch_delay, config.response_timeout) == (8, 50, 120)
    assert config.client_timeout == 60_000
    told = [note.split(" has no meaning here: ")[0] for note in loaded.notes]
    for key in ("minWorkers", "maxWorkers", "maxRetryTimeoutInSec", "deviceType", "pt2", "BetterTransformer"):
        assert key in told
    assert config.captum_explanation is True and config.embedding_name == "bert"
    assert loaded.folder == tmp_path.resolve()


def test_the_examples_yaml_for_cpp(tmp_path: Path) -> None:
    text = """
batchSize: 2
handler:
  model_so_path: "bert-seq.so"
  tokenizer_path: "tokenizer.json"
  mapping: "index_to_name.json"
  model_name: "bert-base-uncased"
  mode: "sequence_classification"
  num_labels: 2
  max_length: 150
"""
    write(tmp_path / "index_to_name.json", {"0": "a", "1": "b"})
    loaded = load_config(write(tmp_path / "model-config.yaml", text))
    assert (loaded.config.index_to_name, loaded.config.batch_size) == ("index_to_name.json", 2)
    assert [note.split(" ")[0] for note in loaded.notes] == ["model_so_path", "tokenizer_path"]


def test_setup_config_as_yaml(tmp_path: Path) -> None:
    assert load_config(write(tmp_path / "mine.yaml", "model_name: x\nmax_length: 16\n")).config.max_length == 16


@pytest.mark.parametrize(
    "text, reason",
    [
        ("handler: [1]", "handler should hold keys and values, as model_name: NAME"),
        ("- a", "the configuration should be a JSON object"),
        ("handler: {model_name: x}\nbatchsize: 3", "batchsize: not supported beside handler; supported are batchSize"),
        ("handler: {model_name: x, batch_size: 4}\nbatchSize: 8", "batch_size is 4 under handler, and 8 beside it"),
        ("model_name: x\nmodel_name: y", "the key model_name is given twice"),
        ("model_name: x\n1: y", "unknown key 1"),
        ("a: b: c", "cannot be read"),
        ("handler: {model_name: x, mode: fortune_telling}", 'mode is "fortune_telling"'),
    ],
)
def test_yaml_that_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    assert reason in refusal(write(tmp_path / "model-config.yaml", text))


def test_a_byte_order_mark_is_no_part_of_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "setup_config.json"
    path.write_text('{"model_name": "x"}', encoding="utf-8-sig")
    assert load_config(path).config.model_name == "x"
    path.write_text('{"model_name": "x"}', encoding="utf-16")
    assert "save it as UTF-8" in refusal(path)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is a folder; name the configuration in it"


@pytest.mark.parametrize("name", ["setup_config.json", "mine.yaml"])
def test_a_configuration_that_is_nested_too_deep(name: str, tmp_path: Path) -> None:
    assert "it is nested too deep" in refusal(write(tmp_path / name, "[" * 100_000))


@pytest.mark.parametrize("depth", [100, 500, 900, 990])
def test_a_value_that_is_nested_deep(depth: int, tmp_path: Path) -> None:
    text = f'{{"model_name": "x", "max_length": {"[" * depth}{"]" * depth}}}'
    refusal(write(tmp_path / "setup_config.json", text))


def test_a_comment_in_json(tmp_path: Path) -> None:
    told = refusal(write(tmp_path / "setup_config.json", '{"model_name": "x", // mine\n"max_length": 32}'))
    assert told.endswith("; JSON has no comments, and no comma before } or ]")


@pytest.mark.parametrize("text", [None, "", "[]", '{"0": 1}'])
def test_labels_are_read_with_the_configuration(text: Any, tmp_path: Path) -> None:
    content = {"model_name": "org/nothing", "task": "sequence_classification", "index_to_name": "names.json"}
    path = write(tmp_path / "setup_config.json", content)
    if text is not None:
        write(tmp_path / "names.json", text)
    with pytest.raises(ConfigError, match=f"^index_to_name: {tmp_path / 'names.json'} (cannot be read|should hold)"):
        load_config(path)
    write(tmp_path / "names.json", {"0": "a"})
    assert load_config(path).config.index_to_name == "names.json"


LABELS = ["Seq_classification_artifacts/index_to_name.json", "Token_classification_artifacts/index_to_name.json"]


@pytest.mark.parametrize(
    "mode, places, taken",
    [
        ("sequence_classification", ["index_to_name.json"], "index_to_name.json"),
        ("sequence_classification", ["index_to_name.json", *LABELS], LABELS[0]),
        ("token_classification", ["index_to_name.json", *LABELS], LABELS[1]),
        ("token_classification", LABELS[:1], None),
        ("question_answering", ["index_to_name.json"], None),
    ],
)
def test_the_examples_labels_are_found_by_their_place(mode: str, places: List[str], taken: Any, tmp_path: Path) -> None:
    for place in places:
        write(tmp_path / place, {"0": "a", "1": "b"})
    content = {"model_name": "x", "mode": mode, "num_labels": "0"}
    loaded = load_config(write(tmp_path / "setup_config.json", content))
    assert loaded.config.index_to_name == taken
    assert any(taken in note for note in loaded.notes) if taken else loaded.notes == ()
    none = load_config(write(tmp_path / "setup_config.json", {**content, "index_to_name": None}))
    assert none.config.index_to_name is None and none.notes == ()


def test_a_file_that_lies_beside_another_configuration_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path / "index_to_name.json", {"0": "a"})
    content = {"model_name": "x", "task": "sequence_classification"}
    assert load_config(write(tmp_path / "setup_config.json", content)).config.index_to_name is None


@pytest.mark.parametrize(
    "labels",
    [
        {"label_list": "[crimson, leaf, sky]"},
        {"label_list": "['crimson', 'leaf', 'sky']"},
        {"label_list": '["crimson", "leaf", "sky"]'},
        {"label_list": "('crimson', 'leaf', 'sky')"},
        {"label_list": "['crimson', leaf, \"sky\"]"},
        {"label_list": " crimson,leaf , sky "},
        {"label_list": ["crimson", "leaf", "sky"]},
        {"0": "crimson", "1": "leaf", "2": "sky"},
    ],
)
def test_the_examples_labels(labels: Dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps(labels), encoding="utf-8-sig")  # as by some editors
    assert original(checkpoint("bert", **COLORS), index_to_name=str(path)).labels == ("crimson", "leaf", "sky")


def test_a_label_may_hold_a_comma(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path / "names.json", {"label_list": "['red, or so', 'green', \"sky's\"]"})
    assert original(checkpoint("bert", **COLORS), index_to_name=str(path)).labels == ("red, or so", "green", "sky's")


def test_labels_that_are_not_the_heads_are_refused_with_what_to_do(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(tmp_path / "names.json", {"0": "a", "1": "b"})
    with pytest.raises(ConfigError, match='has 3, 0 to 2; correct it, or set "index_to_name": null'):
        original(checkpoint("bert", **COLORS), index_to_name=str(path))
    assert original(checkpoint("bert", **COLORS), num_labels="0").labels == ("red", "green", "blue")


@pytest.mark.parametrize(
    "text",
    [
        '{"00": "red", "1": "green", "2": "blue"}',
        '{"0": "red", "1 ": "green", "2": "blue"}',
        '{"0": "red", "+1": "green", "2": "blue"}',
        '{"0": null, "1": "green", "2": "blue"}',
        '{"0": 1, "1": 2, "2": 3}',
        '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"], "2": ["n01484850", "great_white_shark"]}',
        '{"label_list": ["red", null, "blue"]}',
        "{\"label_list\": \"[['red', 'crimson'], 'green', 'blue']\"}",
    ],
)
def test_labels_that_are_no_texts_by_number(text: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path / "names.json", text)
    with pytest.raises(ConfigError, match='index_to_name: .*names.json should hold a JSON object like {"0": "name"'):
        original(checkpoint("bert", **COLORS), index_to_name=str(path))


def test_labels_that_look_like_numbers(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path / "names.json", {"label_list": "[1.50, 1e3, True]"})
    assert original(checkpoint("bert", **COLORS), index_to_name=str(path)).labels == ("1.50", "1e3", "True")


def test_a_label_given_twice(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path / "names.json", '{"0": "red", "1": "green", "1": "lime", "2": "blue"}')
    with pytest.raises(ConfigError, match="^index_to_name: .*names.json: the key 1 is given twice$"):
        original(checkpoint("bert", **COLORS), index_to_name=str(path))


def test_labels_in_a_home_of_nobody(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="^index_to_name: .*~nobody-here/names.json cannot be read: No such file"):
        original(checkpoint("bert", **COLORS), index_to_name="~nobody-here/names.json")
