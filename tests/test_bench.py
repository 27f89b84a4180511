"""`traceserve bench`: the traffic, the measurements and the reports."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from conftest import run_export
from test_load_generator import OK, after, always, at_once, serving
from test_samples import piped
from traceserve import cli
from traceserve.archives import staging
from traceserve.archives.archive import pack_archive
from traceserve.building.samples import OwnSamples
from traceserve.commands.bench import notes
from traceserve.errors import ConfigError, ServerError
from traceserve.measuring import bench, targets
from traceserve.measuring import page as report
from traceserve.measuring.bench import BenchPlan, measure
from traceserve.measuring.targets import bench_target, traffic
from traceserve.serving import configuration, instances, server
from traceserve.serving.instances import Instance
from traceserve_runtime.errors import TraceserveError

BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
TEXTS = ["Where is my parcel?", 'It said "broken" \\ \u2028 again.', "Ich hätte gern mein Geld zurück."]
DELAY = 0.2  # of the archive "patient": TorchServe's wait for a batch to fill


@pytest.fixture(scope="module")
def samples_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def samples(samples_file: Path) -> OwnSamples:
    return OwnSamples.read(samples_file)


@pytest.fixture(scope="module")
def served(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """A real server with two archives of one model."""
    archives = []
    for name, delay in (("quick", 2), ("patient", int(1000 * DELAY))):
        folder = tmp_path_factory.mktemp("served") / name
        run_export(folder, {"model_name": str(checkpoint("bert")), "max_length": 32, "max_batch_delay": delay})
        archives.append(pack_archive(folder, name, folder.parent))
    instance = server.start(archives, port=configuration.free_ports(1)[0], timeout=90)
    yield instance
    instances.stop(instance)


def run_command(*arguments: str) -> Tuple[int, str, str]:
    command = [sys.executable, "-m", "traceserve", "bench", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return result.returncode, result.stdout, result.stderr


def quietly(what: str, share: float) -> None:
    """Ignore progress."""


# --- a real server ----------------------------------------------------------------------------------------------------


def test_the_command_on_a_real_server(served: Instance, samples_file: Path, tmp_path: Path) -> None:
    page, figures = tmp_path / "bench.html", tmp_path / "bench.json"
    url = f"{served.url}/predictions/quick"
    code, printed, errors = run_command(
        *("quick", "--samples", str(samples_file), "--connections", "1,4", "--seconds", "1", "--warm-up", "0.3"),
        *(
            "--compare",
            url,
            "--body",
            '{"text": "{text}"}',
            "--rounds",
            "2",
            "--json",
            str(figures),
            "--html",
            str(page),
        ),
    )
    assert code == 0, errors
    document = json.loads(figures.read_text())
    assert document["subjects"] == ["quick", url]
    assert len(document["measurements"]) == 8 and len(document["summary"]) == 4 and len(document["ratios"]) == 2
    order = [(one["subject"], one["connections"]) for one in document["measurements"]]
    assert order == [("quick", 1), (url, 1), ("quick", 4), (url, 4), (url, 1), ("quick", 1), (url, 4), ("quick", 4)]
    for one in document["measurements"]:
        assert one["errors"] == {} and one["requests"] == pytest.approx(one["throughput"] * one["seconds"], rel=0.01)
        latency, parts = one["latency_ms"], one["server"]["time_ms"]
        assert latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p99.9"] <= latency["max"]
        assert sum(parts.values()) == pytest.approx(latency["mean"], rel=0.2) and min(parts.values()) >= 0
        assert parts["model"] > 0.05 and 5 < one["server"]["tokens"] < 32
    peak = document["peaks"]["quick"]
    assert document["peaks"] == {"quick": peak, url: peak} and peak["dtype"] == "float32"
    for one in document["summary"]:
        achieved = one["server"]["operations"] * one["throughput"]
        assert 0 < achieved < peak["operations_per_second"]
    for row in (
        r"quick\n",
        re.escape(url),
        r" 1 +[\d,.]+ +\d+ %( +[\d,.]+){6} +0 *\n",
        r"queue( +\S+ ms +\d+ %){2}",
        r"share of the peak( +\d+ %){2}",
        r"peak: products of matrices in float32 reach [\d,]+ GFLOP/s here",
    ):
        assert re.search(row, printed), printed
    assert f"quick / {url}" in printed
    content = page.read_text(encoding="utf-8")
    assert url in content and "Latency distribution" in content and "Where the time of a request goes" in content
    assert "share of the peak" in content and "products of matrices in float32" in content


def test_what_the_servers_counters_mean(served: Instance, samples: OwnSamples) -> None:
    """The queue's time holds the delay in which a batch may fill, and the handler's time the model's."""
    plan = BenchPlan(connections=(2,), seconds=2.0, warm_up=0.5)
    document = measure([bench_target("patient", samples)], plan, "texts.txt", quietly)
    [one] = document["summary"]
    parts = one["server"]["time_ms"]
    assert 950 * DELAY < parts["queue"] < one["latency_ms"]["mean"] and one["latency_ms"]["p50"] > 950 * DELAY
    assert parts["queue"] > sum(parts.values()) / 2 and sum(parts.values()) == pytest.approx(
        one["latency_ms"]["mean"], rel=0.01
    )
    # The server's and the client's means are of spans that differ by a few requests: on a busy machine by more than the network.
    assert parts.pop("network and client") >= 0 < min(parts.values())
    # Two answers per batch, and as many counted as were answered in the span.
    assert one["server"]["requests"] == pytest.approx(one["requests"], abs=4)


def test_an_open_loop_on_a_real_server(served: Instance, samples: OwnSamples) -> None:
    """Whatever the delay of the batches, requests come at their rate."""
    plan = BenchPlan(connections=(1,), rate=40.0, seconds=2.0, warm_up=0.5)
    document = measure([bench_target("patient", samples)], plan, "texts.txt", quietly)
    [one] = document["summary"]
    assert one["requests"] == pytest.approx(80, abs=36) and one["most_connections"] > 2
    latency, where = plots(report.page(document))  # none over connections
    assert [trace["name"] for trace in latency["data"]] == ["patient, 40 requests/s"]
    assert [trace["name"] for trace in where["data"]] == list(one["server"]["time_ms"])


def test_names_and_urls_of_our_servers(served: Instance, samples: OwnSamples) -> None:
    by_name, by_url = bench_target("quick", samples), bench_target(f"{served.url}/predictions/quick", samples)
    assert by_name.target.url == by_url.target.url and by_name.metrics == by_url.metrics is not None
    assert bench_target("quick", samples, served.port).target == by_name.target
    with pytest.raises(ServerError, match="no server of traceserve serves other, but patient, quick"):
        bench_target("other", samples)
    with pytest.raises(ServerError, match=f"port {served.port} has no other, but quick, patient"):
        bench_target("other", samples, served.port)


def test_a_sample_that_the_server_refuses(served: Instance, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"txt": "a"}\n')
    code, _, errors = run_command("quick", "--samples", str(wrong))
    assert code == 1 and "answers 400 to the first sample" in errors and "did you mean" in errors


# --- other servers ----------------------------------------------------------------------------------------------------


def test_two_servers_in_turn(samples: OwnSamples) -> None:
    with serving(after(0.02)) as fast, serving(after(0.06)) as slow:
        asked = [bench_target(fast.url, samples), bench_target(slow.url, samples)]
        document = measure(asked, BenchPlan(connections=(2,), seconds=0.4, warm_up=0.1, rounds=3), "texts.txt", quietly)
    [ratio] = document["ratios"]
    assert ratio["throughput"] == pytest.approx(3, rel=0.3)
    assert ratio["latency"]["p50"] == pytest.approx(1 / 3, rel=0.3)
    assert [summary["server"] for summary in document["summary"]] == [None, None]
    low, high = document["summary"][0]["throughput_range"]
    assert low <= document["summary"][0]["throughput"] <= high
    page = report.page(document)
    assert "Where the time" not in page and len(plots(page)) == 2


def test_what_is_sent(samples: OwnSamples) -> None:
    with serving(at_once) as asked:
        targets.check_answer(bench_target(asked.url, samples, body='{"input": ["{text}"]}', headers={"X-Key": "7"}))
        targets.check_answer(bench_target(asked.url, samples))
        assert json.loads(asked.bodies[0]) == {"input": [TEXTS[0]]} and asked.bodies[1] == TEXTS[0].encode()
        assert "content-type: application/json\r\n" in asked.heads[0].lower() and "x-key: 7" in asked.heads[0].lower()
        assert "content-type: text/plain; charset=utf-8\r\n" in asked.heads[1].lower()


def test_every_kind_of_samples(tmp_path: Path, samples: OwnSamples) -> None:
    assert [body.decode() for body in traffic(samples).bodies] == TEXTS
    wrapped = traffic(samples, '{"a": ["{text}"], "b": "{text}!"}')
    assert [json.loads(body) for body in wrapped.bodies] == [{"a": [text], "b": f"{text}!"} for text in TEXTS]
    table = tmp_path / "texts.csv"
    table.write_text('label,text\r\n1,"one, two\nthree"\r\n2,\r\n3,four\r\n', encoding="utf-8", newline="")
    assert traffic(OwnSamples.read(table)).bodies == (b"one, two\nthree", b"four")
    bodies = tmp_path / "bodies.jsonl"
    bodies.write_text('{"text": "a"}\n\n["b"]\n')
    assert traffic(OwnSamples.read(bodies)) == targets.Traffic((b'{"text": "a"}', b'["b"]'), "application/json")


@pytest.mark.parametrize(
    "name, content, body, words",
    [
        ("none.txt", None, None, "cannot be read"),
        ("empty.txt", "\n \n", None, "holds no text"),
        ("a.csv", "label,texts\n1,a\n", None, "a header with a column text, not: label, texts"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', None, "line 2: this is no JSON"),
        ("a.jsonl", '{"text": "a"}\n', '{"a": "{text}"}', "--body is for texts"),
        ("a.txt", "a\n", '{"a": "text"}', "no {text}"),
        ("a.txt", "a\n", '{"a": {text}}', "this is no JSON"),
    ],
)
def test_samples_that_cannot_be_sent(
    name: str, content: Optional[str], body: Optional[str], words: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=re.escape(words)):
        traffic(OwnSamples.read(tmp_path / name), body)


def test_what_is_wrong_is_told_at_once(samples_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = configuration.free_ports(1)[0]
    for arguments, words in (
        (["quick", "--port", str(port)], "server"),
        (["ftp://x/y"], "no URL to measure"),
        ([f"http://127.0.0.1:{port}/x"], "cannot be reached"),
        (["http://x/", "--html", str(tmp_path / "no" / "a.html")], "there is no folder"),
        (["http://x/", "--html", str(tmp_path)], "is a folder"),
        (["http://x/", "--json", str(tmp_path)], "is a folder"),
        (["http://x/", "--rate", "10", "--connections", "1,2"], "opened as needed"),
        (["http://x/", "--rate", "0"], "more than 0"),
        (["http://x/", "--header", "a b"], "should look like"),
        (
            ["quick", "--body", "{x"],
            "--body is for URLs, not for quick; for a name, put request bodies into a .jsonl",
        ),
        (["quick", "--compare", "slow", "--body", "{x"], "--body is for URLs, not for quick and slow"),
        (["http://x/", "--port", "8080"], "--port is for names; a URL has its own"),
        (["quick", "--header", "a: b"], "--header is for URLs, not for quick; the key of a named server is known"),
        (["http://x/", "--compare-body", "{x"], "--compare-body is for the other server; name it with --compare"),
        (["http://x/", "--compare", "slow", "--compare-body", "{x"], "--compare-body is for URLs, not for slow"),
    ):
        started = time.monotonic()
        code, _, errors = run_command(*arguments, "--samples", str(samples_file))
        assert code in (1, 2) and words in " ".join(errors.split()), errors
        assert time.monotonic() - started < 10
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ServerError, match=r"pip install 'traceserve\[bench\]'"):
        report.require_plotly()


def test_errors_are_told(samples: OwnSamples, samples_file: Path, tmp_path: Path) -> None:
    async def answer(number: int, body: bytes) -> bytes:
        await asyncio.sleep(0.01)
        return BUSY if number % 3 == 0 else OK

    with serving(answer) as busy:
        code, printed, errors = run_command(
            busy.url, "--samples", str(samples_file), "--seconds", "0.5", "--warm-up", "0"
        )
    assert code == 0, errors
    assert re.search(r"note: 16 connections: \d+ times HTTP 503", printed)
    with serving(always(OK.replace(b"200 OK", b"500 Broken"))) as broken:
        code, _, errors = run_command(broken.url, "--samples", str(samples_file))
    assert code == 1 and "answers 500 to the first sample" in errors

    async def once(number: int, body: bytes) -> Optional[bytes]:
        return OK if number == 1 else None

    with serving(once) as gone, pytest.raises(
        ServerError, match="answered no request in 0.2 s: .* times connection closed"
    ):
        measure([bench_target(gone.url, samples)], BenchPlan(seconds=0.2, warm_up=0.0), "texts.txt", quietly)


def test_what_was_measured_is_printed_where_a_file_fails(
    samples_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(path: Path, text: str) -> None:
        raise TraceserveError("it filled up")

    monkeypatch.setattr(staging, "write_whole", fill)
    options = ["--samples", str(samples_file), "--seconds", "0.3", "--warm-up", "0", "--json", str(tmp_path / "x.json")]
    with serving(always(OK)) as server_of_others:
        assert cli.main(["bench", server_of_others.url, *options]) == 1
    said = capsys.readouterr()
    assert "it filled up" in said.err and "requests/s" in said.out


def test_what_makes_figures_less_than_they_seem_is_told(samples: OwnSamples, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open loop beyond the server's capacity; but not one whose answers are merely slow."""
    monkeypatch.setattr("traceserve.measuring.load_generator.MOST_CONNECTIONS", 1)
    told = {}
    for delay, rate in ((0.05, 60.0), (0.3, 2.0)):
        with serving(after(delay)) as slow:
            document = measure([bench_target(slow.url, samples)], BenchPlan((1,), rate, 1.0, 0.0), "texts.txt", quietly)
        [one] = document["summary"]
        told[rate] = list(notes(one, 1.0))
    [note] = told[60.0]
    assert "cannot answer 60 a second" in note and not told[2.0]
    [note] = notes({**one, "generator_cpu": 0.93}, 1.0)
    assert "93 % of a core" in note


def test_a_span_of_few_slow_requests_is_told(samples: OwnSamples) -> None:
    with serving(after(0.3)) as slow:
        document = measure([bench_target(slow.url, samples)], BenchPlan((1,), None, 1.0, 0.0), "texts.txt", quietly)
    [note] = notes(document["summary"][0], 1.0)
    assert note.startswith("a request takes 0.3") and "--seconds 4 or more measures them" in note


# --- the page ---------------------------------------------------------------------------------------------------------


def plots(page: str) -> List[Dict[str, Any]]:
    """Return plotly's data and layout of each figure."""
    decoder, found = json.JSONDecoder(), []
    for match in re.finditer(r'Plotly\.newPlot\(\s*"[^"]+",\s*', page):
        data, end = decoder.raw_decode(page, match.end())
        layout, _ = decoder.raw_decode(page, re.compile(r",\s*").match(page, end).end())  # type: ignore[union-attr]
        found.append({"data": data, "layout": layout})
    return found


def test_the_page_needs_nothing_else_and_shows_what_was_measured(samples: OwnSamples) -> None:
    with serving(after(0.005)) as asked:
        document = measure(
            [bench_target(asked.url, samples)], BenchPlan((1, 2), None, 0.3, 0.0), "<texts>.txt", quietly
        )
    page = report.page(document)
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=", page)
    assert "&lt;texts&gt;.txt" in page and "<texts>" not in page
    latency, over = plots(page)
    loads = ("1 connection", "2 connections")
    assert [trace["name"] for trace in latency["data"]] == [f"{document['subjects'][0]}, {load}" for load in loads]
    first = latency["data"][0]
    assert latency["layout"]["xaxis"]["type"] == latency["layout"]["yaxis"]["type"] == "log"
    assert first["x"][0] == 1 and first["x"] == sorted(first["x"]) and first["y"] == sorted(first["y"])
    assert document["summary"][0]["latency_ms"]["p90"] in first["y"]
    throughput = over["data"][0]
    assert throughput["x"] == [1, 2] and throughput["y"] == [one["throughput"] for one in document["summary"]]
    assert over["data"][2]["y"] == [one["latency_ms"]["p99"] for one in document["summary"]]


def test_medians_are_taken_figure_by_figure() -> None:
    rounds = [{"a": {"b": 1.0}, "c": [[0, 5.0], [50, 9.0]], "d": None}, {"a": {"b": 5.0}, "c": [[0, 7.0]], "d": None}]
    assert bench._median([*rounds, rounds[1]]) == {"a": {"b": 5.0}, "c": [[0, 7.0]], "d": None}


def test_both_servers_get_the_samples_of_a_pipe(tmp_path: Path) -> None:
    found, page = tmp_path / "found.json", tmp_path / "found.html"
    for written in (found, page):
        written.write_text("earlier")
        os.link(written, tmp_path / f"earlier {written.name}")
    options = ["--connections", "1", "--seconds", "0.1", "--warm-up", "0", "--rounds", "1"]
    options += ["--json", str(found), "--html", str(page)]
    with serving(at_once) as asked, piped("one", "two") as path:
        arguments = ["bench", asked.url, "--compare", f"{asked.url}?top_k=1", "--samples", str(path), *options]
        assert cli.main(arguments) == 0
        assert {*asked.bodies} == {b"one", b"two"}
    document = json.loads(found.read_text())
    assert document["samples"]["bodies"] == 2 and all(summary["requests"] for summary in document["summary"])
    assert "<html" in page.read_text(encoding="utf-8")
    assert {each.read_text() for each in tmp_path.glob("earlier *")} == {"earlier"}  # replaced, not overwritten


def test_one_url_asked_twice_has_two_labels(samples: OwnSamples) -> None:
    with serving(at_once) as asked:
        two = [bench_target(asked.url, samples), bench_target(f"{asked.url}?top_k=1", samples)]
        document = measure(two, BenchPlan((1,), None, 0.1, 0.0), "texts.txt", quietly)
    label = two[0].label
    assert document["subjects"] == [label, f"{label} (2)"] and document["ratios"]
    assert [summary["subject"] for summary in document["summary"]] == document["subjects"]
