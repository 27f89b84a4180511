"""What a server, its running version and a new archive have to be for an update."""

from __future__ import annotations

from pathlib import Path

from traceserve_runtime.manifest import Manifest

from traceserve.errors import ServerError
from traceserve.serving import management, server
from traceserve.serving.engines import TORCHSERVE
from traceserve.serving.instances import Instance
from traceserve.serving.plan import Archive


def check_server(instance: Instance) -> None:
    """Raise ServerError for a server that takes no new versions."""
    if instance.engine != TORCHSERVE:
        raise ServerError(
            f"the server on port {instance.port} is Ray Serve, which `traceserve update` does not know; serve both versions "
            "with --shares (docs/upgrade.md)"
        )
    if instance.management_socket is None:
        raise ServerError(
            f"the server on port {instance.port} takes no new versions: an older traceserve started it, or this system cannot "
            "keep TorchServe's API for it to you alone (only Linux can); stop it and serve the new archive"
        )


def check_archive(archive: Archive, instance: Instance, running: management.Registered) -> None:
    """Raise ServerError for an archive that cannot take the running one's place."""
    manifest, before = archive.manifest, Manifest.read(Path(instance.folder, "store", running.folder), verify=False)
    if manifest.version == running.version:
        raise ServerError(
            f"{archive.name} is already served as version {running.version}, and each version exists once; build the new one "
            'under another: `traceserve build --version V`, or "version" in setup_config.json'
        )
    if manifest.task != before.task:
        raise ServerError(
            f"{archive.file} is a {manifest.task}, and {archive.name} is served as a {before.task}: its clients would get other "
            "answers; give the archive another name, and serve it"
        )
    if manifest.hardware != before.hardware:
        raise ServerError(
            f"{archive.file} is for {manifest.hardware}, and the server was started for {before.hardware}; start another one "
            "for it on another --port"
        )
    server.check_for_torchserve(archive)


def check_patience(name: str, running: management.Registered, timeout: float) -> None:
    """Raise ServerError if the running version cannot be drained in time: after the switch it would be too late."""
    if running.continuous and running.response_timeout > timeout:
        raise ServerError(
            f"{name} {running.version} has continuous_batching, so it is known to have answered all only after its "
            f"response_timeout of {running.response_timeout} s; --timeout should be at least that, not {timeout:.0f}"
        )
