"""The engines that serve in a container, as `traceserve serve` starts them."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Sequence, Tuple

PORT = 8080
METRICS_PORT = 8082


class EngineOptions(NamedTuple):
    """`options` of `traceserve serve`; with `keys` it demands them of whoever comes from outside."""

    options: Tuple[str, ...]
    keys: bool
    title: str


ENGINES: Dict[str, EngineOptions] = {
    "torchserve": EngineOptions((), True, "TorchServe"),
    "ray": EngineOptions(("--engine", "ray"), False, "Ray Serve"),
}


def command(engine: str, files: Sequence[str], host: str = "0.0.0.0", *options: str) -> List[str]:
    """The arguments of `traceserve` that serve these files in the foreground."""
    own = ENGINES[engine].options
    return ["serve", *files, *own, "--host", host, "--port", str(PORT), "--foreground", *options]
