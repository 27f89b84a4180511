"""Calls of a model from its word embeddings: from token ids to these, and from these to the outputs.

The second reads the same inputs as the model, since some models take positions from token ids; a hook puts the given
embeddings into the place of its own. So it works for every model that looks its embeddings up once, whether its
`forward` takes `inputs_embeds` or not. The builder traces these calls, and the reader of the save mode pretrained makes
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Tuple

from traceserve_runtime.runtimes.calling import Single

if TYPE_CHECKING:
    import torch


class NotDifferentiable(RuntimeError):
    """The model has no gradients of its embeddings; the message says why."""


class LookUp:
    """Maps token ids, int64 of shape (batch, length), to word embeddings, float32 of shape (batch, length, size)."""

    def __init__(self, embeddings: torch.nn.Module) -> None:
        self.model = embeddings

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(ids)
        return found.float()


class FromEmbeddings:
    """Maps word embeddings and the model's inputs to the outputs of `call`.

    Raises NotDifferentiable if the model does not look its embeddings up once.
    """

    def __init__(self, call: Single, embeddings: torch.nn.Module) -> None:
        self.model = call.model
        self._call = call
        weight = getattr(embeddings, "weight", None)
        # An encoder and a decoder may have modules of their own for the same embeddings.
        self._looking_up = [part for part in call.model.modules() if part is embeddings or _looks_up(part, weight)]

    def __call__(self, embeddings: torch.Tensor, *tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        replaced: List[object] = []

        def replace(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
            replaced.append(None)
            return embeddings.to(output.dtype)

        hooks = [part.register_forward_hook(replace) for part in self._looking_up]
        try:
            outputs = self._call(*tensors)
        finally:
            for hook in hooks:
                hook.remove()
        if len(replaced) != 1:
            name = type(self.model).__name__
            raise NotDifferentiable(
                f"{name} looks its word embeddings up {len(replaced)} times, and gradients need one"
            )
        return outputs


def _looks_up(part: torch.nn.Module, weight: object) -> bool:
    """Return whether a module looks up rows of this weight."""
    import torch

    return isinstance(part, torch.nn.Embedding) and part.weight is weight


def word_embeddings(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model's word embeddings; raises NotDifferentiable if it does not say which they are."""
    import torch

    try:
        found: object = model.get_input_embeddings()  # type: ignore[operator]  # transformers models have it
    except (AttributeError, NotImplementedError, TypeError):
        found = None
    if not isinstance(found, torch.nn.Module):
        raise NotDifferentiable(f"{type(model).__name__} does not say which module has its word embeddings")
    return found
