"""Generation on a real TorchServe with continuousBatching: texts join and leave, and each client gets its own."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple

import pytest
from conftest import run_export
from traceserve import cli
from traceserve.archives.archive import pack_archive
from traceserve.building.gate.texts import VERY_LONG
from traceserve.commands.status import _FIGURES, _cells
from traceserve.errors import ServerError
from traceserve.measuring import activity
from traceserve.serving import configuration, instances, server
from traceserve.serving.instances import Instance
from traceserve_runtime.engine import Engine
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Request

ARCHITECTURES = {"text_generation": "llama", "text2text_generation": "t5"}
CLASSIFIER = "sequence_classification"
LONG = [VERY_LONG[:400]] * 200  # most of a second
TEXT = "The train to the coast"


class Written(NamedTuple):
    status: int
    headers: Dict[str, str]
    pieces: List[bytes]
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.pieces))


class Served(NamedTuple):
    instance: Instance
    engines: Dict[str, Engine]
    archives: Dict[str, Path]

    def ask(self, name: str, body: Any) -> Written:
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.instance.port, timeout=60)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", f"/predictions/{name}", content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        pieces = list(iter(lambda: response.read1(65536), b""))
        connection.close()
        return Written(response.status, dict(response.getheaders()), pieces, time.perf_counter() - began)

    def alone(self, name: str, body: Dict[str, Any]) -> Any:
        [answer] = self.engines[name].answer([Request({"text": body["text"]}, body.get("parameters", {}))])
        return getattr(answer, "value", answer)

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.instance.metrics_port}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


@pytest.fixture(scope="module")
def served(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, archives = tmp_path_factory.mktemp("continuous"), {}
    wide = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 512}
    for name, architecture in {**ARCHITECTURES, CLASSIFIER: "bert"}.items():
        source = checkpoint(architecture, TASKS[name].auto_model, **(wide if name == CLASSIFIER else {}))
        own = {"model_name": str(source), "task": name, "max_length": 128, "continuous_batching": True}
        own["max_rows"] = 1024
        run_export(folder / name, own)
        archives[name] = pack_archive(folder / name, name, folder)
    instance = server.start(list(archives.values()), port=configuration.free_ports(1)[0], timeout=180)
    yield Served(instance, {name: Engine.load(folder / name) for name in archives}, archives)
    instances.stop(instance)


def bodies(name: str) -> List[Dict[str, Any]]:
    """Requests of every kind."""
    kinds: List[Dict[str, Any]] = [
        {"max_new_tokens": 5, "num_beams": 1},
        {"max_new_tokens": 60, "num_beams": 1},
        {"max_new_tokens": 12, "num_beams": 3},
        {"max_new_tokens": 20, "seed": 7, "temperature": 0.7},
        {"max_new_tokens": 30, "num_beams": 1, "stop": ["e"]},
    ]
    if name == "text_generation":
        kinds += [{"max_new_tokens": most, "stream": True} for most in (3, 20, 60)]
    return [{"text": f"{TEXT} number {i}", "parameters": kinds[i % len(kinds)]} for i in range(24)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_client_gets_its_own_text(name: str, served: Served) -> None:
    """Streams, whole answers, several in one request, bad ones, all at once; counted once each."""
    asked = bodies(name)
    expected = [served.alone(name, body) for body in asked]
    before = served.metric("traceserve_requests_total")
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: served.ask(name, body), asked))
        several = served.ask(name, [{"text": body["text"], "parameters": {"max_new_tokens": 4}} for body in asked[:5]])
        bad = served.ask(name, {"text": TEXT, "parameters": {"max_new_tokens": "many"}})
    for body, answer, wanted in zip(asked, answers, expected):
        assert answer.status == 200
        if body["parameters"].get("stream"):
            assert b"".join(answer.pieces).decode() == wanted and answer.headers["content-type"].startswith(
                "text/plain"
            )
        else:
            assert answer.json == wanted
    assert len(several.json) == 5
    assert bad.status == 400 and bad.json["error"]["field"] == "parameters.max_new_tokens"
    assert sum(len(answer.pieces) > 1 for answer in answers) >= (3 if name == "text_generation" else 0)
    time.sleep(0.5)
    assert served.metric("traceserve_requests_total") - before == len(asked) + 5


def test_a_short_text_does_not_wait_for_a_long_one(served: Served) -> None:
    """On busy cores the long one may end before the short one is sent; without joining the short one is never first."""

    def ended() -> List[str]:
        names: List[str] = []
        began = threading.Event()

        def stream() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", served.instance.port, timeout=60)
            body = json.dumps({"text": TEXT, "parameters": {"max_new_tokens": 120, "stream": True}})
            connection.request("POST", "/predictions/text_generation", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read1(1)
            began.set()
            response.read()
            names.append("long")
            connection.close()

        long = threading.Thread(target=stream)
        long.start()
        assert began.wait(60)
        short = served.ask("text_generation", {"text": TEXT, "parameters": {"max_new_tokens": 1}})
        names.append("short")
        long.join()
        assert short.status == 200
        return names

    assert any(ended() == ["short", "long"] for _ in range(20))


def test_a_client_that_goes_holds_nobody(served: Served) -> None:
    """In the midst of a stream; the others are answered, and the worker goes on."""
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", served.instance.port, timeout=60)
        body = json.dumps({"text": TEXT, "parameters": {"max_new_tokens": 110, "stream": True}})
        connection.request("POST", "/predictions/text_generation", body, {"Content-Type": "application/json"})
        connection.getresponse().read1(1)
        connection.close()
    answer = served.ask("text_generation", bodies("text_generation")[0])
    assert answer.status == 200 and answer.json == served.alone("text_generation", bodies("text_generation")[0])


def test_each_client_gets_its_own_labels(served: Served) -> None:
    """Short ones, long ones, lists and bad ones, all at once; each is counted once."""
    text = "Where is my parcel number"
    asked: List[Any] = [{"text": f"{text} {i}", "parameters": {"top_k": None}} for i in range(20)]
    asked += [[f"{text} {i}"] * (i + 2) for i in range(4)] + [{"text": VERY_LONG[:6000]}, {"text": 3}]
    [[label, *_]] = [served.alone(CLASSIFIER, asked[0])]
    assert set(label) == {"label", "score"}
    before = served.metric("traceserve_requests_total")
    with ThreadPoolExecutor(13) as pool:
        answers = list(pool.map(lambda body: served.ask(CLASSIFIER, body), asked))
    assert [answer.status for answer in answers] == [200] * 25 + [400]
    for body, answer in zip(asked, answers[:25]):
        for one, found in zip(*([body], [answer.json]) if isinstance(body, dict) else (body, answer.json)):
            wanted = served.alone(CLASSIFIER, one if isinstance(one, dict) else {"text": one})
            assert scores(found) == pytest.approx(scores(wanted), abs=1e-4)
    time.sleep(0.5)
    assert served.metric("traceserve_requests_total") - before == 21 + 2 + 3 + 4 + 5


def scores(answer: Any) -> Dict[str, float]:
    return {each["label"]: each["score"] for each in (answer if isinstance(answer, list) else [answer])}


def test_a_short_request_does_not_wait_for_long_ones(served: Served) -> None:
    """By batches it would be answered with the second one, or after it."""
    ended: List[str] = []

    def ask(name: str, body: Any) -> None:
        assert served.ask(CLASSIFIER, body).status == 200
        ended.append(name)

    def order() -> List[str]:
        ended.clear()
        with ThreadPoolExecutor(2) as pool:
            long = [pool.submit(ask, "long", LONG) for _ in range(2)]
            time.sleep(0.3)
            ask("short", {"text": TEXT})
            for each in long:
                each.result()
        return list(ended)

    assert any(order() == ["short", "long", "long"] for _ in range(10))


def test_a_client_that_hangs_up_is_computed_no_further(served: Served) -> None:
    """Of ten lists whose clients have gone most rows are never run."""
    before = served.metric("traceserve_windows_total")
    for _ in range(10):
        connection = http.client.HTTPConnection("127.0.0.1", served.instance.port, timeout=60)
        connection.request("POST", f"/predictions/{CLASSIFIER}", json.dumps(LONG), {"Content-Type": "application/json"})
        connection.close()
    assert served.ask(CLASSIFIER, {"text": TEXT}).status == 200
    time.sleep(1)
    assert served.ask(CLASSIFIER, {"text": TEXT}).status == 200
    time.sleep(1)
    assert served.metric("traceserve_windows_total") - before < 10 * len(LONG) / 2


def test_times_that_are_counted_per_round_are_not_shown(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In `status` a dash for the means; in `bench` all but the breakdown."""
    (tmp_path / "texts.txt").write_text(f"{TEXT}\nWhere is my parcel?\n")
    files = ["--json", str(tmp_path / "bench.json"), "--html", str(tmp_path / "bench.html")]
    loads = ["--connections", "2", "--seconds", "1", "--warm-up", "0.2"]
    assert cli.main(["bench", CLASSIFIER, "--samples", str(tmp_path / "texts.txt"), *loads, *files]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "no breakdown of a request's time: with continuous_batching TorchServe counts its times once per round"
        in printed
    )
    assert "tokens of a request" in printed and "queue" not in printed and "mean time" not in printed
    document = json.loads((tmp_path / "bench.json").read_text())
    [summary], [measurement] = document["summary"], document["measurements"]
    assert summary["server"]["time_ms"] is measurement["server"]["time_ms"] is None and summary["server"]["tokens"] > 2
    assert "Where the time of a request goes" not in (tmp_path / "bench.html").read_text(encoding="utf-8")
    found = activity.between(activity.Sample(0.0), activity.sample(served.instance, CLASSIFIER))
    assert found.requests > 0 and found.batch_p50 is not None and found.waiting == 0
    assert found.latency is found.queue is None
    cells = dict(zip(_FIGURES, _cells(found)))
    assert cells["mean"] == cells["queue"] == "-" != cells["p50"]


def test_a_second_worker_is_refused(served: Served) -> None:
    archive = served.archives["text_generation"]
    with pytest.raises(ServerError, match="second worker hangs"):
        server.start([archive], port=configuration.free_ports(1)[0], workers=2)
