"""peft adapters: merged with their base, with the unmerged pair's answers; or refused in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import pytest
import torch
import transformers
from conftest import run_export
from safetensors.torch import load_file, save_file
from traceserve.building.checkpoints import loading, sources
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.original import Original
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate.texts import SENTENCES
from traceserve.errors import SourceError
from traceserve_runtime.engine import Engine
from traceserve_runtime.manifest import sha256
from traceserve_runtime.tasks.contract import Answer, Request

peft = pytest.importorskip("peft", reason="pip install 'traceserve[peft]'")

Make = Callable[..., Path]
TEXTS = [text for text in SENTENCES if text][:8]
LAYERS = ["query", "value"]
KINDS: Dict[str, Dict[str, Any]] = {
    "LORA": {"r": 4, "target_modules": LAYERS, "init_lora_weights": False},
    "ADALORA": {"target_modules": LAYERS, "init_lora_weights": False, "total_step": 10},
    "LOHA": {"r": 4, "target_modules": LAYERS, "init_weights": False},
    "LOKR": {"r": 4, "target_modules": LAYERS, "init_weights": False},
    "VERA": {"r": 4, "target_modules": LAYERS, "init_weights": False},
    "IA3": {
        "target_modules": [*LAYERS, "intermediate.dense"],
        "feedforward_modules": ["intermediate.dense"],
        "init_ia3_weights": False,
    },
    "OFT": {"oft_block_size": 4, "target_modules": LAYERS, "init_weights": False},
    "BOFT": {"boft_block_size": 4, "target_modules": LAYERS, "init_weights": False},
    "HRA": {"r": 4, "target_modules": LAYERS, "init_weights": False},
    "FOURIERFT": {"n_frequency": 10, "target_modules": LAYERS},
    "LN_TUNING": {"target_modules": ["LayerNorm"]},
}


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    """Ignore peft's warnings about compilers while it makes its layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapt(
    folder: Path, base: Path, auto_model: str, kind: str = "LORA", tokenizer: bool = False, **options: Any
) -> Any:
    """Write an adapter with random weights for the base in the folder beside it; return the unmerged model."""
    labels = {"num_labels": options.pop("num_labels")} if "num_labels" in options else {}
    torch.manual_seed(1)
    model = getattr(transformers, auto_model).from_pretrained(base, ignore_mismatched_sizes=True, **labels)
    settings = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]](**{**KINDS[kind], **options})
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    adapted.save_pretrained(folder, save_embedding_layers=bool(options.get("modules_to_save")))
    edit(folder / "adapter_config.json", base_model_name_or_path=f"../{base.name}")
    if tokenizer:
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return adapted.eval()


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def base_of(checkpoint: Make, tmp_path: Path, architecture: str, auto_model: str, **options: Any) -> Path:
    return Path(shutil.copytree(checkpoint(architecture, auto_model, **options), tmp_path / "base"))


def original(folder: Path, **content: Any) -> Original:
    config, _ = parse_config({"model_name": folder.name, **content})
    with loading.quiet_transformers():
        checkpoint = sources.fetch_checkpoint(config, folder.parent)
        return loading.load_original(config.model_copy(update={"task": checkpoint.task}), checkpoint, folder.parent)


def fetch(folder: Path, **content: Any) -> Checkpoint:
    config, _ = parse_config({"model_name": folder.name, **content})
    return sources.fetch_checkpoint(config, folder.parent)


def logits(model: Any, tokenizer: Any) -> np.ndarray:
    """Return each text's logits in one row."""
    with torch.no_grad():
        return np.concatenate([model(**tokenizer(text, return_tensors="pt")).logits.ravel().numpy() for text in TEXTS])


def test_a_classifier(checkpoint: Make, tmp_path: Path) -> None:
    """The head is the adapter's, with more labels than the base's configuration."""
    base = base_of(checkpoint, tmp_path, "bert", "AutoModel")
    adapted = adapt(tmp_path / "mine", base, "AutoModelForSequenceClassification", task_type="SEQ_CLS", num_labels=5)
    exported = run_export(tmp_path / "artifact", {"model_name": str(tmp_path / "mine")})
    assert exported.manifest.task == "sequence_classification"
    assert exported.manifest.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")
    assert "LABEL_4" in str(exported.note) and "index_to_name" in str(exported.note)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    engine = Engine.load(tmp_path / "artifact")
    for text in TEXTS:
        [answer] = engine.answer([Request({"text": text}, {"top_k": None})])
        assert isinstance(answer, Answer)
        scores = {item["label"]: item["score"] for item in answer.value}
        with torch.no_grad():
            expected = adapted(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist()
        assert [scores[f"LABEL_{i}"] for i in range(5)] == pytest.approx(expected, abs=1e-4)
    source = exported.manifest.source
    assert source.files["adapter_model.safetensors"] == sha256(tmp_path / "mine" / "adapter_model.safetensors")
    assert source.base is not None and (source.base.name, source.base.kind) == ("../base", "folder")
    assert source.base.files["model.safetensors"] == sha256(base / "model.safetensors")
    assert exported.manifest.versions["peft"] == peft.__version__


def test_a_text_generator(checkpoint: Make, tmp_path: Path) -> None:
    base = base_of(checkpoint, tmp_path, "llama", "AutoModelForCausalLM")
    adapted = adapt(
        tmp_path / "mine",
        base,
        "AutoModelForCausalLM",
        tokenizer=True,
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
    )
    exported = run_export(tmp_path / "artifact", {"model_name": str(tmp_path / "mine")})
    assert exported.manifest.task == "text_generation"
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    made = original(tmp_path / "mine").model
    assert logits(made, tokenizer) == pytest.approx(logits(adapted, tokenizer), abs=1e-4)
    engine = Engine.load(tmp_path / "artifact")
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")
        written = adapted.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        [answer] = engine.answer([Request({"text": text}, {"max_new_tokens": 8, "return_full_text": False})])
        assert isinstance(answer, Answer)
        new = written[0, ids["input_ids"].shape[1] :]
        assert answer.value[0]["generated_text"] == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_merged(kind: str, checkpoint: Make, tmp_path: Path) -> None:
    base = base_of(checkpoint, tmp_path, "bert", "AutoModel")
    adapted = adapt(tmp_path / "mine", base, "AutoModelForTokenClassification", kind, task_type="TOKEN_CLS")
    plain = transformers.AutoModelForTokenClassification.from_pretrained(base)
    with torch.no_grad():
        plain.classifier.load_state_dict(adapted.base_model.model.classifier.modules_to_save["default"].state_dict())
    made = original(tmp_path / "mine")
    expected = logits(adapted, made.tokenizer)
    assert logits(made.model, made.tokenizer) == pytest.approx(expected, abs=1e-4)
    assert np.abs(logits(plain.eval(), made.tokenizer) - expected).max() > 1e-3  # the adapter changes answers


def test_every_kind_is_tried() -> None:
    from traceserve.building.checkpoints.adapters import KINDS as MERGED

    assert set(MERGED) == set(KINDS)


@pytest.mark.parametrize("dora", [True, False])
def test_a_pickle_in_half_precision(dora: bool, checkpoint: Make, tmp_path: Path) -> None:
    """The merge is in float32, whatever the stored dtypes."""
    base = base_of(checkpoint, tmp_path, "bert", "AutoModel")
    transformers.AutoModel.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    options = {"task_type": "SEQ_CLS", "use_dora": dora, "use_rslora": dora}
    adapt(tmp_path / "mine", base, "AutoModelForSequenceClassification", **options)
    torch.save(load_file(tmp_path / "mine" / "adapter_model.safetensors"), tmp_path / "mine" / "adapter_model.bin")
    (tmp_path / "mine" / "adapter_model.safetensors").unlink()
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(base).float()
    adapted = peft.PeftModel.from_pretrained(whole, tmp_path / "mine").eval()
    made = original(tmp_path / "mine")
    assert next(made.model.parameters()).dtype == torch.float32
    assert logits(made.model, made.tokenizer) == pytest.approx(logits(adapted, made.tokenizer), abs=1e-4)


@pytest.mark.parametrize(
    ("auto_model", "kind", "task"),
    [
        ("AutoModelForQuestionAnswering", "QUESTION_ANS", "question_answering"),
        ("AutoModel", "FEATURE_EXTRACTION", "feature_extraction"),
        ("AutoModelForTokenClassification", None, "token_classification"),  # by auto_mapping
    ],
)
def test_the_task_is_the_adapter_s(auto_model: str, kind: Any, task: str, checkpoint: Make, tmp_path: Path) -> None:
    base = base_of(checkpoint, tmp_path, "bert", "AutoModel")
    options = {} if kind else {"modules_to_save": ["classifier"]}
    adapt(tmp_path / "mine", base, auto_model, task_type=kind, **options)
    assert original(tmp_path / "mine").tokenizer is not None
    assert fetch(tmp_path / "mine").task == task
    if kind != "FEATURE_EXTRACTION":
        with pytest.raises(SourceError, match=f'for the task fill_mask: .*set "task": "{task}"'):
            fetch(tmp_path / "mine", task="fill_mask")


def test_a_text2text_writer(checkpoint: Make, tmp_path: Path) -> None:
    base = base_of(checkpoint, tmp_path, "t5", "AutoModelForSeq2SeqLM")
    adapt(tmp_path / "mine", base, "AutoModelForSeq2SeqLM", task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    assert original(tmp_path / "mine").model.config.model_type == "t5"
    assert fetch(tmp_path / "mine").task == "text2text_generation"


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ],
    ids=["trained", "saved", "adapted", "some"],
)
def test_added_tokens(options: Dict[str, Any], checkpoint: Make, tmp_path: Path) -> None:
    """The base gets the adapter's number of embeddings, and the tokenizer is the adapter's."""
    base = base_of(checkpoint, tmp_path, "llama", "AutoModelForCausalLM")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<user>", "<robot>"])
    tokenizer.save_pretrained(tmp_path / "mine")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    settings = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    adapted = peft.get_peft_model(model, settings).eval()
    adapted.save_pretrained(tmp_path / "mine")
    edit(tmp_path / "mine" / "adapter_config.json", base_model_name_or_path="../base")
    made = original(tmp_path / "mine")
    assert len(made.model.get_input_embeddings().weight) == len(tokenizer) == len(made.tokenizer)
    assert made.known_tokens is None
    ids = tokenizer("<user> Hello <robot>", return_tensors="pt")
    with torch.no_grad():
        assert made.model(**ids).logits.numpy() == pytest.approx(adapted(**ids).logits.numpy(), abs=1e-4)


def test_labels(checkpoint: Make, tmp_path: Path) -> None:
    names = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
    base = base_of(checkpoint, tmp_path, "bert", "AutoModelForSequenceClassification", **names)
    adapt(tmp_path / "same", base, "AutoModelForSequenceClassification", task_type="SEQ_CLS")
    adapt(tmp_path / "other", base, "AutoModelForSequenceClassification", task_type="SEQ_CLS", num_labels=4)
    assert original(tmp_path / "same").labels == ("red", "green", "blue")
    assert "those of the base are taken (red, green, blue)" in str(fetch(tmp_path / "same").note)
    assert original(tmp_path / "other").labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    (tmp_path / "names.json").write_text('{"0": "a", "1": "b", "2": "c", "3": "d"}')
    assert original(tmp_path / "other", index_to_name="names.json").labels == ("a", "b", "c", "d")
    assert "names of labels" not in str(fetch(tmp_path / "other", index_to_name="names.json").note)


def test_a_head_that_was_not_saved(checkpoint: Make, tmp_path: Path) -> None:
    """The base has no pooler, so a random one was used in training, and the adapter lacks it."""
    base = base_of(checkpoint, tmp_path, "bert", "AutoModelForMaskedLM")
    adapt(tmp_path / "mine", base, "AutoModelForSequenceClassification", task_type="SEQ_CLS")
    with pytest.raises(SourceError, match=r"mine holds no trained weights .*\(bert.pooler.dense.bias, [^,]*\)"):
        original(tmp_path / "mine")
    file = tmp_path / "mine" / "adapter_model.safetensors"
    save_file({key: weight for key, weight in load_file(file).items() if "classifier.bias" not in key}, file)
    with pytest.raises(SourceError, match="the adapter mine lacks the weight base_model.model.classifier.bias"):
        original(tmp_path / "mine")


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ("roberta", r"lacks the weight \S*classifier.dense.weight, which a model of \.\./base has"),
        ("bert", r"does not belong to \.\./base: .*encoder.layer.1"),
    ],
)
def test_another_base(other: str, complaint: str, checkpoint: Make, tmp_path: Path) -> None:
    base = base_of(checkpoint, tmp_path, "bert", "AutoModel")
    adapt(tmp_path / "mine", base, "AutoModelForSequenceClassification", task_type="SEQ_CLS")
    shutil.rmtree(base)
    shutil.copytree(checkpoint(other, "AutoModel", num_hidden_layers=1), base)
    with pytest.raises(SourceError, match=f"the adapter mine {complaint}.*correct base_model_name_or_path"):
        original(tmp_path / "mine")


def test_several_adapters(checkpoint: Make, tmp_path: Path) -> None:
    """peft saves each in a folder of its name, the one called default beside them."""
    base = base_of(checkpoint, tmp_path, "bert", "AutoModelForSequenceClassification", num_labels=3)
    model = adapt(tmp_path / "mine", base, "AutoModelForSequenceClassification", task_type="SEQ_CLS")
    for name in ("second", "first"):
        model.add_adapter(name, peft.LoraConfig(r=4, target_modules=LAYERS, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "mine")
    edit(tmp_path / "mine" / "adapter_config.json", base_model_name_or_path="../base")
    note = fetch(tmp_path / "mine").note
    assert "other adapters of the folder, which are not merged: first, second" in str(note)
    model.save_pretrained(tmp_path / "others", selected_adapters=["first", "second"])
    with pytest.raises(SourceError, match=r'others holds a folder for each of .* \(first, second\).* "others/first"$'):
        fetch(tmp_path / "others")
    shutil.copytree(tmp_path / "mine", tmp_path / "run" / "checkpoint-10")
    with pytest.raises(SourceError, match="run is the output folder of a Trainer"):
        fetch(tmp_path / "run")


def test_a_model_that_was_saved_with_its_adapter_beside_it(checkpoint: Make, tmp_path: Path) -> None:
    base = base_of(checkpoint, tmp_path, "bert", "AutoModelForSequenceClassification", num_labels=3)
    model = adapt(tmp_path / "mine", base, "AutoModelForSequenceClassification", task_type="SEQ_CLS", tokenizer=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "mine" / file).unlink()
    model.base_model.model.save_pretrained(tmp_path / "mine")
    with pytest.raises(SourceError, match=r"mine: its weights are .* not merged \(.*merge_and_unload\(\) returns$"):
        original(tmp_path / "mine")


def test_a_base_that_is_not_there(checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(checkpoint, tmp_path, "bert", "AutoModel")
    adapt(tmp_path / "mine", base, "AutoModelForSequenceClassification", task_type="SEQ_CLS")
    shutil.rmtree(base)
    with pytest.raises(SourceError) as raised:
        fetch(tmp_path / "mine")
    assert raised.value.message.startswith(
        "mine is an adapter, and its base cannot be had: ../base is neither a folder"
    )
    assert raised.value.message.endswith("its name stands in adapter_config.json as base_model_name_or_path")
    assert "\n" not in raised.value.message
    shutil.copytree(tmp_path / "mine", base)
    with pytest.raises(SourceError, match="its base cannot be had: .*is a LORA adapter .*merge it first"):
        fetch(tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "of the kind PROMPT_TUNING, which is not merged"),
        ({"peft_type": None}, "should be a JSON object that names a peft_type"),
        ({"base_model_name_or_path": None}, "names no base"),
        ({"task_type": "IMAGE_CLS"}, "task_type IMAGE_CLS, but it should be SEQ_CLS or TOKEN_CLS"),
        ({"use_magic": True, "peft_version": "9.9"}, "the keys use_magic, which peft .* written by peft 9.9"),
    ],
)
def test_what_is_not_merged(change: Dict[str, Any], complaint: str, checkpoint: Make, tmp_path: Path) -> None:
    base = base_of(checkpoint, tmp_path, "bert", "AutoModel")
    adapt(tmp_path / "mine", base, "AutoModelForSequenceClassification", task_type="SEQ_CLS")
    edit(tmp_path / "mine" / "adapter_config.json", **change)
    with pytest.raises(SourceError, match=complaint):
        fetch(tmp_path / "mine")


def test_files(checkpoint: Make, tmp_path: Path) -> None:
    base = base_of(checkpoint, tmp_path, "bert", "AutoModel")
    adapt(tmp_path / "mine", base, "AutoModelForSequenceClassification", task_type="SEQ_CLS")
    for name in ("weights.npz", "config.json", "README.md"):
        (tmp_path / "mine" / name).write_text("{}")
    assert "files of the adapter that are not read: config.json, weights.npz" in str(fetch(tmp_path / "mine").note)
    shutil.copyfile(base / "model.safetensors", tmp_path / "mine" / "model.safetensors")
    with pytest.raises(SourceError, match=r"holds an adapter .* and a whole model \(model.safetensors\)"):
        fetch(tmp_path / "mine")
    (tmp_path / "mine" / "model.safetensors").unlink()
    (tmp_path / "mine" / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match="no weights of the adapter"):
        fetch(tmp_path / "mine")


def test_without_peft(checkpoint: Make, tmp_path: Path) -> None:
    base = base_of(checkpoint, tmp_path, "bert", "AutoModel")
    adapt(tmp_path / "mine", base, "AutoModelForSequenceClassification", task_type="SEQ_CLS")
    config = tmp_path / "setup_config.json"
    config.write_text(json.dumps({"model_name": "mine"}))
    code = (
        "import sys; sys.modules['peft'] = None; from traceserve.cli import main; "
        f"sys.argv = ['traceserve', 'build', '--config', {str(config)!r}]; sys.exit(main())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode != 0
    said = " ".join(ran.stderr.split())
    assert "mine is a LORA adapter of ../base, and to merge the two peft must be installed" in said
    assert "pip install 'traceserve[peft]'" in said and "Traceback" not in said


SETTINGS = "tokenizer_config.json"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<end>{% endfor %}"


@pytest.fixture
def writer(checkpoint: Make, tmp_path: Path) -> Path:
    """An adapter of a text generator, beside which the base's tokenizer was saved, but for its vocabulary."""
    base = base_of(checkpoint, tmp_path, "llama", "AutoModelForCausalLM")
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    adapt(tmp_path / "mine", base, "AutoModelForCausalLM", tokenizer=True, **options)
    (tmp_path / "mine" / "tokenizer.json").unlink()
    return tmp_path / "mine"


def token(content: str) -> Dict[str, Any]:
    """Return a special token as transformers 4 writes it."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **flags}


def of_transformers_4(tokenizer: Any, **keys: Any) -> Dict[str, Any]:
    """Return what transformers 4 writes into tokenizer_config.json."""
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): token(tokenizer.convert_ids_to_tokens(i)) for i in tokenizer.all_special_ids},
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.special_tokens_map,
        **keys,
    }


def test_tokenizer_files_that_say_what_the_base_does(writer: Path) -> None:
    edit(writer / SETTINGS, name_or_path="org/base", model_max_length=64)  # changes no answer
    assert "not read" not in str(fetch(writer).note)
    tokenizer = transformers.AutoTokenizer.from_pretrained(writer.parent / "base")
    (writer / SETTINGS).write_text(json.dumps(of_transformers_4(tokenizer)))
    special = {name: token(text) for name, text in tokenizer.special_tokens_map.items()}
    (writer / "special_tokens_map.json").write_text(json.dumps(special))
    assert "not read" not in str(fetch(writer).note)
    assert original(writer).tokenizer.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize(
    "name, keys, differing",
    [
        (SETTINGS, {"chat_template": TEMPLATE}, "the chat template"),
        (SETTINGS, {"chat_template": [{"name": "default", "template": TEMPLATE}]}, "the chat template"),
        (SETTINGS, {"pad_token": "<end>"}, "pad_token"),
        (SETTINGS, {"add_eos_token": True}, "add_eos_token"),
        (SETTINGS, {"additional_special_tokens": ["<user>"]}, "special tokens"),
        (SETTINGS, {"added_tokens_decoder": {"9999": token("<user>")}}, "added tokens"),
        ("special_tokens_map.json", {"eos_token": token("<stop>")}, "eos_token"),
        ("added_tokens.json", {"<user>": 9999}, "added tokens"),
    ],
)
def test_tokenizer_files_without_a_vocabulary_that_say_something_else(
    name: str, keys: Dict[str, Any], differing: str, writer: Path
) -> None:
    known = json.loads((writer / name).read_text()) if (writer / name).is_file() else {}
    (writer / name).write_text(json.dumps({**known, **keys}))
    with pytest.raises(SourceError) as raised:
        fetch(writer)
    assert raised.value.message.startswith("mine: the adapter's tokenizer_config.json") and name in raised.value.message
    assert f"and its base's tokenizer differ in {differing}, but the base's is taken" in raised.value.message
    assert raised.value.message.endswith("tokenizer.save_pretrained, or remove these files if the base's is right")


def test_a_chat_template_needs_its_vocabulary(writer: Path) -> None:
    """Alone it is refused, unless it is the base's; with the whole tokenizer the adapter's is taken."""
    base = writer.parent / "base"
    (writer / "chat_template.jinja").write_text(TEMPLATE + "\n")
    with pytest.raises(SourceError, match="differ in the chat template"):
        fetch(writer)
    edit(base / SETTINGS, chat_template=TEMPLATE)
    assert "not read" not in str(fetch(writer).note)
    edit(base / SETTINGS, chat_template="another")
    shutil.copyfile(base / "tokenizer.json", writer / "tokenizer.json")
    assert "not read" not in str(fetch(writer).note)
    assert original(writer).tokenizer.chat_template.rstrip() == TEMPLATE


def test_a_classifier_reads_no_chat_template(checkpoint: Make, tmp_path: Path) -> None:
    base = base_of(checkpoint, tmp_path, "bert", "AutoModel")
    adapt(tmp_path / "mine", base, "AutoModelForSequenceClassification", task_type="SEQ_CLS")
    (tmp_path / "mine" / "chat_template.jinja").write_text(TEMPLATE)
    assert "not read" not in str(fetch(tmp_path / "mine").note)


def test_a_base_in_a_home_of_nobody(checkpoint: Make, tmp_path: Path) -> None:
    base = base_of(checkpoint, tmp_path, "bert", "AutoModel")
    adapt(tmp_path / "mine", base, "AutoModelForSequenceClassification", task_type="SEQ_CLS")
    edit(tmp_path / "mine" / "adapter_config.json", base_model_name_or_path="~nobody-here/base")
    with pytest.raises(SourceError, match="its base cannot be had: ~nobody-here/base is neither a folder"):
        fetch(tmp_path / "mine")
