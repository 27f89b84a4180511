"""Files into a folder, all or none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from traceserve_runtime.manifest import sha256

from traceserve import __version__
from traceserve.archives import staging
from traceserve.deploying.described import Described
from traceserve.deploying.plan import Copy, File, Plan, Text
from traceserve.errors import DeployError, some
from traceserve.machine import space

RECORD = "traceserve-deploy.json"  # what was deployed from what; by it a folder is known as one that may be replaced


_SHOWN = 5  # files named in a refusal


def check_free(folder: Path, force: bool, discard: bool = False) -> None:
    """Raise DeployError unless `folder` is new or empty, or, with force, one that an earlier deploy wrote and nobody changed.

    With `discard`, changed it may be, too.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DeployError(f"--output {folder} is a file; name a folder that is new or empty")
    here = Path.cwd()
    if folder.resolve() in (here, *here.parents):
        raise DeployError(
            f"--output {folder} is the working directory, or above it, and would be replaced as a whole; name another folder, or "
            "run this elsewhere"
        )
    if not any(folder.iterdir()):
        return
    ours = (folder / RECORD).is_file()
    if not ours:
        raise DeployError(
            f"--output {folder} holds files that `traceserve deploy` did not write (it has no {RECORD}), and would be replaced "
            "as a whole; name a folder that is new or empty"
        )
    if not force:
        raise DeployError(f"--output {folder} holds an earlier deployment; --force replaces it")
    if not discard:
        _check_unchanged(folder)


def _check_unchanged(folder: Path) -> None:
    """Raise DeployError if something would be lost that cannot be written again."""
    written = _recorded(folder)
    if written is None:
        raise DeployError(
            f"--output {folder} was written by an earlier version, which did not record its files, so changes to them cannot be "
            "seen; --force --discard-changes replaces them"
        )
    changed = [
        name for name in _names_below(folder) if name != RECORD and not _is_written(folder / name, written.get(name))
    ]
    if changed:
        raise DeployError(
            f"--output {folder} holds files that were changed since, or that `traceserve deploy` did not write: "
            f"{some(changed, _SHOWN)}; move them, or discard them by --force --discard-changes"
        )


def _recorded(folder: Path) -> Optional[Dict[str, str]]:
    """The SHA-256 of each file that the earlier deploy wrote; None if it kept none."""
    try:
        files = json.loads((folder / RECORD).read_text(encoding="utf-8")).get("files")
    except (ValueError, AttributeError):
        return None
    return files if isinstance(files, dict) else None


def _names_below(folder: Path) -> List[str]:
    """The paths of all files below a folder; a link is one, whatever it leads to."""
    found: List[str] = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        found += [Path(parent, name).relative_to(folder).as_posix() for name in [*files, *links]]
    return sorted(found)


def _is_written(path: Path, digest: Optional[str]) -> bool:
    return digest is not None and path.is_file() and not path.is_symlink() and sha256(path) == digest


def write_plan(target: str, archives: Sequence[Described], plan: Plan, folder: Path) -> List[Path]:
    """Write a plan into `folder`, in the place of what is there; gives the files' paths in it, in order."""
    folder = folder.resolve()
    record = {
        "target": target,
        "traceserve": __version__,
        "archives": [{"name": each.name, "version": each.version, "sha256": each.sha256} for each in archives],
    }
    size = sum(each.source.stat().st_size for each in plan.files if isinstance(each, Copy)) + (1 << 20)
    there = next(parent for parent in folder.parents if parent.exists())
    space.require_space(there, size, f"the files of {folder.name}")
    with staging.staged(folder) as private:
        made = private / folder.name
        made.mkdir()
        for each in plan.files:
            _write_file(each, made / each.path)
        written = {name: sha256(made / name) for name in _names_below(made)}
        _write_file(Text(RECORD, json.dumps({**record, "files": written}, indent=2) + "\n"), made / RECORD)
        _let_all_read(made)
        return sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())


def _write_file(file: File, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(file, Text):
        place.write_text(file.text, encoding="utf-8")
    elif isinstance(file, Copy):
        shutil.copyfile(file.source, place)
    else:
        file.make(place)


def _let_all_read(folder: Path) -> None:
    """Whatever the umask is: an image keeps the modes of its context, and its container is another user. No file is secret."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
