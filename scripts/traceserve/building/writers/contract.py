"""What a writer is, and what it tells of what it wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Collection, Dict, Iterable, NamedTuple, Optional, Sequence, Tuple, Type

from traceserve.building.checkpoints.original import Original
from traceserve.building.config.save_modes import Target
from traceserve.building.config.setup_config import SetupConfig

if TYPE_CHECKING:
    from pathlib import Path

    from traceserve_runtime.manifest import Manifest, Shapes
    from traceserve_runtime.tasks.contract import Task


class Written(NamedTuple):
    """What a writer made: the inputs of the graph that a loop runs, in order, none for a model that is run once; the files
    beside the model's own; what its reader must know (`Manifest.runtime`); the versions of what it wrote with; and what of
    the task's facts is otherwise for it."""

    step_inputs: Tuple[str, ...] = ()
    files: Tuple[str, ...] = ()
    runtime: Dict[str, Any] = {}
    versions: Dict[str, str] = {}
    facts: Dict[str, Any] = {}


def _no_plainer(manifest: Manifest, folder: Path, failing: Collection[str]) -> Optional[Manifest]:
    return None


def _no_note(target: Target) -> str:
    return ""


class Writer(NamedTuple):
    """How a save mode is written; what it can do is its row in `config.save_modes`.

    `write(original, task, shapes, folder, target)` writes `model_file` and the files that it tells; the original is one of
    those that `lowered(original, dtype, texts)` gives for a dtype, to be tried in turn (`texts` show what the model reads).
    `shapes(config, max_length)`: the shapes to try, widest first.
    `plainer(manifest, folder, failing)`: the same artifact, changed in its folder, without what the gate refused and a worker
    can do without; None where there is nothing of this kind in the files that are `failing`.
    `check(dtype, target)` raises ExportError for what this machine lacks to write it, or to compare it with the original;
    `note(target)` names what it lacks to write it as fast as elsewhere, or is empty.
    """

    write: Callable[[Original, Type[Task], Shapes, Path, Target], Written]
    model_file: str
    lowered: Callable[[Original, str, Sequence[str]], Iterable[Original]]
    shapes: Callable[[SetupConfig, int], Iterable[Shapes]]
    check: Callable[[str, Target], None]
    plainer: Callable[[Manifest, Path, Collection[str]], Optional[Manifest]] = _no_plainer
    note: Callable[[Target], str] = _no_note
