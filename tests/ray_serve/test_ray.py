"""Archives on a real Ray Serve: answers, streams, versions, keys, limits, metrics; and what listens where."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, AsyncIterator, Iterator, List

import psutil
import pytest
from traceserve import cli
from traceserve.errors import ServerError
from traceserve.measuring import activity
from traceserve.serving import configuration, instances, keys, ray_cluster, server
from traceserve.serving.engines import RAY
from traceserve.serving.front import FrontendOptions
from traceserve.serving.instances import Instance
from traceserve.serving.plan import ServerPlan
from traceserve_hosts import ray_serve
from traceserve_hosts.asgi import Application
from traceserve_hosts.batcher import Asked, Batcher
from traceserve_runtime.engine import Engine
from traceserve_runtime.service import Service
from traceserve_runtime.tasks.contract import Answer, Request

from ray_serve.cluster import ask

TEXTS = ["Where is my parcel?", "Please cancel my order.", "The cup is broken.", "I want to speak to a human."]


def right(engine: Engine, text: str) -> Any:
    [answer] = engine.answer([Request({"text": text}, {})])
    assert isinstance(answer, Answer)
    return answer.value


def same(answer: Any, expected: Any) -> bool:
    return bool(answer["label"] == expected["label"] and abs(answer["score"] - expected["score"]) < 1e-4)


@pytest.mark.parametrize("text", TEXTS)
def test_every_door_gives_the_engines_answer(text: str, served: Instance, engine: Engine) -> None:
    expected, port = right(engine, text), served.port
    assert same(ask(port, "/predictions/intents", {"text": text}).json, expected)
    assert same(ask(port, "/predictions/intents/1.0", {"text": text}).json, expected)
    assert same(ask(port, "/v1/models/intents:predict", {"instances": [text]}).json["predictions"][0], expected)
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}
    [output] = ask(port, "/v2/models/intents/infer", {"inputs": [tensor]}).json["outputs"]
    assert same(json.loads(output["data"][0]), expected)
    assert same(ask(port, "/predict", {"inputs": text}).json[0], expected)
    assert ask(port, "/classify", {"input": text}).json["data"][0]["label"] == expected["label"]


def test_what_is_wrong_is_said(served: Instance) -> None:
    reply = ask(served.port, "/predictions/intents", {"text": 3})
    assert reply.status == 400 and reply.json["error"]["field"] == "text"
    assert ask(served.port, "/predictions/other", {"text": "x"}).status == 404
    assert ask(served.port, "/health").json == {"status": "Healthy"}


def test_a_busy_replica_is_healthy_and_a_stuck_one_is_not(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray asks it: the canary is late, behind a queue that goes on or does not."""
    monkeypatch.setattr(ray_serve, "_SECONDS_OF_CANARY", 0.1)
    service = Service(engine, "intents")
    batcher = Batcher(service, 1, 0.0)
    replica: Any = SimpleNamespace(_application=Application(service, batcher))

    async def ask(standstill: float) -> None:
        monkeypatch.setattr(Batcher, "standstill", standstill)
        await asyncio.wait_for(ray_serve.Replica.check_health(replica), 10)

    batcher.ask = lambda call: Asked(call)  # type: ignore[method-assign]
    asyncio.run(ask(5.0))
    with pytest.raises(RuntimeError, match="nothing was computed for 61 s"):
        asyncio.run(ask(61.0))


def test_the_router_passes_on_in_pieces_what_it_cannot_search() -> None:
    """A compressed request for a stream."""
    streamed: List[bool] = []

    async def answering(scope: Any, body: bytes) -> AsyncIterator[Any]:
        streamed.append(True)
        yield {"type": "http.response.start"}

    async def answered(scope: Any, body: bytes) -> List[Any]:
        streamed.append(False)
        return [{"type": "http.response.start"}]

    handle = SimpleNamespace(answering=SimpleNamespace(remote=answering), answered=SimpleNamespace(remote=answered))
    handle.options = lambda stream: handle
    front: Any = SimpleNamespace(_applications={("stories", "1.0"): "stories"}, _handles={"stories": handle})

    async def ask(body: bytes, encoding: bytes) -> None:
        scope = {"type": "http", "headers": [(b"content-encoding", encoding)]}
        assert [_ async for _ in ray_serve.Front._messages(front, "stories", "1.0", scope, body)]

    body = b'{"prompt": "x", "stream": true}'
    asyncio.run(ask(gzip.compress(body), b"gzip"))
    asyncio.run(ask(body, b"identity"))
    asyncio.run(ask(b'{"prompt": "x"}', b""))
    assert streamed == [True, True, False]


def test_the_environment_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "of another cluster")
    monkeypatch.setenv("PYTHONUTF8", "0")
    folder = Path(tempfile.mkdtemp(dir=tmp_path))  # its sockets are in /tmp by the name
    (folder / "run").mkdir()
    plan = ServerPlan({}, "127.0.0.1", 7000, FrontendOptions(), 60.0, print, RAY, folder=folder)
    found = ray_cluster._variables(plan, dict.fromkeys(ray_cluster._PORTS, 1), None)
    instances.sockets_folder(folder).rmdir()
    assert found["RAY_worker_niceness"] == "0" and found["PYTHONUTF8"] == "1" and "RAY_ADDRESS" not in found
    assert float(found["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]) > 5


def test_no_process_is_nicer_than_the_first(served: Instance) -> None:
    """As Ray's are by default: others on the machine starve them."""
    first = psutil.Process(served.pid)
    family = first.children(recursive=True)
    assert any(each.name() == "haproxy" for each in family)
    assert {each.nice() for each in family} == {first.nice()}


def test_commands_know_it(served: Instance, capsys: pytest.CaptureFixture[str]) -> None:
    assert served.engine == RAY and instances.workers_alive(served) == {"intents": 2}
    assert cli.main(["predict", "intents", TEXTS[0], "--port", str(served.port)]) == 0
    assert json.loads(capsys.readouterr().out)["label"]
    assert cli.main(["status"]) == 0
    assert "2 of 2" in capsys.readouterr().out


def test_bench_measures_it(served: Instance, tmp_path: Path) -> None:
    samples, report = tmp_path / "samples.txt", tmp_path / "bench.json"
    samples.write_text("\n".join(TEXTS))
    options = ["--samples", str(samples), "--connections", "4", "--seconds", "6", "--json", str(report)]
    assert cli.main(["bench", "intents", "--port", str(served.port), *options]) == 0
    measured = json.loads(report.read_text())["measurements"]
    assert measured and all(one["throughput"] > 0 and not one["errors"] for one in measured)
    for one in measured:
        assert one["server"]["time_ms"]["model"] > 0 and sum(one["server"]["time_ms"].values()) > 0


def test_status_has_its_figures(served: Instance) -> None:
    def requests() -> int:
        return activity.between(activity.Sample(0.0), activity.sample(served, "intents")).requests

    for text in TEXTS:
        ask(served.port, "/predictions/intents", {"text": text})
    deadline = time.monotonic() + 40
    before = requests()
    for _ in range(10):
        ask(served.port, "/predictions/intents", {"text": TEXTS[0]})
    while requests() < before + 10 and time.monotonic() < deadline:
        time.sleep(0.5)
    found = activity.between(activity.Sample(served.started), activity.sample(served, "intents"))
    assert found.requests >= before + 10 and found.batch_p50 is not None and found.padding_share is not None


def test_status_watches_it(served: Instance) -> None:
    """As a terminal's user sees it, one line per interval."""
    command = [sys.executable, "-m", "traceserve", "status", "--watch", "2"]
    watch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert watch.stdout is not None
    deadline = time.monotonic() + 30
    try:
        for line in watch.stdout:
            for text in TEXTS:
                ask(served.port, "/predictions/intents", {"text": text})
            counted = re.search(rf" intents:{served.port} requests ([0-9,]+),", line)
            if counted and int(counted.group(1).replace(",", "")) > 0:
                break
            assert time.monotonic() < deadline, line
    finally:
        watch.kill()
        watch.communicate()


def test_verify_proves_it(served: Instance, archives: List[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "intents", "--port", str(served.port)]) == 0
    assert "intents" in capsys.readouterr().out
    assert cli.main(["verify", str(archives[0]), "--port", str(served.port)]) == 0
    url = f"{served.url}/predictions/intents"
    assert cli.main(["verify", url, "--archive", str(archives[0])]) == 0


def test_tune_measures_it(archives: List[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = tmp_path / "samples.txt"
    samples.write_text("\n".join(TEXTS))
    arguments = [str(archives[0]), "--samples", str(samples), "--connections", "4", "--budget", "1", "--dry-run"]
    assert cli.main(["tune", *arguments, "--engine", RAY]) == 0
    printed = capsys.readouterr().out
    assert "as it was" in printed and printed.rstrip().endswith(f"{archives[0]} --engine ray")
    assert not [instance for instance in instances.running() if instance.port != 0 and instance.names == ("intents",)][
        1:
    ]


def test_its_metrics_have_the_names_of_torchserves_worker(served: Instance) -> None:
    for text in TEXTS:
        ask(served.port, "/predictions/intents", {"text": text})
    ask(served.port, "/predictions/intents", {"text": 3})
    deadline = time.monotonic() + 40
    page = ""
    while "ray_traceserve_errors_total" not in page and time.monotonic() < deadline:
        time.sleep(1)
        with urllib.request.urlopen(f"http://127.0.0.1:{served.metrics_port}/metrics", timeout=10) as response:
            page = response.read().decode()
    line = next(line for line in page.splitlines() if line.startswith("ray_traceserve_requests_total{"))
    assert 'model_name="intents"' in line and 'model_version="1.0"' in line
    assert "ray_traceserve_batch_seconds_bucket" in page
    line = next(line for line in page.splitlines() if line.startswith("ray_traceserve_errors_total{"))
    assert 'reason="InvalidRequest"' in line


def listening(instance: Instance) -> Iterator[psutil.Process]:
    """The processes of a cluster, and the addresses at which each listens."""
    assert instance.process is not None
    for process in [instance.process, *instance.process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    yield process.name(), connection.laddr


def test_all_of_it_listens_on_the_loopback_address_alone(served: Instance) -> None:
    found = list(listening(served))
    assert any("haproxy" in name for name, _ in found) and len(found) > 5
    for name, address in found:
        assert address.ip.removeprefix("::ffff:").startswith("127."), (name, address)


def test_nobody_joins_the_cluster_without_its_token(served: Instance) -> None:
    config = json.loads(Path(served.folder, "run", "serve.json").read_text())
    assert config["http"]["port"] == served.port
    own = served.process.environ() if served.process is not None else {}
    assert own["RAY_AUTH_MODE"] == "token" and len(own["RAY_AUTH_TOKEN"]) == 64


def test_versions_stand_side_by_side_and_share_the_requests(archives: List[Path], engine: Engine) -> None:
    port = configuration.free_ports(1)[0]
    instance = server.start(archives, port=port, timeout=180, engine=RAY, shares=(3, 1, 1))
    try:
        for path in ("/predictions/intents/1.0", "/predictions/intents/2.0", "/predictions/other"):
            assert same(ask(port, path, {"text": TEXTS[0]}).json, right(engine, TEXTS[0]))
        # The version that answered says so in V2's answers.
        tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXTS[0]]}
        body = {"inputs": [tensor]}
        answered = Counter(ask(port, "/v2/models/intents/infer", body).json["model_version"] for _ in range(80))
        assert set(answered) == {"1.0", "2.0"} and 45 <= answered["1.0"] <= 75  # 60 are its share
        assert ask(port, "/classify", {"input": "x", "model": "other"}).json["model"] == "other"
        assert ask(port, "/classify", {"input": "x"}).status == 404
        assert ask(port, "/v1/models").json["models"] == ["intents", "other"]
        assert ask(port, "/health").status == 200
    finally:
        instances.stop(instance)
    assert instance.process is None and not Path(instance.folder).exists()
    assert not instances.sockets_folder(Path(instance.folder)).exists()


def test_beyond_the_loopback_address_a_key_is_needed(archives: List[Path]) -> None:
    port = configuration.free_ports(1)[0]
    front = FrontendOptions(cors_origin="https://example.org", largest_body=1)
    instance = server.start(archives[2:], host="0.0.0.0", port=port, timeout=180, engine=RAY, front=front)
    try:
        body = {"text": TEXTS[0]}
        assert instance.key is not None
        assert ask(port, "/predictions/other", body).status == 401
        key = {"Authorization": f"Bearer {instance.key}"}
        assert ask(port, "/predictions/other", body, Origin="https://example.org", **key).status == 200
        assert ask(port, "/predictions/other", {"text": "x" * (1 << 20)}, **key).status == 413
        asked = {"Origin": "https://example.org", "Access_Control_Request_Method": "POST"}
        preflight = ask(port, "/predictions/other", None, "OPTIONS", **asked)
        assert preflight.status == 200 and preflight.headers["access-control-allow-origin"] == "https://example.org"
        beyond = {address.port for _, address in listening(instance) if not address.ip.endswith("127.0.0.1")}
        assert beyond == {port}  # HAProxy's; the replicas and Serve's own proxy stay behind it
        assert ask(port, "/-/routes").status == 404
        file = keys.ray_key_file(Path(instance.folder))
        assert file.stat().st_mode & 0o077 == 0
        rotated = keys.rotate_keys(instance)
        assert rotated.key != instance.key and instances.find_instance(port).key == rotated.key
        assert ask(port, "/predictions/other", body, **key).status == 401
        assert ask(port, "/predictions/other", body, Authorization=f"Bearer {rotated.key}").status == 200
    finally:
        instances.stop(instance)


def test_an_archive_that_cannot_be_loaded_says_why(archives: List[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = configuration.prepare_folder

    def damaged(folder: Path, *rest: Any) -> Path:
        store = real(folder, *rest)
        model = next(store.glob("*/traced_model.pt"))
        model.write_bytes(model.read_bytes()[:1000])
        return store

    monkeypatch.setattr(configuration, "prepare_folder", damaged)
    with pytest.raises(ServerError, match="intents: .*traced_model.pt"):
        server.start(archives[:1], port=configuration.free_ports(1)[0], timeout=180, engine=RAY)
    assert not [each for each in instances.running() if each.engine == RAY and each.names == ("intents",)][1:]


def test_what_ray_serve_cannot_do_is_refused(archives: List[Path], tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.write_text("")
    with pytest.raises(ServerError, match="make no pair"):
        server.start(archives[:1], port=1025, engine=RAY, front=FrontendOptions(certificate=pem, key=pem))
    with pytest.raises(ServerError, match="both as version 1.0"):
        server.start([archives[0], archives[0]], port=1025, engine=RAY)
    with pytest.raises(ServerError, match="--shares has 2 numbers for 1 archives"):
        server.start(archives[:1], port=1025, engine=RAY, shares=(1, 2))
