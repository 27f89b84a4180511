"""The files of a checkpoint's weights: whole, all that an index names, and all in the checkpoint's own folder."""

from __future__ import annotations

import fnmatch
import os
import re
import zipfile
from pathlib import Path
from typing import List

from traceserve.building.checkpoints.checkpoint import PICKLES, SAFETENSORS
from traceserve.building.checkpoints.json_files import read_object
from traceserve.errors import SourceError, first_line, some, unread_reason

_SHARD = re.compile(r"(model|pytorch_model)[-.]\d+-of-\d+\.\w+")


def check_weights(folder: Path, name: str, again: str) -> None:
    """Raise SourceError for weights that are not whole; `again` says how to have them again.

    Of a file of safetensors its header is read, which has the file's size. The files are those that transformers takes: one,
    or those of an index.
    """
    safe = any(folder.glob(SAFETENSORS[0]))
    whole = "model.safetensors" if safe else "pytorch_model.bin"
    index = folder / f"{whole}.index.json"
    if os.path.lexists(folder / whole):
        files = [whole]
    elif index.is_file():
        files = _indexed(index, name, again, SAFETENSORS if safe else PICKLES)
    else:
        shards = sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
        if shards:
            raise SourceError(
                f"{name}: {folder} has shards of weights ({some(shards)}) without their index, {index.name}; {again}"
            )
        return
    for file in files:
        _check_file(folder / file, name, again)


def _indexed(index: Path, name: str, again: str, patterns: List[str]) -> List[str]:
    """Return the files that an index names; raises SourceError unless each is recorded in the manifest, and exists."""
    found = (read_object(index) or {}).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise SourceError(f"{name}: {index.name} has no weight_map, which names the file of each weight; {again}")
    files = sorted(set(found.values()))
    strange = [file for file in files if not _is_recorded(file, patterns)]
    if strange:
        raise SourceError(
            f"{name}: {index.name} names {some(strange)}, and the weights are read only from {' or '.join(patterns)} beside it, "
            "whose hashes the manifest records; move them there, and correct the index"
        )
    missing = [file for file in files if not os.path.lexists(index.parent / file)]
    if missing:
        raise SourceError(f"{name}: {index.name} names {some(missing)}, which {index.parent} lacks; {again}")
    return files


def _is_recorded(file: str, patterns: List[str]) -> bool:
    inside = "/" not in file and "\\" not in file
    return inside and any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def _check_file(path: Path, name: str, again: str) -> None:
    """Raise SourceError for a link to nothing, and a file that is empty, cut off or of another kind."""
    if path.is_symlink() and not path.exists():
        raise SourceError(f"{name}: {path.name} is a link to {os.readlink(path)}, which does not exist; {again}")
    try:
        size = path.stat().st_size
        wrong = "is empty" if size == 0 else _wrong_within(path)
    except OSError as error:
        raise SourceError(f"{name}: {path} cannot be read: {unread_reason(error)}") from None
    if wrong:
        raise SourceError(f"{name}: {path.name} {wrong}; {again}")


def _wrong_within(path: Path) -> str:
    """Return what is wrong with a file of weights; empty if nothing is."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np"):
                return ""
        except SafetensorError as error:
            return f"is not whole, or no file of safetensors ({first_line(error)})"
    with path.open("rb") as stream:
        is_zip = stream.read(2) == b"PK"  # torch.save's since 1.6; its table is the file's end
    return "is not whole (its end is missing)" if is_zip and not zipfile.is_zipfile(path) else ""
