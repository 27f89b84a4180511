"""Applications onto a running Ray cluster: `python -m traceserve_hosts.ray_cluster ADDRESS CONFIG`.

CONFIG is a JSON file: the address on which Serve answers and its applications, as `ray_config` makes them.

    {"http": {"host": "127.0.0.1", "port": 8000}, "everywhere": false, "applications": [...]}

Applications that run already are updated, replica by replica; those that the file does not name are removed at the end,
unless it has `"others": "stay"`. Those that it lists as `"removed"` end at first, so that there is room.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, List, Mapping, Sequence

import ray
from ray import serve

from traceserve_hosts import reason_in

_POLL = 0.2  # seconds
_SECONDS_TO_END = 300.0  # more than twice what a replica may take to finish what it was asked
_REASON = re.compile(r"^(?:\w+\.)*[A-Z]\w+: (.+)$", re.MULTILINE)  # the last line of a traceback


def deploy(address: str, config: Mapping[str, Any]) -> None:
    """Run the applications of a configuration, and return when each answers; raises RuntimeError with the reason."""
    ray.init(address=address, log_to_driver=False, configure_logging=False)
    serve.start(
        proxy_location="EveryNode" if config.get("everywhere") else "HeadOnly",
        http_options={"host": config["http"]["host"], "port": config["http"]["port"], "request_timeout_s": None},
    )
    removed, applications = config.get("removed", []), config["applications"]
    if config.get("others") == "stay" and not removed:
        running = serve.status().applications
        _check_gpus([each for each in applications if each["name"] not in running])
    for name in removed:
        _delete(name)
    if applications:
        serve.run_many([serve.RunTarget(_built(each), each["name"], each["route_prefix"]) for each in applications])
    known = {each["name"] for each in applications}
    for name in serve.status().applications:
        if name not in known and config.get("others") != "stay":
            _delete(name)


def _delete(name: str) -> None:
    """End an application, and return once its replicas have finished what they were asked; raises RuntimeError."""
    deadline = time.monotonic() + _SECONDS_TO_END
    with contextlib.suppress(TimeoutError):  # Ray waits for a minute
        serve.delete(name)
    while name in serve.status().applications:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the application {name} did not end within {_SECONDS_TO_END:.0f} s")
        time.sleep(_POLL)


def _check_gpus(applications: Sequence[Mapping[str, Any]]) -> None:
    """Raise RuntimeError where a new application's replica would wait for a GPU that the running ones have."""
    needed = max((each["args"]["replicas"]["gpus"] for each in applications), default=0.0)
    free = ray.available_resources().get("GPU", 0.0)
    if needed > free + 1e-6:
        raise RuntimeError(
            f"a replica takes {needed:g} of a GPU, and {free:g} are free; a share that leaves room for one replica more, such "
            "as `traceserve serve --gpus 0.25`, lets a new version start beside the running one"
        )


def _built(application: Mapping[str, Any]) -> Any:
    module, _, function = application["import_path"].partition(":")
    return getattr(import_module(module), function)(application["args"])


def replica_failure(error: Exception) -> str:
    """Return why an application does not run: what its replica raised, without Ray's own words and the traceback."""
    said = [
        each.message
        for application in serve.status().applications.values()
        for each in application.deployments.values()
    ]
    found = _REASON.findall("\n".join([str(error), *said]))
    return found[-1] if found else reason_in(str(error), type(error).__name__)


def main(arguments: List[str]) -> int:
    """Deploy; what goes wrong is one line on stderr, the last one."""
    try:
        deploy(arguments[0], json.loads(Path(arguments[1]).read_text(encoding="utf-8")))
    except RuntimeError as error:
        sys.stderr.write(f"{replica_failure(error)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
