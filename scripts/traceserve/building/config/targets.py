"""The files that a build writes, checked before anything slow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, Optional, Type

from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.manifest import MANIFEST_FILE

from traceserve.archives import names, staging
from traceserve.building.config import setup_config
from traceserve.building.config.parsing import LoadedConfig
from traceserve.errors import ArchiveError, ExportError
from traceserve.option_names import option

ARTIFACTS = Path("artifacts")


class Targets(NamedTuple):
    """The artifact's folder, its archive's path (None: only export), the archive's version (None: the configuration's),
    and whether existing ones may be replaced."""

    artifact: Path
    archive: Optional[Path]
    version: Optional[str]
    force: bool = False

    def check(self) -> None:
        """Raise ExportError, ArchiveError if a target exists and may not be replaced: without `force` none may, and
        other folders than artifacts never."""
        _check_artifact(self.artifact)
        staging.check_replaceable(self.artifact, self.force, ExportError)
        if self.archive is not None:
            _check_archive(self.archive, self.force)


def build_targets(
    loaded: LoadedConfig, output: Optional[Path], store: Optional[Path], version: Optional[str], force: bool
) -> Targets:
    """Return what will be written; `output` is the artifact's folder, `store` the archive's (None: only export).

    Raises ExportError, ArchiveError for a name or a place that is illegal or, unless `force`, taken.
    """
    artifact = _default_artifact(loaded) if output is None else output
    if artifact.name in ("", ".."):
        raise ExportError(f"{option('output')} {artifact} does not end in the artifact's name; {_elsewhere()}")
    name = names.check_name(artifact.resolve().name)
    _check_parents(artifact, f"{option('output')} {artifact}", ExportError)
    checkpoint = setup_config.checkpoint_folder(loaded.config, loaded.folder)
    for what, folder in (("checkpoint", checkpoint), ("configuration", loaded.folder)):
        if folder.is_dir() and artifact.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise ExportError(f"{artifact} holds the {what}, which would be replaced; {_elsewhere()}")
    targets = Targets(artifact, None, None, force)
    if store is not None:
        targets = targets._replace(
            archive=_archive_in(store, name), version=names.check_version(version) if version is not None else None
        )
    targets.check()
    return targets


def archive_target(artifact: Path, store: Path, force: bool) -> Path:
    """Return the path of an artifact's archive in the folder `store`.

    Raises ArchiveError for a name or a place that is illegal or, unless `force`, taken.
    """
    target = _archive_in(store, names.check_name(artifact.resolve().name))
    _check_archive(target, force)
    return target


def _elsewhere() -> str:
    return f"choose another folder, as {option('output')} artifacts/NAME"


def _archive_in(store: Path, name: str) -> Path:
    target = store / f"{name}.mar"
    _check_parents(target, f"{option('store')} {store}", ArchiveError)
    return target


def _default_artifact(loaded: LoadedConfig) -> Path:
    name = setup_config.default_name(loaded.config, loaded.folder)
    try:
        return ARTIFACTS / names.check_name(name)
    except ArchiveError as error:
        raise ArchiveError(f"{error.message}; it comes from model_name, so {_elsewhere()}") from None


def _check_artifact(folder: Path) -> None:
    """Raise ExportError if there is a file, or a folder that may be somebody's data: with files, but not exported."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise ExportError(f"{folder} is a file, but an artifact is a folder; {_elsewhere()}")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST_FILE).is_file():
        raise ExportError(
            f"{folder} is no artifact of traceserve (it has no {MANIFEST_FILE}), so it is not replaced; {_elsewhere()}"
        )


def _check_archive(path: Path, force: bool) -> None:
    """Raise ArchiveError if there is a folder or, unless `force`, an archive."""
    if path.is_dir():
        raise ArchiveError(f"{path} is a folder, not an archive; choose another {option('store')}")
    staging.check_replaceable(path, force, ArchiveError, "store")


def _check_parents(path: Path, given: str, error: Type[TraceserveError]) -> None:
    """Raise `error` if a folder above `path` is a file."""
    there = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not there.is_dir():
        raise error(f"{given}: {there} is a file, not a folder; choose another folder")
