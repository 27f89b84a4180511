"""Loads graphs compiled for AWS Neuron's chips, and explains failures.

A compiled graph contains operators of the namespace `neuron`, which the compiling package registers; so it is imported
before the file is loaded. Loading starts Neuron's runtime, which takes cores for this process alone: one, unless the
environment says otherwise.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Dict, NamedTuple

from traceserve_runtime.errors import InvalidManifest, MissingPackage, reason
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes import graph as graphs
from traceserve_runtime.runtimes.graph import Traced
from traceserve_runtime.runtimes.torchscript import devices

CORES = "NEURON_RT_NUM_CORES"  # a process's number of cores; by default all
CERTAIN_CORES = "NEURON_RT_VISIBLE_CORES"  # or which ones


class Chip(NamedTuple):
    """The torch package for a kind of chip, the machines with it, and a chip's number of cores."""

    package: str
    machines: str
    cores: int


CHIPS: Dict[str, Chip] = {
    "neuron": Chip("torch_neuron", "Inf1", 4),
    "neuronx": Chip("torch_neuronx", "Inf2 and Trn1", 2),
}


class OperatorCounts(NamedTuple):
    """The numbers of a graph's operators that are compiled programs, and that are torch's own, which run on the CPU."""

    compiled: int
    on_cpu: int


def operators(module: Traced) -> OperatorCounts:
    """Count the operators of a traced or compiled module, including called modules."""
    kinds = [node.kind() for node in devices.nodes(module.inlined_graph)]
    return OperatorCounts(
        sum(kind.startswith("neuron::") for kind in kinds), sum(k.startswith("aten::") for k in kinds)
    )


def load_graphs(manifest: Manifest, file: Path) -> Traced:
    """Load the compiled graphs of `file`, by name, onto a core of this process.

    Raises MissingPackage without the package or a free core, InvalidManifest if the file contains something else.
    """
    chip = CHIPS[manifest.hardware]
    if not os.environ.get(CERTAIN_CORES):
        os.environ.setdefault(CORES, "1")
    _import(chip, manifest)
    try:
        module = graphs.load_module(file).eval()
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
    except (ImportError, OSError) as error:  # OSError: linked against another torch
        import torch

        made = ", ".join(f"{name} {manifest.versions.get(name, 'unknown')}" for name in (chip.package, "torch"))
        raise MissingPackage(
            f"this archive was compiled for {chip.machines} and needs {chip.package}, which cannot be imported beside torch "
            f"{torch.__version__}: {error}; it was made with {made}: serve it from such an environment, as AWS's images "
            "for Neuron have it"
        ) from error


def _explained(error: Exception, chip: Chip, manifest: Manifest, file: Path) -> Exception:
    """Return the explanation of a failed load."""
    import torch

    words = str(error)
    if "could not be initialized" in words or "cannot be initialized" in words or "not available" in words:
        asked = next((f"{name}={os.environ[name]}" for name in (CERTAIN_CORES, CORES) if os.environ.get(name)), "")
        return MissingPackage(
            f"no NeuronCore for this worker ({asked}): this machine is no {chip.machines}, or its driver is not loaded, or "
            "other processes have all cores (each belongs to one process; `neuron-ls` shows whose they are): "
            f"{reason(error)}"
        )
    if "Unknown builtin op" in words or "neuron::" in words:
        return InvalidManifest(
            f"{file.name} holds an operator that this {chip.package} does not know; it was made with {chip.package} "
            f"{manifest.versions.get(chip.package, 'unknown')}: {reason(error)}"
        )
    return InvalidManifest(f"{file.name} cannot be loaded by torch {torch.__version__}: {reason(error)}")
