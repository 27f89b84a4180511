"""The explaining graphs of a traced model, see `runtimes.from_embeddings`.

They have no weights of their own: `gradients.pt` is read like `graph.pt`, and its weights are mapped from the model's
file, so that they share its pages of the page cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Sequence, TypeVar

import numpy as np

from traceserve_runtime.explaining.targets import OutputCell
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays, Runner
from traceserve_runtime.runtimes import graph, team
from traceserve_runtime.runtimes.modes import differentiable, own_dtype
from traceserve_runtime.runtimes.torchscript import devices, weights
from traceserve_runtime.runtimes.torchscript.reader import TorchScriptRunner

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

GRADIENTS_FILE = "gradients.pt"
POSITIONS_FILE = "gradients.json"


class GradientGraphs:
    """The graphs, or calls, `embed` and `outputs` on a device, where a runner has the model itself; see
    explaining.targets.Differentiable."""

    def __init__(self, module: Any, manifest: Manifest, device: str, runner: TorchScriptRunner) -> None:
        self._module = module
        self._manifest = manifest
        self._device = device
        self._team = team.of_torch(runner.most_threads) if device == "cpu" else None

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Look up the word embeddings."""
        import torch

        with own_dtype(), torch.no_grad():
            found: np.ndarray = self._module.embed(torch.from_numpy(ids).to(self._device)).cpu().numpy()
        return found

    def outputs(self, embeddings: np.ndarray, inputs: Arrays) -> Arrays:
        """Run the rest of the model."""
        import torch

        with own_dtype(), torch.no_grad():
            results = self._on_free_cores(self._run, torch.from_numpy(embeddings).to(self._device), inputs)
        return {name: output.cpu().numpy() for name, output in zip(self._manifest.outputs, results)}

    def gradients(self, embeddings: np.ndarray, inputs: Arrays, cells: Sequence[OutputCell]) -> np.ndarray:
        """Run the rest of the model forwards and backwards: rows do not depend on each other, so one sum has all of
        their gradients."""
        return self._on_free_cores(self._gradients, embeddings, inputs, cells)

    def _gradients(self, embeddings: np.ndarray, inputs: Arrays, cells: Sequence[OutputCell]) -> np.ndarray:
        import torch

        with differentiable():
            points = torch.from_numpy(embeddings).to(self._device).requires_grad_(True)
            results = dict(zip(self._manifest.outputs, self._run(points, inputs)))
            total = torch.stack([results[cell.output][cell.everywhere].sum() for cell in cells]).sum()
            [found] = torch.autograd.grad(total, [points])
        gradients: np.ndarray = found.cpu().numpy()
        return gradients

    def _on_free_cores(self, act: Callable[..., Result], *arguments: object) -> Result:
        """Run on the cores that other processes leave, and leave the runner's own choice of cores as it is."""
        import torch

        if self._team is None:
            return act(*arguments)
        with team.threads_kept():
            torch.set_num_threads(self._team.now)
            return self._team.run(act, *arguments)

    def _run(self, embeddings: torch.Tensor, inputs: Arrays) -> Sequence[torch.Tensor]:
        import torch

        others = [torch.from_numpy(inputs[name]).to(self._device) for name in self._manifest.inputs]
        results: Sequence[torch.Tensor] = self._module.outputs(embeddings, *others)
        return results


def read_gradients(manifest: Manifest, folder: Path, device: str, runner: Runner) -> GradientGraphs:
    """Return the graphs of `folder` on `device`, where the model's own, the runner's, was read before; raises
    InvalidManifest."""
    with differentiable():  # weights that are loaded in inference mode never have gradients
        module: Any = graph.read_module(folder / GRADIENTS_FILE, "cpu")
        positions = weights.read_positions(folder, POSITIONS_FILE)
        weights.assign(module, folder / manifest.model_file, positions, POSITIONS_FILE)
    for parameter in module.parameters():
        parameter.requires_grad_(False)  # only the embeddings' gradients are wanted
    if device != "cpu":
        module = module.to(device)
        devices.rewrite(module, device)
    assert isinstance(runner, TorchScriptRunner)
    return GradientGraphs(module, manifest, device, runner)
