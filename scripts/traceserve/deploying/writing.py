"""Files into a folder, all or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import List, Sequence

from traceserve import __version__
from traceserve.archives import staging
from traceserve.deploying.described import Described
from traceserve.deploying.plan import Copy, File, Plan, Text
from traceserve.errors import DeployError
from traceserve.machine import space

RECORD = "traceserve-deploy.json"  # what was deployed from what; by it a folder is known as one that may be replaced


def check_free(folder: Path, force: bool) -> None:
    """Raise DeployError unless `folder` is new or empty, or, with force, one that an earlier deploy wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DeployError(f"--output {folder} is a file; name a folder that is new or empty")
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


def write_plan(target: str, archives: Sequence[Described], plan: Plan, folder: Path) -> List[Path]:
    """Write a plan into `folder`, in the place of what is there; gives the files' paths in it, in order."""
    folder = folder.resolve()
    record = {
        "target": target,
        "traceserve": __version__,
        "archives": [{"name": each.name, "version": each.version, "sha256": each.sha256} for each in archives],
    }
    files: Sequence[File] = [*plan.files, Text(RECORD, json.dumps(record, indent=2) + "\n")]
    size = sum(each.source.stat().st_size for each in files if isinstance(each, Copy)) + (1 << 20)
    there = next(parent for parent in folder.parents if parent.exists())
    space.require_space(there, size, f"the files of {folder.name}")
    with staging.staged(folder) as private:
        made = private / folder.name
        made.mkdir()
        for each in files:
            place = made / each.path
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(each, Text):
                place.write_text(each.text, encoding="utf-8")
            elif isinstance(each, Copy):
                shutil.copyfile(each.source, place)
            else:
                each.make(place)
        return sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
