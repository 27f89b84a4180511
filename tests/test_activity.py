"""What counters say about the time between two looks; the quantiles of a histogram."""

from __future__ import annotations

import http.server
import threading
from dataclasses import replace
from typing import Dict, Iterator, List, Mapping, Optional, Tuple

import pytest
from traceserve import cli
from traceserve.measuring.activity import Activity, Sample, between, quantile, series_of
from traceserve.measuring.server_times import ServerTimes, Watch

INF = float("inf")


@pytest.mark.parametrize(
    ("buckets", "share", "value"),
    [
        ({0.01: 10, 0.02: 20, INF: 20}, 0.5, 0.01),
        ({0.01: 10, 0.02: 20, INF: 20}, 0.75, 0.015),
        ({0.01: 0, 0.02: 10, INF: 10}, 0.5, 0.015),
        ({0.01: 0, 0.02: 0, 0.1: 4, INF: 4}, 0.25, 0.04),
        ({0.01: 10, 0.02: 10, INF: 20}, 0.99, INF),  # longer than the histogram tells
        ({0.01: 0, INF: 0}, 0.5, None),
        ({}, 0.5, None),
    ],
)
def test_quantiles_are_interpolated(buckets: Dict[float, float], share: float, value: Optional[float]) -> None:
    assert quantile(buckets, share) == (value if value is None else pytest.approx(value))


Metric = Tuple[str, Mapping[str, str], float]


def of_torchserve(counters: Mapping[str, float], errors: Mapping[str, float], buckets: Mapping[str, float]) -> Sample:
    labels = {"ModelName": "intents", "Level": "Model"}
    found: List[Metric] = [(metric, {"model_name": "intents"}, value) for metric, value in counters.items()]
    found += [("traceserve_errors_total", {**labels, "reason": reason}, value) for reason, value in errors.items()]
    found += [("traceserve_batch_seconds_bucket", {**labels, "le": limit}, value) for limit, value in buckets.items()]
    return Sample(100.0, series_of(found))


def test_activity_is_what_grew() -> None:
    first = of_torchserve(
        {
            "ts_inference_requests_total": 10.0,
            "ts_inference_latency_microseconds": 1e6,
            "ts_queue_latency_microseconds": 4e5,
            "traceserve_tokens_total": 1000.0,
            "traceserve_computed_tokens_total": 1000.0,
        },
        {"InvalidRequest": 3.0},
        {"0.01": 5.0, "0.02": 5.0, "+Inf": 5.0},
    )
    last = of_torchserve(
        {
            "ts_inference_requests_total": 30.0,
            "ts_inference_latency_microseconds": 2e6,
            "ts_queue_latency_microseconds": 6e5,
            "traceserve_tokens_total": 1300.0,
            "traceserve_computed_tokens_total": 1400.0,
        },
        {"InvalidRequest": 3.0, "InputTooLong": 2.0},
        {"0.01": 5.0, "0.02": 15.0, "+Inf": 15.0},
    )
    found = between(first, replace(last, moment=102.0, waiting=4))
    assert (found.seconds, found.requests, found.errors, found.waiting) == (2.0, 20, {"InputTooLong": 2}, 4)
    means = (found.latency, found.queue, found.padding_share)
    assert means == (pytest.approx(0.05), pytest.approx(0.01), pytest.approx(0.25))
    assert (found.batch_p50, found.batch_p99) == (pytest.approx(0.015), pytest.approx(0.0199))
    assert found.rate == 10


def test_times_that_are_counted_per_round_are_unknown() -> None:
    counters = {"ts_inference_requests_total": 10.0, "ts_inference_latency_microseconds": 1e6}
    last = of_torchserve({**counters, "ts_queue_latency_microseconds": 4e5}, {}, {"0.01": 5.0, "+Inf": 5.0})
    found = between(Sample(0.0), replace(last, waiting=4, continuous=True))
    assert (found.requests, found.waiting, found.batch_p50) == (10, 4, pytest.approx(0.005))
    assert found.latency is found.queue is None


@pytest.mark.parametrize("interval", ["x", "0", "nan", "inf"])
def test_an_interval_is_a_number(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["status", "--watch", interval])
    assert "argument --watch: should be 0.1 or more" in capsys.readouterr().err


def test_nothing_was_asked() -> None:
    quiet = between(Sample(1.0), Sample(2.0, waiting=0))
    assert quiet == Activity(1.0, 0, None, None, None, None, None, {}, 0) and quiet.rate == 0


def of_ray(replicas: Mapping[str, Tuple[float, float]], limit: str = "0.01") -> Sample:
    """Each replica's requests, and the tokens that it computed; every batch took at most `limit` seconds."""
    found: List[Metric] = []
    for worker, (requests, computed) in replicas.items():
        labels = {"model_name": "intents", "WorkerId": worker}
        found += [
            ("ray_traceserve_requests_total", labels, requests),
            ("ray_traceserve_tokens_total", labels, 10 * requests),
            ("ray_traceserve_computed_tokens_total", labels, computed),
            ("ray_traceserve_errors_total", {**labels, "reason": "InvalidRequest"}, requests / 10),
            ("ray_traceserve_batch_seconds_bucket", {**labels, "le": "0.01"}, requests if limit == "0.01" else 0.0),
            ("ray_traceserve_batch_seconds_bucket", {**labels, "le": "0.02"}, requests),
            ("ray_traceserve_batch_seconds_bucket", {**labels, "le": "+Inf"}, requests),
        ]
    return Sample(1.0, series_of(found))


def test_on_ray_serve_the_replicas_are_summed() -> None:
    found = between(of_ray({"a": (10, 100), "b": (10, 100)}), of_ray({"a": (30, 350), "b": (30, 350)}))
    assert (found.requests, found.errors, found.padding_share) == (40, {"InvalidRequest": 4}, pytest.approx(0.2))
    assert found.batch_p50 == pytest.approx(0.005)
    assert found.latency is found.queue is found.waiting is None


def test_replicas_come_and_go_meanwhile() -> None:
    """One answered 20 and stays, one is new and answered 10, and one that had answered 1,000 has gone."""
    found = between(of_ray({"a": (10, 100), "gone": (1000, 1e6)}), of_ray({"a": (30, 350), "new": (10, 125)}))
    assert (found.requests, found.errors, found.padding_share) == (30, {"InvalidRequest": 3}, pytest.approx(0.2))
    assert found.batch_p50 == pytest.approx(0.005)


def test_the_batches_of_a_new_replica_are_counted_beside_those_of_a_gone_one() -> None:
    found = between(of_ray({"gone": (1000, 1e6)}), of_ray({"new": (10, 125)}, limit="0.02"))
    assert (found.requests, found.errors, found.padding_share) == (10, {"InvalidRequest": 1}, pytest.approx(0.2))
    assert (found.batch_p50, found.batch_p99) == (pytest.approx(0.015), pytest.approx(0.0199))


def test_counters_that_started_anew_make_nothing_negative() -> None:
    found = between(of_ray({"a": (1000, 1e6)}), of_ray({"a": (40, 500)}))
    assert (found.requests, found.errors, found.padding_share) == (40, {"InvalidRequest": 4}, pytest.approx(0.2))


def test_of_a_gone_archive_nothing_is_left() -> None:
    found = between(of_ray({"gone": (1000, 1e6)}), of_ray({}))
    assert (found.requests, found.errors, found.batch_p50, found.padding_share) == (0, {}, None, None)


# --- the times of a request in bench ----------------------------------------------------------------------------------


class Scraped(http.server.BaseHTTPRequestHandler):
    """A server's metrics, another text each time."""

    texts: List[str] = []

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.texts.pop(0).encode("utf-8"))

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture
def scraped() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Scraped)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()


def watched(url: str, *texts: str) -> Optional[ServerTimes]:
    Scraped.texts = list(texts)
    with Watch(url, "intents", 0.0, 0.0) as watch:
        watch._thread.join()
    return watch.times


def of_replicas(replicas: Mapping[str, int]) -> str:
    """The metrics of replicas on Ray Serve: so many requests each, of 10 tokens, 0.3 s in the handler and 0.2 in the model."""
    each = {
        "requests": 1,
        "handler_seconds": 0.3,
        "model_seconds": 0.2,
        "tokens": 10,
        "computed_tokens": 12.5,
        "windows": 1,
    }
    return "\n".join(
        f'ray_traceserve_{metric}_total{{model_name="intents",WorkerId="{worker}"}} {requests * value}'
        for worker, requests in replicas.items()
        for metric, value in each.items()
    )


def test_bench_has_the_times_on_ray_serve(scraped: str) -> None:
    times = watched(scraped, of_replicas({"a": 10, "b": 10}), of_replicas({"a": 30, "b": 30}))
    assert times is not None and times.requests == 40 and times.latency is None
    assert (times.handler, times.model) == (pytest.approx(0.3), pytest.approx(0.2))
    assert (times.tokens, times.rows, times.padding_share) == (pytest.approx(10), pytest.approx(1), pytest.approx(0.2))
    parts = times.shares(0.5)
    assert parts == {
        "model": pytest.approx(0.2),
        "rest of the handler": pytest.approx(0.1),
        "queue, server, network and client": pytest.approx(0.2),
    }


def test_a_replica_that_starts_anew_takes_nothing_from_bench(scraped: str) -> None:
    """One that had answered 1,000 started anew and answered 40, and one is new."""
    times = watched(scraped, of_replicas({"a": 1000}), of_replicas({"a": 40, "new": 10}))
    assert times is not None and times.requests == 50 and times.handler == pytest.approx(0.3)
    assert watched(scraped, of_replicas({"a": 40}), of_replicas({"a": 40})) is None


def test_bench_breaks_down_the_times_of_torchserve(scraped: str) -> None:
    def text(requests: int) -> str:
        own = {"requests": 1, "handler_seconds": 0.3, "model_seconds": 0.2, "tokens": 10, "windows": 1}
        frontend = {"requests_total": 1, "latency_microseconds": 5e5, "queue_latency_microseconds": 1e5}
        lines = [f'ts_inference_{name}{{model_name="intents"}} {requests * value}' for name, value in frontend.items()]
        lines += [f'traceserve_{name}_total{{ModelName="intents"}} {requests * value}' for name, value in own.items()]
        return "\n".join(lines).replace("ts_inference_queue", "ts_queue")

    times = watched(scraped, text(10), text(30))
    assert times is not None and (times.requests, times.padding_share) == (20, 0.0)
    parts = times.shares(0.6)
    assert list(parts) == ["queue", "model", "rest of the handler", "frontend", "network and client"]
    assert list(parts.values()) == [pytest.approx(each) for each in (0.1, 0.2, 0.1, 0.1, 0.1)]
