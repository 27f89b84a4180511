"""Measures how much a model's output changes if one layer computes differently: a lower precision should leave such
layers."""

from __future__ import annotations

from functools import partial
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from traceserve_runtime.errors import reason

from traceserve.errors import ExportError

# From a linear layer and each input channel's largest absolute value to its replacement.
Layer = Callable[[torch.nn.Linear, torch.Tensor], torch.nn.Module]
Inputs = Dict[str, torch.Tensor]


class Measured:
    """For each layer, by name: each input channel's largest absolute value, `largest`; and the change of the output,
    `moved`, measured when it is first read: a replacement of one layer after the other takes long."""

    def __init__(self, largest: Dict[str, torch.Tensor], measure: Callable[[], Dict[str, float]]) -> None:
        self.largest = largest
        self._measure = measure
        self._moved: Optional[Dict[str, float]] = None

    @property
    def moved(self) -> Dict[str, float]:
        if self._moved is None:
            self._moved = self._measure()
        return self._moved

    def most(self, share: float) -> Tuple[str, ...]:
        """Return the names of this share of the layers: those that affect the output most, in descending order."""
        count = round(share * len(self.largest))
        return tuple(sorted(self.moved, key=lambda name: -self.moved[name])[:count]) if count else ()

    def steps(self, shares: Sequence[float]) -> Iterator[Tuple[str, ...]]:
        """Yield `most` of each share, in ascending order; of a few layers several shares are the same ones, yielded once."""
        last: Optional[Tuple[str, ...]] = None
        for share in shares:
            names = self.most(share)
            if names != last:
                yield names
            last = names


class Bfloat16Linear(torch.nn.Module):
    """A linear layer that multiplies in bfloat16, and returns float32."""

    def __init__(self, linear: torch.nn.Linear, largest: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map inputs (..., in) to outputs (..., out)."""
        return torch.nn.functional.linear(inputs.bfloat16(), self.weight, self.bias).float()


def linears(model: torch.nn.Module) -> Dict[str, torch.nn.Linear]:
    """Return a model's linear layers, by name."""
    return {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear}


def replace_module(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Replace the module of this name in a model."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def measure_layers(
    model: torch.nn.Module, layers: Dict[str, torch.nn.Linear], batches: Sequence[Inputs], change: Layer
) -> Measured:
    """Return the inputs of the model's `layers`, and the change of the output if `change` replaces one of them.

    The change is the mean square of the difference of the first output, which a task reads, summed over the rows of all
    batches. Layers that the model did not call are left out. A model that refuses a batch gets single rows. Raises
    ExportError with the model's own reason.
    """
    try:
        return _measure(model, layers, batches, change)
    except ExportError:
        single = [{name: batch[name][i : i + 1] for name in batch} for batch in batches for i in range(_rows(batch))]
        if len(single) == len(batches):
            raise
        return _measure(model, layers, single, change)


def _measure(
    model: torch.nn.Module, layers: Dict[str, torch.nn.Linear], batches: Sequence[Inputs], change: Layer
) -> Measured:
    largest: Dict[str, torch.Tensor] = {}

    def record(name: str, module: torch.nn.Module, inputs: Tuple[torch.Tensor, ...]) -> None:
        seen = inputs[0].detach().abs().reshape(-1, inputs[0].shape[-1]).amax(0)
        largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

    hooks = [module.register_forward_pre_hook(partial(record, name)) for name, module in layers.items()]
    try:
        exact = list(_outputs(model, batches))
    finally:
        for hook in hooks:
            hook.remove()
    called = {name: module for name, module in layers.items() if name in largest}

    def measure() -> Dict[str, float]:
        moved = {}
        for name, module in called.items():
            replace_module(model, name, change(module, largest[name]).eval())
            try:
                differences: List[torch.Tensor] = [got - one for got, one in zip(_outputs(model, batches), exact)]
            finally:
                replace_module(model, name, module)
            moved[name] = sum(float(one.square().mean()) * _rows(batch) for one, batch in zip(differences, batches))
        return moved

    return Measured(largest, measure)


def _rows(batch: Inputs) -> int:
    return len(next(iter(batch.values())))


def _outputs(model: torch.nn.Module, batches: Sequence[Inputs]) -> Iterator[torch.Tensor]:
    with torch.no_grad():
        for batch in batches:
            try:
                yield model(**batch)[0]
            except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
                raise ExportError(f"{type(model).__name__} does not read a text by itself: {reason(error)}") from error
