"""The save mode torchscript: a traced module, loaded by `torch.jit.load`."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from traceserve_runtime import processor
from traceserve_runtime.batching.batches import filled
from traceserve_runtime.errors import MissingPackage
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import IN_ATTENTION, Arrays, Padding, State
from traceserve_runtime.runtimes import graph, team, torch_internals
from traceserve_runtime.runtimes.caches import FIXED_STATES
from traceserve_runtime.runtimes.modes import inference
from traceserve_runtime.runtimes.torchscript import (
    attention,
    devices,
    grouped_queries,
    growing,
    neuron,
    packing,
    weights,
)
from traceserve_runtime.runtimes.torchscript.fixed_shapes import PaddedRunner
from traceserve_runtime.runtimes.torchscript.states import Copied, InPlace, States
from traceserve_runtime.runtimes.variants import Variant
from traceserve_runtime.settings import Settings

if TYPE_CHECKING:
    import torch


# In `Manifest.runtime`: whether a CPU's graph computes padding only in attention, and the multiple to which it rounds
# up a run's tokens, also for a single row.
UNPADDED, FILLED = "unpadded", "filled"


class TorchScriptRunner:
    """A traced model on a device, or one with its interface; see Runner. Its state is a tuple of tensors there.

    `side_by_side`: runs of several calling threads do not wait for each other. `own_threads`: the code is for
    a fixed number of threads, and would be recompiled for another. `states`: how a loop's are kept; by default copied.
    """

    def __init__(
        self,
        module: Any,
        manifest: Manifest,
        device: str,
        side_by_side: bool = False,
        padding: Padding = Padding(),
        own_threads: bool = False,
        states: Optional[States] = None,
    ) -> None:
        self.padding = padding
        self._states = Copied(manifest.runtime.get(FIXED_STATES, 0)) if states is None else states
        self._module = module
        self._manifest = manifest
        self._device = device
        self._side_by_side = side_by_side
        self._own_threads = own_threads
        self._team: Optional[team.Team] = None

    def __call__(self, inputs: Arrays) -> Arrays:
        shapes = self._manifest.shapes
        tensors = self._tensors(inputs, self._manifest.inputs)
        graph = getattr(self._module, shapes.graph_name(*tensors[0].shape)) if shapes.graph_per_shape else self._module
        return self._outputs(self._run(graph, tensors))

    def start(self, inputs: Arrays) -> State:
        return tuple(self._run(self._module.start, self._tensors(inputs, self._manifest.inputs)))

    def step(self, inputs: Arrays, state: State, rows: Optional[np.ndarray] = None) -> Tuple[Arrays, State]:
        import torch

        chosen = None if rows is None else torch.from_numpy(rows).to(self._device)
        new = self._tensors(inputs, self._manifest.step_inputs)
        with inference():
            state = self._states.before(state, new[0].shape[1], chosen)
        results = self._run(self._module.step, [*new, *state])
        return self._outputs(results), self._states.after(state, results[len(self._manifest.outputs) :])

    def join(self, states: Sequence[State], length: int) -> State:
        with inference():
            return self._states.join(states, length)

    def open_lanes(self) -> Sequence[Executor]:
        if not self._side_by_side:
            return []
        with team.threads_kept() as threads:
            lanes = [ThreadPoolExecutor(1, f"lane-{i}") for i in range(threads)] if threads > 1 else []
            for lane in lanes:
                lane.submit(team.take_one_core).result()
        return lanes

    def share_cores(self) -> None:
        if self._device == "cpu" and self._manifest.hardware not in neuron.CHIPS and not self._own_threads:
            self._team = team.of_torch()

    @property
    def most_threads(self) -> Optional[int]:
        """On how many cores it runs while nobody holds one; None if it does not share them, and so has torch's number."""
        return self._team.most if self._team else None

    def warm(self) -> None:
        """Run each shape's graph once: the first run loads a compiled one into the chip."""
        shapes = self._manifest.shapes
        for batch in shapes.batches or ():
            for length in shapes.lengths or ():
                self(filled(self._manifest, batch, length))

    def _tensors(self, inputs: Arrays, names: Sequence[str]) -> Sequence[torch.Tensor]:
        import torch

        return [torch.from_numpy(inputs[name]).to(self._device) for name in names]

    def _run(self, graph: Any, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        with inference():
            outputs: Sequence[torch.Tensor] = self._team.run(graph, *tensors) if self._team else graph(*tensors)
        return outputs

    def _outputs(self, results: Sequence[torch.Tensor]) -> Arrays:
        return {name: output.cpu().numpy() for name, output in zip(self._manifest.outputs, results)}


def read(
    manifest: Manifest, folder: Path, device: str, settings: Settings = Settings()
) -> Union[TorchScriptRunner, PaddedRunner]:
    """Return the traced model of `folder` as a runner on `device` ("cpu", "cuda:0", ...).

    Graphs compiled for a chip run there, whatever the device. Raises MissingPackage without torch, the device or a
    processor feature that the dtype needs, InvalidManifest if the file is not TorchScript.
    """
    return _read(manifest, folder, device, settings.threads, _reading(manifest, device, settings))


class _Reading(NamedTuple):
    """How the files are read, depending on device, processor and settings; `variants` lists every way.

    `mapped`: only the graph, with the weights of the model's file. `plain`: that file as loaded by torch.jit.load and
    run by torch's own executor, in Python or C++, without this runtime.
    """

    mapped: bool = False
    packed: bool = False
    wide_attention: bool = False
    plain: bool = False

    @property
    def name(self) -> str:
        """Its name in the receipt."""
        if self.plain:
            return "by plain torch.jit.load"
        weights_are = "weights packed" if self.packed else "weights mapped" if self.mapped else "moved to its device"
        return weights_are + (", attention in float32" if self.wide_attention else "")


def _reading(manifest: Manifest, device: str, settings: Settings) -> _Reading:
    """Return this machine's way of reading it."""
    mapped = device == "cpu" and weights.GRAPH_FILE in manifest.files
    wide = device == "cpu" and manifest.dtype == "bfloat16" and attention.sooner_wide()
    return _Reading(mapped, mapped and settings.pack_weights, wide)


def variants(manifest: Manifest, folder: Path, devices: Sequence[str]) -> List[Variant]:
    """Return the ways to run these files on these devices; first a single worker's default here.

    Not each number of threads or `length_step`: the graph is the same, and the gate pads rows to any length.
    """
    if manifest.hardware in neuron.CHIPS:
        return [Variant(manifest.model_file, "as compiled", manifest.hardware, partial(read, manifest, folder, "cpu"))]
    found = [(device, reading) for device in devices for reading in _readings(manifest, device)]
    return [
        Variant(
            weights.GRAPH_FILE if reading.mapped else manifest.model_file,
            reading.name,
            device,
            partial(_read, manifest, folder, device, None, reading),
        )
        for device, reading in found
    ]


def _readings(manifest: Manifest, device: str) -> List[_Reading]:
    first = _reading(manifest, device, Settings())
    if device != "cpu":
        return [first]
    packed = [first.packed, not first.packed] if first.mapped and packing.possible() else [first.packed]
    either = manifest.dtype == "bfloat16" and torch_internals.rewrites()
    wide = [first.wide_attention, not first.wide_attention] if either else [first.wide_attention]
    found = [first._replace(packed=p, wide_attention=w) for w in wide for p in packed]
    return [*found, _Reading(plain=True)]


def _read(
    manifest: Manifest, folder: Path, device: str, threads: Optional[int], reading: _Reading
) -> Union[TorchScriptRunner, PaddedRunner]:
    compiled = manifest.hardware in neuron.CHIPS
    if compiled:  # not in the CPU's bfloat16
        settle("float32", "cpu", threads)
    else:
        settle(manifest.dtype, device, threads)
    _settle_executor()

    if compiled:
        runner = _runner(neuron.load_graphs(manifest, folder / manifest.model_file), manifest, "cpu")
        runner.warm()
        return runner
    module = graph.read_module(folder / (weights.GRAPH_FILE if reading.mapped else manifest.model_file), device)
    if reading.plain:
        return _runner(_Plain(module), manifest, device)
    if device != "cpu":
        devices.rewrite(module, device)
    else:
        grouped_queries.group(module)
    if reading.wide_attention:
        attention.widen(module)
    if reading.mapped:
        pages = weights.assign(module, folder / manifest.model_file, weights.read_positions(folder))
        if reading.packed and packing.pack(module):
            weights.give_back(pages)
    unpadded = reading.mapped and manifest.runtime.get(UNPADDED)
    padding = IN_ATTENTION._replace(alone=manifest.runtime.get(FILLED, 1)) if unpadded else Padding()
    kept = growing.write_behind(module, manifest) if device == "cpu" else None
    return _runner(module, manifest, device, padding, InPlace(kept) if kept else None)


class _Plain:
    """A module, or one of its graphs, run by torch's executor with its defaults: it profiles, then specialises."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, *tensors: torch.Tensor) -> object:

        before = torch_internals.set_profiling(True)
        try:
            return self._module(*tensors)
        finally:
            torch_internals.set_profiling(before)

    def __getattr__(self, name: str) -> _Plain:
        return _Plain(getattr(self._module, name))


def _runner(
    module: Any, manifest: Manifest, device: str, padding: Padding = Padding(), states: Optional[States] = None
) -> Union[TorchScriptRunner, PaddedRunner]:
    """Return the runner of these graphs: with fixed shapes, writers have target lengths."""
    targets = manifest.runtime.get("targets")
    if targets:
        return PaddedRunner(module, manifest, targets)
    side_by_side = device == "cpu" and manifest.hardware not in neuron.CHIPS
    return TorchScriptRunner(module, manifest, device, side_by_side, padding, states=states)


def settle(dtype: str, device: str, threads: Optional[int]) -> None:
    """Prepare torch for a model of this dtype; raises MissingPackage if it or the machine lacks something."""
    try:
        import torch
    except ImportError as error:
        raise MissingPackage(f"this archive needs torch, which cannot be imported: {error}") from error
    if device != "cpu" and not torch.cuda.is_available():
        raise MissingPackage(f"the caller asks for the device {device}, but this torch {torch.__version__} sees no GPU")
    if device == "cpu":
        processor.check_dtype(dtype)
    with team.COUNTING:
        if device == "cpu":
            # torch takes all cores of the process's affinity, even if a container's quota is lower.
            threads = threads or min(torch.get_num_threads(), processor.cores())
        if threads is not None and threads != torch.get_num_threads():
            torch.set_num_threads(threads)


def _settle_executor() -> None:
    """Make TorchScript run the graph unchanged from the first call on.

    By default it records shapes for two runs, then specialises and fuses for them, and again for other shapes.
    Measured with MiniLM on a CPU: the first request takes 36 ms instead of 72, the second 6 ms instead of 30, and
    later ones are as fast.
    """
    torch_internals.set_profiling(False)
