"""The save mode torchscript for chips whose graphs are compiled, each for one shape: all graphs in one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Sequence, Tuple, Type

from traceserve_runtime.manifest import Shapes
from traceserve_runtime.runtimes.torchscript.neuron import CHIPS
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.parameters import Parameter

from traceserve.archives import staging
from traceserve.building.writers.contract import Option, Target, Written
from traceserve.building.writers.neuron import compilers
from traceserve.building.writers.neuron.compilers import COMPILERS
from traceserve.errors import ExportError
from traceserve.measuring.padding import few_lengths

if TYPE_CHECKING:
    from traceserve_runtime.tasks.contract import Task

    from traceserve.building.checkpoints.loading import Original
    from traceserve.building.config.setup_config import SetupConfig
    from traceserve.building.writers.tracing.fixed_shapes import Graph

HARDWARE = tuple(COMPILERS)
BATCHES = (1, 4)

OPTIONS = (
    Option(
        Parameter(
            "batch_sizes", list, "the numbers of rows that graphs are compiled for", default=[*BATCHES], numbers=True
        ),
        HARDWARE,
    ),
    Option(
        Parameter("target_length", int, "the most tokens that a decoder writes", least=32, most=4096, default=128),
        HARDWARE,
    ),
    Option(
        Parameter(
            "least_share",
            float,
            "the build fails where less than this share of a graph's operators is placed on the chip",
            least=0,
            most=1,
            default=0.9,
        ),
        tuple(name for name, compiler in COMPILERS.items() if compiler.partial),
    ),
    Option(Parameter("compiler_args", list, "what the compiler is told beside", nullable=True), HARDWARE),
    Option(
        Parameter(
            "compiler_timeout", int, "seconds after which the compilation of one graph is given up", nullable=True
        ),
        tuple(name for name, compiler in COMPILERS.items() if compiler.partial),
    ),
    Option(
        Parameter(
            "compiler_workdir", str, "a folder for what the compiler makes and says; by default it is thrown away"
        ),
        HARDWARE,
    ),
)


def shapes(config: SetupConfig, max_length: int) -> Iterator[Shapes]:
    """The configured lengths and batches; where the lengths are left open a few, and fewer where these are too many."""
    batches = tuple(sorted(set(config.options.get("batch_sizes", BATCHES))))
    lengths = config.sequence_lengths
    if lengths == "auto":
        few = few_lengths(max_length)[::-1][::2][::-1]  # each twice twice as long
        for start in range(len(few)):
            yield Shapes(few[start:], batches, graph_per_shape=True)
    else:
        yield Shapes((max_length,) if lengths == "fixed" else tuple(lengths), batches, graph_per_shape=True)


def write(original: Original, task: Type[Task], shapes: Shapes, folder: Path, target: Target) -> Written:
    """Compile a graph for each shape, and write them into one file; as a rehearsal, trace the same graphs for the CPU.

    Raises ExportError for more graphs than a core has memory for, CompileError for one that cannot be compiled.
    """
    from traceserve.building.writers.torchscript.writer import MODEL_FILE, save, trace

    graphs, lengths = _graphs(original, task, shapes, target)
    _check_memory(original, shapes, len(graphs), target)
    made: Dict[str, Any] = {}
    shares: Dict[str, float] = {}
    with staging.scratch() as scratch:
        workdir = Path(target.options["compiler_workdir"] or scratch).expanduser()
        for name, graph in graphs.items():
            if target.rehearsal:
                made[name] = trace(graph.module, graph.example)
                continue
            settings = compilers.settings(target.options, workdir / name)
            least = target.options.get("least_share", 0.0)
            made[name], share = compilers.compile_graph(
                target.hardware, name, graph.module, graph.example, settings, least
            )
            shares[name] = round(share, 4)
    save(made, folder / MODEL_FILE)
    runtime: Dict[str, Any] = {"targets": list(lengths)} if lengths else {}
    step_inputs = _step_inputs() if lengths else ()
    facts = {"most_new_tokens": _most_new_tokens(original, lengths)} if lengths else {}
    if target.rehearsal:
        return Written(step_inputs, (), runtime, facts=facts)
    arguments = list(compilers.settings(target.options, folder).arguments)
    runtime["compiler"] = {"arguments": arguments, "shares": shares}
    return Written(step_inputs, (), runtime, compilers.versions(target.hardware), facts)


def check(target: Target) -> None:
    """Raise ExportError where this machine cannot compile for the hardware."""
    compilers.check(target.hardware, compilers.settings(target.options, Path()).arguments)


def _graphs(
    original: Original, task: Type[Task], shapes: Shapes, target: Target
) -> Tuple[Dict[str, Graph], Tuple[int, ...]]:
    """The graphs by name, and of a decoder its target lengths."""
    from traceserve.building.writers.tracing import fixed_shapes
    from traceserve.building.writers.tracing.wrapping import example, once

    if task.loop:
        lengths = fixed_shapes.targets(_most_new_tokens(original, (target.options["target_length"],)))
        return fixed_shapes.graphs(original, shapes, lengths), lengths
    module = once(original, [output.name for output in task.outputs])
    return {
        shapes.graph_name(batch, length): fixed_shapes.Graph(module, example(original, batch, length))
        for batch in shapes.batches or ()
        for length in shapes.lengths or ()
    }, ()


def _step_inputs() -> Tuple[str, ...]:
    from traceserve.building.writers.tracing.fixed_shapes import STEP_INPUTS

    return STEP_INPUTS


def _most_new_tokens(original: Original, lengths: Tuple[int, ...]) -> int:
    most: int = original.facts["most_new_tokens"]
    return min(most, lengths[-1])


def _check_memory(original: Original, shapes: Shapes, count: int, target: Target) -> None:
    """Every graph has its own copy of the weights on the chip."""
    weights = sum(parameter.numel() for parameter in original.model.parameters())
    most = int(COMPILERS[target.hardware].weights // max(1, weights))
    if count > most:
        chip = CHIPS[target.hardware].machines
        hint = "set fewer sequence_lengths or batch_sizes" if most else "take a smaller model"
        raise ExportError(
            f"{count} graphs (batch {_listed(shapes.batches)}, length {_listed(shapes.lengths)}) of a model of {weights:,} "
            f"weights do not fit into a core of {chip}, which has memory for {most}; {hint}"
        )


def _listed(numbers: Any) -> str:
    texts: List[str] = [str(number) for number in numbers or ()]
    return ", ".join(texts)


def refused(hardware: str, tasks: Sequence[str]) -> Optional[str]:
    """Why tasks that are run alike cannot run on compiled hardware; None where they can."""
    compiler, loop = COMPILERS.get(hardware), TASKS[tasks[0]].loop
    if compiler is None or not loop or loop in compiler.loops:
        return None
    return f"has fixed shapes on {hardware}, where {', '.join(tasks)} cannot keep a past that grows"
