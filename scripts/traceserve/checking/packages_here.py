"""The packages that an archive's worker needs: the build's versions, those installed here, and the ranges that are meant
to work, which setup.py says and the installed metadata repeats."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Dict, Iterator, List, Optional

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from traceserve_runtime.manifest import Manifest

from traceserve.deploying import packages

_OURS = "traceserve"
_BUILT_BY = (_OURS, "python")  # in a manifest's versions, without being packages of a worker
_CHATS = "jinja2"  # only a worker with a chat template imports it


@dataclass(frozen=True)
class PackageHere:
    """One package: versions are None where unknown or missing; `tested` is a range, empty without one."""

    name: str
    built: Optional[str]
    here: Optional[str]
    tested: str
    worker: bool  # whether a worker imports it, or only the build did

    def outside(self, version: Optional[str]) -> bool:
        """Return whether this version is outside the tested range."""
        try:
            return version is not None and not SpecifierSet(self.tested).contains(Version(version), prereleases=True)
        except InvalidVersion:
            return True


def packages_of(manifest: Manifest) -> List[PackageHere]:
    """Return the worker's packages, then those that only the build used."""
    chats = bool(manifest.facts.get("chat_template"))
    worker = [name for name in packages.of_worker(manifest) if name != _CHATS or chats]
    built = {name: version for name, version in manifest.versions.items() if name not in _BUILT_BY}
    names = dict.fromkeys([*worker, *built])
    ranges = tested_ranges()
    return [
        PackageHere(name, built.get(name), installed(name), ranges.get(canonicalize_name(name), ""), name in worker)
        for name in names
    ]


def installed(name: str) -> Optional[str]:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def tested_ranges() -> Dict[str, str]:
    """Return the ranges of setup.py for this Python, by package; an extra's too."""
    found: Dict[str, SpecifierSet] = {}
    for each in _requirements():
        name = canonicalize_name(each.name)
        found[name] = found.get(name, SpecifierSet()) & each.specifier
    return {name: str(specifier) for name, specifier in found.items()}


def _requirements() -> Iterator[Requirement]:
    for extra in ("", *extras()):
        yield from required(extra)


def extras() -> List[str]:
    """Return the names of our optional sets of packages."""
    return metadata.distribution(_OURS).metadata.get_all("Provides-Extra") or []


def required(extra: str = "") -> Iterator[Requirement]:
    """Yield what this Python needs for us, or besides for an extra."""
    for text in metadata.distribution(_OURS).requires or ():
        each = Requirement(text)
        usual = each.marker is None or each.marker.evaluate({"extra": ""})
        if usual != bool(extra) and (each.marker is None or each.marker.evaluate({"extra": extra})):
            yield each
