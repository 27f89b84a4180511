"""A checkpoint's own generation settings: followed as in transformers, without effect, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import models
import numpy as np
import pytest
import torch
import transformers
from conftest import run_export
from oracle import answers, generated, written
from traceserve.building.checkpoints import generation, sources
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate.texts import SENTENCES
from traceserve.errors import SourceError
from traceserve_runtime import tasks as runtime
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import TraceserveError, Unsupported
from traceserve_runtime.generation import scores as loop
from traceserve_runtime.generation.scores import GenerationSettings
from traceserve_runtime.tasks.contract import ModelFacts, Request

TEXTS = [text for text in SENTENCES if text][:4]
TASKS = {
    "gpt2": ("text_generation", "AutoModelForCausalLM"),
    "bart": ("text2text_generation", "AutoModelForSeq2SeqLM"),
    "marian": ("text2text_generation", "AutoModelForSeq2SeqLM"),
}
Checkpoint = Callable[..., Path]


def copy(checkpoint: Checkpoint, folder: Path, architecture: str, **settings: Any) -> Path:
    """A tiny checkpoint with these settings in its generation_config.json."""
    shutil.copytree(checkpoint(architecture, TASKS[architecture][1]), folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def exported(folder: Path, architecture: str, source: Path) -> Engine:
    run_export(folder, {"model_name": str(source), "task": TASKS[architecture][0], "max_length": 128})
    return Engine.load(folder)


def test_every_setting_of_the_installed_transformers_is_known() -> None:
    known = {*generation.FOLLOWED, *generation.WITHOUT_EFFECT, *generation.NEUTRAL}
    assert {*transformers.GenerationConfig().to_dict()} <= known
    assert len(known) == len(generation.FOLLOWED) + len(generation.WITHOUT_EFFECT) + len(generation.NEUTRAL)


def test_the_defaults_of_any_version_are_no_settings() -> None:
    """Those of transformers 4.57, whose files contain all defaults."""
    generation.check_settings(
        {
            "max_length": 20,
            "min_length": 0,
            "early_stopping": False,
            "do_sample": False,
            "num_beams": 1,
            "use_cache": True,
            "typical_p": 1.0,
            "epsilon_cutoff": 0.0,
            "eta_cutoff": 0,
            "num_beam_groups": 1,
            "encoder_repetition_penalty": 1.0,
            "encoder_no_repeat_ngram_size": 0,
            "diversity_penalty": 0.0,
            "renormalize_logits": False,
            "remove_invalid_values": False,
            "token_healing": False,
            "stop_strings": None,
            "num_return_sequences": 1,
            "cache_implementation": "static",
            "watermarking_config": None,
        }
    )


REFUSED: List[Tuple[Dict[str, Any], str]] = [
    ({"num_return_sequences": 2}, r"sets num_return_sequences to 2, .*an answer is one text.*set it to 1"),
    ({"epsilon_cutoff": 0.1}, "sets epsilon_cutoff to 0.1, which is not supported; remove it there if"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "sets penalty_alpha to 0.6"),
    ({"num_beam_groups": 2, "diversity_penalty": 0.5, "num_beams": 4}, "sets num_beam_groups to 2"),
    ({"num_beams": 4, "do_sample": True}, "sets num_beams to 4 and do_sample to true, but beam search does not sample"),
    ({"guidance_scale": 1.5}, "sets guidance_scale to 1.5, which is not supported; remove it there, or set it to 1.0"),
    ({"sequence_bias": [[[5], 2.0]]}, "sets sequence_bias"),
    ({"exponential_decay_length_penalty": [3, 1.1]}, "sets exponential_decay_length_penalty"),
    ({"force_words_ids": [[5]]}, "sets force_words_ids"),
    ({"watermarking_config": {"bias": 2.5}}, "sets watermarking_config"),
    ({"dola_layers": "low"}, "sets dola_layers"),
    ({"max_time": 2.0}, "sets max_time"),
    ({"token_healing": True}, "sets token_healing"),
    ({"cache_implementation": "quantized"}, "sets cache_implementation"),
    ({"seed": 3}, "has the key seed, which is not known here"),
    ({"stop": ["."]}, "has the key stop, which is not known here"),
    ({"warper_of_tomorrow": 3}, "has the key warper_of_tomorrow, which is not known here .*remove it there"),
    ({"bad_words_ids": [7]}, r"says bad_words_ids = \[7\], but it should be a list of lists of token ids"),
    ({"eos_token_id": "</s>"}, "says eos_token_id = '</s>', but it should be a token's id or a list of them"),
    ({"suppress_tokens": "5"}, "says suppress_tokens = '5'"),
    ({"stop_strings": [1]}, r"says stop_strings = \[1\], but it should be a string or a list of strings"),
    ({"renormalize_logits": "yes"}, "says renormalize_logits = 'yes'"),
    ({"forced_bos_token_id": "de_DE"}, "says forced_bos_token_id = 'de_DE'"),
]


@pytest.mark.parametrize(
    "settings, words", REFUSED, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_refused_by_name_before_anything_is_loaded(
    settings: Dict[str, Any], words: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = copy(checkpoint, tmp_path / "mine", "gpt2", **settings)
    config, _ = parse_config({"model_name": str(source), "task": "text_generation"})
    with pytest.raises(SourceError, match=f"generation_config.json {words}"):
        sources.fetch_checkpoint(config, tmp_path)
    classifier, _ = parse_config({"model_name": str(source), "task": "feature_extraction"})
    sources.fetch_checkpoint(classifier, tmp_path)  # which writes no text


def test_settings_of_sampling_are_defaults_of_its_parameters(checkpoint: Checkpoint, tmp_path: Path) -> None:
    settings = {"do_sample": True, "typical_p": 0.5, "min_p": 0.1, "top_p": 0.9, "temperature": 0.7}
    source = copy(checkpoint, tmp_path / "mine", "gpt2", **settings)
    engine = exported(tmp_path / "out", "gpt2", source)
    assert {key: engine.manifest.parameters[key] for key in settings} == settings


@pytest.mark.parametrize(
    ("generation", "chosen", "samples"),
    [
        ({"temperature": 0.5, "top_k": 3}, {}, None),
        ({}, {"seed": 3}, True),
        ({"temperature": 0.5}, {"top_p": 0.9}, True),
        ({}, {"seed": 3, "do_sample": False}, False),
        ({}, {"seed": 3, "temperature": 0}, None),
        ({"num_beams": 3}, {"seed": 3}, True),
        ({"num_beams": 3}, {"seed": 3, "num_beams": 1}, True),
    ],
)
def test_a_configuration_that_sets_a_parameter_of_sampling_samples(
    generation: Dict[str, Any], chosen: Dict[str, Any], samples: Optional[bool]
) -> None:
    """As a request does; the checkpoint's settings do not."""
    model = ModelFacts({}, generation, {}, (), None, lambda name: None)
    task = runtime.TASKS["text_generation"]
    assert task.archive_defaults(model, chosen).get("do_sample") is samples


@pytest.mark.parametrize(
    ("chosen", "words"),
    [({"seed": 3, "num_beams": 2}, "leave either num_beams or seed out"), ({"details": True}, 'add "num_beams": 1')],
)
def test_parameters_that_no_request_could_have_are_refused(chosen: Dict[str, Any], words: str) -> None:
    model = ModelFacts({}, {}, {}, (), None, lambda name: None)
    with pytest.raises(Unsupported, match=words):
        runtime.TASKS["text2text_generation"].archive_defaults(model, chosen)


@pytest.mark.parametrize("parameters", [{"num_beams": 1}, {"do_sample": False}], ids=["samples", "beams"])
def test_beams_or_sampling_of_both_are_chosen_in_parameters(
    parameters: Dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = copy(checkpoint, tmp_path / "mine", "gpt2", num_beams=3, do_sample=True, stop_strings=["."])
    run_export(
        tmp_path / "out",
        {"model_name": str(source), "task": "text_generation", "max_length": 128, "parameters": parameters},
    )
    engine = Engine.load(tmp_path / "out")
    chosen = {"num_beams": 3, "do_sample": True, **parameters}
    assert {key: engine.manifest.parameters[key] for key in chosen} == chosen
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if "do_sample" in parameters:
        got = answers(engine, [Request({"text": text}, {"max_new_tokens": 20}) for text in TEXTS])
        own = {"num_beams": 3, "stop_strings": ["."]}
        assert [written(value) for value in got] == [generated(model, tokenizer, text, **own) for text in TEXTS]


def test_parameters_that_add_sampling_to_beams_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = copy(checkpoint, tmp_path / "mine", "gpt2", num_beams=3)
    config, _ = parse_config({"model_name": str(source), "task": "text_generation", "parameters": {"do_sample": True}})
    with pytest.raises(SourceError, match="generation_config.json with parameters sets num_beams to 3 and do_sample"):
        sources.fetch_checkpoint(config, tmp_path)


def test_settings_that_are_no_object_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = copy(checkpoint, tmp_path / "mine", "gpt2")
    (source / "generation_config.json").write_text("[]")
    config, _ = parse_config({"model_name": str(source), "task": "text_generation"})
    with pytest.raises(SourceError, match="generation_config.json should hold a JSON object, not a list"):
        sources.fetch_checkpoint(config, tmp_path)


def test_refused_in_a_config_of_before_there_was_such_a_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = copy(checkpoint, tmp_path / "mine", "bart")
    (source / "generation_config.json").unlink()
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_return_sequences": 3}))
    with pytest.raises(SourceError, match="config.json sets num_return_sequences to 3"):
        exported(tmp_path / "out", "bart", source)


@pytest.mark.parametrize(
    "value", [{"num_beams": 0}, {"temperature": "warm"}, {"do_sample": "yes"}, {"top_p": 3}, {"length_penalty": -3}]
)
def test_a_parameter_without_a_legal_value_is_named(
    value: Dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = copy(checkpoint, tmp_path / "mine", "gpt2", **value)
    with pytest.raises(TraceserveError, match=next(iter(value))):
        exported(tmp_path / "out", "gpt2", source)


# With the tokens that the model writes most.
FOLLOWED: List[Tuple[str, Callable[[List[int]], Dict[str, Any]]]] = [
    ("marian", lambda ids: {"renormalize_logits": True, "bad_words_ids": [[i, i] for i in ids[:4]], "num_beams": 4}),
    ("bart", lambda ids: {"encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 2.5, "num_beams": 2}),
    ("bart", lambda ids: {"stop_strings": "Q", "forced_bos_token_id": 9, "forced_eos_token_id": 2}),
    ("gpt2", lambda ids: {"stop_strings": ["a"], "num_beams": 4, "length_penalty": 2.0}),
    ("gpt2", lambda ids: {"encoder_repetition_penalty": 3.0, "begin_suppress_tokens": ids[:3], "stop_strings": ["e"]}),
    ("gpt2", lambda ids: {"prompt_lookup_num_tokens": 3, "return_dict_in_generate": True, "output_scores": True}),
    ("bart", lambda ids: {"prompt_lookup_num_tokens": 3, "num_beams": 2, "low_memory": True}),
    ("gpt2", lambda ids: {"cache_implementation": "static", "remove_invalid_values": True, "output_logits": True}),
]


@pytest.mark.parametrize("number", range(len(FOLLOWED)))
def test_followed_as_by_generate(number: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The export's gate compares too; this asks the original directly, and checks that the settings matter."""
    architecture, chosen = FOLLOWED[number]
    auto_model = TASKS[architecture][1]
    source = checkpoint(architecture, auto_model)
    model = getattr(transformers, auto_model).from_pretrained(source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    beams = 1 if architecture == "gpt2" else 4
    inputs = [tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in TEXTS]
    before = [model.generate(**one, do_sample=False, max_new_tokens=20, num_beams=beams)[0, 1:] for one in inputs]
    ids = Counter(int(token) for own in before for token in own if token not in tokenizer.all_special_ids)
    settings = chosen([token for token, _ in ids.most_common()])
    followed = {key: value for key, value in settings.items() if key in generation.FOLLOWED}
    beams = followed.pop("num_beams", beams)
    texts = [*TEXTS, tokenizer.decode(before[0][:8], skip_special_tokens=True)]  # includes the model's own text

    engine = exported(tmp_path / "out", architecture, copy(checkpoint, tmp_path / "mine", architecture, **settings))
    got = answers(engine, [Request({"text": text}, {"max_new_tokens": 20}) for text in texts])
    expected = [generated(model, tokenizer, text, num_beams=beams, **followed) for text in texts]
    assert [written(value) for value in got] == expected
    without = [generated(model, tokenizer, text, num_beams=beams) for text in texts]
    assert (expected != without) is bool(followed)
    if "renormalize_logits" in settings:  # it matters by itself
        followed.pop("renormalize_logits")
        assert expected != [generated(model, tokenizer, text, num_beams=beams, **followed) for text in texts]


def test_a_stop_string_of_a_request_ends_beams(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("gpt2", "AutoModelForCausalLM")
    engine = exported(tmp_path / "out", "gpt2", source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    stop = ["e", "qu"]
    parameters = {"max_new_tokens": 20, "num_beams": 3}
    got = answers(engine, [Request({"text": text}, {**parameters, "stop": stop}) for text in TEXTS])
    expected = [generated(model, tokenizer, text, num_beams=3, stop_strings=stop) for text in TEXTS]
    assert [written(value) for value in got] == expected
    assert expected != [generated(model, tokenizer, text, num_beams=3) for text in TEXTS]


def test_stop_strings_with_a_vocabulary_that_the_originals_own_criterion_cannot_read(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """It writes each token behind "abcdef", which this tokenizer does not know."""
    source = copy(checkpoint, tmp_path / "mine", "gpt2")
    models.make_tokenizer("wordpiece").save_pretrained(source)
    path = source / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {piece.replace("f", "\u0192"): number for piece, number in vocabulary.items()}
    path.write_text(json.dumps(content))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    with pytest.raises(ValueError, match="substring not found"):
        transformers.StopStringCriteria(tokenizer, "e")

    engine = exported(tmp_path / "whole", "gpt2", source)
    whole = [written(value) for value in answers(engine, [Request({"text": text}) for text in TEXTS])]
    stop = Counter(letter for letter in "".join(whole) if letter.isalpha()).most_common(1)[0][0]
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**settings, "stop_strings": [stop]}))
    engine = exported(tmp_path / "stopped", "gpt2", source)
    stopped = [written(value) for value in answers(engine, [Request({"text": text}) for text in TEXTS])]
    assert stopped != whole
    for before, after in zip(whole, stopped):
        longest = max(map(len, vocabulary))
        at = before.find(stop)
        assert before.startswith(after)
        assert at < len(after) <= at + longest if at >= 0 else after == before


def test_what_is_done_to_scores_is_what_the_original_processors_do() -> None:
    rng = np.random.default_rng(3)
    for trial in range(60):
        scores = (rng.standard_normal(40) * 3).astype(np.float32)
        source, tokens = (rng.integers(0, 9, size).tolist() for size in (12, int(rng.integers(1, 7))))
        size, penalty = int(rng.integers(1, 4)), float(rng.uniform(0.4, 3))
        options = {"source": tuple(source), "source_ngram_size": size, "source_penalty": penalty}
        settings = GenerationSettings(9, **options, renormalize=trial % 2 == 0)  # type: ignore[arg-type]
        processors = transformers.LogitsProcessorList(
            [
                transformers.EncoderRepetitionPenaltyLogitsProcessor(penalty, torch.tensor([source])),
                transformers.EncoderNoRepeatNGramLogitsProcessor(size, torch.tensor([source])),
                *([transformers.LogitNormalization()] if trial % 2 == 0 else []),
            ]
        )
        expected = processors(torch.tensor([tokens]), torch.from_numpy(scores[None].copy()))[0].numpy()
        np.testing.assert_allclose(
            loop.processed(scores, np.array(tokens[:1]), tokens[1:], settings), expected, rtol=1e-5, atol=1e-5
        )


# Prefixes that the pipelines prepend.


def edit(folder: Path, **settings: Any) -> Path:
    """Return the checkpoint with these keys in its config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def test_the_prefix_of_a_text_to_text_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As in transformers 4.57's pipeline: config.json's prefix, or its own task_specific_params'."""
    params = {
        "summarization": {"prefix": "summarize: ", "min_length": 30},
        "text2text-generation": {"prefix": "please sell ", "num_beams": 2, "min_length": 9, "early_stopping": True},
    }
    source = edit(copy(checkpoint, tmp_path / "mine", "bart"), prefix="never ", task_specific_params=params)
    engine = exported(tmp_path / "out", "bart", source)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(checkpoint("bart", TASKS["bart"][1])).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    own = {"num_beams": 2, "early_stopping": True, "min_length": 9}
    got = answers(engine, [Request({"text": text}, {"max_new_tokens": 20}) for text in TEXTS])
    assert [written(v) for v in got] == [generated(model, tokenizer, "please sell " + text, **own) for text in TEXTS]
    assert [written(v) for v in got] != [generated(model, tokenizer, text, **own) for text in TEXTS]
    assert engine.manifest.parameters["num_beams"] == 2

    text = "a parcel " * 90
    [cut] = engine.answer([Request({"text": text}, {"max_new_tokens": 4, "long_inputs": "truncate"})])
    start, end = cut.unseen["text"]  # type: ignore[union-attr]  # counted in the client's own text
    whole = tokenizer("please sell " + text[:start])["input_ids"]
    assert end == len(text) and len(whole) in (127, 128, 129)


def test_settings_for_other_pipelines_are_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    params = {"summarization": {"min_length": 30}, "text2text-generation": {"num_beams": 2}, "translation_en_to_de": {}}

    def note(architecture: str, name: str) -> Any:
        source = edit(copy(checkpoint, tmp_path / architecture, architecture), task_specific_params=params)
        config, _ = parse_config({"model_name": str(source), "task": name})
        return sources.fetch_checkpoint(config, tmp_path).note

    assert note("bart", "text2text_generation") == (
        "config.json's task_specific_params has settings for summarization, which the task text2text_generation does not "
        "read: set them in parameters, or in a request"
    )
    assert "settings for summarization, text2text-generation, which" in note("gpt2", "text_generation")


def test_the_prefix_of_a_decoder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Prepended to each prompt, not returned, and not counted in max_length, as in the pipeline."""
    params = {
        "text-generation": {"do_sample": True, "max_length": 9, "prefix": "never "}
    }  # which transformers 5 ignores
    source = copy(checkpoint, tmp_path / "mine", "gpt2", max_length=24, min_length=20, eos_token_id=[9, 11])
    edit(source, prefix="please sell the train ", task_specific_params=params)
    engine = exported(tmp_path / "out", "gpt2", source)
    pipeline = transformers.pipeline("text-generation", model=str(source), device="cpu")
    for text in ("The", "Where is", "Ada"):
        [value] = answers(engine, [Request({"text": text})])
        if int(transformers.__version__.split(".")[0]) >= 5:
            assert value == pipeline([text], do_sample=False)[0]
        assert written(value).startswith(text)
    assert engine.manifest.facts["prefix"] == "please sell the train "


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"prefix": ["a"]}, r"config.json says prefix = \['a'\], but it should be a string"),
        (
            {"task_specific_params": {"text2text-generation": {"num_return_sequences": 2}}},
            "sets num_return_sequences to 2",
        ),
        ({"task_specific_params": {"text2text-generation": {"tone": "warm"}}}, "task_specific_params has the key tone"),
    ],
)
def test_a_prefix_or_part_that_cannot_be_followed(
    settings: Dict[str, Any], words: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = edit(copy(checkpoint, tmp_path / "mine", "bart"), **settings)
    with pytest.raises(TraceserveError, match=words):
        exported(tmp_path / "out", "bart", source)
