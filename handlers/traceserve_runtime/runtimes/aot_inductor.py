"""The save mode aot_inductor: machine code, which only runs on its target."""

from __future__ import annotations

import platform
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Callable, List, Optional, Sequence

from traceserve_runtime import processor
from traceserve_runtime.errors import InvalidManifest, MissingPackage, reason
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays, Padding, RunsOnce
from traceserve_runtime.runtimes import team, torch_internals
from traceserve_runtime.runtimes.modes import inference
from traceserve_runtime.runtimes.torchscript.reader import settle
from traceserve_runtime.runtimes.variants import Variant
from traceserve_runtime.settings import Settings

if TYPE_CHECKING:
    import torch

# `Manifest.runtime`: the compiler's version and target.
TORCH, MACHINE, INSTRUCTIONS = "torch", "machine", "instructions"


class AotInductorRunner(RunsOnce):
    """A compiled model on the CPU; see Runner."""

    padding = Padding()

    def __init__(self, model: Callable[..., Sequence[torch.Tensor]], manifest: Manifest) -> None:
        self._model = model
        self._manifest = manifest
        self._team: Optional[team.Team] = None

    def __call__(self, inputs: Arrays) -> Arrays:
        import torch

        with inference():
            tensors = [torch.from_numpy(inputs[name]) for name in self._manifest.inputs]
            results = self._team.run(self._model, *tensors) if self._team else self._model(*tensors)
            return {name: output.numpy() for name, output in zip(self._manifest.outputs, results)}

    def open_lanes(self) -> Sequence[Executor]:
        return []  # one run at a time

    def share_cores(self) -> None:
        self._team = team.of_torch()


def read(manifest: Manifest, folder: Path, device: str, settings: Settings = Settings()) -> AotInductorRunner:
    """Return the compiled model of `folder` as a runner.

    Raises MissingPackage without torch, with another torch than the compiler's, if the processor lacks a required
    instruction (before the code is loaded, since it would end the process), or where no code may run from TMPDIR.
    """
    if device != "cpu":
        raise MissingPackage(f"the caller asks for the device {device}, but this archive was compiled for the CPU")
    settle(manifest.dtype, device, settings.threads)
    import torch

    _check(manifest, torch.__version__)
    try:
        model = torch_internals.load_compiled(str(folder / manifest.model_file))
    except MissingPackage:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise InvalidManifest(
            f"{manifest.model_file} cannot be loaded by torch {torch.__version__}: {reason(error)}"
        ) from error
    return AotInductorRunner(model, manifest)


def variants(manifest: Manifest, folder: Path, devices: Sequence[str]) -> List[Variant]:
    """Return the only way to run this code."""
    return [Variant(manifest.model_file, "as compiled", "cpu", partial(read, manifest, folder, "cpu"))]


def _check(manifest: Manifest, version: str) -> None:
    """Refuse code for another torch or processor."""
    made_by, machine, needed = (manifest.runtime.get(key) for key in (TORCH, MACHINE, INSTRUCTIONS))
    if not isinstance(made_by, str) or not isinstance(machine, str) or not isinstance(needed, list):
        raise InvalidManifest(f"runtime should name {TORCH}, {MACHINE} and {INSTRUCTIONS}, which this was compiled for")
    if made_by.split("+")[0] != version.split("+")[0]:
        raise MissingPackage(
            f"this archive was compiled for torch {made_by}; this is {version}: install that one, or build the archive with this"
        )
    missing = sorted(set(map(str, needed)) - processor.instructions())
    if machine != platform.machine() or missing:
        what = f"lacks {', '.join(missing)}" if machine == platform.machine() else f"is {platform.machine()}"
        raise MissingPackage(
            f"this archive was compiled for a {machine} processor with more than this one has: it {what}; build it on a machine "
            "like the one that serves, or with another save mode"
        )
