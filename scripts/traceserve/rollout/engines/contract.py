"""What an update needs of the engine that serves; `ROLLOUT_ENGINES` has a module for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Protocol

from traceserve_runtime.json_types import JsonObject

from traceserve.serving.instances import Instance
from traceserve.serving.plan import Archive


@dataclass(frozen=True)
class ServedVersion:
    """A version of an archive that runs, or may run."""

    version: str
    folder: str  # below the server's store
    workers: int  # its processes, as many as are wanted


class RolloutEngine(Protocol):
    """All of them raise ServerError."""

    def check_running_server(self, instance: Instance) -> None:
        """Refuse a server that takes no new versions."""

    def check_update(self, instance: Instance, archive: Archive, running: ServedVersion, timeout: float) -> None:
        """Refuse an archive or a time with which the engine could not carry the update through."""

    def begin_update(self, instance: Instance, name: str) -> None:
        """Note what the engine has to know of the time before the update."""

    def versions_of(self, instance: Instance, name: str) -> Dict[str, ServedVersion]:
        """Return the versions of an archive that run, or may run."""

    def running_version(self, instance: Instance, name: str) -> ServedVersion:
        """Return the version that answers where a request names none."""

    def start_beside(self, instance: Instance, archive: Archive, folder: str, timeout: float) -> int:
        """Start a version beside the running one, from a folder of the server's store, and wait until it answers at
        /predictions/NAME/VERSION; returns the number of its processes."""

    def path_of_running(self, name: str, version: str) -> str:
        """Return the path behind /predictions/ at which the running version answers until the switch."""

    def switch_to(self, instance: Instance, name: str, version: str, timeout: float) -> None:
        """Let this version answer all requests that name none."""

    def drain_version(self, instance: Instance, name: str, version: str, canary: JsonObject, timeout: float) -> int:
        """Wait until a version has answered all its requests; returns how many named it in their path meanwhile."""

    def remove_version(self, instance: Instance, name: str, version: str) -> None:
        """End a version's processes."""
