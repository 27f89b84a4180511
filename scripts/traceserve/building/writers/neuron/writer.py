"""The save mode torchscript for chips with compiled graphs of one shape each: all graphs in one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, Optional, Sequence, Tuple, Type

from traceserve_runtime.manifest import Shapes
from traceserve_runtime.runtimes.torchscript.neuron import CHIPS

from traceserve.archives import staging
from traceserve.building.checkpoints.original import Original
from traceserve.building.config.lengths import few_lengths
from traceserve.building.config.save_modes import COMPILED_BATCHES, Target
from traceserve.building.config.setup_config import SetupConfig
from traceserve.building.writers.contract import Written
from traceserve.building.writers.neuron import compilers
from traceserve.building.writers.neuron.compilers import COMPILERS
from traceserve.building.writers.tracing import fixed_shapes
from traceserve.building.writers.tracing.graphs import MODEL_FILE, save, trace
from traceserve.building.writers.tracing.wrapping import example, once
from traceserve.errors import ExportError

if TYPE_CHECKING:
    import torch
    from traceserve_runtime.tasks.contract import Task


def shapes(config: SetupConfig, max_length: int) -> Iterator[Shapes]:
    """Yield the configured lengths and batches; by default a few lengths, and fewer if these are too many."""
    batches = tuple(sorted(set(config.options.get("batch_sizes", COMPILED_BATCHES))))
    lengths = config.sequence_lengths
    if lengths == "auto":
        few = few_lengths(max_length)[::-1][::2][::-1]  # each four times the one before
        for start in range(len(few)):
            yield Shapes(few[start:], batches, graph_per_shape=True)
    else:
        yield Shapes((max_length,) if lengths == "fixed" else tuple(lengths), batches, graph_per_shape=True)


def write(original: Original, task: Type[Task], shapes: Shapes, folder: Path, target: Target) -> Written:
    """Compile a graph per shape, and write them into one file; as a rehearsal, trace the same graphs for the CPU.

    Raises ExportError if a core has too little memory for the graphs, CompileError if one cannot be compiled.
    """
    graphs, lengths = _graphs(original, task, shapes, target)
    _check_memory(original, shapes, len(graphs), target)
    made: Dict[str, torch.nn.Module] = {}
    shares: Dict[str, float] = {}
    with staging.scratch() as scratch:
        workdir = Path(os.path.expanduser(target.options["compiler_workdir"] or scratch))
        for name, graph in graphs.items():
            if target.rehearsal:
                made[name] = trace(graph.module, graph.example)
                continue
            settings = compilers.compiler_settings(target.options, workdir / name)
            least = target.options.get("least_share", 0.0)
            made[name], share = compilers.compile_graph(
                target.hardware, name, graph.module, graph.example, settings, least
            )
            shares[name] = round(share, 4)
    save(made, folder / MODEL_FILE)
    runtime: Dict[str, object] = {"targets": list(lengths)} if lengths else {}
    step_inputs = fixed_shapes.STEP_INPUTS if lengths else ()
    facts = {"most_new_tokens": _most_new_tokens(original, lengths)} if lengths else {}
    if target.rehearsal:
        return Written(step_inputs, (), runtime, facts=facts)
    arguments = list(compilers.compiler_settings(target.options, folder).arguments)
    runtime["compiler"] = {"arguments": arguments, "shares": shares}
    return Written(step_inputs, (), runtime, compilers.versions(target.hardware), facts)


def check(target: Target) -> None:
    """Raise ExportError if this machine cannot compile for the hardware."""
    compilers.check_compiler(target.hardware, compilers.compiler_settings(target.options, Path()).arguments)


def _graphs(
    original: Original, task: Type[Task], shapes: Shapes, target: Target
) -> Tuple[Dict[str, fixed_shapes.FixedGraph], Tuple[int, ...]]:
    """Return the graphs by name, and a decoder's target lengths."""
    if task.loop:
        lengths = fixed_shapes.targets(_most_new_tokens(original, (target.options["target_length"],)))
        return fixed_shapes.fixed_graphs(original, shapes, lengths), lengths
    module = once(original, [output.name for output in task.outputs])
    return {
        shapes.graph_name(batch, length): fixed_shapes.FixedGraph(module, example(original, batch, length))
        for batch in shapes.batches or ()
        for length in shapes.lengths or ()
    }, ()


def _most_new_tokens(original: Original, lengths: Tuple[int, ...]) -> int:
    most: int = original.facts["most_new_tokens"]
    return min(most, lengths[-1])


def _check_memory(original: Original, shapes: Shapes, count: int, target: Target) -> None:
    """Raise ExportError if they do not fit: every graph has its own copy of the weights on the chip."""
    weights = sum(parameter.numel() for parameter in original.model.parameters())
    most = int(COMPILERS[target.hardware].weights // max(1, weights))
    if count > most:
        chip = CHIPS[target.hardware].machines
        hint = "set fewer sequence_lengths or batch_sizes" if most else "take a smaller model"
        raise ExportError(
            f"{count} graphs (batch {_listed(shapes.batches)}, length {_listed(shapes.lengths)}) of a model of {weights:,} "
            f"weights do not fit into a core of {chip}, which has memory for {most}; {hint}"
        )


def _listed(numbers: Optional[Sequence[int]]) -> str:
    return ", ".join(map(str, numbers or ()))
