"""What a writer is, and what it tells of what it wrote."""

from __future__ import annotations

from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Collection,
    Dict,
    Iterable,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Type,
)

if TYPE_CHECKING:
    from pathlib import Path

    from traceserve_runtime.manifest import Manifest, Shapes
    from traceserve_runtime.tasks.contract import Task
    from traceserve_runtime.tasks.parameters import Parameter

    from traceserve.building.checkpoints.loading import Original
    from traceserve.building.config.setup_config import SetupConfig


class Target(NamedTuple):
    """What a configuration asks of a writer: the hardware, and each of the writer's options for it, by name.

    As a rehearsal, the same graphs are written for this machine's CPU, to be compared before they are compiled.
    """

    hardware: str
    options: Mapping[str, Any]
    rehearsal: bool = False


class Option(NamedTuple):
    """A key under `options` in setup_config.json; of all hardware that the writer writes for, or of these."""

    parameter: Parameter
    hardware: Tuple[str, ...] = ()


class Written(NamedTuple):
    """What a writer made: the inputs of the graph that a loop runs, in order, none for a model that is run once; the files
    beside the model's own; what its reader must know (`Manifest.runtime`); the versions of what it wrote with; and what of
    the task's facts is otherwise for it."""

    step_inputs: Tuple[str, ...] = ()
    files: Tuple[str, ...] = ()
    runtime: Dict[str, Any] = {}
    versions: Dict[str, str] = {}
    facts: Dict[str, Any] = {}


def _nothing(config: SetupConfig) -> Optional[str]:
    return None


def _no_plainer(manifest: Manifest, folder: Path, failing: Collection[str]) -> Optional[Manifest]:
    return None


class Writer(NamedTuple):
    """How a save mode is written, and what it can do: `hardware` × `dtypes` × tasks, see `formats`.

    `write(original, task, shapes, folder, target)` writes `model_file` and the files that it tells; the original is one of
    those that `lowered(original, dtype, texts)` gives for a dtype, to be tried in turn (`texts` show what the model reads).
    `loops`: the dtypes in which it writes models that are run token by token; none, where it cannot.
    `auto(task, hardware)`: what `"dtype": "auto"` tries, in order.
    `shapes(config, max_length)`: the shapes to try, widest first.
    `measured_against`: the save mode whose float32 artifact the gate measures beside this one's; none for that one itself.
    `refuses(config)`: what else of a configuration cannot be, and what can.
    `plainer(manifest, folder, failing)`: the same artifact, changed in its folder, without what the gate refused and a worker
    can do without; None where there is nothing of this kind in the files that are `failing`.
    `fails_with`: the save modes that cannot write what this one could neither write nor run: they record the same graph, or
    run the same model.
    `check(dtype, target)` raises ExportError for what this machine lacks to write it, or to compare it with the original.
    """

    write: Callable[[Original, Type[Task], Shapes, Path, Target], Written]
    model_file: str
    hardware: Tuple[str, ...]
    dtypes: Tuple[str, ...]
    loops: Tuple[str, ...]
    auto: Callable[[Type[Task], str], Tuple[str, ...]]
    lowered: Callable[[Original, str, Sequence[str]], Iterable[Original]]
    shapes: Callable[[SetupConfig, int], Iterable[Shapes]]
    check: Callable[[str, Target], None]
    options: Tuple[Option, ...] = ()
    fails_with: Tuple[str, ...] = ()
    measured_against: Optional[str] = None
    refuses: Callable[[SetupConfig], Optional[str]] = _nothing
    plainer: Callable[[Manifest, Path, Collection[str]], Optional[Manifest]] = _no_plainer
