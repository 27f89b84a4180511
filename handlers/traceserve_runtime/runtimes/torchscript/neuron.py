"""Graphs that were compiled for AWS Neuron's chips: how they are loaded, and what may be wrong with that.

A compiled graph holds operators of the namespace `neuron`, which the package registers that compiled it; so it is imported
before the file is loaded. Loading starts Neuron's runtime, which takes cores for this process alone: one, where the
environment does not say otherwise.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Dict, Iterator, NamedTuple

from traceserve_runtime.errors import InvalidManifest, MissingPackage
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes import graph as graphs
from traceserve_runtime.runtimes.graph import Block, Traced

CORES = "NEURON_RT_NUM_CORES"  # how many cores a process takes; without it: all
CERTAIN_CORES = "NEURON_RT_VISIBLE_CORES"  # or which


class Chip(NamedTuple):
    """The package of torch that a kind of chip needs, the machines that have it, and how many cores one chip has."""

    package: str
    machines: str
    cores: int


CHIPS: Dict[str, Chip] = {
    "neuron": Chip("torch_neuron", "Inf1", 4),
    "neuronx": Chip("torch_neuronx", "Inf2 and Trn1", 2),
}


class Operators(NamedTuple):
    """How many operators of a graph are compiled programs, and how many are torch's own, which run on the CPU."""

    compiled: int
    on_cpu: int


def operators(module: Traced) -> Operators:
    """The operators of one traced or compiled module, those of the modules that it calls included."""
    kinds = list(_kinds(module.inlined_graph))
    return Operators(sum(kind.startswith("neuron::") for kind in kinds), sum(k.startswith("aten::") for k in kinds))


def _kinds(block: Block) -> Iterator[str]:
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from _kinds(inner)


def load(manifest: Manifest, file: Path) -> Traced:
    """The compiled graphs of `file`, by name; each is asked for by the runtime on a core of this process.

    Raises MissingPackage without the package or a free core, InvalidManifest for a file that holds something else.
    """
    chip = CHIPS[manifest.hardware]
    if not os.environ.get(CERTAIN_CORES):
        os.environ.setdefault(CORES, "1")
    _import(chip, manifest)
    try:
        module = graphs.load(file).eval()
    except (RuntimeError, ValueError) as error:
        raise _explained(error, chip, manifest, file) from error
    for name, graph in module.named_children():
        if not operators(graph).compiled:
            raise InvalidManifest(
                f"{file.name}: its graph {name} holds nothing for {chip.machines}, and would run on the CPU alone; build "
                "the archive again"
            )
    return module


def _import(chip: Chip, manifest: Manifest) -> None:
    try:
        importlib.import_module(chip.package)
    except (ImportError, OSError) as error:  # OSError: it was linked against another torch
        import torch

        made = ", ".join(f"{name} {manifest.versions.get(name, 'unknown')}" for name in (chip.package, "torch"))
        raise MissingPackage(
            f"this archive was compiled for {chip.machines} and needs {chip.package}, which cannot be imported beside torch "
            f"{torch.__version__}: {error}; it was made with {made}: serve it from such an environment, as AWS's images "
            "for Neuron have it"
        ) from error


def _explained(error: Exception, chip: Chip, manifest: Manifest, file: Path) -> Exception:
    """What a failed load means."""
    import torch

    words = str(error)
    if "could not be initialized" in words or "cannot be initialized" in words or "not available" in words:
        asked = next((f"{name}={os.environ[name]}" for name in (CERTAIN_CORES, CORES) if os.environ.get(name)), "")
        return MissingPackage(
            f"no NeuronCore for this worker ({asked}): this machine is no {chip.machines}, or its driver is not loaded, or "
            "other processes have all cores (each belongs to one process; `neuron-ls` shows whose they are): "
            f"{words.strip().splitlines()[0]}"
        )
    if "Unknown builtin op" in words or "neuron::" in words:
        return InvalidManifest(
            f"{file.name} holds an operator that this {chip.package} does not know; it was made with {chip.package} "
            f"{manifest.versions.get(chip.package, 'unknown')}: {words.strip().splitlines()[0]}"
        )
    first = (words.strip() or type(error).__name__).split("\n", 1)[0]
    return InvalidManifest(f"{file.name} cannot be loaded by torch {torch.__version__}: {first}")
