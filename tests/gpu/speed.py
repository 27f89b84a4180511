"""Tokens per second of the engine, text in and answer out, compared with transformers on the same GPU."""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import transformers
from traceserve.building.gate.corpus import sentences
from traceserve_runtime.batching.batches import filled
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks.contract import Request

from gpu import checkpoints
from gpu.answers import build, few_samples

BATCHES = (1, 32, 256)
NEW_TOKENS = 64
_ROUNDS = 3
_SECONDS = 0.6  # per measurement and round


class Speed(NamedTuple):
    """Real tokens per second: of the texts, or of the generated ones; padding is not counted."""

    model: str
    dtype: str
    what: str  # who answered
    batch: int  # concurrent requests
    tokens_per_second: float
    spread: float  # (most - least) / median over the rounds


class Candidate(NamedTuple):
    """A contender that answers a list of texts; `tokens` counts what one call computes or writes."""

    what: str
    call: Callable[[Sequence[str]], Any]


def lengths(count: int, longest: int, seed: int = 0) -> List[int]:
    """Return a realistic mix: everyday sentences by words, and one text in ten of a quarter of `longest` to `longest`
    words."""
    chosen = random.Random(seed)
    everyday = [len(text.split()) for text in sentences(512)]
    return [
        chosen.randint(longest // 4, longest) if i % 10 == 9 else everyday[chosen.randrange(len(everyday))]
        for i in range(count)
    ]


def prepared(name: str, folder: Path, dtype: str, small: bool) -> Tuple[Path, Path]:
    """Return the checkpoint `name` and its artifact in this dtype; each is made once."""
    size = checkpoints.SIZES[name]
    source, artifact = folder / name, folder / f"{name}-{dtype}-artifact"
    if not source.exists():
        checkpoints.make(source, name, small)
    if not artifact.exists():
        with few_samples():
            build(source, size.task, "torchscript", dtype, artifact, size.max_length)
    return source, artifact


def measure(
    name: str, folder: Path, device: str, dtype: str, small: bool, compiled: bool, left: Callable[[], float]
) -> Iterator[Speed]:
    """Measure one model in one dtype, alternating between candidates in each round."""
    source, artifact = prepared(name, folder, dtype, small)
    engine = Engine.load(artifact, device)
    engine.warm_up()
    engine.scheduler.measure()
    words = checkpoints.vocabulary(name, small)
    writes = engine.task.loop
    if not writes:
        yield _of_the_model(engine, name, dtype, device, small)
    own = _writer(source, device, dtype) if writes else _classifier(source, device, dtype, False)
    candidates = [Candidate("traceserve", _engine(engine)), Candidate("transformers", own)]
    if compiled and not writes and left() > 90:
        candidates.append(Candidate("torch.compile", _classifier(source, device, dtype, True)))
    for batch in (1, 2) if small else BATCHES:
        texts = checkpoints.texts(lengths(batch, 60 if small or writes else 250), words, seed=batch)
        tokens = NEW_TOKENS * batch if writes else sum(len(text.split()) + 2 for text in texts)
        yield from _in_turn(candidates, texts, tokens, name, dtype, device, small)


def _in_turn(
    candidates: Sequence[Candidate], texts: Sequence[str], tokens: int, name: str, dtype: str, device: str, small: bool
) -> Iterator[Speed]:
    found: Dict[str, List[float]] = {candidate.what: [] for candidate in candidates}
    for candidate in candidates:
        for _ in range(2):
            candidate.call(texts)
    for _ in range(1 if small else _ROUNDS):
        for candidate in candidates:
            found[candidate.what].append(tokens / _seconds(lambda own=candidate: own.call(texts), device, small))
    for what, rates in found.items():
        median = statistics.median(rates)
        yield Speed(name, dtype, what, len(texts), median, (max(rates) - min(rates)) / median)


def _seconds(call: Callable[[], Any], device: str, small: bool) -> float:
    """Return one call's seconds, averaged over as many as fit."""
    calls, began = 0, time.perf_counter()
    while not calls or (time.perf_counter() - began < _SECONDS and not small):
        call()
        calls += 1
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def _of_the_model(engine: Engine, name: str, dtype: str, device: str, small: bool) -> Speed:
    """Measure the runner alone, with 256 unpadded rows of 128 tokens."""
    batch, length = (4, 16) if small else (256, 128)
    inputs = filled(engine.manifest, batch, length)
    for _ in range(3):
        engine.runner(inputs)
    rates = [
        batch * length / _seconds(lambda: engine.runner(inputs), device, small) for _ in range(1 if small else _ROUNDS)
    ]
    median = statistics.median(rates)
    return Speed(
        name, dtype, f"the model alone, {length} tokens each", batch, median, (max(rates) - min(rates)) / median
    )


def _engine(engine: Engine) -> Callable[[Sequence[str]], Any]:
    parameters = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS} if engine.task.loop else {}

    def call(texts: Sequence[str]) -> Any:
        answers = engine.answer([Request({"text": text}, parameters) for text in texts])
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    return call


def _original(source: Path, device: str, dtype: str, auto_model: str) -> Any:
    model = getattr(transformers, auto_model).from_pretrained(source, dtype=getattr(torch, dtype))
    return model.to(device).eval()


def _classifier(source: Path, device: str, dtype: str, compiled: bool) -> Callable[[Sequence[str]], Any]:
    """Tokenize together, pad to the longest, return the best label and its score, like a careful user."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = _original(source, device, dtype, "AutoModelForSequenceClassification")
    if compiled:
        model = torch.compile(model, dynamic=True)

    def call(texts: Sequence[str]) -> Any:
        inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(device)
        with torch.inference_mode():
            return model(**inputs).logits.float().softmax(-1).max(-1).values.cpu().tolist()

    return call


def _writer(source: Path, device: str, dtype: str) -> Callable[[Sequence[str]], Any]:
    """Run `generate`, greedy, left-padded."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, padding_side="left")
    model = _original(source, device, dtype, "AutoModelForCausalLM")

    def call(texts: Sequence[str]) -> Any:
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt", return_token_type_ids=False).to(device)
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return call


def peak(device: str, dtype: str) -> Optional[float]:
    """Return this dtype's TFLOP/s in a large matrix product; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    one = torch.randn(8192, 8192, device=device, dtype=getattr(torch, dtype))
    for _ in range(3):
        one @ one
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        one @ one
    torch.cuda.synchronize()
    return 2 * 8192**3 * 10 / (time.perf_counter() - began) / 1e12
