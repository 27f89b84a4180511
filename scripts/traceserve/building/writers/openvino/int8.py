"""Static int8 by NNCF: weights and their inputs, by ranges seen on sample texts; `lowering.int8` chooses the layers.

A range belongs to a tensor, not to a batch, so answers do not depend on the rest of the batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Iterator, List, Sequence

import torch
from traceserve_runtime.tasks.contract import TextOrPair

from traceserve.building.checkpoints.original import Original
from traceserve.building.writers.lowering import precision
from traceserve.building.writers.lowering.int8 import body_layers, ladder, smoothing
from traceserve.building.writers.openvino.quantizer import DTYPE, SMALLEST, layer_of, quantizer, without_bars
from traceserve.errors import ExportError

# Calibration: channels that are large in few texts only are clipped without them.
TEXTS = 256
# The share of the inputs' range that is moved into the weights. NNCF's 0.95 makes more of the weights' rounding than it
# saves of the inputs': outputs of a classifier, a tagger and an encoder moved a tenth to a sixth less with this one.
_ALPHA = 0.85
# Operators that stay as they are, whatever is beside them; a graph may have none. Embeddings, as in the other save
# modes; and attention, which is computed in float32 anyhow: NNCF would round its queries and keys for nothing.
_LEFT_TYPES = ["Gather", "ScaledDotProductAttention"]
_LARGEST = 127


class StaticLinear(torch.nn.Module):
    """A linear layer with the numbers of NNCF's: smoothed, its weights rounded per output, its inputs per tensor; to
    measure the change."""

    def __init__(self, linear: Any, largest: torch.Tensor) -> None:
        """`largest`: each input channel's largest absolute value, (in)."""
        super().__init__()
        weight = linear.weight.detach().float()
        self.factors = smoothing(weight, largest, _ALPHA)
        weight = weight * self.factors
        self.weight = _rounded(weight, weight.abs().amax(1, keepdim=True))
        self.range = (largest / self.factors).amax()
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map inputs (..., in) to outputs (..., out)."""
        return torch.nn.functional.linear(_rounded(inputs / self.factors, self.range), self.weight, self.bias)


def _rounded(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    scale = (largest / _LARGEST).clamp(min=SMALLEST)
    return (values / scale).round().clamp(-_LARGEST, _LARGEST) * scale


def to_calibrate(original: Original, texts: Sequence[TextOrPair]) -> Iterator[Original]:
    """Yield the original with its inputs for these texts, and more and more layers to leave in float32."""
    calibration = tuple(precision.inputs_of(original, texts))
    for _, kept in ladder(original.model, precision.measured_inputs(original, texts), StaticLinear):
        yield replace(original, dtype=DTYPE, kept=kept, calibration=calibration)


def quantize_statically(model: Any, original: Original) -> Any:
    """Return an OpenVINO model, converted from the original, in int8; its layers to leave and its head stay as they
    are."""
    nncf = quantizer()
    rows = _single_rows(original)
    with without_bars():
        return nncf.quantize(
            model,
            nncf.Dataset(rows),
            subset_size=len(rows),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=_left(model, original), types=_LEFT_TYPES, validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                # The fix makes weights smaller, against sums that overflow without VNNI: such processors are refused.
                overflow_fix=nncf.OverflowFix.DISABLE,
                # By default ranges are averaged over the texts, and clip some of them: more answers change.
                activations_range_estimator_params=nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX,
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=_ALPHA),
                # It takes half of the time, and moved the outputs no less.
                disable_bias_correction=True,
            ),
        )


def _single_rows(original: Original) -> List[Any]:
    """Return each calibration row by itself: NNCF's statistics are of what it is given at once."""
    return [
        {name: tensor[row : row + 1].numpy() for name, tensor in batch.items()}
        for batch in original.calibration
        for row in range(len(batch[original.inputs[0]]))
    ]


def _left(model: Any, original: Original) -> List[str]:
    """Return the names of the products to leave, those of attention included; raises ExportError if the graph does not
    tell its layers apart."""
    layers = set(body_layers(original.model))
    products = [node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    owners = {name: layer_of(name) for name in products}
    if not {*original.kept} <= {*owners.values()} or not layers & {*owners.values()}:
        raise ExportError(f"OpenVINO's graph of {type(original.model).__name__} does not name its linear layers")
    return [name for name, layer in owners.items() if layer not in layers or layer in original.kept]
