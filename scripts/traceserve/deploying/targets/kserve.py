"""`kserve`: a ServingRuntime of our own, by uvicorn, and an InferenceService for each archive."""

from __future__ import annotations

from typing import Dict, List, Sequence

from traceserve import __version__
from traceserve.deploying import resources, templates
from traceserve.deploying.described import Described
from traceserve.deploying.plan import DeployTarget, File, Plan, Text, Wishes, prefixed
from traceserve.deploying.targets import docker
from traceserve.deploying.targets.kubernetes import plain_name
from traceserve.errors import DeployError

_RUNTIME = "serving_runtime.yaml"  # no InferenceService's name has an underscore


def plan(archives: Sequence[Described], wishes: Wishes) -> Plan:
    """The runtime's image holds no archive: KServe fetches those."""
    if wishes.url is None:
        raise DeployError(
            "KServe fetches archives itself: say from where with --url, as s3://bucket/archives, https://example.org/archives "
            "or pvc://CLAIM/archives"
        )
    url = wishes.url.rstrip("/")
    image = wishes.image or f"traceserve:{__version__}"
    names = _names(archives)
    own: List[File] = [
        Text(f"{name}.yaml", _service(name, each, f"{url}/{each.file.name}", wishes.engine))
        for name, each in zip(names, archives)
    ]
    return Plan(
        (
            Text(_RUNTIME, templates.fill("kserve/runtime.yaml", image=templates.flow(image))),
            *own,
            *prefixed("image", docker.image_files(archives, wishes, with_archives=False)),
        ),
        (
            docker.build_and_push(image),
            *(f"# put {each.file} at {url}/{each.file.name}" for each in archives),
            f"kubectl apply --filename {_RUNTIME}",
            *(f"kubectl apply --filename {each.path}" for each in own),
        ),
        ("who may ask is decided by KServe's gateway: the container demands no key.",),
    )


def _names(archives: Sequence[Described]) -> List[str]:
    """The InferenceServices' names; raises DeployError if two are equal."""
    by_name: Dict[str, str] = {}
    for each in archives:
        other = by_name.setdefault(plain_name(each.name), each.name)
        if other != each.name:
            raise DeployError(
                f"{other} and {each.name} would both be the InferenceService {plain_name(each.name)}; deploy them into two "
                "namespaces, or build one under another name"
            )
    return list(by_name)


def _service(name: str, archive: Described, url: str, engine: str) -> str:
    needed = resources.needed([archive], engine)
    return templates.fill(
        "kserve/service.yaml",
        name=name,
        tolerations=templates.flow(needed.tolerations()),
        url=templates.flow(url),
        digest=templates.flow(archive.sha256),
        reasons="\n".join(f"      # {reason}" for reason in needed.reasons),
        requests=templates.block(needed.requests(), 10),
        limits=templates.block(needed.limits(), 10),
    )


TARGET = DeployTarget(
    ("uvicorn",),
    plan,
)
