"""Versions side by side on TorchServe: by its management API, which the server's user alone reaches."""

from __future__ import annotations

import time
from typing import Dict

from traceserve_runtime.json_types import JsonObject

from traceserve.errors import ServerError
from traceserve.rollout import draining
from traceserve.rollout.engines.contract import ServedVersion
from traceserve.serving import management, server
from traceserve.serving.instances import Instance
from traceserve.serving.log import load_failure
from traceserve.serving.plan import Archive

_POLL = 0.05  # seconds


def check_running_server(instance: Instance) -> None:
    """Raise ServerError for a server that takes no new versions."""
    if instance.management_socket is None:
        raise ServerError(
            f"the server on port {instance.port} takes no new versions: an older traceserve started it, or this system cannot "
            "keep TorchServe's API for it to you alone (only Linux can); stop it and serve the new archive"
        )


def check_update(instance: Instance, archive: Archive, running: ServedVersion, timeout: float) -> None:
    """Raise ServerError for what TorchServe cannot serve, and if the running version cannot be drained in time: after the
    switch it would be too late."""
    server.check_for_torchserve(archive)
    described = management.default(instance, archive.name)
    if described.continuous and described.response_timeout > timeout:
        raise ServerError(
            f"{archive.name} {running.version} has continuous_batching, so it is known to have answered all only after its "
            f"response_timeout of {described.response_timeout} s; --timeout should be at least that, not {timeout:.0f}"
        )


def begin_update(instance: Instance, name: str) -> None:
    """Note nothing: TorchServe counts while a version is drained."""


def versions_of(instance: Instance, name: str) -> Dict[str, ServedVersion]:
    """Return the versions of a model; raises ServerError."""
    return {version: _served(found) for version, found in management.registered(instance, name).items()}


def running_version(instance: Instance, name: str) -> ServedVersion:
    """Return the version that answers where a request names none; raises ServerError."""
    return _served(management.default(instance, name))


def _served(found: management.Registered) -> ServedVersion:
    return ServedVersion(found.version, found.folder, found.workers)


def start_beside(instance: Instance, archive: Archive, folder: str, timeout: float) -> int:
    """Start a version's workers beside the running ones, and wait for them; returns how many there are."""
    started, log, version = time.monotonic(), instance.log, archive.manifest.version
    start_of_log = log.stat().st_size if log.is_file() else 0
    management.register_version(instance, archive.name, folder, archive.workers)
    while management.registered(instance, archive.name)[version].ready < archive.workers:
        failed = load_failure(log, start_of_log, archive.name)  # another archive's worker may fail meanwhile
        if failed:
            raise ServerError(f"the worker of {archive.name} {version} cannot load the archive: {failed.reason}")
        if time.monotonic() - started > timeout:
            raise ServerError(f"the workers of {archive.name} {version} were not ready within {timeout:.0f} s")
        time.sleep(_POLL)
    return archive.workers


def path_of_running(name: str, version: str) -> str:
    """Return the path behind /predictions/ at which the running version answers until the switch."""
    return f"{name}/{version}"


def switch_to(instance: Instance, name: str, version: str, timeout: float) -> None:
    """Let this version answer all requests that name none."""
    management.set_default(instance, name, version)


def drain_version(instance: Instance, name: str, version: str, canary: JsonObject, timeout: float) -> int:
    """Wait until a version has answered all its requests; returns how many named it in their path meanwhile."""
    return draining.drain(instance, name, version, canary, timeout)


def remove_version(instance: Instance, name: str, version: str) -> None:
    """End a version's workers, whatever they do; raises ServerError."""
    management.unregister(instance, name, version)
