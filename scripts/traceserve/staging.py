"""Whole or not at all: what is made appears under its name only when it is finished."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Iterator, Type

from traceserve_runtime.errors import TraceserveError


def check_free(target: Path, force: bool, error: Type[TraceserveError]) -> None:
    """Raise `error` if `target` is there and may not be replaced."""
    if target.exists() and not force:
        raise error(f"{target} exists already; --force replaces it, --output or --store writes elsewhere")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A private folder beside `target`; what is made in it under the target's name takes its place at the end.

    If the block raises, or is interrupted, the folder goes and an earlier target stays as it was. What a killed
    process left behind is removed by the next one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}.", dir=target.parent))
    try:
        yield folder
        _replace(folder / target.name, target, folder / "replaced")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_beside(target: Path, suffix: str, text: str) -> Path:
    """Write `text` into the file beside `target` that has its name and this suffix, at once; gives the file."""
    path = target.with_name(target.name[: -len(".mar")] + suffix if target.suffix == ".mar" else target.name + suffix)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
    return path


def _replace(made: Path, target: Path, replaced: Path) -> None:
    if not target.is_dir():
        os.replace(made, target)
        return
    os.rename(target, replaced)  # a folder cannot be renamed over another
    try:
        os.rename(made, target)
    except BaseException:
        os.rename(replaced, target)
        raise


def _sweep(target: Path) -> None:
    """Remove the private folders of processes that are gone; put back a target that one of them had moved aside."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"(\d+)\.[a-z0-9_]{8}")  # as mkdtemp ends names
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match.group(1))):
            if (path / "replaced").is_dir() and not target.exists():
                os.rename(path / "replaced", target)
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
