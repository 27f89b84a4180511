"""The golden set of an archive, with what is needed to judge answers: its manifest and its task."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

from traceserve_runtime.engine import load_task
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.tasks.contract import Task

from traceserve.archives import staging
from traceserve.archives.contents import read_manifest, unpack
from traceserve.archives.reports import report_file
from traceserve.building.gate.golden import GOLDEN_FILE, GoldenSet, read_golden
from traceserve.errors import ArchiveError

_NOT_READ = (".pt", ".pt2", ".safetensors", ".onnx", ".data", ".bin", ".so", ".neff", ".py")  # weights and code


class Proof(NamedTuple):
    """`p50` is the build's, in milliseconds in its process, if its report lies beside the archive."""

    manifest: Manifest
    task: Task
    golden: GoldenSet
    p50: Optional[float]


def manifest_of(path: Path) -> Manifest:
    """Return the manifest of an archive, or of an unpacked one."""
    return Manifest.read(path, verify=False) if path.is_dir() else read_manifest(path)


@contextlib.contextmanager
def proof_of(path: Path) -> Iterator[Proof]:
    """Read the golden set of an archive, or of an unpacked one; raises ArchiveError if it has none."""
    manifest = manifest_of(path)
    if path.is_dir():
        yield _read(path, path, manifest, None)
        return
    with staging.scratch() as scratch:
        folder = scratch / "archive"
        unpack(path, folder, [name for name in manifest.files if not name.endswith(_NOT_READ)])
        yield _read(path, folder, manifest, _p50(path))


def _read(path: Path, folder: Path, manifest: Manifest, p50: Optional[float]) -> Proof:
    if GOLDEN_FILE not in manifest.files:
        raise ArchiveError(
            f"{path} carries no golden set, so there is nothing to verify a server by: an older traceserve built it (build and "
            "pack it again), or none of its answers was kept (in a lower precision, texts with beams or with near ties at their "
            "beginning; build it with --samples FILE --keep-samples, or in float32)"
        )
    manifest.verify_files(folder, [GOLDEN_FILE])
    golden = read_golden(folder)
    assert golden is not None  # its file was just read
    return Proof(manifest, load_task(folder, manifest), golden, p50)


def _p50(archive: Path) -> Optional[float]:
    """Return the build's p50 from the report beside the archive."""
    try:
        report = json.loads(report_file(archive).read_text(encoding="utf-8"))
        value = report["golden_p50_ms"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, (int, float)) else None
