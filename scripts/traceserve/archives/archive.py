"""Packs an artifact's folder and the runtime into a `.mar` with torch-model-archiver.

Equal inputs give equal bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Dict, Optional

import traceserve_runtime
from traceserve_runtime.manifest import HANDLER_FILE, MANIFEST_FILE, Manifest, sha256

from traceserve.archives import staging
from traceserve.archives.contents import ARCHIVER_MANIFEST, copy_archive
from traceserve.archives.model_config import SERVING_FILE
from traceserve.archives.names import check_name, check_version
from traceserve.errors import ArchiveError, last_line
from traceserve.machine import space

RUNTIME = "traceserve_runtime"
_RUNTIME_SIZE = 1 << 20  # upper bound for the handler, the runtime and their metadata


def pack_archive(artifact: Path, name: str, folder: Path, version: Optional[str] = None) -> Path:
    """Pack `artifact` and the runtime into `folder/NAME.mar`, optionally under another version; raises ArchiveError."""
    if not (artifact / MANIFEST_FILE).is_file():
        lacks = f"is no artifact: it has no {MANIFEST_FILE}" if artifact.is_dir() else "is no folder of an artifact"
        raise ArchiveError(f"{artifact} {lacks}; `traceserve export` makes one")
    manifest = Manifest.read(artifact)  # checks that the artifact is complete and verified
    manifest = replace(
        manifest, name=check_name(name), version=check_version(manifest.version if version is None else version)
    )
    size = space.size([artifact / file for file in manifest.files]) + _RUNTIME_SIZE
    space.require_space(folder, size, f"the archive {name}.mar")
    with staging.scratch() as temporary, space.Needed(temporary, size, f"{name}.mar, before its dates are removed,"):
        space.require_space(temporary, size, f"{name}.mar, before its dates are removed,")
        stage = temporary / "stage"
        stage.mkdir()
        files = _stage(artifact, manifest, stage)
        replace(manifest, files=files).write(stage)
        packed = _pack(stage, manifest, temporary)
        with space.Needed(folder, size, f"the archive {name}.mar"):
            return _settle(packed, folder / f"{name}.mar")


def handler_file() -> Path:
    """Return the package's own transformer_handler.py: the one beside the imported runtime.

    Not the first one on the path: a working directory may contain another, such as a clone of TorchServe's example.
    """
    file = _runtime_folder().parent / HANDLER_FILE
    if not file.is_file() or RUNTIME not in file.read_text(encoding="utf-8"):
        raise ArchiveError(f"{file} is not traceserve's handler; install traceserve again")
    return file


def _runtime_folder() -> Path:
    """Return the folder of the imported runtime, which also made this process's manifests."""
    return Path(traceserve_runtime.__file__).resolve().parent


def _stage(artifact: Path, manifest: Manifest, stage: Path) -> Dict[str, str]:
    """Lay out the archive's root, without the manifest; returns each file's SHA-256."""
    for name in manifest.files:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link((artifact / name).resolve(), stage / name)  # weights are large
        except OSError:
            shutil.copyfile(artifact / name, stage / name)
    shutil.copytree(
        _runtime_folder(), stage / RUNTIME, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "py.typed")
    )
    shutil.copyfile(handler_file(), stage / HANDLER_FILE)
    code = list(stage.rglob("*.py"))
    files = {path.relative_to(stage).as_posix(): sha256(path) for path in code}
    return dict(sorted({**manifest.files, **files}.items()))


def _pack(stage: Path, manifest: Manifest, scratch: Path) -> Path:
    """Run torch-model-archiver. It deletes `<temp dir>/<name>` and builds there, so it gets its own temp dir.

    Python imports from its working directory first, and the user's may hold anything, such as a checkpoint's files: it is
    `scratch`. The paths begin there, since the archiver reads a comma in one as the end of it.
    """
    temp, out = scratch / "temp", scratch / "out"
    temp.mkdir()
    out.mkdir()
    options = {
        "model-name": manifest.name,
        "version": manifest.version,
        "serialized-file": Path(stage.name, manifest.model_file),
        "handler": Path(stage.name, HANDLER_FILE),
        "extra-files": stage.name,
        "config-file": Path(stage.name, SERVING_FILE),
        "archive-format": "zip-store",
        "export-path": out.name,
    }
    command = [sys.executable, "-m", "model_archiver.model_packaging"]
    command += [f"--{key}={value}" for key, value in options.items()]
    variables = {**os.environ, "TMPDIR": str(temp)}
    result = subprocess.run(
        command,
        cwd=scratch,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if result.returncode:
        raise ArchiveError(f"torch-model-archiver failed: {last_line(result.stdout)}")
    return out / f"{manifest.name}.mar"


def _settle(packed: Path, target: Path) -> Path:
    """Copy an archive without dates and in sorted order, which differ between runs."""
    with zipfile.ZipFile(packed) as source:
        undated = _undated(source.read(ARCHIVER_MANIFEST))
    copy_archive(packed, target, {ARCHIVER_MANIFEST: undated})
    return target


def _undated(content: bytes) -> bytes:
    manifest = json.loads(content)
    manifest["createdOn"] = "01/01/1980 00:00:00"
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
