"""Files of a checkpoint that change answers: followed, refused by name with advice, or reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
import torch
import transformers
from conftest import run_export
from oracle import answers
from traceserve.building.checkpoints import files, sources
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate.texts import SENTENCES
from traceserve.errors import ConfigError, SourceError
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import Unsupported
from traceserve_runtime.tasks.contract import Request

Make = Callable[..., Path]


def copied(checkpoint: Make, folder: Path, *args: str, **options: Any) -> Path:
    return Path(shutil.copytree(checkpoint(*args, **options), folder))


def edit(path: Path, **keys: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **keys}))


def fetch(name: str, folder: Path, **content: Any) -> Checkpoint:
    config, _ = parse_config({"model_name": name, **content})
    return sources.fetch_checkpoint(config, folder)


# Folders of other kinds, and invalid files.


def test_the_output_folder_of_a_trainer(checkpoint: Make, tmp_path: Path) -> None:
    for number in (500, 1000, 90):
        copied(checkpoint, tmp_path / "run" / f"checkpoint-{number}", "bert")
    edit(tmp_path / "run" / "checkpoint-1000" / "trainer_state.json", best_model_checkpoint="/data/run/checkpoint-500")
    with pytest.raises(SourceError) as raised:
        fetch("run/", tmp_path)
    assert raised.value.message == (
        "run/ is the output folder of a Trainer, with checkpoint-1000, checkpoint-500, checkpoint-90; name one of them, as "
        '"run/checkpoint-1000", the newest (the best by its own evaluation is checkpoint-500)'
    )
    assert fetch("run/checkpoint-500", tmp_path).folder.name == "checkpoint-500"
    for number in (5, 10):
        (tmp_path / "adapters" / f"checkpoint-{number}").mkdir(parents=True)
        edit(tmp_path / "adapters" / f"checkpoint-{number}" / "adapter_config.json", peft_type="LORA")
    with pytest.raises(SourceError, match='name one of them, as "adapters/checkpoint-10", the newest$'):
        fetch("adapters", tmp_path)
    copied(checkpoint, tmp_path / "saved", "bert")  # with the last model beside the checkpoints
    shutil.copytree(tmp_path / "run" / "checkpoint-90", tmp_path / "saved" / "checkpoint-90")
    assert fetch("saved", tmp_path).folder.name == "saved"


def test_a_models_folder_in_the_hubs_cache(checkpoint: Make, tmp_path: Path) -> None:
    copied(checkpoint, tmp_path / "models--org--m" / "snapshots" / "abc", "bert")
    (tmp_path / "models--org--m" / "snapshots" / "abd").mkdir()
    with pytest.raises(SourceError) as raised:
        fetch("models--org--m/", tmp_path)
    assert raised.value.message == (
        "models--org--m/ is a model's folder in the hub's cache; name the snapshot in it, as "
        '"models--org--m/snapshots/abc"'
    )
    assert fetch("models--org--m/snapshots/abc", tmp_path).folder.name == "abc"


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "vocab.txt"])
def test_a_pointer_of_git_lfs(file: str, checkpoint: Make, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path / "mine", "bert")
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 133466304\n")
    with pytest.raises(SourceError, match=f"mine: {file} is a pointer of git-lfs .*run `git lfs pull` in {folder}"):
        fetch("mine", tmp_path)


def test_a_whole_model_as_a_pickle(checkpoint: Make, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path / "mine", "bert")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert fetch("mine", tmp_path).pickled
    for new in (True, False):
        torch.save(model, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        with pytest.raises(SourceError, match="a pickle of a whole model .*save it with model.save_pretrained"):
            fetch("mine", tmp_path)
    (folder / "pytorch_model.bin").rename(folder / "model.pt")
    with pytest.raises(
        SourceError, match="has no weights .*; model.pt may be a model that torch.save wrote: .*save_pretrained"
    ):
        fetch("mine", tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("new", [True, False])
def test_torchs_own_modules_are_a_whole_model_too(new: bool, protocol: int, tmp_path: Path) -> None:
    """In every protocol of pickle: from 4 on a class is named by two strings."""
    path = tmp_path / "pytorch_model.bin"
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    torch.save(model, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    with pytest.raises(SourceError, match=r"is a pickle of a whole model \(torch.nn.modules.container Sequential"):
        files.check_pickle(path, "mine")
    for weights in (model.state_dict(), dict(model.named_parameters())):
        torch.save(weights, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
        files.check_pickle(path, "mine")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_byte_order_mark(file: str, encoding: str, checkpoint: Make, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path / "mine", "bert")
    (folder / file).write_text((folder / file).read_text(), encoding=encoding)
    with pytest.raises(
        SourceError, match=f"{file} begins with a byte-order mark of UTF-.*save it as UTF-8 without one"
    ):
        fetch("mine", tmp_path)


def test_json_that_is_none(checkpoint: Make, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path / "mine", "bert")
    (folder / "config.json").write_text("{'model_type': 'bert'}")
    with pytest.raises(SourceError, match="config.json is no valid JSON: "):
        fetch("mine", tmp_path)


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        {"_attn_implementation": "evil/kernel"},
        {"attn_implementation": "evil/kernel@main:run"},
        {"_attn_implementation_internal": "flash|evil/kernel"},
        {"attn_implementation": {"text_config": "evil/kernel"}},
        {"text_config": {"vision": [{"_attn_implementation": "kernels-community/evil"}]}},
    ],
)
def test_a_kernel_of_the_hub(content: Dict[str, Any], trusted: bool, checkpoint: Make, tmp_path: Path) -> None:
    """transformers runs it without trust_remote_code: CVE-2026-4372."""
    folder = copied(checkpoint, tmp_path / "mine", "bert")
    edit(folder / "config.json", **content)
    with pytest.raises(
        SourceError, match="mine: its config.json names '.*' as its attention, .* code of the hub; remove"
    ):
        fetch("mine", tmp_path, trust_remote_code=trusted)


def test_attention_of_transformers_own(checkpoint: Make, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path / "mine", "bert")
    edit(folder / "config.json", _attn_implementation="flash_attention_2", attn_implementation=None)
    edit(folder / "config.json", _attn_implementation_autoset=True, text_config={"_attn_implementation": "sdpa"})
    assert fetch("mine", tmp_path).folder == folder


def test_another_configuration_by_version(checkpoint: Make, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path / "mine", "bert")
    edit(folder / "config.json", configuration_files=["config.4.0.0.json"])
    with pytest.raises(
        SourceError, match="mine: its config.json has configuration_files, .* rename the file that fits"
    ):
        fetch("mine", tmp_path)


def test_setfit(checkpoint: Make, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path / "mine", "bert", "AutoModel")
    (folder / "model_head.pkl").write_bytes(b"")
    with pytest.raises(SourceError, match="mine is a SetFit model: its head .* a pickle can run any code") as raised:
        fetch("mine", tmp_path)
    assert "remove model_head.pkl and config_setfit.json from a copy" in raised.value.message
    assert "differentiable" not in raised.value.message  # which is a pickle too


def test_setfit_with_a_folder_for_its_model(checkpoint: Make, tmp_path: Path) -> None:
    copied(checkpoint, tmp_path / "mine" / "0_Transformer", "bert")
    module = {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}
    (tmp_path / "mine" / "modules.json").write_text(json.dumps([module]), encoding="utf-8")
    fetch("mine", tmp_path, task="feature_extraction")
    (tmp_path / "mine" / "model_head.pkl").write_bytes(b"")
    for task in ("feature_extraction", "sequence_classification"):  # which is what SetFit's users want
        with pytest.raises(SourceError, match="mine is a SetFit model"):
            fetch("mine", tmp_path, task=task)


def test_files_that_are_not_known_are_told(checkpoint: Make, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path / "mine", "bert")
    for name in ("README.md", ".gitattributes", "training_args.bin", "all_results.json", "tf_model.h5", "optimizer.pt"):
        (folder / name).write_text("{}")
    assert fetch("mine", tmp_path).note is None
    edit(folder / "calibration.json", temperature=2.0)
    (folder / "weights.npz").write_bytes(b"")
    assert fetch("mine", tmp_path).note == (
        "files of the checkpoint that are not known here, and not read: calibration.json, weights.npz"
    )


# do_lower_case.


def vocabulary_alone(checkpoint: Make, folder: Path) -> Path:
    """A checkpoint whose tokenizer is only a vocab.txt, with capitals in it."""
    copied(checkpoint, folder, "bert", num_labels=3)
    words = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    capitals = {word: word.upper() if word in ("t", "h", "##t", "w") else word for word in words}
    (folder / "vocab.txt").write_text("\n".join(capitals[word] for word in sorted(words, key=words.__getitem__)) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("lower", [False, "false", True, None])
def test_the_case_of_a_vocabulary_alone(lower: Any, checkpoint: Make, tmp_path: Path) -> None:
    """The pytorch/serve example builds its tokenizer this way; no file sets the case."""
    folder = vocabulary_alone(checkpoint, tmp_path / "mine")
    content = {"model_name": str(folder), "max_length": 32, "parameters": {"top_k": 3}}
    run_export(tmp_path / "out", {**content, **({} if lower is None else {"do_lower_case": lower})})
    kept = lower in (False, "false")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **({"do_lower_case": False} if kept else {}))
    assert (tokenizer("The")["input_ids"] != tokenizer("the")["input_ids"]) is kept
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    pipeline = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["The", "THE WHOLE TOWN", *SENTENCES[1:4]]
    for text, got in zip(texts, answers(Engine.load(tmp_path / "out"), [Request({"text": text}) for text in texts])):
        expected = pipeline([text], top_k=3)[0]
        assert [item["label"] for item in got] == [item["label"] for item in expected]
        assert [item["score"] for item in got] == pytest.approx([item["score"] for item in expected], abs=1e-5)


def test_a_case_that_contradicts_the_tokenizer(checkpoint: Make, tmp_path: Path) -> None:
    content = {"model_name": str(checkpoint("bert")), "max_length": 32}
    with pytest.raises(
        ConfigError, match="do_lower_case is false, but the tokenizer of .* lowers them by its own files"
    ):
        run_export(tmp_path / "out", {**content, "do_lower_case": False})
    agreed = run_export(tmp_path / "agreed", {**content, "do_lower_case": "True"})
    assert agreed.note is None
    told = run_export(
        tmp_path / "told", {"model_name": str(checkpoint("roberta")), "max_length": 32, "do_lower_case": True}
    )
    assert told.note is not None and "do_lower_case changes nothing" in told.note


# A cross-encoder's activation.

SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize(
    "config, own, function",
    [
        ({}, {}, "sigmoid"),
        ({"sbert_ce_default_activation_function": IDENTITY}, {}, "none"),
        ({"sbert_ce_default_activation_function": SIGMOID, "problem_type": "regression"}, {}, "sigmoid"),
        ({"sentence_transformers": {"activation_fn": IDENTITY, "version": "4.1.0"}}, {}, "none"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"}, "problem_type": "regression"}, {}, "sigmoid"),
        (
            {"sentence_transformers": {"activation_fn": IDENTITY}, "sbert_ce_default_activation_function": SIGMOID},
            {},
            "none",
        ),
        ({"sentence_transformers": {"activation_fn": SIGMOID}}, {"activation_fn": IDENTITY}, "none"),
    ],
)
def test_the_function_of_a_cross_encoder(
    config: Dict[str, Any], own: Dict[str, Any], function: str, checkpoint: Make, tmp_path: Path
) -> None:
    """The scores equal those of sentence-transformers' own CrossEncoder."""
    from sentence_transformers import CrossEncoder

    folder = copied(checkpoint, tmp_path / "mine", "bert", num_labels=1)
    edit(folder / "config.json", **config)
    if own:
        edit(folder / "config_sentence_transformers.json", **own)
    run_export(tmp_path / "out", {"model_name": str(folder), "task": "text_ranking", "max_length": 64})
    engine = Engine.load(tmp_path / "out")
    assert engine.manifest.parameters["function_to_apply"] == function
    query, *documents = [text for text in SENTENCES if text][:5]
    [got] = answers(engine, [Request({"query": query, "documents": documents})])
    if config.get("problem_type") is None and not own:
        expected = CrossEncoder(str(folder)).predict([(query, document) for document in documents])
        assert [item["score"] for item in got] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "config, words",
    [
        (
            {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"},
            "scores are made by torch.*Tanh",
        ),
        (
            {"sentence_transformers": {"activation_fn": "my_code.Scale"}},
            r"my_code.Scale \(config.json's sentence_transf",
        ),
        ({"sentence_transformers": {"activation_fn": IDENTITY, "shift": 3}}, "sentence_transformers has shift"),
    ],
)
def test_an_activation_that_is_not_known(config: Dict[str, Any], words: str, checkpoint: Make, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path / "mine", "bert", num_labels=1)
    edit(folder / "config.json", **config)
    with pytest.raises(Unsupported, match=words):
        run_export(tmp_path / "out", {"model_name": str(folder), "task": "text_ranking", "max_length": 64})
