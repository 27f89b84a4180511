"""What a new archive has to be to take the running one's place, whatever the engine."""

from __future__ import annotations

from pathlib import Path

from traceserve_runtime.manifest import Manifest

from traceserve.errors import ServerError
from traceserve.rollout.engines.contract import ServedVersion
from traceserve.serving.instances import Instance
from traceserve.serving.plan import Archive


def check_archive(archive: Archive, instance: Instance, running: ServedVersion) -> None:
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
