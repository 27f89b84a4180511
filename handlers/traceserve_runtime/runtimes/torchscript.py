"""The save mode torchscript: a traced module, read by `torch.jit.load`."""

from __future__ import annotations

from pathlib import Path

from traceserve_runtime.batching import Arrays, Runner
from traceserve_runtime.errors import InvalidManifest, MissingPackage
from traceserve_runtime.manifest import Manifest


def read(manifest: Manifest, folder: Path, device: str) -> Runner:
    """The traced model of `folder` as a runner on `device` ("cpu", "cuda:0", ...).

    Raises MissingPackage without torch or without the device, InvalidManifest for a file that is no TorchScript.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingPackage(f"this archive needs torch, which cannot be imported: {error}") from error
    if device != "cpu" and not torch.cuda.is_available():
        raise MissingPackage(f"TorchServe asks for the device {device}, but this torch {torch.__version__} sees no GPU")
    _settle_executor()
    try:
        module = torch.jit.load(str(folder / manifest.model_file), map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise InvalidManifest(
            f"{manifest.model_file} cannot be loaded by torch {torch.__version__}: {reason}"
        ) from error

    def runner(inputs: Arrays) -> Arrays:
        arrays = [inputs[name] for name in manifest.inputs]
        graph = (
            getattr(module, manifest.shapes.graph_name(*arrays[0].shape)) if manifest.shapes.graph_per_shape else module
        )
        with torch.inference_mode():
            outputs = graph(*[torch.from_numpy(array).to(device) for array in arrays])
        return {name: output.cpu().numpy() for name, output in zip(manifest.outputs, outputs)}

    return runner


def _settle_executor() -> None:
    """Make TorchScript run the graph as it is from the first call on.

    By default it records shapes for two runs, then specialises and fuses for them, and does so again at other shapes.
    Measured with MiniLM on a CPU: the first request takes 36 ms in place of 72, the second 6 ms in place of 30, and
    later ones are as fast.
    """
    import torch

    torch._C._jit_set_profiling_mode(False)
