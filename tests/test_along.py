"""The gate's rule for texts in a lower precision: along the original's own texts, token by token.

The models are trained for some seconds on the built-in sentences, so that they have clear answers: a random model's
tokens are near ties.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest
import torch
import transformers
from conftest import needs_native, nothing, run_export
from models import make_tokenizer
from test_verify import serving, verified
from traceserve import cli
from traceserve.archives.archive import pack_archive
from traceserve.archives.contents import unpack
from traceserve.building import attempt
from traceserve.building.checkpoints import loading, sources
from traceserve.building.config.parsing import parse_config
from traceserve.building.gate import along, verification
from traceserve.building.gate.along import Along, GivenText, read_along
from traceserve.building.gate.answers import compare_answers, written_answers
from traceserve.building.gate.corpus import sentences
from traceserve.building.gate.findings import LIMITS, MOST_DRIFT, NEAR_TIE, DriftError, Findings, TokenCounts
from traceserve.building.gate.golden import GOLDEN_FILE, GoldenSample, GoldenSet, _with_own_texts, read_golden
from traceserve.building.gate.reference import Reference
from traceserve.building.writers.lowering import int8 as lowering
from traceserve.building.writers.openvino import int8_weights
from traceserve.building.writers.openvino.quantizer import quantizer
from traceserve.checking.proof import Proof
from traceserve.checking.verifying import VerifiedSample, _by_own_texts, _differences
from traceserve.errors import ExportError
from traceserve.measuring import engine_figures
from traceserve_runtime.engine import Engine
from traceserve_runtime.generation.scores import GenerationSettings
from traceserve_runtime.generation.search import Beams
from traceserve_runtime.generation.steps import FEEDS
from traceserve_runtime.largest import largest
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.tasks.contract import Request

WIDE: Dict[str, Any] = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "llama": ("text_generation", "gpt", transformers.LlamaForCausalLM, lambda: transformers.LlamaConfig(**WIDE)),
    "t5": (
        "text2text_generation",
        "t5",
        transformers.T5ForConditionalGeneration,
        lambda: transformers.T5Config(d_model=96, d_kv=24, d_ff=192, num_layers=2, num_heads=4, dropout_rate=0.0),
    ),
}
Trained = Callable[[str], Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train a small writer on some sentences, each kind once."""
    made: Dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = train(tmp_path_factory.mktemp("trained") / kind, kind)
        return made[kind]

    return make


def train(folder: Path, kind: str, steps: int = 60) -> Path:
    _, tokens, model_class, make_config = KINDS[kind]
    tokenizer = make_tokenizer(tokens)
    config = make_config()
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.bos_token_id = config.eos_token_id
    config.decoder_start_token_id = config.pad_token_id
    torch.manual_seed(0)
    model: Any = model_class(config)
    read = tokenizer(list(sentences(64)), padding=True, return_tensors="pt")
    labels = read["input_ids"].masked_fill(read["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(steps):
        loss = model(**read, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip measuring, and ask for what the models were trained on."""
    monkeypatch.setattr(attempt, "measure_speeds", lambda folders, *rest: dict.fromkeys(folders, 1.0))
    monkeypatch.setattr(verification, "TEXTS", tuple(text[:20] for text in sentences(16)))


def content(trained: Trained, kind: str, **more: Any) -> Dict[str, Any]:
    return {"model_name": str(trained(kind)), "task": KINDS[kind][0], "max_length": 64, "save_mode": "openvino", **more}


@pytest.mark.parametrize(
    ("kind", "save_mode", "dtype"),
    [
        ("llama", "openvino", "int8"),
        ("llama", "torchscript", "bfloat16"),
        ("t5", "pretrained", "bfloat16"),
        ("t5", "openvino", "int8"),
        pytest.param(
            "llama",
            "openvino",
            "bfloat16",
            marks=needs_native("bfloat16"),
        ),
    ],
)
@pytest.mark.combinations
def test_a_good_lower_precision_passes(kind: str, save_mode: str, dtype: str, trained: Trained, tmp_path: Path) -> None:
    config = content(trained, kind, save_mode=save_mode, dtype=dtype)
    receipt = run_export(tmp_path / "x", config).manifest.receipt
    told = receipt["along_texts"]
    assert receipt["passed"] and receipt["in_float32"] == []
    assert told["texts"] == receipt["answers"] == 16 and 300 < told["tokens"] <= 16 * 24
    assert told["tokens_changed"] <= LIMITS[dtype].changed_elsewhere * told["tokens"]
    assert 0 < abs(told["mean_drift"]) < MOST_DRIFT
    assert told["limits"] == {"near_tie": 0.1, "mean_drift": 0.02}


def four_bits(model: Any, original: Any) -> Any:
    """Round all weights naively, to four bits with one range per output."""
    nncf = quantizer()
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=-1, ratio=1, all_layers=True)


def damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build "int8" with four bits, by any difference of outputs: the texts decide."""
    monkeypatch.setattr(int8_weights, "round_weights", four_bits)
    monkeypatch.setattr(lowering, "KEPT_SHARES", (0.0,))
    monkeypatch.setitem(LIMITS, "int8", LIMITS["int8"]._replace(difference=10.0))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_damaged_one_is_refused(
    kind: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(monkeypatch)
    (tmp_path / "c.json").write_text(json.dumps(content(trained, kind, dtype="int8")))
    assert cli.main(["export", "--config", str(tmp_path / "c.json"), "--output", str(tmp_path / "x")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "tokens of the original's texts would be others, near ties not counted" in said and "limit 1.5%" in said
    assert not (tmp_path / "x").exists()
    with pytest.raises(DriftError) as caught:
        run_export(tmp_path / "x", content(trained, kind, dtype="int8"))
    findings = caught.value.findings
    assert findings.along is not None and not findings.astray  # it writes what it computes
    assert findings.too_many_changed and findings.along.changed > 5


def test_float32_stays_token_for_token(trained: Trained, tmp_path: Path) -> None:
    receipt = run_export(tmp_path / "x", content(trained, "llama", dtype="float32")).manifest.receipt
    assert "along_texts" not in receipt and receipt["answers_changed"] == 0


def test_the_users_texts_decide(trained: Trained, tmp_path: Path) -> None:
    """334 tokens of them suffice, for a limit of 3 in 1,000."""
    (tmp_path / "mine.txt").write_text("".join(f"{text[:20]}\n" for text in sentences(30)[16:]))
    findings = run_export(
        tmp_path / "x", content(trained, "llama", dtype="int8"), samples_file=tmp_path / "mine.txt"
    ).findings
    assert findings.own_along is not None and findings.along is not None
    assert findings.own_along.texts == 14 == findings.own_answers and findings.along.texts == 30
    assert findings.own_along.tokens >= 334 and findings.own_decide and findings.passed
    few = replace(findings, own_along=TokenCounts(2, 48, 1, 0, 0.0), along=TokenCounts(30, 700, 9, 9, 7.0))
    assert not few.own_decide and few.judged == few.along and not few.too_many_changed
    many = replace(few, own_along=TokenCounts(20, 400, 2, 0, 0.0))
    assert many.own_decide and many.judged == many.own_along and many.too_many_changed
    assert not many.drifts and replace(many, own_along=TokenCounts(20, 400, 0, 0, -9.0)).drifts
    assert replace(many, own_along=TokenCounts(20, 400, 0, 0, float("nan"))).drifts


# Counting


def searched(choices: List[int], given: List[int], near: Tuple[int, ...] = ()) -> Along:
    """A search that made these choices; the last of them is nearly tied with some others."""
    search = Along([1], GenerationSettings(max_new_tokens=9), given)
    search.choices, search.logarithms = choices, [-1.0] * len(choices)
    search.rivals = [[choice] for choice in choices[:-1]] + [[choices[-1], *near]]
    return search


@pytest.mark.parametrize(
    ("gap", "changed", "near_ties"), [(0.05, 0, 1), (NEAR_TIE, 0, 1), (0.11, 1, 0), (np.inf, 1, 0)]
)
def test_a_near_tie_of_the_original_is_no_change(gap: float, changed: int, near_ties: int) -> None:
    """What decides is how much less the original likes the archive's choice, not how near its own second is."""
    text = {
        "tokens": np.array([7, 7]),
        "ids": np.array([[7, 8, 9], [7, 8, 9]]),
        "scores": np.array([[0.0, -0.01, -gap], [0.0, -3.0, -4.0]]),
        "logarithms": np.array([-1.5, -1.25]),
    }
    counts = along._counted(text, searched([9, 7], [7, 7]))
    assert counts == TokenCounts(1, 2, changed, near_ties, -0.75)
    assert along._counted(text, searched([5, 7], [7, 7])).changed == 1  # among none of its best


def test_a_forced_token_is_no_choice() -> None:
    text = {
        "tokens": np.array([7]),
        "ids": np.array([[7, 8]]),
        "scores": np.array([[0.0, -np.inf]]),
        "logarithms": np.array([-9.0]),
    }
    assert along._counted(text, searched([7], [7])) == TokenCounts(texts=1)


@pytest.mark.parametrize(
    ("scores", "choice", "changed", "near_ties"),
    [
        ([3.0, 0.0, -1.0], 8, 1, 0),  # its own best is another token, and the archive takes that
        ([3.0, 0.0, -1.0], 7, 1, 0),
        ([np.inf, np.nan, np.nan], 8, 1, 0),  # it forbids what it wrote
        ([np.inf, np.nan, np.nan], 7, 1, 0),
        ([0.05, 0.0, -1.0], 8, 0, 1),  # reading all at once rounds otherwise
        ([0.05, 0.0, -1.0], 7, 0, 0),
    ],
)
def test_settings_that_do_not_give_the_originals_text_are_changes(
    scores: List[float], choice: int, changed: int, near_ties: int
) -> None:
    text = {
        "tokens": np.array([7]),
        "ids": np.array([[8, 7, 9]]),
        "scores": np.array([scores]),
        "logarithms": np.array([-1.0]),
    }
    assert along._counted(text, searched([choice], [7])) == TokenCounts(1, 1, changed, near_ties, 0.0)


def test_whole_texts_decide_if_no_token_can_be_judged() -> None:
    found = Findings(LIMITS["int8"], answers=4, changed=[1, 2], along=TokenCounts(texts=4))
    assert found.judged is None and found.too_many_changed and not found.passed and found.share_changed == 0.5
    assert replace(found, changed=[]).passed
    own = replace(found, own_answers=400, own_changed=2, own_along=TokenCounts(texts=400))
    assert own.own_decide and own.too_many_changed and not replace(own, own_changed=1).too_many_changed


def read(logits: List[float], step: float = 0.0, **settings: Any) -> Along:
    search = Along([1], GenerationSettings(max_new_tokens=9, **settings), [0], step)
    assert search.advance(np.array([logits], dtype=np.float32)) is None
    return search


def test_near_ties_are_those_of_the_settings() -> None:
    assert read([5.0, 4.95, 4.92, 4.8]).rivals == [[0, 1, 2]]
    assert read([5.0, 4.95, 4.0], bad_words_ids=((1,),)).rivals == [[0]]
    assert read([4.0, 5.2, 0.0]).rivals == [[1]]
    assert read([4.0, 5.2, 0.0], repetition_penalty=1.3).rivals == [[0, 1]]  # the prompt has 1
    assert read([0.0, 9.0, 9.0], forced_bos_id=0).rivals == [[0]]


def test_two_steps_of_bfloat16_are_a_near_tie() -> None:
    assert read([20.0, 19.75, 19.0]).rivals == [[0]]
    assert read([20.0, 19.75, 19.0], along.STEPS["bfloat16"]).rivals == [[0, 1]]
    assert read([2.0, 1.85, 1.0], along.STEPS["bfloat16"]).rivals == [[0]]


def test_a_small_vocabulary_is_read_whole() -> None:
    assert largest(np.array([1.0, 3.0, 2.0]), 16).tolist() == [1, 2, 0]
    values = np.random.default_rng(0).random(5000)
    assert largest(values, 16).tolist() == np.argsort(-values, kind="stable")[:16].tolist()


def test_of_equal_values_the_first_are_chosen() -> None:
    values = np.random.default_rng(0).integers(0, 9, 5000).astype(np.float32)
    values[::7] = -np.inf
    for count in (1, 500, 4999, 5000):
        assert largest(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()


@pytest.mark.parametrize(
    ("wrote", "agrees"),
    [
        ([4, 5, 6], True),
        ([4, 9, 1], True),  # its choice at the second position; from there on it is another text
        ([4, 9], True),
        ([4, 8, 6], False),  # not what it chose
        ([7, 5, 6], False),
        ([4, 5], False),  # it ended too early
        ([4, 5, 8], True),  # a near tie of its own, which another batch decides otherwise
        ([4, 5, 3], False),  # no part of it
    ],
)
def test_what_is_written_is_what_was_chosen(wrote: List[int], agrees: bool) -> None:
    given, choices = ([4, 5, 6], [4, 9, 6]) if wrote[1:2] == [9] else ([4, 5, 6], [4, 5, 6])
    assert searched(choices, given, near=(8,)).agrees(wrote) is agrees


def test_a_loop_that_writes_something_else_is_refused(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its outputs on the grid are right, and so are its choices along the original's texts."""
    config = content(trained, "llama", dtype="int8")
    run_export(tmp_path / "x", config)
    engine = Engine.load(tmp_path / "x")
    checked, _ = parse_config(config)
    with loading.quiet_transformers():
        reference = Reference(loading.load_original(checked, sources.fetch_checkpoint(checked, tmp_path), tmp_path))
    samples = engine.task.from_texts([text[:20] for text in sentences(4)])

    def found() -> Findings:
        findings = Findings(LIMITS["int8"])
        compare_answers(engine, reference, samples, 0, findings, nothing)
        return findings

    assert found().alike and found().astray == []
    monkeypatch.setattr("traceserve_runtime.generation.search.Sampling.tokens", property(lambda self: [5] * 24))
    assert found().astray == [0, 1, 2, 3] and not found().alike


# Reading


@pytest.fixture(scope="module")
def exact(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Tuple[Engine, Reference, Path]:
    """An artifact that is the original itself, and this."""
    folder = tmp_path_factory.mktemp("exact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempt, "measure_speeds", lambda folders, *rest: dict.fromkeys(folders, 1.0))
        run_export(folder / "x", content(trained, "t5", save_mode="pretrained"))
    checked, _ = parse_config(content(trained, "t5"))
    with loading.quiet_transformers():
        reference = Reference(loading.load_original(checked, sources.fetch_checkpoint(checked, folder), folder))
    return Engine.load(folder / "x"), reference, folder / "x"


def asked(count: int, **parameters: Any) -> List[Request]:
    return [
        Request({"text": text[:20]}, {"max_new_tokens": 8, "num_beams": 1, **parameters}) for text in sentences(count)
    ]


def test_a_row_whose_step_failed_is_read_again(
    exact: Tuple[Engine, Reference, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, reference, _ = exact
    feed = FEEDS[engine.task.loop]
    step, failed = feed.next, []

    def once(self: Any, rows: Any, tokens: Any) -> Any:
        if len(rows) > 1 and not failed and given:
            failed.append(len(rows))
            raise RuntimeError("no memory")
        return step(self, rows, tokens)

    given = list(written_answers(engine, asked(4)))
    monkeypatch.setattr(feed, "next", once)
    task: Any = engine.task
    rows = [item.rows[0] for item in task.encode(asked(4))]  # type: ignore[union-attr]
    texts = [
        GivenText(row, task.settings(request, row, task.prompt(row)), tokens)
        for row, request, (_, tokens, _) in zip(rows, asked(4), given)
    ]
    searches = read_along(engine, texts)
    assert failed
    for search, (_, tokens, _) in zip(searches, given):
        assert search is not None and search.choices == list(tokens) and search.agrees(tokens)


def test_beams_claim_what_their_text_has(
    exact: Tuple[Engine, Reference, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, reference, _ = exact

    def found() -> Findings:
        findings = Findings(LIMITS["int8"])
        compare_answers(engine, reference, asked(3, num_beams=3, length_penalty=0.7), 0, findings, nothing)
        return findings

    assert found().alike and found().astray == []
    summed = Beams.logarithm.fget
    assert summed is not None
    monkeypatch.setattr(Beams, "logarithm", property(lambda self: summed(self) + 1.0))
    assert found().astray == [0, 1, 2] and not found().alike


def test_a_short_text_that_ends_by_itself_is_kept_without_details(exact: Tuple[Engine, Reference, Path]) -> None:
    engine, reference, folder = exact
    samples = [
        GoldenSample(
            {"text": text[:20]},
            {"num_beams": 1, "max_new_tokens": 12, "stop": " ", "details": True, "top_n_tokens": 2},
            None,
        )
        for text in sentences(8)
    ]
    found, _ = _with_own_texts(folder, engine.task, samples, reference)
    assert len(found.samples) > 2
    for sample in found.samples:
        assert sample.parameters == {
            "num_beams": 1,
            "max_new_tokens": 12,
            "stop": " ",
            "details": False,
            "top_n_tokens": 0,
        }
        assert sample.written is None and list(sample.answer) == ["generated_text"]


# Verifying a server


def test_a_server_writes_what_the_archive_wrote(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = content(trained, "t5", dtype="int8")
    run_export(tmp_path / "x", config)
    archive = pack_archive(tmp_path / "x", "x", tmp_path)
    found = read_golden(tmp_path / "x")
    assert found is not None and 4 < len(found.samples) <= 8
    engine = Engine.load(tmp_path / "x")
    for sample in found.samples:
        [answer] = engine.answer([Request(sample.inputs, sample.parameters)])
        assert answer.value == sample.expected and sample.parameters["num_beams"] == 1  # type: ignore[union-attr]
    unpack(archive, tmp_path / "served" / "x")
    with serving(tmp_path / "served" / "x") as url:
        right = verified(url, archive)
        assert right.passed and right.by_own_texts and right.document(True)["expected"] == "the archive's own texts"
        assert cli.main(["verify", url, "--archive", str(archive)]) == 0
        assert "verified: it answers as the archive at its build does" in capsys.readouterr().out
    damage(monkeypatch)
    run_export(tmp_path / "other" / "x", config, allow_drift=True)
    with serving(tmp_path / "other" / "x") as url:
        wrong = verified(url, archive)
    assert not wrong.passed
    assert any("texts differ from what the archive wrote at its build (int8)" in each for each in wrong.problems)


def test_the_originals_text_stands_beside_it(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch)
    run_export(tmp_path / "x", content(trained, "llama", dtype="int8"), allow_drift=True)
    found = read_golden(tmp_path / "x")
    assert found is not None
    others = [sample for sample in found.samples if sample.written is not None]
    assert others and all(sample.answer != sample.written == sample.expected for sample in others)
    document = json.loads((tmp_path / "x" / GOLDEN_FILE).read_text())
    assert ["written" in each for each in document["samples"]] == [each in others for each in found.samples]
    assert GOLDEN_FILE in Manifest.read(tmp_path / "x").files


def test_an_archive_that_never_ran_is_verified_by_the_original(exact: Tuple[Engine, Reference, Path]) -> None:
    engine, _, _ = exact
    manifest = replace(engine.manifest, dtype="bfloat16")
    changed = VerifiedSample(1, False, False, None, "a", "b", "", 1.0)
    ran, never = (Proof(manifest, engine.task, GoldenSet((), difference), None) for difference in (0.0, None))
    assert _by_own_texts(ran) and not _by_own_texts(never)
    assert "what the archive wrote at its build" in _differences([changed], ran, 0.1)[0]
    [said] = _differences([changed], never, 0.1)
    assert said.startswith("1 of 1 answers differ from the original's (bfloat16); the archive did not run at its build")


# Measuring


def test_texts_that_fail_are_not_measured(
    exact: Tuple[Engine, Reference, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _, _ = exact
    [item] = engine.task.encode(asked(1))
    rows = item.rows  # type: ignore[union-attr]
    assert engine_figures._write(engine, rows).tokens == 32
    with pytest.raises(ExportError, match="none of the first samples leaves room for two new tokens"):
        engine_figures._writing_figures(engine, [], 0.0)

    def fails(self: Any, *_: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(FEEDS[engine.task.loop], "next", fails)
    with pytest.raises(ExportError, match=r"a text ended after 1 of 32 tokens \(no memory\)"):
        engine_figures._write(engine, rows)
