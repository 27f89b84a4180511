"""A running server's counters (Prometheus), and the breakdown of a request's time.

Of TorchServe 0.12, in microseconds, summed over requests: `ts_inference_latency_microseconds` from a request's arrival in
the frontend to its answer, `ts_queue_latency_microseconds` from its arrival to its leaving the queue, the delay in which
batches are filled included. Of our handler, in seconds, summed likewise: `traceserve_handler_seconds_total`, and within it
`traceserve_model_seconds_total`; each request of a batch waits for the whole batch.
"""

from __future__ import annotations

import contextlib
import re
import threading
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Tuple

from traceserve.serving import client

_LINE = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class ServerTimes:
    """Means over the requests of a span, in seconds; `model` is part of `handler`."""

    requests: int
    latency: float  # in TorchServe, from arrival to answer
    queue: float
    handler: float
    model: float
    tokens: float  # per request
    rows: float  # per request
    padding_share: float  # of the model's computation, 0 to 1

    def shares(self, latency: float) -> Dict[str, float]:
        """Break down `latency`, a client's mean, in seconds: the parts add up to it."""
        handler = min(self.handler, max(0.0, self.latency - self.queue))
        model = min(self.model, handler)
        inside = min(self.latency, latency)
        return {
            "queue": self.queue,
            "model": model,
            "rest of the handler": handler - model,
            "frontend": max(0.0, inside - self.queue - handler),
            "network and client": latency - inside,
        }


def metrics_of(url: str, name: Optional[str] = None) -> Iterator[Tuple[str, Dict[str, str], float]]:
    """Yield each metric of the model `name`, or of all, with its labels and value; raises OSError."""
    with client.opener.open(url, timeout=5) as response:
        text = response.read().decode("utf-8")
    for metric, listed, value in _LINE.findall(text):
        labels = dict(_LABEL.findall(listed))
        if name is None or name in (labels.get("model_name"), labels.get("ModelName")):
            yield metric, labels, float(value)


def read_metrics(url: str, name: str) -> Dict[str, float]:
    """Return the metrics of the model `name`, by name, summed over all else; raises OSError."""
    found: Dict[str, float] = {}
    for metric, _, value in metrics_of(url, name):
        found[metric] = found.get(metric, 0.0) + value
    return found


class Watch:
    """Samples a server's metrics `delay` seconds after its start and `seconds` later, in a thread beside the load
    generator's."""

    def __init__(self, url: str, name: str, delay: float, seconds: float) -> None:
        self._url, self._name, self._delays = url, name, (delay, seconds)
        self._looks: List[Dict[str, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        for delay in self._delays:
            self._ended.wait(delay)
            with contextlib.suppress(OSError, ValueError):  # `times` reports it: too few samples
                self._looks.append(read_metrics(self._url, self._name))

    @property
    def times(self) -> Optional[ServerTimes]:
        """Return None if the server could not be sampled, or answered nothing meanwhile."""
        if len(self._looks) < 2:
            return None
        first, last = self._looks[0], self._looks[-1]

        def grown(metric: str) -> float:
            return last.get(metric, 0.0) - first.get(metric, 0.0)

        requests = grown("ts_inference_requests_total")
        if requests <= 0:
            return None
        answered = max(1.0, grown("traceserve_requests_total"))
        return ServerTimes(
            requests=int(requests),
            latency=grown("ts_inference_latency_microseconds") / requests / 1e6,
            queue=grown("ts_queue_latency_microseconds") / requests / 1e6,
            handler=grown("traceserve_handler_seconds_total") / requests,
            model=grown("traceserve_model_seconds_total") / requests,
            tokens=grown("traceserve_tokens_total") / answered,
            rows=grown("traceserve_windows_total") / answered,
            padding_share=1 - grown("traceserve_tokens_total") / max(1.0, grown("traceserve_computed_tokens_total")),
        )
