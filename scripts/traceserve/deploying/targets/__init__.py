"""What can be deployed to, in the order in which --help lists it."""

from __future__ import annotations

import difflib
import re
import urllib.parse
from typing import Dict, Optional

from traceserve.deploying.plan import DeployTarget
from traceserve.deploying.targets import docker, kserve, kuberay, kubernetes, mlflow, sagemaker
from traceserve.errors import DeployError

TARGETS: Dict[str, DeployTarget] = {
    "docker": docker.TARGET,
    "kubernetes": kubernetes.TARGET,
    "kserve": kserve.TARGET,
    "kuberay": kuberay.TARGET,
    "sagemaker": sagemaker.TARGET,
    "mlflow": mlflow.TARGET,
}

_IMAGE = re.compile(r"([a-z0-9.-]+(:\d+)?/)?[a-z0-9._/-]+:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def checked(target: str, engine: Optional[str], image: Optional[str], url: Optional[str]) -> str:
    """The engine, as wished or the target's first; raises DeployError for what there is not."""
    if target not in TARGETS:
        near = difflib.get_close_matches(target, TARGETS, 1)
        hint = f"did you mean {near[0]}?" if near else ""
        raise DeployError(f"{target!r} is no target; there are {', '.join(TARGETS)}. {hint}".strip())
    engines = TARGETS[target].engines
    if engine is not None and engine not in engines:
        raise DeployError(f"--engine {engine}: {target} has files for {' and '.join(engines)}")
    if image is not None and not _IMAGE.fullmatch(image):
        raise DeployError(
            f"--image {image}: should be NAME:TAG, as registry.example.org/team/name:1.0, in small letters"
        )
    if url is not None and (not urllib.parse.urlsplit(url).scheme or not urllib.parse.urlsplit(url).netloc):
        raise DeployError(
            f"--url {url} is no address; it should look like https://example.org/archives or s3://bucket/archives"
        )
    return engine or engines[0]
