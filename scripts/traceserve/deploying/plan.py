"""What a target makes of archives: files, and what to do with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Iterable, NamedTuple, Optional, Sequence, Tuple, Union

from traceserve.deploying.described import Described


@dataclass(frozen=True)
class Text:
    """A file that is written; `path` is relative, with slashes."""

    path: str
    text: str


@dataclass(frozen=True)
class Copy:
    """A file that is copied."""

    path: str
    source: Path


@dataclass(frozen=True)
class Made:
    """Files that a function writes into the folder that it is given; `path` tells a reader what it is."""

    path: str
    make: Callable[[Path], None]


File = Union[Text, Copy, Made]


def prefixed(folder: str, files: Iterable[File]) -> Tuple[File, ...]:
    """The same files, in a folder."""
    return tuple(replace(each, path=f"{folder}/{each.path}") for each in files)


@dataclass(frozen=True)
class Plan:
    """`commands` are what to run next, in the folder of the files; `notes` what its reader should know."""

    files: Tuple[File, ...]
    commands: Tuple[str, ...]
    notes: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Wishes:
    """The options of `traceserve deploy`."""

    engine: str
    image: Optional[str] = None  # the name and tag under which the image is pushed
    url: Optional[str] = None  # the folder from which archives are fetched


class DeployTarget(NamedTuple):
    """A kind of place to deploy to; `engines` are those that it has files for, the first by default. Of `schemes` are the
    addresses that archives are fetched from: None for any, empty if none is."""

    engines: Tuple[str, ...]
    plan: Callable[[Sequence[Described], Wishes], Plan]
    schemes: Optional[Tuple[str, ...]] = None
