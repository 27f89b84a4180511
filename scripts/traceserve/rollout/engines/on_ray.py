"""Versions side by side on Ray Serve.

A new version first is an application of its own, in one replica at /predictions/NAME/VERSION. The switch is Ray's rolling
update: a replica of the new version starts, and one of the old version finishes what it was asked and ends, until none is
left. Ray cannot let two applications change their addresses without a moment at which one of them has none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Sequence, TypeVar

from traceserve_hosts import ray_config
from traceserve_runtime.json_types import JsonObject

from traceserve.errors import ServerError
from traceserve.machine.private_files import write_private
from traceserve.rollout.engines.contract import ServedVersion
from traceserve.serving import client, ray_applications, ray_cluster, server
from traceserve.serving.instances import Instance
from traceserve.serving.metrics import naming_counts
from traceserve.serving.plan import Archive

_FILE = "versions.json"  # below run/: `_KnownVersions`, by name
_POLL = 0.2  # seconds
_COUNTED = 5.0  # seconds after which Ray's metrics have what replicas have counted; it collects them every two
_NAMING = f"ray_{ray_config.NAMING}"

_SECONDS_TO_REMOVE = 360.0  # more than the host's program waits, which says what did not end
_SURGE = 20  # percent: one replica starts before one of those that it replaces ends
_Archive = Mapping[str, Any]  # an application's arguments
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class _KnownVersions:
    """The versions of a name, each by its own one."""

    versions: Mapping[str, _Archive] = field(default_factory=dict)  # that run, or may run
    # Requests whose path had the version when the update began: of those versions that ran then.
    named_before: Mapping[str, int] = field(default_factory=dict)
    # That stay for requests with the version in their path: how many there were in the update that left it, then 0.
    staying: Mapping[str, int] = field(default_factory=dict)
    applications: Mapping[str, str] = field(default_factory=dict)  # the names of those at versions' own paths


def check_running_server(instance: Instance) -> None:
    """Refuse none: Ray is changed by its token, which the server's user alone has."""


def check_update(instance: Instance, archive: Archive, running: ServedVersion, timeout: float) -> None:
    """Refuse none: the running archive is for the same hardware."""


def begin_update(instance: Instance, name: str) -> None:
    """Note how many requests have named each version until now, and end what an update that was killed has left: there is
    no room for it beside another one."""
    known, counted = _known(instance, name), naming_counts(instance, name, _NAMING)
    running = running_version(instance, name).version
    staying = {version: 0 for version in known.staying if version != running}
    left = [own for version, own in known.applications.items() if version not in staying]
    if left:
        change: Dict[str, Any] = {"applications": [], "removed": left}
        ray_applications.change_applications(instance, change, _SECONDS_TO_REMOVE, name)
    applications = {version: own for version, own in known.applications.items() if version in staying}
    before = {each: counted.get(each, 0) for each in known.versions}
    _remember(instance, name, _KnownVersions(known.versions, before, staying, applications))


def versions_of(instance: Instance, name: str) -> Dict[str, ServedVersion]:
    """Return the versions of an archive that run, or may run; raises ServerError."""
    return {version: _served(archive) for version, archive in _known(instance, name).versions.items()}


def running_version(instance: Instance, name: str) -> ServedVersion:
    """Return the version that answers where a request names none; raises ServerError.

    The server is asked: an update may have been killed while Ray went on.
    """
    address = replace(instance.address, url=f"{instance.url}/v2/models/{name}")
    status, told = client.exchange(address, timeout=30.0)
    versions = _known(instance, name).versions
    said = [version for version in told.get("versions", []) if version in versions] if isinstance(told, dict) else []
    if status != 200 or not said:
        raise ServerError(f"{name} does not say its version ({status}: {client.error_words(told)})")
    return _served(versions[said[0]])


def start_beside(instance: Instance, archive: Archive, folder: str, timeout: float) -> int:
    """Start one replica of a version at its own path, and wait until it answers there; raises ServerError."""
    name, version = archive.name, archive.manifest.version
    running = _running(instance, name)
    most = max(archive.workers, running["replicas"]["most"] if _scales(running) else 0)
    cores = ray_cluster.cores_of_each(most)
    new = {
        **running,
        "archive": str(Path(instance.folder, "store", folder)),
        "version": version,
        # One more than there are fits: this replica ends before the first of those that replace the running ones starts.
        "replicas": {**running["replicas"], "least": archive.workers, "most": most, "cpus": cores, "surge": _SURGE},
    }
    _check_room(instance, new)
    deadline = time.monotonic() + timeout
    _start_at_own_path(instance, new, cores, timeout)
    canary = server.canary(archive.manifest)
    while True:  # HAProxy hears of it a little later
        try:
            client.predict(instance.address, f"{name}/{version}", canary, 60.0)
            return 1
        except client.NotYet:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL)


def _start_at_own_path(instance: Instance, archive: _Archive, cores: float, timeout: float) -> _KnownVersions:
    """Start one replica of a version, which is remembered first, and return what is known: the next update ends what a killed
    one has left."""
    name, version = archive["name"], archive["version"]
    application, known = ray_config.beside(archive, cores), _known(instance, name)
    versions, names = {**known.versions, version: archive}, {**known.applications, version: application["name"]}
    known = replace(known, versions=versions, applications=names)
    _remember(instance, name, known)
    ray_applications.change_applications(instance, {"applications": [application]}, timeout, f"{name} {version}")
    return known


def _check_room(instance: Instance, new: _Archive) -> None:
    """Raise ServerError where a replica would find no cores: it would be waited for in vain.

    Room for one more is needed twice: beside those that run, and beside the new ones, for the version after them.
    """
    running = [each["args"] for each in ray_applications.applications_of(instance)["applications"]]
    running = [each for each in running if "replicas" in each]  # the router takes no core
    used = _cores(running)
    needed = _cores([new, *(each for each in running if each["name"] != new["name"])])
    one, room = new["replicas"]["cpus"], ray_applications.cores_of_cluster(instance)
    started = f"the server was started with room for {room}"
    if used + one > room:
        raise ServerError(
            f"a worker of {new['name']} {new['version']} takes {one:g} cores beside the {used:g} of all that runs, and "
            f"{started}: give as many --workers as run, or stop it and serve the new archive"
        )
    if needed + one > room:
        raise ServerError(
            f"{new['replicas']['most']} workers of {new['name']} need {needed:g} cores with all else that is served, and the "
            f"next version's first worker {one:g} more; {started}: give fewer --workers, or start it again with more"
        )


def _cores(archives: Iterable[_Archive]) -> float:
    return float(sum(each["replicas"]["most"] * each["replicas"]["cpus"] for each in archives))


def path_of_running(name: str, version: str) -> str:
    """Return the path behind /predictions/ at which the running version answers until the switch: without a version, by
    which clients that name one are counted."""
    return name


def switch_to(instance: Instance, name: str, version: str, timeout: float) -> None:
    """Let this version answer all requests that name none, replica by replica; raises ServerError.

    Requests that named the running version since the update began would find none: a replica of it stays for them. Where
    this version itself ran then, it is switched back to, and nobody is asked: what is to be replaced may not answer.
    """
    known = _known(instance, name)
    if version in known.named_before:
        _switch_back(instance, name, version, known, timeout)
        return
    before = running_version(instance, name).version
    named = _named(instance, name, before, known)
    if named:
        # Without cores: what there is room for is left for the new version.
        known = _start_at_own_path(instance, known.versions[before], 0, timeout)
        known = replace(known, staying={**known.staying, before: named})
        _remember(instance, name, known)
    _replace(instance, known.versions[version], [known.applications[version]], timeout)
    _remember(instance, name, replace(known, applications=_without(version, known.applications)))


def _switch_back(instance: Instance, name: str, version: str, known: _KnownVersions, timeout: float) -> None:
    """Let a version answer again as before the update; its replica at its own path, if one stayed, ends after that."""
    archive = known.versions[version]
    # A server starts GPUs' replicas without a surge, but there is room for one since the one that was verified has ended.
    _replace(instance, {**archive, "replicas": {**archive["replicas"], "surge": _SURGE}}, [], timeout)
    if version not in known.staying:
        return
    with contextlib.suppress(ServerError):  # it takes no core, and the next update looks again
        _end_at_own_path(instance, name, version, known)
        known = replace(known, applications=_without(version, known.applications))
        _remember(instance, name, replace(known, staying=_without(version, known.staying)))


def _replace(instance: Instance, archive: _Archive, removed: Sequence[str], timeout: float) -> None:
    """Put an archive in the place of the one of its name, replica by replica; raises ServerError."""
    config = ray_applications.applications_of(instance)
    changed = ray_config.replacing(config["applications"], archive)
    change = {"applications": changed, "removed": [*removed]}
    ray_applications.change_applications(instance, change, timeout, f"{archive['name']} {archive['version']}")
    by_name = {each["name"]: each for each in changed}
    config["applications"] = [by_name.get(each["name"], each) for each in config["applications"]]
    ray_applications.remember_applications(Path(instance.folder), config)


def drain_version(instance: Instance, name: str, version: str, canary: JsonObject, timeout: float) -> int:
    """Return how many requests named a version in their path since the update began, if it stayed for such: replicas answer
    all that they were asked before they end."""
    known = _known(instance, name)
    if version not in known.staying:
        return 0
    return known.staying[version] or _named(instance, name, version, known)


def remove_version(instance: Instance, name: str, version: str) -> None:
    """End a version at its own path, if it runs; raises ServerError."""
    known = _known(instance, name)
    if version in known.applications:
        _end_at_own_path(instance, name, version, known)
    parts = [_without(version, part) for part in dataclasses.astuple(known)]
    _remember(instance, name, _KnownVersions(*parts))


def _end_at_own_path(instance: Instance, name: str, version: str, known: _KnownVersions) -> None:
    change: Dict[str, Any] = {"applications": [], "removed": [known.applications[version]]}
    ray_applications.change_applications(instance, change, _SECONDS_TO_REMOVE, f"{name} {version}")


def _without(version: str, of_versions: Mapping[str, _Value]) -> Dict[str, _Value]:
    return {other: value for other, value in of_versions.items() if other != version}


def _served(archive: _Archive) -> ServedVersion:
    return ServedVersion(archive["version"], Path(archive["archive"]).name, archive["replicas"]["least"])


def _scales(archive: _Archive) -> bool:
    return bool(archive["replicas"]["most"] > archive["replicas"]["least"])


def _running(instance: Instance, name: str) -> _Archive:
    """Return the arguments of the application that answers where a request names no version."""
    found: List[_Archive] = [
        each["args"] for each in ray_applications.applications_of(instance)["applications"] if each["name"] == name
    ]
    if not found:
        raise ServerError(
            f"{name} is served in several versions on port {instance.port}, each with a share of the requests (--shares); a new "
            "one cannot take the place of one of them under load: stop the server, and serve the archives that it should have"
        )
    return found[0]


def _known(instance: Instance, name: str) -> _KnownVersions:
    running = _running(instance, name)
    known = _KnownVersions(**_remembered(instance).get(name, {}))
    return replace(known, versions={running["version"]: running, **known.versions})


def _remembered(instance: Instance) -> Dict[str, Dict[str, Any]]:
    """Return what is remembered of all names."""
    found: Dict[str, Dict[str, Any]] = {}
    with contextlib.suppress(FileNotFoundError):
        found = json.loads(Path(instance.folder, "run", _FILE).read_text(encoding="utf-8"))
    return found


def _remember(instance: Instance, name: str, known: _KnownVersions) -> None:
    others, file = _remembered(instance), Path(instance.folder, "run", _FILE)
    write_private(file, json.dumps({**others, name: dataclasses.asdict(known)}, indent=2))


def _named(instance: Instance, name: str, version: str, known: _KnownVersions) -> int:
    """Return how many requests have named a version in their path since the update began; raises ServerError if unknown."""
    if version not in known.named_before:
        return 0
    time.sleep(_COUNTED)
    return max(0, naming_counts(instance, name, _NAMING).get(version, 0) - known.named_before[version])
