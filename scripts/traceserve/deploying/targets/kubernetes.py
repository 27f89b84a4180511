"""`kubernetes`: a Helm chart, and the image that its pods run."""

from __future__ import annotations

import json
import re
import secrets
import urllib.parse
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from traceserve import __version__
from traceserve.deploying import engines, resources, templates
from traceserve.deploying.described import Described
from traceserve.deploying.plan import DeployTarget, File, Plan, Text, Wishes, prefixed
from traceserve.deploying.targets import docker

_STATIC = "kubernetes/templates"
_LONGEST_NAME = 47  # of a RayService
_MONITORING = ("monitoring/alerts.yaml", "monitoring/dashboard.json")


def plain_name(name: str) -> str:
    """An archive's name as Kubernetes allows names: a letter first, and as short as KubeRay needs it."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (plain if plain[0].isalpha() else f"m-{plain}")[:_LONGEST_NAME].strip("-")


def chart_files(archives: Sequence[Described], wishes: Wishes) -> Tuple[File, ...]:
    """The chart, with values of these archives."""
    engines.check_hardware(wishes.engine, archives)
    name = plain_name(archives[0].name)
    repository, tag = docker.split_image(docker.image_name(archives, wishes))
    needed = resources.needed(archives, wishes.engine)
    values = templates.fill(
        "kubernetes/values.yaml",
        traceserve=__version__,
        repository=templates.flow(repository),
        tag=templates.flow(tag),
        engine=wishes.engine,
        source="fetch" if wishes.url else "image",
        ports=templates.flow(_fetch_ports(wishes)),
        files=templates.block([_file(each, wishes) for each in archives], 4),
        secret=f"{name}-keys",
        reasons=templates.comment(needed.reasons),
        requests=templates.block(needed.requests(), 4),
        limits=templates.block(needed.limits(), 4),
        tmp=f"{needed.disk}Mi",
        autoscaling=templates.flow(not needed.devices),
        tolerations=templates.flow(needed.tolerations()),
        largest_body=str(resources.largest_body(archives)),
    )
    chart = templates.fill(
        "kubernetes/Chart.yaml",
        chart=name,
        description=templates.flow(f"Serves {', '.join(each.name for each in archives)}"),
        version=templates.flow(archives[0].version),
    )
    static = sorted(path.name for path in Path(templates.FOLDER, _STATIC).iterdir())
    return (
        Text("Chart.yaml", chart),
        Text("values.yaml", values),
        Text("values.schema.json", templates.read_template("kubernetes/values.schema.json")),
        *(Text(f"templates/{each}", templates.read_template(f"{_STATIC}/{each}")) for each in static),
    )


def _fetch_ports(wishes: Wishes) -> List[int]:
    """Those of http and https, and the one that the address names."""
    port = urllib.parse.urlsplit(wishes.url or "").port
    return sorted({80, 443, port or 443})


def _file(archive: Described, wishes: Wishes) -> Dict[str, object]:
    url = f"{wishes.url.rstrip('/')}/{archive.file.name}" if wishes.url else ""
    return {
        "name": archive.name,
        "version": archive.version,
        "sha256": archive.sha256,
        "url": url,
        "canary": json.loads(json.dumps(archive.canary)),  # YAML has no tuples
    }


def plan(archives: Sequence[Described], wishes: Wishes) -> Plan:
    """The chart beside the image's folder."""
    image = docker.image_name(archives, wishes)
    name = plain_name(archives[0].name)
    commands: List[str] = [docker.build_and_push(image)]
    if wishes.url:
        commands += [f"# put {each.file} at {wishes.url.rstrip('/')}/{each.file.name}" for each in archives]
    commands += [
        f"kubectl create secret generic {name}-keys --from-literal=key={secrets.token_urlsafe(24)}",
        f"helm upgrade --install {name} chart",
    ]
    return Plan(
        (
            *prefixed("chart", chart_files(archives, wishes)),
            *(Text(each, templates.read_template(each)) for each in _MONITORING),
            *prefixed("image", docker.image_files(archives, wishes, with_archives=not wishes.url)),
        ),
        tuple(commands),
        ("the key in the command below is new and stands in no file; clients send it as Authorization: Bearer KEY.",),
    )


TARGET = DeployTarget(
    ("torchserve", "ray"),
    plan,
)
