"""Compares the explaining graphs with the served model: an explanation should be of what is served."""

from __future__ import annotations

from pathlib import Path
from typing import List, Optional, Sequence

import numpy as np
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import TraceserveError, last_reason
from traceserve_runtime.explaining.integrated_gradients import columns, repeated
from traceserve_runtime.explaining.targets import Differentiable, OutputCell
from traceserve_runtime.runner import Arrays
from traceserve_runtime.runtimes import GRADIENT_READERS
from traceserve_runtime.runtimes.from_embeddings import NotDifferentiable

from traceserve.building.gate.findings import LIMITS
from traceserve.building.gate.texts import TEXTS

_ROWS = 3  # that run together, as an explanation's steps do
_LENGTHS = 5  # compared, from the shortest of the built-in texts to the longest
# Exceptions of models that cannot be run backwards in inference (Reformer's).
_OF_MODELS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
_LONGEST = 128  # tokens: a full row's gradients would take seconds


def differs(folder: Path) -> Optional[str]:
    """Return why the explaining graphs of an artifact cannot explain it; None if they give its outputs."""
    engine = Engine.load(folder)
    manifest, task = engine.manifest, engine.task
    try:
        model = GRADIENT_READERS[manifest.save_mode](manifest, folder, "cpu", engine.runner)
    except NotDifferentiable as error:
        return str(error)
    except (RuntimeError, ValueError, OSError) as error:
        return f"its graph from the embeddings cannot be read: {error}"
    encoded = task.encode(task.from_texts(TEXTS))
    rows = {row.length: row for each in encoded if not isinstance(each, TraceserveError) for row in each.rows}
    fitting = sorted(n for n in rows if manifest.shapes.shortest <= n <= _LONGEST)
    if not fitting:
        return "no built-in text has a length at which it could be compared with the model"
    limit = LIMITS[manifest.dtype].difference
    for length in _spread(fitting):
        row = rows[length]
        inputs = repeated(columns(row, manifest, row.encoding.ids), _ROWS)
        try:
            served, own = engine.runner(inputs), model.outputs(model.embed(inputs["input_ids"]), inputs)
            finite = _has_gradients(model, inputs, own)
        except NotDifferentiable as error:
            return str(error)
        except _OF_MODELS as error:
            return f"running it from the embeddings fails: {last_reason(error)}"
        for name in manifest.outputs:
            largest = max(1.0, float(np.abs(served[name]).max()))
            difference = float(np.abs(served[name] - own[name]).max()) / largest
            if not difference <= limit:
                return f"run from the embeddings it gives other outputs: {name} by {difference:.1e}"
        if not finite:
            return "its gradients are 0 or not numbers"
    return None


def _spread(lengths: Sequence[int]) -> List[int]:
    """Return a few of these lengths: the first, the last, and others evenly between them."""
    count = min(_LENGTHS, len(lengths))
    return [lengths[number * (len(lengths) - 1) // max(1, count - 1)] for number in range(count)]


def _has_gradients(model: Differentiable, inputs: Arrays, outputs: Arrays) -> bool:
    """Return whether the gradients of an output's first number are numbers, and not all 0."""
    name, output = next(iter(outputs.items()))
    cell = OutputCell(name, (0,) * (output.ndim - 1))
    found = model.gradients(model.embed(inputs["input_ids"]), inputs, [cell])
    return bool(np.isfinite(found).all() and np.abs(found).max() > 0)
