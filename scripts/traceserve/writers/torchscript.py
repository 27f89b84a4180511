"""The save mode torchscript: `torch.jit.trace`, and a file that plain `torch.jit.load` reads."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Tuple

if TYPE_CHECKING:
    from traceserve_runtime.manifest import Shapes

    from traceserve.loading import Original

MODEL_FILE = "traced_model.pt"
# Where any shape is allowed: neither 1, nor a size that the model itself has.
TRACED_BATCH = 3
TRACED_LENGTH = 11


def write(original: Original, outputs: Tuple[str, ...], shapes: Shapes, folder: Path) -> None:
    """Trace the model and write `folder/traced_model.pt`: one graph, or one for each shape over the same weights.

    Raises ExportError with the model's own reason where it cannot be traced.
    """
    import torch

    from traceserve.errors import ExportError
    from traceserve.wrapping import Wrapped, example, masks_without_vmap

    any_length = min(TRACED_LENGTH, original.max_length)
    module = Wrapped(original.model, original.inputs, outputs)

    def trace(batch: int, length: int) -> torch.jit.ScriptModule:
        inputs = example(original, batch, length)
        # The trace is compared with the original by the gate, at many shapes, and not by torch at the traced one.
        return torch.jit.trace(module, inputs, check_trace=False)  # type: ignore[no-any-return, no-untyped-call]

    try:
        with warnings.catch_warnings(), masks_without_vmap(), torch.no_grad():
            warnings.simplefilter("ignore")  # tracer warnings: the gate proves what they suspect
            if shapes.graph_per_shape:
                graphs = {
                    shapes.graph_name(batch, length): trace(batch, length)
                    for batch in shapes.batches or (TRACED_BATCH,)
                    for length in shapes.lengths or (any_length,)
                }
                saved: torch.nn.Module = torch.jit.script(torch.nn.ModuleDict(graphs))
            else:
                saved = trace(TRACED_BATCH, max(shapes.lengths) if shapes.lengths else any_length)
            torch.jit.save(saved, str(folder / MODEL_FILE))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"torch.jit.trace cannot trace {type(original.model).__name__}: {reason}") from error
