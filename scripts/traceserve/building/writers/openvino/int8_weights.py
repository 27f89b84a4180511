"""int8 weights by NNCF for models that run token by token: reading weights takes most of a step's time.

All linear layers and embeddings are rounded, the head's too, each output by its own range; then the layers that change
the output most are left, by the ladder of every save mode.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, Iterator, List, Sequence

import torch
from traceserve_runtime.tasks.contract import TextOrPair

from traceserve.building.checkpoints.original import Original
from traceserve.building.writers.lowering import precision
from traceserve.building.writers.lowering.int8 import ladder
from traceserve.building.writers.lowering.sensitivity import Inputs
from traceserve.building.writers.openvino.quantizer import DTYPE, SMALLEST, layer_of, quantizer, without_bars

_STEPS = 255


class RoundedWeights(torch.nn.Module):
    """A linear layer, or transformers' Conv1D, with NNCF's numbers: weights rounded per output; to measure the
    change."""

    def __init__(self, layer: Any, largest: torch.Tensor) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        weight = weight if isinstance(layer, torch.nn.Linear) else weight.t()
        low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) / _STEPS).clamp(min=SMALLEST)
        zero = (-low / scale).round()
        self.weight = ((weight / scale + zero).round().clamp(0, _STEPS) - zero) * scale
        self.bias = layer.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map inputs (..., in) to outputs (..., out)."""
        return torch.nn.functional.linear(inputs, self.weight, self.bias)


def to_round(original: Original, texts: Sequence[TextOrPair]) -> Iterator[Original]:
    """Yield the original with more and more layers to leave in float32."""
    batches = [_with_written(original, batch) for batch in precision.measured_inputs(original, texts)]
    for _, kept in ladder(original.model, batches, RoundedWeights, _layers(original.model)):
        yield replace(original, dtype=DTYPE, kept=kept)


def round_weights(model: Any, original: Original) -> Any:
    """Return an OpenVINO model, converted from the original, with int8 weights except in its layers to
    leave."""
    nncf = quantizer()
    with without_bars():
        return nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT8_ASYM,
            ignored_scope=nncf.IgnoredScope(names=_kept_operators(model, original), validate=False),
        )


def _layers(model: torch.nn.Module) -> Dict[str, Any]:
    """Return the layers of a model whose weights NNCF rounds, by name, except embeddings."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear or type(module).__name__ == "Conv1D"  # of GPT-2 and its kin
    }


def _with_written(original: Original, batch: Inputs) -> Inputs:
    """Return a model's inputs, for an encoder-decoder with tokens to read as written: the source's."""
    start = original.facts.get("start_id")
    if start is None:
        return batch
    ids = batch["input_ids"]
    return {**batch, "decoder_input_ids": torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)}


def _kept_operators(model: Any, original: Original) -> List[str]:
    """Return the names of the products of the layers to leave, and of all else that reads the same weights."""
    products = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    kept = [node for node in products if layer_of(node.get_friendly_name()) in original.kept]
    return sorted({reader.get_friendly_name() for node in kept for reader in _same_weights(node)})


def _same_weights(product: Any) -> List[Any]:
    """Return a product, and the other operators that read its weights: an embedding may be tied to the head."""
    weights = product.input_value(1)
    while weights.get_node().get_type_name() == "Convert":
        weights = weights.get_node().input_value(0)
    if weights.get_node().get_type_name() != "Constant":
        return [product]
    return [product, *(port.get_node() for port in weights.get_target_inputs())]
