"""`kserve`: a ServingRuntime of our own, by uvicorn, and an InferenceService for each archive."""

from __future__ import annotations

from typing import List, Sequence

from traceserve import __version__
from traceserve.deploying import resources, templates
from traceserve.deploying.described import Described
from traceserve.deploying.plan import DeployTarget, File, Plan, Text, Wishes, prefixed
from traceserve.deploying.targets import docker
from traceserve.deploying.targets.kubernetes import plain_name
from traceserve.errors import DeployError


def plan(archives: Sequence[Described], wishes: Wishes) -> Plan:
    """The runtime's image holds no archive: KServe fetches those."""
    if wishes.url is None:
        raise DeployError(
            "KServe fetches archives itself: say from where with --url, as s3://bucket/archives, https://example.org/archives "
            "or pvc://CLAIM/archives"
        )
    url = wishes.url.rstrip("/")
    image = wishes.image or f"traceserve:{__version__}"
    own: List[File] = [
        Text(f"{plain_name(each.name)}.yaml", _service(each, f"{url}/{each.file.name}", wishes.engine))
        for each in archives
    ]
    return Plan(
        (
            Text("runtime.yaml", templates.fill("kserve/runtime.yaml", image=templates.flow(image))),
            *own,
            *prefixed("image", docker.image_files(archives[:1], wishes, with_archives=False)),
        ),
        (
            f"docker build --tag {image} image && docker push {image}",
            *(f"# put {each.file} at {url}/{each.file.name}" for each in archives),
            "kubectl apply --filename runtime.yaml",
            *(f"kubectl apply --filename {each.path}" for each in own),
        ),
        ("who may ask is decided by KServe's gateway: the container demands no key.",),
    )


def _service(archive: Described, url: str, engine: str) -> str:
    needed = resources.needed([archive], engine)
    return templates.fill(
        "kserve/service.yaml",
        name=plain_name(archive.name),
        url=templates.flow(url),
        digest=templates.flow(archive.sha256),
        reasons="\n".join(f"      # {reason}" for reason in needed.reasons),
        requests=templates.block(needed.requests(), 10),
        limits=templates.block(needed.limits(), 10),
    )


TARGET = DeployTarget(
    "a ServingRuntime and its image, an InferenceService for each archive; KServe's V1 and V2 protocols",
    ("uvicorn",),
    plan,
)
