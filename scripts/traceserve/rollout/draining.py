"""When a version that gets no more requests has answered those that it had.

TorchServe says how many requests wait in a version's queue, not how many its workers are at. A queue is emptied in its
order, so where there is one worker, an own request that is answered follows all that came before it; it is sent a second
after the switch, by when every request has found its queue. Among several workers it may overtake a batch: there we
wait for twice as long as the longest batch so far took. With continuous batching a text may overtake longer ones, so we
wait for the version's response timeout.
"""

from __future__ import annotations

import contextlib
import time

from traceserve_runtime.json_types import JsonObject

from traceserve.errors import ServerError
from traceserve.measuring import activity
from traceserve.serving import client, management
from traceserve.serving.instances import Instance
from traceserve.serving.metrics import naming_counts

_LEAST = 1.0  # seconds in which a request that the frontend was at during the switch has got into its queue
_PAUSE = 0.1
_REQUESTS = "ts_inference_requests_total"


def drain(instance: Instance, name: str, version: str, canary: JsonObject, timeout: float) -> int:
    """Wait until a version has answered all its requests, and return how many named it in their path meanwhile.

    Raises ServerError if it has not within `timeout` seconds.
    """
    started, own = time.monotonic(), 0
    before = naming_counts(instance, name, _REQUESTS).get(version, 0)
    described = management.registered(instance, name)[version]
    quiet = _quiet(instance, name, described)
    proven = False
    while True:
        if described.ready:  # one that never loaded answers nothing
            sent = time.monotonic() - started
            with contextlib.suppress(client.NotYet):  # its queue is full
                own += 1
                left = max(1.0, timeout - sent)
                client.predict(instance.address, f"{name}/{version}", canary, left)
                proven = sent >= _LEAST
        described = management.registered(instance, name)[version]
        passed = time.monotonic() - started
        if described.waiting == 0 and passed >= quiet and (proven or not described.ready):
            return max(0, naming_counts(instance, name, _REQUESTS).get(version, 0) - before - own)
        if passed > timeout:
            raise ServerError(f"{name} {version} still had requests after {timeout:.0f} s")
        time.sleep(_PAUSE)


def _quiet(instance: Instance, name: str, described: management.Registered) -> float:
    """Return the seconds after which no batch of a version can run any more."""
    if described.continuous:
        return float(described.response_timeout)
    if described.workers < 2:
        return _LEAST
    try:
        longest = activity.quantile(activity.sample(instance, name).buckets, 1.0)
    except OSError:
        return float(described.response_timeout)
    return min(float(described.response_timeout), max(_LEAST, 2 * (longest or 0.0)))
