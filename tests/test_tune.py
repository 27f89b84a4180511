"""Tuning: real and apparent wins, the waste of padding, and the command with real servers."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, TextIO

import numpy as np
import pytest
from conftest import ROOT
from test_space import Mount, mount  # noqa: F401  (a fixture)
from traceserve.archives import staging
from traceserve.archives.contents import configure_archive, read_manifest, read_serving
from traceserve.archives.model_config import Serving
from traceserve.cli import _parse, main
from traceserve.errors import ConfigError, ServerError
from traceserve.measuring import tune
from traceserve.measuring.candidates import settings_to_try
from traceserve.measuring.load_generator import Result
from traceserve.measuring.padding import wastes
from traceserve.measuring.search import Goal, ServingSearch, Trial, judge
from traceserve.serving import configuration, instances, server
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.batching.costs import CostModel
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.manifest import Manifest, sha256
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.requests import parse_requests
from traceserve_runtime.runner import IN_ATTENTION
from traceserve_runtime.settings import Settings
from traceserve_runtime.texts.limits import RequestLimits

OWN = Serving(batch_size=32, max_batch_delay=2, response_timeout=300)

# --- what padding wastes ----------------------------------------------------------------------------------------------

LENGTHS = [[4], [8], [20]]


@pytest.mark.parametrize(
    "cost, step, expected",
    [
        # 32 real tokens. Fixed: 3 x 32. Buckets: 16, 16 and 32. Dynamic: each row alone, since a run costs nothing.
        (CostModel(0.0, 1.0, 0.0), None, [(64 / 96, 64 / 96), (32 / 64, 32 / 64), (0.0, 0.0)]),
        # In steps of 8: 8, 8 and 24.
        (CostModel(0.0, 1.0, 0.0), 8, [(64 / 96, 64 / 96), (32 / 64, 32 / 64), (8 / 40, 8 / 40)]),
        # In steps of 40: 32, the longest.
        (CostModel(0.0, 1.0, 0.0), 40, [(64 / 96, 64 / 96), (32 / 64, 32 / 64), (64 / 96, 64 / 96)]),
        # Only attention: 4² + 8² + 20² = 480 of 3 x 32², and of 2 x 16² + 32².
        (
            CostModel(0.0, 0.0, 1.0),
            None,
            [(64 / 96, 1 - 480 / 3072), (32 / 64, 1 - 480 / 1536), (0.0, 0.0)],
        ),
        # Runs are expensive: all three rows in one of 20 tokens, or of 32.
        (
            CostModel(1000.0, 1.0, 0.0),
            None,
            [(64 / 96, 64 / 1096), (64 / 96, 64 / 1096), (28 / 60, 28 / 1060)],
        ),
    ],
)
def test_waste_by_hand(cost: CostModel, step: Optional[int], expected: Sequence[Sequence[float]]) -> None:
    found = wastes(LENGTHS, max_length=32, batch_size=3, length_step=step, cost=cost)
    for waste, (tokens, of_cost) in zip(found, expected):
        assert waste.tokens == pytest.approx(tokens) and waste.cost == pytest.approx(of_cost)
    assert [waste.name.split()[0] for waste in found] == ["fixed", "buckets", "dynamic"]
    assert found[0].name == "fixed (32)" and found[1].name == "buckets (16, 32)"


def test_waste_where_padding_is_computed_in_attention_alone() -> None:
    """Two rows of 4 and 20 in one run: 32 positions each, of which 40 are padding and count a tenth."""
    cost = CostModel(run=1000.0, attention=0.0, padding=IN_ATTENTION)
    [*_, dynamic] = wastes([[4], [20]], max_length=40, batch_size=2, cost=cost)
    assert (dynamic.tokens, dynamic.cost) == pytest.approx((4 / 28, 4 / 1028))


def test_waste_is_within_a_batch() -> None:
    """One request at a time never shares a micro-batch; windows of one request do."""
    dear = CostModel(1000.0, 1.0, 0.0)
    assert wastes(LENGTHS, 32, batch_size=1, cost=dear)[2].tokens == 0
    [_, few, dynamic] = wastes([[4, 8, 20]], 100, batch_size=1, cost=dear)
    assert dynamic.tokens == pytest.approx(28 / 60) and few.name == "buckets (16, 32, 64, 100)"


def test_an_order_by_length_flatters_nothing() -> None:
    lengths = [[n] for n in range(1, 65) for _ in range(4)]
    shuffled = lengths[:]
    random.Random(7).shuffle(shuffled)
    dear = CostModel(1e6, 1.0, 0.0)
    one, other = (wastes(each, 64, batch_size=4, cost=dear)[2].tokens for each in (lengths, shuffled))
    assert one > 0.2 and one == pytest.approx(other, abs=0.05)


# --- what wins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratios, verdict",
    [
        ([0.7], False),  # hopeless
        ([2.0], None),  # one slice proves nothing
        ([0.9, 0.96], False),
        ([0.9, 1.2], None),
        ([1.5, 1.5], None),
        ([1.10, 1.12, 1.11], True),
        ([1.02, 1.02, 1.02], False),  # surely, but too little
        ([0.95, 1.00, 1.30], None),  # the mean is high, and so is the noise
        ([1.10, 1.30, 1.20], None),
        ([0.80, 1.40, 0.90, 1.30, 1.10, 1.20], False),
        ([1.30, 1.10, 1.20, 1.15, 1.25], True),
        ([0.97, 0.98, 0.98], False),
    ],
)
def test_a_candidate_wins_by_more_than_the_noise(ratios: List[float], verdict: Optional[bool]) -> None:
    assert judge(ratios) is verdict
    if verdict:
        assert judge(ratios, noise=0.3) is None


@dataclass
class Bench:
    """A simulated machine: a model of its speed, its noise and its drift, and a clock."""

    rate: Callable[[Serving], float]  # maximum requests per second
    latency: Callable[[Serving], float] = lambda serving: 0.01  # seconds of a single request
    noise: float = 0.0
    drift: float = 0.0  # change of the machine's speed per second
    seed: int = 0
    fails: Dict[str, Callable[[Serving], bool]] = field(default_factory=dict)
    now: float = 0.0
    running: Set[Serving] = field(default_factory=set)
    measured: List[Serving] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def measure(self, serving: Serving, connections: int, seed: int) -> Result:
        if serving not in self.running:
            self.now += 4
            if self.fails.get("start", lambda serving: False)(serving):
                raise ServerError("the worker cannot load the archive: no memory")
            self.running.add(serving)
        assert len(self.running) <= 2
        self.now += 2
        self.measured.append(serving)
        speed = (1 + self.drift * self.now) * math.exp(self.random.gauss(0, self.noise))
        rate = speed * min(self.rate(serving), connections / self.latency(serving))
        errors = {"HTTP 503": 3} if self.fails.get("answer", lambda serving: False)(serving) else {}
        return Result(connections, None, 2.0, np.full(int(2 * rate), connections / rate), errors)

    def close(self, serving: Serving) -> None:
        self.running.discard(serving)


def search(bench: Bench, goal: Goal = Goal(64), seconds: float = 600, cores: int = 2) -> ServingSearch:
    found = ServingSearch(
        bench, goal, settings_to_try(cores, goal.connections, 128, OWN.batch_size), seconds, clock=lambda: bench.now
    )
    found.run([OWN])
    return found


def two_workers(serving: Serving) -> float:
    """Two workers of one thread are best, with batches of 16, without a step; the rest hardly matters."""
    rate = 300.0 + 250 * ((serving.workers or 1) == 2) - 50 * abs(math.log2(serving.batch_size / 16))
    return rate - 40 * ((serving.workers or 1) > 2) + 30 * (serving.threads == 1) - 2 * (serving.length_step or 0)


def test_the_best_is_found() -> None:
    found = search(Bench(two_workers, noise=0.01))
    best = found.best.serving
    assert (best.workers, best.threads, best.batch_size, best.max_batch_delay) == (2, 1, 16, 2)
    assert best.length_step is None and best.response_timeout == OWN.response_timeout
    assert found.best.relative == pytest.approx(two_workers(best) / two_workers(OWN), rel=0.05)
    assert found.trials[OWN].relative == 1.0 and found.in_time
    assert len(found.trials) == len({trial.serving for trial in found.trials.values()})


def test_noise_alone_changes_nothing() -> None:
    """If nothing matters and slices differ by a tenth, few runs are fooled, although each tries some nine
    candidates."""
    changed = sum(search(Bench(lambda serving: 500.0, noise=0.1, seed=seed)).best.serving != OWN for seed in range(60))
    assert changed <= 6


def test_drift_alone_changes_nothing() -> None:
    """A machine that keeps getting faster makes no later candidate better."""
    assert search(Bench(lambda serving: 500.0, drift=0.01)).best.serving == OWN
    assert search(Bench(two_workers, noise=0.01, drift=-0.001)).best.serving.workers == 2


def test_the_time_is_kept() -> None:
    for seconds in (15, 60, 120):
        bench = Bench(two_workers)
        found = search(bench, seconds=seconds)
        assert bench.now <= seconds + 15 and not found.in_time
    assert [trial.serving for trial in search(Bench(two_workers), seconds=1).trials.values()] == [OWN]


def test_batches_that_never_fill_are_mended_first() -> None:
    """Whatever else is tried, all would wait for the delay, and little time might be spent on that."""
    bench = Bench(lambda serving: 500.0, latency=lambda serving: 0.002 + 0.06 * (serving.batch_size > 4))
    found = search(bench, Goal(4), seconds=40)
    assert found.best.serving.batch_size == 4 and not found.in_time
    assert [trial.serving.batch_size for trial in found.trials.values()][:2] == [32, 4]


def test_what_fails_is_a_row_with_its_reason_and_never_chosen() -> None:
    fails = {"start": lambda s: s.workers == 2, "answer": lambda s: s.batch_size == 16}
    bench = Bench(two_workers, fails=fails)
    found = search(bench)
    assert found.best.serving.workers != 2 and found.best.serving.batch_size != 16 and not found.best.failure
    failures = {trial.failure for trial in found.trials.values() if trial.failure}
    assert failures == {
        "the worker cannot load the archive: no memory",
        "requests failed: 3 x HTTP 503",
    }
    assert bench.running <= {found.best.serving}


def test_an_own_configuration_that_does_not_start_is_replaced() -> None:
    own = replace(OWN, workers=64, threads=1)
    bench = Bench(two_workers, fails={"start": lambda s: s.workers == 64})
    found = ServingSearch(bench, Goal(64), settings_to_try(2, 64, 128, OWN.batch_size), 300, clock=lambda: bench.now)
    best = found.run([own, OWN])
    assert found.trials[own].failure and best.serving.workers == 2
    bench = Bench(two_workers, fails={"start": lambda s: True})
    with pytest.raises(ServerError, match="no memory"):
        ServingSearch(bench, Goal(64), settings_to_try(2, 64, 128, OWN.batch_size), 300, clock=lambda: bench.now).run(
            [own, OWN]
        )


def test_the_most_within_a_p99() -> None:
    """Large batches give the greatest throughput, small ones shorter times; the goal decides."""

    def rate(serving: Serving) -> float:
        return 200.0 + 10 * serving.batch_size

    def latency(serving: Serving) -> float:
        return 0.001 * serving.batch_size

    free = search(Bench(rate, latency), Goal(64))
    assert free.best.serving.batch_size == 64 and free.best.connections == 64
    within = search(Bench(rate, latency), Goal(64, p99=0.020))
    assert within.reaches(within.best) and within.best.percentile(99) <= 0.020
    assert within.best.serving.batch_size == 16 and within.best.connections == 6


def test_a_p99_that_nothing_reaches() -> None:
    found = search(Bench(two_workers, latency=lambda s: 0.05 - 0.01 * (s.workers == 2)), Goal(64, p99=0.001))
    assert not found.reaches(found.best) and found.best.connections == 1
    assert found.best.serving.workers == 2 and found.best.percentile(99) == pytest.approx(0.04, rel=0.05)
    message = tune.missed(found.best, found.goal, Path("x.mar"))
    assert "p99 of 1 ms or less" in message and "40.0 ms, with 1 connection (2 workers" in message


@pytest.mark.parametrize("batch_size", [16, 32])  # that 24 connections fill, and never do
@pytest.mark.parametrize("cores", [1, 2, 6, 96])
def test_candidates_fit_the_machine(cores: int, batch_size: int) -> None:
    tried: List[Serving] = [OWN]
    for setting in settings_to_try(cores, connections=24, longest_step=32, batch_size=batch_size):
        tried += [serving for ladder in setting(tried[-1]) for serving in ladder]
    layouts = {(s.workers or 1, s.threads or 1) for s in tried}
    assert all(workers * threads <= max(cores + 1, 1.5 * cores) for workers, threads in layouts)
    assert {(cores, 1), (1, cores)} <= layouts
    assert max(s.batch_size for s in tried) == 32 and {s.length_step for s in tried} <= {None, 8, 16, 32}


# --- real servers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mar(mar: Path, tmp_path: Path) -> Path:
    """A copy that may be changed, with texts beside it."""
    texts = ["Where is my parcel?", "The train to the coast leaves at nine.", "", "word " * 40, "Yes.", "x" * 400_000]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    return Path(shutil.copy(mar, tmp_path / "tiny.mar"))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert instances.running() == []


def command(*arguments: str) -> List[str]:
    return [sys.executable, "-m", "traceserve", "tune", "tiny.mar", "--samples", "texts.txt", *arguments]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=280)


def test_the_lengths_are_the_engines(mar: Path, tmp_path: Path) -> None:
    """The reported tokens and padding of the texts are those of the archive's own engine."""
    manifest = read_manifest(mar)
    task, texts = tune._read(mar, manifest, tmp_path / "texts.txt")
    assert [number for number, _ in texts.refused] == [5] and "characters" in texts.refused[0][1]
    with zipfile.ZipFile(mar) as file:
        file.extractall(tmp_path / "unpacked")
    engine, stats = Engine.load(tmp_path / "unpacked"), Stats()
    requests = [
        r
        for body in texts.bodies
        for r in parse_requests({"body": body}, Headers("text/plain"), type(task), 0, 9).requests
    ]
    engine.answer(requests, stats)
    assert stats.tokens == sum(map(sum, texts.lengths)) and stats.rows == sum(map(len, texts.lengths)) > len(requests)
    [*_, dynamic] = wastes(texts.lengths, manifest.max_length, len(requests), None, engine.scheduler.cost)
    assert dynamic.tokens == pytest.approx(stats.padding_share, abs=stats.micro_batches / stats.padded_tokens)


@pytest.mark.parametrize(("workers", "packs"), [(None, True), (1, True), (2, False)])
def test_a_runs_cost_is_measured_as_the_workers_run(
    workers: Optional[int], packs: bool, mar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several share their weights, and pack none."""
    loaded: List[Settings] = []
    scheduler = SimpleNamespace(measure=lambda: None, cost=CostModel())

    def load(folder: Path, settings: Settings) -> Any:
        loaded.append(settings)
        return SimpleNamespace(warm_up=lambda: None, scheduler=scheduler)

    monkeypatch.setattr(tune, "Engine", SimpleNamespace(load=load))
    assert tune._cost(mar, replace(OWN, workers=workers, threads=2)) is scheduler.cost
    assert [(settings.threads, settings.pack_weights) for settings in loaded] == [(2, packs)]


def test_texts_that_are_all_refused_are_told(mar: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * 400_000)
    with pytest.raises(ConfigError, match="refuses every text of --samples .*long.txt; number 1: "):
        tune._read(mar, read_manifest(mar), tmp_path / "long.txt")


def test_a_body_with_more_tokens_than_a_request_may_have_is_left_out(mar: Path, tmp_path: Path) -> None:
    """Its windows are not too many, but the server answers it with 413."""
    limits = RequestLimits.of(32, read_manifest(mar).max_rows)
    texts = ["a" * 40] * (limits.rows // 3)
    (tmp_path / "bodies.jsonl").write_text("\n".join(json.dumps(each) for each in (texts, ["Yes."])))
    _, found = tune._read(mar, read_manifest(mar), tmp_path / "bodies.jsonl")
    assert [number for number, _ in found.refused] == [1] and "tokens in the windows" in found.refused[0][1]
    assert len(found.lengths) == 1


def test_the_command_finds_and_writes_what_is_better(mar: Path) -> None:
    """An archive whose batches never fill, and wait for that: smaller batches are many times faster."""
    slow = replace(OWN, max_batch_delay=60)
    configure_archive(mar, slow)
    before = sha256(mar)
    users = server.start([mar], port=configuration.free_ports(1)[0], timeout=90)
    try:
        options = ("--connections", "4", "--budget", "60", "--html", "tune.html")
        tuned = run(*options, cwd=mar.parent)
        assert tuned.returncode == 0, tuned.stderr
        print(tuned.stdout)  # shown if anything below fails
        assert [instance.pid for instance in instances.running()] == [users.pid]
    finally:
        instances.stop(users)
    found = read_serving(mar)
    assert found.batch_size <= 4 or found.max_batch_delay < 60
    assert sha256(mar) != before
    [row] = [line for line in tuned.stdout.splitlines() if "chosen" in line]
    cells = row.split()
    assert cells[2:4] == [str(found.batch_size), str(found.max_batch_delay)] and float(cells[-2]) > 1.3
    assert "as it was" in tuned.stdout and "fixed (32)" in tuned.stdout and "left out: 1 samples" in tuned.stdout
    assert f"written into tiny.mar: {tune.describe_serving(found)}" in tuned.stdout
    assert "serve it:  traceserve serve tiny.mar" in tuned.stdout
    page = (mar.parent / "tune.html").read_text()
    assert tune.describe_serving(found) in page and "What padding costs" in page and 'src="http' not in page
    with zipfile.ZipFile(mar) as file:
        file.extractall(mar.parent / "unpacked")
    Manifest.read(mar.parent / "unpacked")


def test_an_archive_that_cannot_be_written_is_refused_first(
    mar: Path,
    mount: Mount,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Minutes of measuring would be lost; --dry-run writes nothing."""
    disk = mount("16m")
    shutil.copy(mar, disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    measured: List[object] = []

    def measure(*arguments: object) -> None:
        measured.append(arguments)
        raise ServerError("measured")

    monkeypatch.setattr(tune, "tune", measure)
    arguments = ["tune", str(disk / "tiny.mar"), "--samples", str(mar.parent / "texts.txt")]
    assert main(arguments) == 1 and not measured
    assert f"{disk / 'tiny.mar'} cannot be written: Read-only file system" in capsys.readouterr().err
    assert main([*arguments, "--dry-run"]) == 1 and len(measured) == 1


def test_an_artifact_is_named_as_such(artifact: Path, mar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(artifact), "--samples", str(mar.parent / "texts.txt")]) == 1
    assert f"{artifact} is an artifact, not an archive (.mar): `traceserve archive" in capsys.readouterr().err


def measured(batch_size: int) -> tune.Tuned:
    """What a run found, the best with this batch size."""
    best = replace(OWN, batch_size=batch_size)
    trial = Trial(best, 64, [Result(64, None, 1.0, np.full(9, 0.1), {})])
    texts = tune.Texts([b"Yes."], [[3]], "text/plain", [])
    return tune.Tuned([trial], trial, best, OWN, wastes([[3]], 32, 32, None, CostModel(0, 1, 0)), texts, 1.0, True)


def test_the_best_is_written_also_where_nobody_reads_the_table(
    mar: Path, monkeypatch: pytest.MonkeyPatch, unread: TextIO
) -> None:
    """It was measured for minutes."""
    monkeypatch.setattr(tune, "tune", lambda *arguments: measured(8))
    monkeypatch.setattr(sys, "stdout", unread)
    assert main(["tune", str(mar), "--samples", str(mar.parent / "texts.txt")]) == 1
    assert read_serving(mar).batch_size == 8


def test_the_best_is_written_also_where_the_page_fails(
    mar: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(path: Path, text: str) -> None:
        raise TraceserveError("it filled up")

    monkeypatch.setattr(tune, "tune", lambda *arguments: measured(4))
    monkeypatch.setattr(staging, "write_whole", fill)
    page = str(mar.parent / "tune.html")
    assert main(["tune", str(mar), "--samples", str(mar.parent / "texts.txt"), "--html", page]) == 1
    said = capsys.readouterr()
    assert "it filled up" in said.err and f"written into {mar}" in " ".join(said.out.split())
    assert read_serving(mar).batch_size == 4


def test_a_p99_out_of_reach_changes_nothing(mar: Path) -> None:
    before, page = sha256(mar), mar.parent / "tune.html"
    page.write_text("earlier")
    os.link(page, mar.parent / "earlier.html")
    options = ("--connections", "2", "--budget", "5", "--html", page.name)
    tuned = run("--target", "p99=0.01", *options, cwd=mar.parent)
    assert tuned.returncode == 1 and sha256(mar) == before
    assert "What padding costs" in page.read_text(encoding="utf-8")
    assert (mar.parent / "earlier.html").read_text() == "earlier"  # replaced, not overwritten
    assert re.search(r"p99 of 0.01 ms or less; the best was \d+\.\d ms, with 1 connection", tuned.stderr)
    assert "chosen" not in tuned.stdout


def test_interrupted_it_leaves_nothing(mar: Path) -> None:
    before = sha256(mar)
    process = subprocess.Popen(
        command("--budget", "60"), cwd=mar.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not instances.running() and time.monotonic() < deadline:
        time.sleep(0.1)
    [instance] = instances.running()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors
    assert sha256(mar) == before and instance.process is None and not os.path.exists(instance.folder)


def test_a_candidate_that_cannot_start_leaves_no_server(mar: Path, tmp_path: Path) -> None:
    """Its graph is not the manifest's, which the worker detects."""
    with zipfile.ZipFile(mar) as source:
        content = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(mar, "w") as file:
        for name, data in content.items():
            file.writestr(name, data + b"!" if name == "traced_model.pt" else data)
    texts = tune.Texts([b"Yes."], [[3]], "text/plain", [])
    with tune.Servers(mar, texts, 60, lambda what: None) as servers:
        with pytest.raises(ServerError, match="cannot load the archive"):
            servers.measure(OWN, 1, 0)
        assert instances.running() == []


def test_the_guides_commands_are_the_programs() -> None:
    """They need minutes and the reader's own model, so here they are only parsed."""
    lines = re.findall(r"^traceserve (tune .+)$", (ROOT / "docs" / "tune.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [_parse(line.split()).target for line in lines] == [None, 0.05]


@pytest.mark.parametrize("target", ["fast", "p99", "p99=", "p99=0", "p99=-3", "p99=nan", "p99=inf", "p50=3"])
def test_targets_that_mean_nothing_are_refused(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "x.mar", "--samples", "texts.txt", "--target", target])
    assert "should be throughput, or p99=MS" in capsys.readouterr().err


def test_trials_pool_what_was_measured() -> None:
    results = [Result(1, None, 1.0, np.full(n, seconds), {}) for n, seconds in ((98, 0.1), (10, 0.3), (1, 9.0))]
    trial = Trial(OWN, 1, results)
    assert trial.throughput == 10 and trial.percentile(50) == 0.1 and trial.percentile(100) == 9.0
    assert Trial(OWN, 1).percentile(99) == math.inf


def test_a_trials_p99_is_that_of_bench() -> None:
    """Of 100 requests 99 percent were no slower than the 99th, whatever the slowest took."""
    result = Result(1, None, 1.0, np.array([0.1] * 99 + [9.0]), {})
    assert Trial(OWN, 1, [result]).percentile(99) == result.percentile(99) == 0.1
