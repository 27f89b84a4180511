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

# Docker's grammar for references, whose tag is needed here.
_DOMAIN_PART = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_DOMAIN = rf"(?:{_DOMAIN_PART}(?:\.{_DOMAIN_PART})*|\[[A-Fa-f0-9:]+\])(?::[0-9]+)?"
_PATH_PART = "[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?P<name>(?:{_DOMAIN}/)?{_PATH_PART}(?:/{_PATH_PART})*):[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}}(?P<digest>@sha256:[a-f0-9]{{64}})?"
)
_LONGEST_IMAGE = 255  # without its tag


def checked(target: str, engine: Optional[str], image: Optional[str], url: Optional[str]) -> str:
    """The engine, as wished or the target's first; raises DeployError for what there is not."""
    if target not in TARGETS:
        near = difflib.get_close_matches(target, TARGETS, 1)
        hint = f"did you mean {near[0]}?" if near else ""
        raise DeployError(f"{target!r} is no target; there are {', '.join(TARGETS)}. {hint}".strip())
    engines = TARGETS[target].engines
    if engine is not None and engine not in engines:
        raise DeployError(f"--engine {engine}: {target} has files for {' and '.join(engines)}")
    if image is not None:
        _check_image(target, image)
    if url is not None:
        _check_url(target, url)
    return engine or engines[0]


def _check_image(target: str, image: str) -> None:
    found = _IMAGE.fullmatch(image)
    if found is None or len(found["name"]) > _LONGEST_IMAGE:
        raise DeployError(
            f"--image {image}: should be NAME:TAG, as registry.example.org/team/name:1.0, in small letters"
        )
    if found["digest"] and target == "docker":
        raise DeployError(f"--image {image}: an image gets its digest when it is built; name it without")


def _check_url(target: str, url: str) -> None:
    """Raise DeployError unless archives can be fetched from below `url`; one with a password is not repeated."""
    try:
        parts = urllib.parse.urlsplit(url)
        whole = bool(parts.scheme and parts.netloc and parts.port != 0)
    except ValueError:  # a port that is no number
        whole = False
    if not whole or re.search(r"[\s'\"\\]", url):
        raise DeployError(
            f"--url {url.rpartition('@')[2]} is no address; it should look like https://example.org/archives or "
            "s3://bucket/archives"
        )
    if "@" in parts.netloc:
        raise DeployError(
            "--url has a user's name or a password, which would stand in the files; give the address without, and credentials "
            "as a Secret"
        )
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        raise DeployError(
            f"--url {url.partition('?')[0].partition('#')[0]} is followed by a query or a fragment, and archives' names are "
            "written behind it; name a folder"
        )
    _check_scheme(target, parts.scheme, url)


def _check_scheme(target: str, scheme: str, url: str) -> None:
    known = TARGETS[target].schemes
    if known == ():
        raise DeployError(f"--url {url}: {target} fetches no archive, its files hold them; leave it out")
    if known is not None and scheme not in known:
        raise DeployError(f"--url {url}: {target} fetches from {' or '.join(f'{each}://' for each in known)} alone")
