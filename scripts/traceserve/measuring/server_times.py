"""The breakdown of a request's time in a running server, by its counters.

Of TorchServe 0.12, in microseconds, summed over requests: `ts_inference_latency_microseconds` from a request's arrival in
the frontend to its answer, `ts_queue_latency_microseconds` from its arrival to its leaving the queue, the delay in which
batches are filled included. Of our handler, in seconds, summed likewise: `traceserve_handler_seconds_total`, and within it
`traceserve_model_seconds_total`; each request of a batch waits for the whole batch. With `continuous_batching` TorchServe
counts its times once per round, so there is no breakdown. Ray Serve has the handler's alone, and counts the texts of a body as
requests.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import Dict, List, Optional

from traceserve.measuring.activity import Sample, counted, growth


@dataclass(frozen=True)
class ServerTimes:
    """Means over the requests of a span, in seconds; `model` is part of `handler`."""

    requests: int
    latency: Optional[float]  # in TorchServe, from arrival to answer; None: not counted, nor is the queue
    queue: float
    handler: float
    model: float
    tokens: float  # per request
    rows: float  # per request
    padding_share: float  # of the model's computation, 0 to 1

    def shares(self, latency: float) -> Dict[str, float]:
        """Break down `latency`, a client's mean, in seconds: the parts add up to it."""
        if self.latency is None:
            handler = min(self.handler, latency)
            return {**self._within(handler), "queue, server, network and client": latency - handler}
        handler = min(self.handler, max(0.0, self.latency - self.queue))
        inside = min(self.latency, latency)
        return {
            "queue": self.queue,
            **self._within(handler),
            "frontend": max(0.0, inside - self.queue - handler),
            "network and client": latency - inside,
        }

    def _within(self, handler: float) -> Dict[str, float]:
        model = min(self.model, handler)
        return {"model": model, "rest of the handler": handler - model}


class Watch:
    """Samples a server's counters `delay` seconds after its start and `seconds` later, in a thread beside the load
    generator's."""

    def __init__(self, url: str, name: str, delay: float, seconds: float) -> None:
        self._url, self._name, self._delays = url, name, (delay, seconds)
        self._looks: List[Sample] = []
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
                self._looks.append(counted(self._url, self._name))

    @property
    def times(self) -> Optional[ServerTimes]:
        """Return None if the server could not be sampled, or answered nothing meanwhile."""
        if len(self._looks) < 2:
            return None
        grown = growth(self._looks[0], self._looks[-1])
        counters, requests = grown.counters, grown.requests
        if requests <= 0:
            return None
        answered = max(1.0, counters.get("traceserve_requests_total", 0.0))
        return ServerTimes(
            requests=int(requests),
            latency=grown.latency,
            queue=grown.queue or 0.0,
            handler=counters.get("traceserve_handler_seconds_total", 0.0) / requests,
            model=counters.get("traceserve_model_seconds_total", 0.0) / requests,
            tokens=counters.get("traceserve_tokens_total", 0.0) / answered,
            rows=counters.get("traceserve_windows_total", 0.0) / answered,
            padding_share=grown.padding_share or 0.0,
        )
