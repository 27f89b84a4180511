"""AWS Neuron's compilers: from a module and its one input shape to a graph for the chip."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from traceserve_runtime.runtimes.torchscript.neuron import CHIPS, OperatorCounts, operators

from traceserve.building.config.hardware import HARDWARE
from traceserve.errors import ExportError
from traceserve.machine import neuron_cores


class CompileError(ExportError):
    """A failure that narrower shapes would not fix."""


class CompilerSettings(NamedTuple):
    """A compiler's settings; `workdir` is this graph's own folder for the compiler's output and logs."""

    arguments: Tuple[str, ...]
    timeout: Optional[int]  # seconds per graph
    workdir: Path


class Compiler(NamedTuple):
    """The compiler for one kind of chip; the graphs' `weights` together must fit into a core's memory."""

    trace: Callable[[Any, torch.nn.Module, Tuple[torch.Tensor, ...], CompilerSettings], torch.nn.Module]
    weights: float
    distributions: Tuple[str, ...]  # their versions are recorded


def _neuron(
    package: Any, module: torch.nn.Module, inputs: Tuple[torch.Tensor, ...], settings: CompilerSettings
) -> torch.nn.Module:
    traced: torch.nn.Module = package.trace(
        module,
        inputs,
        compiler_args=list(settings.arguments) or None,
        compiler_workdir=str(settings.workdir),
        compiler_timeout=settings.timeout,
    )
    return traced


def _neuronx(
    package: Any, module: torch.nn.Module, inputs: Tuple[torch.Tensor, ...], settings: CompilerSettings
) -> torch.nn.Module:
    """Weights are part of the graph, by default. Without a chip the compiler needs a target."""
    without = {} if neuron_cores.count("neuronx") else {"cpu_backend": True}
    traced: torch.nn.Module = package.trace(
        module, inputs, compiler_workdir=str(settings.workdir), compiler_args=list(settings.arguments), **without
    )
    return traced


# An Inf1 core has 2 GB of its chip's memory, one of Inf2 and Trn1 16 GB; a weight takes two bytes.
COMPILERS: Dict[str, Compiler] = {
    "neuron": Compiler(_neuron, 1e9, ("torch-neuron", "neuron-cc")),
    "neuronx": Compiler(_neuronx, 8e9, ("torch-neuronx", "neuronx-cc", "libneuronxla")),
}


def check_compiler(hardware: str, arguments: Tuple[str, ...]) -> None:
    """Raise ExportError if this machine cannot compile for the hardware."""
    package(hardware)
    if not HARDWARE[hardware].partial and not neuron_cores.count(hardware) and not _targeted(arguments):
        raise ExportError(
            f"this machine has no {CHIPS[hardware].machines} chip, so its compiler must be told which one to compile for: "
            'add to setup_config.json "options": {"compiler_args": ["--target", "inf2"]}, or trn1'
        )


def package(hardware: str) -> object:
    """Return the package that compiles for the hardware; raises ExportError without it."""
    name = CHIPS[hardware].package
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: linked against another torch
        raise ExportError(
            f'"hardware": "{hardware}" is compiled by the package {name}, which cannot be imported beside torch '
            f"{torch.__version__}: {error}; docs/inferentia.md describes such an environment"
        ) from error


def versions(hardware: str) -> Dict[str, str]:
    """Return the compiling packages' versions; none for those not installed under their own name."""
    from importlib import metadata

    found = {CHIPS[hardware].package: str(getattr(package(hardware), "__version__", "unknown"))}
    for name in COMPILERS[hardware].distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def compile_graph(
    hardware: str,
    name: str,
    module: torch.nn.Module,
    inputs: Tuple[torch.Tensor, ...],
    settings: CompilerSettings,
    least_share: float,
) -> Tuple[torch.nn.Module, float]:
    """Return the compiled graph and the share of its operators on the chip; raises CompileError."""
    chip, compiler = CHIPS[hardware], COMPILERS[hardware]
    before = operators(torch.jit.trace(module, inputs, check_trace=False))
    try:
        compiled: Any = compiler.trace(package(hardware), module, inputs, settings)
    except subprocess.TimeoutExpired as error:
        raise CompileError(
            f"{chip.package} did not compile the graph {name} within {settings.timeout} s; allow more with the option "
            "compiler_timeout, or compile fewer tokens at once (max_length, batch_sizes)"
        ) from error
    except RuntimeError as error:
        words = (str(error).strip() or type(error).__name__).splitlines()
        raise CompileError(
            f"{chip.package} cannot compile the graph {name}: {words[-1]}{_said(settings.workdir)}"
        ) from error
    share = _share(before, operators(compiled))
    if share is None:
        raise CompileError(
            f"{chip.package} gave the graph {name} back with nothing in it for {chip.machines}: it would run on the CPU "
            f"alone{_said(settings.workdir)}"
        )
    if share < least_share:
        raise CompileError(
            f"{chip.package} placed {share:.0%} of the graph {name} on the chip, and {1 - share:.0%} of its operators would "
            f"run on the CPU; the option least_share asks for {least_share:.0%}"
        )
    return compiled, share


def _share(before: OperatorCounts, after: OperatorCounts) -> Optional[float]:
    """Return the share of operators that are no longer torch's own; None if all are."""
    if not after.compiled:
        return None
    return max(0.0, 1 - after.on_cpu / before.on_cpu) if before.on_cpu else 1.0


def _said(workdir: Path) -> str:
    """Return the last line of the compiler's logs, as the end of an error."""
    logs = sorted(path for path in workdir.rglob("*log*") if path.is_file() and path.suffix in (".txt", ".log"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in logs]
    lines: List[str] = [line for text in texts for line in text.splitlines() if line.strip()]
    return f"; its log ends with: {lines[-1].strip()[:200]}" if lines else ""


def _targeted(arguments: Tuple[str, ...]) -> bool:
    return any(argument.startswith("--target") for argument in arguments)


def compiler_settings(options: Mapping[str, Any], workdir: Path) -> CompilerSettings:
    """Return a configuration's options as the compiler's settings."""
    given = options.get("compiler_args") or []
    arguments = (given,) if isinstance(given, str) else tuple(given)
    return CompilerSettings(arguments, options.get("compiler_timeout"), workdir)
