"""An update without an engine's server: what it refuses, what it compares, and which live requests it counts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any, AsyncGenerator, Callable, Dict, Iterator, List

import pytest
from conftest import run_export, served_over_http
from test_instances import processes, remembered, state  # noqa: F401  (fixtures)
from traceserve import cli
from traceserve.building.gate.golden import GoldenSample
from traceserve.building.samples import OwnSamples
from traceserve.checking.proof import proof_of
from traceserve.errors import ConfigError, ServerError
from traceserve.rollout import draining
from traceserve.rollout.conditions import check_archive
from traceserve.rollout.engines.contract import ServedVersion
from traceserve.rollout.replaying import requests_of
from traceserve.rollout.shadowing import Shadowed, ShadowOptions, shadow
from traceserve.rollout.updating import UpdateOptions, UpdateRefused, _Update
from traceserve.serving import client
from traceserve.serving.configuration import MIRROR_FILE
from traceserve.serving.instances import Instance
from traceserve.serving.management import Registered
from traceserve.serving.plan import planned
from traceserve_hosts.asgi import Application, Limits, Message, Scope, replied
from traceserve_hosts.batcher import Batcher
from traceserve_hosts.routing import Router, messages
from traceserve_runtime.engine import Engine
from traceserve_runtime.mirror import Mirror
from traceserve_runtime.service import Service

RUNNING = ServedVersion("1.0", "tiny", 1)


async def failing(scope: Scope, receive: Any, send: Any) -> None:
    """A version that answers nothing."""
    await replied(send, 500, {"error": {"message": "no memory", "field": None}})


@pytest.fixture
def serve(processes: Any, archives: Path) -> Iterator[Callable[..., Instance]]:  # noqa: F811
    """Serves these archives by the versions that they are served as; 1.0 answers where none is named."""
    with contextlib.ExitStack() as stack:

        def started(**served: str) -> Instance:
            applications: Dict[str, Any] = {}

            async def ask(name: str, version: str, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
                async for message in messages(applications[version], scope, body):
                    yield message

            router = Router({"tiny": {version: float(version == "1.0") for version in served.values()}}, Limits(), ask)
            _, port = stack.enter_context(served_over_http(router))
            instance = remembered(processes, port)
            Path(instance.folder, "store", "tiny").symlink_to(archives / "1.0" / "tiny")
            mirror = Mirror(str(Path(instance.folder, MIRROR_FILE)))
            for source, version in served.items():
                applications[version] = failing
                if source != "failing":
                    engine = Engine.load(
                        archives / {"first": "1.0", "second": "2.0", "swapped": "3.0"}[source] / "tiny"
                    )
                    service = Service(engine, "tiny", version, mirror=mirror)
                    applications[version] = Application(service, Batcher(service, 8, 0.0))
            return instance

        yield started


@contextlib.contextmanager
def updating(instance: Instance, file: Path, said: List[str], **options: Any) -> Iterator[_Update]:
    """An update by this archive whose version runs at its own path already."""
    [archive] = planned([file], None, None, False).values()
    with proof_of(file) as proof:
        yield _Update(archive, instance, RUNNING, proof, UpdateOptions(**options), said.append)


def test_as_many_answers_may_change_as_are_allowed(serve: Callable[..., Instance], archives: Path) -> None:
    instance, said = serve(first="1.0", swapped="3.0"), []  # type: ignore[var-annotated]
    new = archives / "3.0" / "tiny.mar"
    with updating(instance, new, said) as update, pytest.raises(UpdateRefused) as refused:
        update._compare()
    assert refused.value.replay is not None
    moved, asked = len(refused.value.replay.moved), refused.value.replay.asked
    assert asked > 20 and asked >= moved > 1
    assert f"3.0 answers {moved} of {asked} requests otherwise than 1.0, and 0 may be" in refused.value.message
    with updating(instance, new, said, allowed_changes=moved - 1) as update, pytest.raises(UpdateRefused):
        update._compare()
    assert said == []
    with updating(instance, new, said, allowed_changes=moved) as update:
        assert len(update._compare().moved) == moved
    assert f"{asked} requests, {moved} answers changed ({moved} allowed)" in said[0]


def test_changed_answers_to_live_requests_count_beside_those_before(
    serve: Callable[..., Instance], archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = serve(first="1.0", swapped="3.0")
    found = Shadowed(5, 5, (), 0.0)
    monkeypatch.setattr("traceserve.rollout.updating.shadow", lambda *asked: found)
    with updating(instance, archives / "3.0" / "tiny.mar", [], allowed_changes=1000) as update:
        compared = update._compare()
        found = dataclasses.replace(found, moved=compared.moved[:1])
        for allowed in (len(compared.moved) + 1, len(compared.moved)):
            update._options = dataclasses.replace(update._options, allowed_changes=allowed)
            if allowed > len(compared.moved):
                assert update._shadow(ShadowOptions(1.0), compared) == found
            else:
                with pytest.raises(UpdateRefused, match="answers 1 of 5 live requests otherwise than 1.0"):
                    update._shadow(ShadowOptions(1.0), compared)


def test_a_version_that_answers_otherwise_than_its_build_is_refused(
    serve: Callable[..., Instance], archives: Path
) -> None:
    said: List[str] = []
    with updating(serve(first="1.0", swapped="2.0"), archives / "2.0" / "tiny.mar", said) as update:
        with pytest.raises(UpdateRefused, match="tiny 2.0 is not what was built: it runs another archive"):
            update._verify()
    with updating(serve(first="1.0", failing="2.0"), archives / "2.0" / "tiny.mar", said) as update:
        with pytest.raises(ServerError, match="^tiny/2.0 does not answer its own sample: no memory$"):
            update._verify()
    assert said == []
    with updating(serve(first="1.0", second="2.0"), archives / "2.0" / "tiny.mar", said) as update:
        assert update._verify().passed
    assert said[0].startswith("verified 2.0: ") and len(said) == 1  # all of the golden set
    with updating(serve(first="1.0", second="2.0"), archives / "2.0" / "tiny.mar", said, timeout=1e-9) as update:
        assert update._verify().passed
    assert re.fullmatch(r"note on 2.0: the last \d+ samples were not asked: --timeout was over", said[-1])


def shadowed(instance: Instance, archives: Path, new: str, ask: Callable[[Path], None], seconds: float) -> Shadowed:
    """What is found while `ask`, in a thread, is given the listener's path once it listens."""
    document = Path(instance.folder, MIRROR_FILE)

    def asking() -> None:
        while not document.exists():
            time.sleep(0.01)
        ask(Path(json.loads(document.read_text())["socket"]))

    thread = threading.Thread(target=asking)
    thread.start()
    file = archives / "2.0" / "tiny.mar"
    with updating(instance, file, []) as update:
        update._version = new
        options = ShadowOptions(1.0, seconds)
        found = shadow(instance, update._old(), update._new(), update._proof.task, ("tiny", "1.0"), options)
    thread.join()
    assert not document.exists() and not Path(instance.folder, "mirror.sock").exists()
    return found


def test_live_requests_of_the_old_version_alone_are_compared_each_once(
    serve: Callable[..., Instance], archives: Path
) -> None:
    """The new version shows what it answers too, also to the update itself."""
    instance = serve(first="1.0", second="2.0")
    Path(instance.folder, "mirror.sock").touch()  # left by an update that was killed

    def ask(listener: Path) -> None:
        for text in ("one", "two", "one", "one"):
            client.predict(instance.address, "tiny", {"text": text})
        client.predict(instance.address, "tiny/2.0", {"text": "three"})

    found = shadowed(instance, archives, "2.0", ask, 3.0)
    assert (found.shown, found.compared, found.moved) == (4, 2, ())


@pytest.mark.parametrize(("inputs", "moved"), [({"text": "hello"}, 1), ({"nonsense": "hello"}, 0)])
def test_a_live_request_that_only_the_new_version_refuses_has_changed(
    inputs: Dict[str, str], moved: int, serve: Callable[..., Instance], archives: Path
) -> None:
    """One that both refuse has not: another protocol may have allowed it."""

    def show(listener: Path) -> None:
        shown = {"name": "tiny", "version": "1.0", "inputs": inputs, "parameters": {}, "answer": {"label": "red"}}
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            for content in (b"no JSON", json.dumps(shown).encode()):
                sender.sendto(content, str(listener))

    found = shadowed(serve(first="1.0", failing="2.0"), archives, "2.0", show, 1.5)
    assert (found.compared, len(found.moved)) == (1, moved)
    assert [each.other for each in found.moved] == ["500: no memory"] * moved


def test_a_request_of_both_golden_sets_is_asked_once(archives: Path) -> None:
    with proof_of(archives / "1.0" / "tiny.mar") as old, proof_of(archives / "3.0" / "tiny.mar") as new:
        each = [
            json.dumps([sample.inputs, sample.parameters], sort_keys=True) for sample in requests_of([old, new], None)
        ]
        of_one = [json.dumps([s.inputs, s.parameters], sort_keys=True) for s in old.golden.samples]
    assert len(each) == len(set(each)) and set(of_one) <= set(each)


def test_of_the_users_samples_those_with_one_answer_are_asked(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = str(checkpoint("llama", "AutoModelForCausalLM"))
    run_export(tmp_path / "x", {"model_name": source, "task": "text_generation", "max_length": 48})
    sampled = [{"do_sample": True}, {"stream": True, "do_sample": False}]
    lines = [json.dumps({"text": f"Once {n}", "parameters": each}) for n, each in enumerate(sampled)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    with proof_of(tmp_path / "x") as proof:
        with pytest.raises(ConfigError, match="own.jsonl asks only for sampled or streamed text"):
            requests_of([proof], OwnSamples.read(tmp_path / "own.jsonl"))
        lines.append(json.dumps({"text": "Twice", "parameters": {"do_sample": False}}))
        (tmp_path / "own.jsonl").write_text("\n".join(lines))
        found: List[GoldenSample] = requests_of([proof], OwnSamples.read(tmp_path / "own.jsonl"))
    assert [sample.inputs["text"] for sample in found if sample.own] == ["Twice"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "1.0"}, "tiny is already served as version 1.0"),
        (
            {"task": "token_classification"},
            "is a token_classification, and tiny is served as a sequence_classification",
        ),
        ({"hardware": "gpu"}, "is for gpu, and the server was started for cpu"),
    ],
)
def test_an_archive_that_cannot_take_the_place_is_refused(
    changes: Dict[str, str], words: str, serve: Callable[..., Instance], archives: Path
) -> None:
    instance = serve(first="1.0")
    [archive] = planned([archives / "2.0" / "tiny.mar"], None, None, False).values()
    check_archive(archive, instance, RUNNING)
    other = dataclasses.replace(archive, manifest=dataclasses.replace(archive.manifest, **changes))  # type: ignore[arg-type]
    with pytest.raises(ServerError, match=words):
        check_archive(other, instance, RUNNING)


METRICS = """\
# TYPE traceserve_batch_seconds histogram
traceserve_batch_seconds_bucket{ModelName="tiny",le="1.0"} 4.0
traceserve_batch_seconds_bucket{ModelName="tiny",le="4.0"} 5.0
traceserve_batch_seconds_bucket{ModelName="tiny",le="+Inf"} 5.0
"""


@pytest.mark.parametrize(
    ("workers", "continuous", "timeout", "seconds"),
    [(1, False, 120, 1.0), (1, True, 120, 120.0), (2, False, 120, 8.0), (2, False, 5, 5.0)],
)
def test_how_long_a_batch_may_still_run(
    workers: int, continuous: bool, timeout: int, seconds: float, serve: Callable[..., Instance]
) -> None:
    """Among several workers twice as long as the longest one took, and no longer than any may; a text may overtake others."""

    async def metrics(scope: Scope, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": METRICS.encode()})

    described = Registered("1.0", "tiny", workers, workers, 0, timeout, continuous)
    with served_over_http(metrics) as (_, port):
        instance = Instance(1, "127.0.0.1", 1, port, 1, 0.0, ("tiny",), {"tiny": workers}, "", None, None)
        assert draining._quiet(instance, "tiny", described) == seconds
    unknown = 120.0 if workers > 1 and timeout == 120 else seconds
    assert draining._quiet(instance, "tiny", described) == unknown  # nobody tells how long one took


@pytest.mark.parametrize("share", ["soon", "0", "1.5", "nan"])
def test_a_share_is_above_0_and_at_most_1(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["update", "tiny.mar", "--shadow", share])
    assert "argument --shadow: should be above 0, and at most 1 for all" in capsys.readouterr().err
