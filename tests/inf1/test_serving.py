"""The real TorchServe: one core per worker, and no more workers than cores."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from neuron_double import cores
from traceserve.archives.archive import pack_archive
from traceserve.errors import ServerError
from traceserve.serving import configuration, instances, server
from traceserve.serving.client import predict
from traceserve.serving.instances import Instance
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks.contract import Answer, Request
from workers import worker_pids


@pytest.fixture(scope="module")
def mar(classifier: Path) -> Path:
    return pack_archive(classifier, "classifier", classifier.parent)


def start(mar: Path, workers: int) -> Instance:
    return server.start([mar], port=configuration.free_ports(1)[0], workers=workers, timeout=120)


def test_two_workers_have_a_core_each(mar: Path) -> None:
    [answer] = Engine.load(mar.parent / "bert").answer([Request({"text": "Where is my parcel?"})])
    cores.release()
    instance = start(mar, 2)
    try:
        assert isinstance(answer, Answer)
        for _ in range(4):
            value = predict(instance.address, "classifier", {"text": "Where is my parcel?"})
            assert value["label"] == answer.value["label"]
            assert value["score"] == pytest.approx(answer.value["score"], abs=1e-5)
        many = predict(instance.address, "classifier", [{"text": "late"}] * 9)
        assert len(many) == 9
        assert sorted(cores.owners()) == worker_pids(instance) and len(cores.owners()) == 2
        assert psutil.Process(cores.owners()[0]).environ()["NEURON_RT_NUM_CORES"] == "1"
    finally:
        instances.stop(instance)
    assert not cores.owners()


def test_no_more_workers_than_cores(mar: Path) -> None:
    with pytest.raises(ServerError, match="classifier would have 5 workers, but this machine has 4 NeuronCores"):
        start(mar, 5)


def test_no_chip(mar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_DOUBLE_CORES", "0")
    with pytest.raises(ServerError, match="classifier runs on Inf1, but this machine has no NeuronCore"):
        start(mar, 1)


def test_certain_cores_are_for_one_worker(mar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "0")
    with pytest.raises(ServerError, match="NEURON_RT_VISIBLE_CORES is 0, which all of 2 workers would take"):
        start(mar, 2)


def test_the_reason_of_a_worker_without_a_core_is_told(mar: Path) -> None:
    cores.initialize()  # this process has all of them
    with pytest.raises(ServerError, match="cannot load the archive: no NeuronCore for this worker"):
        start(mar, 1)
