"""The files of a checkpoint's weights: which these are, and whether they are whole, all that an index names, and all in the
checkpoint's own folder."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Optional

from traceserve.building.checkpoints.json_files import read_object
from traceserve.errors import SourceError, first_line, some, unread_reason

if TYPE_CHECKING:
    import torch

# A whole model's; several files have an index of this name.
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
# The names that an index may give them.
_SHARDS = {SAFETENSORS: "*.safetensors", PICKLE: "pytorch_model*.bin"}
_SHARD = re.compile(r"(model|pytorch_model)[-.]\d+-of-\d+\.\w+")


def files_of(folder: Path) -> List[Path]:
    """Return the files that a model, or else an adapter, is read from, as transformers chooses them: one or those of an index,
    and safetensors before pickles. Others beside them, such as consolidated.safetensors, are another copy. None without
    weights."""
    whole = _whole(folder)
    if whole is None:
        return [folder / name for name in ADAPTERS if (folder / name).is_file()][:1]
    if os.path.lexists(folder / whole):
        return [folder / whole]
    return [folder / name for name in _named(_index(folder, whole)) or ()]


def are_pickles(folder: Path) -> bool:
    """Return whether there are weights only as pickles."""
    whole = _whole(folder)
    return whole == PICKLE if whole is not None else any(file.suffix == ".bin" for file in files_of(folder))


def read_weights(folder: Path) -> Dict[str, torch.Tensor]:
    """Return the weights by name, from safetensors or from pickles of nothing else."""
    import torch
    from safetensors.torch import load_file

    pickles = are_pickles(folder)
    tensors: Dict[str, torch.Tensor] = {}
    for file in files_of(folder):
        tensors.update(torch.load(file, map_location="cpu", weights_only=True) if pickles else load_file(file))
    return tensors


def has_weights(folder: Path) -> bool:
    """Return whether a folder has a whole model's weights, or shards without their index, whatever is wrong with them."""
    return _whole(folder) is not None or bool(_shards(folder))


def to_download(folder: Path, pickles: bool) -> List[str]:
    """Return the patterns of the files of weights in a hub's repository, whose indices are in `folder`."""
    whole = PICKLE if pickles else SAFETENSORS
    named = _named(_index(folder, whole)) if _index(folder, whole).is_file() else None
    return [whole, ADAPTERS[pickles], *map(glob.escape, named or ())]


def _whole(folder: Path) -> Optional[str]:
    """Return the name of a whole model's file, if there is one, or an index of several."""
    names = (name for name in (SAFETENSORS, PICKLE) if os.path.lexists(folder / name) or _index(folder, name).is_file())
    return next(names, None)


def _index(folder: Path, whole: str) -> Path:
    return folder / f"{whole}.index.json"


def _named(index: Path) -> Optional[List[str]]:
    """Return the files that an index names; None if it is none."""
    found = (read_object(index) or {}).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        return None
    return sorted(set(found.values()))


def _shards(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.glob("*") if _SHARD.fullmatch(path.name))


def check_weights(folder: Path, name: str, again: str) -> None:
    """Raise SourceError for weights that are not whole; `again` says how to have them again.

    Of a file of safetensors its header is read, which has the file's size. The folder has weights, see `has_weights`.
    """
    whole = _whole(folder)
    if whole is None:
        shards = _shards(folder)
        index = _index(folder, SAFETENSORS if any(file.endswith(".safetensors") for file in shards) else PICKLE)
        raise SourceError(
            f"{name}: {folder} has shards of weights ({some(shards)}) without their index, {index.name}; {again}"
        )
    one = os.path.lexists(folder / whole)
    for file in [whole] if one else _indexed(_index(folder, whole), name, again, _SHARDS[whole]):
        _check_file(folder / file, name, again)


def _indexed(index: Path, name: str, again: str, pattern: str) -> List[str]:
    """Return the files that an index names; raises SourceError unless each is recorded in the manifest, and exists."""
    files = _named(index)
    if files is None:
        raise SourceError(f"{name}: {index.name} has no weight_map, which names the file of each weight; {again}")
    strange = [file for file in files if not _is_recorded(file, pattern)]
    if strange:
        raise SourceError(
            f"{name}: {index.name} names {some(strange)}, and the weights are read only from {pattern} beside it, "
            "whose hashes the manifest records; move them there, and correct the index"
        )
    missing = [file for file in files if not os.path.lexists(index.parent / file)]
    if missing:
        raise SourceError(f"{name}: {index.name} names {some(missing)}, which {index.parent} lacks; {again}")
    return files


def _is_recorded(file: str, pattern: str) -> bool:
    return "/" not in file and "\\" not in file and fnmatch.fnmatchcase(file, pattern)


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
