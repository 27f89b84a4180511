"""A served archive's activity: its counters at one moment, and the differences between two."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Dict, Iterable, List, Mapping, Optional, Tuple

from traceserve.errors import ServerError
from traceserve.measuring.server_times import metrics_of
from traceserve.serving import management
from traceserve.serving.engines import RAY
from traceserve.serving.instances import Instance

_BUCKET = "traceserve_batch_seconds_bucket"
_ERRORS = "traceserve_errors_total"
_REQUESTS = "ts_inference_requests_total"
_LATENCY, _QUEUE = "ts_inference_latency_microseconds", "ts_queue_latency_microseconds"
_OF_RAY = "ray_"
_BY_STATUS = re.compile(r"Requests(\dXX)(_total)?$")


@dataclass(frozen=True)
class Sample:
    """An archive's counters since its server started. Times are in seconds."""

    moment: float
    counters: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)  # by reason
    buckets: Mapping[float, float] = field(default_factory=dict)  # batches that took at most this many seconds
    waiting: Optional[int] = None  # requests in the queue at this moment; None: unknown


@dataclass(frozen=True)
class Activity:
    """An archive's activity between two samples; None: not measurable."""

    seconds: float
    requests: int
    latency: Optional[float]  # mean, in TorchServe, from arrival to answer
    queue: Optional[float]  # mean, part of the latency
    batch_p50: Optional[float]  # of a batch in the handler: its requests wait this long after the queue
    batch_p99: Optional[float]
    padding_share: Optional[float]  # of the model's computation, 0 to 1
    errors: Mapping[str, int]  # by reason
    waiting: Optional[int]

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds if self.seconds > 0 else 0.0


def sample(instance: Instance, name: str) -> Sample:
    """Read an archive's counters, and the length of its queue; raises OSError if the server does not give them."""
    if instance.engine == RAY:
        return ray_sample(metrics_of(f"http://127.0.0.1:{instance.metrics_port}/metrics", name))
    counters: Dict[str, float] = {}
    errors: Dict[str, float] = {}
    buckets: Dict[float, float] = {}
    for metric, labels, value in metrics_of(f"http://127.0.0.1:{instance.metrics_port}/metrics", name):
        if metric == _BUCKET:
            buckets[float(labels["le"])] = value  # "+Inf" too
        elif metric == _ERRORS:
            errors[labels["reason"]] = value
        else:
            counters[metric] = counters.get(metric, 0.0) + value  # of all versions, named in the path or not
    return Sample(time.time(), counters, errors, buckets, _waiting(instance, name))


def ray_sample(metrics: Iterable[Tuple[str, Mapping[str, str], float]]) -> Sample:
    """Return an archive's counters on Ray Serve, summed over its replicas: those of TorchServe's worker behind `ray_`.

    Ray has no counters of an archive's queue, and none of its latency that grow with these.
    """
    counters: Dict[str, float] = defaultdict(float)
    errors: Dict[str, float] = defaultdict(float)
    buckets: Dict[float, float] = defaultdict(float)
    for metric, labels, value in metrics:
        own = metric[len(_OF_RAY) :] if metric.startswith(_OF_RAY) else metric
        if own == _BUCKET:
            buckets[float(labels["le"])] += value
        elif own == _ERRORS:
            errors[labels["reason"]] += value
        else:
            counters[own] += value
    counters[_REQUESTS] = counters["traceserve_requests_total"]
    return Sample(time.time(), counters, errors, buckets)


def _waiting(instance: Instance, name: str) -> Optional[int]:
    try:
        return management.default(instance, name).waiting
    except (ServerError, KeyError, TypeError, ValueError):  # TorchServe before 0.9, or one that stops
        return None


def answers_by_status(instance: Instance) -> Dict[str, int]:
    """Return a server's number of answers since its start, by status class: 2XX, 4XX, 5XX; raises OSError."""
    found = metrics_of(f"http://127.0.0.1:{instance.metrics_port}/metrics")
    by_status = {m[1]: int(value) for name, _, value in found for m in [_BY_STATUS.match(name)] if m}
    return {status: by_status.get(status, 0) for status in ("2XX", "4XX", "5XX")}


def between(first: Sample, last: Sample) -> Activity:
    """Return the activity from one sample to a later one."""

    def grown(metric: str) -> float:
        return max(0.0, last.counters.get(metric, 0.0) - first.counters.get(metric, 0.0))

    requests = grown(_REQUESTS)
    computed = grown("traceserve_computed_tokens_total")
    buckets = {limit: max(0.0, count - first.buckets.get(limit, 0.0)) for limit, count in last.buckets.items()}
    errors = {reason: max(0, int(count - first.errors.get(reason, 0.0))) for reason, count in last.errors.items()}
    return Activity(
        seconds=last.moment - first.moment,
        requests=int(requests),
        latency=grown(_LATENCY) / requests / 1e6 if requests and _LATENCY in last.counters else None,
        queue=grown(_QUEUE) / requests / 1e6 if requests and _QUEUE in last.counters else None,
        batch_p50=quantile(buckets, 0.5),
        batch_p99=quantile(buckets, 0.99),
        padding_share=1 - grown("traceserve_tokens_total") / computed if computed else None,
        errors={reason: count for reason, count in errors.items() if count},
        waiting=last.waiting,
    )


def quantile(buckets: Mapping[float, float], share: float) -> Optional[float]:
    """Return a quantile of a histogram, from its cumulative counts by upper limit; None without observations.

    Interpolated linearly in its bucket, as Prometheus' histogram_quantile does; infinity beyond the last finite limit.
    """
    limits: List[float] = sorted(buckets)
    if not limits or not buckets[limits[-1]]:
        return None
    rank = share * buckets[limits[-1]]
    below, start = 0.0, 0.0
    for limit in limits:
        count = buckets[limit]
        if count >= rank and count > below:
            return limit if limit == float("inf") else start + (limit - start) * (rank - below) / (count - below)
        below, start = count, limit
    return None
