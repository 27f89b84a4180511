"""Valid combinations: the command's table, the configuration and the JSON schema agree, and explain refusals."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any, Callable, Dict, List

import jsonschema
import pytest
from conftest import run_export
from traceserve import cli
from traceserve.building.checkpoints import sources
from traceserve.building.config import formats
from traceserve.building.config.dtypes import AUTO, DTYPES
from traceserve.building.config.hardware import HARDWARE
from traceserve.building.config.parsing import load_config, parse_config
from traceserve.building.config.save_modes import SAVE_MODES
from traceserve.building.config.schema import json_schema
from traceserve.errors import ConfigError
from traceserve_runtime.engine import NO_GRADIENTS
from traceserve_runtime.runtimes.torchscript.reader import FILLED, UNPADDED
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.parameters import Parameter

ALL = list(itertools.product(SAVE_MODES, HARDWARE, TASKS))


@pytest.mark.parametrize(
    "content, expected",
    [
        ({}, ["pretrained", "aot_inductor"]),  # onnx is traced, too
        ({"task": "text_generation"}, ["pretrained"]),
        ({"save_mode": "onnx"}, ["torchscript", "pretrained", "openvino", "aot_inductor"]),
        ({"save_mode": "openvino"}, ["torchscript", "pretrained", "onnx", "aot_inductor"]),
        ({"save_mode": "onnx", "dtype": "int8"}, ["torchscript", "openvino"]),
        ({"save_mode": "pretrained"}, []),  # transformers itself cannot run it
        ({"save_mode": "aot_inductor", "dtype": "float32"}, ["torchscript", "pretrained", "onnx", "openvino"]),
        ({"hardware": "gpu"}, ["pretrained"]),
        ({"trust_remote_code": True}, ["aot_inductor"]),
        ({"library": "curated_transformers", "task": "feature_extraction"}, []),
        ({"hardware": "neuron"}, []),
    ],
    ids=str,
)
def test_what_another_save_mode_may_write(content: Dict[str, Any], expected: List[str]) -> None:
    content = {"task": "sequence_classification", **content}
    config = parse_config({"model_name": "x/y", **content})[0]
    assert formats.others(config) == expected
    for save_mode in expected:
        parse_config({"model_name": "x/y", **content, "save_mode": save_mode})  # it is legal
    assert formats.advice(config) == (f"; try save_mode {' or '.join(expected)}" if expected else "")


@pytest.fixture(scope="module")
def validator() -> Any:
    return jsonschema.Draft202012Validator(json_schema())


@pytest.mark.parametrize("save_mode, hardware, task", ALL)
def test_configuration_schema_and_table_agree(save_mode: str, hardware: str, task: str, validator: Any) -> None:
    [row] = [
        item
        for item in formats.every_format()
        if (item.save_mode, item.hardware) == (save_mode, hardware) and task in item.tasks
    ]
    assert ("" in row.refused) is not bool(row.dtypes)
    for dtype in (AUTO, *DTYPES):
        content = {"model_name": "x/y", "save_mode": save_mode, "hardware": hardware, "task": task, "dtype": dtype}
        assert validator.is_valid(content) is (dtype in row.dtypes)
        if dtype in row.dtypes:
            assert parse_config(content)[0].dtype == dtype and dtype not in row.refused
            continue
        with pytest.raises(ConfigError) as raised:
            parse_config(content)
        reason = row.refused[""] if "" in row.refused else row.refused[dtype]
        assert reason.replace("it ", "", 1).split(", not for")[0] in raised.value.message
        # The suggested alternative is legal.
        named = [name for name in (*SAVE_MODES, *row.dtypes) if name in raised.value.message.rsplit("take ", 1)[-1]]
        assert named or "take" not in raised.value.message


@pytest.mark.parametrize("save_mode, hardware, task", ALL)
def test_auto_tries_what_is_legal(save_mode: str, hardware: str, task: str) -> None:
    legal = formats.dtypes(save_mode, hardware, TASKS[task])
    if legal:
        tried = formats.candidates(save_mode, hardware, AUTO, TASKS[task])
        assert tried and set(tried) <= set(legal)
        assert formats.candidates(save_mode, hardware, legal[-1], TASKS[task]) == (legal[-1],)


def test_a_mode_without_loops_is_refused_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a compiled graph with fixed inputs."""
    monkeypatch.setitem(SAVE_MODES, "pretrained", SAVE_MODES["pretrained"]._replace(loops=()))
    content = {"model_name": "x", "save_mode": "pretrained"}
    with pytest.raises(ConfigError) as raised:
        parse_config({**content, "task": "text_generation"})
    assert raised.value.message == (
        "save_mode pretrained is for models that are run once, not for text_generation; take torchscript or onnx or openvino"
    )
    assert parse_config({**content, "task": "fill_mask"})
    rows = [item for item in formats.every_format() if (item.save_mode, item.hardware) == ("pretrained", "cpu")]
    assert [bool(item.dtypes) for item in rows] == [True, False]


@pytest.mark.parametrize(
    "value, written",
    [
        ("2026-01-31", '"2026-01-31"'),
        ("{2026-01-31: 1}", "{datetime.date(2026, 1, 31): 1}"),
        ("!!binary aGk=", "\"b'hi'\""),
        ("&a [*a]", "[[...]]"),
    ],
)
def test_what_only_yaml_has_is_refused_in_a_sentence(value: str, written: str, tmp_path: Path) -> None:
    for keys, refused in (
        ("save_mode: pretrained\noptions: {torch_compile: VALUE}", "options: torch_compile should be true or false"),
        ("task: sequence_classification\nparameters: {top_k: VALUE}", "parameters: top_k should be a whole number"),
    ):
        path = tmp_path / "config.yaml"
        path.write_text(f"model_name: x\n{keys.replace('VALUE', value)}\n")
        with pytest.raises(ConfigError, match=f"{refused}.*, not {re.escape(written)}$"):
            load_config(path)


def test_every_option_is_legal_where_it_belongs_and_nowhere_else(validator: Any) -> None:
    names = {option.parameter.name for kind in SAVE_MODES.values() for option in kind.options}
    for save_mode, hardware in itertools.product(SAVE_MODES, HARDWARE):
        if hardware not in SAVE_MODES[save_mode].hardware:
            continue
        own: Dict[str, Parameter] = formats.options(save_mode, hardware)
        for name in names:
            known = own.get(name)
            value = None if known is None else known.default
            content = {"model_name": "x", "save_mode": save_mode, "hardware": hardware, "options": {name: value}}
            accepted = known is not None and known.accepts(value)
            assert validator.is_valid(content) is accepted
            if accepted:
                assert parse_config(content)[0].options == {name: value}
            else:
                with pytest.raises(ConfigError, match="^options: "):
                    parse_config(content)
        assert formats.target(save_mode, hardware, {}).options == {name: item.default for name, item in own.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"save_mode": "pretrained", "dtype": "int8"},
        {"task": "text_generation", "dtype": "int8"},
        {"save_mode": "torchscript", "options": {"torch_compile": True}},
        {"save_mode": "pretrained", "trust_remote_code": True},
    ],
    ids=json.dumps,
)
def test_nothing_is_fetched_for_what_cannot_work(
    content: Dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(*arguments: Any) -> Any:
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr(sources, "fetch_checkpoint", fetch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup_config.json").write_text(json.dumps({"model_name": "nobody/nothing", **content}))
    assert cli.main(["export"]) == 1
    assert "setup_config.json: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["setup_config.json"]


# The command.


@pytest.mark.parametrize("columns", ["", "60"])
def test_the_table_shows_all(columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the output is no terminal, whole names at any width."""
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["formats"]) == 0
    shown = capsys.readouterr().out
    for name in (*SAVE_MODES, *HARDWARE, *TASKS, *DTYPES):
        assert name in shown
    assert "it is for models that are run once" in shown
    for option in (option for kind in SAVE_MODES.values() for option in kind.options):
        assert option.parameter.name in shown and option.parameter.legal in shown


def test_a_task_is_shown_by_the_names_that_a_configuration_takes(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for name in ("token_classification", "token-classification", "ner"):
        assert cli.main(["tasks", name]) == 0
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1 and cli.main(["tasks", "nerr"]) == 1


def test_a_narrow_terminal_loses_no_letter(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    for command in ("formats", "tasks"):
        assert cli.main([command]) == 0
        shown = capsys.readouterr().out
        assert max(len(line) for line in re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines() if "curl" not in line) <= 60
        assert "…" not in shown


def test_the_json_holds_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["formats", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    found: List[Any] = [
        (item["save_mode"], item["hardware"], task) for item in document["formats"] for task in item["tasks"]
    ]
    assert sorted(found) == sorted(ALL)
    wanted = {"save_mode": "pretrained", "hardware": "cpu", "name": "torch_compile"}
    assert [item for item in document["options"] if wanted.items() <= item.items()]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["formats", "--help"])
    shown = capsys.readouterr().out
    assert "A save mode is how the model is stored" in shown
    [example] = [line for line in shown.splitlines() if line.strip().startswith("{")]
    assert parse_config(json.loads(example))
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    sentences = " ".join(capsys.readouterr().out.split())
    assert "Write a setup_config.json from what a checkpoint says export Download" in sentences


def test_what_a_reader_must_know_is_in_the_manifest(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    content = {"model_name": str(checkpoint("bert")), "max_length": 32, "allow_untrained_head": True}
    manifest = run_export(tmp_path / "x", content, gradients=True).manifest
    assert manifest.runtime == {UNPADDED: True, FILLED: 16, NO_GRADIENTS: ""}
