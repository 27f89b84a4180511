"""The targets of `traceserve bench` (a name or a URL), and their traffic (a file of samples)."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, replace
from typing import List, Mapping, Optional, Sequence, Tuple

from traceserve.building.samples import OwnSamples
from traceserve.errors import ConfigError, ServerError
from traceserve.measuring import activity, load_generator
from traceserve.measuring.arithmetic import Arithmetic, arithmetic_of
from traceserve.serving import client, instances

JSON, TEXT = "application/json", "text/plain; charset=utf-8"


@dataclass(frozen=True)
class Traffic:
    """The bodies to send, in rotation."""

    bodies: Tuple[bytes, ...]
    content_type: str


@dataclass(frozen=True)
class BenchTarget:
    """A measured server; with `metrics` if it is ours, and the arithmetic of its model if its archive tells it.

    `continuous`: whether its archive has `continuous_batching`.
    """

    label: str
    target: load_generator.Endpoint
    traffic: Traffic
    name: str = ""
    metrics: Optional[str] = None
    arithmetic: Optional[Arithmetic] = None
    continuous: bool = False


def bench_target(
    place: str,
    samples: OwnSamples,
    port: Optional[int] = None,
    body: Optional[str] = None,
    headers: Mapping[str, str] = {},
) -> BenchTarget:
    """Return the target for NAME, an archive served by us, or a URL, with these samples; raises ServerError,
    ConfigError.

    `body` (a template) and `headers` are only for a URL: our own servers' bodies and keys are known.
    """
    if "://" not in place:
        instance = instances.serving_instance(place, port, or_url=True)
        if instance.certificate:
            raise ServerError(f"{place} uses TLS, which cannot be measured; serve it without --certificate too")
        key = {"Authorization": f"Bearer {instance.key}"} if instance.key else {}
        target = load_generator.Endpoint(instance.predictions_url(place), key)
        return BenchTarget(place, target, traffic(samples), *_told_by(instance, place))
    parts = urllib.parse.urlsplit(place)
    if parts.scheme not in ("http", "https") or not parts.hostname or not place.isascii() or " " in place:
        raise ServerError(f"{place} is no URL to measure; it should look like http://127.0.0.1:8000/classify")
    label = urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return BenchTarget(label, load_generator.Endpoint(place, dict(headers)), traffic(samples, body), *_ours(label))


def with_distinct_labels(subjects: Sequence[BenchTarget]) -> List[BenchTarget]:
    """Return the subjects with a number behind each repeated label, as of one URL that is asked twice."""
    labels = [asked.label for asked in subjects]
    counts = [labels[:i].count(label) + 1 for i, label in enumerate(labels)]
    return [
        replace(asked, label=f"{asked.label} ({count})") if count > 1 else asked
        for asked, count in zip(subjects, counts)
    ]


_Ours = Tuple[str, Optional[str], Optional[Arithmetic], bool]


def _told_by(instance: instances.Instance, name: str) -> _Ours:
    """Return the name of one of our archives, its metrics' URL, the arithmetic of its model, and whether it has
    `continuous_batching`."""
    return name, instance.metrics_url, arithmetic_of(instance.manifest(name)), activity.is_continuous(instance, name)


def _ours(url: str) -> _Ours:
    """Return the same if a URL belongs to our server."""
    for instance in instances.running():
        for name in instance.names:
            if url == instance.predictions_url(name):
                return _told_by(instance, name)
    return "", None, None, False


def traffic(samples: OwnSamples, body: Optional[str] = None) -> Traffic:
    """Return the bodies that samples are: texts, inserted in `body` if given, or the lines of a .jsonl unchanged.

    Raises ConfigError for anything else.
    """
    if samples.whole:
        if body is not None:
            raise ConfigError(f"--body is for texts: {samples.name} holds whole bodies, which are sent as they are")
        for number, line in samples.lines:
            _check_json(line, samples.at(number))
    texts = [line for _, line in samples.lines]
    if body is not None:
        if "{text}" not in body:
            raise ConfigError(f"--body {body} has no {{text}}, the placeholder of the text")
        texts = [body.replace("{text}", json.dumps(text, ensure_ascii=False)[1:-1]) for text in texts]
        _check_json(texts[0], '--body, with a text in it, as in \'{"input": ["{text}"]}\'')
    whole = body is not None or samples.whole
    return Traffic(tuple(text.encode("utf-8") for text in texts), JSON if whole else TEXT)


def _check_json(text: str, where: str) -> None:
    try:
        json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: this is no JSON: {error}") from None


def check_answer(asked: BenchTarget) -> None:
    """Ask once, and raise ServerError with the server's own message if it refuses."""
    headers = {"Content-Type": asked.traffic.content_type, **asked.target.headers}
    request = urllib.request.Request(asked.target.url, data=asked.traffic.bodies[0], headers=headers, method="POST")
    try:
        with client.opener.open(request, timeout=60) as response:
            response.read()
    except urllib.error.HTTPError as error:
        with error:
            words = error.read(500).decode("utf-8", "replace").strip()
        raise ServerError(f"{asked.label} answers {error.code} to the first sample: {words or error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{asked.label} cannot be reached: {getattr(error, 'reason', error)}") from None
