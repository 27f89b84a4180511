"""`docker`: an image that holds the archives, a worker's packages and this traceserve; no build tools, not root."""

from __future__ import annotations

import json
import sys
from typing import Dict, List, Sequence, Tuple

from traceserve.deploying import engines, packages, resources, templates
from traceserve.deploying.described import Described
from traceserve.deploying.plan import Copy, DeployTarget, File, Plan, Text, Wishes

_KEYS = {True: "It finds the key itself.", False: "No key is demanded."}
_NOTES = {
    True: "TorchServe makes new keys at every start and takes none from outside: `docker logs` shows them. For keys of your "
    "own, or several containers behind one address, deploy kubernetes, or a proxy that checks them.",
    False: "Ray Serve demands no keys: publish its port to a trusted network alone, or put a proxy before it that checks "
    "them.",
}


def image_name(archives: Sequence[Described], wishes: Wishes) -> str:
    """The image's name and tag, as wished, else the first archive's name and version."""
    return wishes.image or f"{archives[0].name.lower()}:{archives[0].version}"


def canaries(archives: Sequence[Described]) -> Dict[str, object]:
    """What `inside.canary` asks: by path a body."""
    return {f"/predictions/{each.name}": each.canary for each in archives}


def image_files(archives: Sequence[Described], wishes: Wishes, with_archives: bool = True) -> Tuple[File, ...]:
    """The folder that `docker build` is given."""
    engine = engines.ENGINES[wishes.engine]
    inside = [f"/archives/{each.name}.mar" for each in archives]
    image = image_name(archives, wishes)
    dockerfile = templates.fill(
        "docker/Dockerfile",
        names=", ".join(each.name for each in archives),
        engine=engine.title,
        image=image,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        index=packages.INDEXES.get(archives[0].manifest.hardware, ""),
        tmp=str(resources.needed(archives, wishes.engine).disk),
        keys=_KEYS[engine.keys],
        archives="COPY archives/ /archives/"
        if with_archives
        else "# The archives are fetched before the server starts.",
        command=json.dumps(engines.command(wishes.engine, inside)),
    )
    lines: List[str] = packages.requirements(archives, packages.ENGINES[wishes.engine])
    return (
        Text("Dockerfile", dockerfile),
        Text(".dockerignore", templates.read_template("docker/dockerignore")),
        Text("requirements.txt", "".join(f"{line}\n" for line in lines)),
        Text("canaries.json", json.dumps(canaries(archives), ensure_ascii=False, indent=2) + "\n"),
        *packages.program("app"),
        *(Copy(f"archives/{each.file.name}", each.file) for each in archives if with_archives),
    )


def plan(archives: Sequence[Described], wishes: Wishes) -> Plan:
    """The folder for `docker build`."""
    image = image_name(archives, wishes)
    needed = resources.needed(archives, wishes.engine)
    gpus = "--gpus all " if "nvidia.com/gpu" in needed.devices else ""
    limits = f"--memory {needed.memory * 3 // 2 + needed.disk}m --read-only --tmpfs /tmp:size={needed.disk}m"
    return Plan(
        image_files(archives, wishes),
        (
            f"docker build --tag {image} .",
            f"docker run --rm --init {gpus}{limits} --publish 8080:{engines.PORT} {image}",
        ),
        (_NOTES[engines.ENGINES[wishes.engine].keys],),
    )


TARGET = DeployTarget(
    "a Dockerfile and its context: slim, not root, a read-only root, a health check that asks a prediction",
    ("torchserve", "ray"),
    plan,
)
