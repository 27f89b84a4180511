"""What counters say about the time between two looks; the quantiles of a histogram."""

from __future__ import annotations

from typing import Dict, Optional

import pytest
from traceserve.measuring.activity import Activity, Sample, between, quantile, ray_sample

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


def test_activity_is_what_grew() -> None:
    first = Sample(
        100.0,
        {
            "ts_inference_requests_total": 10.0,
            "ts_inference_latency_microseconds": 1e6,
            "ts_queue_latency_microseconds": 4e5,
            "traceserve_tokens_total": 1000.0,
            "traceserve_computed_tokens_total": 1000.0,
        },
        {"InvalidRequest": 3.0},
        {0.01: 5.0, 0.02: 5.0, INF: 5.0},
    )
    last = Sample(
        102.0,
        {
            "ts_inference_requests_total": 30.0,
            "ts_inference_latency_microseconds": 2e6,
            "ts_queue_latency_microseconds": 6e5,
            "traceserve_tokens_total": 1300.0,
            "traceserve_computed_tokens_total": 1400.0,
        },
        {"InvalidRequest": 3.0, "InputTooLong": 2.0},
        {0.01: 5.0, 0.02: 15.0, INF: 15.0},
        waiting=4,
    )
    found = between(first, last)
    assert (found.seconds, found.requests, found.errors, found.waiting) == (2.0, 20, {"InputTooLong": 2}, 4)
    means = (found.latency, found.queue, found.padding_share)
    assert means == (pytest.approx(0.05), pytest.approx(0.01), pytest.approx(0.25))
    assert (found.batch_p50, found.batch_p99) == (pytest.approx(0.015), pytest.approx(0.0199))
    assert found.rate == 10


def test_nothing_was_asked() -> None:
    quiet = between(Sample(1.0), Sample(2.0, waiting=0))
    assert quiet == Activity(1.0, 0, None, None, None, None, None, {}, 0) and quiet.rate == 0


def test_on_ray_serve_the_replicas_are_summed() -> None:
    def replicas(requests: float, computed: float) -> Sample:
        found = []
        for pid in ("1", "2"):
            labels = {"model_name": "intents", "pid": pid}
            found += [
                ("ray_traceserve_requests_total", labels, requests),
                ("ray_traceserve_tokens_total", labels, 10 * requests),
                ("ray_traceserve_computed_tokens_total", labels, computed),
                ("ray_traceserve_errors_total", {**labels, "reason": "InvalidRequest"}, requests / 10),
                ("ray_traceserve_batch_seconds_bucket", {**labels, "le": "0.01"}, requests),
                ("ray_traceserve_batch_seconds_bucket", {**labels, "le": "+Inf"}, requests),
            ]
        return ray_sample(found)

    found = between(replicas(10, 100), replicas(30, 350))
    assert (found.requests, found.errors, found.padding_share) == (40, {"InvalidRequest": 4}, pytest.approx(0.2))
    assert found.batch_p50 == pytest.approx(0.005)
    assert found.latency is found.queue is found.waiting is None


def test_counters_of_an_ended_replica_make_nothing_negative() -> None:
    before = Sample(1.0, {"ts_inference_requests_total": 9.0}, {"Timeout": 3.0}, {0.1: 9.0, INF: 9.0})
    after = Sample(2.0, {"ts_inference_requests_total": 4.0}, {"Timeout": 1.0}, {0.1: 4.0, INF: 4.0})
    found = between(before, after)
    assert (found.requests, found.errors, found.batch_p50) == (0, {}, None)
