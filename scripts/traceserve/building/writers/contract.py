"""The contract of a writer, and the description of its output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Collection, Dict, Iterable, NamedTuple, Optional, Sequence, Tuple, Type

from traceserve_runtime.tasks.contract import TextOrPair

from traceserve.building.checkpoints.original import Original
from traceserve.building.config.dtypes import DTYPES
from traceserve.building.config.save_modes import Target
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import ExportError

if TYPE_CHECKING:
    from pathlib import Path

    from traceserve_runtime.manifest import Manifest, Shapes
    from traceserve_runtime.tasks.contract import Task


class Written(NamedTuple):
    """A writer's output: the inputs of a loop's graph, in order, none for a model that runs once; the files besides the
    model's own; the facts for its reader (`Manifest.runtime`); the versions of the packages it used; and overrides of
    the task's facts."""

    step_inputs: Tuple[str, ...] = ()
    files: Tuple[str, ...] = ()
    runtime: Dict[str, object] = {}
    versions: Dict[str, str] = {}
    facts: Dict[str, Any] = {}


def _no_plainer(manifest: Manifest, folder: Path, failing: Collection[str]) -> Optional[Manifest]:
    return None


def _no_note(target: Target) -> str:
    return ""


class NoGradients(ExportError):
    """The archive has no gradients of the model, and so explains by occlusion; the message says why."""


def check_differentiable(dtype: str) -> None:
    """Raise NoGradients for a dtype whose operators have no gradients."""
    if not DTYPES[dtype].differentiable:
        raise NoGradients(f"{dtype} has no gradients")


def _no_gradients(original: Original, manifest: Manifest, folder: Path) -> Tuple[str, ...]:
    raise NoGradients(f"save mode {manifest.save_mode} has none")


class Writer(NamedTuple):
    """How a save mode is written; `config.save_modes` has its capabilities.

    `write(original, task, shapes, folder, target)` writes `model_file` and the files that it reports; the original is one
    of those that `lowered(original, dtype, texts, hardware)` yields for a dtype, to be tried in turn (`texts` are at most
    `most_texts` typical inputs; of all kinds, if it `fixes_ranges` by them). `shapes(config, max_length)`: the shapes to
    try, widest first. `plainer(manifest, folder, failing)`: the same artifact, changed in its folder, without optional
    parts that the gate refused; None if the files in `failing` have no such parts. `check(dtype, target)` raises
    ExportError if this machine cannot write it, or compare it with the original; `note(target)` names what it lacks for the
    usual speed, or is empty. `gradients(original, manifest, folder)` writes beside the model what explanations need, and
    returns the files' names; raises NoGradients.
    """

    write: Callable[[Original, Type[Task], Shapes, Path, Target], Written]
    model_file: str
    lowered: Callable[[Original, str, Sequence[TextOrPair], str], Iterable[Original]]
    shapes: Callable[[SetupConfig, int], Iterable[Shapes]]
    check: Callable[[str, Target], None]
    plainer: Callable[[Manifest, Path, Collection[str]], Optional[Manifest]] = _no_plainer
    note: Callable[[Target], str] = _no_note
    gradients: Callable[[Original, Manifest, Path], Tuple[str, ...]] = _no_gradients
    most_texts: int = 64
    fixes_ranges: bool = False
