"""A running server's metrics, in Prometheus' format."""

from __future__ import annotations

import http.client
import re
from typing import Dict, Iterator, Optional, Tuple

from traceserve.errors import ServerError
from traceserve.serving import client
from traceserve.serving.instances import Instance

_LINE = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def metrics_of(url: str, name: Optional[str] = None) -> Iterator[Tuple[str, Dict[str, str], float]]:
    """Yield each metric of the model `name`, or of all, with its labels and value; raises OSError."""
    try:
        with client.opener.open(url, timeout=5) as response:
            text = response.read().decode("utf-8", "replace")
    except http.client.HTTPException as error:  # no OSError: an answer that is cut off, or no HTTP
        raise ConnectionError(f"no whole answer: {error!r}") from None
    for metric, listed, value in _LINE.findall(text):
        labels = dict(_LABEL.findall(listed))
        if name is None or name in (labels.get("model_name"), labels.get("ModelName")):
            yield metric, labels, float(value)


def naming_counts(instance: Instance, name: str, metric: str) -> Dict[str, int]:
    """Return how many requests have named each version of an archive in their path, as this metric counts them in each process;
    raises ServerError if the server does not say."""
    counted: Dict[str, int] = {}
    try:
        for each, labels, value in metrics_of(instance.metrics_url, name):
            if each == metric:
                version = labels["model_version"]
                counted[version] = counted.get(version, 0) + int(value)
    except OSError as error:
        raise ServerError(
            f"whether requests name a version of {name} in their path is unknown: {instance.metrics_url}: {error}"
        ) from None
    return counted
