"""A served archive's activity: its counters at one moment, and the differences between two."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field, replace
from typing import Dict, Iterable, List, Mapping, Optional, Tuple

from traceserve.errors import ServerError
from traceserve.serving import management
from traceserve.serving.engines import RAY
from traceserve.serving.instances import Instance
from traceserve.serving.metrics import metrics_of

_BUCKET = "traceserve_batch_seconds_bucket"
_ERRORS = "traceserve_errors_total"
_REQUESTS = "ts_inference_requests_total"
_LATENCY, _QUEUE = "ts_inference_latency_microseconds", "ts_queue_latency_microseconds"
_OF_RAY = "ray_"
_REQUESTS_OF_RAY = "ray_traceserve_requests_total"
_BY_STATUS = re.compile(r"Requests(\dXX)(_total)?$")


Series = Tuple[str, Tuple[Tuple[str, str], ...]]  # a metric's name, and all its labels, by name


@dataclass(frozen=True)
class Sample:
    """An archive's counters, each since its process started. Times are in seconds."""

    moment: float
    series: Mapping[Series, float] = field(default_factory=dict)
    waiting: Optional[int] = None  # requests in the queue at this moment; None: unknown
    continuous: bool = False  # then TorchServe counts its times once per round, not once per request

    @property
    def counters(self) -> Dict[str, float]:
        """The sums of each metric: over versions, named in the path or not, and over replicas."""
        return self._sums("")

    @property
    def errors(self) -> Dict[str, float]:
        """Failed requests by reason."""
        return self._sums("reason", _ERRORS)

    @property
    def buckets(self) -> Dict[float, float]:
        """The numbers of batches that took at most so many seconds."""
        return {float(limit): count for limit, count in self._sums("le", _BUCKET).items()}  # "+Inf" too

    @property
    def requests(self) -> float:
        """The number of requests."""
        return self.counters.get(_REQUESTS, 0.0)

    @property
    def latency(self) -> Optional[float]:
        """Their mean time in TorchServe, from arrival to answer; None: unknown."""
        return self._mean(_LATENCY)

    @property
    def queue(self) -> Optional[float]:
        """The part of it before a request leaves the queue; None: unknown."""
        return self._mean(_QUEUE)

    @property
    def padding_share(self) -> Optional[float]:
        """The share of computed tokens that were padding, 0 to 1."""
        counters = self.counters
        computed = counters.get("traceserve_computed_tokens_total", 0.0)
        return 1 - counters.get("traceserve_tokens_total", 0.0) / computed if computed else None

    def _mean(self, metric: str) -> Optional[float]:
        if self.continuous:
            return None
        counters, requests = self.counters, self.requests
        return counters[metric] / requests / 1e6 if requests and metric in counters else None

    def _sums(self, label: str, only: str = "") -> Dict[str, float]:
        """Sum the series of the metric `only` by a label; of all metrics by their names, if none is given."""
        found: Dict[str, float] = {}
        for (metric, labels), value in self.series.items():
            if only in ("", metric):
                key = dict(labels)[label] if label else metric
                found[key] = found.get(key, 0.0) + value
        return found


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
    found, described = counted(instance.metrics_url, name), _described(instance, name)
    if described is None:
        return found
    return replace(found, waiting=described.waiting, continuous=described.continuous)


def counted(url: str, name: str) -> Sample:
    """Read an archive's counters at its server's metrics' URL; raises OSError if the server does not give them."""
    return Sample(time.time(), series_of(metrics_of(url, name)))


def series_of(metrics: Iterable[Tuple[str, Mapping[str, str], float]]) -> Dict[Series, float]:
    """Return an archive's counters, by TorchServe's names.

    On Ray Serve each replica has its own, those of TorchServe's worker behind `ray_`. Ray has no counters of an
    archive's queue, and none of its latency that grow with these.
    """
    found: Dict[Series, float] = {}
    for metric, labels, value in metrics:
        own = metric[len(_OF_RAY) :] if metric.startswith(_OF_RAY) else metric
        each = tuple(sorted(labels.items()))
        found[own, each] = value
        if metric == _REQUESTS_OF_RAY:
            found[_REQUESTS, each] = value
    return found


def is_continuous(instance: Instance, name: str) -> bool:
    """Return whether TorchServe serves an archive with `continuous_batching`."""
    described = _described(instance, name)
    return described is not None and described.continuous


def _described(instance: Instance, name: str) -> Optional[management.Registered]:
    """Return TorchServe's description of an archive; None if there is none, as on Ray Serve."""
    if instance.engine == RAY:
        return None
    try:
        return management.default(instance, name)
    except (ServerError, KeyError, TypeError, ValueError):  # TorchServe before 0.9, or one that stops
        return None


def answers_by_status(instance: Instance) -> Dict[str, int]:
    """Return a server's number of answers since its start, by status class: 2XX, 4XX, 5XX; raises OSError."""
    found = metrics_of(instance.metrics_url)
    by_status = {m[1]: int(value) for name, _, value in found for m in [_BY_STATUS.match(name)] if m}
    return {status: by_status.get(status, 0) for status in ("2XX", "4XX", "5XX")}


def growth(first: Sample, last: Sample) -> Sample:
    """Return what the counters grew by from one sample to a later one.

    Replicas come and go meanwhile, so each series is compared with itself: what is new grew from 0, what has gone is
    left out, and what is less than it was started anew.
    """
    grown = {each: value - _before(first, each, value) for each, value in last.series.items()}
    return replace(last, series=grown)


def between(first: Sample, last: Sample) -> Activity:
    """Return the activity from one sample to a later one."""
    grown = growth(first, last)
    buckets = grown.buckets
    return Activity(
        seconds=last.moment - first.moment,
        requests=int(grown.requests),
        latency=grown.latency,
        queue=grown.queue,
        batch_p50=quantile(buckets, 0.5),
        batch_p99=quantile(buckets, 0.99),
        padding_share=grown.padding_share,
        errors={reason: int(count) for reason, count in grown.errors.items() if count >= 1},
        waiting=last.waiting,
    )


def _before(first: Sample, series: Series, value: float) -> float:
    before = first.series.get(series, 0.0)
    return before if before <= value else 0.0


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
