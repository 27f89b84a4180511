"""Dynamic int8: linear layers that multiply int8 by int8, each token quantized by itself, so that no answer depends on what
else is in its batch.

Weights are quantized symmetrically for each output channel. Tokens are quantized asymmetrically: the zero point costs one
product with the sums of the weights. Before that, large input channels are made smaller and their weights larger by the
factors of SmoothQuant (Xiao et al., 2022, arXiv 2211.10438, equation 4, alpha 0.5), measured on sample texts. The layers
that still move the model's output most are left in float32: more and more of them, until the gate lets the model through.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Callable, Dict, Iterator, Sequence, Tuple

import torch

from traceserve.errors import ExportError

KEPT_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)
_SMALLEST = 1e-5

# A linear layer and, of each of its input channels, the largest absolute value that was seen, to what replaces it.
Layer = Callable[[Any, torch.Tensor], torch.nn.Module]


class Int8Linear(torch.nn.Module):
    """A linear layer over int8, from inputs (..., in) to outputs (..., out) in float32."""

    def __init__(self, linear: Any, largest: torch.Tensor) -> None:
        """`largest`: of each input channel the largest absolute value that was seen, (in)."""
        super().__init__()
        if not hasattr(torch, "_int_mm"):
            raise ExportError(
                f"dtype int8 needs a torch that multiplies int8, 2.4 or newer; this is {torch.__version__}"
            )
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
        """Quantize each token over its own range, multiply, and scale back."""
        tokens = inputs.reshape(-1, inputs.shape[-1]) * self.smoothing
        least, most = torch.aminmax(tokens, dim=-1, keepdim=True)
        least = least.clamp(max=0.0)
        step = (most.clamp(min=0.0) - least).clamp(min=_SMALLEST) / 255
        zero = (-128 - least / step).round()
        quantized = (tokens / step + zero).round().clamp(-128, 127).to(torch.int8)
        products = torch._int_mm(quantized, self.weight.t()).float()
        outputs = torch.addcmul(self.bias, (products * self.scale - zero * self.sums), step)
        return outputs.reshape(*inputs.shape[:-1], outputs.shape[-1])


def smoothing(weight: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Of each input channel what its weights are multiplied with, and its values divided by, (in)."""
    heaviest = weight.abs().amax(0)
    return (largest.clamp(min=_SMALLEST) / heaviest.clamp(min=_SMALLEST)).sqrt()


def quantized(
    model: Any,
    batches: Sequence[Dict[str, torch.Tensor]],
    layer: Layer = Int8Linear,
    measured: Layer = Int8Linear,
) -> Iterator[Any]:
    """Copies of the model with more and more layers left in float32; `batches` are inputs to measure on.

    What replaces the others is made by `layer`; which ones are left is found by what `measured` changes in their place.
    """
    linears = {name: module for name, module in _body(model).named_modules() if type(module) is torch.nn.Linear}
    if not linears:
        raise ExportError(f"{type(model).__name__} has no torch.nn.Linear that could be quantized to int8")
    largest, losses = _measure(model, linears, batches, measured)
    replacements = {name: layer(module, largest[name]).eval() for name, module in linears.items()}
    by_loss = sorted(linears, key=lambda name: -losses[name])
    for share in KEPT_SHARES:
        kept = set(by_loss[: round(share * len(linears))])
        made = copy.deepcopy(model)
        body = _body(made)
        for name in linears:
            if name not in kept:
                parent, _, last = name.rpartition(".")
                setattr(body.get_submodule(parent), last, replacements[name])
        yield made


def _body(model: Any) -> Any:
    """The model without its head, which is small and decides."""
    body = getattr(model, model.base_model_prefix, None)
    return model if body is None else body


def _measure(
    model: Any, linears: Dict[str, Any], batches: Sequence[Dict[str, torch.Tensor]], measured: Layer
) -> Tuple[Dict[str, torch.Tensor], Dict[str, float]]:
    """For each layer the largest value of each input channel, and how far `measured` in its place moves the model's output."""
    largest: Dict[str, torch.Tensor] = {}

    def record(name: str, module: Any, inputs: Any) -> None:
        seen = inputs[0].detach().abs().reshape(-1, inputs[0].shape[-1]).amax(0)
        largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

    hooks = [module.register_forward_pre_hook(partial(record, name)) for name, module in linears.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    losses = {}
    with torch.no_grad():
        exact = [_output(model(**batch)) for batch in batches]
        for name, module in linears.items():
            parent, _, last = name.rpartition(".")
            owner = _body(model).get_submodule(parent)
            setattr(owner, last, measured(module, largest[name]).eval())
            outputs = [_output(model(**batch)) for batch in batches]
            setattr(owner, last, module)
            losses[name] = sum(float((one - other).square().mean()) for one, other in zip(outputs, exact))
    return largest, losses


def _output(result: Any) -> torch.Tensor:
    """The first output of the model: what its task reads."""
    first: torch.Tensor = result[0]
    return first
