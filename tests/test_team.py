"""The number of cores of runs while other processes hold some."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, List

import pytest
import torch
from traceserve_hosts.batcher import Batcher
from traceserve_runtime.engine import Engine
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.runtimes import team
from traceserve_runtime.runtimes.team import Team
from traceserve_runtime.service import Call, Reply, Service
from traceserve_runtime.tasks.contract import Answer, Request


class Machine:
    """Cores, some held by others: a run with more threads than free cores waits for half of its time."""

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self.held = 0
        self.threads = cores
        self.took: List[int] = []  # cores per run
        self.now = self.computed = 0.0

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.computed

    def resize(self, threads: int) -> None:
        self.threads = threads

    def run(self) -> int:
        waits = self.threads > self.cores - self.held
        self.took.append(self.threads)
        self.now += 0.004 if waits else 0.002
        self.computed += 0.002
        return len(self.took)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(4)
    monkeypatch.setattr(team, "time", machine)
    return machine


def runs(own: Team, machine: Machine, count: int) -> List[int]:
    """Return the cores of each of this many more runs."""
    before = len(machine.took)
    for number in range(before + 1, before + count + 1):
        assert own.run(machine.run) == number
    return machine.took[before:]


def test_a_run_has_all_cores_while_they_are_free(machine: Machine) -> None:
    assert runs(Team(4, machine.resize), machine, 500) == [4] * 500


@pytest.mark.parametrize("held", [1, 2, 3, 4])
def test_what_others_hold_is_left_to_them(machine: Machine, held: int) -> None:
    own = Team(4, machine.resize)
    machine.held = held
    free = max(1, 4 - held)
    wanted = [cores for cores in range(4, free, -1) for _ in range(2)]
    assert runs(own, machine, len(wanted) + 10) == [*wanted, *[free] * 10]
    # At least one core is used, and repeated attempts become rare.
    later = runs(own, machine, 2000)[1000:]
    assert min(later) == free and later.count(free) > 950
    assert max(later) == free + 1


@pytest.mark.parametrize(
    "cores, computed, wanted", [(2, 0.65, 2), (2, 0.55, 1), (4, 0.77, 4), (4, 0.72, 3), (16, 0.85, 16), (16, 0.75, 15)]
)
def test_one_core_fewer_is_taken_where_that_is_faster(
    cores: int, computed: float, wanted: int, machine: Machine
) -> None:
    """Not beside what holds a core now and then, as a frontend and clients do: one of two cores is half of them."""
    own = Team(cores, machine.resize)

    def wait() -> None:
        machine.now += 1
        machine.computed += computed

    for _ in range(10):
        own.run(wait)
        if own.now < cores:
            break
    assert own.now == wanted


def test_cores_that_are_free_again_are_taken_again(machine: Machine) -> None:
    own = Team(4, machine.resize)
    machine.held = 2
    runs(own, machine, 300)
    machine.held = 0
    runs(own, machine, 800)
    assert runs(own, machine, 100) == [4] * 100


def test_one_run_that_waited_changes_nothing_and_two_not_for_long(machine: Machine) -> None:
    own = Team(4, machine.resize)
    for waiting, narrow in ((1, 0), (2, 20)):
        for _ in range(3):
            machine.held = 1
            runs(own, machine, waiting)
            machine.held = 0
            took = runs(own, machine, 1000)
            assert took.count(3) == pytest.approx(narrow, abs=1) and took.count(4) == 1000 - took.count(3)


def test_runs_of_other_threads_are_left_alone(machine: Machine) -> None:
    own = Team(4, machine.resize)
    assert runs(own, machine, 1) == [4]
    machine.held = 4
    thread = threading.Thread(target=runs, args=(own, machine, 50))
    thread.start()
    thread.join()
    assert machine.took == [4] * 51
    assert runs(own, machine, 3) == [4, 4, 3]


@pytest.mark.usefixtures("two_cores")
def test_it_is_the_first_threads_that_runs_but_no_lanes(machine: Machine) -> None:
    """Also if another thread made it, as that of a host that loads in one thread and answers in another."""
    own = Team(4, machine.resize)
    machine.held = 3
    with team.threads_kept(), ThreadPoolExecutor(1, initializer=team.take_one_core) as lane:
        assert lane.submit(runs, own, machine, 10).result() == [4] * 10
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(runs, own, machine, 7).result() == [4, 4, 3, 3, 2, 2, 1]
        assert lane.submit(runs, own, machine, 1).result() == runs(own, machine, 1) == [1]


def test_by_this_machines_clocks_a_run_that_sleeps_has_waited() -> None:
    asked: List[int] = []
    own = Team(2, asked.append)
    for _ in range(2):
        own.run(time.sleep, 0.01)
    assert asked == [1]


def test_an_error_is_the_runs_own(machine: Machine) -> None:
    own = Team(4, machine.resize)
    with pytest.raises(RuntimeError, match="poison"):
        own.run(_fail)
    assert runs(own, machine, 5) == [4] * 5


def _fail() -> None:
    raise RuntimeError("poison")


class WaitingGraph:
    """A runner's graph, after a wait; `seen` has torch's number of threads in each run."""

    def __init__(self, engine: Engine) -> None:
        runner: Any = engine.runner
        self._graph = runner._module
        self.seen: List[int] = []
        runner._module = self

    def __call__(self, *tensors: torch.Tensor) -> Any:
        self.seen.append(torch.get_num_threads())
        time.sleep(0.05)
        return self._graph(*tensors)


def test_a_model_runs_on_fewer_cores_once_it_shares_them(artifact: Path, two_cores: None) -> None:
    engine = Engine.load(artifact)
    graph = WaitingGraph(engine)
    [alone] = engine.answer([Request({"text": "Yes."})])
    for _ in range(2):
        engine.answer([Request({"text": "Yes."})])
    assert graph.seen == [2, 2, 2]  # an engine alone does not change its process
    engine.runner.share_cores()
    for _ in range(3):
        [answer] = engine.answer([Request({"text": "Yes."})])
    assert graph.seen[3:] == [2, 2, 1]
    assert isinstance(answer, Answer) and isinstance(alone, Answer)
    assert answer.value["label"] == alone.value["label"]
    assert answer.value["score"] == pytest.approx(alone.value["score"], abs=1e-6)


@pytest.mark.usefixtures("two_cores")
def test_a_host_that_answers_in_another_thread_shares_its_cores(artifact: Path) -> None:
    """As those on uvicorn, Ray and SageMaker: they load in the main thread."""
    engine = Engine.load(artifact)
    engine.make_ready()
    graph = WaitingGraph(engine)
    batcher = Batcher(Service(engine, "small", "1.0"), 8, 0.0)

    async def ask() -> List[int]:
        call = Call({"body": b"Yes."}, Headers("text/plain"))
        replies = [await batcher.ask(call).next() for _ in range(3)]
        return [reply.status for reply in replies if isinstance(reply, Reply)]

    assert asyncio.run(ask()) == [200] * 3
    assert graph.seen == [2, 2, 1]


@pytest.mark.usefixtures("two_cores")
def test_a_threads_own_number_is_kept_whatever_others_take() -> None:
    with pytest.raises(ValueError, match="nothing"), team.threads_kept() as threads:
        assert threads == 2
        with ThreadPoolExecutor(1, initializer=team.take_one_core) as other:
            assert other.submit(torch.get_num_threads).result() == 1
        torch.set_num_threads(1)
        raise ValueError("nothing")
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_cores")
def test_a_new_thread_waits_while_another_ones_number_is_the_processes() -> None:
    """Of archives that several threads load at once, one had no lanes, and left new threads with one core."""

    def number() -> int:
        with team.threads_kept() as threads:
            return threads

    with ThreadPoolExecutor(1) as pool:
        with team.threads_kept(), ThreadPoolExecutor(1, initializer=team.take_one_core) as lane:
            lane.submit(int).result()
            asked = pool.submit(number)
            time.sleep(0.2)
            assert not asked.done()
        assert asked.result() == 2
