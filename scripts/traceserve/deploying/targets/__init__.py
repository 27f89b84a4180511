"""What can be deployed to, in the order in which --help lists it."""

from __future__ import annotations

import difflib
import urllib.parse
from typing import Dict, Optional

from traceserve.deploying.plan import Target
from traceserve.deploying.targets import docker
from traceserve.errors import DeployError

TARGETS: Dict[str, Target] = {
    "docker": docker.TARGET,
}


def checked(target: str, engine: Optional[str], url: Optional[str]) -> str:
    """The engine, as wished or the target's first; raises DeployError for what there is not."""
    if target not in TARGETS:
        near = difflib.get_close_matches(target, TARGETS, 1)
        hint = f"did you mean {near[0]}?" if near else ""
        raise DeployError(f"{target!r} is no target; there are {', '.join(TARGETS)}. {hint}".strip())
    engines = TARGETS[target].engines
    if engine is not None and engine not in engines:
        raise DeployError(f"--engine {engine}: {target} has files for {' and '.join(engines)}")
    if url is not None and (not urllib.parse.urlsplit(url).scheme or not urllib.parse.urlsplit(url).netloc):
        raise DeployError(
            f"--url {url} is no address; it should look like https://example.org/archives or s3://bucket/archives"
        )
    return engine or engines[0]
