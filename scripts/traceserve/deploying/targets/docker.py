"""`docker`: an image that holds the archives, a worker's packages and this traceserve; no build tools, not root."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Dict, Sequence, Tuple

from traceserve_hosts import KEY_VARIABLE, libraries

from traceserve.deploying import engines, packages, resources, templates
from traceserve.deploying.described import Described
from traceserve.deploying.plan import Copy, DeployTarget, File, Plan, Text, Wishes

_SEPARATOR = re.compile(r"\.|_|__|-+")  # of Docker's grammar for references


def image_name(archives: Sequence[Described], wishes: Wishes) -> str:
    """The image's name and tag, as wished, else the first archive's name and version."""
    return wishes.image or f"{_path(archives[0].name)}:{archives[0].version}"


def _path(name: str) -> str:
    """An archive's name as Docker allows it: separators alone, and only between letters and digits."""
    lower = re.sub(r"[._-]+", lambda found: found[0] if _SEPARATOR.fullmatch(found[0]) else "-", name.lower())
    return lower.strip("._-")


def split_image(image: str) -> Tuple[str, str]:
    """The repository and the tag; a digest stays behind the tag."""
    name, at, digest = image.partition("@")
    repository, _, tag = name.rpartition(":")
    return repository, f"{tag}{at}{digest}"


def build_and_push(image: str, folder: str = "image") -> str:
    """The command that makes an image where the cluster finds it; one with a digest was made before."""
    if "@" in image:
        return f"# {image} was built from {folder}/ and pushed before"
    return f"docker build --tag {image} {folder} && docker push {image}"


def canaries(archives: Sequence[Described]) -> Dict[str, object]:
    """What `inside.canary` asks: by path a body."""
    return {f"/predictions/{each.name}": each.canary for each in archives}


def common_files(archives: Sequence[Described], installed: Sequence[str], about: str, end: str) -> Tuple[File, ...]:
    """What every image is made of; `installed` are packages beside the archives' own, `end` the last lines of its
    Dockerfile."""
    dockerfile = templates.fill(
        "docker/Dockerfile",
        about=about,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        index=packages.INDEXES.get(archives[0].manifest.hardware, ""),
        environment="".join(f" \\\n    {key}={value}" for key, value in libraries.DEFAULTS.items()),
        end=end.rstrip("\n"),
    )
    lines = packages.requirements(archives, installed)
    return (
        Text("Dockerfile", dockerfile),
        Text(".dockerignore", templates.read_template("docker/dockerignore")),
        Text("requirements.txt", "".join(f"{line}\n" for line in lines)),
        *packages.program("app"),
    )


def image_files(
    archives: Sequence[Described], wishes: Wishes, with_archives: bool = True, installed: Sequence[str] = ()
) -> Tuple[File, ...]:
    """The folder that `docker build` is given; `installed` are its packages, where these are not the engine's."""
    engine = engines.CONTAINER_ENGINES[wishes.engine]
    shared = engine.single and not with_archives  # by containers that each get one archive
    command = engines.command(wishes.engine, archives[:1] if shared else archives, "/archives")
    names = ", ".join(each.name for each in archives)
    end = templates.fill(
        "docker/end",
        archives="COPY archives/ /archives/" if with_archives else "# The archives come before the server starts.",
        program=json.dumps(
            engines.pinned(wishes.engine, archives, "/archives") if with_archives else list(engine.program)
        ),
        command=json.dumps(command),
    )
    return (
        *common_files(
            archives,
            installed or engine.packages,
            f"Serves {names} with {engine.title}; made by `traceserve deploy`.",
            end,
        ),
        Text("canaries.json", json.dumps(canaries(archives), ensure_ascii=False, indent=2) + "\n"),
        *(Copy(f"archives/{each.name}.mar", each.file) for each in archives if with_archives),
    )


def plan(archives: Sequence[Described], wishes: Wishes) -> Plan:
    """The folder for `docker build`."""
    engines.check_hardware(wishes.engine, archives)
    image = image_name(archives, wishes)
    needed = resources.needed(archives, wishes.engine)
    devices = _devices(archives[0].manifest.hardware, needed)
    engine = engines.CONTAINER_ENGINES[wishes.engine]
    key = f"--env {KEY_VARIABLE} " if engine.takes_key else ""
    limits = f"--memory {needed.memory * 3 // 2 + needed.disk}m --read-only --tmpfs /tmp:exec,size={needed.disk}m"
    return Plan(
        image_files(archives, wishes),
        (
            f"docker build --tag {image} .",
            f"docker run --rm --init {devices}{limits} {key}--publish 8080:{engines.PORT} {image}",
        ),
        (engine.note,),
    )


def _devices(hardware: str, needed: resources.Resources) -> str:
    """The options of `docker run` that let the container reach its devices."""
    if resources.GPU in needed.devices:
        return "--gpus all "
    cores = needed.devices.get(resources.NEURON_CORE, 0)
    count = math.ceil(cores / resources.CORES_OF_A_DEVICE[hardware]) if cores else 0
    return "".join(f"--device=/dev/neuron{number} " for number in range(count))


TARGET = DeployTarget(
    ("torchserve", "ray", "uvicorn"),
    plan,
    schemes=(),
)
