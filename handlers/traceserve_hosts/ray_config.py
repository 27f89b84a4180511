"""Which Ray Serve applications serve which archives: data, made without Ray, that a Serve configuration file holds as it is.

One archive is one application at the root: its replicas are their own ingress. Several have an application each, below
/predictions/NAME, or /predictions/NAME/VERSION where a name has several versions; a router at the root knows which archive all
other paths mean, and shares out the requests to a name among its versions.
"""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence

MODULE = "traceserve_hosts.ray_serve"
ROUTER = "traceserve-router"
# The metric of requests whose path has the version; Ray adds `ray_`.
NAMING = "traceserve_requests_naming_version_total"
# The variable of the niceness that Ray gives all that it starts: by default 15, so that anything else starves them.
NICENESS = "RAY_worker_niceness"
NEURON_CORES = "neuron_cores"  # what Ray calls them, by which it tells a process which are its own


@dataclass(frozen=True)
class Replicas:
    """How many processes answer, and what each may use."""

    least: int = 1
    most: int = 1  # more than `least`: by the number of requests that wait
    cpus: float = 1.0
    gpus: float = 0.0  # of one: 0.5 lets two share it
    ongoing: float = 32.0  # requests that a replica has at a time, beyond which there are to be more replicas
    # Percent, rounded up: replicas of a new version that start before any of the old one ends. 0 where the machines have
    # no room for one more: then old ones end first.
    surge: int = 20
    neuron_cores: int = 0  # of AWS Inferentia; each belongs to one process


@dataclass(frozen=True)
class Hosted:
    """One archive that is to be served."""

    address: str  # a path that every machine has, or a URL that fsspec opens
    name: str
    version: str = "1.0"  # an archive's whose configuration names none
    sha256: Optional[str] = None  # of the archive; what is fetched is compared
    replicas: Replicas = Replicas()
    share: float = 1.0  # of the requests to /predictions/NAME, relative to its other versions
    # The text of a PEM file: the key that must have signed it, or certificates of an authority.
    trusted: Optional[str] = None

    @property
    def key(self) -> str:
        """What it is among the archives of a configuration."""
        return versioned(self.name, self.version)


@dataclass(frozen=True)
class Options:
    """What all applications of a configuration have."""

    queue: int = 1000  # requests that may wait in one replica
    largest_body: int = 64 << 20  # bytes
    cors_origin: Optional[str] = None


def applications(archives: Sequence[Hosted], options: Options = Options()) -> List[Dict[str, object]]:
    """The `applications` of a Serve configuration; raises ValueError for two archives of one name and version."""
    versions: Dict[str, List[Hosted]] = {}
    for hosted in archives:
        versions.setdefault(hosted.name, []).append(hosted)
    keys = [hosted.key for hosted in archives]
    names = [_name(hosted, versions) for hosted in archives]
    twice = next((name for found in (keys, names) for name in found if found.count(name) > 1), None)
    if twice is not None or not archives:
        raise ValueError(
            f"{twice} is given twice; give one of them another version" if twice else "no archive is given"
        )
    if len(archives) == 1:
        return [_application(archives[0], names[0], "/", options)]
    found = [_application(hosted, name, _prefix(hosted, versions), options) for hosted, name in zip(archives, names)]
    return [*found, _router(versions, options)]


def versioned(name: str, version: str) -> str:
    """The name of the application of one of several versions."""
    return f"{name}-{version}"


def beside(archive: Mapping[str, Any], cpus: float) -> Dict[str, Any]:
    """The application of another version of a served name, in one replica at its own path, beside what runs.

    `archive` has the arguments of an application that `applications` made. The name is a new one each time: requests of an
    application that was removed, and starts again under its name, are refused by Ray's proxy until a replica runs.
    """
    name, version = archive["name"], archive["version"]
    replicas = {**archive["replicas"], "least": 1, "most": 1, "cpus": cpus}
    return {
        "name": f"{versioned(name, version)}-{secrets.token_hex(4)}",
        "route_prefix": f"/predictions/{name}/{version}",
        "import_path": f"{MODULE}:archive",
        "args": {**archive, "replicas": replicas},
    }


def replacing(running: Sequence[Mapping[str, Any]], archive: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """Those of the running applications that change where this archive takes the place of the one of its name: that one's,
    and the router."""
    name, found = archive["name"], []
    for each in running:
        if each["name"] == name:
            found.append({**each, "args": {**archive}})
        elif each["name"] == ROUTER:
            served = {archive["version"]: {"application": name, "share": 1.0}}
            found.append({**each, "args": {**each["args"], "models": {**each["args"]["models"], name: served}}})
    return found


def _name(hosted: Hosted, versions: Mapping[str, Sequence[Hosted]]) -> str:
    """The name of its Serve application: without the version where there is one, so that the next one takes its place,
    replica by replica."""
    return hosted.name if len(versions[hosted.name]) == 1 else hosted.key


def _prefix(hosted: Hosted, versions: Mapping[str, Sequence[Hosted]]) -> str:
    own = f"/predictions/{hosted.name}"
    return own if len(versions[hosted.name]) == 1 else f"{own}/{hosted.version}"


def _application(hosted: Hosted, name: str, prefix: str, options: Options) -> Dict[str, object]:
    replicas = hosted.replicas
    return {
        "name": name,
        "route_prefix": prefix,
        "import_path": f"{MODULE}:archive",
        "args": {
            "archive": hosted.address,
            "sha256": hosted.sha256,
            **({"trusted": hosted.trusted} if hosted.trusted is not None else {}),
            "name": hosted.name,
            "version": hosted.version,
            "replicas": asdict(replicas),
            "options": asdict(options),
        },
    }


def _router(versions: Mapping[str, Sequence[Hosted]], options: Options) -> Dict[str, object]:
    models = {
        name: {hosted.version: {"application": _name(hosted, versions), "share": hosted.share} for hosted in each}
        for name, each in versions.items()
    }
    return {
        "name": ROUTER,
        "route_prefix": "/",
        "import_path": f"{MODULE}:router",
        "args": {"models": models, "options": asdict(options)},
    }
