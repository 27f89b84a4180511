"""int8: the layers to quantize, and dynamic linear layers that multiply int8 by int8, quantized per token, so that
answers do not depend on the rest of the batch.

Weights are quantized symmetrically per output channel, tokens asymmetrically: the zero point costs one
product with the sums of the weights. Before that, large input channels are scaled down and their weights up by
SmoothQuant's factors (Xiao et al., 2022, arXiv 2211.10438, equation 4, alpha 0.5), measured on sample texts. The layers
that still affect the model's output most are left in float32: more and more of them, until the model passes the gate;
`ladder` is the search of every save mode.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Dict, Iterator, Optional, Sequence, Tuple

import torch

from traceserve.building.writers.lowering.sensitivity import Inputs, Layer, linears, measure_layers, replace_module
from traceserve.building.writers.tracing import torch_internals
from traceserve.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)
_SMALLEST = 1e-5
# Of the median channel. The sample texts may never excite one, as a neuron behind a ReLU; where another text does, its value
# sets the range of the whole token, so its factor must not be that of nothing.
_LEAST_SHARE = 1 / 128


def check_int8() -> None:
    """Raise ExportError where this torch does not multiply int8."""
    if not torch_internals.multiplies_int8():
        raise ExportError(f"dtype int8 needs a torch that multiplies int8, 2.4 or newer; this is {torch.__version__}")


class Int8Linear(torch.nn.Module):
    """A linear layer over int8, from inputs (..., in) to outputs (..., out) in float32."""

    def __init__(self, linear: torch.nn.Linear, largest: torch.Tensor) -> None:
        """`largest`: each input channel's largest absolute value, (in)."""
        super().__init__()
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.sums: torch.Tensor
        self.smoothing: torch.Tensor
        self.bias: torch.Tensor
        weight = linear.weight.detach().float()
        factors = smoothing(weight, largest)
        smoothed = weight * factors
        scale = smoothed.abs().amax(1).clamp(min=_SMALLEST) / 127
        quantized = (smoothed / scale[:, None]).round().clamp(-127, 127)
        for name, value in (
            ("weight", quantized.to(torch.int8)),
            ("scale", scale),
            ("sums", quantized.sum(1) * scale),
            ("smoothing", 1 / factors),
            ("bias", torch.zeros(len(scale)) if linear.bias is None else linear.bias.detach().float()),
        ):
            self.register_buffer(name, value)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Quantize each token by its own range, multiply, and scale back."""
        tokens = inputs.reshape(-1, inputs.shape[-1]) * self.smoothing
        least, most = torch.aminmax(tokens, dim=-1, keepdim=True)
        least = least.clamp(max=0.0)
        step = (most.clamp(min=0.0) - least).clamp(min=_SMALLEST) / 255
        zero = (-128 - least / step).round()
        quantized = (tokens / step + zero).round().clamp(-128, 127).to(torch.int8)
        products = torch_internals.int8_product()(quantized, self.weight.t()).float()
        outputs = torch.addcmul(self.bias, (products * self.scale - zero * self.sums), step)
        return outputs.reshape(*inputs.shape[:-1], outputs.shape[-1])


def smoothing(weight: torch.Tensor, largest: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:
    """Return each input channel's factor, which multiplies its weights and divides its values, (in)."""
    heaviest = weight.abs().amax(0).clamp(min=_SMALLEST)
    excited = largest[largest > _SMALLEST]
    least = float(excited.median()) * _LEAST_SHARE if len(excited) else _SMALLEST
    return largest.clamp(min=max(least, _SMALLEST)) ** alpha / heaviest ** (1 - alpha)


def body_layers(model: PreTrainedModel) -> Dict[str, torch.nn.Linear]:
    """Return the linear layers that may be quantized, by name: all but the head's; raises ExportError for none."""
    inside = set(_body(model).modules())
    layers = {name: module for name, module in linears(model).items() if module in inside}
    if not layers:
        raise ExportError(f"{type(model).__name__} has no torch.nn.Linear that could be quantized to int8")
    return layers


def ladder(
    model: PreTrainedModel,
    batches: Sequence[Inputs],
    measured: Layer,
    layers: Optional[Dict[str, torch.nn.Linear]] = None,
) -> Iterator[Tuple[Dict[str, torch.Tensor], Tuple[str, ...]]]:
    """Yield the layers to quantize, by name, with each input channel's largest absolute value, and the names of more
    and more layers left in float32: those whose replacement by `measured` changes the output most.

    `batches` are inputs to measure on; `layers`, by name, are the body's linear ones unless given. The first step leaves
    none, and so measures none.
    """
    found = measure_layers(model, body_layers(model) if layers is None else layers, batches, measured)
    for kept in found.steps(KEPT_SHARES):
        yield {name: largest for name, largest in found.largest.items() if name not in kept}, kept


def quantized(
    model: PreTrainedModel, batches: Sequence[Inputs], layer: Layer = Int8Linear, measured: Layer = Int8Linear
) -> Iterator[Tuple[PreTrainedModel, Tuple[str, ...]]]:
    """Yield copies of the model for each step of the ladder, with replacements made by `layer`, and the names of the
    layers left in float32."""
    linear = body_layers(model)
    replacements: Dict[str, torch.nn.Module] = {}
    for layers, kept in ladder(model, batches, measured):
        if not replacements:
            replacements = {name: layer(linear[name], largest).eval() for name, largest in layers.items()}
        made = copy.deepcopy(model)
        for name, replacement in replacements.items():
            if name not in kept:
                replace_module(made, name, replacement)
        yield made, kept


def _body(model: PreTrainedModel) -> torch.nn.Module:
    """Return the model without its head, which is small and decisive."""
    body = getattr(model, model.base_model_prefix, None)
    return model if body is None else body
