"""The files that a build writes, checked before anything slow."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

from traceserve.archives import names, staging
from traceserve.building.config import setup_config
from traceserve.building.config.parsing import LoadedConfig
from traceserve.errors import ArchiveError, ExportError

ARTIFACTS = Path("artifacts")


class Targets(NamedTuple):
    """The artifact's folder, its archive's path (None: only export), and the archive's version (None: the
    configuration's)."""

    artifact: Path
    archive: Optional[Path]
    version: Optional[str]


def build_targets(
    loaded: LoadedConfig, output: Optional[Path], store: Optional[Path], version: Optional[str], force: bool
) -> Targets:
    """Return what will be written; `output` is the artifact's folder, `store` the archive's (None: only export).

    Raises ExportError, ArchiveError for a name that is illegal or, unless `force`, taken.
    """
    artifact = output or ARTIFACTS / setup_config.default_name(loaded.config)
    name = names.check_name(artifact.resolve().name)
    staging.check_replaceable(artifact, force, ExportError)
    if store is None:
        return Targets(artifact, None, None)
    packed = store / f"{name}.mar"
    checked = names.check_version(version) if version is not None else None
    staging.check_replaceable(packed, force, ArchiveError)
    return Targets(artifact, packed, checked)
