"""A real Ray Serve on this machine, with the demo's classifier: `nox -s ray`."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Dict, Iterator, List

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from traceserve import cli
from traceserve.archives.archive import pack_archive
from traceserve.serving import configuration, instances, server
from traceserve.serving.engines import RAY
from traceserve.serving.instances import Instance
from traceserve_hosts import KEY_VARIABLE
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks.contract import Answer, Request

TEXTS = ["Where is my parcel?", "Please cancel my order.", "The cup is broken.", "I want to speak to a human."] + [
    f"I have waited {days} days for my parcel, and nobody answers." for days in range(20)
]

collect_ignore_glob = [] if importlib.util.find_spec("ray") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No server of the user is seen, and none of the tests' is left."""
    patch = pytest.MonkeyPatch()
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
    yield
    for instance in instances.running():
        instances.stop(instance, at_once=True)
    patch.undo()


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "intents"
    config = folder.with_name("setup_config.json")
    config.write_text('{"model_name": "demo:support-intents", "max_length": 64, "dtype": "float32"}')
    assert cli.main(["export", "--config", str(config), "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def archives(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> List[Path]:
    """Two versions of one name, and another one."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two", "other")]
    named = (("intents", "1.0"), ("intents", "2.0"), ("other", "1.0"))
    return [pack_archive(artifact, name, folder, version) for folder, (name, version) in zip(folders, named)]


@pytest.fixture(scope="session")
def engine(artifact: Path) -> Engine:
    """Says what is right."""
    return Engine.load(artifact)


@pytest.fixture(scope="module")
def served(archives: List[Path]) -> Iterator[Instance]:
    """One archive, in two replicas of one core each, without a key: the user's is for addresses beyond the loopback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, "of the user")
        instance = server.start(archives[:1], port=configuration.free_ports(1)[0], workers=2, timeout=180, engine=RAY)
    yield instance
    instances.stop(instance)


@pytest.fixture(scope="session")
def expected(engine: Engine) -> Dict[bytes, bytes]:
    """The right answers, by the requests' bodies."""
    found = {}
    for text in TEXTS:
        [answer] = engine.answer([Request({"text": text}, {})])
        assert isinstance(answer, Answer)
        found[json.dumps({"text": text}).encode()] = json.dumps(answer.value).encode()
    return found
