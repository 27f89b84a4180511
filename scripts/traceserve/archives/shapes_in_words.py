"""Describes a manifest's shapes for a reader."""

from __future__ import annotations

from traceserve_runtime.manifest import Shapes


def describe_shapes(shapes: Shapes, max_length: int) -> str:
    """Describe the allowed shapes."""
    if shapes.lengths is None:
        lengths = f"any length up to {max_length}"
    else:
        lengths = "length " + ", ".join(map(str, shapes.lengths))
    batches = "any batch" if shapes.batches is None else "batch " + ", ".join(map(str, shapes.batches))
    padding = "" if shapes.padded else ", without padding"
    if shapes.shortest > 1:
        padding += f", rows below {shapes.shortest} tokens padded to that"
    return f"{lengths}, {batches}{padding}" + (", a graph for each" if shapes.graph_per_shape else "")
