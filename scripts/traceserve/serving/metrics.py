"""A running server's metrics, in Prometheus' format."""

from __future__ import annotations

import re
from typing import Dict, Iterator, Optional, Tuple

from traceserve.serving import client

_LINE = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def metrics_of(url: str, name: Optional[str] = None) -> Iterator[Tuple[str, Dict[str, str], float]]:
    """Yield each metric of the model `name`, or of all, with its labels and value; raises OSError."""
    with client.opener.open(url, timeout=5) as response:
        text = response.read().decode("utf-8")
    for metric, listed, value in _LINE.findall(text):
        labels = dict(_LABEL.findall(listed))
        if name is None or name in (labels.get("model_name"), labels.get("ModelName")):
            yield metric, labels, float(value)
